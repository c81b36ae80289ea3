"""The folder of one run on this machine: what is staged, what the container writes, and what is already done.

    <home>/workspaces/<run id>/
        lease            locked by the process that works on the run
        done/<step>.json written last by each step: it holds what the step found out, and proves that it is finished
        input/ output/ notes/ log.txt

A retry of the run finds the folder and goes on behind the last finished step. The container engine sees the folder under
the same path.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import lease
from .errors import StoreFull


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths of one run's folder."""

    path: Path
    # Whose part it is; the owner of the whole owns its parts.
    whole: Workspace | None = None

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def lease(self) -> Path:
        return self.whole.lease if self.whole else self.path / "lease"

    @contextmanager
    def part(self, name: str) -> Iterator[Workspace]:
        """The folder of a part of the run, such as a shard, made if it is new. It stays when the block ends with an error.

        Raises:
            StoreFull: the folder cannot be made.
        """
        part = Workspace(self.path / "parts" / name, self)
        with room_for(part.path):
            part.path.mkdir(parents=True, exist_ok=True)
        yield part
        delete(part.path)

    def drop_part(self, name: str) -> None:
        """Delete the folder of a part."""
        delete(self.path / "parts" / name)

    @property
    def input(self) -> Path:
        return self.path / "input"

    @property
    def output(self) -> Path:
        return self.path / "output"

    @property
    def notes(self) -> Path:
        """What the wrapper of prerequisites notes, inside the container."""
        return self.path / "notes"

    @property
    def reservation(self) -> Path:
        """What the run has set aside of the machine; see `reservations`."""
        return self.path / "reservation"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def published_manifest(self) -> Path:
        """What was published, as `store.publish` wrote it down here."""
        return self.path / "output.jsonl"

    @property
    def is_resumable(self) -> bool:
        """Is there any file that a retry could go on from?"""
        return any(child.name not in ("lease", "done", "reservation") for child in self.path.iterdir())

    def done(self, step: str) -> dict[str, Any] | None:
        """What the step found out when it finished, or `None` if it has not."""
        try:
            found = json.loads((self.path / "done" / f"{step}.json").read_text())
        except FileNotFoundError:
            return None
        return dict(found)

    def mark_done(self, step: str, found: Mapping[str, Any]) -> None:
        """Note durably that the step is finished, and what it found out (JSON values).

        Raises:
            StoreFull: the note cannot be written.
        """
        target = self.path / "done" / f"{step}.json"
        temporary = target.with_suffix(".new")
        text = json.dumps(found)
        with room_for(target):
            target.parent.mkdir(exist_ok=True)
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)

    def forget_steps(self) -> None:
        """From now on no step is finished."""
        delete(self.path / "done")

    def fresh_output(self) -> Path:
        """An empty output folder that any user of a container can write to.

        Raises:
            StoreFull: it cannot be made.
        """
        return self._fresh(self.output)

    def fresh_notes(self) -> Path:
        """An empty folder for the wrapper's notes; otherwise like `fresh_output`."""
        return self._fresh(self.notes)

    def _fresh(self, folder: Path) -> Path:
        delete(folder)
        with room_for(folder):
            folder.mkdir()
            folder.chmod(0o777)
        return folder

    def disk_free_bytes(self) -> int | None:
        """What the disk of the workspace has left; `None` where nobody can tell."""
        try:
            return shutil.disk_usage(self.path).free
        except OSError:
            return None

    def clear(self) -> bool:
        """Delete everything but the lease, which the owner goes on to hold; is it gone?

        What is noted of finished steps goes first: it must never tell of files that are half gone.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        self.forget_steps()
        for child in self.path.iterdir():
            if child != self.lease:
                delete(child)
        return all(child == self.lease for child in self.path.iterdir())

    def remove(self) -> bool:
        """Delete the folder; is it gone? For its owner only.

        What this user may not delete stays, such as files that a container wrote as root; then the lease stays as well,
        so that a half-deleted folder still says whose it is.
        """
        try:
            if not self.clear():
                return False
            self.lease.unlink(missing_ok=True)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        # From here on a successor may make its own lease; then the folder is the successor's, and stays.
        with suppress(OSError):
            self.path.rmdir()
        return True

    def remove_abandoned(self, keep_seconds: float, leaving: Callable[[Workspace], bool] = lambda _: True) -> bool:
        """Delete the folder if its owner is dead and was last seen at least `keep_seconds` ago; was it, and is it gone?

        Nobody can become its owner meanwhile. One without a lease is as old as its last change. `leaving` is called before it goes; where it
        returns False the folder is emptied, and stays until it is as old again.
        """
        orphaned = lease.missing(self.lease) and _age(self.path) >= keep_seconds
        with lease.taken(self.lease, 0 if orphaned else keep_seconds, create=orphaned) as free:
            if not free:
                return False
            if leaving(self):
                return self.remove()
            with suppress(OSError):
                self.clear()
                lease.renew(self.lease)
            return False


@contextmanager
def open_workspace(root: Path, run_id: str, attempt: int = 1) -> Iterator[Workspace]:
    """The run's folder, made if it is new and owned by this process, the run's `attempt`, until the block ends.

    Raises:
        RunInUse: another process works on this run.
        StoreFull: the folder cannot be made.
    """
    workspace = Workspace(root / run_id)
    with ExitStack() as stack:
        with room_for(workspace.path):
            stack.enter_context(lease.hold(workspace.lease, attempt))
            workspace.path.chmod(0o700)
        yield workspace


def reap(root: Path, keep_seconds: float, leaving: Callable[[Workspace], bool] = lambda _: True) -> tuple[str, ...]:
    """Delete the folders of runs whose owner is dead and was last seen at least `keep_seconds` ago; return their ids.

    `leaving` is called with each before it goes, and may keep it; see `Workspace.remove_abandoned`. Safe beside any number of processes that open workspaces or reap; only a folder that is really gone is returned.
    """
    folders = [path for path in sorted(root.glob("*")) if path.is_dir() and not path.is_symlink()]
    return tuple(path.name for path in folders if Workspace(path).remove_abandoned(keep_seconds, leaving))


def abandoned(root: Path, silence_seconds: float) -> Iterator[str]:
    """Ids of the runs whose owner is dead and was last seen at least `silence_seconds` ago; nothing is removed."""
    for path in sorted(root.glob("*/lease")):
        with lease.taken(path, silence_seconds) as free:
            if free:
                yield path.parent.name


def _age(path: Path) -> float:
    """Seconds since the folder last changed; one that is gone is as young as can be."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return float("-inf")


def delete(path: Path) -> None:
    """Delete a file, or a folder as far as it can be."""
    if path.is_dir() and not path.is_symlink():
        with suppress(RecursionError):
            shutil.rmtree(path, ignore_errors=True)
        # A container may nest folders deeper than Python counts, and close them to their owner; neither stops these.
        for program in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]) if path.exists() else ():
            subprocess.run([*program, "--", path], stderr=subprocess.DEVNULL, check=False)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Write to `path` in the block; raises `StoreFull` where that fails."""
    try:
        yield
    except OSError as error:
        raise StoreFull(
            f"{path} cannot be written: {error.strerror}. Free space there, or set OASIS_FLOWS_HOME to a folder with room."
        ) from error
