"""The promises of `oasis_flows.engines`, one class, a test or more per number, over every engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from oasis_flows.engines import Engine
from oasis_flows.errors import NoGpu, StoreFull
from oasis_flows.job import ContainerExit, ContainerJob, ImageSource, LogSink, Mount, Reason, Resources, Stream
from oasis_flows.testing import FakeEngine, host_path
from tests.servers import cluster as clusters


@dataclass
class Log:
    """A sink that keeps what it gets."""

    pieces: list[tuple[Stream, bytes]] = field(default_factory=list)

    def __call__(self, stream: Stream, data: bytes) -> None:
        self.pieces.append((stream, data))

    def text(self, stream: Stream) -> bytes:
        return b"".join(data for name, data in self.pieces if name == stream)


@dataclass(frozen=True)
class Program:
    """The same algorithm for a shell and for the fake engine."""

    shell: str
    python: Callable[[ContainerJob, LogSink], int | ContainerExit]


def say(*words: tuple[Stream, bytes], code: int = 0) -> Callable[[ContainerJob, LogSink], int]:
    def algorithm(job: ContainerJob, log: LogSink) -> int:
        for stream, data in words:
            log(stream, data)
        return code

    return algorithm


def write_output(job: ContainerJob, log: LogSink) -> int:
    host_path(job, "/work/output/hello.txt").write_text("DATA\n")
    log("stdout", b"HI\n")
    return 0


def sleep(job: ContainerJob, log: LogSink) -> int:
    log("stdout", b"begun\n")
    time.sleep(20)
    return 0


HELLO = Program("echo DATA > output/hello.txt && echo HI", write_output)
FAIL = Program("echo bad >&2; exit 7", say(("stderr", b"bad\n"), code=7))
BOTH = Program("echo out; echo err >&2; printf end", say(("stdout", b"out\n"), ("stderr", b"err\n"), ("stdout", b"end")))


def flood(job: ContainerJob, log: LogSink) -> int:
    while True:
        log("stdout", b"0123456789abcde\n")


def write_files(count: int, size: int) -> Callable[[ContainerJob, LogSink], int]:
    def algorithm(job: ContainerJob, log: LogSink) -> int:
        for number in range(count):
            host_path(job, f"/work/output/{number}").write_bytes(b"x" * size)
        return 0

    return algorithm


FLOOD = Program("yes 0123456789abcde", flood)
LARGE = Program("i=0; while [ $i -lt 3 ]; do head -c 1000 /dev/zero > output/$i; i=$((i+1)); done", write_files(3, 1000))
SLEEP = Program("echo begun; sleep 20", sleep)
NOTHING = Program("true", say())


@pytest.fixture(params=["docker", "fake", *clusters.HERE, *clusters.CARRIED])
def start(
    request: pytest.FixtureRequest, make_job: Callable[..., ContainerJob], tmp_path: Path
) -> Iterator[Callable[..., ContainerExit]]:
    """Run a program on the engine under test."""
    on_cluster = request.param in ("kubernetes", "carried")
    cluster = request.getfixturevalue("cluster") if on_cluster else None

    def run(program: Program, log: LogSink, **changes: Any) -> ContainerExit:
        engine: Engine = FakeEngine(program.python)
        if request.param == "docker":
            engine = request.getfixturevalue("docker_engine")
        if cluster is not None:
            engine, changes["image"] = cluster.engine, cluster.image
        if request.param == "carried":
            engine = clusters.carrying(cluster, tmp_path)
        return engine.run(make_job("sh", "-c", program.shell, **changes), log)

    yield run
    assert cluster is None or cluster.left() == []


@pytest.fixture
def patience(request: pytest.FixtureRequest) -> float:
    """How much longer than a machine's own engine a cluster may take to start and end a container, in seconds."""
    return 30.0 if on_a_cluster(request) else 0.0


@pytest.fixture
def apart(request: pytest.FixtureRequest) -> bool:
    """Can the engine tell stdout and stderr apart? A cluster cannot: all is stdout."""
    return not on_a_cluster(request)


def on_a_cluster(request: pytest.FixtureRequest) -> bool:
    return any(name in request.node.name for name in (*clusters.HERE, *clusters.CARRIED))


