"""The flow in this process, against a real Prefect server, with Python functions in the place of containers."""

import base64
import contextlib
import json
import re
import signal
import time
import uuid
from pathlib import Path
from typing import ClassVar

import fsspec
import httpx
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from prefect import tags
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.exceptions import TerminationSignal
from prefect.flow_engine import run_flow
from prefect.states import Scheduled
from prefect_docker.credentials import DockerRegistryCredentials
from pydantic import BaseModel, model_serializer

from oasis_flows import artifacts, documents, lease, lifecycle, tasks
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.errors import (
    AlgorithmFailed,
    ContainerLost,
    DatasetError,
    DescriptionError,
    EngineError,
    EngineUnavailable,
    InternalError,
    NoGpu,
    OasisError,
    RegistryUnavailable,
    UnsafeName,
)
from oasis_flows.flows.algorithm_task import algorithm_task
from oasis_flows.job import ContainerExit, Reason, Sample
from oasis_flows.machine import stand_in
from oasis_flows.testing import FakeEngine, host_path
from oasis_flows.workspace import Workspace
from tests.servers.engine import eventually
from tests.servers.prefect import refuse_places

IMAGE = DockerImage(image_id="counter:1")
SECRET = "tr0ub4dor&3 «hush»"


def count(job, log):
    """Write each input file's number of lines to a file of the same name."""
    source = host_path(job, "/work/input")
    for file in sorted(source.rglob("*.txt")):
        target = host_path(job, "/work/output") / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(str(len(file.read_text().splitlines())))
        log("stdout", f"counted {file.name}\n".encode())
    log("stderr", b"the end\n")
    return 0


def ends(exit):
    """An algorithm that writes a file and a line, and ends so."""

    def algorithm(job, log):
        (host_path(job, "/work/output") / "part.txt").write_text("as far as it came")
        log("stdout", b"it began well\n")
        return exit

    return algorithm


class FlakyStore(MemoryFileSystem):
    """A store at `flaky://` that can be down, or slow to write."""

    protocol = "flaky"
    cacheable = False
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    down: ClassVar[bool] = False
    seconds: ClassVar[float] = 0.0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _require(self):
        if type(self).down:
            raise ConnectionResetError(104, "Connection reset by peer")

    def _open(self, path, mode="rb", **kwargs):
        self._require()
        if mode == "wb":
            time.sleep(type(self).seconds)
        return super()._open(path, mode, **kwargs)

    def info(self, *args, **kwargs):
        self._require()
        return super().info(*args, **kwargs)

    def exists(self, *args, **kwargs):
        self._require()
        return super().exists(*args, **kwargs)


fsspec.register_implementation("flaky", FlakyStore, clobber=True)


@pytest.fixture
def flaky():
    """The store, up, and empty at the end."""
    FlakyStore.down = False
    yield DatasetStore(url="flaky://results")
    FlakyStore.down, FlakyStore.seconds = False, 0.0
    FlakyStore.store.clear()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Retries of tasks do not wait here; how often they happen is the shipped number."""
    for each in (tasks.stage_input, tasks.prepare_image, tasks.run_container, tasks.publish_output):
        monkeypatch.setattr(each, "retry_delay_seconds", [0.0] * each.retries)
        monkeypatch.setattr(each, "retry_jitter_factor", None)


@pytest.fixture
def notes(tmp_path):
    """A dataset of three files, two of them of the same base name."""
    for name, text in {"a.txt": "1\n2\n", "deep/er/a.txt": "1\n", "empty.txt": ""}.items():
        (tmp_path / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "notes" / name).write_text(text)
    return Dataset(url=str(tmp_path / "notes"))


@pytest.fixture
def ran(prefect_server, here, notes):
    """Runs the flow with an engine; returns what became of it."""

    def run(engine, algorithm=None, dataset=None, **options):
        with stand_in(engine):
            state = algorithm_task(algorithm or Algorithm(docker_image=IMAGE), dataset or notes, return_state=True, **options)
        return Ran(prefect_server, here, state)

    return run


class Ran:
    """A finished flow run, as the server and this machine have it."""

    def __init__(self, server, home, state):
        self.server, self.home, self.state = server, home, state
        self.id = str(state.state_details.flow_run_id)
        self.result = state.result(raise_on_failure=False)

    @property
    def run(self):
        return self.server.api(f"/flow_runs/{self.id}")

    @property
    def folder(self):
        return Path(self.run["labels"]["oasis.output"])

    @property
    def record(self):
        return json.loads((self.folder / "task.json").read_text())

    @property
    def workspace(self):
        return self.home / "workspaces" / self.id

    @property
    def artifacts(self):
        return {artifact["key"]: artifact["data"] for artifact in self._artifacts()}

    @property
    def described(self):
        return {artifact["key"]: artifact["description"] for artifact in self._artifacts()}

    def _artifacts(self):
        return self.server.api("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [self.id]}}})

    def logs(self, *, containing):
        """The run's log records on the server, once one of them has this text: they arrive a little later."""
        wanted = {"logs": {"flow_run_id": {"any_": [self.id]}}, "limit": 200}
        eventually(lambda: containing in str(self.server.api("/logs/filter", wanted)), 30)
        return "\n".join(record["message"] for record in self.server.api("/logs/filter", wanted))


