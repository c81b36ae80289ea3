"""What a machine decides, not a run: read from the environment, in one place.

`OASIS_FLOWS_ENGINE`        which engine runs containers; the work pool sets it ("docker")
`OASIS_FLOWS_DOCKER_HOST`   name of a `docker-host` document with the engine's address, instead of the usual sockets
`OASIS_FLOWS_HOME`          folder of workspaces and of datasets published without a store ("~/.oasis-flows"); the engine
                            must see it under the same path
`OASIS_FLOWS_STOP_GRACE`    seconds between SIGTERM and SIGKILL for a container that has to end (10)
`OASIS_FLOWS_RETRY_WINDOW`  seconds that the container of a run whose process died waits for a retry to take it up (60)
`OASIS_FLOWS_HEADROOM`      the part of a machine's processors and memory that batches may fill (0.8)
`OASIS_FLOWS_CAPACITY`      file with a snapshot of the machines that batches run on, in place of the engine's own answer
`OASIS_FLOWS_KEEP_HOURS`    how long the workspace of a run that may be retried is kept (24)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .errors import DescriptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of this machine."""

    engine: str
    docker_host: str | None
    home: Path
    stop_grace_seconds: float
    retry_window_seconds: float
    keep_seconds: float
    headroom: float
    capacity: Path | None

    @property
    def workspaces(self) -> Path:
        """Where runs have their folders."""
        return self.home / "workspaces"

    @property
    def datasets(self) -> Path:
        """The store of those who named none."""
        return self.home / "datasets"


def current() -> Settings:
    """The settings as the environment has them now.

    Raises:
        DescriptionError: a number is none.
    """
    env = os.environ.get
    return Settings(
        engine=env("OASIS_FLOWS_ENGINE") or "docker",
        docker_host=env("OASIS_FLOWS_DOCKER_HOST") or None,
        home=Path(env("OASIS_FLOWS_HOME") or "~/.oasis-flows").expanduser().absolute(),
        stop_grace_seconds=_seconds("OASIS_FLOWS_STOP_GRACE", "10"),
        retry_window_seconds=_seconds("OASIS_FLOWS_RETRY_WINDOW", "60"),
        keep_seconds=3600 * _seconds("OASIS_FLOWS_KEEP_HOURS", "24"),
        headroom=_part("OASIS_FLOWS_HEADROOM", "0.8"),
        capacity=Path(env("OASIS_FLOWS_CAPACITY") or "").expanduser() if env("OASIS_FLOWS_CAPACITY") else None,
    )


def _seconds(name: str, default: str) -> float:
    text = os.environ.get(name) or default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise DescriptionError(f"The setting {name} is {text!r} and must be a number that is not negative, such as {default}.")
    return value


def _part(name: str, default: str) -> float:
    value = _seconds(name, default)
    if not 0 < value <= 1:
        raise DescriptionError(f"The setting {name} is {value:g} and must be more than 0 and at most 1, such as {default}.")
    return value
