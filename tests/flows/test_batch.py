"""The batch in this process, against a real Prefect server, with Python functions in the place of containers."""

import json
import re
import shlex
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from prefect import tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow
from prefect.states import Cancelled, Completed, Crashed, Pending, Running, Scheduled

from oasis_flows import artifacts, documents, fan_out, ledger, reservations, schedule
from oasis_flows.__main__ import main
from oasis_flows.batching import Options, places, places_when_empty
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.capacity import Node, Vector
from oasis_flows.errors import (
    AlgorithmFailed,
    ContainerLost,
    DatasetChanged,
    DatasetError,
    DescriptionError,
    DuplicateName,
    EngineUnavailable,
    FilesFailed,
    NoCapacity,
    StoreDenied,
    StoreUnavailable,
)
from oasis_flows.flows.algorithm_task import algorithm_task
from oasis_flows.flows.batch import batch
from oasis_flows.job import ContainerExit, Reason
from oasis_flows.ledger import Ledger
from oasis_flows.lifecycle import clean_up
from oasis_flows.machine import grows, stand_in
from oasis_flows.plan import plan_run
from oasis_flows.schedule import Ending
from oasis_flows.settings import current
from oasis_flows.shards import ending_of
from oasis_flows.store import Notes
from oasis_flows.testing import FakeEngine, host_path
from oasis_flows.work_pool import _never_begins, _waited_for
from oasis_flows.workspace import open_workspace
from tests.servers.prefect import refuse_places

IMAGE = DockerImage(image_id="upper:1")


