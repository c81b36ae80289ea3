"""Runs that are ended from outside, politely and not: no container, no workspace and no half dataset stays."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import Scheduled

from oasis_flows.__main__ import main
from oasis_flows.blocks import Algorithm, Dataset, DockerImage, Prerequisite
from oasis_flows.flows.algorithm_task import algorithm_task
from oasis_flows.settings import current
from tests.servers.engine import alive, containers_of, eventually
from tests.servers.prefect import BIN, ROOT

GRACE = current().stop_grace_seconds


@pytest.fixture(scope="module")
def documents(prefect_server, busybox, tmp_path_factory):
    """Algorithms that last, and something for them to read."""
    folder = tmp_path_factory.mktemp("letters")
    (folder / "a.txt").write_text("a")
    Dataset(url=str(folder)).save("letters", overwrite=True)
    image = DockerImage(image_id=busybox)
    scripts = {
        "sleeper": "echo half > output/half; echo began; sleep 600",
        "stubborn": "trap '' TERM; echo began; while :; do sleep 1; done",
        "patient": "echo began; sleep 8; echo whole > output/whole; echo ended",
    }
    for name, script in scripts.items():
        Algorithm(docker_image=image, command=["sh", "-c", script]).save(name, overwrite=True)
    debug = {"callbacks": [{"event": "taskFails", "commands": ["sleep 10m"]}]}
    Prerequisite(plugin_params=debug).save("hold", overwrite=True)
    Algorithm(docker_image=image, command=["sh", "-c", "exit 3"], prerequisites=["hold"]).save("held", overwrite=True)


def scheduled(server, algorithm):
    """Have the worker run it; return the run's id."""
    deployment = server.api("/deployments/name/algorithm-task/algorithm-task")
    given = {"algorithm": f"algorithm/{algorithm}", "input_dataset": "dataset/letters"}
    parameters = {name: {"$ref": {"block_document_slug": slug}} for name, slug in given.items()}
    return server.api(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"]


def wait_for_container(api, run_id):
    """The id of the run's container, once it runs."""
    eventually(lambda: [row for row in containers_of(api, run_id) if row["State"] == "running"], 90)
    return containers_of(api, run_id)[0]["Id"]


def process_of(run_id):
    """The number of the process that runs a flow run for the worker."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if f"PREFECT__FLOW_RUN_ID={run_id}".encode() in words:
                return int(path.parent.name)
    raise AssertionError(f"no process works on {run_id}")


def assert_no_dataset(server, run_id):
    output = Path(server.api(f"/flow_runs/{run_id}")["labels"]["oasis.output"])
    assert not (output / "manifest.jsonl").exists()
    assert not (output / "data").exists()


def test_a_cancelled_run_stops_its_container_within_the_grace_also_a_stubborn_one(deployed, worker, docker_api, documents):
    polite, stubborn = (scheduled(deployed, name) for name in ("sleeper", "stubborn"))
    for run_id in (polite, stubborn):
        wait_for_container(docker_api, run_id)
    for run_id in (stubborn, polite):
        deployed.run("prefect", "flow-run", "cancel", run_id)
    cancelled = time.monotonic()

    eventually(lambda: not containers_of(docker_api, polite), GRACE + 2)
    eventually(lambda: not containers_of(docker_api, stubborn), GRACE + 2 - (time.monotonic() - cancelled))
    for run_id in (polite, stubborn):
        run = deployed.wait_for(run_id, "CANCELLED", "CRASHED", "FAILED", seconds=40)
        assert run["state_type"] == "CANCELLED"
        eventually(lambda run_id=run_id: not (deployed.home / "workspaces" / run_id).exists(), 20)
        assert_no_dataset(deployed, run_id)


def test_cancelling_ends_a_hold_for_debugging_at_once(deployed, worker, docker_api, documents):
    run_id = scheduled(deployed, "held")
    wait_for_container(docker_api, run_id)
    # The algorithm has failed, and its container stays.
    eventually((deployed.home / "workspaces" / run_id / "notes" / "algorithm").exists, 30)
    assert containers_of(docker_api, run_id)
    deployed.run("prefect", "flow-run", "cancel", run_id)

    eventually(lambda: not containers_of(docker_api, run_id), GRACE)
    assert deployed.wait_for(run_id, "CANCELLED", "CRASHED", "FAILED", seconds=40)["state_type"] == "CANCELLED"
    assert_no_dataset(deployed, run_id)


def test_a_killed_flow_process_is_a_crash_and_the_hook_removes_the_container(deployed, worker, docker_api, documents):
    run_id = scheduled(deployed, "sleeper")
    wait_for_container(docker_api, run_id)
    os.kill(process_of(run_id), signal.SIGKILL)

    eventually(lambda: not containers_of(docker_api, run_id), 30)
    assert deployed.wait_for(run_id, "CRASHED", seconds=30)["state_type"] == "CRASHED"
    assert_no_dataset(deployed, run_id)
    # A retry goes on from what was staged.
    assert (deployed.home / "workspaces" / run_id / "done" / "stage_input.json").exists()


# The command line, which loses a signal when it gets SIGUSR1: its exception is raised in a callback, and Python drops it there.
LOSING = """
import signal, sys, weakref
from oasis_flows.__main__ import main

class Held:
    pass

def lose(*_):
    held = Held()
    watched = weakref.ref(held, lambda _: signal.raise_signal(int(sys.argv[1])))
    del held
    assert watched() is None

signal.signal(signal.SIGUSR1, lose)
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def start(prefect_server, here, docker_api, documents):
    """Starts `oasis-flows run ALGORITHM letters`, or a program like it; returns the process and the run's id once its container runs."""
    processes = []
    seen = set()

    def begin(algorithm, *program):
        command = [*(program or [str(BIN / "oasis-flows")]), "run", algorithm, "letters"]
        env = prefect_server.env | {"OASIS_FLOWS_HOME": str(here)}
        process = subprocess.Popen(
            command,
            env=env,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        processes.append(process)

        def new():
            return {path.name for path in (here / "workspaces").glob("*")} - seen

        eventually(new, 60)
        run_id = new().pop()
        seen.add(run_id)
        wait_for_container(docker_api, run_id)
        return process, run_id

    yield begin
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)
    for run_id in seen:
        for row in containers_of(docker_api, run_id):
            docker_api.remove_container(row["Id"], force=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_run_in_the_terminal_leaves_nothing(prefect_server, here, docker_api, start, number, code):
    process, run_id = start("sleeper")
    process.send_signal(number)
    assert_ended(process, run_id, prefect_server, here, docker_api, number, code, "Traceback")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_whose_exception_got_lost_ends_a_run_all_the_same(prefect_server, here, docker_api, start, number, code):
    process, run_id = start("sleeper", sys.executable, "-c", LOSING, str(int(number)))
    process.send_signal(signal.SIGUSR1)
    said = assert_ended(process, run_id, prefect_server, here, docker_api, number, code, "Crash detected")
    assert "Exception ignored in" in said


def assert_ended(process, run_id, prefect_server, here, docker_api, number, code, unsaid):
    """The process ends soon, by the signal, without some words, and leaves nothing; what it said."""
    try:
        said = process.communicate(timeout=30)[0].decode()
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"It did not end within 30 s. It said: {process.communicate()[0].decode()}")

    assert containers_of(docker_api, run_id) == []
    assert list((here / "workspaces").iterdir()) == []
    assert prefect_server.api(f"/flow_runs/{run_id}")["state_type"] in ("CRASHED", "CANCELLED")
    assert_no_dataset(prefect_server, run_id)
    assert process.returncode in (code, -number), said
    assert unsaid not in said
    return said


def test_what_a_killed_run_leaves_is_spared_for_a_minute_and_then_reaped(here, docker_api, start, capsys):
    process, run_id = start("sleeper")
    process.kill()
    process.wait(10)
    assert containers_of(docker_api, run_id)

    assert main(["reap", "--json"]) == 0
    assert run_id not in json.loads(capsys.readouterr().out)["containers"]
    assert containers_of(docker_api, run_id)

    assert main(["reap", "--now", "--json"]) == 0
    assert run_id in json.loads(capsys.readouterr().out)["containers"]
    assert containers_of(docker_api, run_id) == []
    # It has no deployment that could run it once more, so nobody would come back for what it staged.
    assert not (here / "workspaces" / run_id).exists()


def test_a_retry_of_a_killed_run_takes_up_its_container_and_loses_nothing(prefect_server, here, docker_api, start):
    process, run_id = start("patient")
    container = wait_for_container(docker_api, run_id)
    process.kill()
    process.wait(10)
    assert not alive(process.pid)

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(uuid.UUID(run_id), Scheduled(name="AwaitingRetry"), force=True)
        flow_run = client.read_flow_run(uuid.UUID(run_id))
    given = {"algorithm": "patient", "input_dataset": "letters"}
    result = run_flow(algorithm_task, flow_run=flow_run, parameters=given)
    record = json.loads((Path(result.url) / "task.json").read_text())

    assert record["sandbox"]["in_force"]["container"] == container
    assert (Path(result.url) / "log.txt").read_bytes() == b"began\nended\n"
    assert (Path(result.url) / "data/whole").read_bytes() == b"whole\n"
    assert containers_of(docker_api, run_id) == []
    assert not (here / "workspaces" / run_id).exists()
