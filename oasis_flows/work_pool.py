"""Shards as flow runs of the deployment `algorithm-task`: wherever its pool's workers are, as many at once as pool and queue let.

A shard's flow run is found again by its idempotency key, `<batch>.<shard>.<attempt>`. So a batch whose process was killed goes
on with the runs that it had made, and none is made twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from . import errors, store
from .artifacts import FAILED_TAG
from .batching import Batch
from .documents import patiently
from .errors import DescriptionError, OasisError, ProcessGone
from .job import Reason
from .ledger import Ledger, Row
from .manifest import Summary
from .plan import ShardOf
from .schedule import Attempt, Ending
from .shards import Outcome, ending_of, ending_of_reason

DEPLOYMENT = "algorithm-task/algorithm-task"
# As many flow runs are made ahead of the workers; each that waits is a row of the server's, and nothing else.
WINDOW = 32
POLL_SECONDS = 1.0
_MOST_GONE = 20


@dataclass(slots=True)
class WorkPool:
    """Attempts as flow runs of a deployment; made by `work_pool`."""

    batch: Batch
    ledger: Ledger
    deployment: UUID
    parameters: Mapping[str, Any]
    under_way: dict[UUID, Attempt] = field(default_factory=dict)

    def room(self) -> int:
        """A window of runs: the pool's and the queue's own limits say how many of them run."""
        return self.batch.options.max_parallel or WINDOW

    def start(self, attempt: Attempt) -> None:
        """Make the flow run of an attempt, or find the one that an earlier process of this batch made."""
        shard, run = attempt.shard, None
        of = ShardOf(
            listing=self.batch.listing.url,
            base=self.batch.base.url,
            name=shard.name,
            index=shard.index,
            count=shard.count,
            start=shard.start,
            end=shard.end,
        )
        # One that was cancelled or crashed with an earlier process of this batch is no answer.
        for number in range(attempt.number, attempt.number + _MOST_GONE):
            run = patiently(lambda number=number: self._make(of, number))  # type: ignore[misc]
            if run.state is None or not (run.state.is_crashed() or run.state.is_cancelled()):
                break
        assert run is not None  # noqa: S101 - the range is not empty
        self.under_way[run.id] = attempt

    def _make(self, of: ShardOf, number: int) -> FlowRun:
        with get_client(sync_client=True) as client:
            return client.create_flow_run_from_deployment(
                self.deployment,
                name=f"shard {of.name} of {self.batch.plan.algorithm_name} on {self.batch.plan.dataset_name}",
                parameters={**self.parameters, "shard": of.model_dump()},
                tags=[f"batch:{self.batch.plan.run_id}"],
                idempotency_key=f"{self.batch.plan.run_id}.{of.name}.{number}",
            )

    def ended(self) -> Iterator[tuple[Attempt, Outcome]]:
        """Those whose runs have ended since; asks once a second."""
        time.sleep(POLL_SECONDS)
        for run in patiently(self._runs):
            if run.state is not None and run.state.is_final():
                attempt = self.under_way.pop(run.id)
                outcome = self._outcome(attempt, run)
                if outcome.ending is Ending.DONE:
                    self.ledger.write(outcome.row)
                yield attempt, outcome

    def _runs(self) -> list[FlowRun]:
        with get_client(sync_client=True) as client:
            wanted = FlowRunFilter(id=FlowRunFilterId(any_=list(self.under_way)))
            return client.read_flow_runs(flow_run_filter=wanted) if self.under_way else []

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
        """Cancel what is under way; the workers end it, as any cancelled run."""
        for run_id in self.under_way:
            with suppress(Exception), get_client(sync_client=True) as client:
                client.set_flow_run_state(run_id, Cancelling())


@contextmanager
def work_pool(batch: Batch, ledger: Ledger) -> Iterator[WorkPool]:
    """Attempts as flow runs, for the time of the block; whatever ends it with an exception cancels them.

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
    pool = WorkPool(batch, ledger, deployment, parameters)
    try:
        yield pool
    except BaseException:
        pool.cancel()
        raise


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