class TestPromises:
    def test_1_a_non_zero_exit_is_a_result(self, start: Callable[..., ContainerExit], apart: bool) -> None:
        log = Log()
        ended = start(FAIL, log)
        assert (ended.reason, ended.exit_code) == (Reason.EXIT_NONZERO, 7)
        assert log.text("stderr" if apart else "stdout") == b"bad\n"

    def test_1_success_is_a_result(self, start: Callable[..., ContainerExit], tmp_path: Any) -> None:
        log = Log()
        (tmp_path / "output").mkdir()
        ended = start(HELLO, log, mounts=(Mount(source=tmp_path / "output", target="/work/output", read_only=False),))
        assert (ended.reason, ended.exit_code) == (Reason.OK, 0)
        assert log.pieces == [("stdout", b"HI\n")]
        assert (tmp_path / "output" / "hello.txt").read_bytes() == b"DATA\n"
        assert ended.started_at is not None
        assert 0 <= ended.seconds < 5

    def test_2_every_byte_once_and_streams_apart(self, start: Callable[..., ContainerExit], apart: bool) -> None:
        log = Log()
        start(BOTH, log)
        if apart:
            assert (log.text("stdout"), log.text("stderr")) == (b"out\nend", b"err\n")
        else:
            assert sorted(log.text("stdout").replace(b"end", b"end\n").splitlines()) == [b"end", b"err", b"out"]

    def test_2_live(self, start: Callable[..., ContainerExit]) -> None:
        moments: list[float] = []

        def note(stream: Stream, data: bytes) -> None:
            moments.append(time.monotonic())

        start(SLEEP, note, timeout_seconds=1, stop_grace_seconds=0.2)
        assert moments[0] < time.monotonic() - 0.5

    def test_3_an_exception_of_the_sink_ends_it_and_is_raised(
        self, start: Callable[..., ContainerExit], patience: float
    ) -> None:
        def full(stream: Stream, data: bytes) -> None:
            raise StoreFull("The disk of the log is full.")

        began = time.monotonic()
        with pytest.raises(StoreFull):
            start(SLEEP, full)
        assert time.monotonic() - began < 10 + patience

    def test_5_the_time_limit_has_its_own_reason(self, start: Callable[..., ContainerExit], patience: float) -> None:
        log = Log()
        began = time.monotonic()
        ended = start(SLEEP, log, timeout_seconds=0.5)
        assert ended.reason is Reason.TIMED_OUT
        assert ended.timeout_seconds == 0.5
        assert time.monotonic() - began < 5 + patience
        assert log.text("stdout") == b"begun\n"

    def test_7_gpus_that_nobody_has_are_refused(self, start: Callable[..., ContainerExit]) -> None:
        with pytest.raises(NoGpu):
            start(NOTHING, Log(), resources=Resources(gpus=1000))

    @pytest.mark.parametrize("limit", [100_000, 0])
    def test_8_the_log_ends_exactly_at_its_limit(
        self, start: Callable[..., ContainerExit], limit: int, patience: float
    ) -> None:
        log = Log()
        began = time.monotonic()
        ended = start(FLOOD, log, resources=Resources(log_bytes=limit))
        assert (ended.reason, ended.limit_passed) == (Reason.LOG_TOO_LARGE, limit)
        assert log.text("stdout") == (b"0123456789abcde\n" * (limit // 16 + 1))[:limit]
        assert time.monotonic() - began < 10 + patience

    def test_8_a_log_as_long_as_its_limit_is_none_too_large(self, start: Callable[..., ContainerExit]) -> None:
        log = Log()
        assert start(BOTH, log, resources=Resources(log_bytes=11)).reason is Reason.OK
        assert start(BOTH, log, resources=Resources(log_bytes=10)).reason is Reason.LOG_TOO_LARGE

    @pytest.mark.parametrize(
        ("limits", "reason", "passed"),
        [
            ({"output_bytes": 3000, "output_files": 3}, Reason.OK, None),
            ({"output_bytes": 2999}, Reason.OUTPUT_TOO_LARGE, 2999),
            ({"output_files": 2}, Reason.TOO_MANY_FILES, 2),
        ],
    )
    def test_8_also_who_ends_with_success_is_held_to_the_limits(
        self,
        start: Callable[..., ContainerExit],
        tmp_path: Any,
        limits: dict[str, int],
        reason: Reason,
        passed: int | None,
    ) -> None:
        (tmp_path / "output").mkdir()
        mounts = (Mount(source=tmp_path / "output", target="/work/output", read_only=False),)
        ended = start(LARGE, Log(), mounts=mounts, resources=Resources(**limits))  # type: ignore[arg-type]
        assert (ended.reason, ended.limit_passed) == (reason, passed)

    def test_many_at_once(self, start: Callable[..., ContainerExit]) -> None:
        ends: list[ContainerExit] = []
        threads = [threading.Thread(target=lambda: ends.append(start(BOTH, Log()))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [e.reason for e in ends] == [Reason.OK] * 3


def test_the_fake_engine_plays_failures(make_job: Callable[..., ContainerJob]) -> None:
    def crash(job: ContainerJob, log: LogSink) -> int:
        raise ValueError("no such column")

    log = Log()
    ended = FakeEngine(crash).run(make_job(), log)
    assert (ended.reason, ended.exit_code) == (Reason.EXIT_NONZERO, 1)
    assert log.text("stderr").endswith(b"ValueError: no such column\n")

    def away(job: ContainerJob, log: LogSink) -> int:
        raise NoGpu("none today")

    with pytest.raises(NoGpu):
        FakeEngine(away).run(make_job(), log)


def test_the_fake_engine_prepares_by_name() -> None:
    engine = FakeEngine()
    assert engine.prepare(ImageSource(image_id="a:1")) == engine.prepare(ImageSource(image_id="a:1"))
    assert engine.prepare(ImageSource(image_id="a:1")) != engine.prepare(ImageSource(image_id="a:2"))
    assert engine.reap() == ()
