"""The folder of one run on this machine: what is staged, what the container writes, and what is already done.

    <home>/workspaces/<run id>/
        lease            locked by the process that works on the run
        done/<step>.json written last by each step: it holds what the step found out, and proves that it is finished
        input/ output/ log.txt

A retry of the run finds the folder and goes on behind the last finished step. The container engine sees the folder under
the same path.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import lease
from .errors import StoreFull


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths of one run's folder."""

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def lease(self) -> Path:
        return self.path / "lease"

    @property
    def input(self) -> Path:
        return self.path / "input"

    @property
    def output(self) -> Path:
        return self.path / "output"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def is_empty(self) -> bool:
        """Is there nothing that a retry could go on from?"""
        return all(child == self.lease for child in self.path.iterdir())

    def done(self, step: str) -> dict[str, Any] | None:
        """What the step found out when it finished, or `None` if it has not."""
        try:
            found = json.loads((self.path / "done" / f"{step}.json").read_text())
        except FileNotFoundError:
            return None
        return dict(found)

    def mark_done(self, step: str, found: Mapping[str, Any]) -> None:
        """Note durably that the step is finished, and what it found out (JSON values)."""
        target = self.path / "done" / f"{step}.json"
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_suffix(".new")
        with temporary.open("w") as file:
            json.dump(found, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)

    def fresh_output(self) -> Path:
        """An empty output folder that any user of a container can write to."""
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        self.output.chmod(0o777)
        return self.output

    def remove(self) -> None:
        """Delete the folder; the lease goes last, so that a half-deleted folder still says whose it is."""
        for child in self.path.glob("*"):
            if child != self.lease:
                shutil.rmtree(child, ignore_errors=True) if child.is_dir() and not child.is_symlink() else child.unlink(
                    missing_ok=True
                )
        self.lease.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def open_workspace(root: Path, run_id: str) -> Iterator[Workspace]:
    """The run's folder, made if it is new and owned by this process until the block ends.

    Raises:
        RunInUse: another process works on this run.
        StoreFull: the folder cannot be made.
    """
    workspace = Workspace(root / run_id)
    try:
        workspace.path.mkdir(parents=True, exist_ok=True)
        workspace.path.chmod(0o700)
    except OSError as error:
        raise StoreFull(
            f"The workspace {workspace.path} cannot be made: {error.strerror}. Set OASIS_FLOWS_HOME to a folder with room."
        ) from error
    with lease.hold(workspace.lease):
        yield workspace


def reap(root: Path, keep_seconds: float) -> tuple[str, ...]:
    """Delete the folders of runs whose owner is dead and was last seen more than `keep_seconds` ago; return their ids."""
    removed = []
    for path in sorted(root.glob("*/")):
        workspace = Workspace(path)
        if lease.lapsed(workspace.lease, keep_seconds):
            workspace.remove()
            removed.append(path.name)
    return tuple(removed)
