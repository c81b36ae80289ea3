"""The main job: an algorithm runs on a dataset and leaves a new dataset."""

from __future__ import annotations

from typing import Annotated, Any, cast

from prefect import runtime
from prefect.artifacts import create_markdown_artifact
from prefect.blocks.core import Block
from prefect.logging import get_run_logger
from pydantic import WithJsonSchema, WrapValidator

from .. import documents, settings
from ..blocks import Algorithm, Dataset, DatasetStore
from ..documents import document_flow
from ..errors import DatasetError, OasisError, UnsafeName
from ..job import ContainerExit, Reason
from ..lifecycle import announce, clean_up, failed, owned_workspace
from ..log import last_lines
from ..manifest import Summary
from ..plan import Plan, plan_run
from ..record import oasis_status, page
from ..tasks import prepare_image, publish_output, run_container, stage_input, stage_seconds
from ..workspace import Workspace

# A Python caller may give a document's name; the form and the schema know documents only.
_OR_NAME = WrapValidator(lambda value, validate: value if isinstance(value, str) else validate(value))
# Prefect's form shows a JSON editor for a value of no particular type, and nothing to type into for `object or null`.
_JSON_EDITOR = WithJsonSchema({})


def _run_name() -> str:
    given = runtime.flow_run.parameters
    return f"{_name_of(given.get('algorithm'))} on {_name_of(given.get('input_dataset'))}"


def _name_of(value: object) -> str:
    if isinstance(value, Block):
        return str(value._block_document_name or getattr(value, "url", value.get_block_type_slug()))
    return value if isinstance(value, str) else "?"


@document_flow(name="algorithm-task", flow_run_name=_run_name, on_cancellation=[clean_up], on_crashed=[clean_up])
def algorithm_task(
    algorithm: Annotated[Algorithm, _OR_NAME],
    input_dataset: Annotated[Dataset, _OR_NAME],
    *,
    output_name: str | None = None,
    store: Annotated[DatasetStore | None, _OR_NAME] = None,
    parameters: Annotated[dict[str, Any] | None, _JSON_EDITOR] = None,
) -> Dataset:
    """Run an algorithm on a dataset, and publish what it writes as a new dataset.

    Args:
        algorithm: The algorithm to run.
        input_dataset: The dataset it reads.
        output_name: Name of the output's Dataset document. A later run under the same name replaces the document, never the
            data. Left at None, each run makes a new name.
        store: Where the output is published. Left at None, that is the store document named default, or else a folder of the
            worker's machine.
        parameters: Values for the algorithm's parameters, such as {"threshold": 2.0}. What is left out has its default.

    Returns:
        The published dataset.

    Raises:
        AlgorithmFailed: it ran and did not succeed; its log, record and output are kept beside where the dataset would be.
        DescriptionError: something is wrong as written; nothing was started.
        DatasetError: the data or the store need mending.
        EngineError: the container engine failed; what the algorithm would have done is unknown.
    """
    try:
        here = settings.current()
        plan = plan_run(
            documents.resolved(Algorithm, algorithm),
            documents.resolved(Dataset, input_dataset),
            output_name=output_name,
            store=documents.resolved(DatasetStore, store) if store else documents.find(DatasetStore, "default"),
            parameters=parameters,
            settings=here,
            run_id=str(runtime.flow_run.id),
            attempt=runtime.flow_run.run_count or 1,
        )
        announce(plan)
        with owned_workspace(plan, here) as workspace:
            image = prepare_image(plan, workspace, here)
            input_folder, staged = stage_input(plan, workspace)
            exit = run_container(plan, workspace, here, image=image, input_folder=input_folder)
            dataset = _publish(plan, workspace, image, staged, exit)
    except OasisError as error:
        return cast(Dataset, failed(error))
    return dataset


def _publish(plan: Plan, workspace: Workspace, image: str, staged: Summary, exit: ContainerExit) -> Dataset:
    """Publish what there is, show the run's page, and return the dataset or raise what the run ends with."""
    flow_run = {"id": plan.run_id, "name": str(runtime.flow_run.name), "ui_url": str(runtime.flow_run.ui_url or "")}
    published: Summary | None = None
    dataset: Dataset | None = None
    problem: DatasetError | None = None
    try:
        published, dataset = publish_output(plan, workspace, image=image, staged=staged, exit=exit, flow_run=flow_run)
    except DatasetError as error:
        problem = error
    refused = problem if isinstance(problem, UnsafeName) else None
    tail = last_lines(workspace.log, 30)
    text = page(
        plan,
        image=image,
        staged=staged,
        exit=exit,
        published=published,
        seconds=stage_seconds(workspace),
        tail=tail,
        refused=refused,
    )
    what = f"{oasis_status(exit, problem)}: {plan.algorithm_name} on {plan.dataset_name}, output {plan.document_name}"
    try:
        create_markdown_artifact(text, key="oasis-run", description=what)
    except Exception as error:  # noqa: BLE001  # a page that cannot be shown changes nothing about what became of the run
        get_run_logger().warning("The run's page could not be saved: %s", error)
    if problem and exit.reason is Reason.OK:
        raise problem
    if problem:
        # The algorithm's failure is what its owner has to know; that nothing of it could be kept comes second.
        get_run_logger().error("The output of the failed algorithm could not be published: %s", problem)
    log = str(workspace.log) if problem else f"{plan.output.url}/log.txt"
    exit.raise_for_status(f"The algorithm {plan.algorithm_name}", tail[-5:], log=log)
    return cast(Dataset, dataset)
