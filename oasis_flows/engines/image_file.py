"""Files with images, wherever fsspec finds them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import InvalidImageFile, StoreDenied, StoreFull, StoreUnavailable

_VERSIONS = ("ETag", "etag", "mtime", "ino", "created", "LastModified", "last_modified", "updated", "md5Hash", "generation")


def label_of(location: str) -> str:
    """What messages call the file; no password of its URL is in it."""
    return f"The image file {re.sub(r'//[^/@]*@', '//', location)}"


def find_file(location: str, options: dict[str, Any], label: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(location, **options)
    except (ValueError, ImportError) as error:
        raise InvalidImageFile(f"{label} has an address that nothing here can read. The cause: {error}") from error
    return filesystem, str(path)


def fingerprint(filesystem: Any, path: str, label: str) -> str:
    """A tag for this version of the file; empty when its store does not say when it changed."""
    with _reading(label):
        info = filesystem.info(path)
    if info.get("type") == "directory":
        raise InvalidImageFile(f"{label} is a folder. Give the archive: `docker save NAME:TAG -o FILE`.")
    version = {key: str(info[key]) for key in _VERSIONS if info.get(key) is not None}
    if not version:
        return ""
    said = repr((type(filesystem).__name__, path, info.get("size"), sorted(version.items())))
    return hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()[:40]


@contextmanager
def opened(filesystem: Any, path: str, spool: Path, label: str) -> Iterator[IO[bytes]]:
    """The file, to be read and sought in. A remote one crosses the network once, into an unnamed file in `spool`."""
    from fsspec.implementations.local import LocalFileSystem

    with contextlib.ExitStack() as stack:
        if isinstance(filesystem, LocalFileSystem):
            with _reading(label):
                local = stack.enter_context(Path(path).open("rb"))
            yield local
            return
        spool.mkdir(parents=True, exist_ok=True)
        # It has no name, so it is gone with the process, however that ends.
        spooled = stack.enter_context(tempfile.TemporaryFile(dir=spool))
        with _reading(label), filesystem.open(path, "rb") as remote:
            shutil.copyfileobj(remote, spooled, 1 << 20)
        yield spooled


@contextmanager
def _reading(label: str) -> Iterator[None]:
    """Translate what a file system says; every fsspec implementation has exceptions of its own."""
    try:
        yield
    except FileNotFoundError as error:
        raise InvalidImageFile(f"{label} does not exist. Check the path; the worker must be able to see it.") from error
    except PermissionError as error:
        raise StoreDenied(f"{label} may not be read. Check the rights or the credentials. The cause: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(f"{label} does not fit into the spool folder. Free some space there. The cause: {error}") from error
        raise StoreUnavailable(f"{label} could not be read. Try again later. The cause: {error}") from error
    except Exception as error:
        raise StoreUnavailable(f"{label} could not be read. Try again later. The cause: {error!r}") from error
