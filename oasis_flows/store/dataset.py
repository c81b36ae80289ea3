"""What stands at a URL: a dataset that a run published, or a folder of somebody's files.

A published dataset has its files under `data/`, and beside them `log.txt`, `task.json` (the record, known by its key
`oasis_flows`) and `manifest.jsonl`, which is written last: without it the run failed or is not done yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DatasetError, DatasetNotFound, StoreUnavailable
from ..manifest import Entry, Summary, Tally, checked, parse, parse_line, sort_key
from .folder import Found, chunks_of, opened, walk
from .transfer import Chunk, Files, Location, Meter, files, in_order, translated
from .verdicts import Missing

T = TypeVar("T")
C = TypeVar("C", bound=Chunk)

DATA, LOG, RECORD, MANIFEST = "data/", "log.txt", "task.json", "manifest.jsonl"
MARKER, BATCH = "oasis_flows", "batch"
RECORD_MOST_BYTES = 16 << 20
RECORD_MOST_READINGS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A dataset that a run published whole. `record` is its `task.json`."""

    location: Location
    record: Mapping[str, object]

    @property
    def in_parts(self) -> bool:
        """Did a batch publish it? Then each entry says where (`at`) in the dataset's folder its bytes are."""
        return BATCH in self.record

    @property
    def base(self) -> Location:
        """The folder that the files' names, or their `at`, are relative to."""
        return self.location if self.in_parts else self.location.child(DATA.rstrip("/"))

    def entries(self) -> Iterator[Entry]:
        """The manifest's entries, each with its SHA-256; checked, and read as they are needed.

        Raises:
            DatasetError: the manifest is damaged, or another than its record says.
            StoreUnavailable: it arrived damaged.
        """
        return settled(self._as_read, f"The manifest of {self.location.url}")

    def _as_read(self) -> Iterator[Entry]:
        in_parts, where, tally, raw = self.in_parts, self.location.url, Tally(), hashlib.sha256()

        def noted(chunks: Iterable[bytes]) -> Iterator[bytes]:
            for chunk in chunks:
                raw.update(chunk)
                yield chunk

        for entry in parse(lines(noted(files(self.location).read(MANIFEST)))):
            if entry.sha256 is None:
                raise DatasetError(f"The manifest of {where} has no sha256 for {entry.path!r}: publish it again.")
            if (entry.at is None) is in_parts:
                raise DatasetError(f"The manifest of {where} does not fit its {RECORD}, at {entry.path!r}: publish it again.")
            if in_parts:
                tally.add(entry)
            yield entry
        found = tally.summary().digest if in_parts else raw.hexdigest()
        promised = _digest(self.record)
        # Believed when it has been read twice, too.
        if promised not in (None, found) and (promised := _digest(_record(files(self.location)))) not in (None, found):
            raise DatasetError(
                f"The manifest of {where} is another than was published. Its digest is {found}, and {RECORD} says {promised}: "
                "restore it, or publish the dataset again."
            )


def _digest(record: Mapping[str, object] | None) -> object:
    """What a record says of its dataset's manifest; one of another's making may say nothing."""
    output = record.get("output") if record else None
    return output.get("manifest_digest") if isinstance(output, Mapping) else None


def settled(read: Callable[[], Iterator[T]], what: str) -> Iterator[T]:
    """Pass on what is read. That it is damaged is believed when it has been read twice alike: a bit may flip on the way.

    Raises:
        DatasetError: what `read` raises, where it does so again.
        StoreUnavailable: it does not.
    """
    try:
        yield from read()
    except DatasetError as error:
        if error.transient or str(error) == _failure(read):
            raise
        raise StoreUnavailable(f"{what} arrived damaged. Try again; check the network.") from error


def _failure(read: Callable[[], Iterator[T]]) -> str | None:
    try:
        for _ in read():
            pass
    except DatasetError as error:
        return str(error)
    return None


def published(location: Location) -> Published | None:
    """The published dataset at this place; `None` when it is a folder of anything else, or nothing.

    Raises:
        DatasetNotFound: a run wrote here and never finished; or the bucket does not exist.
    """
    store = files(location)
    record = _record(store)
    if record is None:
        return None
    try:
        store.size(MANIFEST)
    except Missing:
        raise DatasetNotFound(
            f"{location.url} is not a dataset, because the run that writes it failed or has not finished. "
            f"See {LOG} and {RECORD} there; run it again, or take another dataset."
        ) from None
    return Published(location=location, record=record)


def read_record(location: Location) -> Mapping[str, Any] | None:
    """The record at this place, whether or not it is of a dataset; `None` if there is none."""
    return _record(files(location))


def _record(store: Files) -> Mapping[str, object] | None:
    """The record that is there; `None` where there is none, or any other file of its name.

    That it is another is believed when it has been read twice alike: a bit that flips on the way would make a published
    dataset a folder of anything.
    """
    readings = [_whole(store)]
    while (found := _parsed(readings[-1])) is None and readings[-1] is not None and readings.count(readings[-1]) < 2:
        if len(readings) == RECORD_MOST_READINGS:
            raise StoreUnavailable(f"{RECORD} is another each time that it is read. Try again; check the network.")
        readings.append(_whole(store))
    return found


def _whole(store: Files) -> bytes | None:
    """What the record's file holds, or as much as tells that it is too large for one; `None` where there is no file."""
    content = bytearray()
    with suppress(Missing):
        for chunk in store.read(RECORD):
            content += chunk
            if len(content) > RECORD_MOST_BYTES:
                break
        return bytes(content)
    return None


