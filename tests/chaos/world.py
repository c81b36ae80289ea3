"""The whole installation that a round is played in, made from nothing: servers, documents, data, and the faults' levers."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# First, because it tells this process where its Prefect server is.
from tests.servers import prefect  # isort: skip

import obstore
import yaml

from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from tests.images import TinyImage, busybox_layer, docker_archive, layer
from tests.servers import postgres, s3
from tests.servers.faultproxy import FaultProxy

from .algorithms import ALGORITHMS, SOURCES, TOKEN
from .services import EngineService, Service

INPUTS, RESULTS = "inputs", "results"
IMAGE = "oasis-chaos/busybox:1"
# Nobody waits the hour here that the shipped automation, and the reaper, give a run to begin.
# On a machine that had nine times too much to do, a run took a minute from the hands of its worker to its first request.
PENDING_SECONDS = 100


@dataclass(frozen=True)
class World:
    """Everything; `api` is the Prefect server without the proxy that runs go through, `s3` the store without its."""

    folder: Path
    engine: EngineService
    server: Service
    gateway: Service
    worker: Service
    api: prefect.PrefectServer
    s3: s3.S3Server
    to_server: FaultProxy
    to_store: FaultProxy
    zygote: subprocess.Popen[bytes]
    env: Mapping[str, str]
    ordering: threading.Lock = field(default_factory=threading.Lock)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def fork(self, **order: Any) -> int:
        """Have the zygote carry out an order; return the number of the process that does."""
        with self.ordering:
            assert self.zygote.stdin is not None
            assert self.zygote.stdout is not None
            self.zygote.stdin.write(json.dumps(order).encode() + b"\n")
            self.zygote.stdin.flush()
            return int(self.zygote.stdout.readline())

    def ask(self, path: str, body: object = None, seconds: float = 300) -> Any:
        """Ask the Prefect server, for as long as it is away."""
        until = time.monotonic() + seconds
        while True:
            try:
                return self.api.api(path, body)
            except (OSError, http.client.HTTPException, ValueError):
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)


@contextlib.contextmanager
def build(folder: Path) -> Iterator[World]:
    """Start and fill everything. Nothing is taken down in order: the namespaces' end does that."""
    for name in ("engine", "s3", "database", "home", "logs", "results", "local"):
        (folder / name).mkdir()
    logs = folder / "logs"
    with s3.serve(folder / "s3") as store, postgres.serve(folder / "database") as database:
        gateway = Service(
            ["radosgw", "-n", "client.rgw", "-f", "--conf", f"{folder}/s3/ceph.conf"],
            logs / "gateway",
            lambda: _answers(store.endpoint),
        )
        _replace("radosgw", gateway)
        engine = EngineService(folder / "engine", "--cgroup-parent", folder.name)
        engine.start()
        to_server, to_store = FaultProxy(prefect.PORT), FaultProxy(int(store.endpoint.rpartition(":")[2]))
        env = _environment(folder, engine.host, store)
        api = prefect.PrefectServer(prefect.PORT, env, folder / "home")
        command = [str(prefect.BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(prefect.PORT)]
        server = Service(
            command, logs / "server", lambda: _healthy(api), prefect.with_shipped_settings(env) | _database(database)
        )
        server.start()
        _fill(folder, store, engine, to_store.port)
        _deploy(folder, api)
        through = env | {
            "PREFECT_API_URL": f"http://127.0.0.1:{to_server.port}/api",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{to_store.port}",
        }
        worker = Service(
            [str(prefect.BIN / "prefect"), "worker", "start", "--pool", "gpu-process", "--name", "chaos"],
            logs / "worker",
            lambda: True,
            through | {"PREFECT_WORKER_QUERY_SECONDS": "1"},
        )
        worker.start()
        zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.zygote"],
            env=through,
            cwd=prefect.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(logs / "zygote").open("wb"),
        )
        assert zygote.stdout is not None
        assert zygote.stdout.readline() == b"ready\n", (logs / "zygote").read_text()
        yield World(folder, engine, server, gateway, worker, api, store, to_server, to_store, zygote, through)


def _database(url: str) -> dict[str, str]:
    """A dozen runs at once use more connections than Prefect's pool has by default."""
    name = "PREFECT_SERVER_DATABASE_"
    return {f"{name}CONNECTION_URL": url, f"{name}SQLALCHEMY_POOL_SIZE": "20", f"{name}SQLALCHEMY_MAX_OVERFLOW": "40"}


