"""The Kubernetes engine on the cluster that KUBECONFIG names: ends, refusals, and what may happen to a Job from outside.

Collected only where there is one: see `tests/conftest.py`. What it does not prove: other versions of Kubernetes, other runtimes, more than
one node (`test_kubernetes_nodes.py`), and whether a network plugin acts on policies.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
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

from oasis_flows.capacity import Node
from oasis_flows.engines import pod as spec
from oasis_flows.engines.kube_access import find_access
from oasis_flows.engines.kubernetes import KubernetesEngine
from oasis_flows.errors import (
    ContainerLost,
    EngineError,
    EngineUnavailable,
    Evicted,
    ImageNotFound,
    NoCapacity,
    NoRoom,
    OasisError,
)
from oasis_flows.job import ContainerExit, ContainerJob, Mount, Reason, Resources, Sandbox, StorageMount
from tests.contract.test_engine import Log
from tests.servers.cluster import TestCluster
from tests.servers.engine import eventually
from tests.servers.faultproxy import FaultProxy, Faults, between

MIB = 1 << 20
SMALL = Resources(cpus=0.1, memory_bytes=64 * MIB)
FOREVER = "echo begun; while :; do sleep 0.2; done"
MakeJob = Callable[..., ContainerJob]


@pytest.fixture
def job(cluster: TestCluster, make_job: MakeJob) -> Iterator[MakeJob]:
    """Makes a small job of a script; whatever happens to it, nothing may stay in the cluster."""

    def make(script: str, **changes: Any) -> ContainerJob:
        given = {"image": cluster.image, "resources": SMALL, "stop_grace_seconds": 1, "timeout_seconds": 300, **changes}
        return make_job("sh", "-c", script, **given)

    yield make
    eventually(lambda: cluster.left() == [], 30)


@pytest.fixture
def engine(cluster: TestCluster) -> KubernetesEngine:
    return cluster.engine


def another(cluster: TestCluster, told: list[str] | None = None, **changes: Any) -> KubernetesEngine:
    """Another engine of the same cluster, of which `told` gets what it says."""
    place = spec.Place(namespace=cluster.namespace, claim=cluster.claim, home=cluster.home, pending_seconds=120)
    return KubernetesEngine(replace(place, **changes), tell=(told if told is not None else []).append, patience_seconds=60)


def only_node(cluster: TestCluster) -> Node:
    """The one node that takes pods."""
    (node,) = (each for each in cluster.engine.nodes() if not each.closed)
    return node


class Ran:
    """A job that runs in a thread of its own."""

    def __init__(self, engine: KubernetesEngine, job: ContainerJob) -> None:
        self.job, self.log = job, Log()
        self.exit: ContainerExit | None = None
        self.error: BaseException | None = None
        self.ended_at = 0.0
        self._engine = engine
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.exit = self._engine.run(self.job, self.log)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error
        self.ended_at = time.monotonic()

    def until_begun(self) -> None:
        eventually(lambda: b"begun" in self.log.text("stdout") or self.ended_at, 60)
        assert not self.ended_at, (self.exit, self.error)

    def result(self) -> ContainerExit:
        self._thread.join(150)
        assert self.ended_at, "it still runs"
        if self.error is not None:
            raise self.error
        assert self.exit is not None
        return self.exit


class TestEnds:
    EAT = "echo 1000 > /proc/self/oom_score_adj; x=$(yes | head -c 90000000)"

    @pytest.mark.parametrize(
        ("script", "reason", "code"),
        [
            (EAT, Reason.OUT_OF_MEMORY, 137),
            (f"({EAT}); exit 3", Reason.OUT_OF_MEMORY, 3),
            (f"({EAT}); exit 0", Reason.OUT_OF_MEMORY, 0),
            ("kill -9 $$", Reason.KILLED, 137),
            ("kill -SEGV $$", Reason.EXIT_NONZERO, 139),
        ],
        ids=["memory", "memory in a child", "memory in a child that nobody missed", "killed", "crashed"],
    )
    def test_a_death_has_its_reason(self, engine: Any, job: MakeJob, script: str, reason: Reason, code: int) -> None:
        ended = engine.run(job(script), Log())
        assert (ended.reason, ended.exit_code) == (reason, code)
        if reason is Reason.OUT_OF_MEMORY:
            assert ended.memory_limit_bytes == 64 * MIB

    @pytest.mark.parametrize(
        ("command", "reason"),
        [
            ("notacommand", Reason.COMMAND_NOT_FOUND),
            ("/not/there", Reason.COMMAND_NOT_FOUND),
            ("/opt/noexec", Reason.NOT_EXECUTABLE),
            ("/opt/elsewhere", Reason.EXEC_FORMAT),
        ],
    )
    def test_a_command_that_cannot_start(self, engine: Any, job: MakeJob, command: str, reason: Reason) -> None:
        assert engine.run(replace(job("true"), command=(command,)), Log()).reason is reason

    def test_who_ignores_sigterm_ends_with_the_grace(self, engine: Any, job: MakeJob) -> None:
        ended = engine.run(job("trap '' TERM; " + FOREVER, timeout_seconds=2), Log())
        assert (ended.reason, ended.exit_code) == (Reason.TIMED_OUT, 137)

    def test_what_it_says_after_sigterm_is_in_its_log(self, engine: Any, job: MakeJob) -> None:
        log = Log()
        script = "trap 'echo last; exit 5' TERM; " + FOREVER
        ended = engine.run(job(script, timeout_seconds=2, stop_grace_seconds=20), log)
        assert (ended.reason, ended.exit_code) == (Reason.TIMED_OUT, 5)
        assert log.text("stdout") == b"begun\nlast\n"

    def test_too_much_on_its_nodes_disk(self, cluster: TestCluster, job: MakeJob) -> None:
        """Kubelet looks every ten seconds or so."""
        script = "head -c 9000000 /dev/zero > /x; " + FOREVER
        try:
            ended = another(cluster, ephemeral_bytes=4 * MIB).run(job(script, sandbox=Sandbox(writable_root=True)), Log())
        except Evicted as error:
            pytest.fail(f"its own excess was taken for somebody else's: {error}")
        assert ended.reason is Reason.EVICTED
        assert "ephemeral" in ended.detail


class TestWaitingInVain:
    @pytest.mark.parametrize(
        ("changes", "error", "words"),
        [
            ({"image": "UPPER/case:1"}, ImageNotFound, "not an image's name"),
            ({"image": "{registry}/no-such-image:1"}, ImageNotFound, "no image"),
            ({"resources": Resources(cpus=1000)}, NoCapacity, "No node"),
            ({"resources": Resources(cpus=0.1, memory_bytes=1 << 50)}, NoCapacity, "No node"),
            (
                {"storages": (StorageMount(source="no-such-claim", target="/data", read_only=True),)},
                EngineError,
                "claim that the algorithm needs is not there",
            ),
            ({"storages": (StorageMount(source="/no/such/folder", target="/d", read_only=True),)}, EngineError, "not there"),
        ],
        ids=["name of an image", "image", "processors", "memory", "claim", "folder of the node"],
    )
    def test_it_fails_at_once(
        self, cluster: TestCluster, engine: Any, job: MakeJob, changes: dict[str, Any], error: type[OasisError], words: str
    ) -> None:
        registry = cluster.image.partition("/")[0]
        given = {key: value.format(registry=registry) if key == "image" else value for key, value in changes.items()}
        began = time.monotonic()
        with pytest.raises(error, match=words):
            engine.run(job("true", **given), Log())
        assert time.monotonic() - began < 60

    def test_a_full_cluster_is_waited_for_and_told(self, cluster: TestCluster, job: MakeJob) -> None:
        told: list[str] = []
        node = only_node(cluster)
        most = Resources(cpus=node.allocatable.millicpus / 1000 * 0.9, memory_bytes=64 * MIB)
        first = Ran(cluster.engine, job("echo begun; sleep 6", resources=most))
        first.until_begun()
        second = Ran(another(cluster, told), job("echo begun", resources=most))
        assert second.result().reason is Reason.OK
        assert first.result().reason is Reason.OK
        assert any("Insufficient cpu" in line for line in told)
        assert any("has started on" in line for line in told)

    def test_patience_ends(self, cluster: TestCluster, job: MakeJob) -> None:
        node = only_node(cluster)
        most = Resources(cpus=node.allocatable.millicpus / 1000 * 0.9, memory_bytes=64 * MIB)
        first = Ran(cluster.engine, job(FOREVER, resources=most))
        first.until_begun()
        with pytest.raises(NoRoom, match="Insufficient cpu"):
            another(cluster, pending_seconds=3).run(job("true", resources=most), Log())
        cluster.engine.reap(first.job.run_id)
        with pytest.raises(ContainerLost):
            first.result()


class TestKills:
    def delete(self, cluster: TestCluster, kind: str, run_id: str, **options: Any) -> float:
        """Delete what a run has of a kind, as somebody might; return when."""
        (row,) = cluster.objects(kind, run_id)
        path = f"/apis/batch/v1/namespaces/{cluster.namespace}/jobs" if kind == "jobs" else cluster.core(kind)
        cluster.api.call(
            "DELETE", f"{path}/{row['metadata']['name']}", {"apiVersion": "v1", "kind": "DeleteOptions", **options}
        )
        return time.monotonic()

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("jobs", {"propagationPolicy": "Background"}),
            ("jobs", {"propagationPolicy": "Foreground"}),
            ("jobs", {"propagationPolicy": "Orphan"}),
            ("pods", {}),
            ("pods", {"gracePeriodSeconds": 0}),
        ],
        ids=["job", "job in the foreground", "job without its pod", "pod", "pod by force"],
    )
    def test_a_deletion_is_noticed(
        self, cluster: TestCluster, engine: Any, job: MakeJob, kind: str, options: dict[str, Any]
    ) -> None:
        ran = Ran(engine, job(FOREVER))
        ran.until_begun()
        self.delete(cluster, kind, ran.job.run_id, **options)
        with pytest.raises(ContainerLost, match=r"[rR]un it again"):
            ran.result()

    def test_an_eviction_is_told_apart(self, cluster: TestCluster, engine: Any, job: MakeJob) -> None:
        ran = Ran(engine, job(FOREVER))
        ran.until_begun()
        (row,) = cluster.objects("pods", ran.job.run_id)
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": row["metadata"]["name"], "namespace": cluster.namespace},
        }
        cluster.api.call("POST", f"{cluster.core('pods')}/{row['metadata']['name']}/eviction", body)
        with pytest.raises(Evicted, match="EvictionByEvictionAPI"):
            ran.result()

    def test_a_server_that_is_away_is_waited_for_and_no_line_is_lost(self, cluster: TestCluster, job: MakeJob) -> None:
        count = 150
        script = f"echo begun; i=0; while [ $i -lt {count} ]; do echo line $i; i=$((i+1)); sleep 0.1; done"
        with proxied(cluster) as (proxy, engine):
            ran = Ran(engine, job(script))
            ran.until_begun()
            proxy.set(Faults(refuse=True))
            time.sleep(6)
            proxy.set(Faults())
            assert ran.result().reason is Reason.OK
        assert ran.log.text("stdout").splitlines() == [b"begun", *(b"line %d" % number for number in range(count))]

    def test_a_job_that_ends_while_the_server_is_away(self, cluster: TestCluster, job: MakeJob) -> None:
        with proxied(cluster) as (proxy, engine):
            ran = Ran(engine, job("echo begun; sleep 3; echo end; exit 4"))
            ran.until_begun()
            proxy.set(Faults(refuse=True))
            time.sleep(8)
            proxy.set(Faults())
            ended = ran.result()
        assert (ended.reason, ended.exit_code) == (Reason.EXIT_NONZERO, 4)
        assert ran.log.text("stdout") == b"begun\nend\n"

    def test_connections_that_break_all_the_time(self, cluster: TestCluster, job: MakeJob) -> None:
        count = 200
        script = f"echo begun; i=0; while [ $i -lt {count} ]; do echo line $i; i=$((i+1)); sleep 0.05; done"
        with proxied(cluster) as (proxy, engine):
            ran = Ran(engine, job(script))
            ran.until_begun()
            while not ran.ended_at:
                time.sleep(1.5)
                proxy.drop()
            assert ran.result().reason is Reason.OK
        assert ran.log.text("stdout").splitlines() == [b"begun", *(b"line %d" % number for number in range(count))]

    def test_a_server_that_stays_away(self, cluster: TestCluster, job: MakeJob) -> None:
        with proxied(cluster, patience_seconds=4) as (proxy, engine):
            ran = Ran(engine, job(FOREVER))
            ran.until_begun()
            proxy.set(Faults(refuse=True))
            with pytest.raises(EngineUnavailable, match="can be retried"):
                ran.result()
        # Nobody could remove it; its lease would tell the reaper, or a retry takes it up.
        assert cluster.engine.reap(ran.job.run_id) == (ran.job.run_id,)


@contextlib.contextmanager
def proxied(cluster: TestCluster, patience_seconds: float = 60) -> Iterator[tuple[FaultProxy, KubernetesEngine]]:
    """An engine whose way to the API server can be cut."""
    access = find_access()
    found = re.fullmatch(r"https?://(?:127\.0\.0\.1|localhost):(\d+)", access.server)
    assert found, f"this test needs an API server on this machine's loopback, not {access.server}"
    with between(int(found[1])) as proxy:
        near = replace(access, server=access.server.replace(found[1], str(proxy.port)))
        place = spec.Place(namespace=cluster.namespace, claim=cluster.claim, home=cluster.home, pending_seconds=120)
        yield proxy, KubernetesEngine(place, lambda: near, patience_seconds=patience_seconds)


class TestLog:
    def test_a_log_that_is_turned_over_many_times_arrives_whole(self, engine: Any, job: MakeJob) -> None:
        """Kubelet turns it over at 10 MiB, when it looks, which is every ten seconds; 60 MB take two or three."""
        count = 600_000
        say = f"""awk 'BEGIN {{ for (i = 1; i <= {count // 12}; i++) printf "%099d\\n", i }}'"""
        script = f"i=0; while [ $i -lt 12 ]; do {say}; i=$((i+1)); sleep 2; done"
        log, line = Log(), re.compile(rb"\d{99}\n")
        ended = engine.run(job(script, resources=replace(SMALL, cpus=1.0)), log)
        assert ended.reason is Reason.OK
        whole = log.text("stdout")
        assert len(whole) == count * 100
        assert [int(found) for found in line.findall(whole)] == list(range(1, count // 12 + 1)) * 12

    def test_a_flood_arrives_whole_or_is_said_to_be_cut(self, engine: Any, job: MakeJob) -> None:
        """As fast as it goes, and over before it is read: the files that kubelet made meanwhile have to be asked for."""
        log, size = Log(), 120_000_000
        script = f"yes {'y' * 99} | head -c {size}"
        ended = engine.run(job(script, resources=replace(SMALL, cpus=1.0)), log)
        assert ended.reason is Reason.OK
        whole = log.text("stdout")
        assert whole == (b"y" * 99 + b"\n") * (len(whole) // 100)
        assert len(whole) == size or ended.log_lost

    def test_bytes_arrive_as_they_are(self, engine: Any, job: MakeJob) -> None:
        log = Log()
        engine.run(job(r"printf '\377\000\001no newline \303'; exit 0"), log)
        assert log.text("stdout") == b"\xff\x00\x01no newline \xc3"

    def test_a_line_without_an_end_is_no_trouble(self, engine: Any, job: MakeJob) -> None:
        log = Log()
        engine.run(job("head -c 5000000 /dev/zero | tr '\\0' x; echo; echo end"), log)
        assert log.text("stdout") == b"x" * 5_000_000 + b"\nend\n"


OWNER = """
import sys, time
from pathlib import Path
from oasis_flows import lease
from oasis_flows.engines import pod as spec
from oasis_flows.engines.kubernetes import KubernetesEngine
from oasis_flows.job import ContainerJob, Resources
namespace, claim, home, image, run_id, path, script = sys.argv[1:]
engine = KubernetesEngine(spec.Place(namespace=namespace, claim=claim, home=Path(home)))
resources = Resources(cpus=0.1, memory_bytes=64 << 20)
with lease.hold(Path(path)):
    job = ContainerJob(run_id=run_id, image=image, lease=Path(path), command=("sh", "-c", script), resources=resources,
                       stop_grace_seconds=1, timeout_seconds=300)
    engine.run(job, lambda stream, data: (sys.stdout.buffer.write(data), sys.stdout.flush()))
