"""What prerequisites have prepared and keep for the next run: a folder each, named by what made it.

    <home>/caches/<key>/          whole, and never changed any more
    <home>/caches/<key>.….new/    being made by whoever holds the lock; under a name of its own, for a container whose owner
                                  died may still write to another
    <home>/caches/<key>.lock      locked meanwhile, so that two runs at once make it once

A folder may be deleted whenever no container has it mounted; the next run makes it anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex

from .prerequisites import Step
from .workspace import delete, room_for

_POLL_SECONDS = 0.2


def key(step: Step, image: str) -> str:
    """Names what the step's start callbacks leave at its path in this image (by digest)."""
    commands = [callback.commands for callback in step.callbacks if callback.event == "taskStarts"]
    return hashlib.sha256(json.dumps([commands, step.cache_path, image]).encode()).hexdigest()[:32]


def ensure(root: Path, name: str, fill: Callable[[Path], bool], waiting: Callable[[], None]) -> Path | None:
    """The folder of this name, made by `fill` (which is given an empty one, and says whether it succeeded) unless it is there.

    While another process makes it, it is waited for; `waiting` is called once then. `None` where `fill` failed.

    Raises:
        StoreFull: the folder cannot be made.
    """
    kept, new = root / name, root / f"{name}.{token_hex(4)}.new"
    if kept.is_dir():
        return kept
    with room_for(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(root / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(descriptor, waiting)
        if kept.is_dir():
            return kept
        for abandoned in root.glob(f"{name}.*.new"):
            delete(abandoned)
        with room_for(new):
            new.mkdir()
            new.chmod(0o777)
        if not fill(new):
            delete(new)
            return None
        new.rename(kept)
        return kept
    finally:
        os.close(descriptor)


def _lock(descriptor: int, waiting: Callable[[], None]) -> None:
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not told:
                waiting()
            told = True
        time.sleep(_POLL_SECONDS)