def _environment(folder: Path, engine: str, store: s3.S3Server) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "OASIS_", "AWS_"))}
    return {
        **inherited,
        **store.environment,
        "PREFECT_HOME": str(prefect.HOME),
        "PREFECT_API_URL": f"http://127.0.0.1:{prefect.PORT}/api",
        # As the shipped pools have it.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "DOCKER_HOST": engine,
        "OASIS_FLOWS_HOME": str(folder / "home"),
        "OASIS_FLOWS_STOP_GRACE": "1",
        "OASIS_FLOWS_RETRY_WINDOW": "6",
        "OASIS_FLOWS_BEGIN_WITHIN": str(PENDING_SECONDS),
    }


def _fill(folder: Path, store: s3.S3Server, engine: EngineService, port: int) -> None:
    """Save the documents, and put what they speak of where it belongs."""
    for bucket in (INPUTS, RESULTS):
        store.client().create_bucket(Bucket=bucket)
    inputs = store.store(INPUTS)
    engine.load(docker_archive(folder / "busybox.tar", TinyImage(tags=(IMAGE,))))
    other = TinyImage(layers=(busybox_layer(), layer({"opt/other": (0o644, b"another image")})))
    obstore.put(inputs, "image.tar", docker_archive(folder / "image.tar", other))
    keys = {**store.options, "endpoint_url": f"http://127.0.0.1:{port}"}
    through = DatasetStore(url=f"s3://{RESULTS}", **keys)
    through.save("objects")
    DatasetStore(url=str(folder / "local" / "results")).save("local")
    for name, source in SOURCES.items():
        for path, data in source.files.items():
            if source.where == "local":
                (folder / "local" / name / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / "local" / name / path).write_bytes(data)
            else:
                obstore.put(inputs, f"{name}/{'data/' if source.where == 'published' else ''}{path}", data)
        if source.where == "published":
            for path, content in _published(source.files).items():
                obstore.put(inputs, f"{name}/{path}", content)
        local = source.where == "local"
        url = str(folder / "local" / name) if local else f"s3://{INPUTS}/{name}"
        Dataset(url=url, store=None if local else through).save(name)
    for name, algorithm in ALGORITHMS.items():
        image = DockerImage(image_file=f"s3://{INPUTS}/image.tar") if algorithm.archived else DockerImage(image_id=IMAGE)
        Algorithm(docker_image=image, command=algorithm.command, parameters={TOKEN: None}, memory="256MiB").save(name)


def _published(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What stands beside the files of a published dataset."""
    rows = [
        {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in sorted(files.items())
    ]
    manifest = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    return {
        "log.txt": b"",
        "task.json": json.dumps({"oasis_flows": 1, "status": "Succeeded", "output": {"manifest_digest": digest}}).encode(),
        "manifest.jsonl": manifest.encode(),
    }


def _deploy(folder: Path, api: prefect.PrefectServer) -> None:
    template = json.loads((prefect.ROOT / "deployments/work-pools/gpu-process.json").read_text())
    template["variables"]["properties"]["command"]["default"] = f"{sys.executable} -m prefect.engine"
    (folder / "pool.json").write_text(json.dumps(template))
    pool = ("work-pool", "create", "gpu-process", "--type", "process", "--base-job-template", str(folder / "pool.json"))
    api.run("prefect", "--no-prompt", *pool)
    api.run("prefect", "--no-prompt", "deploy", "--all")
    shipped = yaml.safe_load((prefect.ROOT / "deployments/silent-runs.yaml").read_text())
    for waiting in shipped["automations"][1:]:
        waiting["trigger"]["within"] = PENDING_SECONDS
    (folder / "automations.yaml").write_text(yaml.safe_dump(shipped))
    api.run("prefect", "--no-prompt", "automation", "create", "--from-file", str(folder / "automations.yaml"))


def _replace(name: str, service: Service) -> None:
    """Kill the process of this name, which is the only one in these namespaces, and start the service in its place."""
    for path in Path("/proc").glob("[0-9]*/comm"):
        if path.read_text().strip() == name:
            os.kill(int(path.parent.name), signal.SIGKILL)
    service.start()


def _answers(endpoint: str) -> bool:
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _healthy(api: prefect.PrefectServer) -> bool:
    try:
        return bool(api.api("/health"))
    except (OSError, http.client.HTTPException):
        return False
