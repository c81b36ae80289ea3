"""What a container writes to the machine's folders, watched from outside, so that it can be stopped in time.

No file system of every machine can limit a folder, so the folders are walked: through descriptors, never by a path that the
container could turn into a link, to any depth, and not beyond the limit. Names are counted apart from sizes, and more often: for
a size the disk has to be asked about each file, which takes a hundred times as long where the kernel has forgotten it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, Self

from ..job import ContainerJob, Reason, Resources

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
        self._names, self._sizes, self._looked = _Rhythm(self._first), _Rhythm(self._first), 0.0
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
        return self.passed or passed(self._folders, self._limits)

    def _work(self) -> None:
        with contextlib.suppress(OSError):  # a folder is gone, and there is nothing to look at any more
            self._watch()

    def _watch(self) -> None:
        while self._goes_on() and not self._leave.wait(_SECONDS_BETWEEN_LOOKS):
            self._look_at_names()
            now = self._disks()
            if self._goes_on() and self._sizes.due(now, self._limits):
                self._sizes.look(partial(self._certain, measure, self._goes_on_counting), now)
            wrote = self._sizes.found.bytes > 0
            self.passed = self.passed or self._sizes.found.over(self._limits) or _too_full(self._first, now, wrote=wrote)

    def _look_at_names(self) -> None:
        only, self._looked = replace(self._limits, output_bytes=None), time.monotonic()
        if self._limits.output_files is not None and self._names.due(now := self._disks(), only):
            self._names.look(partial(self._certain, count, self._goes_on), now)
            self.passed = self.passed or self._names.found.over(only)

    def _certain(self, walk: _Walk, go_on: Callable[[], bool]) -> Usage:
        found = walk(self._folders, self._limits, go_on)
        # Files that were moved meanwhile may have been counted twice: nothing is stopped on the word of one walk.
        return walk(self._folders, self._limits, go_on) if found.over(self._limits) else found

    def _goes_on(self) -> bool:
        return self.passed is None and not self._leave.is_set()

    def _goes_on_counting(self) -> bool:
        """As `_goes_on`, with a look at the names where one is due: to add sizes up may take minutes."""
        if time.monotonic() - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self._look_at_names()
        return self._goes_on()

    def _disks(self) -> list[os.statvfs_result]:
        return [os.statvfs(folder) for folder in self._folders]


class _Rhythm:
    """When to walk again, and what the last walk found.

    A walk takes a twentieth of the time, or half of it where the file system's own account says that a limit may be passed.
    """

    def __init__(self, disks: list[os.statvfs_result]) -> None:
        self.found = Usage()
        self._disks, self._again, self._at_once = disks, 0.0, 0.0

    def due(self, disks: list[os.statvfs_result], limits: Resources) -> bool:
        now = time.monotonic()
        grown = self.found.grown(self._disks, disks)
        return now >= self._again or (now >= self._at_once and grown.over(limits) is not None)

    def look(self, walk: Callable[[], Usage], disks: list[os.statvfs_result]) -> None:
        began = time.monotonic()
        self.found, self._disks = walk(), disks
        ended = time.monotonic()
        self._again, self._at_once = ended + _REST * (ended - began), ended + _SHORT_REST * (ended - began)


def _too_full(first: Sequence[os.statvfs_result], now: Sequence[os.statvfs_result], *, wrote: bool) -> Passed | None:
    """Is less free than the machine itself needs, and can this container have done it?

    It can if it wrote, or if less is free than at first: a file that is open and has no name is seen by the disk only.
    """
    for old, new in zip(first, now, strict=True):
        reserve = min(_RESERVE_BYTES, int(new.f_blocks * new.f_frsize * _RESERVE_SHARE))
        if new.f_bavail * new.f_frsize < reserve and (wrote or new.f_bavail < old.f_bavail):
            return Passed(Reason.DISK_FULL, reserve)
    return None


def passed(folders: Sequence[Path], limits: Resources) -> Passed | None:
    """The limit that is passed in folders to which nobody writes any more."""
    names = count(folders, limits).over(limits) if limits.output_files is not None else None
    return names or measure(folders, limits).over(limits)


class _Walk(Protocol):
    def __call__(self, folders: Sequence[Path], limits: Resources, go_on: Callable[[], bool], /) -> Usage: ...


def measure(folders: Sequence[Path], limits: Resources, go_on: Callable[[], bool] = lambda: True) -> Usage:
    """What the folders hold, added up until a limit is passed, or as long as `go_on` says so.

    Links are not followed. What vanishes meanwhile is not counted, and what is moved may be counted twice. A folder that
    this process may not look into counts as one name.
    """
    size, names, linked = 0, 0, set[tuple[int, int]]()
    for facts in (facts for folder in folders for facts in _names_below(folder)):
        names += 1
        if facts is not None and (facts.st_nlink == 1 or (facts.st_dev, facts.st_ino) not in linked):
            size += facts.st_size
            if facts.st_nlink > 1:
                linked.add((facts.st_dev, facts.st_ino))
        found = Usage(size, names)
        if found.over(limits) or not go_on():
            return found
    return Usage(size, names)


def count(folders: Sequence[Path], limits: Resources, go_on: Callable[[], bool] = lambda: True) -> Usage:
    """As `measure`, with the names alone: of the bytes it says nothing."""
    most, names = limits.output_files, 0
    for _ in (name for folder in folders for name in _names_below(folder, facts=False)):
        names += 1
        if most is not None and names > most:
            break
        if names % 1000 == 0 and not go_on():
            break
    return Usage(0, names)


def _names_below(folder: Path, *, facts: bool = True) -> Iterator[os.stat_result | None]:
    """For each name below the folder the facts of its regular file; `None` for a name of another kind, or without `facts`."""
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
        yield from _names_in(at, levels[-1][1], facts=facts)
        while levels:
            (_, waiting) = levels[-1]
            if waiting:
                with contextlib.suppress(OSError):
                    at = _instead_of(at, os.open(waiting.pop(), _FOLDER, dir_fd=at))
                    levels.append((_identity(at), []))
                    yield from _names_in(at, levels[-1][1], facts=facts)
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


def _names_in(at: int, folders: list[str], *, facts: bool) -> Iterator[os.stat_result | None]:
    """One folder's names; those of its folders are put into `folders`."""
    with contextlib.suppress(OSError), os.scandir(at) as entries:
        for entry in entries:
            found = None
            with contextlib.suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif facts and entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                yield found


def _identity(descriptor: int) -> tuple[int, int]:
    facts = os.fstat(descriptor)
    return facts.st_dev, facts.st_ino


def _instead_of(old: int, new: int) -> int:
    os.close(old)
    return new
