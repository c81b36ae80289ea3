"""A listing kept for later: a manifest of many files, of which anybody can read a few lines without the rest.

Beside `listing.jsonl` lies `listing.idx`: where every 256th line begins, eight bytes each. So a slice costs two short reads,
wherever it lies.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..errors import DatasetError
from ..manifest import Entry, parse_line, to_line
from .dataset import lines, paired, read_manifest
from .folder import chunks_of, opened
from .transfer import Location, files, translated

LISTING, INDEX = "listing.jsonl", "listing.idx"
_EVERY = 256
_OFFSET = struct.Struct("<Q")


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
                index.write(_OFFSET.pack(at))
                block = b"".join(map(to_line, some))
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
        DatasetError: the listing does not have so many; somebody has changed it.
    """
    store, count, found = files(location), end - start, 0
    packed = next(store.read(INDEX, start=start // _EVERY * _OFFSET.size), b"")[: _OFFSET.size]
    if len(packed) == _OFFSET.size:
        rest = lines(store.read(LISTING, start=_OFFSET.unpack(packed)[0]))
        for line in islice(rest, start % _EVERY, start % _EVERY + count):
            found += 1
            yield parse_line(line, start + found)
    if found != count:
        raise DatasetError(
            f"The listing at {location.url} has no lines {start} to {end}. It was changed; begin the batch anew."
        )


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
