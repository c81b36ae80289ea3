"""A ride of a train over three stations, each with a work pool and a worker of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from oasis_flows import settings, visit_record
from oasis_flows.blocks import Station
from oasis_flows.engines.docker_layer import DRAFTS
from oasis_flows.station_keys import trusted
from tests.servers.engine import containers_of
from tests.servers.prefect import ROOT, PrefectServer, worker_process
from tests.servers.registry import Registry
from tests.trains import train_image, v1

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
    route = ("oasis-flows", "train", "route", image(v1()), *names, "--api", "V1")

    stopped = deployed.run(*route, check=False, seconds=900)

    assert stopped.returncode == 1, stopped.stdout
    (line,) = stopped.stdout.splitlines()
    assert line.startswith("Failed (Failed): run "), line
    run_id = line.rpartition(" ")[2]
    stands = "The train stopped at station hospital-b, visit 2 of 3, and stands as "
    last_words = stopped.stderr.splitlines()[-1]
    assert last_words.startswith(f"oasis-flows: {stands}{place}/train_"), stopped.stderr
    assert "PHT_URL is not set" in last_words
    assert f"--resume {run_id}" in last_words
    station(2, work_pool=POOLS[1], registry=place)
    again = deployed.run(*route, "--resume", run_id, seconds=900)
    first, second = again.stdout.splitlines()
    assert first == f"Succeeded (Completed): run {run_id}"
    runs = deployed.api("/flow_runs/filter", {"flow_runs": {"tags": {"all_": [f"route:{run_id}"]}}})
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
    assert second == f"the train: {last['labels']['oasis.train.successor']}"
    assert [left(docker_api, home, run["id"]) for run in runs] == [[]] * 4
