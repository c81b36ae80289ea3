"""What a container writes to the machine's folders, watched from outside, so that it can be stopped in time.

No file system of every machine can limit a folder, so the folders are walked: through descriptors, never by a path that the
container could turn into a link, to any depth, and not beyond the limit.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from ..job import ContainerJob, Reason, Resources

# A walk takes a twentieth of the time, or half of it where the file system's own account says that a limit may be passed.
_REST, _SHORT_REST = 19.0, 1.0
_SECONDS_BETWEEN_LOOKS = 0.2
_RESERVE_BYTES, _RESERVE_SHARE = 1 << 30, 0.01
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Passed:
    """A limit that was passed: in bytes or in files, as the reason has it; of a full disk, the bytes that must stay free."""

    reason: Reason
    limit: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What some folders hold: bytes in files (holes count, names of one file count once), and names of every kind."""

    bytes: int = 0
    files: int = 0

    def over(self, limits: Resources) -> Passed | None:
        """The limit that this is more than, if any."""
        if limits.output_bytes is not None and self.bytes > limits.output_bytes:
            return Passed(Reason.OUTPUT_TOO_LARGE, limits.output_bytes)
        if limits.output_files is not None and self.files > limits.output_files:
            return Passed(Reason.TOO_MANY_FILES, limits.output_files)
        return None

    def grown(self, before: Sequence[os.statvfs_result], now: Sequence[os.statvfs_result]) -> Usage:
        """What it is by now at most, by what the file systems lost; files with holes apart."""
        pairs = list(zip(before, now, strict=True))
        size = max((old.f_bfree - new.f_bfree) * new.f_frsize for old, new in pairs)
        count = max(old.f_ffree - new.f_ffree for old, new in pairs)
        return Usage(self.bytes + max(0, size), self.files + max(0, count))


class Outlook(Protocol):
    """What is asked about the folders that a container writes to, for the time of its block; `Watch` where they are here."""

    @property
    def passed(self) -> Passed | None: ...

    @property
    def program_ended(self) -> bool: ...

    def at_end(self) -> Passed | None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Watch:
    """Looks at the writable folders of one container until the block ends: in a thread, so that a disk that hangs holds up
    nobody. `passed` is the limit that was passed, once one was. To be made before the container starts.

    The first look is `_SECONDS_BETWEEN_LOOKS` after the block begins; of a container that was quicker, `at_end` tells.
    """

    def __init__(self, job: ContainerJob) -> None:
        self.passed: Passed | None = None
        self._folders = [mount.source for mount in job.mounts if not mount.read_only and mount.source.exists()]
        self._ended = job.wrapper.ended if job.wrapper else None
        self._limits = job.resources
        self._first = self._disks()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"oasis-quota-{job.run_id}", daemon=True)

    def __enter__(self) -> Self:
        if self._folders:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()

    @property
    def program_ended(self) -> bool:
        """Has the job's wrapper said that the container's own program has ended?"""
        return self._ended is not None and self._ended.exists()

    def at_end(self) -> Passed | None:
        """The limit that was passed, now that nobody writes any more."""
        self._leave.set()
        return self.passed or measure(self._folders, self._limits).over(self._limits)

    def _work(self) -> None:
        with contextlib.suppress(OSError):  # a folder is gone, and there is nothing to look at any more
            self._watch()

    def _watch(self) -> None:
        found, again, at_once = Usage(), 0.0, 0.0
        disks = self._first
        while self.passed is None and not self._leave.wait(_SECONDS_BETWEEN_LOOKS):
            began, now = time.monotonic(), self._disks()
            if began >= again or (began >= at_once and found.grown(disks, now).over(self._limits)):
                found, disks = self._walk(), now
                ended = time.monotonic()
                again, at_once = ended + _REST * (ended - began), ended + _SHORT_REST * (ended - began)
            self.passed = found.over(self._limits) or _too_full(self._first, now, wrote=found.bytes > 0)

    def _walk(self) -> Usage:
        found = measure(self._folders, self._limits, self._leave)
        # Files that were moved meanwhile may have been counted twice: nothing is stopped on the word of one walk.
        return measure(self._folders, self._limits, self._leave) if found.over(self._limits) else found

    def _disks(self) -> list[os.statvfs_result]:
        return [os.statvfs(folder) for folder in self._folders]


def _too_full(first: Sequence[os.statvfs_result], now: Sequence[os.statvfs_result], *, wrote: bool) -> Passed | None:
    """Is less free than the machine itself needs, and can this container have done it?

    It can if it wrote, or if less is free than at first: a file that is open and has no name is seen by the disk only.
    """
    for old, new in zip(first, now, strict=True):
        reserve = min(_RESERVE_BYTES, int(new.f_blocks * new.f_frsize * _RESERVE_SHARE))
        if new.f_bavail * new.f_frsize < reserve and (wrote or new.f_bavail < old.f_bavail):
            return Passed(Reason.DISK_FULL, reserve)
    return None


def measure(folders: Sequence[Path], limits: Resources, leave: threading.Event | None = None) -> Usage:
    """What the folders hold, counted until a limit is passed, or until `leave` is set.

    Links are not followed. What vanishes meanwhile is not counted, and what is moved may be counted twice. A folder that
    this process may not look into counts as one name.
    """
    size, count, linked = 0, 0, set[tuple[int, int]]()
    for facts in (facts for folder in folders for facts in _names_below(folder)):
        count += 1
        if facts is not None and (facts.st_nlink == 1 or (facts.st_dev, facts.st_ino) not in linked):
            size += facts.st_size
            if facts.st_nlink > 1:
                linked.add((facts.st_dev, facts.st_ino))
        found = Usage(size, count)
        if found.over(limits) or (leave is not None and leave.is_set()):
            return found
    return Usage(size, count)


def _names_below(folder: Path) -> Iterator[os.stat_result | None]:
    """For each name below the folder the facts of its regular file, or `None` for a name of another kind."""
    try:
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError:
        yield folder.stat()
        return
    except OSError:
        return
    # The folders from the first one down, each with those in it that are still to be walked. Only one is open at a time, so
    # that no depth uses up the descriptors, and the way up is by "..".
    levels: list[tuple[tuple[int, int], list[str]]] = [(_identity(at), [])]
    try:
        yield from _names_in(at, levels[-1][1])
        while levels:
            (_, waiting) = levels[-1]
            if waiting:
                with contextlib.suppress(OSError):
                    at = _instead_of(at, os.open(waiting.pop(), _FOLDER, dir_fd=at))
                    levels.append((_identity(at), []))
                    yield from _names_in(at, levels[-1][1])
                continue
            levels.pop()
            if levels:
                at = _instead_of(at, os.open("..", _FOLDER, dir_fd=at))
                if _identity(at) != levels[-1][0]:
                    return  # the container moved the folder while we were in it
    except OSError:
        return
    finally:
        os.close(at)


def _names_in(at: int, folders: list[str]) -> Iterator[os.stat_result | None]:
    """One folder's names; those of its folders are put into `folders`."""
    with contextlib.suppress(OSError), os.scandir(at) as entries:
        for entry in entries:
            facts = None
            with contextlib.suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    facts = entry.stat(follow_symlinks=False)
                yield facts


def _identity(descriptor: int) -> tuple[int, int]:
    facts = os.fstat(descriptor)
    return facts.st_dev, facts.st_ino


def _instead_of(old: int, new: int) -> int:
    os.close(old)
    return new
