"""Files carried to a claim and back on the cluster that KUBECONFIG names, for a process that has the claim not mounted.

Collected only where there is one: see `tests/conftest.py`. The promises of the engine's seam are gone through in `test_engine.py`, for this
way, too. What is not proven: other container runtimes and proxies between, and more than one node.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oasis_flows import lease
from oasis_flows.engines import pod as spec
from oasis_flows.engines.kubernetes import KubernetesEngine
from oasis_flows.errors import ContainerLost, EngineError, EngineUnavailable, OasisError
from oasis_flows.job import ContainerJob, Mount, Reason, Resources
from tests.contract.test_engine import Log
from tests.contract.test_kubernetes_cluster import Ran, proxied
from tests.servers.cluster import TestCluster, carrier_of, carrying, open_cluster
from tests.servers.engine import eventually
from tests.servers.faultproxy import Faults
from tests.servers.registry import Registry

MIB = 1 << 20
COPY = "cp -a input/. output/ && echo begun"
FOREVER = "echo begun; while :; do sleep 0.2; done"
MakeJob = Callable[..., ContainerJob]


@pytest.fixture(scope="module")
def far(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """A cluster whose claim is on a folder that only pods use here, open to all users, as a claim is by its `fsGroup`."""
    claim = tmp_path_factory.mktemp("claim")
    with open_cluster(registry, claim) as found:
        claim.chmod(0o777)
        yield found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def engine(far: TestCluster, home: Path) -> Iterator[KubernetesEngine]:
    yield carrying(far, home)
    eventually(lambda: far.left() == [], 60)


@pytest.fixture
def job(far: TestCluster, home: Path, tmp_path: Path) -> Iterator[MakeJob]:
    """Makes a job of a script, with an input anywhere and an output in its workspace, and its lease held."""
    (tmp_path / "input").mkdir()
    with contextlib.ExitStack() as held:

        def make(script: str, **changes: Any) -> ContainerJob:
            run_id = str(uuid.uuid4())
            folder = home / "workspaces" / run_id
            held.enter_context(lease.hold(folder / "lease"))
            (folder / "output").mkdir()
            (folder / "output").chmod(0o777)
            return ContainerJob(**{**given(far, home, tmp_path / "input", run_id), "command": ("sh", "-c", script), **changes})

        yield make


def given(far: TestCluster, home: Path, source: Path, run_id: str) -> dict[str, Any]:
    folder = home / "workspaces" / run_id
    return {
        "run_id": run_id,
        "image": far.image,
        "lease": folder / "lease",
        "mounts": (
            Mount(source=source, target="/work/input", read_only=True),
            Mount(source=folder / "output", target="/work/output", read_only=False),
        ),
        "user": "0:0",
        "resources": Resources(cpus=0.1, memory_bytes=64 * MIB),
        "stop_grace_seconds": 1,
        "timeout_seconds": 300,
    }


def output(job: ContainerJob) -> Path:
    return job.mounts[1].source


def fill(folder: Path) -> None:
    (folder / "many").mkdir()
    for number in range(2000):
        (folder / "many" / str(number)).write_text(f"{number}\n")
    (folder / "big").write_bytes(os.urandom(20_000_000))
    (folder / os.fsdecode(b"odd \xff\n name")).write_text("odd")


@pytest.mark.parametrize("user", ["0:0", "1000:1000"])
def test_all_kinds_of_files_go_there_and_come_back(engine: Any, job: MakeJob, tmp_path: Path, user: str) -> None:
    fill(tmp_path / "input")
    script = (
        f"{COPY} && cd output && ln big same && ln -s /etc/passwd away && mkfifo pipe && truncate -s 1G hole && chmod 0 odd*"
    )
    log = Log()
    made = job(script, user=user, resources=Resources(cpus=1.0, memory_bytes=256 * MIB))
    found = engine.run(made, log)

    assert (found.reason, log.text("stdout")) == (Reason.OK, b"begun\n")
    there = output(made)
    assert (there / "big").read_bytes() == (tmp_path / "input" / "big").read_bytes()
    assert [(there / "many" / str(number)).read_text() for number in range(2000)] == [f"{n}\n" for n in range(2000)]
    assert (there / "same").samefile(there / "big")
    assert os.readlink(there / "away") == "/etc/passwd"  # noqa: PTH115
    assert (there / "pipe").is_fifo()
    assert ((there / "hole").stat().st_size, (there / "hole").stat().st_blocks) == (1 << 30, 0)
    (odd,) = there.glob("odd*")
    assert os.fsencode(odd.name) == b"odd \xff\n name"


def test_the_input_cannot_be_written_there(engine: Any, job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "input" / "a").write_text("a")
    made = job("echo b > input/a; touch input/b; cat input/a > output/a")

    assert engine.run(made, Log()).reason is Reason.OK
    assert (output(made) / "a").read_text() == "a"
    assert (tmp_path / "input" / "a").read_text() == "a"


@pytest.mark.parametrize(
    ("script", "limits", "reason"),
    [
        ("head -c 3000 /dev/zero > output/x", {"output_bytes": 2999}, Reason.OUTPUT_TOO_LARGE),
        (
            "i=0; while :; do head -c 100000 /dev/zero > output/$i; i=$((i+1)); done",
            {"output_bytes": 9 * MIB},
            Reason.OUTPUT_TOO_LARGE,
        ),
        ("touch output/a output/b; " + FOREVER, {"output_files": 1}, Reason.TOO_MANY_FILES),
        ("truncate -s 1000G output/hole; " + FOREVER, {"output_bytes": 1 << 30}, Reason.OUTPUT_TOO_LARGE),
    ],
    ids=["at the end", "while it writes", "files", "hole"],
)
def test_limits_hold(engine: Any, job: MakeJob, script: str, limits: dict[str, int], reason: Reason) -> None:
    made = job(script, resources=Resources(cpus=0.5, memory_bytes=64 * MIB, **limits))
    found = engine.run(made, Log())

    assert (found.reason, found.limit_passed) == (reason, next(iter(limits.values())))
    assert list(output(made).iterdir()) == []


def test_what_failed_and_what_took_too_long_have_their_output(engine: Any, job: MakeJob) -> None:
    failed, late = job("echo x > output/x; exit 7"), job("echo x > output/x; " + FOREVER, timeout_seconds=2)

    assert engine.run(failed, Log()).exit_code == 7
    assert engine.run(late, Log()).reason is Reason.TIMED_OUT
    assert [(output(each) / "x").read_text() for each in (failed, late)] == ["x\n", "x\n"]


def test_connections_that_break_all_the_time(far: TestCluster, job: MakeJob, home: Path, tmp_path: Path) -> None:
    (tmp_path / "input" / "big").write_bytes(os.urandom(40_000_000))
    over = threading.Event()
    with proxied(far) as (proxy, near):
        engine = KubernetesEngine(
            replace(near._place, home=home, carrier=carrier_of(far)), near._find_access, patience_seconds=60
        )

        def cut() -> None:
            for pause in (2.5, 1.0, 1.5, 2.0, 3.0):
                if not over.wait(pause):
                    proxy.drop()

        cutting = threading.Thread(target=cut)
        cutting.start()
        try:
            made = job(COPY)
            assert engine.run(made, Log()).reason is Reason.OK
        finally:
            over.set()
            cutting.join()
    assert (output(made) / "big").read_bytes() == (tmp_path / "input" / "big").read_bytes()
    eventually(lambda: far.left() == [], 60)


def test_an_interruption_while_it_is_carried_leaves_nothing(
    far: TestCluster, engine: Any, job: MakeJob, tmp_path: Path
) -> None:
    """As a cancellation does it: by a signal whose handler raises, in the main thread."""
    (tmp_path / "input" / "big").write_bytes(os.urandom(200_000_000))
    made = job(COPY)

    def interrupt() -> None:
        claim = far.home / "carried" / made.run_id
        eventually(lambda: [path for path in claim.glob("in.*/0/big") if path.stat().st_size > MIB], 60)
        os.kill(os.getpid(), signal.SIGUSR1)

    def cancelled(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, cancelled)
    interrupting = threading.Thread(target=interrupt)
    try:
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            engine.run(made, Log())
    finally:
        interrupting.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("kind", ["pods", "jobs"])
def test_a_carrier_that_somebody_deletes_takes_the_run_along(far: TestCluster, engine: Any, job: MakeJob, kind: str) -> None:
    ran = Ran(engine, job(FOREVER))
    ran.until_begun()
    (row,) = [each for each in far.objects(kind, ran.job.run_id) if spec.CARRIER in each["metadata"]["labels"]]
    path = f"/apis/batch/v1/namespaces/{far.namespace}/jobs" if kind == "jobs" else far.core(kind)
    far.api.call("DELETE", f"{path}/{row['metadata']['name']}", {"propagationPolicy": "Background"})
    with pytest.raises(ContainerLost, match=r"[rR]un it again"):
        ran.result()


def test_an_image_that_cannot_carry_is_named(far: TestCluster, job: MakeJob, home: Path) -> None:
    began = time.monotonic()
    with pytest.raises(OasisError, match=r"image of flow runs"):
        carrying(far, home, carrier=far.image).run(job("true"), Log())
    assert time.monotonic() - began < 60
    eventually(lambda: far.left() == [], 60)


def test_who_may_not_write_to_the_claim_is_told(far: TestCluster, engine: Any, job: MakeJob) -> None:
    far.home.chmod(0o755)
    try:
        (far.home / "carried").rename(far.home / "was-carried")
        with pytest.raises(EngineError, match=r"[Pp]ermission denied"):
            engine.run(job("true", user="1000:1000"), Log())
    finally:
        (far.home / "was-carried").rename(far.home / "carried")
        far.home.chmod(0o777)


OWNER = """
import sys
from pathlib import Path
from oasis_flows import lease
from oasis_flows.engines import pod as spec
from oasis_flows.engines.kubernetes import KubernetesEngine
from oasis_flows.job import ContainerJob, Mount, Resources
namespace, claim, home, image, carrier, run_id, source, script = sys.argv[1:]
folder = Path(home) / "workspaces" / run_id
engine = KubernetesEngine(spec.Place(namespace=namespace, claim=claim, home=Path(home), carrier=carrier))
job = ContainerJob(run_id=run_id, image=image, lease=folder / "lease", command=("sh", "-c", script), user="0:0",
                   mounts=(Mount(source=Path(source), target="/work/input", read_only=True),
                           Mount(source=folder / "output", target="/work/output", read_only=False)),
                   resources=Resources(cpus=0.1, memory_bytes=64 << 20), stop_grace_seconds=1, timeout_seconds=300)
