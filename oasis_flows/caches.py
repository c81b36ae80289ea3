"""What prerequisites have prepared and keep for the next run: a folder each, named by what made it.

    <home>/caches/<key>/          whole, and never changed any more
    <home>/caches/<key>.….new/    being made by whoever holds the lock; under a name of its own, for a container whose owner
                                  died may still write to another
    <home>/caches/<key>.lock      locked by who makes it, so that two runs at once make it once, and shared by those who use it;
                                  its time is that of the last use

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
    kept = root / name
    with room_for(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(root / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        there = True
        _lock(descriptor, fcntl.LOCK_SH, waiting)
        while there and not kept.is_dir():
            _lock(descriptor, fcntl.LOCK_EX, waiting)
            there = kept.is_dir() or _made(kept, fill)
            # What has just been used is not reaped, though for a moment nobody has it locked.
            os.utime(descriptor)
            _lock(descriptor, fcntl.LOCK_SH, waiting)
        os.utime(descriptor)
        yield kept if there else None
    finally:
        os.close(descriptor)


def reap(root: Path, keep_seconds: float) -> tuple[str, ...]:
    """Delete the folders that nobody has used for so long, and what was never finished; return their names.

    What a run uses is left alone, however long it has been at it.
    """
    return tuple(lock.stem for lock in sorted(root.glob("*.lock")) if _forgotten(lock, keep_seconds))


def _forgotten(lock: Path, keep_seconds: float) -> bool:
    kept = lock.with_suffix("")
    with suppress(OSError), lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.time() - os.fstat(file.fileno()).st_mtime < keep_seconds:
            return False
        for abandoned in lock.parent.glob(f"{kept.name}.*.new"):
            delete(abandoned)
        if kept.is_dir():
            # Whole or not there, even if this process dies half-way.
            going = kept.rename(kept.with_name(f"{kept.name}.{token_hex(4)}.new"))
            delete(going)
            return True
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


def _lock(descriptor: int, how: int, waiting: Callable[[], None]) -> None:
    told = False
    while True:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not told:
                waiting()
            told = True
        time.sleep(_POLL_SECONDS)
