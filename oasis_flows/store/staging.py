"""Brings a dataset to this machine, verified: in place when it is here already, else fetched and resumed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from io import BufferedWriter
from itertools import count
from pathlib import Path

from ..errors import ChecksumMismatch, DatasetChanged, DatasetError, StoreFull
from ..job import human_bytes
from ..manifest import Entry, Summary, checked
from .dataset import (
    Published,
    Reading,
    hashed,
    listed,
    paired,
    published,
    read_manifest,
    require_folder,
    totals,
    write_manifest,
)
from .folder import Folder, chunks_of, opened, walk
from .journal import Journal
from .transfer import Files, Location, Meter, Progress, checkpoint, files, in_order, translated
from .verdicts import Missing

DOWNLOAD = ".oasis-flows-download"
HELD_BYTES = 64 << 10


def stage(location: Location, workspace: Path, *, progress: Progress | None = None) -> tuple[Path, Summary]:
    """Bring a dataset to this machine; return the folder that holds exactly its files, and what they add up to.

    A local dataset is not copied: the folder is its own (that of a batch, which lies in parts, has links to them), and every
    file has been read and hashed. Any other is fetched into `workspace/input`, many files at a time, hashed as they move. A published dataset's files are compared with its
    manifest, other objects with their MD5 where the store tells it. The complete manifest is written last, to
    `workspace/input.jsonl`. When a call failed, the next one fetches only what is missing or has changed since.

    Raises:
        DatasetNotFound: there is nothing, or a run that never finished.
        DatasetError: it holds no files; or others than its manifest says.
        UnsafeName: a name, a link or a special file that cannot be carried.
        ChecksumMismatch: the bytes are not those of the manifest, also when fetched again.
        StoreFull: this machine's disk has too little room.
        StoreDenied, StoreUnavailable: the store refuses, or does not answer.
    """
    known, manifest = published(location), workspace / "input.jsonl"
    if location.is_local and not (known and known.in_parts):
        root = Path((known.base if known else location).path).expanduser().absolute()
        return root, _in_place(root, known, manifest, progress)
    into = workspace / "input"
    return into, _Fetch(*_source(location, known), into, workspace / "fetch", progress, link=True).run(manifest)


def stage_files(
    base: Location, entries: Callable[[], Iterable[Entry]], workspace: Path, *, progress: Progress | None = None
) -> tuple[Path, Summary]:
    """Bring some files of the folder `base` into `workspace/input`, as `stage` would all of them; return that folder.

    Files of a local folder are linked there, or copied where they cannot be. Raises as `stage`.
    """
    into = workspace / "input"
    return into, _Fetch(base, entries, into, workspace / "fetch", progress, link=True).run(workspace / "input.jsonl")


def fetch_to(location: Location, directory: Path, *, progress: Progress | None = None) -> Summary:
    """Copy a dataset's files into a folder of the user's, verified as by `stage`.

    The folder must be empty, or hold what an earlier call left unfinished, which is then resumed.

    Raises:
        DatasetError: the folder is not empty; and as `stage` does.
    """
    work = directory / DOWNLOAD
    with translated(str(directory), writing=True):
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()) and not work.exists():
            raise DatasetError(f"The folder {directory} is not empty. Give a new or an empty one.")
        work.mkdir(exist_ok=True)
    summary = _Fetch(*_source(location, published(location)), directory, work, progress).run(work / "manifest.jsonl")
    shutil.rmtree(work)
    return summary


def _source(location: Location, known: Published | None) -> tuple[Location, Callable[[], Iterable[Entry]]]:
    """The folder that a dataset's files are in, and what lists them."""
    return (known.base, known.entries) if known else (location, partial(listed, location))


def _in_place(root: Path, known: Published | None, manifest: Path, progress: Progress | None) -> Summary:
    if known is None:
        require_folder(root)
    meter = Meter(progress, *totals(walk(root))) if progress and root.exists() else Meter(None)
    entries = checked(hashed(root, meter)) if root.exists() else iter(())
    if known is not None:
        entries = _compared(entries, known.entries(), root)
    summary = write_manifest(entries, manifest)
    meter.tick(last=True)
    _require_files(summary, str(root))
    return summary


def _compared(found: Iterable[Entry], promised: Iterable[Entry], root: Path) -> Iterator[Entry]:
    for mine, theirs in paired(found, promised):
        if theirs is None:
            raise DatasetError(
                f"{root} holds {mine and mine.path!r}, which is not in the manifest. Remove it, or publish again."
            )
        if mine is None:
            raise DatasetError(f"{root} lacks {theirs.path!r}, which is in the manifest. Put it back, or publish again.")
        if (mine.bytes, mine.sha256) != (theirs.bytes, theirs.sha256):
            raise _mismatch(str(root), theirs, mine)
        yield mine


