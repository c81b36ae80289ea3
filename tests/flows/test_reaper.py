"""What `reap` tells Prefect of runs that nobody works on."""

import contextlib
import dataclasses
import shutil
import socket
import time
import uuid

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed, Running

from oasis_flows import lease, lifecycle, reaper, settings, workspace
from oasis_flows.__main__ import main
from oasis_flows.errors import StoreUnavailable
from oasis_flows.flows.algorithm_task import algorithm_task
from oasis_flows.reaper import LABEL_HOST, LABEL_OUTPUT, LABEL_POOL, LABEL_WORKER, reap, sweep
from tests.servers.prefect import PrefectServer

pytestmark = pytest.mark.usefixtures("here", "docker_api")


def _waiting(
    server: PrefectServer,
    state: str,
    labels: dict[str, str] | None = None,
    *,
    pool: str = "gpu-process",
    tags: tuple[str, ...] = (reaper.TAG,),
) -> str:
    """A run of a deployment, in that state; its id."""
    flow = server.api("/flows/", {"name": "algorithm-task"})["id"]
    deployed = {"name": uuid.uuid4().hex, "flow_id": flow, "work_pool_name": pool, "tags": tags}
    deployment = server.api("/deployments/", deployed)["id"]
    given = {"state": {"type": state}, "labels": labels or {}}
    return str(server.api(f"/deployments/{deployment}/create_flow_run", given)["id"])


def _called(
    server: PrefectServer, parameters: dict[str, object], labels: dict[str, object] | None = None, **more: object
) -> str:
    """A call that has not begun; its id."""
    flow = server.api("/flows/", {"name": "algorithm-task"})["id"]
    given = {"flow_id": flow, "parameters": parameters, "labels": labels or {}, "state": {"type": "PENDING"}, **more}
    return str(server.api("/flow_runs/", given)["id"])


def _begun(server: PrefectServer, parameters: dict[str, object], labels: dict[str, object] | None = None) -> str:
    """A call that runs; its id."""
    run_id = _called(server, parameters, labels)
    server.api(f"/flow_runs/{run_id}/set_state", {"state": {"type": "RUNNING"}})
    return run_id


def _state(server: PrefectServer, run_id: str) -> str:
    return str(server.api(f"/flow_runs/{run_id}")["state_type"])


def _after(seconds: float) -> settings.Settings:
    return dataclasses.replace(settings.current(), begin_seconds=seconds)


def _reaped(server: PrefectServer, run_id: str) -> str:
    """The state of the run when it was reaped: nothing within the hour, and then whatever there is to do."""
    before = _state(server, run_id)
    assert run_id not in reap(_after(3600)).runs
    assert _state(server, run_id) == before
    assert (run_id in reap(_after(0)).runs) is (_state(server, run_id) != before)
    return _state(server, run_id)


@pytest.mark.parametrize(
    ("state", "then"),
    [("PENDING", "CRASHED"), ("CANCELLING", "CANCELLED"), ("RUNNING", "CRASHED"), ("SCHEDULED", "SCHEDULED")],
)
@pytest.mark.parametrize("labels", [{}, {LABEL_HOST: "where an earlier attempt was"}])
def test_a_run_that_nobody_works_on_is_ended(deployed, state, labels, then):
    assert _reaped(deployed, _waiting(deployed, state, labels)) == then


@pytest.mark.parametrize(("worker", "then"), [("alive", "PENDING"), ("unknown", "CRASHED")])
def test_where_a_run_may_wait_for_its_place_its_worker_has_to_be_gone(deployed, worker, then):
    with get_client(sync_client=True) as client:
        client.send_worker_heartbeat("gpu-kubernetes", "alive", heartbeat_interval_seconds=60)
    labels = {LABEL_WORKER: worker, LABEL_POOL: "gpu-kubernetes"}

    assert _reaped(deployed, _waiting(deployed, "PENDING", labels, pool="gpu-kubernetes")) == then


