"""What a machine needs to run algorithms, what of it is there, and how to get the rest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings

from . import documents, store as stores
from .blocks import Algorithm, DatasetStore
from .errors import OasisError
from .job import human_bytes
from .machine import open_engine
from .plan import options_of
from .settings import Settings
from .store import Location

T = TypeVar("T")

POOLS = ("gpu-process", "gpu-docker", "gpu-kubernetes")


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. `missing` keeps algorithms from running here; `note` does not."""

    check: str
    status: Literal["ok", "note", "missing"]
    found: str
    remedy: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at everything, one thing after the other; nothing is changed."""
    for check in (_engine, _workspace, _server, _pool, _store):
        yield from check(settings)


def _engine(settings: Settings) -> Iterator[Finding]:
    try:
        facts = open_engine(settings).describe()
    except OasisError as error:
        remedy = "make demo installs one on Debian; or: apt-get install docker.io"
        if settings.engine == "kubernetes":
            remedy = "kubectl apply -k deployments/kubernetes; and see docs/how-to/run-on-kubernetes.md"
        yield Finding("engine", "missing", str(error), remedy)
        return
    yield Finding("engine", "ok", facts.name)
    if facts.not_enforced:
        yield Finding("engine", "missing", f"cannot limit {' and '.join(facts.not_enforced)}", facts.how_to_enforce)
    if not facts.system_calls_filtered:
        yield Finding(
            "engine",
            "note",
            "filters no system calls of algorithms (seccomp is off)",
            "start it with its own profile: remove seccomp-profile from /etc/docker/daemon.json",
        )
    if facts.gpu:
        yield Finding("gpu", "ok", facts.gpu)
    else:
        yield Finding(
            "gpu",
            "note",
            "none that the engine can hand out",
            "install the device plugin of the nodes' GPUs to run gpu algorithms"
            if settings.engine == "kubernetes"
            else "install the NVIDIA driver and nvidia-container-toolkit to run gpu algorithms",
        )
    here = settings.kubernetes
    if settings.engine == "kubernetes" and not (here.carrier or here.node or here.pod):
        yield Finding(
            "claim",
            "note",
            f"this runs outside of the cluster, and nothing tells whether {settings.home} is on the claim {here.claim}",
            "mount the claim there; where it cannot be, set OASIS_FLOWS_KUBERNETES_CARRIER to your image of flow runs",
        )
    if settings.engine == "kubernetes" and here.registry is None:
        yield Finding(
            "registry",
            "note",
            "none to push image files to",
            "set OASIS_FLOWS_KUBERNETES_REGISTRY to run algorithms from image files",
        )


def _workspace(settings: Settings) -> Iterator[Finding]:
    try:
        settings.workspaces.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(settings.workspaces).free
    except OSError as error:
        yield Finding(
            "workspace", "missing", f"{settings.workspaces}: {error.strerror}", "set OASIS_FLOWS_HOME to a folder you may write"
        )
        return
    yield Finding("workspace", "ok" if free > 1 << 30 else "note", f"{settings.workspaces}, {human_bytes(free)} free")


def _server(_: Settings) -> Iterator[Finding]:
    url = get_current_settings().api.url
    if url is None:
        yield Finding(
            "server",
            "note",
            "none; a temporary one is started for each command",
            "prefect server start, and set PREFECT_API_URL, for the UI",
        )
    known: list[str] | None = _attempt(lambda: documents.names(Algorithm))
    if url is not None:
        if _attempt(_answers):
            yield Finding("server", "ok", url)
        else:
            yield Finding("server", "missing", f"{url} does not answer", "prefect server start, or correct PREFECT_API_URL")
            return
    if known:
        yield Finding("documents", "ok", f"algorithms: {', '.join(known)}")
    else:
        yield Finding("documents", "note", "no algorithm is described", "oasis-flows apply blocks")


def _pool(_: Settings) -> Iterator[Finding]:
    if get_current_settings().api.url is None:
        return
    with get_client(sync_client=True) as client:
        pools = _attempt(lambda: [pool for pool in client.read_work_pools() if pool.name in POOLS])
    if pools:
        for pool in pools:
            ready = str(pool.status.value if pool.status else "").upper() == "READY"
            yield Finding(
                "pool",
                "ok" if ready else "note",
                f"{pool.name} ({'a worker is there' if ready else 'no worker'})",
                "" if ready else f"prefect worker start --pool {pool.name}",
            )
    elif pools is not None:
        yield Finding(
            "pool",
            "note",
            "none of ours; only `oasis-flows run` and Python calls work",
            "prefect work-pool create gpu-process --type process --base-job-template deployments/work-pools/gpu-process.json",
        )


def _store(settings: Settings) -> Iterator[Finding]:
    store = _attempt(lambda: documents.find(DatasetStore, "default"))
    place = Location(store.url if store else str(settings.datasets), options_of(store))
    try:
        stores.check_writable(place)
    except OasisError as error:
        yield Finding(
            "store", "missing", str(error), "correct the dataset-store document `default`, or the rights of the folder"
        )
    else:
        yield Finding("store", "ok", place.url + ("" if store else " (no dataset-store document named default)"))


def _answers() -> bool:
    with get_client(sync_client=True) as client:
        return client.hello().status_code == 200


def _attempt(ask: Callable[[], T]) -> T | None:
    try:
        return ask()
    except Exception:  # noqa: BLE001  # an examination goes on, whatever one question meets
        return None