def _mismatch(where: str, wanted: Entry, found: Entry) -> DatasetError:
    if wanted.sha256 is None:
        return DatasetChanged(
            f"{wanted.path!r} in {where} is not what was listed: {wanted.bytes} bytes then, {found.bytes} now. Run it again once nobody writes there."
        )
    return ChecksumMismatch(
        f"{wanted.path!r} in {where} is not what was published. Wanted: {wanted.bytes} bytes, {wanted.sha256}; "
        f"found: {'more' if found.bytes > wanted.bytes else f'{found.bytes} bytes, {found.sha256}'}. "
        "Restore it, or publish the dataset again."
    )


def _require_files(summary: Summary, where: str) -> None:
    if not summary.file_count:
        raise DatasetError(f"The dataset at {where} holds no files. Put files there, or give another address.")


@dataclass(slots=True)
class _Fetch:
    """Files of a folder on their way into another; `work` holds what resuming needs.

    With `link`, files that are on the same file system are not copied. Then nobody may write to those in the new folder.
    """

    location: Location
    entries: Callable[[], Iterable[Entry]]
    into: Path
    work: Path
    progress: Progress | None
    link: bool = False

    def run(self, manifest: Path) -> Summary:
        """Fetch what is missing, and write the manifest."""
        listing, journal, parts = self.work / "listing.jsonl", Journal(self.work / "journal.jsonl"), self.work / "parts"
        total = write_manifest(checked(self.entries()), listing)
        _require_files(total, self.location.url)
        self._prepare(listing, parts)
        # What is replaced may be another of the same size when this ends before it is noted.
        journal.keep(self._held(listing, journal))
        if not (self.link and self.location.is_local):
            self._require_room(total.size_bytes - sum(entry.bytes for entry in journal.entries()))
        meter = Meter(self.progress, total.file_count, total.size_bytes)
        one = _FetchOne(files(self.location), str(self.into), str(parts), meter, self.link)
        todo = ((wanted, had) for wanted, had in paired(read_manifest(listing), journal.entries()) if wanted is not None)
        with journal.appending() as note, closing(in_order(one, todo, tick=meter.tick)) as fetched:
            summary = write_manifest(_noted(fetched, note, meter), manifest)
        meter.tick(last=True)
        shutil.rmtree(parts)
        return summary

    def _prepare(self, listing: Path, parts: Path) -> None:
        """Make the folders, and remove what does not belong to the dataset (any more)."""
        with translated(str(self.into), writing=True):
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir(parents=True)
            self.into.mkdir(parents=True, exist_ok=True)
        here = (Entry(found.name, found.bytes) for found in walk(self.into) if not found.name.startswith(f"{DOWNLOAD}/"))
        extra = (mine.path for mine, theirs in paired(here, read_manifest(listing)) if mine is not None and theirs is None)
        Folder(Location(str(self.into))).delete(extra)

    def _require_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.into).free
        if needed > free:
            raise StoreFull(
                f"The disk of {self.into} has too little room for {self.location.url}. It needs {human_bytes(needed)} more "
                f"and has {human_bytes(free)} free. Free some space, or put the workspace on another disk."
            )

    def _held(self, listing: Path, journal: Journal) -> Iterator[Entry]:
        """What is here already of what is wanted."""
        for wanted, had in paired(read_manifest(listing), journal.entries()):
            if wanted is not None and had is not None and self._holds(wanted, had):
                yield had

    def _holds(self, wanted: Entry, had: Entry) -> bool:
        version = had.sha256 == wanted.sha256 if wanted.sha256 else bool(wanted.etag) and had.etag == wanted.etag
        try:
            return version and had.bytes == wanted.bytes == (self.into / wanted.path).lstat().st_size
        except OSError:
            return False


def _noted(fetched: Iterable[tuple[Entry, bool]], note: Callable[[Entry], None], meter: Meter) -> Iterator[Entry]:
    for entry, is_new in fetched:
        if is_new:
            note(entry)
        else:
            meter.add(entry.bytes)
        meter.file_done()
        yield entry._replace(etag=None, at=None)


