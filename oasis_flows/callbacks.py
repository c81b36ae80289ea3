"""What became of the callbacks around an algorithm, read from the folder in which its wrapper took notes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import wrapper
from .job import ContainerExit, Reason
from .prerequisites import Resolution
from .verdict import FailedPrerequisite


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A list of commands that was begun. `exit_code` is `None` where it was killed; `command` is the last that was begun."""

    prerequisite: str
    event: str
    seconds: float | None
    exit_code: int | None
    command: str
    ignored: bool


@dataclass(frozen=True, slots=True)
class Notes:
    """All that was noted. `algorithm` is its own exit code where it ended before the callbacks did; `refused` tells why it
    could not start.
    """

    ran: tuple[Ran, ...] = ()
    algorithm: int | None = None
    refused: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The notes as JSON values; `from_json` reads them back."""
        return {**asdict(self), "ran": [asdict(each) for each in self.ran]}

    @classmethod
    def from_json(cls, values: dict[str, Any] | None) -> Notes:
        """The notes that `to_json` wrote; none where nobody wrote any."""
        return (
            cls()
            if values is None
            else cls(tuple(Ran(**each) for each in values["ran"]), values["algorithm"], values["refused"])
        )

    def without_marks(self, lines: Iterable[str]) -> list[str]:
        """The lines that no wrapper said, where there was one."""
        return [line for line in lines if not self.ran or not line.startswith(wrapper.MARK)]

    @property
    def failed(self) -> FailedPrerequisite | None:
        """What kept the algorithm from starting; or else the first end callback that did not succeed."""
        bad = [ran for ran in self.ran if ran.exit_code != 0 and not ran.ignored]
        bad.sort(key=lambda ran: ran.event != "taskStarts")
        if not bad:
            return None
        return FailedPrerequisite(bad[0].prerequisite, bad[0].event, bad[0].command, bad[0].exit_code)


def read(folder: Path, resolution: Resolution) -> Notes:
    """What the wrapper of these callbacks noted in the folder; as much of it as can be read.

    The algorithm can write there, too: what it forges is about itself.
    """
    ran = []
    for number, (step, callback) in enumerate(resolution.callbacks):
        began, ended = _time(folder / f"{number}.began"), _time(folder / f"{number}.ended")
        if began is None:
            continue
        at = _number(folder / f"{number}.at") or 1
        failed = _number(folder / f"{number}.failed")
        ran.append(
            Ran(
                prerequisite=step.item.name,
                event=callback.event,
                seconds=None if ended is None else round(max(0.0, ended - began), 3),
                exit_code=None if ended is None else failed or 0,
                command=callback.commands[min(max(at, 1), len(callback.commands)) - 1],
                ignored=step.item.ignores_failure,
            )
        )
    return Notes(tuple(ran), _number(folder / wrapper.ALGORITHM), _number(folder / wrapper.REFUSED))


def corrected(exit: ContainerExit, notes: Notes) -> ContainerExit:
    """How the container ended, told apart from how its wrapper did.

    What the engine did to the container (memory, limits, time) stands. An algorithm's own failure comes before that of a
    callback. What the wrapper itself said is no word of anybody's.
    """
    exit = replace(exit, last_words=tuple(notes.without_marks(exit.last_words)))
    if exit.reason not in (Reason.OK, Reason.EXIT_NONZERO, Reason.KILLED):
        return exit
    failed = notes.failed
    if failed is not None and failed.event == "taskStarts" and failed.exit_code is not None:
        return replace(exit, reason=Reason.PREREQUISITE_FAILED, exit_code=failed.exit_code)
    if notes.refused is not None:
        reason = Reason.NOT_EXECUTABLE if notes.refused == 126 else Reason.COMMAND_NOT_FOUND
        return replace(exit, reason=reason, exit_code=notes.refused)
    if notes.algorithm is None:
        return exit
    if notes.algorithm:
        reason = Reason.KILLED if notes.algorithm == 137 else Reason.EXIT_NONZERO
        return replace(exit, reason=reason, exit_code=notes.algorithm)
    if failed is not None:
        return replace(exit, reason=Reason.PREREQUISITE_FAILED, exit_code=failed.exit_code)
    return exit


def _time(path: Path) -> float | None:
    with suppress(OSError):
        return path.lstat().st_mtime
    return None


def _number(path: Path) -> int | None:
    # It may be anything by now, also a pipe that nobody writes to.
    with suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return int(os.read(descriptor, 10))
        finally:
            os.close(descriptor)
    return None