def again(ran, engine, **parameters):
    """The same flow run once more, as a worker does after `prefect flow-run retry`."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(uuid.UUID(ran.id), Scheduled(name="AwaitingRetry"), force=True)
        flow_run = client.read_flow_run(uuid.UUID(ran.id))
    with stand_in(engine):
        state = run_flow(algorithm_task, flow_run=flow_run, parameters=parameters, return_type="state")
    return Ran(ran.server, ran.home, state)


def test_a_run_says_which_of_its_attempts_has_a_watchdog(ran):
    first = ran(FakeEngine(count), Algorithm(docker_image=IMAGE))
    assert first.run["labels"]["oasis.attempt"] == 1
    parameters = {"algorithm": Algorithm(docker_image=IMAGE), "input_dataset": first.result}
    second = again(first, FakeEngine(count), **parameters).run
    assert second["labels"]["oasis.attempt"] == second["run_count"] == 2


# Success


def test_a_success_leaves_files_log_record_and_last_the_manifest(ran, notes):
    done = ran(FakeEngine(count), Algorithm(docker_image=IMAGE, environment={"COLOUR": "a hue"}))
    folder = done.folder

    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "data/a.txt",
        "data/deep/er/a.txt",
        "data/empty.txt",
        "log.txt",
        "task.json",
        "manifest.jsonl",
    }
    assert (folder / "data/deep/er/a.txt").read_text() == "1"
    assert (folder / "log.txt").read_bytes() == b"counted a.txt\ncounted a.txt\ncounted empty.txt\nthe end\n"
    assert max(folder.rglob("*.*"), key=lambda path: path.stat().st_mtime_ns).name == "manifest.jsonl"
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == ["a.txt", "deep/er/a.txt", "empty.txt"]
    record = done.record
    assert (record["status"], record["verdict"]["code"], record["exit"]["exit_code"]) == ("Succeeded", "ok", 0)
    assert record["environment"] == ["COLOUR"]
    assert "a hue" not in (folder / "task.json").read_text()
    assert record["input"]["file_count"] == 3
    assert record["flow_run"]["id"] == done.id
    assert record["image"].startswith("sha256:")
    assert set(record["seconds"]) == {"stage_input", "prepare_image", "run_container", "publish_output"}


def test_a_success_has_a_document_an_artifact_and_a_readable_run_and_no_workspace(ran, notes):
    done = ran(FakeEngine(count))
    run, document = done.run, Dataset.load(f"algorithm-output-{done.id[:8]}")

    assert run["state_type"] == "COMPLETED"
    assert run["name"] == f"algorithm on {notes.url}"
    assert set(run["tags"]) >= {"algorithm:algorithm", f"dataset:{notes.url}"}
    assert (document.url, document.file_count, document.size_bytes) == (str(done.folder), 3, 3)
    assert document.manifest_digest == done.result.manifest_digest == done.record["output"]["manifest_digest"]
    assert "Succeeded (Prefect says Completed)" in done.artifacts["oasis-run"]
    assert "counted a.txt" in done.artifacts["oasis-run"]
    assert "counted a.txt" in done.logs(containing="the end")
    assert not done.workspace.exists()


def test_the_container_gets_its_folders_and_exactly_the_described_environment(ran, notes):
    engine = FakeEngine()
    done = ran(engine, Algorithm(docker_image=IMAGE, environment={"A": "{n}€"}, parameters={"n": 2}, working_dir="/srv/x"))
    (job,) = engine.jobs

    assert dict(job.environment) == {
        "A": "2€",
        "OASIS_PARAMETER_n": "2",
        "OASIS_INPUT": "/srv/x/input",
        "OASIS_OUTPUT": "/srv/x/output",
        "OASIS_RUN_ID": done.id,
        "OASIS_GPU_COUNT": "0",
    }
    assert [(m.target, m.read_only) for m in job.mounts] == [("/srv/x/input", True), ("/srv/x/output", False)]
    assert job.mounts[0].source == Path(notes.url)
    assert (job.resources.output_bytes, job.resources.output_files, job.resources.log_bytes) == (100 << 30, 1_000_000, 1 << 30)
    assert (job.run_id, job.attempt, job.working_dir) == (done.id, 1, "/srv/x")


def test_a_later_run_of_the_same_output_name_replaces_the_document_and_no_data(ran, notes):
    first = ran(FakeEngine(count), output_name="counted-notes")
    (Path(notes.url) / "a.txt").write_text("1\n2\n3\n")
    second = ran(FakeEngine(count), output_name="counted-notes")

    assert Dataset.load("counted-notes").url == str(second.folder)
    assert (first.folder / "data/a.txt").read_text() == "2"
    assert (second.folder / "data/a.txt").read_text() == "3"
    assert first.folder.parent == second.folder.parent
    assert first.folder.parent.name == "counted-notes"


def test_an_output_name_never_takes_the_document_of_somebody_elses_dataset(ran, notes):
    notes.save("precious", overwrite=True)
    engine = FakeEngine(count)
    done = ran(engine, output_name="precious")

    assert isinstance(done.result, DescriptionError)
    assert "Choose another `output_name`" in str(done.result)
    assert engine.jobs == []
    assert Dataset.load("precious").url == notes.url


def test_the_output_of_one_run_is_the_input_of_the_next(ran):
    first = ran(FakeEngine(count))
    engine = FakeEngine(count)
    second = ran(engine, dataset=first.result)

    assert engine.jobs[0].mounts[0].source == first.folder / "data"
    assert second.record["input"]["manifest_digest"] == first.result.manifest_digest
    assert second.run["state_type"] == "COMPLETED"


def test_blocks_may_be_given_by_name_by_reference_or_as_they_are(ran, notes):
    algorithm = Algorithm(docker_image=IMAGE, command="count")
    name = f"given-{uuid.uuid4().hex[:8]}"
    number = str(algorithm.save(name))
    notes.save(name)
    slug = {"$ref": {"block_document_slug": f"dataset/{name}"}}

    for given, dataset in ((name, name), ({"$ref": {"block_document_id": number}}, slug), (Algorithm.load(name), notes)):
        engine = FakeEngine(count)
        done = ran(engine, given, dataset)
        assert done.run["name"] == f"{name} on {name}"
        assert engine.jobs[0].command == ("count",)
        assert done.result._block_document_name.startswith(f"{name}-output-")


def test_parameters_reach_the_command_as_data_and_the_record_as_they_were(ran):
    engine = FakeEngine()
    algorithm = Algorithm(
        docker_image=IMAGE,
        entrypoint=["sh", "-c"],
        command=["cut --at {at} '{label}'"],
        parameters={"at": 1.5, "label": None},
    )
    done = ran(engine, algorithm, parameters={"label": "'; rm -rf /; '"})

    assert engine.jobs[0].command == ("cut --at \"${OASIS_PARAMETER_at}\" ''\"${OASIS_PARAMETER_label}\"''",)
    assert engine.jobs[0].environment["OASIS_PARAMETER_label"] == "'; rm -rf /; '"
    assert done.record["parameters"] == {"at": 1.5, "label": "'; rm -rf /; '"}


def test_the_store_named_default_is_used_by_those_who_name_none(ran, tmp_path):
    DatasetStore(url=str(tmp_path / "everybody")).save("default")
    try:
        done = ran(FakeEngine(count))
    finally:
        DatasetStore.delete("default")

    assert done.folder.parent.parent == tmp_path / "everybody"
    assert (done.folder / "manifest.jsonl").exists()


# The algorithm fails


@pytest.mark.parametrize(
    ("exit", "sentence"),
    [
        (3, "The algorithm algorithm ended with exit code 3 after "),
        (ContainerExit(reason=Reason.OUT_OF_MEMORY, exit_code=137), "was killed for memory"),
        (ContainerExit(reason=Reason.TIMED_OUT, exit_code=143), "was stopped at its time limit of 60 s."),
        (ContainerExit(reason=Reason.KILLED, exit_code=137), "was killed by SIGKILL"),
        (ContainerExit(reason=Reason.COMMAND_NOT_FOUND, exit_code=127), "its command is not in the image."),
        (ContainerExit(reason=Reason.EXEC_FORMAT, exit_code=126), "its program is not made for this machine."),
    ],
)
def test_a_failed_algorithm_is_explained_kept_for_a_look_and_no_dataset(ran, exit, sentence):
    engine = FakeEngine(ends(exit))
    done = ran(engine, Algorithm(docker_image=IMAGE, timeout_seconds=60))
    run, folder = done.run, done.folder

    assert isinstance(done.result, AlgorithmFailed)
    assert run["state_type"] == "FAILED"
    assert run["state_name"] == ("TimedOut" if "time limit" in sentence else "Failed")
    assert sentence in run["state"]["message"]
    assert run["state"]["message"] == done.result.verdict.sentence == done.record["verdict"]["sentence"]
    assert f"failed:{done.result.code}" in run["tags"]
    assert len(engine.jobs) == 1
    assert {path.name for path in folder.iterdir()} == {"data", "log.txt", "task.json"}
    assert (folder / "data/part.txt").read_text() == "as far as it came"
    assert (folder / "log.txt").read_bytes() == b"it began well\n"
    assert done.record["status"] == "Failed"
    assert documents.find(Dataset, done.record["output"]["name"]) is None
    assert "| Status | Failed (Prefect says " in done.artifacts["oasis-run"]
    assert not done.workspace.exists()


@pytest.mark.parametrize(
    ("limits", "code", "sentence", "kept"),
    [
        ({"max_output_size": "1KiB"}, "output_too_large", "wrote more than 1.0 KiB of output after", False),
        ({"max_output_files": 1}, "too_many_files", "wrote more than 1 files and folders after", False),
        ({"max_log_size": "1KiB"}, "log_too_large", "wrote more than 1.0 KiB to its log after", True),
    ],
)
def test_of_an_output_that_is_too_much_log_and_record_are_kept(ran, limits, code, sentence, kept):
    words = b"many words\n" * (100 if kept else 90)

    def much(job, log):
        for name in ("a.txt", "b.txt"):
            (host_path(job, "/work/output") / name).write_bytes(bytes(600))
        log("stdout", words)
        return 0

    done = ran(FakeEngine(much), Algorithm(docker_image=IMAGE, **limits))

    assert isinstance(done.result, AlgorithmFailed)
    assert sentence in done.run["state"]["message"]
    assert (done.record["status"], done.record["verdict"]["code"], done.record["exit"]["reason"]) == ("Failed", code, code)
    assert {path.name for path in done.folder.iterdir()} == {"log.txt", "task.json"} | ({"data"} if kept else set())
    assert (done.folder / "log.txt").read_bytes() == words[:1024]
    assert ("its files were not kept" in done.artifacts["oasis-run"]) is not kept
    assert documents.find(Dataset, done.record["output"]["name"]) is None
    assert not done.workspace.exists()


def test_a_failed_run_raises_in_a_python_call_and_quotes_the_end_of_the_log(here, notes):
    with stand_in(FakeEngine(ends(3))), pytest.raises(AlgorithmFailed, match="it began well") as failed:
        algorithm_task(Algorithm(docker_image=IMAGE), notes)

    assert failed.value.exit.exit_code == 3


def test_a_failed_output_can_be_nobodys_input(ran):
    failed = ran(FakeEngine(ends(1)))
    engine = FakeEngine()
    done = ran(engine, dataset=Dataset(url=str(failed.folder)))

    assert isinstance(done.result, DatasetError)
    assert "is not a dataset" in done.run["state"]["message"]
    assert engine.jobs == []


def test_an_output_that_no_dataset_can_hold_is_kept_with_log_and_record_that_say_failed(ran):
    def link_outside(job, log):
        output = host_path(job, "/work/output")
        (output / "good.txt").write_text("good")
        (output / "bad").symlink_to("/etc/passwd")
        log("stdout", b"done\n")
        return 0

    engine = FakeEngine(link_outside)
    done = ran(engine)

    assert isinstance(done.result, UnsafeName)
    assert "'bad' is a link" in done.run["state"]["message"]
    assert {path.name for path in done.folder.iterdir()} == {"data", "log.txt", "task.json"}
    assert [path.name for path in (done.folder / "data").iterdir()] == ["good.txt"]
    assert (done.folder / "log.txt").read_bytes() == b"done\n"
    assert len(engine.jobs) == 1
    assert documents.find(Dataset, f"algorithm-output-{done.id[:8]}") is None
    assert not done.workspace.exists()
    # The run failed, so what is written down about it must not say otherwise.
    assert done.record["status"] == "Failed"


def test_the_log_of_a_failed_algorithm_outlives_a_store_that_is_down(ran, flaky):
    def fail(job, log):
        FlakyStore.down = True
        log("stdout", b"the reason is here\n")
        return 1

    done = ran(FakeEngine(fail), store=flaky)

    assert isinstance(done.result, AlgorithmFailed)
    assert (done.workspace / "log.txt").read_bytes() == b"the reason is here\n"


# The engine fails


def fails_times(number, error):
    """An algorithm whose first runs meet an engine that fails; it leaves a file each time."""
    calls = []

    def algorithm(job, log):
        calls.append(job)
        (host_path(job, "/work/output") / f"{len(calls)}.txt").write_text("x")
        log("stdout", f"call {len(calls)}\n".encode())
        if len(calls) <= number:
            raise error
        return 0

    return algorithm


def test_a_container_that_got_lost_is_run_again_from_a_clean_output_and_log(ran):
    engine = FakeEngine(fails_times(1, ContainerLost("The container vanished. Run it again.")))
    done = ran(engine)

    assert done.run["state_type"] == "COMPLETED"
    assert len(engine.jobs) == 2
    assert [path.name for path in (done.folder / "data").iterdir()] == ["2.txt"]
    assert (done.folder / "log.txt").read_bytes() == b"call 2\n"


def test_an_engine_that_stays_away_is_asked_three_times_and_the_run_says_so(ran):
    engine = FakeEngine(fails_times(9, EngineUnavailable("The engine is away. Start it.")))
    done = ran(engine)

    assert len(engine.jobs) == 3
    assert isinstance(done.result, EngineUnavailable)
    assert done.run["state"]["message"] == "The engine is away."
    assert done.workspace.exists()
    with lease.taken(done.workspace / "lease", 0) as dead:
        assert dead
    assert "a retry of this run goes on from there" in done.logs(containing="kept for 24 hours")


def test_an_engine_error_that_time_does_not_heal_is_not_tried_again(ran):
    engine = FakeEngine(fails_times(9, EngineError("The engine refuses. Mend it.")))
    done = ran(engine)

    assert len(engine.jobs) == 1
    assert done.run["state"]["message"] == "The engine refuses."
    assert not done.workspace.exists()


class BusyRegistry(FakeEngine):
    """An engine whose registry answers from the third time on."""

    asked = 0

    def prepare(self, image):
        self.asked += 1
        if self.asked < 3:
            raise RegistryUnavailable("The registry is busy. Try again.")
        return super().prepare(image)


def test_a_pull_that_fails_for_the_moment_is_tried_again(ran):
    engine = BusyRegistry(count)

    assert ran(engine).run["state_type"] == "COMPLETED"
    assert engine.asked == 3


# What people see of a run


@pytest.mark.parametrize(
    ("opened", "force", "said"),
    [
        ({}, {}, "closed"),
        ({"network": True, "capabilities": ["NET_RAW"]}, {}, "loosened: network, capability NET_RAW"),
        ({}, {"system_calls_filtered": False}, "closed; the engine filters no system calls (its seccomp is off)"),
    ],
)
def test_a_run_shows_how_closed_its_sandbox_was(ran, opened, force, said):
    ended = ContainerExit(reason=Reason.OK, exit_code=0, in_force=force)
    done = ran(FakeEngine(ends(ended)), Algorithm(docker_image=IMAGE, **opened))

    assert f"| Sandbox | {said} |" in done.artifacts["oasis-run"]


def test_a_run_says_where_its_log_may_lack_something(ran):
    ended = ContainerExit(reason=Reason.OK, exit_code=0, log_lost="the engine was started anew")
    done = ran(FakeEngine(ends(ended)))

    assert "| Log | a part may be missing: the engine was started anew |" in done.artifacts["oasis-run"]
    assert done.record["exit"]["log_lost"] == "the engine was started anew"
    assert "A part of the log may be missing: the engine was started anew." in done.logs(containing="may be missing")


def used(*numbers):
    """An end with these samples: seconds, processors, MiB."""
    samples = tuple(Sample(seconds, cpus, mib << 20) for seconds, cpus, mib in numbers)
    return ContainerExit(
        reason=Reason.OK,
        exit_code=0,
        memory_limit_bytes=256 << 20,
        memory_peak_bytes=200 << 20,
        cpu_seconds=1.5,
        forks_refused=2,
        usage=samples,
    )


def test_a_run_shows_what_it_used_and_writes_it_down_in_few_lines(ran):
    done = ran(FakeEngine(ends(used((1.0, 0.5, 10), (2.0, 0.75, 128), (3.0, 0.25, 64)))))
    page, text = done.artifacts["oasis-run"], (done.folder / "task.json").read_text()

    assert "| Processors | 1.5 s of processor time, 0.50 of 1 on average |" in page
    assert "| Peak memory | 200.0 MiB of 256.0 MiB; 128.0 MiB without what the kernel kept of files |" in page
    assert "| Refused processes | 2, by `pids_limit` |" in page
    drawn = base64.b64decode(re.search(r"\(data:image/svg\+xml;base64,([^)]+)\)", page)[1]).decode()
    assert "Memory in use: 128 MiB at most, limit 256 MiB" in drawn
    assert done.record["usage"] == {
        "cpu_seconds": 1.5,
        "memory_peak_bytes": 200 << 20,
        "forks_refused": 2,
        "samples": [[1.0, 0.5, 10 << 20], [2.0, 0.75, 128 << 20], [3.0, 0.25, 64 << 20]],
    }
    assert "\n      [1.0, 0.5, 10485760],\n      [2.0, 0.75, 134217728],\n" in text
    assert "usage" not in done.record["exit"]


@pytest.mark.parametrize("samples", [[], [(0.1, 0.3, 5)]])
def test_a_run_too_short_to_be_drawn_has_no_picture(ran, samples):
    page = ran(FakeEngine(ends(used(*samples)))).artifacts["oasis-run"]

    assert "data:image" not in page
    assert "| Processors |" not in page


def test_a_run_links_to_its_dataset_and_lists_its_files(ran, prefect_server):
    done = ran(FakeEngine(count))
    document = f"algorithm-output-{done.id[:8]}"
    number = Dataset.load(document)._block_document_id

    assert f"dataset [{document}]({prefect_server.url}/blocks/block/{number}): 3 files" in done.artifacts["oasis-run"]
    assert json.loads(done.artifacts["oasis-output"]) == [
        {"file": "a.txt", "size": "1 B", "sha256": "d4735e3a265e"},
        {"file": "deep/er/a.txt", "size": "1 B", "sha256": "6b86b273ff34"},
        {"file": "empty.txt", "size": "1 B", "sha256": "5feceb66ffc8"},
    ]
    assert done.described["oasis-output"] == f"3 files, 3 B, in `{done.folder}/data`."


@pytest.mark.parametrize(("code", "rest"), [(0, "all are listed in `{}/manifest.jsonl`"), (1, "see `{}/data` for all")])
def test_of_many_files_the_first_are_listed_and_the_others_counted(ran, code, rest):
    def many(job, log):
        for number in range(503):
            (host_path(job, "/work/output") / f"{number:04}").write_text("x")
        return code

    done = ran(FakeEngine(many))
    about = f"503 files, 503 B, in `{done.folder}/data`. The first 500 are shown, 3 more are not: {rest.format(done.folder)}."

    assert [row["file"] for row in json.loads(done.artifacts["oasis-output"])] == [f"{number:04}" for number in range(500)]
    assert done.described["oasis-output"] == about


def test_a_quick_transfer_has_no_bar(ran):
    assert set(ran(FakeEngine(count)).artifacts) == {"oasis-run", "oasis-output"}


def test_a_transfer_that_takes_longer_has_a_bar_that_moves_and_ends_full(ran, flaky, monkeypatch):
    moved = []
    tell = artifacts.update_progress_artifact
    monkeypatch.setattr(artifacts, "update_progress_artifact", lambda bar, percent: moved.append(percent) or tell(bar, percent))

    def many(job, log):
        FlakyStore.seconds = 0.8
        for number in range(100):
            (host_path(job, "/work/output") / f"{number:04}").write_text("x" * 1000)
        return 0

    done = ran(FakeEngine(many), store=flaky)

    assert done.run["state_type"] == "COMPLETED"
    assert set(done.artifacts) == {"oasis-run", "oasis-output", "oasis-publish-output"}
    assert done.artifacts["oasis-publish-output"] == 100
    assert 2 <= len(moved) <= 6
    assert moved == sorted(set(moved))


class Refused(Exception):
    """What Prefect's client may raise."""


