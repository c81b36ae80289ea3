"""One attempt at a shard: a run like any other on a part of the input, as a Prefect task of its batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Failed

from . import oscar
from .batching import Batch
from .errors import AlgorithmFailed, DatasetChanged, DatasetError, OasisError, StoreDenied, StoreFull
from .job import ContainerExit, Reason
from .ledger import Ledger, Row
from .manifest import Summary
from .plan import Part, Plan
from .schedule import Attempt, Ending
from .settings import Settings
from .store import read_slice
from .tasks import publish_output, run_container, stage_input
from .verdict import failure, judge
from .workspace import Workspace

# What no file can be blamed for: the container never ran.
_NEVER_STARTED = (Reason.COMMAND_NOT_FOUND, Reason.NOT_EXECUTABLE, Reason.EXEC_FORMAT)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended; `error` is why, unless it is done."""

    ending: Ending
    row: Row
    error: OasisError | None = None


class Interrupted(Exception):
    """The batch ends before the shard does."""


class Places:
    """How many containers may run at once. Others of their shards stage and publish meanwhile, so that no place is idle."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._most = self._taken = 0

    def allow(self, most: int) -> None:
        """From now on so many; those that run already go on."""
        with self._change:
            self._most = most
            self._change.notify_all()

    @property
    def taken(self) -> int:
        """How many run."""
        return self._taken

    @contextmanager
    def one(self, go_on: Callable[[], None]) -> Iterator[None]:
        """Hold a place for the time of the block; `go_on` may raise while it is waited for."""
        with self._change:
            while self._taken >= self._most:
                go_on()
                self._change.wait(0.2)
            self._taken += 1
        try:
            yield
        finally:
            with self._change:
                self._taken -= 1
                self._change.notify()


class Shards:
    """What attempts at the shards of one batch have in common. Safe to use from many threads.

    With `whole`, the folder of the whole dataset, nothing is staged: that is what containers see. Once `stop` is set, an
    attempt ends as soon as its container has, and nothing of it counts. `outcomes` has what came of each shard's last attempt.

    No dataclass: Prefect looks through all fields of those that a task is given, and through theirs, for results of other tasks.
    """

    def __init__(
        self, batch: Batch, workspace: Workspace, settings: Settings, ledger: Ledger, whole: Path | None = None
    ) -> None:
        self.batch, self.workspace, self.settings, self.ledger, self.whole = batch, workspace, settings, ledger, whole
        self.stop, self.places = threading.Event(), Places()
        self.outcomes: dict[str, Outcome] = {}

    def attempt(self, attempt: Attempt) -> Outcome:
        """Make the attempt. A shard that is done is in the ledger; one that failed is for the caller to write down.

        Raises:
            Interrupted: `stop` was set meanwhile.
        """
        began, plan = time.monotonic(), self.batch.shard_plan(attempt.shard)
        row = partial(Row.of, attempt)
        try:
            published, exit = self._run(plan)
            done = row(
                Ending.DONE,
                published=published,
                seconds=_since(began),
                exit_code=exit.exit_code,
                url=plan.output.url,
                log=f"{plan.output.url}/log.txt",
            )
            self.ledger.write(done, self._go_on)
            return Outcome(Ending.DONE, done)
        except OasisError as error:
            if self.stop.is_set():
                raise Interrupted from error
            verdict, ending = judge(error), ending_of(error)
            if ending is not Ending.UNKNOWN:
                self.workspace.drop_part(attempt.shard.name)
            ran = isinstance(error, AlgorithmFailed)
            facts: dict[str, Any] = {
                "exit_code": error.exit.exit_code if isinstance(error, AlgorithmFailed) else None,
                "code": verdict.code,
                "sentence": verdict.sentence,
                "tail": verdict.evidence,
                "url": plan.output.url if ran else None,
                "log": f"{plan.output.url}/log.txt" if ran else None,
            }
            return Outcome(ending, row(ending, seconds=_since(began), **facts), error)

    def unknown(self, attempt: Attempt, error: OasisError) -> Row:
        """The row of an attempt of which nobody knows how it ended."""
        verdict = judge(error)
        return Row.of(attempt, Ending.UNKNOWN, seconds=0.0, code=verdict.code, sentence=verdict.sentence, tail=verdict.evidence)

    def _run(self, plan: Plan) -> tuple[Summary, ContainerExit]:
        assert plan.part is not None  # noqa: S101 - `shard_plan` made it
        with self.workspace.part(plan.part.shard.name) as part:
            self._go_on()
            folder, staged = (
                stage_input.fn(plan, part, go_on=self._go_on) if self.whole is None else self._told(plan.part, part, self.whole)
            )
            with self.places.one(self._go_on):
                self._go_on()
                exit, verdict = run_container.fn(
                    plan, part, self.settings, image=self.batch.image, input_folder=folder, go_on=self._go_on
                )
            self._go_on()
            flow_run = {
                "id": self.batch.plan.run_id,
                "name": str(runtime.flow_run.name),
                "ui_url": str(runtime.flow_run.ui_url or ""),
            }
            published, _ = publish_output.fn(
                plan,
                part,
                image=self.batch.image,
                staged=staged,
                exit=exit,
                verdict=verdict,
                flow_run=flow_run,
                go_on=self._go_on,
            )
        if exit.reason is not Reason.OK:
            raise failure(verdict, exit, f"{plan.output.url}/log.txt")
        return published, exit

    def _told(self, of: Part, part: Workspace, whole: Path) -> tuple[Path, Summary]:
        """Write down which files are the shard's, for a container that sees all of them."""
        told = part.path / oscar.RANGE_FOLDER
        told.mkdir(exist_ok=True)
        (told / oscar.RANGE_FILE).write_bytes(oscar.range_of(of.shard))
        sizes = [entry.bytes for entry in read_slice(of.listing, of.shard.start, of.shard.end)]
        return whole, Summary(file_count=len(sizes), size_bytes=sum(sizes), digest=None)

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise Interrupted


def ending_of(error: OasisError) -> Ending:
    """What an error means for the schedule."""
    if isinstance(error, AlgorithmFailed):
        return ending_of_reason(error.exit.reason)
    # Another try of a shard reads the same saved listing: its file stays another.
    if (error.transient and not isinstance(error, DatasetChanged)) or isinstance(error, StoreFull):
        return Ending.UNKNOWN
    if isinstance(error, DatasetError) and not isinstance(error, StoreDenied):
        # A file that is gone, changed, or misnamed by the algorithm: the others may be well.
        return Ending.FAILED
    return Ending.HOPELESS


def ending_of_reason(reason: Reason) -> Ending:
    """What the end of a container that did not succeed means for the schedule."""
    if reason in _NEVER_STARTED:
        return Ending.HOPELESS
    return {Reason.KILLED: Ending.KILLED, Reason.DISK_FULL: Ending.UNKNOWN}.get(reason, Ending.FAILED)


@task(name="shard", task_run_name="shard-{attempt.shard.name}", cache_policy=NO_CACHE, persist_result=False)
def run_shard(shards: Shards, attempt: Attempt) -> State[Any] | None:
    """Make an attempt at a shard, and leave what came of it in `shards.outcomes` under the shard's name."""
    try:
        outcome = shards.outcomes[attempt.shard.name] = shards.attempt(attempt)
    except Interrupted:
        return Failed(message="The batch ended before this shard did.")
    if outcome.error is None:
        return None
    get_run_logger().warning("%s", outcome.error)
    return Failed(message=outcome.row.sentence, data=outcome.error)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
