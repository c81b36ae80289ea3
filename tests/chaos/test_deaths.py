"""Processes that are killed under a run: worker, flow, engine, server. Nothing stays, and Prefect learns the truth."""

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from oasis_flows.blocks import Algorithm, DockerImage
from tests.e2e.test_cancel import assert_no_dataset, describe, process_of
from tests.images import TinyImage, docker_archive
from tests.servers.engine import containers_of, eventually, private_engine
from tests.servers.prefect import BIN, ROOT, PrefectServer, begin, client_env, free_port, server_process, worker_process

# So long does a dead run's container wait for a retry, here.
WINDOW = {"OASIS_FLOWS_RETRY_WINDOW": "6"}


@pytest.fixture(scope="module")
def documents(prefect_server, busybox, tmp_path_factory):
    describe(DockerImage(image_id=busybox), tmp_path_factory.mktemp("documents") / "letters")


def wait_for_container(api, run_id):
    """The id of the run's container, once it runs."""
    eventually(lambda: [row for row in containers_of(api, run_id) if row["State"] == "running"], 90)
    return containers_of(api, run_id)[0]["Id"]


@pytest.fixture
def fragile(deployed, tmp_path):
    """The server as its worker of this test sees it, with a home of its own; starts workers that a test may kill."""
    server = replace(deployed, home=tmp_path / "home", env=deployed.env | {"OASIS_FLOWS_HOME": str(tmp_path / "home")})
    with contextlib.ExitStack() as stack:

        def start(**changes):
            log = tmp_path / f"fragile-{time.monotonic_ns()}.log"
            return stack.enter_context(worker_process(server, log, **WINDOW | changes))

        yield server, start


def watchdogs(server):
    """The watchdogs of runs with this home that wait or work."""
    found, home = [], f"OASIS_FLOWS_HOME={server.home}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            ours = any(w.endswith(b"oasis_flows/watchdog.py") for w in words) or words[2:4] == [b"oasis_flows", b"reap"]
            if ours and home in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found


def test_a_worker_that_is_stopped_leaves_no_container_and_no_run_that_runs_for_ever(fragile, docker_api, documents):
    server, start = fragile
    worker = start()
    run_id = begin(server, "sleeper", "letters")
    wait_for_container(docker_api, run_id)
    os.kill(worker.pid, signal.SIGTERM)

    # Prefect kills the run without a word to anybody; its watchdog tells.
    assert server.wait_for(run_id, "CRASHED", "CANCELLED", "FAILED", seconds=60)["state_type"] == "CRASHED"
    eventually(lambda: not containers_of(docker_api, run_id), 40)
    assert_no_dataset(server, run_id)
    eventually(lambda: not watchdogs(server), 40)
    # What is kept for a retry is what a retry would go on from, and it goes when nobody comes back.
    server.run("oasis-flows", "reap", "--now", OASIS_FLOWS_KEEP_HOURS="0")
    assert list((server.home / "workspaces").iterdir()) == []


def test_a_worker_that_is_killed_leaves_its_runs_to_end_by_themselves(fragile, docker_api, documents):
    server, start = fragile
    worker = start()
    run_id = begin(server, "patient", "letters")
    wait_for_container(docker_api, run_id)
    os.kill(worker.pid, signal.SIGKILL)

    # What Prefect does with a run that misses its worker differs between its versions; the state says what happened.
    run = server.wait_for(run_id, "COMPLETED", "CRASHED", seconds=60)
    whole = (Path(run["labels"]["oasis.output"]) / "manifest.jsonl").exists()
    assert (run["state_type"] == "COMPLETED") == whole
    eventually(lambda: not containers_of(docker_api, run_id), 40)
    eventually(lambda: not watchdogs(server), 40)
    server.run("oasis-flows", "reap", "--now", OASIS_FLOWS_KEEP_HOURS="0")
    assert list((server.home / "workspaces").iterdir()) == []


def test_the_retry_of_a_run_whose_worker_was_stopped_takes_up_its_container(fragile, docker_api, documents):
    server, start = fragile
    worker = start(OASIS_FLOWS_RETRY_WINDOW="90")
    run_id = begin(server, "patient", "letters")
    container = wait_for_container(docker_api, run_id)
    os.kill(worker.pid, signal.SIGTERM)
    worker.wait(30)
    # What the watchdog does half a minute later.
    server.api(f"/flow_runs/{run_id}/set_state", {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True})
    start()

    run = server.wait_for(run_id, "COMPLETED", "CRASHED", "FAILED", seconds=90)
    output = Path(run["labels"]["oasis.output"])
    assert run["state_type"] == "COMPLETED"
    assert json.loads((output / "task.json").read_text())["sandbox"]["in_force"]["container"] == container
    assert (output / "log.txt").read_bytes() == b"began\nended\n"
    assert containers_of(docker_api, run_id) == []


