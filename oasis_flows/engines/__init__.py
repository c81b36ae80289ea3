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

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..capacity import Node
from ..job import ContainerExit, ContainerJob, ImageSource, LogSink, RegistryLogin

if TYPE_CHECKING:
    from ..lineage import Content

__all__ = ["AtEnd", "Description", "Engine", "ImageEngine"]

# All files of a container or an image, as a tar archive; it can be asked for again and again.
Files = Callable[[], AbstractContextManager[IO[bytes]]]
# Called with how a container ended, while it is still there, and its files.
AtEnd = Callable[[ContainerExit, Files], None]


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
        drafts: bool = True,
    ) -> tuple[str, ...]:
        """Remove this package's containers that nobody owns any more; return their run ids.

        With `run_id`: the containers of that run and of its parts (whose ids are `<run id>.<part>`), whatever their lease
        says; they get SIGTERM first, all together, and `stop_seconds` to end by themselves. Without: those that this machine started and
        whose lease's owner is dead and was last seen at least `grace_seconds` ago; nobody can become the owner while the
        container is removed. Below the folder `below` lie the leases of those who ask. A container with its lease elsewhere
        may wait as long as its own job allowed, too; and only below it a lease that is gone counts as lapsed, for a container
        made at least `grace_seconds` ago. Every other container is left alone, and so is one whose lease this process may not
        look at. Drafts of images that dead runs were making go, too, unless `drafts` is False, which leaves them for another call: to find
        them an engine looks through all of its images.
        """
        ...

    def nodes(self, *, without: Collection[str] = ()) -> tuple[Node, ...]:
        """What there is to run containers on, and what is requested of it now; the runs `without`, with their parts, apart.

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


@runtime_checkable
class ImageEngine(Engine, Protocol):
    """An engine that also makes images out of containers: what trains need.

    All that it makes meanwhile is removed before a call returns, or seen by `reap`: containers by their lease, and images
    under a run's `draft`, which is one name for each run.
    """

    def run_to(self, job: ContainerJob, log: LogSink, at_end: AtEnd) -> ContainerExit:
        """As `run`; and `at_end` is called before the container is removed. What it raises is raised."""
        ...

    def content(self, image: str) -> Content | None:
        """Configuration and layers of an image that the engine has; `None` where it has none of this name."""
        ...

    def files(self, job: ContainerJob) -> AbstractContextManager[IO[bytes]]:
        """The files of the job's image, by a container that never starts."""
        ...

    def extend(self, image: str, layer: Path, change: Callable[[Mapping[str, Any]], Mapping[str, Any]], owner: Path) -> str:
        """Put a layer, a plain tar archive, on an image; return the name of the run's draft, which is that now.

        `owner` is the run's lease, `<workspaces>/<run id>/lease`.

        `change` makes the new `config` of the old one. Nothing else of the image's configuration is carried over but its
        platform and its history.
        """
        ...

    def push(self, image: str, reference: str, login: RegistryLogin | None) -> str:
        """Push an image under a name that the engine does not keep; return it pinned by digest.

        Raises:
            ImageDenied, RegistryUnavailable, ImageNotFound (a name that none can have): as the registry answers.
        """
        ...

    def name(self, image: str, reference: str) -> str:
        """Give an image of the engine a name that it keeps; return its id."""
        ...

    def forget(self, reference: str) -> None:
        """Take a name, and the image if it was its last, out of the engine, unless somebody uses it."""
        ...
