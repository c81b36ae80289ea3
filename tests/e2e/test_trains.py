"""Trains on real workers: a ride over three stations, each on its own pool; people who are asked; visits that are ended."""

from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import State

from oasis_flows import settings, visit_record
from oasis_flows.blocks import Station
from oasis_flows.engines.docker_layer import DRAFTS
from oasis_flows.errors import TrainFailed
from oasis_flows.flows.station import train_station
from oasis_flows.flows.train_route import train_route
from oasis_flows.reaper import reap
from oasis_flows.running import begin_again
from oasis_flows.station_keys import trusted
from tests.e2e.test_cancel import process_of, wait_for_container
from tests.servers.engine import containers_of, eventually
from tests.servers.prefect import ROOT, PrefectServer, worker_process
from tests.servers.registry import Registry
from tests.trains import SUCCESS, train_image, v1

POOLS = ("hospital-a", "hospital-b", "hospital-c")
URL = {"PHT_URL": "https://data.example.org/fhir"}


@pytest.fixture(scope="module")
def pools(deployed: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Three work pools with a worker each."""
    template = json.loads((ROOT / "deployments/work-pools/gpu-process.json").read_text())
    folder = tmp_path_factory.mktemp("workers")
    with ExitStack() as started:
        for pool in POOLS:
            deployed.api("/work_pools/", {"name": pool, "type": "process", "base_job_template": template})
            started.enter_context(worker_process(deployed, folder / f"{pool}.log", pool=pool))
        yield


@pytest.fixture
def home(deployed: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of the workers, also for this process."""
    monkeypatch.setenv("OASIS_FLOWS_HOME", str(deployed.home))
    return deployed.home


@pytest.fixture
def image(docker_api: Any, tmp_path: Path) -> Iterator[Callable[..., str]]:
    with ExitStack() as made:
        yield lambda script, name="": made.enter_context(train_image(docker_api, tmp_path, script, name))


def station(number: int, **changes: Any) -> str:
    """Saves a station's document and returns its name."""
    given = {"station_id": number, "environment": {**URL, "PHT_TOKEN": "x"}, "memory": "128MiB", **changes}
    Station(**given).save(POOLS[number - 1], overwrite=True)
    return POOLS[number - 1]


def left(api: Any, home: Path, run_id: str) -> list[str]:
    """What there is of a visit: containers, draft, workspace."""
    drafts = [name for row in api.images(name=DRAFTS) for name in row.get("RepoTags") or () if run_id in name]
    spaces = [path.name for path in (home / "workspaces").glob(run_id)]
    return [row["Id"] for row in containers_of(api, run_id)] + drafts + spaces


def test_a_ride_over_three_stations(deployed, pools, docker_api, image, home, registry: Registry):
    place = f"{registry.address}/ride"
    names = [station(n, work_pool=POOLS[n - 1], registry=place) for n in (1, 2, 3)]
    station(2, work_pool=POOLS[1], registry=place, environment={"PHT_TOKEN": "x"})
    given = {"image": image(v1()), "stations": names, "api": "V1"}

    state: State[Any] = train_route(**given, return_state=True)

    assert state.is_failed()
    assert "The train stopped at station hospital-b, visit 2 of 3, and stands as" in str(state.message)
    assert "PHT_URL is not set" in str(state.message)
    station(2, work_pool=POOLS[1], registry=place)
    again = begin_again(str(state.state_details.flow_run_id), train_route, given, settings.current())
    assert again.is_completed(), again.message
    runs = deployed.api("/flow_runs/filter", {"flow_runs": {"tags": {"all_": [f"route:{state.state_details.flow_run_id}"]}}})
    ended = sorted((next(tag for tag in run["tags"] if tag.startswith("leg:")), run["state_name"]) for run in runs)
    assert ended == [("leg:1", "Completed"), ("leg:2", "Completed"), ("leg:2", "Failed"), ("leg:3", "Completed")]
    pool_of = {run["tags"][[t.startswith("leg:") for t in run["tags"]].index(True)]: run["work_pool_name"] for run in runs}
    assert pool_of == {f"leg:{n}": POOLS[n - 1] for n in (1, 2, 3)}
    assert all({"train:", "station:"} <= {tag.partition(":")[0] + ":" for tag in run["tags"]} for run in runs)
    last = next(run for run in runs if "leg:3" in run["tags"])
    folder = Path(last["labels"]["oasis.output"])
    findings = visit_record.verify_folder(folder, trusted(settings.current()))
    assert [finding.station for finding in findings] == list(POOLS)
    assert (folder / "summary.txt").read_text() == "counted  to 3"
    assert again.result() == last["labels"]["oasis.train.successor"]
    assert [left(docker_api, home, run["id"]) for run in runs] == [[]] * 4


def visit_on_worker(server: PrefectServer, image: str, station: str) -> str:
    """Have a worker let a train visit; return the run's id."""
    deployment = server.api("/deployments/name/train/train")
    reference = {"$ref": {"block_document_slug": f"station/{station}"}}
    parameters = {"image": image, "station": reference, "api": "V1"}
    return str(server.api(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"])


def test_a_visit_that_is_cancelled_and_one_that_is_killed_leave_nothing(deployed, worker, docker_api, image, home):
    name = image(v1(f"echo begun; sleep 600; {SUCCESS}"))
    cancelled, killed = (visit_on_worker(deployed, name, station(1)) for _ in range(2))
    for run_id in (cancelled, killed):
        eventually(lambda run_id=run_id: (home / "workspaces" / run_id / "log.txt").exists(), 240)
        wait_for_container(docker_api, run_id)
    deployed.api(f"/flow_runs/{cancelled}/set_state", {"state": {"type": "CANCELLING"}})
    os.kill(process_of(killed), signal.SIGKILL)
    deployed.wait_for(cancelled, "CANCELLED", seconds=120)
    deployed.wait_for(killed, "CRASHED", seconds=240)
    reap(settings.current(), now=True)
    eventually(lambda: not containers_of(docker_api, cancelled) and not containers_of(docker_api, killed), 60)
    assert left(docker_api, home, cancelled) == []


def test_a_draft_whose_run_is_dead_is_reaped(docker_api, busybox, home):
    here = settings.current()
    from oasis_flows.engines.docker_layer import _draft

    dead, elsewhere = (uuid.uuid4().hex for _ in range(2))
    drafts = [_draft(here.workspaces / dead / "lease"), _draft(home / "another" / elsewhere / "lease")]
    for draft in drafts:
        docker_api.tag(busybox, *draft.rsplit(":", 1))
    try:
        reap(here, now=True)
        there = [name for row in docker_api.images(name=DRAFTS) for name in row.get("RepoTags") or ()]
        assert [draft in there for draft in drafts] == [False, True]
    finally:
        docker_api.remove_image(drafts[1])


def test_the_station_s_loop_lets_each_train_in_once(deployed, worker, docker_api, image, home, private_registry: Registry):
    from prefect_docker.credentials import DockerRegistryCredentials

    login = private_registry.login
    assert login is not None
    place = f"{private_registry.address}/loop{uuid.uuid4().hex[:6]}"
    credentials = DockerRegistryCredentials(username=login.username, password=login.password, registry_url=login.registry)
    credentials.save("loop", overwrite=True)
    name = station(3, registry=place, registry_credentials=credentials)
    for script, train, tag in (
        (v1(), "train_good", "x-station.3"),
        (v1("exit 5"), "train_bad", "station.3"),
        (v1(), "train_other", "station.33"),
        (v1(), "else", "station.3"),
    ):
        reference = f"{place}/{train}"
        docker_api.tag(image(script), reference, tag)
        auth = {"username": login.username, "password": login.password}
        for event in docker_api.push(reference, tag, stream=True, decode=True, auth_config=auth):
            assert "error" not in event, event
        docker_api.remove_image(f"{reference}:{tag}")

    found = train_station(name)
    assert train_station(name) == found

    assert [image.rpartition("/")[2].partition("@")[0] for image in found] == ["train_bad", "train_good"]
    runs = [
        run
        for run in deployed.api("/flow_runs/filter", {"flow_runs": {"tags": {"all_": ["station-loop:3"]}}})
        if run["parameters"]["image"] in found
    ]
    assert len(runs) == 2
    ended = {run["parameters"]["image"]: deployed.wait_for(run["id"], "COMPLETED", "FAILED", seconds=240) for run in runs}
    assert [ended[image]["state_type"] for image in found] == ["FAILED", "COMPLETED"]
    assert f"failed:{TrainFailed.code}" not in ended[found[0]]["tags"]
    assert "failed:exit_nonzero" in ended[found[0]]["tags"]