def test_a_run_that_its_watchdog_ended_can_be_retried_by_hand(fragile, docker_api, documents):
    server, start = fragile
    worker = start()
    run_id = begin(server, "patient", "letters")
    wait_for_container(docker_api, run_id)
    os.kill(worker.pid, signal.SIGTERM)
    assert server.wait_for(run_id, "CRASHED", "COMPLETED", "FAILED", seconds=60)["state_type"] == "CRASHED"
    eventually(lambda: not containers_of(docker_api, run_id), 40)

    server.run("prefect", "flow-run", "retry", run_id)
    start()
    run = server.wait_for(run_id, "COMPLETED", "FAILED", seconds=90)
    output = Path(run["labels"]["oasis.output"])
    assert (run["state_type"], run["run_count"]) == ("COMPLETED", 2)
    assert (output / "data/whole").read_bytes() == b"whole\n"
    assert (output / "log.txt").read_bytes() == b"began\nended\n"
    eventually(lambda: not watchdogs(server), 40)
    assert list((server.home / "workspaces").iterdir()) == []


def test_a_killed_process_of_ones_own_is_told_and_cleaned_up_by_its_watchdog(fragile, docker_api, documents):
    server, _ = fragile
    process = subprocess.Popen(
        [str(BIN / "oasis-flows"), "run", "sleeper", "letters"],
        env=server.env | WINDOW,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    eventually(lambda: list((server.home / "workspaces").glob("*/done/stage_input.json")), 60)
    (workspace,) = (server.home / "workspaces").iterdir()
    wait_for_container(docker_api, workspace.name)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)

    message = server.wait_for(workspace.name, "CRASHED", seconds=60)["state"]["message"]
    assert message.startswith("The process that ran it is gone: it was killed, or its worker was stopped.")
    eventually(lambda: not containers_of(docker_api, workspace.name), 40)
    eventually(lambda: not watchdogs(server), 40)
    assert not workspace.exists()


def test_a_watchdog_that_is_told_to_stop_cleans_up_at_once(fragile, docker_api, documents):
    server, start = fragile
    worker = start()
    run_id = begin(server, "sleeper", "letters")
    wait_for_container(docker_api, run_id)
    # As a service manager does it: everybody gets the signal.
    told = watchdogs(server)
    os.kill(worker.pid, signal.SIGTERM)
    for number in told:
        os.kill(number, signal.SIGTERM)

    eventually(lambda: not containers_of(docker_api, run_id), 20)
    server.wait_for(run_id, "CRASHED", seconds=30)