def test_a_bar_that_could_not_be_moved_still_ends_full(ran, flaky, monkeypatch):
    asked, tell = [], artifacts.update_progress_artifact

    def refuse_at_first(bar, percent):
        asked.append(percent)
        if len(asked) == 1:
            raise Refused("no room")
        return tell(bar, percent)

    monkeypatch.setattr(artifacts, "update_progress_artifact", refuse_at_first)

    def many(job, log):
        FlakyStore.seconds = 0.8
        for number in range(100):
            (host_path(job, "/work/output") / f"{number:04}").write_text("x")
        return 0

    done = ran(FakeEngine(many), store=flaky)

    assert len(asked) == 2
    assert done.artifacts["oasis-publish-output"] == asked[1] == 100


def test_artifacts_that_prefect_does_not_take_fail_no_run(ran, flaky, monkeypatch):
    asked = []

    def refuse(*_, **__):
        asked.append(1)
        raise Refused("no room")

    for name in ("create_markdown_artifact", "create_table_artifact", "create_progress_artifact"):
        monkeypatch.setattr(artifacts, name, refuse)

    def slow(job, log):
        FlakyStore.seconds = 0.8
        for number in range(100):
            (host_path(job, "/work/output") / f"{number:04}").write_text("x")
        return 0

    done = ran(FakeEngine(slow), store=flaky)

    assert done.run["state_type"] == "COMPLETED"
    assert done.artifacts == {}
    assert len(asked) == 3
    assert "The progress of a transfer could not be shown in Prefect: no room" in done.logs(
        containing="The list of output files"
    )