with lease.hold(folder / "lease"):
    (folder / "output").mkdir()
    engine.run(job, lambda stream, data: (sys.stdout.buffer.write(data), sys.stdout.flush()))
"""


class TestDeaths:
    @contextlib.contextmanager
    def owner(self, far: TestCluster, home: Path, source: Path, script: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
        """A process that runs a script; and its run's id."""
        run_id = str(uuid.uuid4())
        words = [far.namespace, far.claim, str(home), far.image, carrier_of(far), run_id, str(source), script]
        with subprocess.Popen([sys.executable, "-c", textwrap.dedent(OWNER), *words], stdout=subprocess.PIPE) as process:
            try:
                yield process, run_id
            finally:
                process.kill()

    def test_a_retry_takes_up_what_a_killed_process_left(
        self, far: TestCluster, engine: Any, home: Path, tmp_path: Path
    ) -> None:
        fill(tmp_path)
        script = "echo begun; sleep 8; cp input/big output; echo end"
        with self.owner(far, home, tmp_path, script) as (process, run_id):
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
        arrived = (far.home / "carried" / run_id / "in").stat()
        wanted = ContainerJob(**given(far, home, tmp_path, run_id), attempt=2, command=("sh", "-c", script))
        with lease.hold(wanted.lease, 2):
            assert engine.find(wanted)
            log = Log()
            assert engine.run(wanted, log).reason is Reason.OK
        assert log.text("stdout") == b"begun\nend\n"
        assert (output(wanted) / "big").read_bytes() == (tmp_path / "big").read_bytes()
        assert arrived.st_ctime < time.time() - 3, "the input was not sent again"
        assert engine.calls.get("create jobs", 0) == 0

    def test_a_retry_of_what_had_sent_a_part_begins_anew(
        self, far: TestCluster, engine: Any, home: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "big").write_bytes(os.urandom(200_000_000))
        with self.owner(far, home, tmp_path, "cp input/big output") as (_, run_id):
            claim = far.home / "carried" / run_id
            eventually(lambda: [path for path in claim.glob("in.*/0/big") if path.stat().st_size > MIB], 60)
        wanted = ContainerJob(**given(far, home, tmp_path, run_id), attempt=2, command=("sh", "-c", "cp input/big output"))
        with lease.hold(wanted.lease, 2):
            assert not engine.find(wanted)
            assert engine.run(wanted, Log()).reason is Reason.OK
        assert (output(wanted) / "big").read_bytes() == (tmp_path / "big").read_bytes()
        eventually(lambda: [path.name for path in (far.home / "carried").iterdir()] == [], 60)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
    def test_only_what_nobody_owns_is_reaped(
        self, far: TestCluster, engine: Any, home: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with self.owner(far, home, tmp_path, FOREVER) as (process, run_id):
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            process.send_signal(number)
            if number is signal.SIGKILL:
                process.wait()
            os.utime(home / "workspaces" / run_id / "lease", (1, 1))
            with monkeypatch.context() as elsewhere:
                elsewhere.setattr("oasis_flows.engines.kubernetes.gethostname", lambda: f"not-{socket.gethostname()}")
                assert far.engine.reap(grace_seconds=0, below=far.home / "workspaces") == ()
            gone = engine.reap(grace_seconds=0, below=home / "workspaces")
            assert (run_id in gone) == (number is signal.SIGKILL)
            engine.reap(run_id)


def test_a_server_that_stays_away_is_said(far: TestCluster, job: MakeJob, home: Path) -> None:
    with proxied(far, patience_seconds=4) as (proxy, near):
        engine = KubernetesEngine(
            replace(near._place, home=home, carrier=carrier_of(far)), near._find_access, patience_seconds=4
        )
        ran = Ran(engine, job(FOREVER))
        ran.until_begun()
        proxy.set(Faults(refuse=True))
        with pytest.raises(EngineUnavailable, match="can be retried"):
            ran.result()
    assert carrying(far, home).reap(ran.job.run_id) == (ran.job.run_id,)
    eventually(lambda: far.left() == [], 60)
