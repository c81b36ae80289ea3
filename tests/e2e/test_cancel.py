"""Runs that are ended from outside, politely and not: no container, no workspace and no half dataset stays.

On the machine's engine; and where there is a cluster, there, with the claim mounted and with files carried to it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import Scheduled

from oasis_flows.__main__ import main
from oasis_flows.blocks import Algorithm, Dataset, DockerImage, Prerequisite
from oasis_flows.flows.algorithm_task import algorithm_task
from oasis_flows.machine import open_engine
from oasis_flows.settings import current
from tests.servers.engine import alive, eventually
from tests.servers.prefect import BIN, ROOT, PrefectServer, begin, deploy_to, worker_process

GRACE = current().stop_grace_seconds


@pytest.fixture
def documents(prefect_server, ground, tmp_path):
    describe(DockerImage(image_id=ground.image), tmp_path / "letters")


def describe(image, folder):
    """Save algorithms that last, and something for them to read."""
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    Dataset(url=str(folder)).save("letters", overwrite=True)
    scripts = {
        "sleeper": "echo half > output/half; echo began; sleep 600",
        "stubborn": "trap '' TERM; echo began; while :; do sleep 1; done",
        "patient": "echo began; sleep 8; echo whole > output/whole; echo ended",
    }
    for name, script in scripts.items():
        Algorithm(docker_image=image, cpus=0.25, command=["sh", "-c", script]).save(name, overwrite=True)
    debug = {"callbacks": [{"event": "taskFails", "commands": ["sleep 10m"]}]}
    Prerequisite(plugin_params=debug).save("hold", overwrite=True)
    Algorithm(docker_image=image, command=["sh", "-c", "exit 3"], prerequisites=["hold"]).save("held", overwrite=True)


@dataclass(frozen=True)
class Work:
    """A deployment of `algorithm_task`, the shipped one or another, with a worker, whose home this is."""

    server: PrefectServer
    deployment: str
    home: Path

    def begin(self, algorithm):
        """Have the worker run it; return the run's id."""
        return begin(self.server, algorithm, "letters", self.deployment)


@pytest.fixture
def work(deployed, documents, ground, request, tmp_path):
    """Work on the ground: that of the shipped pool; and for a cluster, of a process worker on this machine, outside of it."""
    if ground.name == "docker":
        request.getfixturevalue("worker")
        yield Work(deployed, "", deployed.home)
        return
    pool = f"outside-{uuid.uuid4().hex[:8]}"
    settings = {name: value for name, value in os.environ.items() if name.startswith("OASIS_FLOWS_")}
    template = json.loads((ROOT / "deployments/work-pools/gpu-process.json").read_text())
    template["variables"]["properties"]["env"]["default"] |= settings
    deployed.api("/work_pools/", {"name": pool, "type": "process", "base_job_template": template})
    with worker_process(deployed, tmp_path / f"{pool}.log", pool=pool, **settings):
        yield Work(deployed, deploy_to(deployed, pool), ground.home)


def wait_for_container(ground, run_id):
    """The id of the run's container, once it runs."""
    eventually(lambda: ground.running(run_id), 90)
    return ground.running(run_id)


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


def test_a_cancelled_run_stops_its_container_within_the_grace_also_a_stubborn_one(deployed, work, ground):
    polite, stubborn = (work.begin(name) for name in ("sleeper", "stubborn"))
    for run_id in (polite, stubborn):
        wait_for_container(ground, run_id)
    for run_id in (stubborn, polite):
        deployed.run("prefect", "flow-run", "cancel", run_id)
    cancelled = time.monotonic()

    most = GRACE + 2 + ground.patience
    eventually(lambda: not ground.seen(polite), most)
    eventually(lambda: not ground.seen(stubborn), most - (time.monotonic() - cancelled))
    for run_id in (polite, stubborn):
        run = deployed.wait_for(run_id, "CANCELLED", "CRASHED", "FAILED", seconds=40)
        assert run["state_type"] == "CANCELLED"
        eventually(lambda run_id=run_id: not (work.home / "workspaces" / run_id).exists(), 20)
        assert_no_dataset(deployed, run_id)