REFUSED = httpx.HTTPStatusError("no", request=httpx.Request("POST", "http://127.0.0.1/"), response=httpx.Response(500))


@pytest.mark.parametrize(
    "errors", [[httpx.ConnectError("away")], [httpx.ConnectError("away")] * 2, [REFUSED] * 2], ids=["once", "twice", "refused"]
)
def test_a_page_that_was_not_taken_is_shown_when_the_server_answers_and_tried_no_more(ran, monkeypatch, errors):
    left, greeted = list(errors), []
    create, greet = artifacts.create_markdown_artifact, artifacts.await_server

    def fail(*given, **options):
        if left:
            raise left.pop()
        return create(*given, **options)

    monkeypatch.setattr(artifacts, "create_markdown_artifact", fail)
    monkeypatch.setattr(artifacts, "await_server", lambda: greeted.append(greet()))
    done = ran(FakeEngine(count))

    assert done.run["state_type"] == "COMPLETED"
    assert greeted == [None]
    if len(errors) == 1:
        assert "oasis-run" in done.artifacts
    else:
        assert "oasis-run" not in done.artifacts
        assert done.logs(containing=f"The run's page could not be shown in Prefect: {errors[0]}")


# A retry of the run


def test_a_retry_after_the_store_came_back_publishes_and_repeats_nothing(ran, flaky, notes):
    def count_and_lose_the_store(job, log):
        FlakyStore.down = True
        return count(job, log)

    engine = FakeEngine(count_and_lose_the_store)
    algorithm = Algorithm(docker_image=IMAGE)
    failed = ran(engine, algorithm, store=flaky)
    document = f"algorithm-output-{failed.id[:8]}"

    assert failed.run["state_type"] == "FAILED"
    assert "did not answer" in failed.run["state"]["message"]
    assert documents.find(Dataset, document) is None
    assert (failed.workspace / "log.txt").exists()

    FlakyStore.down = False
    # Whoever stages this again finds nothing.
    Path(notes.url).rename(f"{notes.url}-moved")
    done = again(failed, engine, algorithm=algorithm, input_dataset=notes, store=flaky)

    assert done.id == failed.id
    assert done.run["state_type"] == "COMPLETED"
    assert done.run["run_count"] == 2
    assert len(engine.jobs) == 1
    assert Dataset.load(document).file_count == 3
    record = json.loads(FlakyStore.store[f"/results/algorithm-output/{done.id}/task.json"].getvalue())
    assert record["flow_run"]["attempt"] == 2
    assert not done.workspace.exists()


