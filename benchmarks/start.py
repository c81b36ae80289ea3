"""From `prefect deployment run` to a container that has started, by a worker of the shipped pool.

Beside it is a plain flow in one file on a pool and a worker as Prefect has them by default, to its first line of code.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from benchmarks.surroundings import IMAGE, make_files
from benchmarks.table import Row, Series, speed
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from tests.servers.prefect import BIN, PrefectServer, stop

PLAIN = """
import os, time
from prefect import flow

@flow
def plain():
    with open(os.environ["BENCH_STARTED"], "w") as file:
        file.write(str(time.time()))
"""


def rows(folder: Path, server: PrefectServer, *, quick: bool) -> Iterator[Row]:
    """One row."""
    _describe(folder, server)
    started = folder / "started"
    ours, theirs = Series(), Series()
    documented = {"PREFECT_WORKER_QUERY_SECONDS": "1"}
    with (
        _worker(server, "gpu-process", folder / "ours.log", **documented),
        _worker(server, "plain", folder / "plain.log", BENCH_STARTED=str(started)),
    ):
        for turn in range(3 if quick else 9):
            # A worker looks every so often: no turn begins at the same moment of that as the one before.
            time.sleep(turn * 0.7 % 1)
            mine = _ours(server, folder)
            other = _theirs(server, started)
            if turn:
                ours.seconds.append(mine)
                theirs.seconds.append(other)
    ratio = 1 / speed(ours, theirs)
    yield Row(
        what="`prefect deployment run` → container started, worker of the shipped pool",
        ours=str(ours),
        beside="a plain flow's first line, default pool and worker",
        theirs=str(theirs),
        figure=f"{ratio:.0%} of its time",
        mark="≤ 50%",
        reached=ratio <= 0.5,
    )


def _describe(folder: Path, server: PrefectServer) -> None:
    """Make the pools, the deployments and the documents."""
    Algorithm(docker_image=DockerImage(image_id=IMAGE), command="true").save("benchmark", overwrite=True)
    Dataset(url=str(make_files(folder / "in", 1, 1))).save("benchmark", overwrite=True)
    DatasetStore(url=str(folder / "out")).save("default", overwrite=True)
    template = "deployments/work-pools/gpu-process.json"
    create = ("prefect", "--no-prompt", "work-pool", "create")
    server.run(*create, "gpu-process", "--type", "process", "--base-job-template", template)
    server.run(*create, "plain", "--type", "process")
    server.run("prefect", "--no-prompt", "deploy", "--name", "algorithm-task")
    (folder / "plain.py").write_text(PLAIN)
    # Its pull step is the one that `prefect deploy` writes: the folder is the working directory.
    (folder / "prefect.yaml").write_text(
        json.dumps(
            {
                "pull": [{"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}],
                "deployments": [{"name": "plain", "entrypoint": "plain.py:plain", "work_pool": {"name": "plain"}}],
            }
        )
    )
    deploy: list[str | Path] = [BIN / "prefect", "--no-prompt", "deploy", "--prefect-file", folder / "prefect.yaml", "--all"]
    subprocess.run(deploy, env=server.env, cwd=folder, check=True, capture_output=True)


@contextlib.contextmanager
def _worker(server: PrefectServer, pool: str, log: Path, **changes: str) -> Iterator[None]:
    command = [str(BIN / "prefect"), "worker", "start", "--pool", pool]
    with log.open("wb") as said:
        process = subprocess.Popen(command, env=server.env | changes, stdout=said, stderr=said, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while b"started" not in log.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.2)
        yield
    finally:
        stop(process)


def _run(server: PrefectServer, name: str, **parameters: object) -> tuple[float, str]:
    """Create a run as `prefect deployment run` does, without the seconds that the command itself takes to start."""
    deployment = server.api(f"/deployments/name/{name}")["id"]
    began = time.time()
    made = server.api(f"/deployments/{deployment}/create_flow_run", {"parameters": parameters, "state": {"type": "SCHEDULED"}})
    return began, str(made["id"])


def _ours(server: PrefectServer, folder: Path) -> float:
    references = {
        each: {"$ref": {"block_document_slug": f"{kind}/benchmark"}}
        for each, kind in (("algorithm", "algorithm"), ("input_dataset", "dataset"))
    }
    began, run = _run(server, "algorithm-task/algorithm-task", **references)
    server.wait_for(run, "COMPLETED", seconds=120)
    record = json.loads((folder / "out" / "benchmark-output" / run / "task.json").read_text())
    return datetime.fromisoformat(record["exit"]["started_at"]).timestamp() - began


def _theirs(server: PrefectServer, started: Path) -> float:
    started.unlink(missing_ok=True)
    began, run = _run(server, "plain/plain")
    server.wait_for(run, "COMPLETED", seconds=120)
    return float(started.read_text()) - began
