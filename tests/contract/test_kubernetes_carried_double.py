"""Files carried to a claim that this process cannot mount, over the double of a cluster: its carriers are real processes.

What that does not prove is said in `tests/servers/kube_exec.py`.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oasis_flows import doctor, lease, settings
from oasis_flows.engines import kube_carry, pod as spec
from oasis_flows.engines.carrier import GOING, Order
from oasis_flows.engines.kube_access import Access, from_content
from oasis_flows.engines.kubernetes import KubernetesEngine
from oasis_flows.engines.parcel import Damaged, unpack
from oasis_flows.errors import ContainerLost, EngineError, StoreFull
from oasis_flows.job import ContainerJob, Mount, Reason, Resources, Wrapper
from tests.contract.test_engine import Log
from tests.contract.test_kubernetes_double import rights
from tests.servers.engine import eventually
from tests.servers.kube import Double, Script, double_of_a_cluster, ended, running
from tests.servers.kube_exec import program

RUNS = ((0.0, running()), (0.3, ended()))


def config_of(address: str) -> dict[str, Any]:
    return {
        "current-context": "x",
        "clusters": [{"name": "c", "cluster": {"server": address}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "flows"}}],
    }


def access_of(address: str) -> Access:
    return from_content(config_of(address))


@pytest.fixture
def claim(tmp_path: Path) -> Path:
    (tmp_path / "claim").mkdir()
    return tmp_path / "claim"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def cluster(claim: Path) -> Iterator[tuple[Double, str]]:
    with double_of_a_cluster(claim) as found:
        found[0].others["persistentvolumeclaims/work"] = {
            "spec": {"accessModes": ["ReadWriteMany"]},
            "status": {"phase": "Bound"},
        }
        yield found


@pytest.fixture
def double(cluster: tuple[Double, str]) -> Double:
    return cluster[0]


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def engine(cluster: tuple[Double, str], home: Path, told: list[str]) -> KubernetesEngine:
    place = spec.Place(namespace="", claim="work", home=home, carrier="example.org/flow-runner:1")
    return KubernetesEngine(place, lambda: access_of(cluster[1]), tell=told.append, patience_seconds=20)


@pytest.fixture
def job(home: Path, tmp_path: Path) -> Iterator[ContainerJob]:
    """A job whose input is anywhere, and whose output is in its workspace."""
    run_id = str(uuid.uuid4())
    folder = home / "workspaces" / run_id
    (tmp_path / "letters" / "sub").mkdir(parents=True)
    (tmp_path / "letters" / "a.txt").write_text("a")
    (tmp_path / "letters" / "sub" / "big").write_bytes(os.urandom(3_000_000))
    with lease.hold(folder / "lease"):
        (folder / "output").mkdir()
        yield ContainerJob(
            run_id=run_id,
            image="i@sha256:1",
            lease=folder / "lease",
            command=("x",),
            mounts=(
                Mount(source=tmp_path / "letters", target="/work/input", read_only=True),
                Mount(source=folder / "output", target="/work/output", read_only=False),
            ),
            stop_grace_seconds=0,
        )


def output(job: ContainerJob) -> Path:
    return job.mounts[1].source


def copy_all(mounts: dict[str, Path]) -> None:
    for path in mounts["/work/input"].rglob("*"):
        if path.is_file():
            (mounts["/work/output"] / path.name).write_bytes(path.read_bytes())


def nothing_left(double: Double, claim: Path) -> bool:
    return not double.jobs and not double.pods and [path.name for path in claim.rglob("*")] == ["carried"]


def test_a_run_has_its_input_there_and_its_output_here(engine, double, job, claim, told):
    double.script = Script(states=RUNS, work=copy_all)
    assert not engine.find(job)
    found = engine.run(job, Log())

    assert (found.reason, found.exit_code) == (Reason.OK, 0)
    assert (output(job) / "a.txt").read_text() == "a"
    assert (output(job) / "big").read_bytes() == (job.mounts[0].source / "sub" / "big").read_bytes()
    assert nothing_left(double, claim)
    assert [line for line in told if line.startswith("Carried 2 files")] == told[-2:]
    assert double.calls.count("get pods/exec") == 2
    assert sorted(path.name for path in job.lease.parent.iterdir()) == ["lease", "output"]


@pytest.mark.parametrize("cuts", [[10], [1_500_000, 50], [10**9, 1_000_000], [3_000_000, 10**9, 2_000_000]])
def test_connections_that_break_are_made_anew(engine, double, job, claim, cuts):
    double.script = Script(states=RUNS, work=copy_all)
    double.cut_exec_after.extend(cuts)

    assert engine.run(job, Log()).reason is Reason.OK
    assert (output(job) / "big").read_bytes() == (job.mounts[0].source / "sub" / "big").read_bytes()
    assert double.calls.count("get pods/exec") > 2
    assert nothing_left(double, claim)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Resources(output_bytes=2_000_000), Reason.OUTPUT_TOO_LARGE),
        (Resources(output_files=1), Reason.TOO_MANY_FILES),
    ],
)
@pytest.mark.parametrize("lasts", [0.3, 600.0], ids=["that has ended", "that goes on"])
def test_an_output_that_is_too_much_stays_there(engine, double, job, claim, limits, reason, lasts):
    double.script = Script(states=((0.0, running()), (lasts, ended())), work=copy_all)
    found = engine.run(replace(job, resources=limits), Log())

    assert found.reason is reason
    assert list(output(job).iterdir()) == []
    assert nothing_left(double, claim)


def test_a_failed_run_has_its_output_too(engine, double, job, claim):
    double.script = Script(states=((0.0, running()), (0.2, ended("02-exit-3"))), work=copy_all)

    assert engine.run(job, Log()).exit_code == 3
    assert (output(job) / "a.txt").exists()


def test_a_wrapper_that_says_that_its_program_has_ended_is_heard(engine, double, job, claim):
    def work(mounts: dict[str, Path]) -> None:
        (mounts["/run/notes"] / "algorithm").write_text("0")

    notes = job.lease.parent / "notes"
    notes.mkdir()
    double.script = Script(states=((0.0, running()),), work=work)
    wrapped = replace(
        job,
        entrypoint=("x",),
        mounts=(*job.mounts, Mount(source=notes, target="/run/notes", read_only=False)),
        wrapper=Wrapper(argv=("/bin/sh",), ended=notes / "algorithm", linger_seconds=0.5),
    )
    # The container lingers for ever, and is stopped then; so nobody knows how it ended.
    with pytest.raises(ContainerLost):
        engine.run(wrapped, Log())
    assert nothing_left(double, claim)


def test_a_carrier_that_dies_takes_the_run_along(engine, double, job, claim):
    def kill(_: dict[str, Path]) -> None:
        for process in double.processes.values():
            process.kill()

    double.script = Script(states=((0.0, running()),), work=kill)
    with pytest.raises(EngineError, match="carrier"):
        engine.run(job, Log())
    assert not double.jobs
    # What it left is for the next carrier.
    assert (claim / "carried" / job.run_id / "in" / "0" / "a.txt").exists()
    double.script = Script(states=RUNS, work=copy_all)
    assert engine.run(job, Log()).reason is Reason.OK
    assert nothing_left(double, claim)


def test_what_is_deleted_while_it_is_sent_is_not_taken_for_whole(claim, tmp_path):
    """Neither what it had listed and does not find any more, nor what it never saw."""
    order = Order(folder="r", job="", written=("1",), ended="", output_bytes=None, output_files=None)
    module = ["python", "-m", "oasis_flows.engines.carrier"]
    out, target = claim / "carried/r/out/1", tmp_path / "target"
    target.mkdir()
    with program([*module, "hold", order.dumped()], claim) as holding:
        assert holding.stdout.readline() == b'{"ready": true}\n'
        for number in range(200):
            (out / str(number)).mkdir()
            (out / str(number) / "f").write_bytes(b"x" * 10_000)
        with program([*module, "send", order.dumped()], claim, stdin=subprocess.PIPE) as sending:
            assert sending.stdout.readline() == b'{"passed": null}\n'
            # It is at it, and then waits with a full pipe.
            begun = io.BytesIO(sending.stdout.read(100_000))
            holding.terminate()
            holding.wait()
            with pytest.raises(Damaged):
                unpack(lambda count: (first := begun.read(count)) + sending.stdout.read(count - len(first)), target)
            assert sending.wait() == GOING
    out.mkdir(parents=True)
    (out / "f").write_bytes(b"x" * 1_000_000)
    (target / "again").mkdir()
    with program([*module, "send", order.dumped()], claim, stdin=subprocess.PIPE) as sending:
        begun = io.BytesIO(sending.stdout.read(len(b'{"passed": null}\n') + 100_000))
        assert begun.readline() == b'{"passed": null}\n'
        out.parent.rename(out.parent.with_name("going"))
        unpack(lambda count: (first := begun.read(count)) + sending.stdout.read(count - len(first)), target / "again")
        assert sending.stdout.readline() == b'{"whole": false}\n'
        sending.stdin.close()


def test_an_image_that_is_none_of_flow_runs_is_named(engine, double, job, monkeypatch):
    monkeypatch.setattr(kube_carry, "order_of", lambda job: replace(real(job), protocol=0))
    double.script = Script(states=RUNS)
    with pytest.raises(EngineError, match=r"example.org/flow-runner:1 .* of this version.*protocol"):
        engine.run(job, Log())
    assert not double.jobs


real = kube_carry.order_of


def test_a_carrier_whose_log_its_node_lost_is_not_waited_for_for_ever(engine, double, job, claim, monkeypatch):
    monkeypatch.setattr(kube_carry, "_SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(kube_carry.Carriage, "_hear", lambda *_: None)
    double.script = Script(states=RUNS)

    with pytest.raises(ContainerLost, match="said nothing in 2 s"):
        engine.run(job, Log())

    eventually(lambda: nothing_left(double, claim), 30)


def test_no_room_here_is_said(engine, double, job, claim, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    double.script = Script(states=RUNS, work=copy_all)
    monkeypatch.setattr(kube_carry, "unpack", full)
    with pytest.raises(StoreFull):
        engine.run(job, Log())
    assert nothing_left(double, claim)


OWNER = """
import sys
from pathlib import Path
from oasis_flows import lease
from oasis_flows.engines import pod as spec
from oasis_flows.engines.kubernetes import KubernetesEngine
from oasis_flows.job import ContainerJob, Mount
from tests.contract.test_kubernetes_carried_double import access_of
address, home, run_id, source = sys.argv[1:]
folder = Path(home) / "workspaces" / run_id
engine = KubernetesEngine(
    spec.Place(namespace="", claim="work", home=Path(home), carrier="example.org/flow-runner:1"), lambda: access_of(address)
)
job = ContainerJob(run_id=run_id, image="i@sha256:1", lease=folder / "lease", command=("x",), stop_grace_seconds=0, mounts=(
    Mount(source=Path(source), target="/work/input", read_only=True),
    Mount(source=folder / "output", target="/work/output", read_only=False),
))
with lease.hold(folder / "lease"):
    (folder / "output").mkdir()
    engine.run(job, lambda stream, data: print("begun", flush=True))
