"""The seam between a run and what runs containers.

An engine keeps these promises; `tests/contract` has a test for each number and runs them over every engine.

1. A non-zero exit is a result. An exception means that the verdict is unknown, and says by `transient` whether trying
   again can help.
2. The log sink gets every byte once, in order, before `run` returns; stdout and stderr are told apart where the engine
   can.
3. Nothing is left behind on any path: success, failure, exception, time-out, cancellation, SIGTERM. After SIGKILL of the
   process, the next `reap` removes what its lease no longer covers, or `run` re-attaches when it is called again with
   the same `run_id`.
4. Read-only mounts are; the environment is exactly the job's on top of the image's; resources are hard limits.
5. The time-out ends the container with its own reason.
6. Death by memory says so, with limit and peak, also when only a child process was killed.
7. What an engine cannot do it refuses before it starts anything.
8. A container that passes a limit of output, files or log is killed, or has ended, with that reason; so is one during
   whose run the disk of its output filled up. The log sink gets exactly the first `log_bytes` bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..capacity import Node
from ..job import ContainerExit, ContainerJob, ImageSource, LogSink

__all__ = ["Description", "Engine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """An engine in words. `gpu` is `None` where it has none to give.

    `not_enforced` names the limits that it cannot hold a container to, and `how_to_enforce` says what to change on its
    machine. Where one is named, `prepare` and `run` refuse every image and job.
    """

    name: str
    gpu: str | None
    not_enforced: tuple[str, ...] = ()
    system_calls_filtered: bool = True
    how_to_enforce: str = ""


class Engine(Protocol):
    """Runs containers. See the module's docstring for what every implementation promises."""

    def prepare(self, image: ImageSource) -> str:
        """Make the image ready to run and return a reference to exactly these bytes (by digest).

        Raises:
            ImageNotFound, InvalidImageFile: the description is wrong.
            UnsupportedByEngine: the engine cannot run it, or cannot hold any container to its limits.
            ImageDenied, RegistryUnavailable, EngineUnavailable: the surroundings are.
        """
        ...

    def run(self, job: ContainerJob, log: LogSink) -> ContainerExit:
        """Run the job to its end. Called again with the `run_id` of a container that still exists, re-attach to it.

        Raises:
            UnsupportedByEngine, NoGpu: before anything started.
            EngineUnavailable, ContainerLost: the verdict is unknown.
        """
        ...

    def find(self, job: ContainerJob) -> bool:
        """Is there a container, running or ended, that `run(job)` would re-attach to?

        What else is left of the job's run is of no use to it, and is removed.
        """
        ...

    def reap(
        self,
        run_id: str | None = None,
        *,
        grace_seconds: float = 60.0,
        below: Path | None = None,
        stop_seconds: float = 0.0,
    ) -> tuple[str, ...]:
        """Remove this package's containers that nobody owns any more; return their run ids.

        With `run_id`: the containers of that run and of its parts (whose ids are `<run id>.<part>`), whatever their lease
        says; they get SIGTERM first, all together, and `stop_seconds` to end by themselves. Without: those that this machine started and
        whose lease's owner is dead and was last seen at least `grace_seconds` ago; nobody can become the owner while the
        container is removed. A lease that is gone counts as lapsed only below the folder `below`, where this machine's
        leases lie, and for a container made at least `grace_seconds` ago. Every other container is left alone, and so is
        one whose lease this process may not look at.
        """
        ...

    def nodes(self, *, without: str | None = None) -> tuple[Node, ...]:
        """What there is to run containers on, and what is requested of it now; the run `without`, with its parts, apart.

        Raises:
            EngineUnavailable: it does not answer.
        """
        ...

    def describe(self) -> Description:
        """What the engine is and can do.

        Raises:
            EngineUnavailable: it does not answer.
        """
        ...