def test_a_retry_whose_workspace_is_gone_does_everything_again(ran, flaky, notes):
    def count_and_lose_the_store(job, log):
        FlakyStore.down = len(engine.jobs) == 1
        return count(job, log)

    engine = FakeEngine(count_and_lose_the_store)
    algorithm = Algorithm(docker_image=IMAGE)
    failed = ran(engine, algorithm, store=flaky)
    for path in sorted(failed.workspace.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    FlakyStore.down = False
    done = again(failed, engine, algorithm=algorithm, input_dataset=notes, store=flaky)

    assert done.run["state_type"] == "COMPLETED"
    assert len(engine.jobs) == 2


def test_a_retry_of_what_was_published_repeats_nothing_and_endangers_nothing(ran, notes, here):
    """As of a run whose process died between its dataset's manifest, or document, and the word to Prefect."""
    algorithm, tries = Algorithm(docker_image=IMAGE, memory="16MiB", memory_max="64MiB"), []

    def count_with_enough_memory(job, log):
        tries.append(job)
        limit = job.resources.memory_bytes
        return (
            ContainerExit(reason=Reason.OUT_OF_MEMORY, exit_code=137, memory_limit_bytes=limit)
            if len(tries) == 1
            else count(job, log)
        )

    first = ran(FakeEngine(count_with_enough_memory), algorithm)
    place = Path(first.result.url)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    pages = [first.artifacts["oasis-run"]]
    Dataset.delete(first.result._block_document_name)

    engine = FakeEngine(count)
    second = again(first, engine, algorithm=algorithm, input_dataset=notes)

    assert second.run["state_type"] == "COMPLETED"
    assert engine.jobs == []
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert (second.result.url, second.result.file_count) == (first.result.url, 3)
    assert Dataset.load(first.result._block_document_name).manifest_digest == first.result.manifest_digest
    pages.append(second.artifacts["oasis-run"])
    # The document was made anew; and the record that a retry reads was written before all was published, some milliseconds earlier.
    assert len({re.sub(r"blocks/block/[-0-9a-f]+|publish output [0-9.]+ s", "", page) for page in pages}) == 1
    assert second.artifacts["oasis-output"] == first.artifacts["oasis-output"]
    assert not second.workspace.exists()


@pytest.mark.parametrize("noted", [("stage_input", "prepare_image", "run_container"), ("publish_output",), ()])
def test_a_retry_finds_what_was_published_whatever_an_attempt_has_noted_here(ran, notes, noted):
    """As after a death between the manifest and the note of it; or in the middle of a retry that recalled it."""
    algorithm = Algorithm(docker_image=IMAGE)
    first = ran(FakeEngine(count), algorithm)

    def written():
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(first.result.url).rglob("*")}

    before = written()
    done = first.workspace / "done"
    done.mkdir(parents=True)
    record = json.loads((Path(first.result.url) / "task.json").read_text())
    notes_of = {
        "stage_input": {"folder": notes.url, "summary": {"file_count": 9, "size_bytes": 9, "digest": None}},
        "seconds": 0,
    }
    for step in noted:
        (done / f"{step}.json").write_text(
            json.dumps({"image": record["image"], "seconds": 0, **notes_of.get(step, {"summary": {}})})
        )
    engine = FakeEngine(count)
    second = again(first, engine, algorithm=algorithm, input_dataset=notes)

    assert second.run["state_type"] == "COMPLETED", second.run["state"]
    assert engine.jobs == []
    assert second.result.manifest_digest == first.result.manifest_digest
    assert written() == before


