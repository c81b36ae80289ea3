"""The kernel's own account of a container: its cgroup's files, read from outside, with nothing in the container.

https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from .usage import Reading

# The files, and in version 1 the controllers, each of which has a tree of its own. memory.peak exists since Linux 5.19.
_V1 = {
    "memory": ("memory", "memory.usage_in_bytes"),
    "stat": ("memory", "memory.stat"),
    "peak": ("memory", "memory.max_usage_in_bytes"),
    "kills": ("memory", "memory.oom_control"),
    "cpu": ("cpuacct", "cpuacct.usage"),
    "pids": ("pids", "pids.events"),
}
_V2 = {
    "memory": "memory.current",
    "stat": "memory.stat",
    "peak": "memory.peak",
    "kills": "memory.events",
    "cpu": "cpu.stat",
    "pids": "pids.events",
}


class Cgroup:
    """The cgroup of one container, by the files that can be read of it."""

    def __init__(self, files: Mapping[str, Path], *, version: Literal[1, 2]) -> None:
        self._files, self._version = files, version

    def read(self) -> Reading:
        """What the container has used by now; a value that cannot be read, as after its end, is `None`."""
        memory = self._number("memory")
        cache = self._number("stat", "total_inactive_file" if self._version == 1 else "inactive_file") or 0
        kills = self._number("kills", "oom_kill")
        nanoseconds = self._number("cpu") if self._version == 1 else _times(1000, self._number("cpu", "usage_usec"))
        return Reading(
            cpu_seconds=_times(1e-9, nanoseconds),
            memory_bytes=None if memory is None else max(0, memory - cache),
            memory_peak_bytes=self._number("peak"),
            killed_for_memory=None if kills is None else kills > 0,
            forks_refused=self._number("pids", "max") or 0,
        )

    def _number(self, name: str, key: str = "") -> int | None:
        return _number(self._files[name], key) if name in self._files else None


def kills_for_memory(root: Path = Path("/")) -> int | None:
    """How many processes this machine's kernel has killed for want of memory, in all containers and outside them."""
    return _number(root / "proc/vmstat", "oom_kill")


def _number(file: Path, key: str) -> int | None:
    """A file's only number, or that on the line of `key`."""
    with suppress(OSError, ValueError):
        text = file.read_text()
        if not key:
            return int(text)
        for line in text.splitlines():
            found, _, number = line.partition(" ")
            if found == key:
                return int(number)
    return None


def find_cgroup(pid: int, container_id: str, root: Path = Path("/")) -> Cgroup | None:
    """The cgroup of the container whose first process is `pid`; `None` where there is none to be read.

    An engine on another machine, or seen from inside a container, counts processes differently: a cgroup that does not
    bear the container's id belongs to somebody else and is not taken.
    """
    try:
        lines = (root / "proc" / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return None
    mounted, paths = root / "sys/fs/cgroup", dict[str, str]()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if container_id in path:
            paths |= dict.fromkeys(controllers.split(","), path.lstrip("/"))
    v1 = {name: mounted / kind / paths[kind] / file for name, (kind, file) in _V1.items() if kind in paths}
    if "memory" in v1 and v1["memory"].exists():
        return Cgroup(v1, version=1)
    v2 = {name: mounted / paths[""] / file for name, file in _V2.items() if "" in paths}
    if "memory" in v2 and v2["memory"].exists():
        return Cgroup(v2, version=2)
    return None


def _times(factor: float, number: float | None) -> float | None:
    return None if number is None else factor * number