def test_cancelling_ends_a_hold_for_debugging_at_once(deployed, work, ground, request):
    run_id = work.begin("held")
    container = wait_for_container(ground, run_id)
    # The algorithm has failed, and its container stays.
    homes = [work.home] if ground.name == "docker" else [work.home, request.getfixturevalue("cluster").home]
    eventually(lambda: [note for home in homes for note in home.glob(f"*/{run_id}/**/algorithm")], 60)
    assert ground.running(run_id) == container
    deployed.run("prefect", "flow-run", "cancel", run_id)

    eventually(lambda: not ground.seen(run_id), GRACE + ground.patience)
    assert deployed.wait_for(run_id, "CANCELLED", "CRASHED", "FAILED", seconds=40)["state_type"] == "CANCELLED"
    assert_no_dataset(deployed, run_id)


def test_a_killed_flow_process_is_a_crash_and_the_hook_removes_the_container(deployed, work, ground):
    run_id = work.begin("sleeper")
    wait_for_container(ground, run_id)
    os.kill(process_of(run_id), signal.SIGKILL)

    eventually(lambda: not ground.seen(run_id), 30 + ground.patience)
    assert deployed.wait_for(run_id, "CRASHED", seconds=30)["state_type"] == "CRASHED"
    assert_no_dataset(deployed, run_id)
    # A retry goes on from what was staged.
    assert (work.home / "workspaces" / run_id / "done" / "stage_input.json").exists()


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
def start(prefect_server, ground, documents, request):
    """Starts `oasis-flows run ALGORITHM letters`, or a program like it; returns the process and the run's id once its container runs."""
    processes = []
    workspaces = ground.home / "workspaces"
    before = {path.name for path in workspaces.glob("*")}
    seen = set()

    def begin(algorithm, *program):
        command = [*(program or [str(BIN / "oasis-flows")]), "run", algorithm, "letters"]
        env = prefect_server.env | {name: value for name, value in os.environ.items() if name.startswith("OASIS_FLOWS_")}
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
            return {path.name for path in workspaces.glob("*")} - seen - before

        eventually(new, 60)
        run_id = new().pop()
        seen.add(run_id)
        wait_for_container(ground, run_id)
        return process, run_id

    yield begin
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)
    engine = open_engine(current())
    for run_id in seen:
        engine.reap(run_id)
    if ground.name == "kubernetes":
        eventually(lambda: request.getfixturevalue("cluster").left() == [], 60)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_run_in_the_terminal_leaves_nothing(prefect_server, ground, start, number, code):
    process, run_id = start("sleeper")
    process.send_signal(number)
    assert_ended(process, run_id, prefect_server, ground, number, code, "Traceback")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_whose_exception_got_lost_ends_a_run_all_the_same(prefect_server, ground, start, number, code):
    process, run_id = start("sleeper", sys.executable, "-c", LOSING, str(int(number)))
    process.send_signal(signal.SIGUSR1)
    said = assert_ended(process, run_id, prefect_server, ground, number, code, "Crash detected")
    assert "Exception ignored in" in said


def assert_ended(process, run_id, prefect_server, ground, number, code, unsaid):
    """The process ends soon, by the signal, without some words, and leaves nothing; what it said."""
    try:
        said = process.communicate(timeout=30 + ground.patience)[0].decode()
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"It did not end in time. It said: {process.communicate()[0].decode()}")

    assert ground.seen(run_id) == ""
    assert not (ground.home / "workspaces" / run_id).exists()
    state = prefect_server.api(f"/flow_runs/{run_id}")["state"]
    assert state["type"] in ("CRASHED", "CANCELLED"), (state["message"], said)
    assert_no_dataset(prefect_server, run_id)
    assert process.returncode in (code, -number), said
    assert unsaid not in said
    return said


def test_what_a_killed_run_leaves_is_spared_for_a_minute_and_then_reaped(ground, start, capsys):
    process, run_id = start("sleeper")
    process.kill()
    process.wait(10)
    assert ground.seen(run_id)

    assert main(["reap", "--json"]) == 0
    assert run_id not in json.loads(capsys.readouterr().out)["containers"]
    assert ground.running(run_id)

    # On a claim an owner's silence is all that others may see of its end, but this machine sees that Prefect has to be told.
    assert main(["reap", "--now", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run_id in told[what] for what in ("containers", "workspaces", "runs")] == [True, True, True]
    eventually(lambda: not ground.seen(run_id), 2 + ground.patience)
    # It has no deployment that could run it once more, so nobody would come back for what it staged.
    assert not (ground.home / "workspaces" / run_id).exists()


def test_a_retry_of_a_killed_run_takes_up_its_container_and_loses_nothing(ground, start):
    process, run_id = start("patient")
    container = wait_for_container(ground, run_id)
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
    assert ground.seen(run_id) == ""
    assert not (ground.home / "workspaces" / run_id).exists()
