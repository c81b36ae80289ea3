"""Batches with real containers, a real Prefect server, and stores that are real: what they publish, and what a death leaves."""

import json
import os
import random
import shlex
import signal
import subprocess
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage, Prerequisite
from oasis_flows.engines import docker_run
from oasis_flows.flows.algorithm_task import algorithm_task
from oasis_flows.flows.batch import batch
from oasis_flows.settings import current
from oasis_flows.store import Location, published, read_file
from tests.e2e.test_cancel import process_of
from tests.servers.engine import eventually
from tests.servers.faultproxy import Faults, between
from tests.servers.prefect import BIN, ROOT

# How many shards are run while their containers are killed; 200 take some minutes.
KILLED_SHARDS = int(os.environ.get("OASIS_TESTS_KILLED_SHARDS", "24"))
GRACE = current().stop_grace_seconds
COPY = 'for f in $(cd input && find . -type f); do mkdir -p "output/$(dirname $f)"; tr a-z A-Z < "input/$f" > "output/$f"; done'


def algorithm(image, script=COPY):
    return Algorithm(docker_image=DockerImage(image_id=image), command=["sh", "-c", script], cpus=0.1, memory="32MiB")


def containers(api, run_id):
    return docker_run.list_containers(api, run_id, with_parts=True)


@pytest.fixture
def letters(tmp_path):
    """Makes a dataset of so many files."""

    def make(count):
        for number in range(count):
            path = tmp_path / "letters" / f"{number % 3}" / f"{number:04}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"letter {number}")
        return Dataset(url=str(tmp_path / "letters"))

    return make


@pytest.fixture
def ran(prefect_server, here, docker_api):
    """Runs a batch here; no container and no workspace of it stays."""

    def run(*given, **options):
        state = batch(*given, return_state=True, **options)
        run_id = str(state.state_details.flow_run_id)
        assert containers(docker_api, run_id) == []
        assert not (here / "workspaces" / run_id).exists()
        return state

    return run


def test_what_has_to_be_in_place_is_so_for_each_shard(ran, busybox, letters):
    Prerequisite(
        plugin_params={"callbacks": [{"event": "taskStarts", "commands": ["echo ready > /tmp/ready"]}]},
    ).save("shard-ready", overwrite=True)
    needs = Algorithm(
        docker_image=DockerImage(image_id=busybox),
        command=["sh", "-c", "cp /tmp/ready output/$OASIS_SHARD_INDEX"],
        cpus=0.1,
        memory="32MiB",
        prerequisites=["shard-ready"],
    )
    dataset = ran(needs, letters(6), shards=3).result()

    assert dataset.file_count == 3


def test_a_batch_over_a_folder_is_one_dataset_which_a_run_can_read(ran, busybox, letters, here):
    dataset = ran(algorithm(busybox), letters(30), files_per_shard=4).result()
    copied = algorithm_task(algorithm(busybox, "cat input/*/* | wc -c > output/bytes"), dataset)

    found = published(Location(dataset.url))
    assert dataset.file_count == len(list(found.entries())) == 30
    assert {entry.at.split("/")[1] for entry in found.entries()} == {str(index) for index in range(8)}
    assert all((Path(dataset.url) / entry.at).read_text().startswith("LETTER ") for entry in found.entries())
    assert int((Path(copied.url) / "data/bytes").read_text()) == dataset.size_bytes


def test_a_batch_from_s3_to_s3(ran, busybox, s3, tmp_path):
    bucket, options = s3.new_bucket(), s3.options
    client = s3.client()
    for number in range(12):
        client.put_object(Bucket=bucket, Key=f"in/{number % 2}/{number}.txt", Body=f"object {number}".encode())
    keys = {"endpoint_url": s3.endpoint, "access_key_id": s3.access_key, "secret_access_key": s3.secret_key}
    store = DatasetStore(url=f"s3://{bucket}/out", **keys)
    state = ran(algorithm(busybox), Dataset(url=f"s3://{bucket}/in", store=store), store=store, shards=5, include="*.txt")
    dataset = state.result()

    place = Location(dataset.url, options)
    entries = list(published(place).entries())
    assert [entry.path for entry in entries] == sorted(f"{number % 2}/{number}.txt" for number in range(12))
    assert b"".join(read_file(place, entries[0].at)).startswith(b"OBJECT ")
    rows = [json.loads(line) for line in b"".join(read_file(place, "shards.jsonl")).splitlines()]
    assert sum(row["files"][1] - row["files"][0] for row in rows) == 12
    assert s3.secret_key not in str(
        [b"".join(read_file(place, name)) for name in ("task.json", "batch/head.json", "shards.jsonl")]
    )