def test_it_is_said_what_became_of_it(deployed, monkeypatch, capsys):
    run_id = _waiting(deployed, "PENDING")
    monkeypatch.setenv("OASIS_FLOWS_BEGIN_WITHIN", "0")

    assert main(["reap"]) == 0

    assert f"told Prefect the end of run {run_id}" in capsys.readouterr().out
    run = deployed.api(f"/flow_runs/{run_id}")
    assert run["state"]["message"].startswith(reaper.NEVER_BEGAN)
    assert "failed:process_gone" in run["tags"]


def test_what_is_not_ours_is_left_alone_whatever_its_flow_is_called(deployed):
    foreign, called, begun = _waiting(deployed, "PENDING", tags=()), _called(deployed, {}), _begun(deployed, {"threshold": 1})

    assert not {foreign, called, begun} & {*reap(_after(0)).runs}
    assert [_state(deployed, run_id) for run_id in (foreign, called, begun)] == ["PENDING", "PENDING", "RUNNING"]


@pytest.mark.parametrize(
    ("labels", "then"),
    [({}, "CRASHED"), ({reaper.LABEL_ATTEMPT: 0}, "CRASHED"), ({reaper.LABEL_ATTEMPT: 1}, "RUNNING")],
    ids=["nothing", "an earlier attempt", "this attempt"],
)
def test_a_call_that_runs_and_never_had_a_watchdog_is_ended(deployed, labels, then):
    run_id = _begun(deployed, {"algorithm": "a", "input_dataset": "b"}, labels)

    assert _reaped(deployed, run_id) == then
    assert deployed.api(f"/flow_runs/{run_id}")["run_count"] == 1


def test_a_call_that_never_began_is_ended(deployed):
    """Its process was killed between the making of its run and its first word; an automation ends it, unless its server dies, too."""
    run_id = _called(deployed, {"algorithm": "a", "input_dataset": "b"})

    assert _reaped(deployed, run_id) == "CRASHED"
    assert deployed.api(f"/flow_runs/{run_id}")["state"]["message"].startswith(reaper.DIED_AT_ONCE)


def test_a_call_out_of_another_flow_may_wait_for_what_it_is_called_with(deployed):
    caller = _called(deployed, {})
    place = deployed.api("/task_runs/", {"flow_run_id": caller, "task_key": "algorithm-task", "dynamic_key": "0"})["id"]
    parameters = {"algorithm": "a", "input_dataset": "b"}

    assert _reaped(deployed, _called(deployed, parameters, parent_task_run_id=place)) == "PENDING"


def test_a_run_that_was_paused_is_the_same_attempt(deployed):
    run_id = _begun(deployed, {"algorithm": "a", "input_dataset": "b"}, {reaper.LABEL_ATTEMPT: 1})
    deployed.api(
        f"/flow_runs/{run_id}/set_state",
        {"state": {"type": "PAUSED", "state_details": {"pause_timeout": "2100-01-01T00:00:00Z"}}},
    )
    deployed.api(f"/flow_runs/{run_id}/resume", {})

    assert _reaped(deployed, run_id) == "RUNNING"


def test_one_that_a_process_here_works_on_is_left_alone(deployed):
    run_id = _begun(deployed, {"algorithm": "a", "input_dataset": "b"})
    with workspace.open_workspace(settings.current().workspaces, run_id):
        assert _reaped(deployed, run_id) == "RUNNING"
    shutil.rmtree(settings.current().workspaces / run_id)


def test_a_run_that_sweeps_its_machine_leaves_all_of_that_alone(deployed):
    run_id = _waiting(deployed, "PENDING")

    assert run_id not in sweep(_after(0)).runs
    assert _state(deployed, run_id) == "PENDING"


def test_every_shipped_deployment_can_be_told_by_its_tag(deployed):
    shipped = deployed.api("/deployments/filter", {"deployments": {"name": {"any_": ["algorithm-task", "batch", "reap"]}}})
    assert [each["name"] for each in shipped if reaper.TAG not in each["tags"]] == []
    assert shipped