def another_manifest(place):
    lines = (place / "manifest.jsonl").read_text().splitlines(keepends=True)
    (place / "manifest.jsonl").write_text("".join(lines[1:]))


@pytest.mark.parametrize(
    ("spoil", "changes"),
    [
        (lambda place: (place / "manifest.jsonl").unlink(), {}),
        (another_manifest, {}),
        (lambda place: None, {"cpus": 0.5}),
        (lambda place: None, {"command": "another"}),
    ],
    ids=["no manifest", "another manifest", "another limit", "another command"],
)
def test_a_retry_of_what_is_not_what_was_published_does_everything_again(ran, notes, spoil, changes):
    first = ran(FakeEngine(count))
    spoil(Path(first.result.url))
    done = first.workspace / "done"
    done.mkdir(parents=True)
    # Half of what a retry noted that found it, and died.
    (done / "publish_output.json").write_text(
        json.dumps({"summary": {"file_count": 9, "size_bytes": 9, "digest": None}, "seconds": 0})
    )
    engine = FakeEngine(count)
    second = again(first, engine, algorithm=Algorithm(docker_image=IMAGE, **changes), input_dataset=notes)

    assert second.run["state_type"] == "COMPLETED"
    assert len(engine.jobs) == 1
    assert second.result.file_count == 3
    assert len((Path(second.result.url) / "manifest.jsonl").read_text().splitlines()) == 3


def test_a_store_that_is_away_as_a_retry_begins_keeps_it_from_nothing_that_goes_on(ran, flaky, notes):
    """Hours of a container that still runs may depend on it."""
    first = ran(FakeEngine(fails_times(9, EngineUnavailable("The engine is away. Start it."))), store=flaky)
    assert first.run["state_type"] == "FAILED"
    FlakyStore.down = True

    def count_and_find_the_store(job, log):
        FlakyStore.down = False
        return count(job, log)

    second = again(
        first, FakeEngine(count_and_find_the_store), algorithm=Algorithm(docker_image=IMAGE), input_dataset=notes, store=flaky
    )
    assert second.run["state_type"] == "COMPLETED", second.run["state"]


@contextlib.contextmanager
def passed_on():
    """Prefect passes a signal on to who had asked for it before: these."""
    passed = []
    before = signal.signal(signal.SIGTERM, lambda number, _: passed.append(number))
    try:
        yield passed
    finally:
        signal.signal(signal.SIGTERM, before)


def terminated_as_a_model_is_written(*_):
    """Pydantic makes an error of its own of the signal's exception."""

    class Written(BaseModel):
        @model_serializer
        def write(self):
            signal.raise_signal(signal.SIGTERM)

    class Around(BaseModel):
        written: Written = Written()

        @model_serializer(mode="wrap")
        def write(self, handler):
            return handler(self)

    return Around().model_dump()


def test_a_signal_that_came_while_a_model_was_written_is_no_failure(ran, prefect_server, here):
    class Interrupted(FakeEngine):
        prepare = terminated_as_a_model_is_written

    tag = uuid.uuid4().hex
    with passed_on() as passed, tags(tag), pytest.raises(TerminationSignal):
        ran(Interrupted())

    assert passed == [signal.SIGTERM]
    (run,) = prefect_server.api("/flow_runs/filter", {"flow_runs": {"tags": {"all_": [tag]}}})
    assert run["state_type"] == "CRASHED", run["state"]
    assert not (here / "workspaces" / run["id"]).exists()


def test_a_signal_that_came_as_a_run_of_a_worker_began_is_no_failure(ran, notes, monkeypatch):
    """There nobody calls the flow: Prefect's engine runs it."""
    first = ran(FakeEngine(ends(1)))
    monkeypatch.setattr(lifecycle, "_prefect_environment", terminated_as_a_model_is_written)
    with passed_on() as passed, pytest.raises(TerminationSignal):
        again(first, FakeEngine(count), algorithm=Algorithm(docker_image=IMAGE), input_dataset=notes)

    assert passed == [signal.SIGTERM]
    assert first.run["state_type"] == "CRASHED", first.run["state"]


