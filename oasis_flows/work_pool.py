"""Shards as flow runs of the deployment `algorithm-task`: wherever its pool's workers are, as many at once as pool and queue let.

A shard's flow run is found again by its idempotency key, `<batch>.<shard>.<attempt>`. So a batch whose process was killed goes
on with the runs that it had made, and none is made twice.

A worker that is told to stop kills what it has started, and tells nobody. What has reached our code by then has a watchdog; what
has not stays Pending, or Running, for ever. Such a run is deleted before it is made again: should its process begin after all,
there is nothing for it to do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Cancelling

from . import errors, store
from .artifacts import FAILED_TAG, Waiting
from .batching import Batch
from .documents import PATIENCE_SECONDS, patiently
from .errors import DescriptionError, OasisError, ProcessGone
from .job import Reason
from .ledger import Ledger, Row
from .manifest import Summary
from .plan import ShardOf
from .reaper import LABEL_HOST, LABEL_WORKER, SHARD_TAG, age, worker_is_gone, workers_of
from .schedule import Attempt, Ending
from .shards import Outcome, ending_of, ending_of_reason

DEPLOYMENT = "algorithm-task/algorithm-task"
# As many flow runs are made ahead of the workers; each that waits is a row of the server's, and nothing else.
WINDOW = 32
POLL_SECONDS = 1.0
# A worker counts as gone when the server has missed its sign of life for some 90 s. One that was started anew under its old name
# never does; then it is the time that the reaper allows, too. It writes its name on a run right after it has taken it.
LOOK_SECONDS, NEVER_NAMED_SECONDS = 15.0, 120.0
# A worker that is there looks for runs every few seconds.
UNTAKEN_SECONDS = 30.0
_PAGE = 200


@dataclass(slots=True)
class WorkPool:
    """Attempts as flow runs of a deployment; made by `work_pool`."""

    batch: Batch
    ledger: Ledger
    deployment: UUID
    parameters: Mapping[str, Any]
    begin_seconds: float
    under_way: dict[UUID, Attempt] = field(default_factory=dict)
    looked: float = field(default_factory=time.monotonic)
    waiting: Waiting = field(default_factory=lambda: Waiting(LOOK_SECONDS))

    def room(self, wanted: int) -> int:  # noqa: ARG002
        """A window of runs: the pool's and the queue's own limits say how many of them run."""
        return self.batch.options.max_parallel or WINDOW

    def start(self, attempt: Attempt) -> None:
        """Make the flow run of an attempt, or find the one that an earlier process of this batch made."""
        shard = attempt.shard
        of = ShardOf(
            listing=self.batch.listing.url,
            base=self.batch.base.url,
            name=shard.name,
            index=shard.index,
            count=shard.count,
            start=shard.start,
            end=shard.end,
        )
        # One that ended without a verdict under an earlier process of this batch is no answer: it may go better now.
        for number in count(attempt.number):
            run = patiently(lambda number=number: self._make(of, number))  # type: ignore[misc]
            if not (_is_over(run) and self._told(attempt, run).ending in (Ending.UNKNOWN, Ending.HOPELESS)):
                self.under_way[run.id] = attempt
                return

    def _make(self, of: ShardOf, number: int) -> FlowRun:
        with get_client(sync_client=True) as client:
            return client.create_flow_run_from_deployment(
                self.deployment,
                name=f"shard {of.name} of {self.batch.plan.algorithm_name} on {self.batch.plan.dataset_name}",
                parameters={**self.parameters, "shard": of.model_dump()},
                tags=[f"{SHARD_TAG}{self.batch.plan.run_id}"],
                idempotency_key=f"{self.batch.plan.run_id}.{of.name}.{number}",
            )

    def ended(self) -> Iterator[tuple[Attempt, Outcome]]:
        """Those whose runs have ended since; asks once a second."""
        time.sleep(POLL_SECONDS)
        runs = patiently(self._runs)
        for run in runs:
            if _is_over(run):
                attempt = self.under_way.pop(run.id)
                yield attempt, self._told(attempt, run)
        if time.monotonic() - self.looked >= LOOK_SECONDS:
            self.looked = time.monotonic()
            known = {run.id: run for run in runs}
            self.waiting.tell(patiently(partial(_waited_for, runs)))
            for run_id in list(self.under_way):
                if run_id not in known or patiently(partial(_never_begins, known[run_id], self.begin_seconds)):
                    self._make_again(run_id)

    def _runs(self) -> list[FlowRun]:
        found, ids = [], list(self.under_way)
        with get_client(sync_client=True) as client:
            for start in range(0, len(ids), _PAGE):
                wanted = FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + _PAGE]))
                found += client.read_flow_runs(flow_run_filter=wanted)
        return found

    def _make_again(self, run_id: UUID) -> None:
        attempt = self.under_way.pop(run_id)
        get_run_logger().warning(
            "The flow run of shard %s is made again: somebody deleted it, or its worker is gone and it never began.",
            attempt.shard.name,
        )
        patiently(partial(_delete, run_id))
        self.start(attempt)

    def _told(self, attempt: Attempt, run: FlowRun) -> Outcome:
        """What became of a run, written down if it is done. Both lie in the store, which is waited for, ten minutes long."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                outcome = self._outcome(attempt, run)
                if outcome.ending is Ending.DONE:
                    self.ledger.write(outcome.row)
                return outcome
            except OasisError as error:
                if not error.transient or time.monotonic() > until:
                    raise
                get_run_logger().warning(
                    "What became of shard %s cannot be read; it is tried again. %s", attempt.shard.name, error
                )
            time.sleep(POLL_SECONDS)

    def _outcome(self, attempt: Attempt, run: FlowRun) -> Outcome:
        assert run.state is not None  # noqa: S101 - it is final
        url = self.batch.shard_plan(attempt.shard).output
        record = _record_of(url, run.id)
        seconds, message = round(run.total_run_time.total_seconds(), 3), run.state.message or run.state.name or ""
        if record is not None:
            verdict, exit = record["verdict"], record["exit"]
            facts: dict[str, Any] = {
                "seconds": seconds,
                "exit_code": exit["exit_code"],
                "url": url.url,
                "log": f"{url.url}/{store.LOG}",
            }
            if run.state.is_completed():
                output = record["output"]
                published = Summary(
                    file_count=output["file_count"], size_bytes=output["size_bytes"], digest=output["manifest_digest"]
                )
                return Outcome(Ending.DONE, Row.of(attempt, Ending.DONE, published=published, **facts))
            if run.state.is_failed() and exit["reason"] != Reason.OK:
                ending = ending_of_reason(Reason(exit["reason"]))
                error = OasisError(f"{message} See the flow run {run.name}, {run.id}.")
                told = {"code": verdict["code"], "sentence": verdict["sentence"], "tail": tuple(verdict["evidence"])}
                return Outcome(ending, Row.of(attempt, ending, **facts, **told), error)
        error = _error_of(run, message)
        ending = ending_of(error)
        row = Row.of(attempt, ending, seconds=seconds, code=error.code, sentence=message, tail=(message,))
        return Outcome(ending, row, error)

    def cancel(self) -> None:
        """Cancel what is under way; the workers end it, as any cancelled run. What this misses is for `reaper.cancel_shards`."""
        for run_id in self.under_way:
            with suppress(Exception), get_client(sync_client=True) as client:
                client.set_flow_run_state(run_id, Cancelling())