@pytest.mark.parametrize(
    ("began", "says"), [(False, "before the run began"), (True, "it was killed, or its worker was stopped")]
)
def test_of_a_process_that_ended_it_is_told_whether_the_run_had_begun(prefect_server, began, says):
    run_id = _begun(prefect_server, {}) if began else _waiting(prefect_server, "PENDING")
    with get_client(sync_client=True) as client:
        verdict = reaper.gone(client.read_flow_run(uuid.UUID(run_id)))

    assert says in verdict.sentence
    assert verdict.code == "process_gone"


@pytest.fixture
def asked(monkeypatch):
    """The places that stores were asked about; a store whose URL holds the word away does not answer."""
    told = []

    def abandon(location):
        told.append(location.url)
        if "away" in location.url:
            raise StoreUnavailable("The store does not answer.")

    monkeypatch.setattr(reaper.store, "abandon", abandon)
    return told


def _left(server, place, state="CRASHED"):
    """The id of a run of whose process only the workspace is left."""
    run_id = _begun(server, {}, {LABEL_OUTPUT: place})
    if state != "RUNNING":
        server.api(f"/flow_runs/{run_id}/set_state", {"state": {"type": state}})
    with workspace.open_workspace(settings.current().workspaces, run_id) as left:
        left.input.mkdir()
    return run_id


def test_a_dead_runs_store_that_is_away_is_asked_again_before_its_folder_goes(prefect_server, asked):
    here = dataclasses.replace(settings.current(), keep_seconds=0)
    places = ["s3://away/1", "s3://away/2", "s3://there/3", "s3://there/4"]
    ids = [_left(prefect_server, place) for place in places]

    assert set(ids) & set(sweep(here).workspaces) == set(ids[2:])
    assert [[path.name for path in (here.workspaces / run_id).iterdir()] for run_id in ids[:2]] == [["lease"]] * 2
    # One that is away is asked once, and keeps no other from being asked.
    assert sum("away" in place for place in asked) == 1
    assert sum("there" in place for place in asked) == 2

    # As long as it is young again, nobody asks.
    sweep(settings.current())
    assert len(asked) == 3


def test_who_retries_a_run_waits_for_no_server_that_is_asked_about_it(prefect_server, asked):
    run_id = _left(prefect_server, "s3://there/1")
    place = workspace.Workspace(settings.current().workspaces / run_id)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}):
            began = time.monotonic()
            assert not place.remove_abandoned(0, reaper._leaving(settings.current()))
            assert time.monotonic() - began < lease.PATIENCE_SECONDS - 3
    assert place.path.exists()
    assert place.remove_abandoned(0, reaper._leaving(settings.current()))
    assert asked == ["s3://there/1"]


def test_no_store_is_asked_to_forget_what_an_attempt_elsewhere_is_sending(prefect_server, asked):
    here = dataclasses.replace(settings.current(), keep_seconds=0)
    run_id = _left(prefect_server, "s3://there/1", "RUNNING")
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(uuid.UUID(run_id), {LABEL_HOST: "another", reaper.LABEL_ATTEMPT: 2})

    assert run_id in sweep(here).workspaces
    assert asked == []


def test_a_hook_is_told_of_a_run_as_it_was_before_it_began_and_looks_again(prefect_server, asked, monkeypatch):
    """As Prefect's worker does."""
    run_id = uuid.UUID(_waiting(prefect_server, "PENDING"))
    with get_client(sync_client=True) as client:
        before = client.read_flow_run(run_id)
        client.set_flow_run_state(run_id, Running())
        client.update_flow_run_labels(run_id, {LABEL_OUTPUT: "s3://there/1"})
        told = []
        monkeypatch.setattr(lifecycle, "tell_failure", lambda client, run_id, name, verdict: told.append(verdict))
        lifecycle.clean_up(algorithm_task, before, Crashed())

    assert before.run_count == 0
    assert "s3://there/1" in asked
    assert told[0].sentence.startswith("The process that ran it is gone")
