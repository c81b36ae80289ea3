"""What the batches of this machine have set aside for their containers, those that run and those that are about to.

    <home>/reservations.lock                locked by who counts what is free, and takes of it
    <home>/workspaces/<run id>/reservation  how much the containers of this run may take; it counts while the run's lease is held

Two batches that counted at the same time would both find the same room. So one counts after the other, and each writes down
what it takes before it starts anything. What a reservation covers is not counted again as a container.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import lease
from .capacity import Vector
from .workspace import Workspace, room_for

# One that is stopped while it counts must not stop all others.
PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.02


@contextmanager
def counting(home: Path) -> Iterator[None]:
    """Have nobody else count what is free on this machine until the block ends.

    Raises:
        StoreFull: the lock cannot be made.
    """
    path = home / "reservations.lock"
    with room_for(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def reserve(workspace: Workspace, amount: Vector) -> None:
    """Set so much aside for the run's containers, in the place of what was before.

    Raises:
        StoreFull: that cannot be written down.
    """
    new = workspace.reservation.with_suffix(".new")
    with room_for(workspace.reservation):
        new.write_text(json.dumps(amount))
        new.replace(workspace.reservation)


def release(workspace: Workspace) -> None:
    """Set nothing aside any more."""
    with suppress(OSError):
        workspace.reservation.unlink()


def reserved(workspaces: Path, without: str | None = None) -> dict[str, Vector]:
    """What the living runs have set aside, by their ids; the run `without` apart."""
    found = {}
    for path in sorted(workspaces.glob(f"*/{Workspace(workspaces).reservation.name}")):
        owner = Workspace(path.parent)
        if owner.run_id != without and _lives(owner):
            # It may be withdrawn at this moment.
            with suppress(OSError, ValueError, TypeError):
                found[owner.run_id] = Vector(*map(int, json.loads(path.read_text())))
    return found


def _lives(workspace: Workspace) -> bool:
    with lease.taken(workspace.lease, 0) as dead:
        return not (dead or lease.missing(workspace.lease))