def upper(job, log):
    """Write each input file in capitals, under its own name."""
    for file in sorted(path for path in host_path(job, "/work/input").rglob("*") if path.is_file()):
        if "bad" in file.name:
            log("stderr", f"cannot read {file.name}\n".encode())
            return 7
        target = host_path(job, "/work/output") / file.relative_to(host_path(job, "/work/input"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text().upper())
    log("stdout", b"done\n")
    return 0


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(schedule, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(fan_out, "LOOK_SECONDS", 0.05)


@pytest.fixture
def notes(tmp_path):
    """Makes a dataset of files with these names, each of which holds its name."""

    def make(*names):
        for name in names:
            (tmp_path / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "notes" / name).write_text(name)
        return Dataset(url=str(tmp_path / "notes"))

    return make


class Ran:
    """A finished batch, as the server and this machine have it."""

    def __init__(self, server, home, state):
        self.server, self.home, self.state = server, home, state
        self.id = str(state.state_details.flow_run_id)
        self.result = state.result(raise_on_failure=False)
        self.run = server.api(f"/flow_runs/{self.id}")
        self.folder = Path(self.run["labels"].get("oasis.output", "/nowhere"))

    @property
    def record(self):
        return json.loads((self.folder / "task.json").read_text())

    @property
    def manifest(self):
        return [json.loads(line) for line in (self.folder / "manifest.jsonl").read_text().splitlines()]

    @property
    def content(self):
        return {row["path"]: (self.folder / row["at"]).read_text() for row in self.manifest}

    def lines(self, name):
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    @property
    def artifacts(self):
        wanted = {"artifacts": {"flow_run_id": {"any_": [self.id]}}}
        return {artifact["key"]: artifact["data"] for artifact in self.server.api("/artifacts/filter", wanted)}

    @property
    def workspace(self):
        return self.home / "workspaces" / self.id


@pytest.fixture
def ran(prefect_server, here):
    """Runs a batch with an engine; returns what became of it."""

    def run(engine, dataset, algorithm=None, **options):
        with stand_in(engine):
            state = batch(algorithm or Algorithm(docker_image=IMAGE, memory="1GiB"), dataset, return_state=True, **options)
        return Ran(prefect_server, here, state)

    return run


def again(ran, engine, dataset, **parameters):
    """The same flow run once more, as a worker does after `prefect flow-run retry`."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(uuid.UUID(ran.id), Scheduled(name="AwaitingRetry"), force=True)
        flow_run = client.read_flow_run(uuid.UUID(ran.id))
    given = {"algorithm": Algorithm(docker_image=IMAGE, memory="1GiB"), "input_dataset": dataset, **parameters}
    with stand_in(engine):
        state = run_flow(batch, flow_run=flow_run, parameters=given, return_type="state")
    return Ran(ran.server, ran.home, state)


NAMES = [f"{letter}/{number:02}.txt" for letter in "abc" for number in range(10)]


def test_one_dataset_comes_out_whose_manifest_points_into_the_shards(ran, notes):
    engine = FakeEngine(upper)
    done = ran(engine, notes(*NAMES), files_per_shard=7)

    assert done.run["state_type"] == "COMPLETED", done.result
    assert done.content == {name: name.upper() for name in NAMES}
    assert [row["path"] for row in done.manifest] == sorted(NAMES)
    assert {row["at"].split("/")[1] for row in done.manifest} == {"0", "1", "2", "3", "4"}
    assert [(row["shard"], row["files"], row["ending"], row["attempts"]) for row in done.lines("shards.jsonl")] == [
        ("0", [0, 7], "done", 1),
        ("1", [7, 14], "done", 1),
        ("2", [14, 21], "done", 1),
        ("3", [21, 28], "done", 1),
        ("4", [28, 30], "done", 1),
    ]
    assert done.lines("failed.jsonl") == []
    assert done.record["status"] == "Succeeded"
    assert done.record["batch"] | {"container_seconds": 0} == {
        "shards_planned": 5,
        "shards_published": 5,
        "files_failed": 0,
        "include": None,
        "container_seconds": 0,
    }
    shard = json.loads((done.folder / "shards/3/task.json").read_text())
    assert shard["shard"] == {"name": "3", "index": 3, "count": 5, "start": 21, "end": 28}
    assert shard["input"]["file_count"] == 7
    assert (done.folder / "shards/3/log.txt").read_bytes() == b"done\n"
    assert not done.workspace.exists()
    document = documents.find(Dataset, done.result._block_document_name)
    assert (document.url, document.file_count) == (str(done.folder), 30)
    table = json.loads(done.artifacts["oasis-batch"])
    assert [(row["shard"], row["files"], row["status"], row["attempts"], row["exit"]) for row in table] == [
        ("0", "0-6", "published", 1, 0),
        ("1", "7-13", "published", 1, 0),
        ("2", "14-20", "published", 1, 0),
        ("3", "21-27", "published", 1, 0),
        ("4", "28-29", "published", 1, 0),
    ]
    assert all(row["seconds"] > 0 and Path(row["log"]).read_bytes() == b"done\n" for row in table)
    assert "30 files" in done.artifacts["oasis-run"]


def test_shards_wait_for_a_server_that_is_away_when_prefect_asks_it_for_their_places(ran, notes, monkeypatch):
    failures = [httpx.ReadError("cut") for _ in range(3)]
    refuse_places(monkeypatch, failures)
    with tags("a"):
        done = ran(FakeEngine(upper), notes("a", "b"), files_per_shard=1)

    assert failures == []
    assert done.content == {"a": "A", "b": "B"}
    assert [row["attempts"] for row in done.lines("shards.jsonl")] == [1, 1]


def test_a_shards_container_sees_its_files_alone_and_its_place(ran, notes):
    engine = FakeEngine(upper)
    ran(engine, notes("a", "b", "c"), shards=3, max_parallel=1)

    places = {job.environment["OASIS_SHARD_INDEX"]: job for job in engine.jobs}
    assert sorted(places) == ["0", "1", "2"]
    assert {job.environment["OASIS_SHARD_COUNT"] for job in engine.jobs} == {"3"}
    assert len({job.environment["OASIS_RUN_ID"] for job in engine.jobs}) == 3
    assert len({job.lease for job in engine.jobs}) == 1


def test_the_output_is_the_input_of_the_next_run_and_of_the_next_batch(ran, notes, prefect_server, here):
    first = ran(FakeEngine(upper), notes(*NAMES), shards=4)
    with stand_in(FakeEngine(upper)):
        state = algorithm_task(Algorithm(docker_image=IMAGE), first.result, return_state=True)
    second = ran(FakeEngine(upper), first.result, shards=3)

    record = json.loads((Path(state.result().url) / "task.json").read_text())
    assert record["input"]["manifest_digest"] == first.result.manifest_digest
    assert second.content == first.content
    assert second.result.manifest_digest == first.result.manifest_digest


def test_include_takes_the_files_that_match(ran, notes):
    done = ran(FakeEngine(upper), notes("a.txt", "deep/b.txt", "c.TXT", "d.jpg"), include="*.txt")

    assert sorted(done.content) == ["a.txt", "deep/b.txt"]


@pytest.mark.parametrize(
    ("names", "options", "error", "words"),
    [
        ((), {}, DatasetError, "holds no files"),
        (("a",), {"include": "*.jpg"}, DatasetError, "matches `include`"),
        (("a",), {"files_per_shard": 0}, DescriptionError, "files_per_shard"),
        (("a",), {"files_per_shard": -3}, DescriptionError, "files_per_shard"),
        (("a",), {"shards": 2, "files_per_shard": 2}, DescriptionError, "Both `shards` and `files_per_shard`"),
        (("a",), {"on_failed_files": "ignore"}, DescriptionError, "on_failed_files"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(ran, notes, tmp_path, names, options, error, words):
    (tmp_path / "notes").mkdir()
    engine = FakeEngine(upper)
    done = ran(engine, notes(*names) or Dataset(url=str(tmp_path / "notes")), **options)

    assert isinstance(done.result, error)
    assert words in str(done.result)
    assert engine.jobs == []
    assert done.run["state_type"] == "FAILED"


def test_an_algorithm_bigger_than_any_machine_is_refused_at_once(ran, notes):
    began = time.monotonic()
    done = ran(FakeEngine(upper, cpus=2), notes("a"), Algorithm(docker_image=IMAGE, cpus=2))

    assert isinstance(done.result, NoCapacity)
    assert "no node has that, even empty" in done.run["state"]["message"]
    assert time.monotonic() - began < 20


class Forgetful(FakeEngine):
    """An engine that was away when its containers had ended, and still has them."""

    left = 0

    def run(self, job, log):
        self.left += 1
        return super().run(job, log)

    def reap(self, run_id=None, **_):
        if run_id is not None and self.jobs and self.jobs[0].run_id.startswith(f"{run_id}."):
            self.left = 0
        return ()


def test_no_container_outlives_a_batch_though_the_engine_was_away_when_it_ended(ran, notes):
    engine = Forgetful(upper)
    done = ran(engine, notes("a", "b"), files_per_shard=1)

    assert done.run["state_type"] == "COMPLETED", done.result
    assert (len(engine.jobs), engine.left) == (2, 0)


class Busy(FakeEngine):
    """An engine whose machine is full at first."""

    looks = 0

    def nodes(self, *, without=()):
        type(self).looks += 1
        (node,) = super().nodes(without=without)
        if type(self).looks in range(2, 6):
            node = type(node)(name=node.name, allocatable=node.allocatable, requested=node.allocatable)
        return (node,)


def test_a_full_machine_is_waited_for_and_said_to_be(ran, notes):
    done = ran(Busy(upper), notes("a", "b"))

    assert done.run["state_type"] == "COMPLETED"
    wanted = {"logs": {"flow_run_id": {"any_": [done.id]}}, "limit": 200}
    until = time.monotonic() + 30
    while time.monotonic() < until and "goes on" not in str(done.server.api("/logs/filter", wanted)):
        time.sleep(0.2)
    assert "too few processors are free for 1 processors" in str(done.server.api("/logs/filter", wanted))
    assert done.artifacts["oasis-waiting"].startswith("The batch ")


def test_a_snapshot_that_is_being_written_anew_is_waited_for(ran, notes, tmp_path, monkeypatch):
    capacity = tmp_path / "nodes.json"
    table = json.dumps({"nodes": [{"name": "a", "cpus": 4, "memory": "64Gi"}]})
    capacity.write_text(table)
    monkeypatch.setenv("OASIS_FLOWS_CAPACITY", str(capacity))

    def rewriting(job, log):
        capacity.write_text(table[:20])
        time.sleep(0.5)
        capacity.write_text(table)
        return upper(job, log)

    done = ran(FakeEngine(rewriting), notes("a", "b", "c"), files_per_shard=1, max_parallel=1)

    assert done.run["state_type"] == "COMPLETED", done.result
    assert done.artifacts["oasis-waiting"].startswith("The batch ")


def test_it_is_said_what_shards_wait_for_that_no_worker_takes(prefect_server):
    pool = f"pool-{uuid.uuid4().hex[:8]}"

    def run(state, seconds):
        state.timestamp -= timedelta(seconds=seconds)
        return FlowRun(flow_id=uuid.uuid4(), state=state, work_pool_name=pool)

    old = [run(Scheduled(), 40), run(Completed(), 60)]
    assert f"no worker of the pool {pool} is there. Start one" in _waited_for(old)
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        assert "Start one" in _waited_for(old)
        client._client.post(f"/work_pools/{pool}/workers/heartbeat", json={"name": "w", "heartbeat_interval_seconds": 60})
    assert f"the workers of the pool {pool} take none" in _waited_for(old)
    assert _waited_for([*old, run(Running(), 40)]) == ""
    assert _waited_for([*old, run(Scheduled(), 1)]) == ""
    assert _waited_for([run(Completed(), 60)]) == ""


def test_a_pool_that_somebody_deleted_has_no_worker_and_ends_no_batch(prefect_server):
    labels = {"prefect.worker.name": "w", "prefect.work-pool.name": f"pool-{uuid.uuid4().hex[:8]}"}
    with get_client(sync_client=True) as client:
        taken = client.create_flow_run(algorithm_task, state=Pending())
        client.update_flow_run_labels(taken.id, labels)
        found = client.read_flow_run(taken.id)
    assert _never_begins(found, 3600)


class Shared(FakeEngine):
    """An engine on whose machine others need so many processors."""

    others = 0

    def nodes(self, *, without=()):
        (node,) = super().nodes(without=without)
        return (type(node)(name=node.name, allocatable=node.allocatable, requested=Vector(1000 * self.others)),)


def test_the_load_of_others_shrinks_a_batch_that_runs_and_their_leaving_grows_it(ran, notes):
    under_way, ended, seen, lock = [], [], [], threading.Lock()

    def slow(job, log):
        with lock:
            under_way.append(job)
            seen.append((len(ended), len(under_way)))
        time.sleep(0.2)
        with lock:
            under_way.remove(job)
            ended.append(job)
            engine.others = 3 if 6 <= len(ended) < 24 else 0
        return upper(job, log)

    engine = Shared(slow, cpus=5)
    ran(engine, notes(*[f"{number:02}" for number in range(40)]), files_per_shard=1)

    assert max(most for done, most in seen if done < 6) == 4
    # What ran at the change, and what was let go on before it was seen, is over by then.
    assert {most for done, most in seen if 18 <= done < 24} == {1}
    assert max(most for done, most in seen if done >= 24) == 4


def test_the_bar_moves_while_a_batch_runs(ran, notes, monkeypatch, prefect_server):
    monkeypatch.setattr(artifacts, "_PATIENCE_SECONDS", 0)
    seen = []

    def slow(job, log):
        time.sleep(0.4)
        mine = {"flow_run_id": {"any_": [job.run_id.partition(".")[0]]}, "key": {"any_": ["oasis-shards"]}}
        seen.extend(row["data"] for row in prefect_server.api("/artifacts/filter", {"artifacts": mine}))
        return upper(job, log)

    done = ran(FakeEngine(slow), notes(*NAMES[:10]), files_per_shard=1, max_parallel=1)

    assert sorted(seen) == seen
    assert 0 < seen[-1] < 100
    assert done.artifacts["oasis-shards"] == 100


def test_a_plan_says_what_would_be_done_and_starts_nothing(prefect_server, here, notes, tmp_path, capsys, monkeypatch):
    name = f"planned-{uuid.uuid4().hex[:8]}"
    Algorithm(docker_image=IMAGE, memory="1GiB").save(name)
    notes(*NAMES).save(name)
    engine, words = FakeEngine(upper, cpus=5), ["plan", "batch", name, name, "--files-per-shard", "7"]
    with stand_in(engine):
        assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "files      30, 240 B",
        "needs      1 processors, 1.0 GiB for each container",
        "capacity   fake has 4 processors, 51.2 GiB free: 4 fit",
        "at once    4 now; the limit is processors",
        "shards     5, of 2 to 7 files, 16 B to 56 B",
    ]

    nodes = [{"name": "a", "cpus": 2, "memory": "64Gi"}, {"name": "b", "cpus": 1, "memory": "64Gi"}]
    (tmp_path / "nodes.json").write_text(json.dumps({"nodes": nodes}))
    with stand_in(engine):
        assert main([*words, "--json", "--capacity", str(tmp_path / "nodes.json")]) == 0
        given = json.loads(capsys.readouterr().out)
        monkeypatch.setenv("OASIS_FLOWS_CAPACITY", str(tmp_path / "nodes.json"))
        assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == given
    assert [(node["name"], node["fit"]) for node in given["nodes"]] == [("a", 1), ("b", 0)]
    assert engine.jobs == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--service-cpus", "1"], "there is none. Give --oscar-config"),
        (["--oscar-config", "CONFIG", "--service-cpus", "x"], "--service-cpus: 'x' is not a quantity"),
        (["--oscar-config", "CONFIG", "--service-cpus", "1"], "names no cluster that could be asked"),
        (["--oscar-config", "CONFIG", "DATASET"], "Both DATASET and --oscar-config"),
        (["--oscar-config", "MISSING"], "cannot be read: No such file"),
        ([], "There is no DATASET"),
    ],
)
@pytest.mark.parametrize("command", [["batch"], ["plan", "batch"]])
def test_what_is_wrong_with_a_command_line_is_said(prefect_server, here, notes, tmp_path, capsys, command, words, said):
    name = f"wrong-{uuid.uuid4().hex[:8]}"
    Algorithm(docker_image=IMAGE).save(name)
    notes("a").save(name)
    config = {
        "MinIO": {"url": "minio.invalid", "access_key": "minio", "secret_key": "s3cret"},
        "bucket": {"name": "fish", "folder_prefix": "input/"},
        "output": {"file": "index.txt"},
        "service": {"name": "fish"},
    }
    (tmp_path / "CONFIG").write_text(json.dumps(config))
    places = {"CONFIG": str(tmp_path / "CONFIG"), "MISSING": str(tmp_path / "MISSING"), "DATASET": name}
    words = [places.get(word, word) for word in words]

    assert main([*command, name, *([name] if "--service-cpus" in words[:1] else []), *words]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert "s3cret" not in told.err + told.out


def test_a_plan_for_a_pool_looks_at_no_machine(prefect_server, here, notes, capsys):
    name = f"planned-{uuid.uuid4().hex[:8]}"
    Algorithm(docker_image=IMAGE, memory="1GiB", cpus=64).save(name)
    notes(*NAMES).save(name)

    assert main(["plan", "batch", name, name, "--fan-out", "work-pool", "--files-per-shard", "7"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "at once    32 now; the limit is the pool, and its workers",
        "shards     5, of 2 to 7 files, 16 B to 56 B",
    ]
    assert main(["plan", "batch", name, name, "--fan-out", "work-pool", "--max-parallel", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["at_once"], told["limit"], told["shards"], told["too_big"]) == (2, "max_parallel", 16, None)


def test_on_a_cluster_that_grows_nothing_is_too_large_and_something_is_always_asked_for(
    prefect_server, here, monkeypatch, tmp_path
):
    plan = plan_run(
        Algorithm(docker_image=IMAGE, cpus=64),
        Dataset(url=str(tmp_path / "in")),
        output_name=None,
        store=None,
        parameters=None,
        settings=current(),
        run_id=str(uuid.uuid4()),
        attempt=1,
    )
    small = (Node(name="small", allocatable=Vector(2000, 8 << 30, 0, 110)),)
    with pytest.raises(NoCapacity):
        places_when_empty(plan, small, Options(), 0.8)

    assert places_when_empty(plan, small, Options(), 0.8, grows=True) == 1
    assert places(plan, (), Options(max_parallel=7), 0.8, grows=True)[0] == 7
    assert places(plan, small, Options(), 0.8)[0] == 0
    monkeypatch.setenv("OASIS_FLOWS_KUBERNETES_GROWS", "true")
    assert not grows(current())
    monkeypatch.setenv("OASIS_FLOWS_ENGINE", "kubernetes")
    assert grows(current())
    monkeypatch.setenv("OASIS_FLOWS_CAPACITY", str(tmp_path / "nodes.json"))
    assert not grows(current())


def counting(most):
    """What runs like `upper`, but slowly, and notes in `most` how many do so at once."""
    under_way, lock = [], threading.Lock()

    def slow(job, log):
        with lock:
            under_way.append(job)
            most.append(len(under_way))
        time.sleep(0.5)
        with lock:
            under_way.remove(job)
        return upper(job, log)

    return slow


def test_what_another_batch_has_reserved_is_left_to_it(ran, notes, here):
    most = []
    with open_workspace(here / "workspaces", str(uuid.uuid4())) as other:
        reservations.reserve(other, Vector(3000, 0, 0, 3))
        ran(FakeEngine(counting(most), cpus=5), notes(*NAMES), files_per_shard=5)
        assert max(most) == 1
    most.clear()
    ran(FakeEngine(counting(most), cpus=5), notes(*NAMES), files_per_shard=5)
    assert max(most) > 1


def test_a_batch_reserves_for_what_is_left_of_it_and_no_more(ran, notes, here):
    kept = []

    def slow(job, log):
        until = time.monotonic() + 30
        while time.monotonic() < until and not (found := reservations.reserved(here / "workspaces")):
            time.sleep(0.05)
        kept.append(found)
        return upper(job, log)

    ran(FakeEngine(slow, cpus=10), notes("a"))

    assert [list(found.values()) for found in kept] == [[Vector(1000, 1 << 30, 0, 1)]]
    assert reservations.reserved(here / "workspaces") == {}


def test_never_more_at_once_than_fit_or_than_the_user_wants(ran, notes):
    most = []
    ran(FakeEngine(counting(most), cpus=5), notes(*NAMES), files_per_shard=2)
    fits, most[:] = max(most), []
    ran(FakeEngine(counting(most), cpus=5), notes(*NAMES), files_per_shard=2, max_parallel=2)

    assert fits == 4
    assert max(most) == 2


def test_a_file_that_breaks_the_algorithm_stands_alone_and_all_others_are_published(ran, notes):
    engine = FakeEngine(upper)
    done = ran(engine, notes(*NAMES, "b/bad.txt"), shards=2)

    assert isinstance(done.result, FilesFailed)
    assert done.run["state_type"] == "FAILED"
    assert done.run["state"]["message"].startswith(
        "1 of 31 files failed, and the output of all others is published as dataset "
    )
    assert done.content == {name: name.upper() for name in NAMES}
    (bad,) = done.lines("failed.jsonl")
    assert (bad["file"], bad["verdict"]["code"], bad["last_lines"]) == ("b/bad.txt", "exit_nonzero", ["cannot read bad.txt"])
    assert bad["command"] is None
    assert Path(bad["log"]).read_bytes() == b"cannot read bad.txt\n"
    assert len(engine.jobs) <= 2 + 2 * 4
    name = done.record["output"]["name"]
    assert documents.find(Dataset, name).file_count == 30


@pytest.mark.parametrize("oscar", [False, True])
def test_a_failed_file_is_told_with_a_command_that_runs_it_alone(ran, notes, capsys, tmp_path, oscar):
    def picky(job, log):
        folder = host_path(job, "/work/input")
        if oscar:
            told = json.loads(host_path(job, job.environment["INPUT_FILE_PATH"]).read_text())
            names = (folder / "names.txt").read_text().splitlines()[told["start"] - 1 : told["end"]]
        else:
            names = [path.name for path in folder.rglob("*") if path.is_file()]
        seen.append(([Path(name).name for name in names], job.environment["LOUD"], job.environment["SIZE"]))
        return int(any("bad" in name for name in names))

    seen, name = [], f"picky-{uuid.uuid4().hex[:8]}"
    algorithm = Algorithm(
        docker_image=IMAGE, environment={"LOUD": "{loud}", "SIZE": "{size}"}, parameters={"loud": False, "size": 1.5}
    )
    algorithm.save(name)
    notes("-d/a 1", "-d/bad [*]", "c").save(name)
    DatasetStore(url=str(tmp_path / "elsewhere")).save(name)
    more = {"oscar_compat": True, "oscar_index": "names.txt"} if oscar else {}
    parameters = {"loud": True, "size": -2.0}
    done = ran(FakeEngine(picky), name, name, store=name, parameters=parameters, include="-d/*", shards=1, **more)
    (bad,) = done.lines("failed.jsonl")
    assert bad["file"] == "-d/bad [*]"

    seen.clear()
    with stand_in(FakeEngine(picky)):
        assert main(shlex.split(bad["command"])[1:]) == 1
    assert seen == [(["bad [*]"], "true", "-2.0")]
    assert len(list((tmp_path / "elsewhere").glob("*/*"))) == 2


def test_failed_files_can_be_accepted(ran, notes):
    done = ran(FakeEngine(upper), notes("a", "bad", "c"), on_failed_files="accept")

    assert done.run["state_type"] == "COMPLETED"
    assert done.content == {"a": "A", "c": "C"}
    assert done.record["verdict"]["sentence"].endswith("but for 1 file, which failed alone.")


def test_failed_files_can_be_accepted_afterwards_and_the_record_says_so(ran, notes):
    dataset = notes("a", "bad", "c")
    first = ran(FakeEngine(upper), dataset)
    before, manifest = first.record, (first.folder / "manifest.jsonl").stat().st_mtime_ns
    engine = FakeEngine(upper)
    second = again(first, engine, dataset, on_failed_files="accept")

    assert engine.jobs == []
    assert (before["status"], second.run["state_type"], second.record["status"]) == ("Failed", "COMPLETED", "Succeeded")
    assert second.record["output"] == before["output"]
    assert (second.folder / "manifest.jsonl").stat().st_mtime_ns == manifest
    assert second.content == {"a": "A", "c": "C"}


def test_when_every_file_fails_there_is_nothing_to_publish(ran, notes):
    done = ran(FakeEngine(upper), notes("bad1", "bad2"), on_failed_files="accept")

    assert isinstance(done.result, FilesFailed)
    assert not (done.folder / "manifest.jsonl").exists()
    assert len(done.lines("failed.jsonl")) == 2


def test_an_algorithm_that_fails_on_everything_is_given_up(ran, notes):
    engine = FakeEngine(upper)
    done = ran(engine, notes(*[f"bad{number:03}" for number in range(300)]), shards=2, max_failed_files=3, max_parallel=1)

    assert isinstance(done.result, FilesFailed)
    assert re.match("The batch was given up when [45] files of 300 had failed alone", str(done.result))
    assert len(engine.jobs) < 40
    assert not (done.folder / "manifest.jsonl").exists()


def test_a_command_that_cannot_start_ends_the_batch_at_once(ran, notes):
    engine = FakeEngine(lambda job, log: ContainerExit(reason=Reason.COMMAND_NOT_FOUND, exit_code=127))
    done = ran(engine, notes(*NAMES), shards=10, max_parallel=1)

    assert isinstance(done.result, AlgorithmFailed)
    # The next shard was waiting for its place already.
    assert len(engine.jobs) <= 2


@pytest.mark.parametrize(
    "accident",
    [ContainerLost("It vanished."), EngineUnavailable("It is away."), ContainerExit(reason=Reason.KILLED, exit_code=137)],
)
def test_what_the_platform_failed_is_tried_again(ran, notes, accident):
    tries = []

    def unlucky(job, log):
        tries.append(job.run_id)
        if tries.count(job.run_id) < 3:
            if isinstance(accident, Exception):
                raise accident
            return accident
        return upper(job, log)

    done = ran(FakeEngine(unlucky), notes("a", "b"), shards=2)

    assert done.content == {"a": "A", "b": "B"}
    assert [row["attempts"] for row in done.lines("shards.jsonl")] == [3, 3]


def test_an_algorithms_failure_is_tried_again_only_if_the_user_asks(ran, notes):
    tries = []

    def moody(job, log):
        tries.append(job.run_id)
        return upper(job, log) if tries.count(job.run_id) > 1 else 1

    done = ran(FakeEngine(moody), notes("a", "b"), shards=1, algorithm_retries=1)

    assert done.content == {"a": "A", "b": "B"}
    assert len(tries) == 2


def test_a_platform_that_stays_away_fails_the_batch_and_a_retry_does_only_what_is_left(ran, notes):
    def fails_from_b(job, log):
        if any(path.name.startswith("1") for path in host_path(job, "/work/input").rglob("*")):
            raise ContainerLost("It vanished.")
        return upper(job, log)

    dataset = notes(*[f"{number:02}" for number in range(20)])
    first = ran(FakeEngine(fails_from_b), dataset, files_per_shard=1, max_parallel=2)
    assert isinstance(first.result, ContainerLost)
    assert not (first.folder / "manifest.jsonl").exists()
    finished = {path.stem for path in (first.folder / "batch/ledger").iterdir()}
    assert finished

    engine = FakeEngine(upper)
    second = again(first, engine, dataset, files_per_shard=1)
    assert second.run["state_type"] == "COMPLETED"
    assert len(second.content) == 20
    assert {job.run_id.partition(".")[2] for job in engine.jobs} == {str(index) for index in range(20)} - finished


def test_a_batch_that_is_published_is_published_once(ran, notes):
    dataset = notes("a", "b")
    first = ran(FakeEngine(upper), dataset)
    before = (first.folder / "manifest.jsonl").stat().st_mtime_ns
    engine = FakeEngine(upper)
    second = again(first, engine, dataset)

    assert engine.jobs == []
    assert second.run["state_type"] == "COMPLETED"
    assert (second.folder / "manifest.jsonl").stat().st_mtime_ns == before


def test_a_batch_whose_input_changed_meanwhile_is_refused_with_what_changed(ran, notes):
    dataset = notes("a", "b", "c")
    first = ran(FakeEngine(upper), dataset)
    (Path(dataset.url) / "b").write_text("longer than before")
    (Path(dataset.url) / "c").unlink()
    (Path(dataset.url) / "d").write_text("new")
    second = again(first, FakeEngine(upper), dataset)

    assert isinstance(second.result, DatasetError)
    assert "'b' has changed; 'c' is gone; 'd' is new" in str(second.result)


def test_a_change_that_leaves_a_files_size_is_noticed_on_resume(ran, notes):
    dataset = notes("a", "b")
    first = ran(FakeEngine(upper), dataset)
    (Path(dataset.url) / "b").write_text("B")
    second = again(first, FakeEngine(upper), dataset)

    assert isinstance(second.result, DatasetError)
    assert "not what it was when the batch was begun: 'b' has changed. Restore it" in str(second.result)


def test_a_change_that_leaves_a_files_size_is_noticed_before_its_shard_runs(ran, notes):
    dataset = notes(*"abcdef")

    def spoils_f(job, log):
        (Path(dataset.url) / "f").write_text("F")
        return upper(job, log)

    # One at a time and one ahead: the last shard is staged long after the first has run.
    done = ran(FakeEngine(spoils_f), dataset, files_per_shard=1, max_parallel=1)

    (bad,) = done.lines("failed.jsonl")
    assert bad["file"] == "f"
    assert "was changed after it had been listed" in bad["verdict"]["sentence"]
    assert sorted(done.content) == [*"abcde"]


def test_a_file_that_vanishes_costs_the_batch_no_other(ran, notes):
    dataset = notes(*"abcdef")

    def removes_f(job, log):
        (Path(dataset.url) / "f").unlink(missing_ok=True)
        return upper(job, log)

    done = ran(FakeEngine(removes_f), dataset, files_per_shard=1, max_parallel=1)

    (bad,) = done.lines("failed.jsonl")
    assert bad["file"] == "f"
    assert sorted(done.content) == [*"abcde"]


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (DatasetChanged("f was changed while it was read."), Ending.FAILED),
        (StoreUnavailable("It did not answer."), Ending.UNKNOWN),
        (StoreDenied("No."), Ending.HOPELESS),
    ],
)
def test_what_is_another_than_was_listed_is_the_files_fault_and_a_store_that_is_away_is_nobodys(error, ending):
    assert ending_of(error) is ending


@pytest.mark.parametrize(
    ("note", "content", "words"),
    [
        ("head.json", '{"image": "sha2', "head.json, which says what the batch is, is damaged. Begin a new batch"),
        ("layout.json", "[]x", "layout.json, which says what the batch is, is damaged"),
        ("layout.json", '{"ends": [1], "bytes": [1]}', "layout.json tells of 1 files, and there are 2"),
    ],
)
def test_a_batch_whose_notes_are_damaged_is_refused_as_such(ran, notes, note, content, words):
    dataset = notes("a", "b")
    first = ran(FakeEngine(upper), dataset)
    (first.folder / "batch" / note).write_text(content)
    second = again(first, FakeEngine(upper), dataset)

    assert isinstance(second.result, DatasetError)
    assert words in str(second.result)


def test_a_batch_does_not_go_on_as_another_one(ran, notes):
    dataset = notes("a", "b", "c")
    first = ran(FakeEngine(upper), dataset)
    other = Algorithm(docker_image=IMAGE, memory="1GiB", command="something else")
    second = again(first, FakeEngine(upper), dataset, algorithm=other)
    third = again(first, FakeEngine(upper), dataset, files_per_shard=2)

    assert isinstance(second.result, DescriptionError)
    assert 'was begun with another `algorithm`: `command` was null and is "something else". Restore it' in str(second.result)
    assert "was begun with another `files_per_shard`: it was null and is 2. Restore it" in str(third.result)


def test_a_shard_that_was_published_and_not_yet_written_down_is_done_again_in_its_place(ran, notes, monkeypatch):
    """What it wrote the first time, under names that it does not write again, is in no dataset afterwards."""
    tries, really = [], Ledger.write

    def differently(job, log):
        tries.append(job.run_id)
        (host_path(job, "/work/output") / f"try-{len(tries)}").write_text("x")
        return upper(job, log)

    def denied(*_):
        raise StoreDenied("Nothing more may be written.")

    dataset = notes("a", "b")
    monkeypatch.setattr(Ledger, "write", denied)
    first = ran(FakeEngine(differently), dataset, shards=1)
    monkeypatch.setattr(Ledger, "write", really)
    assert isinstance(first.result, StoreDenied)
    assert (first.folder / "shards/0/manifest.jsonl").exists()
    assert not (first.folder / "manifest.jsonl").exists()
    second = again(first, FakeEngine(differently), dataset, shards=1)

    assert second.run["state_type"] == "COMPLETED", second.result
    assert sorted(second.content) == ["a", "b", "try-2"]
    assert sorted(path.name for path in (second.folder / "shards/0/data").iterdir()) == ["a", "b", "try-2"]


@pytest.mark.parametrize("name", ["a", "bad"])
def test_a_store_that_is_away_when_a_shard_is_written_down_is_waited_for(ran, notes, monkeypatch, name):
    failures, really = [], Notes.write

    def unlucky(written, file, content):
        if file == "0.json" and len(failures) < 6:
            failures.append(file)
            raise StoreUnavailable("It is away.")
        really(written, file, content)

    monkeypatch.setattr(Notes, "write", unlucky)
    monkeypatch.setattr(ledger, "POLL_SECONDS", 0.01)
    engine = FakeEngine(upper)
    done = ran(engine, notes(name), shards=1)

    assert len(failures) == 6
    assert len(engine.jobs) == 1
    assert [row["attempts"] for row in done.lines("shards.jsonl")] == [1]


def test_two_batches_under_one_name_are_two_datasets_and_the_later_one_has_the_document(prefect_server, here, notes):
    name = f"twice-{uuid.uuid4().hex[:8]}"
    dataset = notes(*NAMES)
    states, together = [], threading.Barrier(2)

    def meet(job, log):
        if job.environment["OASIS_SHARD_INDEX"] == "0":
            together.wait(60)
        return upper(job, log)

    def run():
        states.append(batch(Algorithm(docker_image=IMAGE), dataset, shards=3, output_name=name, return_state=True))

    threads = [threading.Thread(target=run) for _ in range(2)]
    with stand_in(FakeEngine(meet)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    results = [Ran(prefect_server, here, state) for state in states]
    assert [done.run["state_type"] for done in results] == ["COMPLETED", "COMPLETED"]
    assert len({done.folder for done in results}) == 2
    assert all(done.content == {name: name.upper() for name in NAMES} for done in results)
    assert documents.find(Dataset, name).url in {str(done.folder) for done in results}


def test_two_shards_that_wrote_the_same_name_are_named(ran, notes):
    def same(job, log):
        (host_path(job, "/work/output") / "summary.csv").write_text("1")
        return 0

    done = ran(FakeEngine(same), notes("a", "b"), shards=2)

    assert isinstance(done.result, DuplicateName)
    assert "The parts shards/0 and shards/1 both wrote 'summary.csv'" in str(done.result)
    assert not (done.folder / "manifest.jsonl").exists()


def test_a_store_elsewhere_holds_ledger_shards_and_manifest(ran, notes):
    store = DatasetStore(url="memory://batches")
    done = ran(FakeEngine(upper), notes(*NAMES), shards=3, store=store)

    assert done.run["state_type"] == "COMPLETED", done.result
    assert done.result.file_count == 30


def test_a_cancelled_batch_leaves_no_shard_to_a_pool_that_its_own_process_missed(prefect_server, here):
    with get_client(sync_client=True) as client:
        cancelled = client.create_flow_run(batch, state=Running())

        def shard_of(run_id, state):
            return client.create_flow_run(algorithm_task, tags=[f"batch:{run_id}"], state=state).id

        states = [Scheduled(), Running(), Completed()]
        shards = [shard_of(cancelled.id, state) for state in states]
        of_another = shard_of(uuid.uuid4(), Running())
        clean_up(batch, cancelled, Crashed())
        untouched = [client.read_flow_run(each).state_type.name for each in shards]
        clean_up(batch, cancelled, Cancelled())
        ended = [client.read_flow_run(each).state_type.name for each in [*shards, of_another]]

    assert untouched == ["SCHEDULED", "RUNNING", "COMPLETED"]
    assert ended[0] == "CANCELLED"
    assert ended[1] in ("CANCELLING", "CANCELLED")
    assert ended[2:] == ["COMPLETED", "RUNNING"]


# OSCAR-Batch


def oscar_worker(job, log):
    """A program as OSCAR-Batch's: it takes its lines out of the index, and reads the files from the whole dataset."""
    told = json.loads(host_path(job, job.environment["INPUT_FILE_PATH"]).read_text())
    folder = host_path(job, "/work/input")
    lines = (folder / "index.txt").read_text().splitlines()
    for line in lines[told["start"] - 1 : told["end"]]:
        found = folder.parent / line if (folder.parent / line).exists() else folder / line.removeprefix("input/")
        (host_path(job, "/work/output") / f"{found.stem}.json").write_text(json.dumps([found.read_text(), len(lines)]))
    return 0


def test_a_program_written_for_oscar_batch_sees_the_whole_dataset_and_its_range(ran, notes):
    engine = FakeEngine(oscar_worker)
    dataset = notes(*[f"{number}.jpg" for number in range(10)], "model.bin")
    done = ran(engine, dataset, shards=3, include="*.jpg", oscar_compat=True)

    assert done.run["state_type"] == "COMPLETED", done.result
    assert {name: json.loads(text) for name, text in done.content.items()} == {
        f"{number}.json": [f"{number}.jpg", 10] for number in range(10)
    }
    assert len(engine.jobs) == 3
    (mount,) = {next(mount for mount in job.mounts if mount.target == "/work/input") for job in engine.jobs}
    assert mount.read_only
    assert not (Path(dataset.url) / "index.txt").exists()
    assert (Path(dataset.url) / "model.bin").stat().st_nlink == 1


def test_an_index_that_would_hide_a_file_is_refused(ran, notes):
    done = ran(FakeEngine(oscar_worker), notes("index.txt", "a.jpg"), oscar_compat=True)

    assert isinstance(done.result, DatasetError)
    assert "choose another `oscar_index`" in str(done.result)


def test_oscars_way_needs_one_machine(ran, notes):
    done = ran(FakeEngine(oscar_worker), notes("a.jpg"), oscar_compat=True, fan_out="work-pool")

    assert isinstance(done.result, DescriptionError)
