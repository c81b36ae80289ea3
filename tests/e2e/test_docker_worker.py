"""Flow runs as containers of Prefect's Docker worker, in the shipped pool and the runner's image.

What is not proven: the Dockerfile itself, for want of a network.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker.errors
import pytest

from oasis_flows.blocks import Algorithm, Dataset, DockerImage
from tests.images import docker_archive, flow_runner_image
from tests.servers.engine import containers_of, eventually
from tests.servers.prefect import PrefectServer, begin, deploy_to, worker_process

SOCKET = Path("/var/run/docker.sock")
OASIS = 1000


@dataclass(frozen=True)
class Pool:
    """The deployment `id` of the pool, and the home of its runs."""

    id: str
    server: PrefectServer
    home: Path
    api: Any

    def flow_container(self, run_id: str) -> list[dict[str, Any]]:
        """The container of the flow run itself."""
        return list(self.api.containers(all=True, filters={"label": f"io.prefect.flow-run-id={run_id}"}))


@pytest.fixture(scope="module")
def pool(deployed, docker_api, busybox, tmp_path_factory) -> Iterator[Pool]:
    """The shipped pool `gpu-docker` with a worker, as the how-to has it set up."""
    folder = tmp_path_factory.mktemp("docker-pool")
    runner = f"oasis-test/flow-runner:{uuid.uuid4().hex[:12]}"
    with docker_archive(folder / "runner.tar", flow_runner_image(runner)).open("rb") as archive:
        list(docker_api.load_image(archive))
    home = folder / "home"
    home.mkdir()
    os.chown(home, OASIS, OASIS)
    (folder / "letters").mkdir()
    (folder / "letters/a.txt").write_text("a")
    Dataset(url=str(folder / "letters")).save("letters-of-the-host", overwrite=True)
    scripts = {"upper": "tr a-z A-Z < input/a.txt > output/a.txt; echo done", "sleeper-of-docker": "echo began; sleep 600"}
    for name, script in scripts.items():
        Algorithm(docker_image=DockerImage(image_id=busybox), command=["sh", "-c", script]).save(name, overwrite=True)
    deployment = deploy_to(
        deployed,
        "gpu-docker",
        image=runner,
        image_pull_policy="Never",
        network_mode="host",
        volumes=[f"{SOCKET}:{SOCKET}", f"{home}:{home}", f"{folder / 'letters'}:{folder / 'letters'}:ro"],
        env={"OASIS_FLOWS_ENGINE": "docker", "OASIS_FLOWS_HOME": str(home)},
        container_create_kwargs={"group_add": [str(SOCKET.stat().st_gid)]},
    )
    with worker_process(deployed, folder / "docker-worker.log", pool="gpu-docker"):
        yield Pool(deployment, deployed, home, docker_api)
    docker_api.remove_image(runner, force=True)


def test_a_run_in_a_container_of_its_own_publishes_a_dataset_and_leaves_nothing(pool):
    run_id = begin(pool.server, "upper", "letters-of-the-host", pool.id)
    run = pool.server.wait_for(run_id, "COMPLETED", "FAILED", "CRASHED", seconds=180)

    assert run["state_type"] == "COMPLETED", pool.server.run("prefect", "flow-run", "logs", run_id).stdout
    output = Path(run["labels"]["oasis.output"])
    assert (output / "data/a.txt").read_text() == "A"
    assert (output / "log.txt").read_bytes() == b"done\n"
    assert json.loads((output / "task.json").read_text())["status"] == "Succeeded"
    eventually(lambda: not pool.flow_container(run_id), 60)
    assert containers_of(pool.api, run_id) == []
    assert not (pool.home / "workspaces" / run_id).exists()


def test_cancelling_stops_the_algorithm_in_its_container_beside_that_of_the_flow(pool):
    run_id = begin(pool.server, "sleeper-of-docker", "letters-of-the-host", pool.id)
    eventually(lambda: [row for row in containers_of(pool.api, run_id) if row["State"] == "running"], 120)
    pool.server.run("prefect", "flow-run", "cancel", run_id)

    eventually(lambda: containers_of(pool.api, run_id) == [], 40)
    assert pool.server.wait_for(run_id, "CANCELLED", "CRASHED", "FAILED", seconds=60)["state_type"] == "CANCELLED"
    eventually(lambda: not pool.flow_container(run_id), 60)
    eventually(lambda: not (pool.home / "workspaces" / run_id).exists(), 20)


def test_a_killed_flow_container_is_a_crash_and_its_algorithm_goes_with_the_next_reap(pool):
    run_id = begin(pool.server, "sleeper-of-docker", "letters-of-the-host", pool.id)
    eventually(lambda: [row for row in containers_of(pool.api, run_id) if row["State"] == "running"], 120)
    for row in pool.flow_container(run_id):
        with suppress(docker.errors.NotFound):
            pool.api.kill(row["Id"])

    assert pool.server.wait_for(run_id, "CRASHED", seconds=90)["state_type"] == "CRASHED"
    pool.server.run("oasis-flows", "reap", "--now", OASIS_FLOWS_HOME=str(pool.home))
    assert containers_of(pool.api, run_id) == []
