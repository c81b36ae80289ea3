"""What prerequisites have prepared and keep for the next run: a folder each, named by what made it.

    <home>/caches/<key>/          whole, and never changed any more
    <home>/caches/<key>.….new/    being made by whoever holds the lock; under a name of its own, for a container whose owner
                                  died may still write to another
    <home>/caches/<key>.lock      locked by who makes it, so that two runs at once make it once, and shared by those who use it;
                                  its time is that of the last use; removed with the folder

What nobody has used for long is removed by `reap`. A folder may be deleted whenever no container has it mounted, too; the next
run makes it anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from .prerequisites import Step
from .workspace import delete, room_for

_POLL_SECONDS = 0.2


def key(step: Step, image: str) -> str:
    """Names what the step's start callbacks leave at its path in this image (by digest)."""
    commands = [callback.commands for callback in step.callbacks if callback.event == "taskStarts"]
    return hashlib.sha256(json.dumps([commands, step.cache_path, image]).encode()).hexdigest()[:32]


@contextmanager
def held(root: Path, name: str, fill: Callable[[Path], bool], waiting: Callable[[], None]) -> Iterator[Path | None]:
    """The folder of this name, which stays for the time of the block, at least.

    Unless it is there, it is made by `fill`, which is given an empty one and says whether it succeeded; `None` where it did not.
    While another process makes it, it is waited for; `waiting` is called when that begins.

    Raises:
        StoreFull: the folder cannot be made.
    """
    kept, lock = root / name, root / f"{name}.lock"
    with room_for(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        with room_for(root):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with suppress(_Gone):
                there = _prepared(descriptor, lock, kept, fill, waiting)
                yield kept if there else None
                return
        finally:
            os.close(descriptor)


def reap(root: Path, keep_seconds: float) -> tuple[str, ...]:
    """Delete the folders that nobody has used for so long, and what was never finished; return their names.

    What a run uses is left alone, however long it has been at it.
    """
    return tuple(lock.stem for lock in sorted(root.glob("*.lock")) if _forgotten(lock, keep_seconds))


class _Gone(Exception):
    """The lock was removed while it was waited for: it says nothing about its successor."""


def _prepared(descriptor: int, lock: Path, kept: Path, fill: Callable[[Path], bool], waiting: Callable[[], None]) -> bool:
    """Have the folder there, unless it cannot be made, and the lock shared."""
    there = True
    _lock(descriptor, lock, fcntl.LOCK_SH, waiting)
    while there and not kept.is_dir():
        _lock(descriptor, lock, fcntl.LOCK_EX, waiting)
        there = kept.is_dir() or _made(kept, fill)
        # What has just been used is not reaped, though for a moment nobody has it locked.
        os.utime(descriptor)
        _lock(descriptor, lock, fcntl.LOCK_SH, waiting)
    os.utime(descriptor)
    return there


def _forgotten(lock: Path, keep_seconds: float) -> bool:
    kept = lock.with_suffix("")
    with suppress(OSError), lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen = os.fstat(file.fileno())
        if not os.path.samestat(seen, lock.stat()) or time.time() - seen.st_mtime < keep_seconds:
            return False
        for abandoned in lock.parent.glob(f"{kept.name}.*.new"):
            delete(abandoned)
        found = kept.is_dir()
        if found:
            # Whole or not there, even if this process dies half-way.
            going = kept.rename(kept.with_name(f"{kept.name}.{token_hex(4)}.new"))
            delete(going)
        lock.unlink()
        return found
    return False


def _made(kept: Path, fill: Callable[[Path], bool]) -> bool:
    for abandoned in kept.parent.glob(f"{kept.name}.*.new"):
        delete(abandoned)
    new = kept.with_name(f"{kept.name}.{token_hex(4)}.new")
    with room_for(new):
        new.mkdir()
        new.chmod(0o777)
    if not fill(new):
        delete(new)
        return False
    new.rename(kept)
    return True


def _lock(descriptor: int, lock: Path, how: int, waiting: Callable[[], None]) -> None:
    told = False
    while True:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), lock.stat()):
                raise _Gone
            return
        except FileNotFoundError:
            raise _Gone from None
        except BlockingIOError:
            if not told:
                waiting()
            told = True
        time.sleep(_POLL_SECONDS)
