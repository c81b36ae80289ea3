"""Files at any URL that fsspec knows and that is neither local nor S3, `memory://` for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

import fsspec

from ..errors import DatasetError
from ..manifest import Entry, sort_key
from .transfer import CHUNK_BYTES, Chunk, Location, checkpoint, translated


class Anywhere:
    """The files under a URL, through fsspec. A listing is held in memory: fsspec has no other."""

    in_parts = False

    def __init__(self, location: Location) -> None:
        self._url = location.url.rstrip("/")
        with translated(self._url):
            try:
                self._system, root = fsspec.core.url_to_fs(location.url)
            except ValueError as error:
                raise DatasetError(
                    f"{self._url} cannot be opened. {error}. Use s3://, a local path, or a URL that fsspec knows."
                ) from error
        self._root = str(root).rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def list(self, folder: str = "") -> Iterator[Entry]:
        """See `Files.list`."""
        top = self._path(folder).rstrip("/")
        with translated(f"{self._url}/{folder}"):
            if self._system.isfile(top):
                raise DatasetError(f"{self._url}/{folder} is a file. A dataset is a folder: give the folder that it is in.")
            found = self._system.find(top, detail=True)
        for path, facts in sorted(found.items(), key=lambda item: sort_key(item[0])):
            yield Entry(path[len(top) + 1 :], int(facts["size"] or 0), etag=facts.get("ETag"))

    def read(self, name: str, *, start: int = 0, etag: str | None = None, has_digest: bool = False) -> Iterator[bytes]:  # noqa: ARG002
        """See `Files.read`; without the resuming, which is the driver's."""
        with translated(f"{self._url}/{name}"):
            self._require_file(self._path(name))
            with self._system.open(self._path(name), "rb") as file:
                file.seek(start)
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk

    def _require_file(self, path: str) -> None:
        # Below a file, or for a folder, drivers differ in what they raise.
        if not self._system.isfile(path):
            raise FileNotFoundError(path)

    def write(self, name: str, chunks: Iterable[Chunk], size: int, *, last: bool = False) -> None:  # noqa: ARG002
        """See `Files.write`."""
        path = self._path(name)
        with translated(f"{self._url}/{name}", writing=True):
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            try:
                with self._system.open(path, "wb") as file:
                    for chunk in chunks:
                        checkpoint()
                        file.write(chunk)
            except BaseException:
                self._system.rm_file(path)
                raise

    def size(self, name: str) -> int:
        """See `Files.size`."""
        with translated(f"{self._url}/{name}"):
            self._require_file(self._path(name))
            return int(self._system.info(self._path(name))["size"] or 0)

    def delete(self, names: Iterable[str]) -> None:
        """See `Files.delete`."""
        with translated(self._url, writing=True):
            for name in names:
                # Another run may try the same place at the same moment.
                with suppress(FileNotFoundError):
                    if self._system.exists(self._path(name)):
                        self._system.rm_file(self._path(name))

    def abandon(self, *, hurry: bool = False) -> None:
        """See `Files.abandon`: fsspec's drivers keep no account of it."""