"""


class TestDeaths:
    @contextlib.contextmanager
    def owner(self, cluster: TestCluster, script: str) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
        """A process of its own that runs a script, and has begun; its run's id, and its lease."""
        run_id = f"test-{uuid.uuid4().hex}"
        path = cluster.home / "workspaces" / run_id / "lease"
        path.parent.mkdir(parents=True)
        given = [cluster.namespace, cluster.claim, str(cluster.home), cluster.image, run_id, str(path), script]
        with subprocess.Popen([sys.executable, "-c", textwrap.dedent(OWNER), *given], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"begun\n"
                yield process, run_id, path
            finally:
                process.kill()

    def test_a_retry_takes_up_the_job_of_a_process_that_was_killed(
        self, cluster: TestCluster, engine: Any, job: MakeJob, tmp_path: Path
    ) -> None:
        script = f"echo begun; until [ -e {tmp_path}/never ]; do sleep 0.2; i=$((i+1)); [ $i -lt 60 ] || break; done; echo end"
        with self.owner(cluster, script) as (process, run_id, path):
            process.send_signal(signal.SIGKILL)
            process.wait()
            wanted = replace(job(script, run_id=run_id), lease=path)
            assert engine.find(wanted)
            log = Log()
            assert engine.run(wanted, log).reason is Reason.OK
            assert log.text("stdout") == b"begun\nend\n"

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
    def test_only_what_nobody_owns_is_reaped(self, cluster: TestCluster, engine: Any, number: signal.Signals) -> None:
        with self.owner(cluster, FOREVER) as (process, run_id, path):
            process.send_signal(number)
            if number is signal.SIGKILL:
                process.wait()
            os.utime(path, (1, 1))
            gone = engine.reap(grace_seconds=0, below=cluster.home / "workspaces")
            assert (run_id in gone) == (number is signal.SIGKILL)
            engine.reap(run_id)
        eventually(lambda: not cluster.objects("pods", run_id), 30)


class TestPlaces:
    def test_a_wrong_folder_is_found_out_before_the_algorithm_starts(
        self, cluster: TestCluster, make_job: MakeJob, tmp_path: Path
    ) -> None:
        """A home that is not the claim's: kubelet would make empty folders for it."""
        (tmp_path / "output").mkdir()
        mounts = (Mount(source=tmp_path / "output", target="/work/output", read_only=False),)
        wanted = make_job("sh", "-c", "echo ran", image=cluster.image, mounts=mounts, resources=SMALL)
        log = Log()
        with pytest.raises(EngineError, match="not on the claim"):
            another(cluster, home=tmp_path).run(wanted, log)
        assert log.pieces == []

    def test_a_claim_of_many_nodes_binds_no_algorithm_to_that_of_its_flow(self, cluster: TestCluster, job: MakeJob) -> None:
        """As from a flow run's pod, which says on which node it is."""
        node = only_node(cluster)
        ran = Ran(another(cluster, node=node.name), job("echo begun; sleep 3"))
        ran.until_begun()
        (row,) = cluster.objects("pods", ran.job.run_id)
        assert ran.result().reason is Reason.OK
        assert "affinity" not in row["spec"]
