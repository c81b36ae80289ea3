"""Engine, Prefect server and workers killed under a batch: it comes to its end, and no finished shard is done again."""

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from dataclasses import replace

import pytest

from tests.e2e.test_batch import COPY, containers, finished
from tests.e2e.test_cancel import process_of
from tests.images import TinyImage, docker_archive
from tests.servers.engine import eventually, private_engine
from tests.servers.prefect import BIN, ROOT, PrefectServer, client_env, deploy, free_port, server_process, worker_process

SHARDS = 12
WORDS = ["--files-per-shard", "1", "--max-parallel", "2", "--json"]
MADE = (
    "import sys; from oasis_flows import *;"
    "Algorithm(docker_image=DockerImage(image_id=sys.argv[1]), command=['sh', '-c', sys.argv[2]], cpus=0.1, memory='32MiB')"
    ".save(sys.argv[4]);"
    "Dataset(url=sys.argv[3]).save(sys.argv[4])"
)


@pytest.fixture
def server(prefect_server, tmp_path):
    """The server as those with a home of their own see it."""
    home = tmp_path / "home"
    return replace(prefect_server, home=home, env=prefect_server.env | {"OASIS_FLOWS_HOME": str(home)})


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A server with the shipped pools and deployments, which no other test's worker serves."""
    folder, port = tmp_path_factory.mktemp("pool"), free_port()
    server = PrefectServer(port, client_env(port, folder / "prefect", folder / "home"), folder / "home")
    with server_process(server, folder / "server.log"):
        deploy(server)
        yield server


@pytest.fixture
def pooled(pool, tmp_path):
    """The same for those with a home of their own."""
    home = tmp_path / "home"
    return replace(pool, home=home, env=pool.env | {"OASIS_FLOWS_HOME": str(home)})


@pytest.fixture
def described(tmp_path, name):
    """Saves an algorithm and a dataset, both of this `name`, on a server."""

    def save(server, image):
        (tmp_path / "letters").mkdir()
        for number in range(SHARDS):
            (tmp_path / "letters" / f"{number:02}.txt").write_text(f"letter {number}")
        server.run("python", "-c", MADE, image, f"sleep 1; {COPY}", str(tmp_path / "letters"), name)

    return save


@pytest.fixture
def name():
    """Of the algorithm, the dataset and the output: one server has several tests."""
    return f"slow-{uuid.uuid4().hex[:8]}"


