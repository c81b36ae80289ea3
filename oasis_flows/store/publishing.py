"""Publishes what a run wrote: its files, its log and its record, and the manifest last, which makes it a dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError, UnsafeName
from ..manifest import Entry, Summary, check_name, checked
from .dataset import DATA, LOG, MANIFEST, MARKER, RECORD, Reading, paired, read_manifest, totals, write_manifest
from .folder import Folder, Found, chunks_of, opened, walk
from .transfer import Files, Location, Meter, Progress, files, in_order
from .verdicts import Missing

PROVISIONAL = json.dumps({MARKER: 1, "status": "Publishing"}).encode()


def publish(
    output: Path,
    location: Location,
    *,
    log: Path,
    record: Callable[[Summary], bytes],
    workspace: Path,
    commit: bool,
    skipped: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> Summary:
    """Publish the files of `output` under `location`, with the run's log and record; return what they add up to.

    With `commit` it is a dataset from the moment when this returns, and not before: a provisional `task.json`, which says
    so, is written first, and the manifest last. What cannot be carried is refused before anything is written. Without
    `commit` there is no manifest, so nobody takes it for a dataset, and what cannot be carried is left out: `skipped` is
    told, a sentence each.

    Calling it again replaces what an earlier call left there, whole or not. Links to files inside become files; empty
    folders are left out. The manifest stays on this machine too, as `workspace/output.jsonl`. Where the store is a
    folder of the same file system, files are linked and not copied.

    Args:
        record: Makes the content of `task.json`, a JSON object with the key `oasis_flows`.

    Raises:
        UnsafeName: with `commit`: a name, a link or a special file that cannot be carried.
        StoreDenied, StoreFull, StoreUnavailable: the store refuses, has no room, or does not answer.
    """
    meter = Meter(progress, *totals(_checked(output) if commit else _carriable(output)))
    store, manifest = files(location), workspace / "output.jsonl"
    store.delete([MANIFEST])
    fresh = _is_fresh(store)
    store.write(RECORD, [PROVISIONAL], len(PROVISIONAL), last=True)
    with _tidied(store):
        # What is asked of a server is asked only where somebody was before.
        if not fresh or location.is_local:
            _abandon(store)
        found = walk(output) if commit else _carriable(output, skipped)
        with closing(in_order(_PublishOne(store, output, meter, strict=commit), found, tick=meter.tick)) as entries:
            summary = write_manifest(_counted(entries, meter, skipped), manifest)
        if not fresh:
            store.delete(_left_over(store, manifest))
        _write_file(store, LOG, log)
        content = record(summary)
        store.write(RECORD, [content], len(content), last=True)
        if commit:
            _write_file(store, MANIFEST, manifest)
    meter.tick(last=True)
    return summary


@contextmanager
def _tidied(store: Files) -> Iterator[None]:
    """When the block is broken off, try for a moment to tidy up; what broke it off is raised in any case.

    When it comes to its end, too: a client that lost the answer sends the request again, and has begun two uploads.
    """
    try:
        yield
    except BaseException:
        with suppress(Exception):
            store.abandon(hurry=True)
        raise
    if store.in_parts:
        with suppress(DatasetError):
            store.abandon()


def _abandon(store: Files) -> None:
    """Tidy up where the store lets us; not every one knows how, and nothing depends on it."""
    try:
        store.abandon()
    except DatasetError as error:
        if error.transient:
            raise


def _checked(output: Path) -> Iterator[Entry]:
    """What there is, all of which can be carried."""
    return checked(Entry(found.name, found.bytes) for found in walk(output))


def _carriable(output: Path, skipped: Callable[[str], None] = lambda _: None) -> Iterator[Found]:
    for found in walk(output, skipped):
        try:
            check_name(found.name)
        except UnsafeName as error:
            skipped(str(error))
        else:
            yield found


def _counted(entries: Iterable[Entry | UnsafeName], meter: Meter, skipped: Callable[[str], None]) -> Iterator[Entry]:
    for entry in entries:
        if isinstance(entry, UnsafeName):
            skipped(str(entry))
        else:
            meter.file_done()
            yield entry


def _is_fresh(store: Files) -> bool:
    """Did nobody ever publish here? An attempt that had begun left its record, before its first file.

    Whether there are files does not tell: in an object store the last requests of a process that died may still be on their way.
    """
    with suppress(Missing):
        store.size(RECORD)
        return False
    with suppress(Missing):
        return next(iter(store.list(DATA)), None) is None
    return True


def _left_over(store: Files, manifest: Path) -> Iterator[str]:
    """What an earlier attempt published and this one did not."""
    try:
        for mine, theirs in paired(store.list(DATA), read_manifest(manifest)):
            if mine is not None and theirs is None:
                yield DATA + mine.path
    except Missing:
        return


def _write_file(store: Files, name: str, path: Path) -> None:
    with opened(path.parent, path.name) as descriptor:
        size = os.fstat(descriptor).st_size
        store.write(name, chunks_of(descriptor, str(path)), size, last=True)


@dataclass(frozen=True, slots=True)
class _PublishOne:
    """Publishes single files; called by many threads."""

    store: Files
    output: Path
    meter: Meter
    strict: bool

    def __call__(self, found: Found) -> Entry | UnsafeName:
        """The file's entry, once it is there; why this store cannot hold its name, unless that is raised (`strict`)."""
        try:
            return self._publish(found)
        except UnsafeName as error:
            if self.strict:
                raise
            return error

    def _publish(self, found: Found) -> Entry:
        """Read the file once, for its hash and on its way."""
        name, reading = DATA + found.name, Reading(self.meter)
        with opened(self.output, found.real) as descriptor:
            chunks = reading.through(chunks_of(descriptor, f"{self.output}/{found.name}"))
            if isinstance(self.store, Folder) and self.store.link(name, descriptor):
                for _ in chunks:
                    pass
            else:
                self.store.write(name, chunks, found.bytes)
        return reading.entry(found.name)