@dataclass(frozen=True, slots=True)
class _FetchOne:
    """Fetches single files; called by many threads."""

    store: Files
    # Strings: with path objects, fetching small files is a few per cent slower.
    into: str
    parts: str
    meter: Meter
    link: bool

    def __call__(self, item: tuple[Entry, Entry | None]) -> tuple[Entry, bool]:
        """Return the file's entry, and whether it had to be fetched."""
        wanted, had = item
        if had is not None:
            return had, False
        try:
            return self._fetch(wanted), True
        except Missing as error:
            raise DatasetChanged(
                f"{wanted.path!r} was listed and is gone. Run it again once nobody writes there. {error}"
            ) from error

    def _fetch(self, wanted: Entry) -> Entry:
        if (
            self.link
            and isinstance(self.store, Folder)
            and self.store.link_to(Path(self.into, wanted.path), wanted.at or wanted.path, etag=wanted.etag)
        ):
            return self._read_linked(wanted)
        first, right = self._copy(wanted)
        if right:
            return first
        second, right = self._copy(wanted, accept=None if wanted.sha256 else first)
        if not right:
            raise _mismatch("the store", wanted, second)
        return second

    def _read_linked(self, wanted: Entry) -> Entry:
        reading = Reading(self.meter)
        with opened(Path(self.into), wanted.path) as descriptor:
            for _ in reading.through(chunks_of(descriptor, f"{self.into}/{wanted.path}")):
                pass
        got = reading.entry(wanted.path)
        if got.bytes != wanted.bytes or wanted.sha256 not in (None, got.sha256):
            raise _mismatch("the store", wanted, got)
        return got

    def _copy(self, wanted: Entry, accept: Entry | None = None) -> tuple[Entry, bool]:
        """Copy the file; it takes its place if it is right: as promised, or the same as `accept`."""
        promised_md5 = wanted.etag if wanted.sha256 is None and re.fullmatch("[0-9a-f]{32}", wanted.etag or "") else None
        reading, target = Reading(self.meter, md5=promised_md5 is not None), f"{self.into}/{wanted.path}"
        draft = _Draft(f"{self.parts}/{_PROCESS}-{next(_numbers)}")
        with translated(target, writing=True):
            try:
                has_digest = bool(wanted.sha256 or wanted.etag)
                chunks = self.store.read(wanted.at or wanted.path, etag=wanted.etag, has_digest=has_digest)
                for chunk in reading.through(chunks):
                    checkpoint()
                    if wanted.sha256 and reading.size > wanted.bytes:
                        break
                    draft.write(chunk)
                got = reading.entry(wanted.path, wanted.etag)
                right = got.bytes == wanted.bytes and reading.md5 == promised_md5 and wanted.sha256 in (None, got.sha256)
                right = right or (accept is not None and got == accept)
                if right:
                    checkpoint()
                    draft.take_place(target)
            finally:
                draft.discard()
        return got, right


_PROCESS, _numbers = secrets.token_hex(4), count()


class _Draft:
    """What has come of a file and has not been judged yet: the first piece in memory if it is small, else all in `part`.

    A rename takes a tenth of the time that a small file takes to fetch.
    """

    __slots__ = ("_file", "_held", "_part")

    def __init__(self, part: str) -> None:
        self._part, self._held = part, b""
        self._file: BufferedWriter | None = None

    def write(self, chunk: bytes) -> None:
        if self._file is None:
            if not self._held and len(chunk) <= HELD_BYTES:
                self._held = chunk
                return
            self._file = open(self._part, "xb")  # noqa: PTH123, SIM115
            self._file.write(self._held)
        self._file.write(chunk)

    def take_place(self, target: str) -> None:
        """Become the file `target`, whatever is there; its folder is made with its first file."""
        if self._file is None:
            self._create(target)
            return
        self._file.close()
        try:
            os.replace(self._part, target)  # noqa: PTH105
        except FileNotFoundError:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            Path(self._part).replace(target)
        self._file = None

    def _create(self, target: str) -> None:
        try:
            file = open(target, "xb")  # noqa: PTH123, SIM115
        except FileNotFoundError:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            file = open(target, "xb")  # noqa: PTH123, SIM115
        except FileExistsError:
            # It may be a link to a file of somebody's, which must not be written to.
            Path(target).unlink()
            file = open(target, "xb")  # noqa: PTH123, SIM115
        try:
            with file:
                file.write(self._held)
        except BaseException:
            Path(target).unlink()
            raise

    def discard(self) -> None:
        """Leave nothing, unless it has taken its place."""
        if self._file is not None:
            try:
                self._file.close()
            finally:
                Path(self._part).unlink(missing_ok=True)
