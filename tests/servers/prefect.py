"""A real Prefect server, and a worker of the shipped pool beside it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Prefect reads its settings when it is imported, and a thread of it that finds no server starts one of its own. So this
# process gets the address of the session's server before anything imports Prefect: this plugin is the first.
PORT = free_port()
HOME = Path(tempfile.mkdtemp(prefix="oasis-tests-prefect-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
os.environ |= {"PREFECT_API_URL": f"http://127.0.0.1:{PORT}/api", "PREFECT_HOME": str(HOME), "DO_NOT_TRACK": "1"}

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SETTINGS = ROOT / "deployments" / "server.env"


@dataclass(frozen=True, slots=True)
class PrefectServer:
    """A running server. `env` is what a process needs to be its client; `home` is OASIS_FLOWS_HOME."""

    port: int
    env: dict[str, str]
    home: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, *command: str, check: bool = True, seconds: float = 240, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the virtual environment as a user of this server."""
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            env=self.env | changes,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if check and done.returncode:
            pytest.fail(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def api(self, path: str, body: object = None) -> Any:
        """Ask the server's REST API."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/api{path}", data, {"Content-Type": "application/json"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=90) as answer:
            return json.loads(answer.read() or "null")

    def wait_for(self, run_id: str, *states: str, seconds: float = 90) -> dict[str, Any]:
        """The flow run, once its state's type is one of these."""
        deadline = time.monotonic() + seconds
        while True:
            run = self.api(f"/flow_runs/{run_id}")
            if run["state_type"] in states:
                return dict(run)
            if time.monotonic() > deadline:
                pytest.fail(f"The run is still {run['state_name']}, not {' or '.join(states)}, after {seconds} s.")
            time.sleep(0.2)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started, which is a session of its own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def server_process(server: PrefectServer, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a server, for the time of the block; one that went down may be started again on its database."""
    command = [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(server.port)]
    with log.open("ab") as said:
        process = subprocess.Popen(
            command,
            env=with_shipped_settings(server.env),
            stdout=said,
            stderr=said,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(server, process, log)
        yield process
    finally:
        stop(process)


def client_env(port: int, prefect_home: Path, oasis_home: Path) -> dict[str, str]:
    """The environment of the clients of a server on this port."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "OASIS_"))} | {
        "PREFECT_HOME": str(prefect_home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "OASIS_FLOWS_HOME": str(oasis_home),
    }


def with_shipped_settings(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server, out of that of its clients: what a shell makes of the shipped settings."""
    read = ["sh", "-c", 'set -a; . "$0"; env -0', str(SETTINGS)]
    said = subprocess.run(read, env=given, capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in said.split("\0") if line)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A server of this test session, with a database of its own. This process is its client, too."""
    folder = tmp_path_factory.mktemp("prefect")
    server = PrefectServer(PORT, client_env(PORT, HOME, folder / "home"), folder / "home")
    with server_process(server, folder / "server.log"):
        yield server


def _wait_until_healthy(server: PrefectServer, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if server.api("/health"):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"The Prefect server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture
def here(prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A home of oasis-flows for this test alone; this process's flows use it."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    monkeypatch.setenv("OASIS_FLOWS_HOME", str(tmp_path / "home"))
    # A flow ends once the thread of its heartbeat wakes up, which it does every second. Those in other processes have theirs.
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield tmp_path / "home"


def deploy(server: PrefectServer) -> None:
    """Make the shipped pools and deployments, as the documentation says to."""
    for pool, kind in (("gpu-process", "process"), ("gpu-docker", "docker"), ("gpu-kubernetes", "kubernetes")):
        template = f"deployments/work-pools/{pool}.json"
        server.run("prefect", "--no-prompt", "work-pool", "create", pool, "--type", kind, "--base-job-template", template)
    server.run("prefect", "--no-prompt", "deploy", "--all")


@pytest.fixture(scope="session")
def deployed(prefect_server: PrefectServer) -> PrefectServer:
    """The server with the shipped pools, deployments, catalogue and sample dataset, as the documentation says to make them."""

    def describe() -> None:
        prefect_server.run("python", "deployments/images/co2-report/build.py")
        prefect_server.run("oasis-flows", "apply", "blocks")
        prefect_server.run("oasis-flows", "dataset", "add", "co2-weekly", "examples/co2-weekly")

    # Most of each command's time is Python's start.
    with ThreadPoolExecutor(2) as both:
        for done in [both.submit(deploy, prefect_server), both.submit(describe)]:
            done.result()
    return prefect_server


def deploy_to(server: PrefectServer, pool: str, **job_variables: Any) -> str:
    """Make one more deployment of `algorithm_task`, of the pool's name and for it; return its id."""
    shipped = server.api("/deployments/name/algorithm-task/algorithm-task")
    same = {key: shipped[key] for key in ("flow_id", "entrypoint", "path", "pull_steps", "parameter_openapi_schema")}
    wanted = {"name": pool, "work_pool_name": pool, "job_variables": job_variables, **same}
    return str(server.api("/deployments/", wanted)["id"])


def begin(server: PrefectServer, algorithm: str, dataset: str, deployment: str = "", **job_variables: Any) -> str:
    """Have a deployment of `algorithm_task` run, the shipped one where none is named; return the run's id."""
    given = {"algorithm": f"algorithm/{algorithm}", "input_dataset": f"dataset/{dataset}"}
    parameters = {name: {"$ref": {"block_document_slug": slug}} for name, slug in given.items()}
    deployment = deployment or server.api("/deployments/name/algorithm-task/algorithm-task")["id"]
    wanted = {"parameters": parameters, "job_variables": job_variables}
    return str(server.api(f"/deployments/{deployment}/create_flow_run", wanted)["id"])


@contextlib.contextmanager
def worker_process(
    server: PrefectServer, log: Path, *, pool: str = "gpu-process", **changes: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of a pool, in a session of its own."""
    command = [str(BIN / "prefect"), "worker", "start", "--pool", pool, "--name", log.stem]
    env = server.env | {"PREFECT_WORKER_QUERY_SECONDS": "1", **changes}
    with log.open("wb") as said:
        process = subprocess.Popen(command, env=env, stdout=said, stderr=said, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        stop(process)


@pytest.fixture(scope="session")
def worker(deployed: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """The worker of most tests."""
    with worker_process(deployed, tmp_path_factory.mktemp("worker") / "tests.log") as process:
        yield process


def refuse_places(monkeypatch: pytest.MonkeyPatch, failures: list[Exception]) -> None:
    """Answer with these, the last one first, and then as ever, where Prefect's engine asks whether the limits of a task's tags leave room."""
    from prefect.concurrency.services import ConcurrencySlotAcquisitionWithLeaseService

    acquire = ConcurrencySlotAcquisitionWithLeaseService.acquire

    async def away_at_first(self: Any, *args: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return await acquire(self, *args, **options)

    monkeypatch.setattr(ConcurrencySlotAcquisitionWithLeaseService, "acquire", away_at_first)
