"""What `reap` tells Prefect of runs that a worker took and that never began."""

import dataclasses

import pytest

from oasis_flows import reaper, settings
from oasis_flows.__main__ import main
from oasis_flows.reaper import FLOWS, LABEL_HOST, reap, sweep
from tests.servers.prefect import PrefectServer


def _waiting(server: PrefectServer, flow: str, state: str, labels: dict[str, str] | None = None) -> str:
    flow_id = server.api("/flows/", {"name": flow})["id"]
    given = {"flow_id": flow_id, "state": {"type": state}, "labels": labels or {}}
    return str(server.api("/flow_runs/", given)["id"])


def _state(server: PrefectServer, run_id: str) -> str:
    return str(server.api(f"/flow_runs/{run_id}")["state_type"])


def _after(seconds: float) -> settings.Settings:
    return dataclasses.replace(settings.current(), begin_seconds=seconds)


@pytest.mark.usefixtures("here", "docker_api")
@pytest.mark.parametrize(
    ("state", "labels", "then"),
    [
        ("PENDING", {}, "CRASHED"),
        ("PENDING", {LABEL_HOST: "where an earlier attempt was"}, "CRASHED"),
        ("CANCELLING", {}, "CANCELLED"),
        # It came as far as our code, on another machine, whose own reaper sees to it.
        ("CANCELLING", {LABEL_HOST: "elsewhere"}, "CANCELLING"),
        ("RUNNING", {}, "RUNNING"),
        ("SCHEDULED", {}, "SCHEDULED"),
    ],
)
def test_a_run_that_a_worker_took_and_that_never_began_is_ended(prefect_server, state, labels, then):
    run_id = _waiting(prefect_server, "algorithm-task", state, labels)

    assert run_id not in reap(_after(3600)).runs
    assert _state(prefect_server, run_id) == state
    assert (run_id in reap(_after(0)).runs) is (then != state)
    assert _state(prefect_server, run_id) == then


@pytest.mark.usefixtures("here", "docker_api")
def test_it_is_said_what_became_of_it(prefect_server, monkeypatch, capsys):
    run_id = _waiting(prefect_server, "batch", "PENDING")
    monkeypatch.setenv("OASIS_FLOWS_BEGIN_WITHIN", "0")

    assert main(["reap"]) == 0

    assert f"told Prefect the end of run {run_id}" in capsys.readouterr().out
    run = prefect_server.api(f"/flow_runs/{run_id}")
    assert run["state"]["message"].startswith(reaper.NEVER_BEGAN)
    assert "failed:process_gone" in run["tags"]


@pytest.mark.usefixtures("here", "docker_api")
def test_what_is_not_ours_is_left_alone_and_so_is_all_by_a_run_that_sweeps_its_machine(prefect_server):
    foreign, ours = (_waiting(prefect_server, flow, "PENDING") for flow in ("somebody-elses", "train"))

    assert sweep(_after(0)).runs == ()
    assert reap(_after(0)).runs == (ours,)
    assert _state(prefect_server, foreign) == "PENDING"


def test_the_flows_are_all_of_this_package():
    from oasis_flows.flows import algorithm_task, batch, reap as reaping, station, train, train_route

    modules = (algorithm_task, batch, reaping, station, train, train_route)
    found = {value.name for module in modules for value in vars(module).values() if type(value).__name__.endswith("Flow")}
    assert found == set(FLOWS)
