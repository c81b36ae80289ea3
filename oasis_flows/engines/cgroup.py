"""The kernel's own account of a container's memory: its cgroup's files, read from outside."""

from __future__ import annotations

from pathlib import Path


class MemoryPeak:
    """Follows the highest memory use of one container; `bytes` stays `None` while it cannot be read.

    `killed` says that the kernel was seen to kill a process in it for memory. Under load the engine learns of that late
    or, on cgroup v1, never.

    The kernel keeps the maximum itself, so a sample now and then misses only what comes after the last one.
    """

    def __init__(self, pid: int, container_id: str, *, root: Path = Path("/")) -> None:
        self.bytes: int | None = None
        self.killed = False
        self._file = find_peak_file(pid, container_id, root)

    def sample(self) -> None:
        """Read the kernel's maximum once. A cgroup that is gone leaves the last value."""
        if self._file is None:
            return
        try:
            self.bytes = int(self._file.read_text())
            told = self._file.with_name("memory.oom_control" if "usage" in self._file.name else "memory.events").read_text()
            self.killed |= any(line.startswith("oom_kill ") and not line.endswith(" 0") for line in told.splitlines())
        except (OSError, ValueError):
            return


def find_peak_file(pid: int, container_id: str, root: Path = Path("/")) -> Path | None:
    """The file with the peak of the container whose first process is `pid`; `None` where there is none to be read.

    An engine on another machine, or seen from inside a container, counts processes differently: a cgroup that does not
    bear the container's id belongs to somebody else and is not taken.
    """
    try:
        lines = (root / "proc" / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if container_id not in path:
            continue
        # cgroup v1: https://docs.kernel.org/admin-guide/cgroup-v1/memory.html; v2: memory.peak since Linux 5.19.
        v1 = root / "sys/fs/cgroup/memory" / path.lstrip("/") / "memory.max_usage_in_bytes"
        v2 = root / "sys/fs/cgroup" / path.lstrip("/") / "memory.peak"
        if "memory" in controllers.split(",") and v1.exists():
            return v1
        if controllers == "" and v2.exists():
            return v2
    return None
