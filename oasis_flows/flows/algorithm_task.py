"""The main job: an algorithm runs on a dataset and leaves a new dataset."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any, cast

from prefect import runtime
from prefect.logging import get_run_logger
from prefect.utilities.urls import url_for

from .. import documents, interruption, settings
from ..blocks import Algorithm, Dataset, DatasetStore
from ..documents import document_flow, patiently
from ..errors import DatasetError
from ..job import ContainerExit, Reason
from ..lifecycle import announce, clean_up, owned_workspace
from ..manifest import Summary
from ..plan import Plan, ShardOf, as_shard, plan_run
from ..record import Account
from ..reporting import failed, succeeded
from ..tasks import prepare_image, publish_output, recall, run_container, stage_input
from ..verdict import Verdict, failure
from ..workspace import Workspace
from .parameters import JSON_EDITOR, OR_NAME, run_name


@document_flow(name="algorithm-task", flow_run_name=run_name, on_cancellation=[clean_up], on_crashed=[clean_up])
def algorithm_task(
    algorithm: Annotated[Algorithm, OR_NAME],
    input_dataset: Annotated[Dataset, OR_NAME],
    *,
    output_name: str | None = None,
    store: Annotated[DatasetStore | None, OR_NAME] = None,
    parameters: Annotated[dict[str, Any] | None, JSON_EDITOR] = None,
    shard: ShardOf | None = None,
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
        shard: Which part of a batch this is. Batches set it; leave it at None.

    Returns:
        The published dataset.

    Raises:
        AlgorithmFailed: it ran and did not succeed; its log, record and output are kept beside where the dataset would be.
        DescriptionError: something is wrong as written; nothing was started.
        DatasetError: the data or the store need mending.
        EngineError: the container engine failed; what the algorithm would have done is unknown.
        OasisError: any other, by `oasis_flows.errors`; nothing else leaves the flow but Prefect's own signals and timeout.
    """
    account = Account()
    with interruption.kept_in_mind(), ExitStack() as owned:
        try:
            here = settings.current()
            workspace = owned.enter_context(owned_workspace(here, account))
            decide = partial(
                plan_run,
                output_name=output_name,
                parameters=parameters,
                settings=here,
                run_id=workspace.run_id,
                attempt=runtime.flow_run.run_count or 1,
            )
            account.plan = plan = patiently(
                lambda: decide(
                    documents.resolved(Algorithm, algorithm),
                    documents.resolved(Dataset, input_dataset),
                    store=documents.resolved(DatasetStore, store) if store else documents.find(DatasetStore, "default"),
                )
            )
            if shard is not None:
                account.plan = plan = as_shard(plan, shard)
            announce(plan)
            if plan.attempt > 1 and plan.part is None:
                recall(plan, workspace)
            account.image = image = prepare_image(plan, workspace, here)
            input_folder, account.staged = stage_input(plan, workspace)
            account.exit, verdict = run_container(plan, workspace, here, image=image, input_folder=input_folder)
            dataset = _publish(account, workspace, verdict)
        except Exception as error:  # noqa: BLE001 - whatever it was, the run says what became of it
            return cast(Dataset, failed(error, account))
        succeeded(account, verdict)
        return dataset


def _publish(account: Account, workspace: Workspace, verdict: Verdict) -> Dataset:
    """Publish what there is, and return the dataset or raise what the run ends with."""
    plan, exit = cast(Plan, account.plan), cast(ContainerExit, account.exit)
    flow_run = {"id": plan.run_id, "name": str(runtime.flow_run.name), "ui_url": str(runtime.flow_run.ui_url or "")}
    log, dataset = f"{plan.output.url}/log.txt", None
    try:
        account.published, dataset = publish_output(
            plan,
            workspace,
            image=cast(str, account.image),
            staged=cast(Summary, account.staged),
            exit=exit,
            verdict=verdict,
            flow_run=flow_run,
        )
    except DatasetError as error:
        if exit.reason is Reason.OK:
            raise
        # The algorithm's failure is what its owner has to know; that nothing of it could be kept comes second.
        get_run_logger().error("The output of the failed algorithm could not be published: %s", error)
        log = str(workspace.log)
    if plan.part is not None and exit.reason is Reason.OK:
        return Dataset(url=plan.output.url, store=plan.store)
    account.document_url = url_for(dataset) if dataset else None
    if dataset is None:
        raise failure(verdict, exit, log)
    return dataset