@contextmanager
def work_pool(batch: Batch, ledger: Ledger, begin_seconds: float) -> Iterator[WorkPool]:
    """Attempts as flow runs, for the time of the block; whatever ends it with an exception cancels them.

    One that a worker took and that does not begin within `begin_seconds` is made again.

    Raises:
        DescriptionError: there is no such deployment; or a document is none, which a worker could load.
    """
    parameters = {
        "algorithm": _reference(batch.plan.algorithm, "algorithm"),
        "input_dataset": _reference(batch.plan.dataset, "input_dataset"),
        "store": _reference(batch.plan.store, "store") if batch.plan.store else None,
        "output_name": batch.plan.output_name,
        "parameters": dict(batch.plan.parameters) or None,
    }
    try:
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(DEPLOYMENT).id
    except ObjectNotFound as error:
        raise DescriptionError(
            f"There is no deployment {DEPLOYMENT}, of which shards are runs with `fan_out: work-pool`. Make it with `prefect deploy "
            "--all`, or use in-process."
        ) from error
    pool = WorkPool(batch, ledger, deployment, parameters, begin_seconds)
    try:
        yield pool
    except BaseException:
        pool.cancel()
        raise


def _delete(run_id: UUID) -> None:
    with suppress(ObjectNotFound), get_client(sync_client=True) as client:
        client.delete_flow_run(run_id)