def test_an_engine_that_restarts_ends_the_container_and_not_the_run(fragile, documents, tmp_path):
    server, _ = fragile
    with private_engine() as engine:
        image = TinyImage(tags=("restart:1",))
        engine.load(docker_archive(tmp_path / "image.tar", image))
        script = "echo began; sleep 5; echo whole > output/whole; echo ended"
        Algorithm(docker_image=DockerImage(image_id="restart:1"), command=["sh", "-c", script]).save(
            "restarted", overwrite=True
        )
        process = subprocess.Popen(
            [str(BIN / "oasis-flows"), "run", "restarted", "letters", "--json"],
            env=server.env | {"DOCKER_HOST": engine.host},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with contextlib.closing(engine.connect()) as client:
            eventually(lambda: client.containers.list(), 60)
        engine.end(signal.SIGTERM)
        time.sleep(3)
        engine.start()
        out, err = process.communicate(timeout=120)
        told = json.loads(out)

        assert (process.returncode, told["status"]) == (0, "Succeeded"), err
        assert (Path(told["url"]) / "log.txt").read_bytes() == b"began\nended\n"
        with contextlib.closing(engine.connect()) as client:
            assert client.containers.list(all=True) == []
    assert list((server.home / "workspaces").iterdir()) == []


def test_a_run_cancelled_while_its_engine_is_away_leaves_nothing_once_it_is_back(fragile, documents, tmp_path):
    server, start = fragile
    with private_engine() as engine:
        engine.load(docker_archive(tmp_path / "image.tar", TinyImage(tags=("away:1",))))
        Algorithm(docker_image=DockerImage(image_id="away:1"), command=["sleep", "600"]).save("lonely", overwrite=True)
        start(DOCKER_HOST=engine.host)
        run_id = begin(server, "lonely", "letters")
        with contextlib.closing(engine.connect()) as client:
            wait_for_container(client.api, run_id)
        # Killed, it leaves the container running.
        engine.end(signal.SIGKILL)
        server.run("prefect", "flow-run", "cancel", run_id)
        time.sleep(3)
        engine.start()

        assert server.wait_for(run_id, "CANCELLED", "CRASHED", "FAILED", seconds=60)["state_type"] == "CANCELLED"
        with contextlib.closing(engine.connect()) as client:
            eventually(lambda: not containers_of(client.api, run_id), 90)
        eventually(lambda: not watchdogs(server), 60)
    assert_no_dataset(server, run_id)
    assert list((server.home / "workspaces").iterdir()) == []


# When the server goes: what has just come to be in the run's workspace then, and how long it stays away.
MOMENTS = {"staging": ("*", 15.0), "running": ("*/log.txt", 65.0), "publishing": ("*/done/run_container.json", 15.0)}


@pytest.mark.parametrize(("pattern", "seconds"), MOMENTS.values(), ids=MOMENTS)
def test_a_prefect_server_that_is_away_costs_nothing_but_time(docker_api, busybox, tmp_path, pattern, seconds):
    port = free_port()
    server = PrefectServer(port, client_env(port, tmp_path / "prefect", tmp_path / "home"), tmp_path / "home")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("a")
    made = (
        "import sys; from oasis_flows import *;"
        "Algorithm(docker_image=DockerImage(image_id=sys.argv[1]), command=['sh', '-c', 'echo began; sleep 5; echo x > output/x']).save('slow');"
        "Dataset(url=sys.argv[2]).save('letters')"
    )
    with server_process(server, tmp_path / "server.log") as process:
        server.run("python", "-c", made, busybox, str(tmp_path / "letters"))
        run = subprocess.Popen(
            [str(BIN / "oasis-flows"), "run", "slow", "letters", "--json"],
            env=server.env,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        eventually(lambda: list((server.home / "workspaces").glob(pattern)), 60)
        os.killpg(process.pid, signal.SIGKILL)
        run_id = next((server.home / "workspaces").iterdir()).name
        process.wait(10)
    time.sleep(seconds)
    with server_process(server, tmp_path / "server.log"):
        out, err = run.communicate(timeout=180)
        state = server.api(f"/flow_runs/{run_id}")

        assert (run.returncode, state["state_type"]) == (0, "COMPLETED"), err
        assert (
            json.loads(server.run("oasis-flows", "dataset", "ls", json.loads(out)["dataset"], "--json").stdout)["path"] == "x"
        )
    assert containers_of(docker_api, run_id) == []
    assert list((server.home / "workspaces").iterdir()) == []


def test_the_scheduled_reaper_removes_what_even_its_watchdog_could_not(fragile, docker_api, documents):
    server, start = fragile
    worker = start()
    run_id = begin(server, "sleeper", "letters")
    wait_for_container(docker_api, run_id)
    os.kill(worker.pid, signal.SIGSTOP)
    for number in [*watchdogs(server), process_of(run_id), worker.pid]:
        os.kill(number, signal.SIGKILL)
    time.sleep(float(WINDOW["OASIS_FLOWS_RETRY_WINDOW"]))
    assert containers_of(docker_api, run_id)

    start()
    deployment = server.api("/deployments/name/reap/reap")
    assert [schedule["active"] for schedule in deployment["schedules"]] == [True]
    reaping = server.api(f"/deployments/{deployment['id']}/create_flow_run", {})["id"]
    assert server.wait_for(reaping, "COMPLETED", "FAILED", "CRASHED")["state_type"] == "COMPLETED"
    assert containers_of(docker_api, run_id) == []
    assert server.api(f"/flow_runs/{run_id}")["state_type"] == "CRASHED"


def test_the_watchdog_of_a_run_that_ends_goes_with_it(fragile, docker_api, documents):
    server, _ = fragile
    before = set(watchdogs(server))
    server.run("oasis-flows", "run", "patient", "letters")
    assert set(watchdogs(server)) <= before