def _parsed(content: bytes | None) -> Mapping[str, object] | None:
    if content is None or len(content) > RECORD_MOST_BYTES:
        return None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and MARKER in found else None


def scan(location: Location, *, hash: bool = False) -> Iterator[Entry]:
    """The dataset's files, sorted and checked, found while you iterate; memory does not grow with their number.

    A published dataset's are those of its manifest, with their SHA-256. Others have an etag where the store knows one;
    with `hash`, local files are read for their SHA-256.

    Raises:
        DatasetNotFound: there is nothing; or a run that never finished.
        DatasetError: it is a file and no folder.
        UnsafeName: a name, a link or a special file that cannot be carried.
    """
    known = published(location)
    if known is not None:
        yield from known.entries()
    elif location.is_local and hash:
        yield from checked(hashed(Path(location.path).expanduser(), Meter(None)))
    else:
        yield from checked(listed(location))


def listed(location: Location) -> Iterator[Entry]:
    """What the store lists there; not checked.

    Raises:
        DatasetNotFound: nothing at all, in a store where folders do not exist by themselves.
    """
    store, nothing = files(location), True
    try:
        for entry in store.list():
            nothing = False
            yield entry
    except Missing as error:
        raise DatasetNotFound(
            f"There is no folder {location.url}. Check the address, and that this machine sees it. {error}"
        ) from error
    if nothing and not location.is_local:
        _explain_nothing(location)


def _explain_nothing(location: Location) -> None:
    parent, _, name = location.url.rstrip("/").rpartition("/")
    if location.path.strip("/").count("/"):
        try:
            files(Location(parent, location.options)).size(name)
        except Missing:
            pass
        else:
            raise DatasetError(f"{location.url} is a file. A dataset is a folder: give the folder that it is in.")
    raise DatasetNotFound(
        f"There are no files at {location.url}. Check the address; names in object stores are case-sensitive."
    )


def hashed(root: Path, meter: Meter, found: Iterable[Found] | None = None) -> Iterator[Entry]:
    """The files below a local folder with their SHA-256, read by a few threads; not checked."""

    def entry(file: Found) -> Entry:
        with opened(root, file.real) as descriptor:
            reading = Reading(meter)
            for _ in reading.through(chunks_of(descriptor, f"{root}/{file.name}")):
                pass
        return reading.entry(file.name)

    require_folder(root)
    with closing(in_order(entry, walk(root) if found is None else found, workers=4, tick=meter.tick)) as entries:
        for each in entries:
            meter.file_done()
            yield each


def totals(found: Iterable[Found | Entry]) -> tuple[int, int]:
    """How many files there are, and their bytes."""
    count = size = 0
    for file in found:
        count, size = count + 1, size + file.bytes
    return count, size


def require_folder(root: Path) -> None:
    """Return if it is a folder.

    Raises:
        DatasetNotFound: nothing is there.
        DatasetError: it is a file.
    """
    if root.exists() and not root.is_dir():
        raise DatasetError(f"{root} is a file. A dataset is a folder: give the folder that it is in.")
    if not root.exists():
        raise DatasetNotFound(f"There is no folder {root}. Check the address; it must exist on the machine that runs this.")


class Reading:
    """Size and SHA-256 (and MD5, if wanted) of bytes on their way to somewhere else."""

    def __init__(self, meter: Meter, *, md5: bool = False) -> None:
        self._meter = meter
        self._sha256 = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False) if md5 else None
        self.size = 0

    def through(self, chunks: Iterable[C]) -> Iterator[C]:
        """Pass the bytes on."""
        for chunk in chunks:
            self._sha256.update(chunk)
            if self._md5 is not None:
                self._md5.update(chunk)
            self.size += len(chunk)
            self._meter.add(len(chunk))
            yield chunk

    @property
    def md5(self) -> str | None:
        """Of what has passed so far; `None` if not wanted."""
        return self._md5.hexdigest() if self._md5 is not None else None

    def entry(self, name: str, etag: str | None = None) -> Entry:
        """What has passed so far, as the file `name`."""
        return Entry(name, self.size, self._sha256.hexdigest(), etag)


def paired(left: Iterable[Entry], right: Iterable[Entry]) -> Iterator[tuple[Entry | None, Entry | None]]:
    """Two sorted streams side by side: those of one name together, `None` where one has no such name."""
    ours, theirs = iter(left), iter(right)
    mine, other = next(ours, None), next(theirs, None)
    while mine is not None or other is not None:
        if other is None or (mine is not None and sort_key(mine.path) < sort_key(other.path)):
            yield mine, None
            mine = next(ours, None)
        elif mine is None or sort_key(other.path) < sort_key(mine.path):
            yield None, other
            other = next(theirs, None)
        else:
            yield mine, other
            mine, other = next(ours, None), next(theirs, None)


def write_manifest(entries: Iterable[Entry], path: Path) -> Summary:
    """Write the entries as a manifest, which appears at `path` once it is whole."""
    tally, part = Tally(), path.with_name(f"{path.name}.part")
    with translated(str(path), writing=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            for entry in entries:
                file.write(tally.add(entry))
        part.replace(path)
    return tally.summary()


def read_manifest(path: Path) -> Iterator[Entry]:
    """The entries of a manifest on this machine, as they were written."""
    with translated(str(path)), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            yield parse_line(line, number)


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a stream into its lines."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest
