"""Who owns a run: a file that its process keeps locked.

The kernel lets go of the lock when the process dies, however it dies, so "the owner is dead" is a fact and no guess by
clocks or process numbers. The file's modification time says when the owner was last seen; it only decides how long
somebody may still come back (a retry, which re-attaches) before the reaper takes what is left.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import RunInUse


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Keep the lease at `path` locked for the time of the block. The file stays behind; its folder's owner removes it.

    Raises:
        RunInUse: somebody holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunInUse(
                f"Another process is working on the run of {path.parent}. Wait for it, or cancel it first."
            ) from None
        renew(path)
        yield
    finally:
        os.close(descriptor)


def renew(path: Path) -> None:
    """Note that the owner was seen now."""
    os.utime(path)


def lapsed(path: Path, grace_seconds: float) -> bool:
    """Is the owner dead, and last seen more than `grace_seconds` ago? A lease that is gone has lapsed."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return time.time() - os.fstat(descriptor).st_mtime >= grace_seconds
    finally:
        os.close(descriptor)
