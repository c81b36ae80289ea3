"""How a large dataset is cut: shards are half-open ranges over the lines of its sorted listing.

Whatever way a listing is cut, the ranges are disjoint, complete, in order, never empty, and the same every time. There are
never more shards than files; no files make no shards.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise

from .errors import DescriptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The files from `start` to before `end` of a listing.

    `index` is its place among the `count` that were planned. A shard that fails is split in halves; these keep its index,
    and have names of their own: `3` splits into `3.0` and `3.1`.
    """

    name: str
    index: int
    count: int
    start: int
    end: int

    @property
    def files(self) -> int:
        """How many files it has: at least one."""
        return self.end - self.start

    def halves(self) -> tuple[Shard, Shard]:
        """The two that take its place; the first is the larger one by at most a file.

        Raises:
            ValueError: it is a single file.
        """
        if self.files < 2:
            raise ValueError(f"Shard {self.name} is one file and cannot be split.")
        middle = self.start + (self.files + 1) // 2
        return self._part(0, self.start, middle), self._part(1, middle, self.end)

    def _part(self, number: int, start: int, end: int) -> Shard:
        return Shard(name=f"{self.name}.{number}", index=self.index, count=self.count, start=start, end=end)


class Layout:
    """The shards of one listing: eight bytes each, so that a million of them are nothing."""

    def __init__(self, ends: Iterable[int]) -> None:
        self._ends = array("q", ends)
        if any(end <= start for start, end in pairwise(chain((0,), self._ends))):
            raise ValueError("The ends of shards must ascend.")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Shard:
        start = self._ends[index - 1] if index else 0
        return Shard(name=str(index), index=index, count=len(self), start=start, end=self._ends[index])

    def __iter__(self) -> Iterator[Shard]:
        return (self[index] for index in range(len(self)))

    @property
    def file_count(self) -> int:
        """How many files they have together."""
        return self._ends[-1] if self._ends else 0

    @property
    def ends(self) -> Iterator[int]:
        """Where each shard ends; `Layout` makes the same shards of it."""
        return iter(self._ends)


def weigh(layout: Layout, sizes: Iterable[int]) -> array[int]:
    """How many bytes each shard has, in one pass over the files' sizes."""
    bytes, rest = array("q"), iter(sizes)
    for shard in layout:
        bytes.append(sum(islice(rest, shard.files)))
    return bytes


def by_count(file_count: int, shards: int) -> Layout:
    """So many shards, whose numbers of files differ by one at most; fewer where there are fewer files.

    Raises:
        DescriptionError: `shards` is not positive.
    """
    count = min(_positive(shards, "shards"), file_count)
    return Layout((index + 1) * file_count // count for index in range(count))


def by_files(file_count: int, files_per_shard: int) -> Layout:
    """Shards of so many files; the last one may have fewer.

    Raises:
        DescriptionError: `files_per_shard` is not positive.
    """
    each = _positive(files_per_shard, "files_per_shard")
    return Layout(min(start + each, file_count) for start in range(0, file_count, each))


def by_bytes(sizes: Iterable[int], shards: int, *, file_count: int, size_bytes: int) -> Layout:
    """So many shards of about equally many bytes, in one pass over the files' sizes; fewer where there are fewer files.

    None that has several files is heavier than the average by more than the largest file. Among empty files it is their
    number that is balanced.

    Raises:
        DescriptionError: `shards` is not positive.
        ValueError: `file_count` and `size_bytes` are not those of `sizes`.
    """
    count = min(_positive(shards, "shards"), file_count)
    return Layout(_nearest(sizes, count, file_count, size_bytes))


def _nearest(sizes: Iterable[int], count: int, file_count: int, size_bytes: int) -> Iterator[int]:
    # A file weighs a little, so that empty ones are spread, and too little to move a byte.
    total, before, cut, last = size_bytes * file_count + file_count, 0, 1, 0
    seen = 0
    for position, size in enumerate(sizes):
        after = before + size * file_count + 1
        while cut < count and after * count >= total * cut:
            nearer_before = total * cut - before * count < after * count - total * cut
            end = position if nearer_before else position + 1
            # At least a file for this one and for each that follows.
            last = min(max(end, last + 1), file_count - (count - cut))
            yield last
            cut += 1
        before, seen = after, position + 1
    if (seen, before) != (file_count, total):
        raise ValueError(f"There are {seen} files, not the {file_count} that were counted before, or their sizes differ.")
    if count:
        yield file_count


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise DescriptionError(f"`{name}` is {value} and must be at least 1. Leave it out to have it chosen.")
    return value