def _is_over(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_final()


def _waited_for(runs: list[FlowRun]) -> str:
    """What none of the runs, which have been there for a while, has been taken for; empty where one has."""
    left = [run for run in runs if not _is_over(run)]
    if not left or not all(run.state and run.state.is_scheduled() and age(run.state) >= UNTAKEN_SECONDS for run in left):
        return ""
    pool = left[0].work_pool_name
    if pool is None:
        return f"the deployment {DEPLOYMENT} is on no work pool. Make it anew: prefect deploy --all"
    with get_client(sync_client=True) as client:
        workers = workers_of(client, pool)
    if any(worker.status is WorkerStatus.ONLINE for worker in workers):
        return (
            f"the workers of the pool {pool} take none of its runs. See what else they run, the limits of pool and queue, and whether one "
            "of these is paused"
        )
    return f"no worker of the pool {pool} is there. Start one: prefect worker start --pool {pool}"


def _never_begins(run: FlowRun, begin_seconds: float) -> bool:
    """Was the run taken by a worker that is gone by now, and did it not come as far as our code?"""
    if not _is_beginning(run):
        return False
    named = run.labels.get(LABEL_WORKER) is not None
    # Somebody may delete the run, or the pool; then the next look tells.
    with suppress(ObjectNotFound), get_client(sync_client=True) as client:
        overdue = run.state is not None and age(run.state) >= (begin_seconds if named else NEVER_NAMED_SECONDS)
        # It may have begun while this was found out.
        return (overdue or worker_is_gone(client, run)) and _is_beginning(client.read_flow_run(run.id))
    return False


def _is_beginning(run: FlowRun) -> bool:
    state = run.state
    return state is not None and (state.is_pending() or (state.is_running() and LABEL_HOST not in run.labels))


def _reference(block: Any, parameter: str) -> dict[str, Any]:
    name = block._block_document_name
    if name is None:
        raise DescriptionError(
            f"`{parameter}` is no saved document, and a worker could not load it. Save it, and pass its name; or use "
            "`fan_out: in-process`."
        )
    return {"$ref": {"block_document_slug": f"{block.get_block_type_slug()}/{name}"}}


def _record_of(output: store.Location, run_id: UUID) -> dict[str, Any] | None:
    """The record that this very flow run wrote; `None` if it did not come that far."""
    found = store.read_record(output)
    return dict(found) if found and (found.get("flow_run") or {}).get("id") == str(run_id) else None


def _error_of(run: FlowRun, message: str) -> OasisError:
    """The error that a run's tag names; whatever else ended it is the platform's doing."""
    code = next((tag.removeprefix(FAILED_TAG) for tag in run.tags if tag.startswith(FAILED_TAG)), "")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OasisError)]
    kind = next((kind for kind in kinds if kind.code == code and kind is not errors.AlgorithmFailed), None)
    said = f"{message} See the flow run {run.name}, {run.id}."
    return kind(said) if kind is not None and run.state is not None and run.state.is_failed() else ProcessGone(said)
