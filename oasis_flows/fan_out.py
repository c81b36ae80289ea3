"""Carries a batch out: as many shards at once as fit now, until the schedule has no more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol

from . import interruption, reservations
from .artifacts import Waiting
from .batching import Batch, demand_of, places
from .capacity import Vector, described
from .documents import placed
from .errors import DescriptionError, EngineError, EngineUnavailable, OasisError, ServerUnavailable
from .ledger import Ledger
from .machine import grows, nodes_now, open_engine
from .schedule import Attempt, Ending, Schedule
from .settings import Settings
from .shards import Outcome, Shards, run_shard

LOOK_SECONDS = 2.0
# How long a batch that is stopped waits for its threads beyond the grace of its containers.
STOP_SECONDS = 60.0
MOST_AT_ONCE, MOST_AHEAD = 256, 4
_POLL_SECONDS = 0.2


class FanOut(Protocol):
    """Where attempts at shards are made."""

    def room(self, wanted: int) -> int:
        """How many attempts may be under way at once, now, of so many that could be."""
        ...

    def start(self, attempt: Attempt) -> None:
        """Begin an attempt."""
        ...

    def ended(self) -> Iterator[tuple[Attempt, Outcome]]:
        """Those that have ended since; waits a moment for the first."""
        ...


def carry_out(schedule: Schedule, fan_out: FanOut, tell: Callable[[Outcome, bool], None]) -> OasisError | None:
    """Make attempts until the schedule has no more; return the error that stopped it, if one did.

    `tell` gets every outcome, and whether it is the last word on its shard. An error of the platform stops the batch once
    what is under way has ended, and so does one that would be the same for every shard.
    """
    stopped_by: OasisError | None = None
    while not schedule.finished:
        interruption.check()
        room = fan_out.room(schedule.wanted)
        while schedule.running < room and (attempt := schedule.start(time.monotonic())):
            fan_out.start(attempt)
        for attempt, outcome in fan_out.ended():
            final = schedule.ended(attempt, outcome.ending, time.monotonic())
            tell(outcome, final)
            if schedule.stopped and stopped_by is None and outcome.ending in (Ending.UNKNOWN, Ending.HOPELESS):
                stopped_by = outcome.error
    return stopped_by


class InProcess:
    """Shards as tasks of the batch's own flow run, in threads of its own process; made by `in_process`.

    A few more attempts are under way than containers run: they stage their input and publish their output meanwhile.
    """

    def __init__(self, shards: Shards, pool: ThreadPoolExecutor, settings: Settings) -> None:
        self._shards, self._pool, self._settings = shards, pool, settings
        self._ended: SimpleQueue[tuple[Attempt, Outcome]] = SimpleQueue()
        self._room, self._fit, self._looked, self._running = 0, 0, 0.0, 0
        self._waiting = Waiting(LOOK_SECONDS)

    def room(self, wanted: int) -> int:
        """As many attempts as containers fit into what others leave, looked at every two seconds, and some ahead."""
        due = not self._looked or time.monotonic() - self._looked >= LOOK_SECONDS
        if due or self._room < min(wanted, self._fit):
            with reservations.counting(self._settings.home):
                self._look(wanted)
        return self._room + min(self._room, MOST_AHEAD)

    def _look(self, wanted: int) -> None:
        self._looked = time.monotonic()
        batch = self._shards.batch
        try:
            nodes = nodes_now(self._settings, without=batch.plan.run_id)
        except (EngineUnavailable, DescriptionError) as error:
            # Containers that run are watched by those who are patient with it; more are started when it is back. A snapshot, which
            # could be read when the batch began, is being written anew.
            self._waiting.tell(f"nobody can tell what is free: {error}".rstrip("."))
            self._fit = 0
            self._take(0)
            return
        count, found = places(batch.plan, nodes, batch.options, self._settings.headroom, grows=grows(self._settings))
        self._fit = min(count, MOST_AT_ONCE)
        self._take(min(self._fit, wanted))
        if len(nodes) == 1 and (each := demand_of(batch.plan).on(nodes[0])):
            # Those that run already go on, however little is free.
            amount = Vector(*(max(self._room, self._shards.places.taken) * part for part in each))
            reservations.reserve(self._shards.workspace, amount)
        have = "; ".join(described(node, self._settings.headroom) for node in nodes[:10])
        self._waiting.tell("" if count else f"too few {found.limit} are free for {demand_of(batch.plan)}: {have}")

    def _take(self, room: int) -> None:
        self._room = room
        self._shards.places.allow(room)

    def start(self, attempt: Attempt) -> None:
        """Begin an attempt, in a thread."""
        self._running += 1
        self._pool.submit(copy_context().run, self._work, attempt)

    def _work(self, attempt: Attempt) -> None:
        error: OasisError = EngineError(
            f"The task of shard {attempt.shard.name} ended without a word. See the log of its task run."
        )
        try:
            placed(partial(run_shard, self._shards, attempt, return_state=True), self._wait)
        except OasisError as other:
            error = other
        except Exception as other:  # noqa: BLE001 - Prefect's own trouble with a task
            error = EngineError(
                f"The task of shard {attempt.shard.name} could not be run. The cause: {type(other).__name__}: {other}"
            )
        finally:
            lost = Outcome(Ending.UNKNOWN, self._shards.unknown(attempt, error), error)
            self._ended.put((attempt, self._shards.outcomes.pop(attempt.shard.name, lost)))

    def _wait(self) -> None:
        if self._shards.stop.wait(1.0):
            raise ServerUnavailable("The batch ended before this shard began, and the Prefect server did not answer.")

    def ended(self) -> Iterator[tuple[Attempt, Outcome]]:
        """Those that have ended since."""
        pause: float | None = _POLL_SECONDS
        with suppress(Empty):
            while True:
                ended = self._ended.get(timeout=pause) if pause else self._ended.get_nowait()
                self._running, pause = self._running - 1, None
                yield ended

    def stop(self) -> None:
        """End what is under way: every container gets SIGTERM and its grace, then SIGKILL; no thread is left."""
        self._shards.stop.set()
        engine, until = open_engine(self._settings), time.monotonic() + self._settings.stop_grace_seconds + STOP_SECONDS
        grace = self._settings.stop_grace_seconds
        while self._running and time.monotonic() < until:
            # Again, for a thread that was about to start a container.
            with suppress(OasisError):
                engine.reap(self._shards.batch.plan.run_id, stop_seconds=grace)
            grace = 0.0
            for _ in self.ended():
                pass

    def tidy(self) -> None:
        """Remove containers whose end was seen, and which an engine that was away then did not remove."""
        with suppress(OasisError):
            open_engine(self._settings).reap(self._shards.batch.plan.run_id)


@contextmanager
def in_process(shards: Shards, settings: Settings) -> Iterator[InProcess]:
    """Attempts in this process, for the time of the block. None of their containers outlives it, however it ends."""
    with ThreadPoolExecutor(MOST_AT_ONCE + MOST_AHEAD, "oasis-shard") as pool:
        fan_out = InProcess(shards, pool, settings)
        try:
            yield fan_out
        except BaseException:
            fan_out.stop()
            raise
        else:
            fan_out.tidy()
        finally:
            reservations.release(shards.workspace)


def schedule_of(batch: Batch, ledger: Ledger) -> Schedule:
    """What is left to do: what the ledger knows is done."""
    known = {row.shard: row.ending for row in ledger.rows()}
    return Schedule(
        batch.layout,
        batch.bytes,
        known=known,
        algorithm_retries=batch.options.algorithm_retries,
        most_failed=batch.options.max_failed_files,
    )