def test_what_nobody_foresaw_is_told_like_any_other_failure(ran, notes):
    class Broken(FakeEngine):
        def prepare(self, image):  # noqa: ARG002
            raise ZeroDivisionError("division by zero")

    done = ran(Broken())

    assert isinstance(done.result, InternalError)
    assert isinstance(done.result.__cause__, ZeroDivisionError)
    assert done.run["state_type"] == "FAILED"
    assert done.run["state"]["message"] == "Something failed that oasis-flows did not foresee."
    assert "failed:internal" in done.run["tags"]
    assert "ZeroDivisionError: division by zero" in done.artifacts["oasis-run"]
    assert not done.workspace.exists()


def test_a_flow_with_retries_goes_on_by_itself(here, prefect_server, notes):
    engine = FakeEngine(fails_times(4, EngineUnavailable("The engine is away. Start it.")))
    with stand_in(engine):
        flow = algorithm_task.with_options(retries=1, retry_delay_seconds=0)
        state = flow(Algorithm(docker_image=IMAGE), notes, return_state=True)

    assert len(engine.jobs) == 5
    assert [job.attempt for job in engine.jobs] == [1, 1, 1, 2, 2]
    assert state.is_completed()


def test_a_flow_with_retries_does_not_repeat_an_algorithm_that_failed(here, prefect_server, notes):
    engine = FakeEngine(ends(3))
    with stand_in(engine):
        flow = algorithm_task.with_options(retries=1, retry_delay_seconds=0)
        state = flow(Algorithm(docker_image=IMAGE), notes, return_state=True)

    assert len(engine.jobs) == 1
    assert state.is_failed()


def test_a_second_process_on_the_same_run_is_refused(ran, notes, here):
    first = ran(FakeEngine(fails_times(9, EngineUnavailable("The engine is away. Start it."))))
    engine = FakeEngine()
    with lease.hold(first.workspace / "lease"):
        second = again(first, engine, algorithm=Algorithm(docker_image=IMAGE), input_dataset=notes)

    assert second.run["state_type"] == "FAILED"
    assert "Another process is working on the run" in second.run["state"]["message"]
    assert engine.jobs == []
    assert first.workspace.exists()


# Secrets


def tell(job, log):
    """Say the secret aloud, in pieces and in both streams, and fail."""
    value = job.secret_environment["TOKEN"].encode()
    log("stdout", b"the token is " + value[:5])
    log("stdout", value[5:] + b"\n")
    log("stderr", b"! " + value + b"\n")
    return 1


def test_a_secret_is_in_no_log_record_artifact_or_message(ran):
    Secret(value=SECRET).save("hush", overwrite=True)
    engine = FakeEngine(tell)
    done = ran(engine, Algorithm(docker_image=IMAGE, secret_environment={"TOKEN": "hush"}))

    assert engine.jobs[0].secret_environment == {"TOKEN": SECRET}
    assert SECRET not in repr(engine.jobs[0])
    assert (done.folder / "log.txt").read_bytes() == b"the token is ***\n! ***\n"
    assert done.record["secret_environment"] == {"TOKEN": "hush"}
    told = [
        (done.folder / "task.json").read_text(),
        str(done.artifacts),
        done.logs(containing="ended with exit code 1"),
        json.dumps(done.run, ensure_ascii=False),
        str(done.result),
        repr(done.result),
    ]
    assert [text for text in told if SECRET in text or SECRET.encode("unicode_escape").decode() in text] == []


def test_a_secret_that_the_engine_quotes_does_not_come_out(ran):
    Secret(value=SECRET).save("hush", overwrite=True)

    def refuse(job, log):
        raise EngineError(f"The engine refuses TOKEN={SECRET}. Mend it.")

    done = ran(FakeEngine(refuse), Algorithm(docker_image=IMAGE, secret_environment={"TOKEN": "hush"}))

    assert done.run["state"]["message"] == "The engine refuses TOKEN=***."
    assert SECRET not in done.logs(containing="The engine refuses")


@pytest.mark.parametrize("where", ["store", "dataset", "registry"])
def test_a_secret_that_arrived_as_asterisks_is_refused_with_advice(ran, tmp_path, notes, where):
    masked = DatasetStore(url="s3://bucket/x", access_key_id="key", secret_access_key="*" * 8)
    login = DockerRegistryCredentials(username="me", password="*" * 8, registry_url="registry.example.org")
    engine = FakeEngine()
    done = ran(
        engine,
        Algorithm(docker_image=DockerImage(image_id="a:1", registry_credentials=login if where == "registry" else None)),
        Dataset(url="s3://bucket/in", store=masked) if where == "dataset" else notes,
        store=masked if where == "store" else None,
    )

    assert isinstance(done.result, DescriptionError)
    assert "Pass a reference instead" in str(done.result)
    assert "arrived as asterisks" in done.run["state"]["message"]
    assert engine.jobs == engine.images == []


# What is wrong as written

