"""One algorithm over a large dataset: its files in shards, as many at once as fit, and one new dataset of what comes out."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any, Literal, cast

from prefect import runtime
from prefect.utilities.urls import url_for
from pydantic import Field

from .. import documents, interruption, settings
from ..artifacts import TransferBar, first_files, show_files, show_shards
from ..batch_publishing import Published, publish_batch
from ..batch_record import details, table
from ..batching import Batch, Options, open_batch, places_when_empty, stage_whole
from ..blocks import Algorithm, Dataset, DatasetStore
from ..documents import document_flow, patiently
from ..errors import DescriptionError
from ..fan_out import carry_out, in_process, schedule_of
from ..ledger import Ledger
from ..lifecycle import announce, clean_up, owned_workspace
from ..machine import grows, nodes_now
from ..oscar import INDEX
from ..plan import SHARDS, plan_run
from ..record import Account
from ..reporting import failed, succeeded
from ..schedule import Schedule
from ..settings import Settings
from ..shards import Outcome, Shards
from ..tasks import prepare_image, save_document
from ..work_pool import WINDOW, work_pool
from ..workspace import Workspace
from .parameters import JSON_EDITOR, OR_NAME, run_name

_Count = Annotated[int, Field(ge=1)]
_NotNegative = Annotated[int, Field(ge=0)]


@document_flow(name="batch", flow_run_name=run_name, on_cancellation=[clean_up], on_crashed=[clean_up])
def batch(
    algorithm: Annotated[Algorithm, OR_NAME],
    input_dataset: Annotated[Dataset, OR_NAME],
    *,
    output_name: str | None = None,
    store: Annotated[DatasetStore | None, OR_NAME] = None,
    parameters: Annotated[dict[str, Any] | None, JSON_EDITOR] = None,
    files_per_shard: _Count | None = None,
    shards: _Count | None = None,
    max_parallel: _Count | None = None,
    include: str | None = None,
    fan_out: Literal["in-process", "work-pool"] = "in-process",
    on_failed_files: Literal["fail", "accept"] = "fail",
    max_failed_files: _NotNegative = 100,
    algorithm_retries: _NotNegative = 0,
    oscar_compat: bool = False,
    oscar_index: str = INDEX,
) -> Dataset:
    """Run an algorithm on a large dataset in shards, and publish what they write as one new dataset.

    Args:
        algorithm: The algorithm to run.
        input_dataset: The dataset it reads.
        output_name: Name of the output's Dataset document. Left at None, each run makes a new name.
        store: Where the output is published. Left at None, that is the store document named default, or else a folder of the
            worker's machine.
        parameters: Values for the algorithm's parameters. What is left out has its default.
        files_per_shard: How many files one container gets.
        shards: How many shards to make, of about equally many bytes. Left at None, with files_per_shard, enough to keep the
            machine busy.
        max_parallel: At most so many containers at once. Fewer where fewer fit.
        include: Which files, by a pattern such as *.jpg or 2026/**. Left at None, all.
        fan_out: in-process runs the shards on this machine; work-pool makes each a run of the deployment algorithm-task, wherever
            its workers are. Then the pool's limits say how many run at once.
        on_failed_files: fail ends the run as Failed when files fail alone; accept takes what came of the others for a success.
            The output of the others is published either way.
        max_failed_files: Give up when more files than this fail alone.
        algorithm_retries: How often a shard that its algorithm failed is tried again before it is split.
        oscar_compat: For programs written for OSCAR-Batch. Each container sees the whole dataset and an index of it, and a JSON
            file named by INPUT_FILE_PATH says which lines are its own. In-process only.
        oscar_index: Name of the index in the dataset's folder, with oscar_compat.

    Returns:
        The published dataset.

    Raises:
        FilesFailed: some files make the algorithm fail; the output of the others is published.
        AlgorithmFailed: its command cannot be started, whatever the files.
        NoCapacity: no machine is large enough for it.
        DescriptionError: something is wrong as written; nothing was started.
        DatasetError: the data or the store need mending.
        EngineError: the container engine failed; a retry goes on with what is left.
    """
    account, began = Account(), time.monotonic()
    with interruption.kept_in_mind(), ExitStack() as owned:
        try:
            here = settings.current()
            options = Options(
                files_per_shard=files_per_shard,
                shards=shards,
                max_parallel=max_parallel,
                include=include,
                on_failed_files=on_failed_files,
                max_failed_files=max_failed_files,
                algorithm_retries=algorithm_retries,
                oscar_compat=oscar_compat,
                oscar_index=oscar_index,
            )
            _refuse_what_does_not_fit(options, fan_out)
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
            announce(plan)
            if fan_out == "in-process":
                nodes = nodes_now(here, without=plan.run_id)
                at_once = places_when_empty(plan, nodes, options, here.headroom, grows=grows(here))
                account.image = image = prepare_image(plan, workspace, here)
            else:
                at_once, image = max_parallel or WINDOW, plan.image.image_id or plan.image.image_file or ""
            work = open_batch(plan, options, workspace.path / "listing", image=image, at_once=at_once)
            ledger = Ledger(plan.output)
            schedule = _run_shards(work, ledger, workspace, here, fan_out)
            seconds = {"shards": time.monotonic() - began}
            found = publish_batch(work, ledger, schedule, workspace, seconds=seconds, began=began)
            dataset = _show(work, found, account, workspace)
        except Exception as error:  # noqa: BLE001 - whatever it was, the run says what became of it
            return cast(Dataset, failed(error, account))
        if found.error is not None:
            return cast(Dataset, failed(found.error, account))
        succeeded(account, found.verdict)
        return cast(Dataset, dataset)


def _refuse_what_does_not_fit(options: Options, fan_out: str) -> None:
    if options.oscar_compat and fan_out != "in-process":
        raise DescriptionError("`oscar_compat` needs the whole dataset on one machine. Use `fan_out: in-process` with it.")


def _run_shards(work: Batch, ledger: Ledger, workspace: Workspace, here: Settings, fan_out: str) -> Schedule:
    """Run all shards that the ledger does not know; raise what stopped the batch, if anything did."""
    schedule, bar = schedule_of(work, ledger), TransferBar("shards")

    def tell(outcome: Outcome, final: bool) -> None:
        if final and outcome.error is not None:
            ledger.write(outcome.row)
        bar.move(schedule.files_done + len(schedule.failed), work.layout.file_count, 0, 0)

    whole = stage_whole(work, workspace.path / "whole") if work.options.oscar_compat else None
    shards = Shards(work, workspace, here, ledger, whole)
    with in_process(shards, here) if fan_out == "in-process" else work_pool(work, ledger, here.begin_seconds) as place:
        stopped_by = carry_out(schedule, place, tell)
    if stopped_by is not None:
        raise stopped_by
    return schedule


def _show(work: Batch, found: Published, account: Account, workspace: Workspace) -> Dataset | None:
    """Save the dataset's document, and put what there is among the run's artifacts."""
    dataset = save_document(work.plan, found.summary) if found.summary else None
    account.document_url = url_for(dataset) if dataset else None
    account.details = details(work, found.rows, found.summary, account.document_url)
    show_shards(table(found.rows, 500), len(found.rows))
    if found.summary is not None:
        files = first_files(workspace.published_manifest)
        show_files(files, found.summary, work.plan.output.url, whole=True, folder=SHARDS)
    return dataset