def begun(env, name, *more):
    command = [str(BIN / "oasis-flows"), "batch", name, name, "--output-name", f"{name}-done", *WORDS, *more]
    return subprocess.Popen(
        command,
        env=env,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def half_way(server, process):
    """The folder of the only batch, once a few of its shards are done, and these."""
    outputs = server.home / "datasets"
    eventually(lambda: process.poll() is not None or any(len(finished(each)) >= 3 for each in outputs.glob("*/*")), 240)
    assert process.poll() is None, process.communicate()
    (output,) = outputs.glob("*/*")
    before = finished(output)
    assert len(before) < SHARDS
    return output, before


def assert_ends_well(process, output, env, *more):
    """Wait for a batch of the command line; one that gave up meanwhile is begun again."""
    told, said = process.communicate(timeout=300)
    if process.returncode:
        process = begun(env, output.parent.name.removesuffix("-done"), *more, "--resume", output.name)
        told, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert json.loads(told)["status"] == "Succeeded"


def assert_whole(output, before):
    """Every file is there once, what was done before was left as it was, and there is one dataset."""
    paths = [json.loads(line)["path"] for line in (output / "manifest.jsonl").read_text().splitlines()]
    assert paths == [f"{number:02}.txt" for number in range(SHARDS)]
    assert before.items() <= finished(output).items()
    assert len(finished(output)) == SHARDS
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_engine_that_dies_under_a_batch_costs_only_what_ran_then(server, described, tmp_path, name, number):
    with private_engine() as engine:
        engine.load(docker_archive(tmp_path / "image.tar", TinyImage(tags=("slow:1",))))
        described(server, "slow:1")
        env = server.env | {"DOCKER_HOST": engine.host}
        process = begun(env, name)
        output, before = half_way(server, process)
        engine.end(number)
        time.sleep(3)
        engine.start()
        assert_ends_well(process, output, env)
        with contextlib.closing(engine.connect()) as client:
            assert client.containers.list(all=True) == []

    assert_whole(output, before)


def test_a_prefect_server_that_dies_under_a_batch_costs_only_time(described, docker_api, busybox, tmp_path, name):
    port = free_port()
    server = PrefectServer(port, client_env(port, tmp_path / "prefect", tmp_path / "home"), tmp_path / "home")
    with server_process(server, tmp_path / "server.log") as first:
        described(server, busybox)
        process = begun(server.env, name)
        output, before = half_way(server, process)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait(10)
    time.sleep(10)
    with server_process(server, tmp_path / "server.log"):
        assert_ends_well(process, output, server.env)
        assert server.api(f"/flow_runs/{output.name}")["state_type"] == "COMPLETED"

    assert_whole(output, before)
    assert containers(docker_api, output.name) == []


POOL = ["--fan-out", "work-pool"]


def shards_of(server, run_id, *states):
    """The flow runs of a batch's shards that are in one of these states, or all."""
    runs = server.api("/flow_runs/filter", {"flow_runs": {"tags": {"all_": [f"batch:{run_id}"]}}})
    return [run for run in runs if not states or run["state_type"] in states]


def assert_nothing_left(server, docker_api, output):
    """No container of the batch or of its shards stays, and no workspace."""
    runs = [output.name, *(run["id"] for run in shards_of(server, output.name))]
    eventually(lambda: not [run for run in runs if containers(docker_api, run)], 90)
    eventually(lambda: list((server.home / "workspaces").glob("*")) == [], 90)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_dies_under_a_batch_costs_only_what_ran_then(
    pooled, described, docker_api, busybox, tmp_path, name, number
):
    described(pooled, busybox)
    process = begun(pooled.env, name, *POOL)
    with worker_process(pooled, tmp_path / f"first-{name}.log") as worker:
        output, before = half_way(pooled, process)
        # Its process loads Prefect, and that takes longer than a shard.
        eventually(lambda: shards_of(pooled, output.name, "PENDING"), 60)
        worker.send_signal(number)
        worker.wait(60)
    with worker_process(pooled, tmp_path / f"second-{name}.log"):
        assert_ends_well(process, output, pooled.env, *POOL)
        assert_nothing_left(pooled, docker_api, output)

    assert_whole(output, before)


def test_a_batch_and_its_shards_that_die_with_their_worker_go_on_with_a_retry(
    pooled, described, docker_api, busybox, tmp_path, name
):
    described(pooled, busybox)
    deployment = pooled.api("/deployments/name/batch/batch")
    given = {
        key: {"$ref": {"block_document_slug": f"{kind}/{name}"}}
        for key, kind in (("algorithm", "algorithm"), ("input_dataset", "dataset"))
    }
    parameters = {**given, "files_per_shard": 1, "max_parallel": 2, "fan_out": "work-pool", "output_name": f"{name}-done"}
    run_id = pooled.api(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"]
    output = pooled.home / "datasets" / f"{name}-done" / run_id
    with worker_process(pooled, tmp_path / f"first-{name}.log") as worker:
        eventually(lambda: shards_of(pooled, run_id, "RUNNING"), 120)
        killed = shards_of(pooled, run_id, "RUNNING")[0]["id"]
        os.kill(process_of(killed), signal.SIGKILL)
        pooled.wait_for(killed, "CRASHED", seconds=90)
        eventually(lambda: len(finished(output)) >= 3, 240)
        worker.terminate()
        worker.wait(60)
    before = finished(output)
    with worker_process(pooled, tmp_path / f"second-{name}.log"):
        pooled.wait_for(run_id, "CRASHED", seconds=90)
        pooled.run("prefect", "flow-run", "retry", run_id)
        pooled.wait_for(run_id, "COMPLETED", "FAILED", "CRASHED", seconds=400)
        assert_nothing_left(pooled, docker_api, output)

    assert len(before) < SHARDS
    assert_whole(output, before)


def test_a_batch_that_its_pool_failed_goes_on_when_that_is_mended(pooled, described, docker_api, busybox, tmp_path, name):
    described(pooled, busybox)
    words = [*POOL, "--files-per-shard", str(SHARDS // 2)]
    process = begun(pooled.env, name, *words)
    outputs = pooled.home / "datasets" / f"{name}-done"
    eventually(lambda: process.poll() is not None or list(outputs.glob("*")), 120)
    (output,) = outputs.glob("*")
    while process.poll() is None:
        for run in shards_of(pooled, output.name, "SCHEDULED"):
            state = {"type": "FAILED", "message": "The worker could not start it."}
            pooled.api(f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
        time.sleep(0.5)
    assert process.returncode == 3, process.communicate()
    assert "The worker could not start it." in process.communicate()[0]

    process = begun(pooled.env, name, *words, "--resume", output.name)
    with worker_process(pooled, tmp_path / f"only-{name}.log"):
        told, said = process.communicate(timeout=300)
        assert_nothing_left(pooled, docker_api, output)

    assert process.returncode == 0, said
    assert json.loads(told)["status"] == "Succeeded"
    assert len((output / "manifest.jsonl").read_text().splitlines()) == SHARDS