INLINE = {"docker_image": {"image_id": "a:1"}}


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"parameters": {}}, "`n` is missing and has no default"),
        ({"parameters": {"n": 1, "m": 2}}, "`m` is unknown (it has `n`, `t`)"),
        ({"parameters": {"n": 1, "t": 5}}, "`t` is 5 and must be text"),
        ({"parameters": {"n": [1]}}, "must be text, a number, true or false"),
        ({"output_name": "Not Good"}, "such as 'not-good'"),
        ({"output_name": "../up"}, "such as 'up'"),
        ({"algorithm": "no-such"}, "There is no algorithm document 'no-such'"),
        ({"dataset": "no-such"}, "There is no dataset document 'no-such'"),
        ({"store": "no-such"}, "There is no dataset-store document 'no-such'"),
        ({"algorithm": INLINE | {"prerequisites": [1]}}, "Write its name, or {name: NAME"),
        ({"algorithm": INLINE | {"prerequisites": ["no-such"]}}, "there is no prerequisite document 'no-such'"),
        ({"algorithm": INLINE | {"prerequisites": ["marketplace://name/x"]}}, "the setting OASIS_FLOWS_MARKETPLACES"),
        ({"algorithm": INLINE | {"prerequisites": ["file:///no/such"]}}, "file:///no/such cannot be read"),
        ({"algorithm": INLINE | {"gpu": True}}, "or set gpu: false"),
        ({"algorithm": INLINE | {"secret_environment": {"A": "no-such"}}}, "Make it in the Prefect UI"),
        ({"algorithm": INLINE | {"memory": "lots"}}, "such as 512MiB"),
        ({"algorithm": INLINE | {"working_dir": "/proc/x"}}, "Write another folder, such as /work"),
        ({"algorithm": INLINE | {"command": "x" * 100_001}}, "Put long scripts into the image"),
        ({"algorithm": {"docker_image": {}}}, "Write image_id: NAME:TAG"),
        ({"algorithm": {"docker_image": {"image_id": "gone:1"}}}, "There is no image gone:1."),
        ({"dataset": {"url": "EMPTY"}}, "Put files there"),
        ({"dataset": {"url": "EMPTY/none"}}, "Check the address"),
        ({"dataset": {"url": "FILE"}}, "give the folder that it is in"),
        ({"store": {"url": "FILE/store"}}, "not there"),
        ({"dataset": {"url": "EMPTY", "nonsense": 1}}, "Put files there"),
    ],
)
def test_a_run_that_is_wrong_as_written_is_refused_before_any_container_with_advice(ran, tmp_path, notes, options, advice):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("I am a file")
    options = json.loads(json.dumps(options).replace("EMPTY", str(tmp_path / "empty")).replace("FILE", str(tmp_path / "file")))
    algorithm = options.pop("algorithm", None)
    if "parameters" in options:
        algorithm = Algorithm(docker_image=IMAGE, parameters={"n": None, "t": "text"})
    engine = FakeEngine(missing=("gone:1",))
    done = ran(engine, algorithm, options.pop("dataset", None), **options)

    assert done.run["state_type"] == "FAILED"
    assert advice in str(done.result)
    assert engine.jobs == []
    assert not done.workspace.exists()
    # Nothing is lost, and nothing that was not there before is left where datasets are.
    assert sorted(path.name for path in Path(notes.url).iterdir()) == ["a.txt", "deep", "empty.txt"]


@pytest.mark.parametrize(
    ("slug", "advice"),
    [("dataset/wrong-type", "algorithm"), ("algorithm/nowhere", "nowhere")],
)
def test_a_reference_to_the_wrong_document_is_refused_with_a_word_on_what_it_must_be(ran, notes, slug, advice):
    notes.save("wrong-type", overwrite=True)
    engine = FakeEngine()
    done = ran(engine, {"$ref": {"block_document_slug": slug}})

    assert done.run["state_type"] == "FAILED"
    assert advice in done.run["state"]["message"]
    assert engine.jobs == []


@pytest.mark.parametrize("by", ["block_document_slug", "block_document_id"])
def test_a_document_that_was_spoilt_on_the_server_is_refused(ran, by):
    id = Algorithm(docker_image=IMAGE).save("spoilt", overwrite=True)
    with get_client(sync_client=True) as client:
        client.update_block_document(id, BlockDocumentUpdate(data={"memory": "lots"}))
    engine = FakeEngine()
    done = ran(engine, {"$ref": {by: "algorithm/spoilt" if by == "block_document_slug" else str(id)}})

    assert done.run["state_type"] == "FAILED"
    assert isinstance(done.result, DescriptionError), done.result
    assert "'spoilt'" in str(done.result)
    assert engine.jobs == []


def test_the_state_of_a_run_with_an_unknown_document_is_the_first_sentence(ran):
    done = ran(FakeEngine(), "no-such")

    assert done.run["state"]["message"] == "There is no algorithm document 'no-such'."


def test_a_gpu_is_given_where_there_is_one_and_its_number_told(ran):
    engine = FakeEngine(gpus=2)
    done = ran(engine, Algorithm(docker_image=IMAGE, gpu=True, gpu_count=2))

    assert done.run["state_type"] == "COMPLETED"
    assert engine.jobs[0].resources.gpus == 2
    assert engine.jobs[0].environment["OASIS_GPU_COUNT"] == "2"


def test_a_refused_run_leaves_nothing_in_the_store(ran, tmp_path):
    engine = FakeEngine()
    done = ran(engine, Algorithm(docker_image=IMAGE, gpu=True), store=DatasetStore(url=str(tmp_path / "store")))

    assert isinstance(done.result, NoGpu)
    assert list((tmp_path / "store").rglob("*")) == []


def test_every_error_of_a_run_is_one_that_the_command_line_has_a_code_for(ran):
    done = ran(FakeEngine(fails_times(9, ContainerLost("It is lost. Try again."))))

    assert isinstance(done.result, OasisError)
    assert done.result.exit_code == 3


def test_once_a_container_has_ended_a_retry_needs_no_engine_for_its_image(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.mark_done(tasks.MARKER_IMAGE, {"image": "sha256:1"})
    workspace.mark_done(tasks.MARKER_RUN, {"exit": {}})

    assert tasks.prepare_image.fn(plan=None, workspace=workspace, settings=None) == "sha256:1"


@pytest.mark.parametrize("status", [None, 503, 403])
def test_a_step_waits_for_a_server_that_is_away_when_prefect_asks_it_for_a_place(ran, monkeypatch, status):
    """Prefect's engine asks before each task of a run with tags, whether their limits leave room; once."""
    request = httpx.Request("POST", "http://127.0.0.1/increment")
    refused = httpx.HTTPStatusError("no", request=request, response=httpx.Response(status or 503, request=request))
    failures = [httpx.ReadError("cut", request=request) if status is None else refused]
    refuse_places(monkeypatch, failures)
    with tags("a"):
        done = ran(FakeEngine(count))

    assert failures == []
    assert (done.state.is_completed(), getattr(done.result, "code", None)) == (
        (False, "server_denied") if status == 403 else (True, None)
    )


def test_a_server_that_does_not_answer_prefects_own_engine_is_said_to_be_away(ran, monkeypatch):
    """As where it is to take back the place of a task that has ended."""

    def cut(*_, **__):
        raise httpx.ReadError("cut")

    monkeypatch.setattr("oasis_flows.flows.algorithm_task.prepare_image", cut)
    assert ran(FakeEngine(count)).result.code == "server_unavailable"
