"""A listing kept for later: a manifest of many files, of which anybody can read a few lines without the rest.

Beside `listing.jsonl` lies `listing.idx`: of every 256 lines where they begin and their CRC-32, twelve bytes. So a slice costs two
short reads, wherever it lies, and a bit that flips on the way is noticed.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from ..errors import DatasetError
from ..manifest import Entry, parse_line, to_line
from .dataset import lines, paired, read_manifest, settled
from .folder import chunks_of, opened
from .transfer import Location, files, translated

LISTING, INDEX = "listing.jsonl", "listing.idx"
_EVERY = 256
_BLOCK = struct.Struct("<QI")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a listing adds up to. `digest` is the SHA-256 of its lines; `sizes` has the bytes of each file, in order."""

    file_count: int
    size_bytes: int
    digest: str
    sizes: array[int]


def write_listing(entries: Iterable[Entry], folder: Path) -> Listing:
    """Write entries, which are sorted and checked, as a listing into a folder of this machine.

    Memory grows by eight bytes a file.
    """
    digest, sizes, at, rest = hashlib.sha256(), array("q"), 0, iter(entries)
    with translated(str(folder), writing=True):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LISTING).open("wb") as listing, (folder / INDEX).open("wb") as index:
            while some := list(islice(rest, _EVERY)):
                block = b"".join(map(to_line, some))
                index.write(_BLOCK.pack(at, zlib.crc32(block)))
                digest.update(block)
                listing.write(block)
                sizes.extend([entry.bytes for entry in some])
                at += len(block)
    return Listing(file_count=len(sizes), size_bytes=sum(sizes), digest=digest.hexdigest(), sizes=sizes)


def save_listing(folder: Path, location: Location) -> None:
    """Copy a listing of this machine to a store."""
    store = files(location)
    for name in (INDEX, LISTING):
        with opened(folder, name) as descriptor:
            size = (folder / name).stat().st_size
            store.write(name, chunks_of(descriptor, str(folder / name)), size, last=True)


def read_slice(location: Location, start: int, end: int) -> Iterator[Entry]:
    """The entries from `start` to before `end` of a saved listing, as they were written.

    Raises:
        DatasetError: the listing does not have so many, or others; somebody has changed it.
        StoreUnavailable: it arrived damaged.
    """
    return settled(partial(_slice, location, start, end), f"The listing at {location.url}")


def _slice(location: Location, start: int, end: int) -> Iterator[Entry]:
    at = start - start % _EVERY
    for block in _blocks(location, at // _EVERY, -(-end // _EVERY)):
        for number, line in enumerate(block, at):
            if start <= number < end:
                yield parse_line(line, number + 1)
        at += len(block)
    if at < end:
        raise DatasetError(
            f"The listing at {location.url} has no lines {start} to {end}. It was changed; begin the batch anew."
        )


def _blocks(location: Location, first: int, last: int) -> Iterator[list[bytes]]:
    """The lines of the blocks from `first` to before `last`, of as many as there are."""
    store, size = files(location), (last - first) * _BLOCK.size
    index = b""
    for chunk in store.read(INDEX, start=first * _BLOCK.size):
        index += chunk
        if len(index) >= size:
            break
    blocks = list(_BLOCK.iter_unpack(index[: min(size, len(index) // _BLOCK.size * _BLOCK.size)]))
    rest = lines(store.read(LISTING, start=blocks[0][0])) if blocks else iter(())
    for number, (_, promised) in enumerate(blocks, first):
        block = list(islice(rest, _EVERY))
        found = zlib.crc32(b"".join(line + b"\n" for line in block))
        if found != promised:
            raise DatasetError(
                f"The listing at {location.url} is another than was saved: the CRC-32 of its lines from {number * _EVERY} on is {found}, "
                f"and was {promised}. Begin the batch anew."
            )
        yield block


def changes(folder: Path, location: Location, most: int = 5) -> list[str]:
    """How a listing of this machine differs from the one that is saved, in words, the first few."""
    told: list[str] = []
    saved = (parse_line(line) for line in lines(files(location).read(LISTING)) if line)
    for now, then in paired(read_manifest(folder / LISTING), saved):
        if len(told) == most:
            return [*told, "and more"]
        if then is None and now is not None:
            told.append(f"{now.path!r} is new")
        elif now is None and then is not None:
            told.append(f"{then.path!r} is gone")
        elif now is not None and now != then:
            told.append(f"{now.path!r} has changed")
    return told
