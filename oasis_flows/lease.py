"""Who owns a run: a file that its process keeps locked.

The kernel lets go of the lock when the process dies, however it dies, so "the owner is dead" is a fact and no guess by
clocks or process numbers. The file's modification time says when the owner was last seen; it only decides how long
somebody may still come back (a retry, which re-attaches) before the reaper takes what is left.

Whoever removes what a run left has its lease locked meanwhile (`taken`), and deletes the file last. So a lock counts only
on the file that lies at the path: one that was deleted while somebody waited for it says nothing about its successor.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import RunInUse

# Others lock a lease for a moment to look at it, and a little longer to remove what lies beside it.
PATIENCE_SECONDS = 10.0


@contextmanager
def hold(path: Path, attempt: int = 1) -> Iterator[None]:
    """Keep the lease at `path` locked for the time of the block. The file stays behind; its folder's owner removes it.

    It says which attempt of the run the owner is; see `attempt_of`.

    A folder that is not there is made, for this user alone. A lease that is busy is waited for, `PATIENCE_SECONDS` long.

    Raises:
        RunInUse: somebody holds it.
    """
    descriptor = _lock_patiently(path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(attempt).encode(), 0)
        renew(path)
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                renew(path)
    finally:
        os.close(descriptor)


def renew(path: Path) -> None:
    """Note that the owner was seen now."""
    os.utime(path)


def attempt_of(path: Path) -> int:
    """Which attempt of the run the last owner was; 0 where nobody knows."""
    try:
        return int(path.read_bytes() or b"0")
    except (OSError, ValueError):
        return 0


@contextmanager
def taken(path: Path, grace_seconds: float, *, create: bool = False) -> Iterator[bool]:
    """Is the owner dead, and last seen at least `grace_seconds` ago? If so, nobody can own the run until the block ends.

    The answer is no where there is no lease, unless `create` makes one, and where this process may not look.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    except OSError:
        descriptor = -1
    if descriptor < 0:
        yield False
        return
    try:
        yield _has_lapsed(descriptor, path, grace_seconds)
    finally:
        os.close(descriptor)


def missing(path: Path) -> bool:
    """Is there certainly no lease? One that this process may not look at can be there."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _lock_patiently(path: Path) -> int:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return _lock(path)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise RunInUse(
                    f"Another process is working on the run of {path.parent}. Wait for it, or cancel it first."
                ) from None
        except (FileNotFoundError, FileExistsError):
            # Somebody removed the folder between two steps of this.
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.01)


def _lock(path: Path) -> int:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        current = os.path.samestat(os.fstat(descriptor), path.stat())
    except BaseException:
        os.close(descriptor)
        raise
    if current:
        return descriptor
    os.close(descriptor)
    raise FileNotFoundError(path)


def _has_lapsed(descriptor: int, path: Path, grace_seconds: float) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen = os.fstat(descriptor)
        return os.path.samestat(seen, path.stat()) and time.time() - seen.st_mtime >= grace_seconds
    except OSError:
        return False
