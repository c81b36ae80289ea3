"""One dataset out of many: the manifests of parts become one that points at their files. No byte of these is moved."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

from ..errors import DuplicateName
from ..manifest import Entry, Summary, checked, parse_line, sort_key, to_line
from .dataset import DATA, LOG, MANIFEST, RECORD, Published, write_manifest
from .folder import chunks_of, opened
from .publishing import PROVISIONAL
from .transfer import Location, files, in_order, translated

# As many open files as a merge needs at once.
_FAN_IN = 64


def begin(location: Location) -> None:
    """Mark the place as that of a dataset which is being written: nobody takes it for a folder of anything."""
    store = files(location)
    if location.is_local:
        store.abandon()
    store.write(RECORD, [PROVISIONAL], len(PROVISIONAL), last=True)


def merge(location: Location, parts: Mapping[str, str | None], manifest: Path) -> Summary:
    """Write the manifest of a dataset whose files are those of published parts, folders below `location`.

    `parts` has the digest of each one's manifest, where it is known. Memory does not grow with the number of parts or files.

    Raises:
        DuplicateName: two parts have a file of the same name.
        UnsafeName: the parts' files cannot be one folder.
        DatasetError: a part is not published, or is another than its digest says.
    """
    unsorted = manifest.with_name(f"{manifest.name}.parts")
    with translated(str(unsorted), writing=True):
        manifest.parent.mkdir(parents=True, exist_ok=True)
        found = in_order(partial(_lines_of, location), parts.items(), workers=4, window=8)
        with unsorted.open("wb") as file, closing(found):
            for lines in found:
                file.writelines(lines)
        while len(runs := list(_runs(unsorted))) > 1:
            unsorted = _merged(unsorted, runs)
    summary = write_manifest(checked(_distinct(_read(unsorted, 0, unsorted.stat().st_size))), manifest)
    unsorted.unlink()
    return summary


def commit(location: Location, *, beside: Mapping[str, Path], log: Path, record: bytes, manifest: Path | None) -> None:
    """Write what belongs beside the parts; the manifest comes last and makes it a dataset. `None`: it shall be none."""
    store = files(location)
    if manifest is None:
        store.delete([MANIFEST])
    for name, path in {**beside, LOG: log}.items():
        with opened(path.parent, path.name) as descriptor:
            store.write(name, chunks_of(descriptor, str(path)), path.stat().st_size, last=True)
    store.write(RECORD, [record], len(record), last=True)
    if manifest is not None:
        with opened(manifest.parent, manifest.name) as descriptor:
            store.write(MANIFEST, chunks_of(descriptor, str(manifest)), manifest.stat().st_size, last=True)


def rewrite_record(location: Location, record: bytes) -> None:
    """Have the record of a published dataset say something else of it; its files and manifest stay."""
    files(location).write(RECORD, [record], len(record), last=True)


def _lines_of(location: Location, known: tuple[str, str | None]) -> list[bytes]:
    part, digest = known
    entries = Published(location=location.child(part), record={"output": {"manifest_digest": digest}}).entries()
    return [to_line(entry._replace(at=f"{part}/{DATA}{entry.path}")) for entry in entries]


def _runs(path: Path) -> Iterator[tuple[int, int]]:
    """The spans of bytes within which the names ascend; two equal names are of one span."""
    start = at = 0
    previous = b""
    with path.open("rb") as file:
        for line in file:
            key = sort_key(parse_line(line).path)
            if key < previous:
                yield start, at
                start = at
            previous, at = key, at + len(line)
    yield start, at


def _merged(path: Path, runs: list[tuple[int, int]]) -> Path:
    """The file with its ascending runs merged, as many at a time as may be; the old file is removed."""
    other = path.with_name(f"{path.name}.merged")
    with other.open("wb") as file:
        for first in range(0, len(runs), _FAN_IN):
            readers = [_read(path, *span) for span in runs[first : first + _FAN_IN]]
            file.writelines(map(to_line, heapq.merge(*readers, key=lambda entry: sort_key(entry.path))))
    path.unlink()
    return other.rename(path)


def _read(path: Path, start: int, end: int) -> Iterator[Entry]:
    with path.open("rb") as file:
        file.seek(start)
        while file.tell() < end:
            yield parse_line(file.readline())


def _distinct(entries: Iterable[Entry]) -> Iterator[Entry]:
    previous: Entry | None = None
    for entry in entries:
        if previous is not None and previous.path == entry.path:
            first, second = (str(each.at).removesuffix(f"/{DATA}{each.path}") for each in (previous, entry))
            raise DuplicateName(
                f"The parts {first} and {second} both wrote {entry.path!r}, and one dataset cannot hold both. Let the algorithm "
                "name its output after its input files, or after the variable OASIS_RUN_ID, which is another in each container."
            )
        previous = entry
        yield entry
