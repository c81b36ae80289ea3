'''What tests of a pipeline need: an engine without containers.

    from oasis_flows.testing import FakeEngine, host_path

    def count_lines(job, log):
        """Stands for the container: reads its input, writes its output, logs, and returns its exit code."""
        for file in sorted(host_path(job, "/work/input").iterdir()):
            lines = len(file.read_text().splitlines())
            log("stdout", f"{file.name}: {lines}\\n".encode())
            (host_path(job, "/work/output") / file.name).write_text(str(lines))
        return 0

    engine = FakeEngine(count_lines)
    exit = engine.run(job, log)

The promises of `oasis_flows.engines` that hold: 1 (a non-zero exit is a result, an `OasisError` raised by the function
is an exception), 2, 3 (nothing is started, so nothing stays), 5 (the time limit; the function is let go at its next
call of `log`), 7 (`gpus` says how many it has), 8 (the log's limit when it is passed, those of the output at the end).
Those of a kernel do not: read-only mounts, environment, limits, and death by memory, unless the function returns a
`ContainerExit` that says so. Commands of prerequisites are not run; to prepare what one keeps, the function is called, too.
'''

from __future__ import annotations

import hashlib
import threading
import traceback
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from .capacity import Node, Vector
from .engines import Description
from .engines.quota import Passed, measure
from .errors import ImageNotFound, NoGpu, OasisError
from .job import ContainerExit, ContainerJob, ImageSource, LogSink, Reason, Stream

Algorithm = Callable[[ContainerJob, LogSink], int | ContainerExit]


def host_path(job: ContainerJob, path: str) -> Path:
    """Where a path inside the container lies on this machine.

    Raises:
        FileNotFoundError: it is in none of the job's mounts.
    """
    for mount in sorted(job.mounts, key=lambda m: len(m.target), reverse=True):
        if PurePosixPath(path).is_relative_to(mount.target):
            return mount.source / PurePosixPath(path).relative_to(mount.target)
    raise FileNotFoundError(f"{path} is in none of the mounts {[m.target for m in job.mounts]}.")


def succeed(job: ContainerJob, log: LogSink) -> int:  # noqa: ARG001
    """The algorithm that does nothing, well."""
    return 0


class _Stopped(BaseException):
    """Ends a function that writes to its log after its time limit."""


class FakeEngine:
    """Runs a Python function in place of a container. Implements `Engine`.

    The function gets the job and the log and returns an exit code, or a whole `ContainerExit`. An exception in it is
    what it would be in a program: its traceback goes to stderr and the exit code is 1. An `OasisError` is raised by
    `run`: so a test plays an engine that fails.

    Args:
        algorithm: the function; without one, every run succeeds at once.
        missing: image names or files that `prepare` does not find.
        gpus: how many GPUs it pretends to have.
        cpus, memory_bytes: how large a machine it pretends to be on; a batch runs as many at once as fit.

    Attributes:
        jobs: what was run, in order.
        images: what was prepared, in order.
    """

    def __init__(
        self,
        algorithm: Algorithm | None = None,
        *,
        missing: tuple[str, ...] = (),
        gpus: int = 0,
        cpus: float = 8.0,
        memory_bytes: int = 64 << 30,
    ) -> None:
        self._algorithm, self._missing, self._gpus = algorithm or succeed, missing, gpus
        self._cpus, self._memory_bytes = cpus, memory_bytes
        self.jobs: list[ContainerJob] = []
        self.images: list[ImageSource] = []

    def prepare(self, image: ImageSource) -> str:
        """A digest made from the image's name.

        Raises:
            ImageNotFound: it is one of `missing`.
        """
        name = image.image_id or image.image_file or ""
        if name in self._missing:
            raise ImageNotFound(f"There is no image {name}. This engine was told that it is missing.")
        self.images.append(image)
        return f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"

    def run(self, job: ContainerJob, log: LogSink) -> ContainerExit:
        """Call the function; see the class."""
        wanted = 1 if job.resources.gpus == "all" else job.resources.gpus
        if wanted > self._gpus:
            raise NoGpu(
                f"This fake engine has {self._gpus} GPUs and the job wants {job.resources.gpus}. Give FakeEngine(gpus=…)."
            )
        self.jobs.append(job)
        return _Call(self._algorithm, job, log).result()

    def find(self, job: ContainerJob) -> bool:  # noqa: ARG002
        """There is never anything to come back to."""
        return False

    def nodes(self, *, without: Collection[str] = ()) -> tuple[Node, ...]:  # noqa: ARG002
        """One machine, as large as the constructor was told; nobody else is on it."""
        return (Node(name="fake", allocatable=Vector(round(self._cpus * 1000), self._memory_bytes, self._gpus, 1 << 20)),)

    def describe(self) -> Description:
        """A fake engine."""
        return Description(name="a fake engine", gpu=f"{self._gpus} fake ones" if self._gpus else None)

    def reap(
        self,
        run_id: str | None = None,  # noqa: ARG002
        *,
        grace_seconds: float = 60.0,  # noqa: ARG002
        below: Path | None = None,  # noqa: ARG002
        stop_seconds: float = 0.0,  # noqa: ARG002
        drafts: bool = True,  # noqa: ARG002
    ) -> tuple[str, ...]:
        """Nothing is ever left behind."""
        return ()


