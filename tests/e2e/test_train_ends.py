"""Visits on a real worker, ended and asked about from outside: nothing of them stays, and their state says what happened."""

from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from oasis_flows import settings, visit_record
from oasis_flows.blocks import Station
from oasis_flows.engines.docker_layer import DRAFTS, PUSHING
from oasis_flows.registry_index import RegistryIndex
from oasis_flows.station_keys import trusted
from oasis_flows.train_deployments import ask_visit
from tests.e2e.test_cancel import process_of
from tests.servers.engine import alive, containers_of, eventually
from tests.servers.faultproxy import Faults, between
from tests.servers.prefect import ROOT, PrefectServer, worker_process
from tests.servers.registry import Registry
from tests.trains import MODEL, SUCCESS, train_image, v1

GATE = f"while [ ! -e /gate/open ]; do sleep 0.1; done; {SUCCESS}"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


@dataclass
class Visits:
    """A station with a registry, to which trains come on a worker; its trains run until its gate is open."""

    server: PrefectServer
    api: Any
    registry: Registry
    gate: Path
    place: str = field(default_factory=lambda: f"ends-{uuid.uuid4().hex[:8]}")

    def station(self, **changes: Any) -> Station:
        """Saves the station's document."""
        given: dict[str, Any] = {
            "station_id": 1,
            "environment": {"PHT_URL": "https://data.example.org/fhir", "PHT_TOKEN": "x"},
            "mounts": [{"target": "/gate", "host_path": str(self.gate)}],
            "registry": f"{self.registry.address}/{self.place}",
            "memory": "128MiB",
        }
        made = Station(**given | changes)
        made.save(self.place, overwrite=True)
        return made

    def ask(self, train: str, **changes: Any) -> str:
        """Have the worker let the train in; return the run's id."""
        self.station(**changes)
        deployment = self.server.api("/deployments/name/train/train")
        parameters = {"image": train, "api": "V1", "station": {"$ref": {"block_document_slug": f"station/{self.place}"}}}
        return str(self.server.api(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"])

    def open(self) -> None:
        """Let the trains end."""
        (self.gate / "open").touch()

    def retry(self, run_id: str) -> None:
        """Have the worker try again."""
        self.server.run("prefect", "flow-run", "retry", run_id)

    def asking(self, run_id: str) -> dict[str, Any]:
        """The run, once it waits for an answer."""
        run = self.server.wait_for(run_id, "PAUSED", *ENDED, seconds=180)
        assert run["state_type"] == "PAUSED", run["state"]
        return run

    def answer(self, run_id: str, agree: bool) -> str:
        """Answer the form of a run once it is asked; return what that says."""
        paused = self.asking(run_id)
        keys = paused["state"]["state_details"]["run_input_keyset"]
        asked = {"prefix": keys["description"], "limit": 1}
        eventually(lambda: self.server.api(f"/flow_runs/{run_id}/input/filter", asked), 60)
        told = self.server.api(f"/flow_runs/{run_id}/input/{keys['description']}")
        self.server.api(f"/flow_runs/{run_id}/resume", {"run_input": {"agree": agree, "comment": "seen"}})
        return str(told)

    def pushed(self) -> list[str]:
        """The trains that the station's registry has."""
        index = RegistryIndex(f"{self.registry.address}/{self.place}", None)
        return [f"{name}:{tag}" for name in index.repositories() for tag in index.tags(name)]

    def left(self, run_id: str, train: str) -> list[str]:
        """What there is of a visit in the engine: containers, drafts, and the images that it fetched or pushed."""
        ours = (f"{DRAFTS}:{run_id}", f"{PUSHING}:{run_id}", f"{self.registry.address}/{self.place}/", train)
        return [row["Id"] for row in containers_of(self.api, run_id)] + [
            name for name in self.named("") if name.startswith(ours)
        ]

    def named(self, part: str) -> list[str]:
        """The names of images of the engine with this in it."""
        return [name for row in self.api.images() for name in row.get("RepoTags") or () if part in name]

    def workspace(self, run_id: str) -> Path:
        return self.server.home / "workspaces" / run_id

    def folder(self, run_id: str) -> Path:
        return Path(self.server.api(f"/flow_runs/{run_id}")["labels"]["oasis.output"])


@pytest.fixture
def visits(
    deployed: PrefectServer, docker_api: Any, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Visits:
    monkeypatch.setenv("OASIS_FLOWS_HOME", str(deployed.home))
    (tmp_path / "gate").mkdir()
    return Visits(deployed, docker_api, registry, tmp_path / "gate")


@pytest.fixture
def train(docker_api: Any, registry: Registry, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Makes a train that the engine does not have: it has to be fetched from the registry."""
    fetched = []

    def make(script: str) -> str:
        with train_image(docker_api, tmp_path, script) as name:
            fetched.append(registry.push(docker_api, name, f"sent/train_{uuid.uuid4().hex[:8]}"))
        return fetched[-1]

    yield make
    for name in fetched:
        with suppress(Exception):
            docker_api.remove_image(name, force=True)


def wait_for_run(api: Any, run_id: str) -> str:
    """The id of the container in which the train runs, once it does."""

    def running() -> list[str]:
        rows = [row for row in containers_of(api, run_id) if "run_algorithm" in row["Command"]]
        return [row["Id"] for row in rows if row["State"] == "running"]

    eventually(running, 180)
    return running()[0]


def image_name(image: str) -> str:
    return image.rpartition("/")[2].partition(":")[0]


def assert_nothing_left(visits: Visits, run_id: str, train: str) -> None:
    eventually(lambda: not visits.left(run_id, train) and not visits.workspace(run_id).exists(), 60)


def test_a_cancelled_visit_leaves_nothing(deployed, worker, docker_api, visits, train):
    image = train(v1("sleep 600"))
    run_id = visits.ask(image)
    wait_for_run(docker_api, run_id)
    deployed.run("prefect", "flow-run", "cancel", run_id)

    run = deployed.wait_for(run_id, *ENDED, seconds=120)

    assert run["state_type"] == "CANCELLED", run["state"]
    assert_nothing_left(visits, run_id, image)
    assert visits.pushed() == []
    assert not visits.folder(run_id).exists()


def test_a_killed_visit_is_a_crash_and_its_retry_takes_along_what_the_first_fetched(
    deployed, worker, docker_api, visits, train
):
    image = train(v1(GATE))
    run_id = visits.ask(image)
    wait_for_run(docker_api, run_id)
    os.kill(process_of(run_id), signal.SIGKILL)

    run = deployed.wait_for(run_id, *ENDED, seconds=120)

    assert run["state_type"] == "CRASHED", run["state"]
    # What it fetched is kept for a retry, as its workspace is, and for nothing else.
    eventually(lambda: visits.left(run_id, image) == [image], 60)
    assert visits.pushed() == []
    visits.open()
    visits.retry(run_id)
    run = deployed.wait_for(run_id, *ENDED, seconds=180)
    assert run["state_type"] == "COMPLETED", run["state"]
    assert_nothing_left(visits, run_id, image)
    assert len(visits.pushed()) == 1


def test_a_visit_that_is_killed_while_it_pushes_pushes_nothing_and_does_not_run_again(
    deployed, worker, docker_api, visits, train, registry
):
    visits.open()
    image = train(v1(GATE))
    with between(int(registry.address.rpartition(":")[2])) as proxy:
        proxy.set(Faults(black_hole=True))
        run_id = visits.ask(image, registry=f"127.0.0.1:{proxy.port}/{visits.place}")
        eventually(lambda: proxy.faulted and any(PUSHING in name for name in visits.left(run_id, image)), 180)
        ran = json.loads((visits.workspace(run_id) / "done/run_train.json").read_text())
        os.kill(process_of(run_id), signal.SIGKILL)

        run = deployed.wait_for(run_id, *ENDED, seconds=120)

        assert run["state_type"] == "CRASHED", run["state"]
        eventually(lambda: visits.left(run_id, image) == [image], 60)
        assert visits.named(f":{proxy.port}/") == []
        assert visits.pushed() == []
        proxy.set(Faults())
        visits.retry(run_id)
        run = deployed.wait_for(run_id, *ENDED, seconds=180)
    assert run["state_type"] == "COMPLETED", run["state"]
    record = json.loads((visits.folder(run_id) / "record.json").read_text())
    assert record["exit"]["in_force"]["container"] == ran["exit"]["in_force"]["container"]
    assert len(visits.pushed()) == 1
    assert_nothing_left(visits, run_id, image)


def test_somebody_agrees_by_the_server_and_the_train_leaves(deployed, worker, visits, train):
    visits.open()
    image = train(v1(GATE))
    run_id = visits.ask(image, policy={"hold_for_approval": True})

    asked = visits.answer(run_id, agree=True)
    run = deployed.wait_for(run_id, *ENDED, seconds=120)

    assert f"`/{MODEL[1:]}` | changed | 2 B" in asked
    assert run["state_type"] == "COMPLETED", run["state"]
    record = json.loads((visits.folder(run_id) / "record.json").read_text())
    assert record["approval"] == {"agree": True, "comment": "seen"}
    (name,) = visits.pushed()
    assert name.endswith(f":{visits.place}-1")
    assert len(visit_record.verify_folder(visits.folder(run_id), trusted(settings.current()))) == 1
    assert_nothing_left(visits, run_id, image)


def test_who_was_asked_is_asked_again_by_a_retry(deployed, worker, docker_api, visits, train):
    visits.open()
    image = train(v1(GATE))
    run_id = visits.ask(image, policy={"hold_for_approval": True})
    visits.asking(run_id)
    ran = json.loads((visits.workspace(run_id) / "done/run_train.json").read_text())
    os.kill(process_of(run_id), signal.SIGKILL)
    run = deployed.wait_for(run_id, *ENDED, seconds=120)
    assert run["state_type"] == "CRASHED", run["state"]
    assert visits.pushed() == []

    visits.retry(run_id)
    visits.answer(run_id, agree=False)
    run = deployed.wait_for(run_id, *ENDED, seconds=120)

    assert run["state_type"] == "FAILED", run["state"]
    assert (
        run["state"]["message"]
        == f"Somebody at station {visits.place} did not agree that the train {image_name(image)} leaves."
    )
    record = json.loads((visits.folder(run_id) / "record.json").read_text())
    assert record["exit"]["in_force"]["container"] == ran["exit"]["in_force"]["container"]
    assert visits.pushed() == []
    assert_nothing_left(visits, run_id, image)

    visits.retry(run_id)
    visits.answer(run_id, agree=True)
    run = deployed.wait_for(run_id, *ENDED, seconds=120)
    assert run["state_type"] == "COMPLETED", run["state"]
    assert len(visits.pushed()) == 1
    assert_nothing_left(visits, run_id, image)


def test_a_visit_that_is_cancelled_while_it_waits_for_an_answer_leaves_nothing(deployed, worker, visits, train):
    visits.open()
    image = train(v1(GATE))
    run_id = visits.ask(image, policy={"hold_for_approval": True})
    visits.asking(run_id)
    deployed.run("prefect", "flow-run", "cancel", run_id)

    run = deployed.wait_for(run_id, *ENDED, seconds=120)

    assert run["state_type"] == "CANCELLED", run["state"]
    assert_nothing_left(visits, run_id, image)
    assert visits.pushed() == []


def test_a_machine_that_comes_back_takes_up_the_train_that_still_runs(deployed, docker_api, visits, train, tmp_path):
    pool, image = f"pool-{visits.place}", train(v1(f"echo began; {GATE}"))
    template = json.loads((ROOT / "deployments/work-pools/gpu-process.json").read_text())
    deployed.api("/work_pools/", {"name": pool, "type": "process", "base_job_template": template})
    here = {"OASIS_FLOWS_HOME": str(tmp_path / "home"), "OASIS_FLOWS_RETRY_WINDOW": "900"}
    with worker_process(deployed, tmp_path / "first.log", pool=pool, **here) as first:
        station = visits.station(work_pool=pool)
        run_id = str(ask_visit(station, {"image": image, "api": "V1"}, key=visits.place, tags=[]).id)
        container, flow = wait_for_run(docker_api, run_id), process_of(run_id)
        os.killpg(first.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(flow, signal.SIGKILL)
        eventually(lambda: not alive(flow), 20)
    # Nobody is left who could say so but the run's watchdog.
    run = deployed.wait_for(run_id, *ENDED, seconds=180)
    assert run["state_type"] == "CRASHED", run["state"]
    assert [row["Id"] for row in containers_of(docker_api, run_id)] == [container]

    log = tmp_path / "home" / "workspaces" / run_id / "log.txt"
    before = log.stat().st_mtime_ns
    with worker_process(deployed, tmp_path / "second.log", pool=pool, **here):
        visits.retry(run_id)
        # It is taken up once its log is written anew.
        eventually(lambda: log.stat().st_mtime_ns != before, 120)
        visits.open()
        run = deployed.wait_for(run_id, *ENDED, seconds=120)

    assert run["state_type"] == "COMPLETED", run["state"]
    folder = visits.folder(run_id)
    assert json.loads((folder / "record.json").read_text())["exit"]["in_force"]["container"] == container
    assert (folder / "log.txt").read_text().count("began\n") == 1
    assert len(visits.pushed()) == 1
    assert visits.left(run_id, image) == []
    assert list((tmp_path / "home" / "workspaces").iterdir()) == []


def test_the_station_s_loop_lets_in_what_has_come_and_both_ends_are_told(
    deployed, worker, docker_api, visits, registry, tmp_path
):
    number = 1000 + uuid.uuid4().int % 10**6
    visits.station(station_id=number)
    for name, script in (("train_good", v1()), ("train_bad", v1("exit 4"))):
        with train_image(docker_api, tmp_path, script) as image:
            registry.push(docker_api, image, f"{visits.place}/{name}", f"station.{number}")
    loop = deployed.api("/deployments/name/train-station/train-station")
    parameters = {"station": {"$ref": {"block_document_slug": f"station/{visits.place}"}}}

    for _ in range(2):
        looked = deployed.api(f"/deployments/{loop['id']}/create_flow_run", {"parameters": parameters})["id"]
        assert deployed.wait_for(looked, *ENDED, seconds=180)["state_type"] == "COMPLETED"

    wanted = {"flow_runs": {"tags": {"all_": [f"station-loop:{number}"]}}}
    runs = {
        run["parameters"]["image"].partition("@")[0].rpartition("/")[2]: deployed.wait_for(run["id"], *ENDED, seconds=180)
        for run in deployed.api("/flow_runs/filter", wanted)
    }
    assert {name: run["state_type"] for name, run in runs.items()} == {"train_good": "COMPLETED", "train_bad": "FAILED"}
    assert "ended with exit code 4" in runs["train_bad"]["state"]["message"]
    places = [f"{registry.address}/{visits.place}/{name}" for name in ("train_bad", "train_good")]
    tags = [f"{places[0]}:station.{number}", f"{places[1]}:station.{number}", f"{places[1]}:{visits.place}-1"]
    assert sorted(visits.pushed()) == sorted(tags)
    for run in runs.values():
        assert_nothing_left(visits, run["id"], places[0])
