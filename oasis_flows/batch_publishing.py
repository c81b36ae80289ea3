"""Makes one dataset of a batch's shards, once, and says what became of the batch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from prefect import runtime

from . import store
from .batch_record import FAILED_LIST, batch_json, done_rows, failed_rows, log_line, write_lists
from .batching import Batch
from .documents import task
from .errors import DatasetError, DatasetNotFound, FilesFailed, OasisError
from .job import counted
from .ledger import Ledger, Row
from .manifest import Summary
from .plan import SHARDS
from .record import written
from .schedule import Schedule
from .tasks import MARKER_PUBLISHED, TRANSFER, step
from .verdict import Verdict, judge
from .workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What became of a batch. `summary` is of its dataset; `None` where there is none. `error` is what the batch ends with."""

    summary: Summary | None
    verdict: Verdict
    error: OasisError | None
    rows: tuple[Row, ...]


@task(**TRANSFER)
@step(MARKER_PUBLISHED)
def publish_batch(
    batch: Batch, ledger: Ledger, schedule: Schedule, workspace: Workspace, *, seconds: Mapping[str, float], began: float
) -> Published:
    """Publish the batch: a manifest over its shards' files, the lists of shards and of failed files, log and record.

    A batch that was published before, by an attempt that was killed right afterwards, is left as it is. Only where this attempt takes
    for a success what that one took for a failure, its record says so from now on.

    Raises:
        DuplicateName: two shards wrote a file of the same name.
        DatasetError: the ledger lacks shards that were done; somebody removed them.
    """
    rows = tuple(sorted(ledger.rows(), key=lambda row: (row.files[0], -row.files[1])))
    done, bad = done_rows(rows), failed_rows(rows)
    error = _failure(batch, rows, gave_up=schedule.too_many_failed)
    if not schedule.too_many_failed:
        _check_complete(batch, done, bad)
    commits = bool(done) and not schedule.too_many_failed
    verdict = judge(error) if error else _success(batch, rows, time.monotonic() - began)
    flow_run = {"id": batch.plan.run_id, "name": str(runtime.flow_run.name), "ui_url": str(runtime.flow_run.ui_url or "")}
    record = partial(batch_json, batch, rows, verdict=verdict, seconds=seconds, flow_run=flow_run)
    if commits and (earlier := _published(batch)) is not None:
        summary, said = earlier
        if said != verdict.code:
            store.rewrite_record(batch.plan.output, written(record(published=summary)))
        return Published(summary=summary, verdict=verdict, error=error, rows=rows)
    manifest = workspace.published_manifest if commits else None
    parts = {f"{SHARDS}/{row.shard}": row.output["digest"] if row.output else None for row in done}
    merged = store.merge(batch.plan.output, parts, manifest) if manifest else None
    workspace.log.write_text("".join(map(log_line, rows)))
    store.commit(
        batch.plan.output,
        beside=write_lists(batch, rows, workspace.path),
        log=workspace.log,
        record=written(record(published=merged)),
        manifest=manifest,
    )
    return Published(summary=merged, verdict=verdict, error=error, rows=rows)


def _published(batch: Batch) -> tuple[Summary, str] | None:
    """What an earlier attempt published, and the code of its verdict."""
    try:
        found = store.published(batch.plan.output)
    except DatasetNotFound:
        return None
    output, verdict = (found.record.get(name) if found else None for name in ("output", "verdict"))
    if not isinstance(output, dict) or not isinstance(verdict, dict):
        return None
    summary = Summary(file_count=output["file_count"], size_bytes=output["size_bytes"], digest=output["manifest_digest"])
    return summary, str(verdict["code"])


def _check_complete(batch: Batch, done: list[Row], bad: list[Row]) -> None:
    files = sum(row.files[1] - row.files[0] for row in done + bad)
    if files != batch.layout.file_count:
        raise DatasetError(
            f"The ledger of the batch tells of {files} files, and there are {batch.layout.file_count}. Somebody removed or changed "
            f"records in {batch.plan.output.url}/batch; retry the run, and they are done again."
        )


def _failure(batch: Batch, rows: tuple[Row, ...], *, gave_up: bool) -> FilesFailed | None:
    """What a batch ends with some of whose files failed, unless they are accepted."""
    bad, all_files, plan = failed_rows(rows), batch.layout.file_count, batch.plan
    if not bad or (batch.options.on_failed_files == "accept" and not gave_up and done_rows(rows)):
        return None
    which = f"The first: {batch.file_at(bad[0].files[0])!r}: {bad[0].sentence}"
    where = f"All are in {plan.output.url}/{FAILED_LIST}, each with its log and a command to run it alone."
    if gave_up:
        return FilesFailed(
            f"The batch was given up when {counted(len(bad), 'file')} of {all_files} had failed alone. {which} If it is not the "
            f"algorithm itself, raise `max_failed_files`, and retry: what is done stays done. {where}"
        )
    if not done_rows(rows):
        return FilesFailed(
            f"All of the {counted(all_files, 'file')} failed, each alone, and there is nothing to publish. {which} {where}"
        )
    return FilesFailed(
        f"{len(bad)} of {counted(all_files, 'file')} failed, and the output of all others is published as dataset "
        f"{plan.document_name}. {which} {where} Set `on_failed_files` to accept to take that for a success."
    )


def _success(batch: Batch, rows: tuple[Row, ...], seconds: float) -> Verdict:
    bad = len(failed_rows(rows))
    but = f", but for {counted(bad, 'file')}, which failed alone" if bad else ""
    files, shards = counted(batch.layout.file_count, "file"), counted(len(done_rows(rows)), "shard")
    return Verdict(
        code="ok",
        stage=MARKER_PUBLISHED,
        blame=None,
        transient=False,
        sentence=f"The batch of {files} in {shards} succeeded after {seconds:.1f} s{but}.",
        advice="",
    )
