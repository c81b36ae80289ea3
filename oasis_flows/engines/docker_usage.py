"""What a container uses, followed while it runs: by its cgroup where that can be read, else by asking the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from ..errors import EngineError
from .cgroup import Cgroup, find_cgroup, kills_for_memory
from .docker_errors import translated
from .docker_verdict import parse_time
from .usage import Reading, Usage


class UsageWatch:
    """Follows one container, and is made before its start; `sample` never waits for the engine.

    Reading the cgroup costs a third of a millisecond. Asking the engine takes up to a second, so a thread does it.
    """

    def __init__(self, api: Any, container_id: str) -> None:
        self._api, self._id = api, container_id
        self._cgroup: Cgroup | None = None
        # How many processes the kernel had killed by the last reading, and by the end; an engine elsewhere has another kernel.
        self._kills = kills_for_memory() if api.base_url.startswith("http+docker:") else None
        self._kills_at_end: int | None = None
        self._zero = time.monotonic()
        self._over = threading.Event()
        self._usage = Usage()

    def begin(self, state: Mapping[str, Any]) -> None:
        """Follow the container, which was started, by its state."""
        started = parse_time(state.get("StartedAt", ""))
        passed = (datetime.now(UTC) - started).total_seconds() if started else 0.0
        self._zero = time.monotonic() - max(passed, 0.0)
        self._cgroup = find_cgroup(state.get("Pid") or 0, self._id)
        if self._cgroup is None and state.get("Running"):
            threading.Thread(target=self._ask, name=f"oasis-usage-{self._id[:12]}", daemon=True).start()

    def sample(self) -> None:
        """Take a reading of the cgroup."""
        if self._cgroup is not None:
            kills, reading = kills_for_memory(), self._cgroup.read()
            if reading.killed_for_memory is None:
                self._ended()
            elif self._kills is not None:
                self._kills = kills
            self._take(reading)

    def killed_unseen(self) -> bool:
        """Has the kernel killed a process of this machine for memory between the last reading, or the start of what ended unread, and the end?

        Of a container that dies soon after its start, containerd may not hear it: it asks to be told once the container runs
        (https://github.com/containerd/containerd/issues/8180).
        """
        return self._kills is not None and self._kills_at_end is not None and self._kills_at_end > self._kills

    def _ended(self) -> None:
        if self._kills_at_end is None:
            self._kills_at_end = kills_for_memory()

    def _take(self, reading: Reading) -> None:
        self._usage.add(time.monotonic() - self._zero, reading)

    def result(self) -> Usage:
        """What was found out so far; nothing is asked from now on. To be called as soon as the container has ended."""
        self._over.set()
        self._ended()
        return self._usage

    def _ask(self) -> None:
        while not self._over.wait(1.0):
            with suppress(EngineError), translated("asking what a container uses"):
                reading = reading_of(self._api.stats(self._id, stream=False, one_shot=True))
                if reading.memory_bytes is not None:
                    # It lives, and this machine's kernel is not asked about it from here.
                    self._kills = None
                self._take(reading)


def reading_of(answer: Mapping[str, Any]) -> Reading:
    """The engine's word on what a container uses. It knows no refused forks, and of one that has ended nothing at all."""
    memory = answer.get("memory_stats") or {}
    if "usage" not in memory:
        return Reading(cpu_seconds=None, memory_bytes=None, memory_peak_bytes=None)
    details = memory.get("stats") or {}
    cache = details.get("total_inactive_file", details.get("inactive_file", 0))
    return Reading(
        cpu_seconds=answer["cpu_stats"]["cpu_usage"]["total_usage"] / 1e9,
        memory_bytes=max(0, memory["usage"] - cache),
        memory_peak_bytes=memory.get("max_usage"),
    )
