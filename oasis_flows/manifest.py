"""The list of a dataset's files: one JSON line a file, sorted by the bytes of its name.

A manifest can be larger than memory, so it is never a list here: functions take and give iterators of `Entry`, and the
only state is what a check needs. The digest of a manifest is the SHA-256 of its lines as written to `manifest.jsonl`,
without the key `at`, so two datasets with equal digests hold the same names and bytes.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson

from .errors import DatasetError, UnsafeName

MAX_SEGMENT_BYTES = 255
MAX_NAME_BYTES = 4000
MAX_LEVELS = 255


class Entry(NamedTuple):
    """One file: its name relative to the dataset, its size, and its SHA-256 (hex) once the bytes have been read.

    `etag` is what an object store said when it was listed; it is never part of a published manifest. `at` is where the
    bytes are, relative to the dataset's folder, where that is not under its name: a batch's manifest points into its shards.
    A tuple is made in a quarter of the time of a frozen dataclass, and a large dataset has millions.
    """

    path: str
    bytes: int
    sha256: str | None = None
    etag: str | None = None
    at: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a manifest adds up to. `digest` is `None` when not every file's SHA-256 is known."""

    file_count: int
    size_bytes: int
    digest: str | None


def to_line(entry: Entry) -> bytes:
    """The entry as its line in a manifest, newline included."""
    path, size, sha256, etag, at = entry
    row: dict[str, str | int] = {"path": path, "bytes": size}
    if sha256 is not None:
        row["sha256"] = sha256
    if etag is not None:
        row["etag"] = etag
    if at is not None:
        row["at"] = at
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def parse_line(line: bytes, number: int = 0) -> Entry:
    """The entry that a line of a manifest describes.

    Raises:
        DatasetError: the line is not one of a manifest; the message names its number.
    """
    try:
        row = orjson.loads(line)
        path, size, sha256, etag, at = row["path"], row["bytes"], row.get("sha256"), None, None
        # Most lines have no more, and there are millions of them.
        if len(row) > 3 or sha256 is None:
            etag, at = row.get("etag"), row.get("at")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(f"Line {number} of the manifest is not one of a manifest: {line[:120]!r}.") from error
    if not (
        type(path) is str
        and type(size) is int
        and size >= 0
        and (sha256 is None or type(sha256) is str)
        and (etag is None or type(etag) is str)
        and (at is None or type(at) is str)
    ):
        raise DatasetError(f"Line {number} of the manifest has a value of the wrong type: {line[:120]!r}.")
    return Entry(path, size, sha256, etag, at)


def parse(lines: Iterable[bytes]) -> Iterator[Entry]:
    """The entries of a manifest, line by line; checked as `checked` does."""
    return checked(parse_line(line, number) for number, line in enumerate(lines, 1) if line and not line.isspace())


def sort_key(path: str) -> bytes:
    """The order of a manifest: by the UTF-8 bytes of the name, as object stores list."""
    return path.encode()


@dataclass(slots=True)
class Tally:
    """Adds a manifest up while its entries pass by."""

    file_count: int = 0
    size_bytes: int = 0
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    _complete: bool = True

    def add(self, entry: Entry) -> bytes:
        """Count the entry and return its line."""
        line = to_line(entry)
        self.file_count += 1
        self.size_bytes += entry.bytes
        # Where the bytes are is no part of what they are.
        self._digest.update(line if entry.at is None else to_line(entry._replace(at=None)))
        self._complete &= entry.sha256 is not None
        return line

    def summary(self) -> Summary:
        """What has passed by so far."""
        return Summary(
            file_count=self.file_count,
            size_bytes=self.size_bytes,
            digest=self._digest.hexdigest() if self._complete else None,
        )


def shown(path: str) -> str:
    """The name for a message: quoted, and cut after 60 characters."""
    return repr(path) if len(path) <= 60 else f"{path[:60]!r}…"


def _is_plain(path: str) -> bool:
    """Does a name need no closer look? Nearly all do not, and there are millions of them."""
    rooted = f"/{path}/"
    return path.isascii() and len(path) <= MAX_SEGMENT_BYTES and "/." not in rooted and "//" not in rooted and "\0" not in path


def check_name(path: str) -> None:
    """Return if the name can be carried to any store and any folder.

    Raises:
        UnsafeName: it could leave the folder, is not Unicode, or no file system could hold it.
    """
    if _is_plain(path):
        return
    try:
        segments = path.encode().split(b"/")
    except UnicodeEncodeError:
        raise UnsafeName(f"The file name {path!r} is not valid UTF-8. Rename it (convmv -f latin1 -t utf8 helps).") from None
    if b"\0" in path.encode():
        raise UnsafeName(f"The file name {path!r} holds a NUL character. Rename it.")
    if len(path.encode()) > MAX_NAME_BYTES or len(segments) > MAX_LEVELS:
        raise UnsafeName(
            f"The file name {shown(path)} has {len(path.encode())} bytes and {len(segments)} levels, and at most "
            f"{MAX_NAME_BYTES} bytes and {MAX_LEVELS} levels can be carried. Use shorter names and fewer folders."
        )
    for segment in segments:
        if segment in (b"", b".", b".."):
            why = {b"": "an empty part", b".": "the part '.'", b"..": "the part '..'"}[segment]
            raise UnsafeName(f"The file name {path!r} has {why}, and could leave the dataset's folder. Rename it.")
        if len(segment) > MAX_SEGMENT_BYTES:
            raise UnsafeName(
                f"The file name {path[:60]!r}… has a part of {len(segment)} bytes, and file systems hold {MAX_SEGMENT_BYTES}. Shorten it."
            )


def checked(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Pass sorted entries through, refusing what cannot be one folder of files.

    Memory: the names on the way down to the current one, and one hash for each name that is not plain ASCII.

    Raises:
        UnsafeName: see `check_name`; or two names are the same once normalised; or a name is a file and a folder.
        DatasetError: the entries are not sorted, or one comes twice.
    """
    ancestors: list[str] = []
    normalised: set[bytes] = set()
    previous: str | None = None
    for entry in entries:
        path, _, _, _, at = entry
        plain = _is_plain(path)
        if not plain:
            check_name(path)
        if at is not None:
            check_name(at)
        # Texts sort as their UTF-8 bytes do: see `sort_key`.
        if previous is not None and path <= previous:
            what = "comes twice" if path == previous else f"comes after {previous!r} and should come before it"
            raise DatasetError(f"The manifest's entry {path!r} {what}. A manifest is sorted and names each file once.")
        if previous is not None and path.startswith(previous):
            ancestors.append(previous)
        while ancestors and not path.startswith(ancestors[-1]):
            ancestors.pop()
        for ancestor in ancestors:
            if path[len(ancestor)] == "/":
                raise UnsafeName(f"{ancestor!r} is a file and also the folder of {path!r}. Rename one of them.")
        if not plain and not path.isascii():
            key = hashlib.blake2b(unicodedata.normalize("NFC", path).encode(), digest_size=16).digest()
            if key in normalised:
                raise UnsafeName(
                    f"{path!r} is the same name as another file's, written with other Unicode characters (NFC and NFD). Rename one of them."
                )
            normalised.add(key)
        previous = path
        yield entry