"""


@pytest.fixture
def killed(cluster: tuple[Double, str], home: Path, tmp_path: Path, job: ContainerJob) -> ContainerJob:
    """A run whose process was killed while its container ran."""
    double, address = cluster
    double.script = Script(states=((0.0, running()), (8.0, ended())), work=copy_all)
    run_id = str(uuid.uuid4())
    given = [address, str(home), run_id, str(job.mounts[0].source)]
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(OWNER), *given], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.kill()
    folder = home / "workspaces" / run_id
    mounts = (job.mounts[0], replace(job.mounts[1], source=folder / "output"))
    return replace(job, run_id=run_id, lease=folder / "lease", mounts=mounts)


def test_a_retry_takes_up_what_a_killed_process_left(engine, double, killed, claim):
    double.calls.clear()
    with lease.hold(killed.lease, 2):
        again = replace(killed, attempt=2)
        assert engine.find(again)
        assert engine.run(again, Log()).reason is Reason.OK
    assert double.calls.count("create jobs") == 0
    # Whether the input is there, and the output.
    assert double.calls.count("get pods/exec") == 2
    assert (output(killed) / "a.txt").read_text() == "a"
    assert nothing_left(double, claim)


def test_what_nobody_takes_up_is_reaped_by_its_own_machine_alone(engine, cluster, double, killed, claim, home, monkeypatch):
    inside = KubernetesEngine(spec.Place(namespace="", claim="work", home=claim), lambda: access_of(cluster[1]))
    os.utime(killed.lease, (1, 1))

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("oasis_flows.engines.kubernetes.gethostname", lambda: "a-pod")
        assert inside.reap(grace_seconds=0, below=claim / "workspaces") == ()
    assert len(double.jobs) == 2
    assert engine.reap(grace_seconds=0, below=home / "workspaces") == (killed.run_id,)
    eventually(lambda: nothing_left(double, claim), 30)


@pytest.mark.parametrize("carrier", ["", "example.org/flow-runner:1"])
def test_a_run_in_the_cluster_is_not_reaped_from_outside(cluster, double, job, home, carrier):
    """Its lease is on the claim, and so is not here; that does not mean that nobody has it."""
    inside = spec.Place(namespace="flows", claim="work", home=Path("/var/lib/oasis-flows"), node="k8s-node")
    theirs = replace(job, run_id="theirs", lease=inside.home / "workspaces/theirs/lease", mounts=())
    row = double.make_job(spec.job_body(theirs, inside, spec.Pulled()))
    row["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    outside = KubernetesEngine(
        spec.Place(namespace="", claim="work", home=home, carrier=carrier), lambda: access_of(cluster[1])
    )

    assert outside.reap(grace_seconds=0, below=home / "workspaces") == ()
    beside = KubernetesEngine(spec.Place(namespace="", claim="work", home=home, node="k8s-node"), lambda: access_of(cluster[1]))
    assert beside.reap(grace_seconds=0, below=home / "workspaces") == ("theirs",)


def test_whose_owner_lives_is_not_reaped(engine, double, killed, claim, home):
    with lease.hold(killed.lease):
        assert engine.reap(grace_seconds=0, below=home / "workspaces") == ()
    engine.reap(killed.run_id)
    eventually(lambda: nothing_left(double, claim), 30)


def test_an_output_of_which_nobody_knows_the_end_is_begun_anew(engine, double, killed, claim):
    """The algorithm's Job is gone, and its carrier is not: what it wrote must not be found by the next."""
    (main,) = (name for name, row in double.jobs.items() if spec.CARRIER not in row["metadata"]["labels"])
    double.delete_job(main, "Background")
    left = claim / "carried" / killed.run_id / "out" / "1" / "half"
    left.write_text("half")
    double.script = Script(states=RUNS, work=copy_all)
    with lease.hold(killed.lease, 2):
        again = replace(killed, attempt=2)
        assert not engine.find(again)
        assert engine.run(again, Log()).reason is Reason.OK
    assert sorted(path.name for path in output(killed).iterdir()) == ["a.txt", "big"]
    assert nothing_left(double, claim)