def test_containers_that_are_killed_at_random_cost_only_time(ran, busybox, letters, docker_api):
    done, rng, killed = threading.Event(), random.Random(7), []

    def kill():
        while not done.wait(0.7):
            mine = [
                row
                for row in docker_run.list_containers(docker_api)
                if row["State"] == "running" and "." in row["Labels"]["io.oasis.run-id"]
            ]
            if mine and len(killed) < KILLED_SHARDS // 4:
                victim = rng.choice(mine)["Id"]
                subprocess.run(["docker", "kill", victim], capture_output=True, check=False)
                killed.append(victim)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        dataset = ran(
            algorithm(busybox, f"sleep 0.5; {COPY}"), letters(KILLED_SHARDS), files_per_shard=1, max_parallel=3
        ).result()
    finally:
        done.set()
        thread.join()

    assert dataset.file_count == KILLED_SHARDS
    assert killed


@pytest.fixture
def begin(prefect_server, here):
    """Starts `oasis-flows batch …` in a process of its own; returns the process."""
    processes = []

    def start(*arguments):
        command = [str(BIN / "oasis-flows"), "batch", *arguments]
        process = subprocess.Popen(
            command,
            env=prefect_server.env | {"OASIS_FLOWS_HOME": str(here)},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finished(output):
    """The records of finished shards, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(output).glob("batch/ledger/*.json")}


def test_a_batch_whose_process_is_killed_goes_on_and_does_nothing_twice(
    prefect_server, here, begin, busybox, letters, docker_api
):
    name = f"killed-{uuid.uuid4().hex[:8]}"
    algorithm(busybox, f"sleep 1; {COPY}").save(name)
    letters(12).save(name)
    options = [name, name, "--files-per-shard", "1", "--max-parallel", "2", "--output-name", f"{name}-out"]
    process = begin(*options)
    folder = here / "datasets" / f"{name}-out"
    eventually(lambda: process.poll() is not None or any(len(finished(output)) >= 4 for output in folder.glob("*")), 120)
    assert process.poll() is None, process.stdout.read()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (output,) = folder.glob("*")
    before = finished(output)
    run_id = output.name

    planned = prefect_server.run(
        "oasis-flows", "plan", "batch", *options, "--resume", run_id, "--json", OASIS_FLOWS_HOME=str(here)
    )
    again = begin(*options, "--resume", run_id, "--json")
    said, _ = again.communicate(timeout=180)

    assert json.loads(planned.stdout)["finished"]["shards"] >= len(before)
    assert again.returncode == 0, said
    assert json.loads(said.splitlines()[-1])["dataset"] == f"{name}-out"
    assert len(before) < 12
    assert before.items() <= finished(output).items()
    assert Dataset.load(f"{name}-out").file_count == 12
    assert containers(docker_api, run_id) == []
    assert prefect_server.api(f"/flow_runs/{run_id}")["state_type"] == "COMPLETED"


# Counts what is free, and goes on when the other one has counted, too, or after a while.
COUNTS_TOGETHER = """
import sys, time
from pathlib import Path
from oasis_flows import batch, fan_out

real, mine, other = fan_out.places, Path(sys.argv[1]), Path(sys.argv[2])

def places(*given, **more):
    found = real(*given, **more)
    mine.touch()
    until = time.monotonic() + 6
    while not other.exists() and time.monotonic() < until:
        time.sleep(0.05)
    return found

fan_out.places = places
batch(sys.argv[3], sys.argv[3], files_per_shard=1)
"""


def test_two_batches_that_begin_in_the_same_moment_share_the_machine(
    prefect_server, here, docker_api, busybox, letters, tmp_path
):
    name = f"together-{uuid.uuid4().hex[:8]}"
    processors = docker_api.info()["NCPU"]
    # Four fit into the headroom of the empty machine, and eight are wanted.
    cpus = processors * current().headroom / 4
    Algorithm(
        docker_image=DockerImage(image_id=busybox), command=["sh", "-c", f"sleep 2; {COPY}"], cpus=cpus, memory="32MiB"
    ).save(name)
    letters(4).save(name)
    marks = [str(tmp_path / "first"), str(tmp_path / "second")]
    env = prefect_server.env | {"OASIS_FLOWS_HOME": str(here)}
    processes = [
        subprocess.Popen([str(BIN / "python"), "-c", COUNTS_TOGETHER, *words, name], env=env, cwd=ROOT)
        for words in (marks, marks[::-1])
    ]
    most, runs = 0, set()
    try:
        while any(process.poll() is None for process in processes):
            runs |= {path.name for path in (here / "workspaces").glob("*")}
            running = [row for run_id in runs for row in containers(docker_api, run_id) if row["State"] == "running"]
            most = max(most, len(running))
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()

    assert [process.returncode for process in processes] == [0, 0]
    assert len(runs) == 2
    assert 0 < most <= 4


def test_a_cancel_reaches_every_container_within_the_grace(deployed, worker, docker_api, busybox, letters):
    name = f"cancelled-{uuid.uuid4().hex[:8]}"
    algorithm(busybox, "trap '' TERM; while :; do sleep 1; done").save(name)
    letters(8).save(name)
    deployment = deployed.api("/deployments/name/batch/batch")
    given = {
        key: {"$ref": {"block_document_slug": f"{kind}/{name}"}}
        for key, kind in (("algorithm", "algorithm"), ("input_dataset", "dataset"))
    }
    parameters = {**given, "files_per_shard": 1, "max_parallel": 3}
    run_id = deployed.api(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"]
    eventually(lambda: len([row for row in containers(docker_api, run_id) if row["State"] == "running"]) == 3, 120)
    deployed.run("prefect", "flow-run", "cancel", run_id)
    cancelled = time.monotonic()

    eventually(lambda: not containers(docker_api, run_id), GRACE + 2)
    assert time.monotonic() - cancelled < GRACE + 2
    assert deployed.wait_for(run_id, "CANCELLED", "CRASHED", "FAILED", seconds=40)["state_type"] == "CANCELLED"
    output = Path(deployed.api(f"/flow_runs/{run_id}")["labels"]["oasis.output"])
    assert not (output / "manifest.jsonl").exists()
    assert finished(output) == {}
    eventually(lambda: not (deployed.home / "workspaces" / run_id).exists(), 20)


def test_shards_can_be_flow_runs_of_a_work_pool_and_outlive_the_batchs_process(deployed, worker, docker_api, busybox, letters):
    name = f"pooled-{uuid.uuid4().hex[:8]}"
    algorithm(busybox, f"sleep 1; {COPY}; test ! -e input/1/0004.txt").save(name)
    letters(6).save(name)
    deployment = deployed.api("/deployments/name/batch/batch")
    given = {
        key: {"$ref": {"block_document_slug": f"{kind}/{name}"}}
        for key, kind in (("algorithm", "algorithm"), ("input_dataset", "dataset"))
    }
    parameters = {**given, "files_per_shard": 2, "fan_out": "work-pool", "output_name": f"{name}-out"}
    run_id = deployed.api(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"]
    wanted = {"flow_runs": {"tags": {"all_": [f"batch:{run_id}"]}}}
    eventually(lambda: len(deployed.api("/flow_runs/filter", wanted)) >= 3, 90)
    os.kill(process_of(run_id), signal.SIGKILL)
    deployed.wait_for(run_id, "CRASHED", seconds=60)
    deployed.run("prefect", "flow-run", "retry", run_id)
    run = deployed.wait_for(run_id, "COMPLETED", "FAILED", seconds=200)

    output = Path(run["labels"]["oasis.output"])
    assert run["state"]["message"].startswith("1 of 6 files failed, and the output of all others is published"), run["state"]
    assert len((output / "manifest.jsonl").read_text().splitlines()) == 5
    made = deployed.api("/flow_runs/filter", wanted)
    names = [each["parameters"]["shard"]["name"] for each in made]
    assert len(names) == len(set(names)) == 5
    assert {each["parameters"]["shard"]["listing"] for each in made} == {f"{output}/batch"}
    failed = json.loads((output / "failed.jsonl").read_text())
    assert failed["file"] == "1/0004.txt"

    alone = deployed.run(*shlex.split(failed["command"]), "--json", check=False)
    assert alone.returncode == 1, alone.stdout + alone.stderr
    assert "All of the 1 file failed" in alone.stdout


def test_a_cancel_of_a_batch_cancels_its_shards_on_the_workers(deployed, worker, docker_api, busybox, letters):
    name = f"cancelled-{uuid.uuid4().hex[:8]}"
    algorithm(busybox, "sleep 600").save(name)
    letters(6).save(name)
    deployment = deployed.api("/deployments/name/batch/batch")
    given = {
        key: {"$ref": {"block_document_slug": f"{kind}/{name}"}}
        for key, kind in (("algorithm", "algorithm"), ("input_dataset", "dataset"))
    }
    parameters = {**given, "files_per_shard": 1, "max_parallel": 3, "fan_out": "work-pool"}
    run_id = deployed.api(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"]
    wanted = {"flow_runs": {"tags": {"all_": [f"batch:{run_id}"]}}}

    def shards():
        return {each["id"]: each["state_type"] for each in deployed.api("/flow_runs/filter", wanted)}

    eventually(lambda: any(containers(docker_api, shard) for shard in shards()), 180)
    deployed.run("prefect", "flow-run", "cancel", run_id)

    assert deployed.wait_for(run_id, "CANCELLED", "CRASHED", "FAILED", seconds=90)["state_type"] == "CANCELLED"
    eventually(lambda: set(shards().values()) == {"CANCELLED"}, 120)
    eventually(lambda: not any(containers(docker_api, shard) for shard in shards()), GRACE + 2)
    output = Path(deployed.api(f"/flow_runs/{run_id}")["labels"]["oasis.output"])
    assert not (output / "manifest.jsonl").exists()
    assert finished(output) == {}
    assert len(shards()) == 3


def test_a_store_that_is_away_while_outcomes_are_read_is_waited_for(deployed, worker, busybox, letters, s3):
    name = f"away-{uuid.uuid4().hex[:8]}"
    algorithm(busybox).save(name)
    letters(4).save(name)
    with between(int(s3.endpoint.rpartition(":")[2])) as line:
        keys = {"access_key_id": s3.access_key, "secret_access_key": s3.secret_key}
        store = DatasetStore(url=f"s3://{s3.new_bucket()}/out", endpoint_url=f"http://127.0.0.1:{line.port}", **keys)
        store.save(name)
        kinds = {"algorithm": "algorithm", "input_dataset": "dataset", "store": "dataset-store"}
        given = {key: {"$ref": {"block_document_slug": f"{kind}/{name}"}} for key, kind in kinds.items()}
        parameters = {**given, "files_per_shard": 2, "fan_out": "work-pool", "output_name": f"{name}-out"}
        deployment = deployed.api("/deployments/name/batch/batch")
        run_id = deployed.api(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"]
        shards = {"flow_runs": {"tags": {"all_": [f"batch:{run_id}"]}}}
        eventually(lambda: len(deployed.api("/flow_runs/filter", shards)) == 2, 90)
        process = process_of(run_id)
        os.kill(process, signal.SIGSTOP)
        try:
            for shard in deployed.api("/flow_runs/filter", shards):
                assert deployed.wait_for(shard["id"], "COMPLETED", "FAILED", seconds=120)["state_type"] == "COMPLETED"
            line.set(Faults(refuse=True))
        finally:
            os.kill(process, signal.SIGCONT)
        logs = {"logs": {"flow_run_id": {"any_": [run_id]}}}
        eventually(
            lambda: any("cannot be read; it is tried again" in row["message"] for row in deployed.api("/logs/filter", logs)),
            120,
        )
        line.set(Faults())
        run = deployed.wait_for(run_id, "COMPLETED", "FAILED", "CRASHED", seconds=120)
        assert run["state_type"] == "COMPLETED", run["state"]
        assert len(list(published(Location(run["labels"]["oasis.output"], s3.options)).entries())) == 4


class Cluster(BaseHTTPRequestHandler):
    """Answers as OSCAR does when it is asked about a service."""

    def do_GET(self):
        known = self.path == "/system/services/fish-detector" and self.headers["Authorization"] == "Basic b3NjYXI6cDRzc3dvcmQ="
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"name": "fish-detector", "cpu": "0.1", "memory": "32Mi", "image": "x"}).encode())

    def log_message(self, *_):
        pass


# The script of the service, as OSCAR-Batch has it; `jq` and Python in the image's own words.
FISH = """
S=$(sed 's/.*"start": \\([0-9]*\\).*/\\1/' "$INPUT_FILE_PATH"); E=$(sed 's/.*"end": \\([0-9]*\\).*/\\1/' "$INPUT_FILE_PATH")
sed -n "${S},${E}p" "$BUCKET_DIR/input/index.txt" | while read line; do
  ! grep -q broken "$BUCKET_DIR/$line" || exit 9
  tr a-z A-Z < "$BUCKET_DIR/$line" > "$BUCKET_DIR/output/$(basename "$line" .jpg).json"
done
"""


def test_an_oscar_batch_configuration_runs_as_it_is(prefect_server, here, begin, busybox, s3, tmp_path):
    bucket, client, name = s3.new_bucket(), s3.client(), f"fish-{uuid.uuid4().hex[:8]}"
    for number in range(9):
        client.put_object(Bucket=bucket, Key=f"input/{number}.jpg", Body=f"picture {number}".encode())
    client.put_object(Bucket=bucket, Key="input/x.jpg", Body=b"broken")
    fish = DockerImage(image_id=busybox)
    Algorithm(docker_image=fish, command=["sh", "-c", FISH], environment={"BUCKET_DIR": "/work"}, memory="1TiB").save(name)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Cluster)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "MinIO": {"url": s3.endpoint, "access_key": s3.access_key, "secret_key": s3.secret_key},
        "bucket": {"name": bucket, "folder_prefix": "input/"},
        "output": {"file": "index.txt"},
        "oscar_cluster": {
            "url": f"http://127.0.0.1:{server.server_port}",
            "auth_basic": {"username": "oscar", "password": "p4ssword"},
        },
        "service": {"name": "fish-detector"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = [name, "--oscar-config", str(tmp_path / "config.json"), "--include", "*.jpg", "--shards", "3", "--json"]
    planned = prefect_server.run("oasis-flows", "plan", "batch", *options, OASIS_FLOWS_HOME=str(here))
    process = begin(*options)
    said, _ = process.communicate(timeout=180)

    assert json.loads(planned.stdout)["files"] == 10
    assert json.loads(planned.stdout)["needs"].startswith("0.1 processors, 32.0 MiB")
    assert process.returncode == 1, said
    told = next(json.loads(line) for line in said.splitlines() if line.startswith("{"))
    assert told["message"].startswith("1 of 10 files failed"), told
    output = Path(told["url"])
    found = {row["path"]: row["at"] for row in map(json.loads, (output / "manifest.jsonl").read_text().splitlines())}
    assert {path: (output / at).read_text() for path, at in found.items()} == {
        f"{number}.json": f"PICTURE {number}" for number in range(9)
    }
    run = prefect_server.api(f"/flow_runs/{told['flow_run_id']}")
    kept = [path.read_text(errors="replace") for path in output.rglob("*") if path.is_file()]
    failed = json.loads((output / "failed.jsonl").read_text())
    alone = prefect_server.run(*shlex.split(failed["command"]), "--json", check=False, OASIS_FLOWS_HOME=str(here))
    server.shutdown()
    assert alone.returncode == 1, alone.stdout + alone.stderr
    assert json.loads(alone.stdout)["message"].startswith("All of the 1 file failed")
    for secret in (s3.secret_key, "p4ssword"):
        assert secret not in said + json.dumps(run) + "".join(kept) + alone.stdout + alone.stderr
