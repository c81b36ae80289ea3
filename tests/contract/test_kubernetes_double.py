"""The Kubernetes engine over a double of the API server: what it asks, follows, resumes, refuses and leaves behind.

What that does not prove is said in `tests/servers/kube.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from oasis_flows import lease
from oasis_flows.engines import kube_run, kubernetes, pod as spec
from oasis_flows.engines.kube_access import Access, from_content
from oasis_flows.engines.kubernetes import KubernetesEngine
from oasis_flows.errors import (
    ContainerLost,
    EngineUnavailable,
    Evicted,
    ImageNotFound,
    NoCapacity,
    NoGpu,
    NoRoom,
    StoreFull,
    UnsupportedByEngine,
)
from oasis_flows.job import ContainerJob, ImageSource, Reason, RegistryLogin, Resources
from tests.contract.test_engine import Log
from tests.servers.kube import Double, Script, double_of_a_cluster, ended, running, status

ROOT = Path(__file__).parents[2]
LINES = (*(f"line {number} \xe4".encode() + b"\xff\0\n" for number in range(200)), b"no newline")
RUNS = ((0.0, running()), (0.2, ended()))


@pytest.fixture
def cluster() -> Iterator[tuple[Double, Access]]:
    with double_of_a_cluster() as (double, address):
        config = {
            "current-context": "x",
            "clusters": [{"name": "c", "cluster": {"server": address}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "flows"}}],
        }
        yield double, from_content(config)


@pytest.fixture
def double(cluster: tuple[Double, Access]) -> Double:
    return cluster[0]


class Told(list[str]):
    """What people were told while something waited."""


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def engine(cluster: tuple[Double, Access], tmp_path: Path, told: Told) -> KubernetesEngine:
    place = spec.Place(namespace="", claim="work", home=tmp_path)
    return KubernetesEngine(place, lambda: cluster[1], tell=told.append, patience_seconds=20)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., ContainerJob]]:
    with contextlib.ExitStack() as held:

        def make(**changes: Any) -> ContainerJob:
            run_id = changes.pop("run_id", str(uuid.uuid4()))
            path = tmp_path / "workspaces" / run_id / "lease"
            if changes.pop("own", True):
                held.enter_context(lease.hold(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            return ContainerJob(**{"run_id": run_id, "image": "i@sha256:1", "lease": path, "command": ("x",), **changes})

        yield make


Make = Callable[..., ContainerJob]


def nothing_left(double: Double) -> bool:
    return not double.jobs and not double.pods and not [name for name in double.others if name.startswith("secrets/")]


class TestRun:
    def test_a_run_is_followed_to_its_end_and_removed(self, engine, double, job):
        double.script = Script(states=RUNS, log=LINES)
        log = Log()
        found = engine.run(job(), log)

        assert (found.reason, found.exit_code) == (Reason.OK, 0)
        assert log.text("stdout") == b"".join(LINES)
        assert found.in_force["network"] == "none"
        assert nothing_left(double)

    def test_an_end_that_comes_with_the_start_is_seen(self, engine, double, job):
        double.script = Script(states=((0.0, ended("02-exit-3")),), log=())

        assert engine.run(job(), Log()).exit_code == 3

    def test_secrets_are_made_for_the_run_and_go_with_it(self, engine, double, job):
        double.script = Script(states=RUNS)
        engine.run(job(secret_environment={"KEY": "s3cret"}), Log())

        assert double.calls.count("create secrets") == 1
        assert double.calls.count("delete secrets") == 0
        assert nothing_left(double)

    def test_fifty_at_once_share_one_watch_and_need_few_calls(self, engine, double, job):
        double.script = Script(states=((0.5, running()), (1.0, ended())), log=LINES)
        jobs = [job(secret_environment={"KEY": "s3cret"}) for _ in range(50)]
        ends: list[Any] = []

        def run(each: ContainerJob) -> None:
            assert not engine.find(each)
            ends.append(engine.run(each, Log()).reason)

        threads = [threading.Thread(target=run, args=(each,)) for each in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert ends == [Reason.OK] * 50
        assert double.most_watches == 1
        # A Job that has no pod after two seconds, as on a slow machine, is looked at.
        shared = (
            "get jobs",
            "watch pods",
            "list pods",
            "get /version",
            "list events",
            "get networkpolicies",
            "create networkpolicies",
        )
        assert sum(call not in shared for call in double.calls) <= 5 * 50
        assert nothing_left(double)

    def test_the_time_limit_ends_it_with_its_own_reason(self, engine, double, job):
        double.script = Script(states=((0.0, running()),))
        log = Log()
        found = engine.run(job(timeout_seconds=0.5, stop_grace_seconds=1), log)

        assert found.reason is Reason.TIMED_OUT
        assert log.text("stdout") == b"begun\n"
        assert nothing_left(double)

    def test_a_log_that_passes_its_limit_ends_it(self, engine, double, job):
        double.script = Script(states=((0.0, running()),), log=LINES)
        log = Log()
        found = engine.run(job(resources=Resources(log_bytes=100)), log)

        assert (found.reason, found.limit_passed) == (Reason.LOG_TOO_LARGE, 100)
        assert log.text("stdout") == b"".join(LINES)[:100]

    def test_what_the_sink_raises_is_raised_and_the_job_goes(self, engine, double, job):
        def full(*_: object) -> None:
            raise StoreFull("The disk of the log is full.")

        double.script = Script(states=((0.0, running()),))
        with pytest.raises(StoreFull):
            engine.run(job(stop_grace_seconds=0), full)

        assert nothing_left(double)

    @pytest.mark.parametrize("thread", ["oasis-watch-flows", "oasis-log-read", "oasis-log-write"])
    def test_a_signal_while_a_thread_begins_is_raised_as_what_it_is(self, engine, double, job, monkeypatch, thread):
        """A busy machine takes its time to begin a thread, and a signal arrives then."""

        class Told(BaseException):
            pass

        def raise_it(*_: object) -> None:
            raise Told

        def begin(each: threading.Thread) -> None:
            start(each)
            if each.name == thread:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.2)

        start = threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", begin)
        double.script = Script(states=((0.0, running()),))
        before = signal.signal(signal.SIGUSR1, raise_it)
        try:
            with pytest.raises(Told):
                engine.run(job(stop_grace_seconds=0), Log())
        finally:
            signal.signal(signal.SIGUSR1, before)

        assert nothing_left(double)
        deadline = time.monotonic() + 10
        while double.watches and time.monotonic() < deadline:
            time.sleep(0.05)
        assert double.watches == 0

    def test_the_login_of_a_job_that_is_refused_goes(self, engine, double, job):
        double.refuses = "jobs"
        engine._pulled["i@sha256:1"] = spec.Pulled(login=RegistryLogin(registry="r", username="u", password="p"))
        with pytest.raises(NoRoom, match="exceeded quota"):
            engine.run(job(), Log())

        assert double.calls.count("create secrets") == 1
        assert nothing_left(double)

    def test_a_pod_that_the_cluster_made_looser_is_stopped(self, engine, double, job, monkeypatch):
        monkeypatch.setattr(spec, "in_force", lambda pod, version: {**real(pod, version), "privileged": True})
        double.script = Script(states=((0.0, running()),))
        with pytest.raises(UnsupportedByEngine, match="privileged"):
            engine.run(job(stop_grace_seconds=0), Log())

        assert nothing_left(double)


real = spec.in_force


class TestBrokenWays:
    @pytest.mark.parametrize("cuts", [[1], [40, 41, 200], [997, 998, 5000], [60] * 5])
    def test_a_log_is_whole_whatever_is_cut(self, engine, double, job, cuts):
        double.script = Script(states=((0.0, running()), (1.0 + len(cuts) * 1.5, ended())), log=LINES)
        double.cut_log_after = list(cuts)
        log = Log()

        assert engine.run(job(), log).reason is Reason.OK
        assert log.text("stdout") == b"".join(LINES)

    def test_a_server_that_is_away_for_a_while_is_waited_for(self, engine, double, job):
        double.script = Script(states=((0.0, running()), (1.5, ended())), log=LINES)

        def leave() -> None:
            time.sleep(0.7)
            double.away = True
            double.cut()
            time.sleep(2.5)
            double.away = False

        threading.Thread(target=leave, daemon=True).start()
        log = Log()

        assert engine.run(job(), log).reason is Reason.OK
        assert log.text("stdout") == b"".join(LINES)
        assert nothing_left(double)

    def test_a_server_that_stays_away_ends_the_patience(self, cluster, tmp_path, job):
        double, access = cluster
        place = spec.Place(namespace="", claim="work", home=tmp_path)
        engine = KubernetesEngine(place, lambda: access, patience_seconds=3)
        double.script = Script(states=((0.0, running()),))

        def leave() -> None:
            time.sleep(0.7)
            double.away = True
            double.cut()

        threading.Thread(target=leave, daemon=True).start()
        with pytest.raises(EngineUnavailable, match="can be retried"):
            engine.run(job(stop_grace_seconds=0), Log())

    def test_a_watch_that_is_too_old_begins_anew(self, engine, double, job):
        double.script = Script(states=((0.0, running()), (2.0, ended())))

        def forget() -> None:
            time.sleep(0.5)
            double.forgets_before = 10**9
            double.cut()
            time.sleep(0.5)
            double.forgets_before = 0

        threading.Thread(target=forget, daemon=True).start()

        assert engine.run(job(), Log()).reason is Reason.OK

    @pytest.mark.parametrize("policy", ["Background", None])
    def test_a_job_that_somebody_deletes_is_noticed_within_two_seconds(self, engine, double, job, policy):
        double.script = Script(states=((0.0, running()),))
        deleted: list[float] = []

        def delete() -> None:
            time.sleep(0.7)
            deleted.append(time.monotonic())
            double.delete_job(next(iter(double.jobs)), policy)

        threading.Thread(target=delete, daemon=True).start()
        with pytest.raises(ContainerLost, match="Somebody deleted"):
            engine.run(job(stop_grace_seconds=0), Log())

        assert time.monotonic() - deleted[0] < 7  # the removal that follows is in it
        assert nothing_left(double)

    def test_a_deletion_is_told_while_the_container_still_ends(self, engine, double, job, told):
        double.script, double.seconds_to_die = Script(states=((0.0, running()),)), 3.0
        heard: list[float] = []

        def delete() -> None:
            time.sleep(0.7)
            began = time.monotonic()
            double.delete_job(next(iter(double.jobs)), "Background")
            while not any("being deleted" in line for line in told) and time.monotonic() < began + 30:
                time.sleep(0.02)
            heard.append(time.monotonic() - began)

        deleting = threading.Thread(target=delete)
        deleting.start()
        with pytest.raises(ContainerLost, match="Somebody deleted"):
            engine.run(job(), Log())
        deleting.join()

        assert heard[0] < 2
        assert sum("being deleted" in line for line in told) == 1

    @pytest.mark.parametrize("lost_node", [True, False])
    def test_a_pod_of_whose_end_nobody_hears_is_given_up(self, engine, double, job, told, monkeypatch, lost_node):
        """As of a node that is lost: the cluster deletes its pods, and no kubelet says that they are gone."""
        silent = running()
        next(each for each in silent["conditions"] if each["type"] == "Ready")["status"] = "False"
        monkeypatch.setattr(kube_run, "_SECONDS_TO_DIE", 2.0)
        monkeypatch.setattr(kubernetes, "_SECONDS_TO_GO", 1.0)
        double.script, double.seconds_to_die = (
            Script(states=((0.0, running()), (0.2, silent if lost_node else running()))),
            3600.0,
        )
        threading.Timer(0.7, lambda: double.delete_pod(next(iter(double.pods)))).start()

        words = "The node k8s-node does not answer" if lost_node else "The pod .* does not die"
        with pytest.raises(ContainerLost, match=words) as lost:
            engine.run(job(), Log())

        assert lost.value.transient
        assert any("being deleted" in line for line in told)
        assert not double.jobs

    def test_what_is_not_ready_by_itself_is_no_silence_of_its_node(self, engine, double, job, told):
        """Such as a sidecar that a mesh puts in; or a condition that somebody has pods wait for."""
        states = [running(), running()]
        for state, reason, types in zip(states, ("ContainersNotReady", "ReadinessGatesNotReady"), (2, 1), strict=True):
            for kind in ("Ready", "ContainersReady")[:types]:
                next(each for each in state["conditions"] if each["type"] == kind).update(status="False", reason=reason)
        double.script = Script(states=((0.0, states[0]), (0.3, states[1]), (0.3, ended())))

        assert engine.run(job(), Log()).reason is Reason.OK
        assert not any("answers" in line for line in told)

    def test_a_node_that_says_nothing_for_a_while_is_told_of_and_waited_for(self, engine, double, job, told):
        silent = running()
        next(each for each in silent["conditions"] if each["type"] == "Ready")["status"] = "False"
        double.script = Script(states=((0.0, running()), (0.3, silent), (0.3, running()), (0.3, ended())))

        assert engine.run(job(), Log()).reason is Reason.OK
        said = [line for line in told if "k8s-node" in line and "answers" in line]
        assert ["no longer answers" in line for line in said] == [True, False]

    def test_an_eviction_says_so(self, engine, double, job):
        last = running()
        last["conditions"].append(
            {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "m"}
        )
        last["containerStatuses"][0]["state"] = ended("14-sigterm-143")["containerStatuses"][0]["state"]
        double.script = Script(states=((0.0, running()), (0.3, last)))
        with pytest.raises(Evicted, match="EvictionByEvictionAPI"):
            engine.run(job(), Log())

    def test_what_a_node_did_not_bring_to_its_end_is_tried_elsewhere_and_nothing_else_is(self, engine, double, job):
        """The same run by its next attempt; a run that its own algorithm failed may come back."""

        def avoided(run: ContainerJob, attempt: int, *states: tuple[float, Any]) -> list[str]:
            double.script = Script(states=((0.0, running()), *states))
            with contextlib.suppress(Evicted):
                engine.run(replace(run, attempt=attempt), Log())
            affinity = double.history[-1]["object"]["spec"].get("affinity", {}).get("nodeAffinity", {})
            wishes = affinity.get("preferredDuringSchedulingIgnoredDuringExecution", ())
            return [name for wish in wishes for each in wish["preference"]["matchFields"] for name in each["values"]]

        lost = running()
        lost["conditions"].append(
            {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager", "message": "m"}
        )
        lost["containerStatuses"][0]["state"] = ended("14-sigterm-143")["containerStatuses"][0]["state"]
        unlucky, another = job(), job()
        assert avoided(unlucky, 1, (0.2, lost)) == []
        assert avoided(unlucky, 2, (0.2, ended("02-exit-3"))) == ["k8s-node"]
        assert avoided(another, 1, (0.2, ended("02-exit-3"))) == []
        assert avoided(another, 2, (0.2, ended())) == []


class TestWaiting:
    def test_the_reason_is_told_while_it_waits(self, engine, double, job, told):
        double.script = Script(states=((0.0, status("20-unschedulable-cpu")), (1.0, running()), (0.3, ended())))

        assert engine.run(job(), Log()).reason is Reason.OK
        assert any("Insufficient cpu" in line for line in told)
        assert any("has started on" in line for line in told)

    @pytest.mark.parametrize(
        ("recorded", "changes", "error"),
        [
            ("20-unschedulable-cpu", {"resources": Resources(cpus=10_000)}, NoCapacity),
            ("29-gpu-more-than-exist", {"resources": Resources(gpus=100)}, NoGpu),
            ("33-image-not-found", {}, ImageNotFound),
        ],
    )
    def test_what_waits_in_vain_fails_at_once(self, engine, double, job, recorded, changes, error):
        double.script = Script(states=((0.0, status(recorded)),))
        began = time.monotonic()
        with pytest.raises(error):
            engine.run(job(**changes), Log())

        assert time.monotonic() - began < 10
        assert nothing_left(double)

    def test_a_quota_that_is_used_up_is_told_by_events_alone(self, engine, double, job, told):
        words = 'Error creating: pods "x" is forbidden: exceeded quota: q, requested: cpu=1, used: cpu=1, limited: cpu=1'
        double.script = Script(events=[{"reason": "FailedCreate", "type": "Warning", "message": words}])
        engine._place = replace(engine._place, pending_seconds=5)
        with pytest.raises(NoRoom, match="exceeded quota"):
            engine.run(job(), Log())

        assert any("exceeded quota" in line for line in told)

    def test_a_job_that_is_deleted_before_it_began_is_lost(self, engine, double, job):
        def delete() -> None:
            while not double.jobs:
                time.sleep(0.05)
            double.delete_job(next(iter(double.jobs)), "Background")

        threading.Thread(target=delete, daemon=True).start()
        with pytest.raises(ContainerLost, match="before it began"):
            engine.run(job(), Log())


class TestRetries:
    def test_a_retry_takes_up_the_job_of_its_predecessor(self, engine, double, job):
        double.script = Script(states=((0.0, running()), (2.0, ended())), log=LINES)
        wanted = job()
        engine._close_network(engine._open(), wanted)
        double.make_job(spec.job_body(wanted, engine._open().place, spec.Pulled()))
        time.sleep(0.5)

        assert engine.find(wanted)
        log = Log()
        assert engine.run(wanted, log).reason is Reason.OK
        assert double.calls.count("create jobs") == 0
        assert log.text("stdout") == b"".join(LINES)
        assert nothing_left(double)

    def test_a_job_of_another_description_is_removed(self, engine, double, job):
        double.script = Script(states=((0.0, running()),))
        wanted = job()
        double.make_job(spec.job_body(replace(wanted, command=("else",)), engine._open().place, spec.Pulled()))

        assert not engine.find(wanted)
        assert not double.jobs


class TestReap:
    def test_jobs_whose_owner_is_dead_are_removed_and_others_are_not(self, engine, double, job, tmp_path):
        dead, alive, elsewhere = job(own=False), job(), job(own=False)
        for each in (dead, alive):
            double.make_job(spec.job_body(each, engine._open().place, spec.Pulled()))
        other = replace(engine._open().place, claim="another")
        double.make_job(spec.job_body(elsewhere, other, spec.Pulled()))
        for each in (dead, elsewhere):
            each.lease.touch()
            os.utime(each.lease, (1, 1))

        assert engine.reap(below=tmp_path / "workspaces") == (dead.run_id,)
        assert len(double.jobs) == 2

    def test_a_pod_whose_job_was_deleted_without_it_is_removed(self, engine, double, job):
        double.script = Script(states=((0.0, running()),))
        wanted = job(own=False)
        made = double.make_job(spec.job_body(wanted, engine._open().place, spec.Pulled()))
        until = time.monotonic() + 10
        while not double.pods and time.monotonic() < until:
            time.sleep(0.02)
        double.delete_job(made["metadata"]["name"], None)

        assert engine.reap(wanted.run_id) == (wanted.run_id,)
        until = time.monotonic() + 10
        while double.pods and time.monotonic() < until:
            time.sleep(0.02)
        assert not double.pods

    def test_a_runs_jobs_go_with_its_parts(self, engine, double, job):
        run_id = str(uuid.uuid4())
        for name in (run_id, f"{run_id}.s1", str(uuid.uuid4())):
            double.make_job(spec.job_body(job(run_id=name), engine._open().place, spec.Pulled()))

        assert sorted(engine.reap(run_id, stop_seconds=0.1)) == [run_id, f"{run_id}.s1"]
        assert len(double.jobs) == 1


class TestRefusals:
    def test_an_image_file_needs_a_registry(self, engine):
        with pytest.raises(UnsupportedByEngine, match="OASIS_FLOWS_KUBERNETES_REGISTRY"):
            engine.prepare(ImageSource(image_file="/x.tar"))

    def test_a_policy_that_was_opened_keeps_algorithms_from_starting(self, engine, double, job):
        policy = spec.network_policy("flows")
        policy["spec"]["egress"] = [{}]
        double.others[f"networkpolicies/{spec.POLICY}"] = policy
        with pytest.raises(UnsupportedByEngine, match="no longer closes"):
            engine.run(job(), Log())

        assert "create jobs" not in double.calls


def rights() -> set[str]:
    """What the shipped role lets a flow do, as `verb resource`."""
    found = set()
    for document in yaml.safe_load_all((ROOT / "deployments/kubernetes/rbac.yaml").read_text()):
        if document["kind"] in ("Role", "ClusterRole") and "worker" not in document["metadata"]["name"]:
            for rule in document["rules"]:
                found |= {f"{verb} {resource}" for verb in rule["verbs"] for resource in rule["resources"]}
    return found


def test_the_shipped_rights_are_those_that_are_used(cluster, tmp_path, job):
    """All of the engine is gone through; what the API server was asked then is what the role allows, no more and no less."""
    double, access = cluster
    double.others["persistentvolumeclaims/work"] = {"spec": {"accessModes": ["ReadWriteOnce"]}, "status": {"phase": "Bound"}}
    place = spec.Place(namespace="", claim="work", home=tmp_path, node="k8s-node")
    engine = KubernetesEngine(place, lambda: access)
    engine.describe()
    engine.nodes()
    pulled = spec.Pulled(login=RegistryLogin(registry="r", username="u", password="p"))
    engine._pulled["i@sha256:1"] = pulled
    double.script = Script(states=((0.0, status("20-unschedulable-cpu")), (2.5, running()), (1.0, ended("11-sigkill-self"))))
    engine.run(job(), Log())
    double.script = Script(states=((0.0, running()),))
    engine.run(job(timeout_seconds=0.2, stop_grace_seconds=0, secret_environment={"A": "b"}), Log())
    double.script = Script(events=[])
    engine._open()
    engine._place = replace(engine._place, pending_seconds=3)
    engine._cluster = replace(engine._open(), place=replace(engine._open().place, pending_seconds=3))
    with pytest.raises(NoRoom):
        engine.run(job(), Log())
    engine.reap()

    assert {call for call in double.calls if call != "get /version"} == rights()