def test_deleting_the_carrier_alone_deletes_all(engine, double, killed, claim):
    """As somebody might, or the cluster at its deadline: the algorithm's Job belongs to it."""
    carrier, main = sorted(double.jobs.values(), key=lambda row: spec.CARRIER not in row["metadata"]["labels"])

    assert main["metadata"]["ownerReferences"][0]["uid"] == carrier["metadata"]["uid"]
    double.delete_job(carrier["metadata"]["name"], "Background")
    eventually(lambda: not list((claim / "carried").iterdir()), 30)


def test_who_carries_needs_one_right_more(engine, double, job):
    double.script = Script(states=RUNS, work=copy_all)
    engine.describe()
    engine.run(job, Log())

    # Everybody may ask for the version, and what he may.
    everybodys = {"get /version", "create selfsubjectaccessreviews"}
    assert set(double.calls) - rights() - everybodys == {"get pods/exec"}


def test_the_carrier_is_said_and_who_may_not_use_it_is_told(engine, double, job, claim):
    assert "not mounted here: files are carried by Jobs of the image example.org/flow-runner:1" in engine.describe().name

    double.may_exec = False
    with pytest.raises(EngineError, match="`pods/exec`"):
        engine.describe()
    double.script = Script(states=RUNS)
    with pytest.raises(EngineError, match=r"`pods/exec`.*The cluster said: cannot get"):
        engine.run(job, Log())
    assert nothing_left(double, claim)


@pytest.mark.parametrize(
    ("variables", "said", "noted"),
    [
        ({}, "taken to be mounted here", ["note"]),
        ({"OASIS_FLOWS_NODE_NAME": "k8s-node"}, ", mounted here", []),
        ({"OASIS_FLOWS_KUBERNETES_CARRIER": "example.org/flow-runner:1"}, "not mounted here: files are carried by Jobs of", []),
    ],
    ids=["neither", "mounted", "carried"],
)
def test_doctor_says_which_way_files_go(cluster, home, monkeypatch, tmp_path, variables, said, noted):
    (tmp_path / "kubeconfig").write_text(json.dumps(config_of(cluster[1])))
    given = {
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
        "OASIS_FLOWS_ENGINE": "kubernetes",
        "OASIS_FLOWS_HOME": str(home),
        "OASIS_FLOWS_KUBERNETES_CLAIM": "work",
        **variables,
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    engine, *others = doctor._engine(settings.current())

    assert engine.status == "ok", engine
    assert said in engine.found
    assert [each.status for each in others if each.check == "claim"] == noted
