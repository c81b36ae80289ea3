"""What a batch does next: which shard is started, tried again, split, or given up. No clock: the caller says what time it is.

A shard that the platform failed is tried again, later and later; one that its algorithm failed is split in halves, until
the file that breaks it stands alone. Halves come before shards that nobody has tried, so that an algorithm that fails on
everything is found out after a few files and not after all of them.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from .sharding import Layout, Shard

TRIES = 4
FIRST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 2.0, 60.0


class Ending(StrEnum):
    """How an attempt at a shard ended, as far as it matters for what comes next."""

    DONE = "done"
    # By its own doing, on these files: fewer of them may go better.
    FAILED = "failed"
    # Somebody killed the container: an accident at first, and its own doing if it happens every time.
    KILLED = "killed"
    # The platform failed; what the algorithm would have done is unknown.
    UNKNOWN = "unknown"
    # It would be the same for every shard.
    HOPELESS = "hopeless"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a shard. `number` counts from 1; `accidents` and `failures` say how earlier ones ended."""

    shard: Shard
    number: int = 1
    accidents: int = 0
    failures: int = 0


class Schedule:
    """The state of one batch. Its memory is ten bytes a shard, and what is being worked on.

    Args:
        layout: the shards.
        bytes: how heavy each is: the heaviest are started first.
        known: how shards (and parts of them), by name, ended before this process: `DONE` or `FAILED`. They are not tried
            again.
        algorithm_retries: how often a shard that its algorithm failed is tried again before it is split.
        most_failed: the batch is given up when more files than this fail alone.
    """

    def __init__(
        self,
        layout: Layout,
        bytes: array[int],
        *,
        known: Mapping[str, Ending] | None = None,
        algorithm_retries: int = 0,
        most_failed: int = 100,
    ) -> None:
        self._layout, self._known = layout, known or {}
        self._order = array("q", sorted(range(len(layout)), key=lambda index: (-bytes[index], index)))
        self._next = 0
        self._halves: list[Shard] = []
        self._later: list[tuple[float, str, Attempt]] = []
        self._algorithm_retries, self._most_failed = algorithm_retries, most_failed
        self.running = 0
        self.files_done = 0
        self.failed: list[Shard] = []
        self.stopped = False

    @property
    def too_many_failed(self) -> bool:
        """Have more files failed alone than the batch puts up with?"""
        return len(self.failed) > self._most_failed

    @property
    def finished(self) -> bool:
        """Is nothing running, and nothing left to start?"""
        left = self._halves or self._later or self._next < len(self._order)
        return not self.running and (self.stopped or not left)

    @property
    def wanted(self) -> int:
        """How many attempts could be under way at once, if there were room: those that are, and all that are left."""
        return self.running + len(self._halves) + len(self._later) + len(self._order) - self._next

    def start(self, now: float) -> Attempt | None:
        """The attempt to make next; `None` where there is none at this time. The caller tells how it `ended`."""
        attempt = None if self.stopped else self._due(now)
        self.running += attempt is not None
        return attempt

    def ended(self, attempt: Attempt, how: Ending, now: float) -> bool:
        """Note how an attempt ended; is that the last word on its shard, apart from its halves?

        It is not where the batch stops for it: what is mended since lets the shard be tried again.
        """
        self.running -= 1
        accident = how in (Ending.KILLED, Ending.UNKNOWN)
        if accident and attempt.accidents + 1 < TRIES:
            pause = min(FIRST_PAUSE_SECONDS * 2**attempt.accidents, MOST_PAUSE_SECONDS)
            self._again(replace(attempt, accidents=attempt.accidents + 1), now + pause)
            return False
        if how is Ending.FAILED and attempt.failures < self._algorithm_retries:
            self._again(replace(attempt, failures=attempt.failures + 1), now)
            return False
        if how in (Ending.UNKNOWN, Ending.HOPELESS):
            self.stopped = True
            return False
        self._settle(attempt.shard, done=how is Ending.DONE)
        return True

    def _again(self, attempt: Attempt, when: float) -> None:
        again = replace(attempt, number=attempt.number + 1)
        heapq.heappush(self._later, (when, attempt.shard.name, again))

    def _settle(self, shard: Shard, *, done: bool) -> None:
        if done:
            self.files_done += shard.files
        elif shard.files > 1:
            self._halves += reversed(shard.halves())
        else:
            self.failed.append(shard)
            self.stopped |= self.too_many_failed

    def _due(self, now: float) -> Attempt | None:
        if self._later and self._later[0][0] <= now:
            return heapq.heappop(self._later)[2]
        while not self.stopped and (shard := self._untried()) is not None:
            known = self._known.get(shard.name)
            if known is None:
                return Attempt(shard)
            self._settle(shard, done=known is Ending.DONE)
        return None

    def _untried(self) -> Shard | None:
        if self._halves:
            return self._halves.pop()
        if self._next == len(self._order):
            return None
        self._next += 1
        return self._layout[self._order[self._next - 1]]
