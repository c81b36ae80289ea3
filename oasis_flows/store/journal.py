"""What has been fetched already: one line a file, appended when the file is whole.

Every attempt appends in the order of the names, so the journal is a few sorted runs; they are merged while reading, and
memory does not grow with its length. Lines that a crash cut are left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from itertools import groupby
from pathlib import Path

from ..errors import DatasetError
from ..manifest import Entry, parse_line, sort_key, to_line
from .transfer import translated


class Journal:
    """The journal at a path; a missing one is empty."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self) -> Iterator[Entry]:
        """What is known, sorted: of each file what was written last."""
        merged = heapq.merge(*[_run(self._path, *span) for span in self._runs()], key=lambda entry: sort_key(entry.path))
        for _, same in groupby(merged, key=lambda entry: entry.path):
            *_, latest = same
            yield latest

    def _runs(self) -> list[tuple[int, int]]:
        """The spans of bytes within which the names ascend."""
        starts, at, previous = [0], 0, b""
        if not self._path.exists():
            return []
        with translated(str(self._path)), self._path.open("rb") as file:
            for line in file:
                entry = _entry(line)
                if entry is not None:
                    if sort_key(entry.path) < previous:
                        starts.append(at)
                    previous = sort_key(entry.path)
                at += len(line)
        return list(zip(starts, [*starts[1:], at], strict=True))

    def keep(self, entries: Iterable[Entry]) -> None:
        """Forget all but these, which are sorted, once all of them have been taken."""
        if not self._path.exists():
            return
        kept = self._path.with_name(f"{self._path.name}.part")
        with translated(str(self._path), writing=True):
            with kept.open("wb") as file:
                file.writelines(map(to_line, entries))
            kept.replace(self._path)

    @contextmanager
    def appending(self) -> Iterator[Callable[[Entry], None]]:
        """Add to the journal for the time of the block; a line is the kernel's once the call has returned."""
        with translated(str(self._path), writing=True):
            file = self._path.open("ab", buffering=0)
        with file:
            # Parts what follows from a line that a crash cut.
            _append(file, b"\n")
            yield lambda entry: _append(file, to_line(entry))


def _append(file: FileIO, line: bytes) -> None:
    with translated(file.name, writing=True):
        file.write(line)


def _run(path: Path, start: int, end: int) -> Iterator[Entry]:
    with translated(str(path)), path.open("rb") as file:
        file.seek(start)
        while file.tell() < end:
            entry = _entry(file.readline())
            if entry is not None:
                yield entry


def _entry(line: bytes) -> Entry | None:
    try:
        return parse_line(line)
    except DatasetError:
        return None