class _Call:
    """One call of an algorithm, in a thread of its own, so that a time limit can leave it."""

    def __init__(self, algorithm: Algorithm, job: ContainerJob, log: LogSink) -> None:
        self._algorithm, self._job, self._sink = algorithm, job, log
        self._lock = threading.Lock()
        self._over = False
        self._answer: int | ContainerExit = 0
        self._failure: BaseException | None = None
        self._logged = 0
        self._passed: Passed | None = None

    def result(self) -> ContainerExit:
        thread = threading.Thread(target=self._work, name="oasis-fake", daemon=True)
        started = datetime.now(UTC)
        thread.start()
        try:
            thread.join(self._job.timeout_seconds)
        finally:
            late = thread.is_alive()
            with self._lock:
                self._over = True
        if self._failure is not None:
            raise self._failure
        told = ContainerExit(reason=Reason.TIMED_OUT, exit_code=137) if late else self._told()
        return replace(
            told,
            started_at=told.started_at or started,
            finished_at=told.finished_at or datetime.now(UTC),
            timeout_seconds=self._job.timeout_seconds,
            memory_limit_bytes=told.memory_limit_bytes or self._job.resources.memory_bytes,
        )

    def _told(self) -> ContainerExit:
        if isinstance(self._answer, ContainerExit):
            return self._answer
        folders = [mount.source for mount in self._job.mounts if not mount.read_only]
        if passed := self._passed or measure(folders, self._job.resources).over(self._job.resources):
            return ContainerExit(reason=passed.reason, exit_code=137, limit_passed=passed.limit)
        return ContainerExit(reason=Reason.EXIT_NONZERO if self._answer else Reason.OK, exit_code=self._answer)

    def _log(self, stream: Stream, data: bytes) -> None:
        with self._lock:
            if self._over:
                raise _Stopped
            limit = self._job.resources.log_bytes
            room = len(data) if limit is None else limit - self._logged
            self._logged += len(data)
            try:
                self._sink(stream, data[:room])
            except BaseException as error:
                self._failure, self._over = error, True
                raise _Stopped from error
            if limit is not None and self._logged > limit:
                self._passed, self._over = Passed(Reason.LOG_TOO_LARGE, limit), True
                raise _Stopped

    def _work(self) -> None:
        try:
            self._answer = self._algorithm(self._job, self._log)
        except _Stopped:
            return
        except OasisError as error:
            self._failure = error
        except SystemExit as leaving:
            self._answer = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:  # noqa: BLE001 - as any program's: a traceback and exit code 1
            self._answer = 1
            try:
                self._log("stderr", traceback.format_exc().encode())
            except _Stopped:
                return
