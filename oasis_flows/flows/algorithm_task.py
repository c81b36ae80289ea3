"""The main job: an algorithm runs on a dataset and leaves a new dataset."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any, cast
from uuid import UUID

from prefect import flow, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.logging import get_run_logger
from prefect.states import Failed
from pydantic import BeforeValidator, WithJsonSchema

from .. import documents, lease, settings
from ..blocks import Algorithm, Dataset, DatasetStore
from ..errors import AlgorithmFailed, DatasetError, OasisError, UnsafeName, first_sentence
from ..job import ContainerExit, Reason
from ..log import last_lines
from ..machine import open_engine
from ..manifest import Summary
from ..plan import Plan, plan_run
from ..reaper import reap
from ..record import oasis_status, page
from ..settings import Settings
from ..tasks import MARKER_RUN, prepare_image, publish_output, run_container, stage_input, stage_seconds
from ..workspace import Workspace, open_workspace

LABEL_OUTPUT, LABEL_HOST = "oasis.output", "oasis.host"


def _or_name(block_type: type[Block]) -> BeforeValidator:
    """Let a Python caller pass a document's name where a block is asked for."""
    return BeforeValidator(lambda value: documents.load(block_type, value) if isinstance(value, str) else value)


# Prefect's form shows a JSON editor for a value of no particular type, and nothing to type into for `object or null`.
_JSON_EDITOR = WithJsonSchema({})


def _run_name() -> str:
    given = runtime.flow_run.parameters
    return f"{_name_of(given.get('algorithm'))} on {_name_of(given.get('input_dataset'))}"


def _name_of(value: object) -> str:
    if isinstance(value, Block):
        return str(value._block_document_name or getattr(value, "url", value.get_block_type_slug()))
    return value if isinstance(value, str) else "?"


def clean_up(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001
    """Remove what a cancelled or crashed run may have left on this machine. Prefect calls it with exactly these names."""
    here = settings.current()
    workspace = Workspace(here.workspaces / str(flow_run.id))
    open_engine(here).reap(str(flow_run.id))
    # A crashed run of a deployment can be retried, and then finds its workspace.
    if (state.is_cancelled() or state.is_cancelling() or flow_run.deployment_id is None) and lease.lapsed(workspace.lease, 0):
        workspace.remove()


@flow(name="algorithm-task", flow_run_name=_run_name, on_cancellation=[clean_up], on_crashed=[clean_up])
def algorithm_task(
    algorithm: Annotated[Algorithm, _or_name(Algorithm)],
    input_dataset: Annotated[Dataset, _or_name(Dataset)],
    *,
    output_name: str | None = None,
    store: Annotated[DatasetStore | None, _or_name(DatasetStore)] = None,
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
            algorithm,
            input_dataset,
            output_name=output_name,
            store=store or documents.find(DatasetStore, "default"),
            parameters=parameters,
            settings=here,
            run_id=str(runtime.flow_run.id),
            attempt=runtime.flow_run.run_count or 1,
        )
        _announce(plan)
        with _owned_workspace(plan, here) as workspace:
            input_folder, staged = stage_input(plan, workspace)
            image = prepare_image(plan, workspace, here)
            exit = run_container(plan, workspace, here, image=image, input_folder=input_folder)
            published, dataset = _publish(plan, workspace, image, staged, exit)
            _report(plan, workspace, image, staged, exit, published)
            exit.raise_for_status(
                f"The algorithm {plan.algorithm_name}", last_lines(workspace.log, 5), log=f"{plan.output.url}/log.txt"
            )
    except OasisError as error:
        return cast(Dataset, _failed(error))
    assert dataset is not None  # noqa: S101  # publish_output's promise for a run that succeeded
    return dataset


def _announce(plan: Plan) -> None:
    """Write on the flow run whose it is and where its output goes, so that people and `oasis-flows log` find both."""
    run_id = UUID(plan.run_id)
    tags = {*runtime.flow_run.tags, f"algorithm:{plan.algorithm_name}", f"dataset:{plan.dataset_name}"}
    with get_client(sync_client=True) as client:
        client.update_flow_run(run_id, tags=sorted(tags))
        client.update_flow_run_labels(run_id, {LABEL_OUTPUT: plan.output.url, LABEL_HOST: socket.gethostname()})


@contextmanager
def _owned_workspace(plan: Plan, here: Settings) -> Iterator[Workspace]:
    """The run's workspace: gone afterwards, unless a retry can go on from it. No container of the run outlives the block."""
    logger = get_run_logger()
    with open_workspace(here.workspaces, plan.run_id) as workspace:
        try:
            _sweep(here)
            yield workspace
        except OasisError as error:
            finished = workspace.done(MARKER_RUN) is not None and not isinstance(error, AlgorithmFailed | UnsafeName)
            if error.transient or finished:
                hours = here.keep_seconds / 3600
                logger.warning(
                    "What is done so far is kept for %g hours in %s; a retry of this run goes on from there.",
                    hours,
                    workspace.path,
                )
            else:
                workspace.remove()
            raise
        except BaseException:
            # An engine that is away now must not turn a cancellation into a failure; the lease tells the reaper.
            with suppress(OasisError):
                open_engine(here).reap(plan.run_id)
            raise
        workspace.remove()


def _sweep(here: Settings) -> None:
    """Take away what dead runs left. That is nobody's business but theirs: it never fails this run."""
    try:
        containers, _ = reap(here)
    except OasisError as error:
        get_run_logger().warning("Could not look for what dead runs left: %s", error)
    else:
        for run_id in containers:
            get_run_logger().warning("Removed the container of run %s, whose process is gone.", run_id)


def _publish(
    plan: Plan, workspace: Workspace, image: str, staged: Summary, exit: ContainerExit
) -> tuple[Summary | None, Dataset | None]:
    flow_run = {"id": plan.run_id, "name": str(runtime.flow_run.name), "ui_url": str(runtime.flow_run.ui_url or "")}
    try:
        return publish_output(plan, workspace, image=image, staged=staged, exit=exit, flow_run=flow_run)
    except DatasetError as error:
        if exit.reason is Reason.OK:
            raise
        # The algorithm's failure is what its owner has to know; that nothing of it could be kept comes second.
        get_run_logger().error("The output of the failed algorithm could not be kept: %s", error)
        return None, None


def _report(
    plan: Plan, workspace: Workspace, image: str, staged: Summary, exit: ContainerExit, published: Summary | None
) -> None:
    """The run's page, as a Prefect artifact."""
    text = page(
        plan,
        image=image,
        staged=staged,
        exit=exit,
        published=published,
        seconds=stage_seconds(workspace),
        tail=last_lines(workspace.log, 30),
    )
    what = f"{oasis_status(exit)}: {plan.algorithm_name} on {plan.dataset_name}, output {plan.document_name}"
    create_markdown_artifact(text, key="oasis-run", description=what)


def _failed(error: OasisError) -> State[Any]:
    """The state of a run that failed: its message is the error's first sentence, its data the error."""
    get_run_logger().error("%s", error)
    timed_out = isinstance(error, AlgorithmFailed) and error.exit.reason is Reason.TIMED_OUT
    return Failed(message=first_sentence(error), data=error, name="TimedOut" if timed_out else "Failed")
