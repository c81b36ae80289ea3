"""The dataset verbs: everything that the rest of the package asks of a store.

`published` and `scan` look, `stage` and `fetch_to` bring here, `publish` brings there, `check_writable` tries it first,
`abandon` forgets what a dead `publish` was at, `read_file` reads a log or a record, `read_manifest` the list of what was published. For datasets in parts: `write_listing`,
`save_listing` and `read_slice` keep a long list, `stage_files` brings some files of it, `merge` and `commit` make one dataset of
published parts, `Notes` are small files beside it. All of them take a `Location` and raise this package's errors only. Each stops at
once when an exception reaches the calling thread, and none of its threads is alive when it returns.
"""

from __future__ import annotations

from collections.abc import Iterator

from .dataset import DATA, LOG, MANIFEST, RECORD, Published, published, read_manifest, read_record, scan
from .folder import Folder
from .listing import Listing, changes, read_slice, save_listing, write_listing
from .merging import begin, commit, merge, rewrite_record
from .notes import Notes
from .publishing import publish
from .staging import fetch_to, stage, stage_files
from .transfer import TRIED, Location, Progress, files

__all__ = [
    "DATA",
    "LOG",
    "MANIFEST",
    "RECORD",
    "Listing",
    "Location",
    "Notes",
    "Progress",
    "Published",
    "abandon",
    "begin",
    "changes",
    "check_writable",
    "commit",
    "fetch_to",
    "merge",
    "publish",
    "published",
    "read_file",
    "read_manifest",
    "read_record",
    "read_slice",
    "rewrite_record",
    "save_listing",
    "scan",
    "stage",
    "stage_files",
    "write_listing",
]


def check_writable(location: Location) -> None:
    """Return if files can be written and deleted there: it is tried. Folders that are missing on the way are made.

    A local folder is tried with a file that has no name. Elsewhere the file has the same name every time: what stays of it where
    somebody is killed meanwhile, or where a store carries out a write behind its deletion, is taken by the next try.

    Raises:
        StoreDenied: wrong credentials, a read-only store, or no right to write.
        DatasetError: the bucket does not exist.
        StoreFull, StoreUnavailable: it has no room, or does not answer.
    """
    store = files(location)
    if isinstance(store, Folder):
        store.check_writable()
        return
    store.write(TRIED, [b"May this be written?\n"], 21)
    store.delete([TRIED])


def abandon(location: Location) -> None:
    """Abort the uploads of a `publish` that died there, and remove files that it was writing: it is tried for a second.

    The next `publish` to the same place does it, too.

    Raises:
        StoreDenied, StoreUnavailable: the store does not let us, or does not answer.
    """
    files(location).abandon(hurry=True)


def read_file(location: Location, name: str, *, start: int = 0, tail: int | None = None) -> Iterator[bytes]:
    """The bytes of a file beside the data (`LOG`, `RECORD`) from `start` on; with `tail`, only the last so many.

    Raises:
        DatasetNotFound: there is no such file.
    """
    store = files(location)
    if start or tail is not None:
        size = store.size(name)
        start = max(start, 0 if tail is None else size - tail)
        if start >= size:
            return
    yield from store.read(name, start=start)
