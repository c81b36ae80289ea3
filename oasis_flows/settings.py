"""What a machine decides, not a run: read from the environment, in one place.

`OASIS_FLOWS_ENGINE`        which engine runs containers, docker or kubernetes; the work pool sets it ("docker")
`OASIS_FLOWS_DOCKER_HOST`   name of a `docker-host` document with the engine's address, instead of the usual sockets
`OASIS_FLOWS_HOME`          folder of workspaces and of datasets published without a store ("~/.oasis-flows"); the engine
                            must see it under the same path
`OASIS_FLOWS_STOP_GRACE`    seconds between SIGTERM and SIGKILL for a container that has to end (10)
`OASIS_FLOWS_RETRY_WINDOW`  seconds that the container of a run whose process died waits for a retry to take it up (60)
`OASIS_FLOWS_MARKETPLACES`  where `marketplace://` looks, in order: folders, URLs, and `prefect` for the server ("prefect")
`OASIS_FLOWS_STORAGES`      what storages of prerequisites are here: a file, or YAML or JSON itself (see `storages`)
`OASIS_FLOWS_TRUSTED_STATIONS`  public keys of stations whose records of trains are believed: a file, or YAML or JSON itself,
                            that maps a station's name to its key or a list of keys (none)
`OASIS_FLOWS_MAX_HOLD`      seconds that the callbacks after an algorithm may take, such as one for debugging (3600)
`OASIS_FLOWS_HEADROOM`      the part of a machine's processors and memory that batches may fill (0.8)
`OASIS_FLOWS_CAPACITY`      file with a snapshot of the machines that batches run on, in place of the engine's own answer
`OASIS_FLOWS_KEEP_HOURS`    how long the workspace of a run that may be retried is kept (24)

and for the engine kubernetes:

`OASIS_FLOWS_KUBERNETES_CREDENTIALS`   name of a `kubernetes-credentials` document, in place of KUBECONFIG or the pod's cluster
`OASIS_FLOWS_KUBERNETES_NAMESPACE`     where Jobs are made (that of the credentials)
`OASIS_FLOWS_KUBERNETES_CLAIM`         the claim whose files are in `OASIS_FLOWS_HOME` ("oasis-flows-workspace")
`OASIS_FLOWS_KUBERNETES_CARRIER`       image of flow runs, for a process that cannot mount the claim: its Jobs carry files there
`OASIS_FLOWS_KUBERNETES_REGISTRY`      repository that image files are pushed to
`OASIS_FLOWS_KUBERNETES_REGISTRY_CREDENTIALS`  name of a `docker-registry-credentials` document that may push there
`OASIS_FLOWS_KUBERNETES_GPU`           how GPUs are asked for: resource, nodeSelector and tolerations, as YAML or a file's path
`OASIS_FLOWS_KUBERNETES_EPHEMERAL_STORAGE`  what a container may write on its node's disk, its log included ("1GiB")
`OASIS_FLOWS_KUBERNETES_PENDING`       seconds that an algorithm may wait for its start (3600)
`OASIS_FLOWS_KUBERNETES_GROWS`         "true" where nodes are made when they are needed: then no algorithm is too large

A pod tells by `OASIS_FLOWS_POD_NAME`, `OASIS_FLOWS_POD_UID` and `OASIS_FLOWS_NODE_NAME` which one it is, and where.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import DescriptionError
from .job import parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesSettings:
    """What the Kubernetes engine has to know. `namespace` is empty where the access to the cluster says it."""

    credentials: str | None = None
    namespace: str = ""
    claim: str = "oasis-flows-workspace"
    carrier: str = ""
    registry: str | None = None
    registry_credentials: str | None = None
    gpu: Mapping[str, Any] = field(default_factory=dict)
    ephemeral_bytes: int = 1 << 30
    pending_seconds: float = 3600
    grows: bool = False
    pod: tuple[str, str] | None = None
    node: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of this machine."""

    engine: str
    docker_host: str | None
    home: Path
    stop_grace_seconds: float
    retry_window_seconds: float
    keep_seconds: float
    keep_caches_seconds: float
    begin_seconds: float
    headroom: float
    capacity: Path | None
    marketplaces: tuple[str, ...] = ("prefect",)
    storages: Mapping[str, Any] = field(default_factory=dict)
    hold_seconds: float = 3600
    trusted_stations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kubernetes: KubernetesSettings = field(default_factory=KubernetesSettings)

    @property
    def workspaces(self) -> Path:
        """Where runs have their folders."""
        return self.home / "workspaces"

    @property
    def specifications(self) -> Path:
        """Where prerequisites that were fetched are kept, each under its SHA-256."""
        return self.home / "prerequisites"

    @property
    def caches(self) -> Path:
        """What prerequisites keep for the next run."""
        return self.home / "caches"

    @property
    def keys(self) -> Path:
        """The private keys of this machine's stations."""
        return self.home / "keys"

    @property
    def trains(self) -> Path:
        """What is kept of trains: the records of their visits, and which generation of the Train API they speak."""
        return self.home / "trains"

    @property
    def datasets(self) -> Path:
        """The store of those who named none."""
        return self.home / "datasets"


def current() -> Settings:
    """The settings as the environment has them now.

    Raises:
        DescriptionError: a number is none, or the table of storages cannot be read.
    """
    env = os.environ.get
    return Settings(
        engine=env("OASIS_FLOWS_ENGINE") or "docker",
        docker_host=env("OASIS_FLOWS_DOCKER_HOST") or None,
        home=Path(env("OASIS_FLOWS_HOME") or "~/.oasis-flows").expanduser().absolute(),
        stop_grace_seconds=_seconds("OASIS_FLOWS_STOP_GRACE", "10"),
        retry_window_seconds=_seconds("OASIS_FLOWS_RETRY_WINDOW", "60"),
        keep_seconds=3600 * _seconds("OASIS_FLOWS_KEEP_HOURS", "24"),
        keep_caches_seconds=3600 * _seconds("OASIS_FLOWS_KEEP_CACHES_HOURS", "720"),
        begin_seconds=_seconds("OASIS_FLOWS_BEGIN_WITHIN", "3600"),
        marketplaces=tuple(re.split(r"[\s,]+", (env("OASIS_FLOWS_MARKETPLACES") or "prefect").strip(" ,"))),
        storages=_table("OASIS_FLOWS_STORAGES"),
        trusted_stations=_keys("OASIS_FLOWS_TRUSTED_STATIONS"),
        hold_seconds=_seconds("OASIS_FLOWS_MAX_HOLD", "3600"),
        headroom=_part("OASIS_FLOWS_HEADROOM", "0.8"),
        capacity=Path(env("OASIS_FLOWS_CAPACITY") or "").expanduser() if env("OASIS_FLOWS_CAPACITY") else None,
        kubernetes=_kubernetes(),
    )


def _kubernetes() -> KubernetesSettings:
    env = os.environ.get
    name, uid = env("OASIS_FLOWS_POD_NAME"), env("OASIS_FLOWS_POD_UID")
    return KubernetesSettings(
        credentials=env("OASIS_FLOWS_KUBERNETES_CREDENTIALS") or None,
        namespace=env("OASIS_FLOWS_KUBERNETES_NAMESPACE") or "",
        claim=env("OASIS_FLOWS_KUBERNETES_CLAIM") or "oasis-flows-workspace",
        carrier=env("OASIS_FLOWS_KUBERNETES_CARRIER") or "",
        registry=env("OASIS_FLOWS_KUBERNETES_REGISTRY") or None,
        registry_credentials=env("OASIS_FLOWS_KUBERNETES_REGISTRY_CREDENTIALS") or None,
        gpu=_gpu("OASIS_FLOWS_KUBERNETES_GPU"),
        ephemeral_bytes=parse_bytes(env("OASIS_FLOWS_KUBERNETES_EPHEMERAL_STORAGE") or "1GiB"),
        pending_seconds=_seconds("OASIS_FLOWS_KUBERNETES_PENDING", "3600"),
        grows=(env("OASIS_FLOWS_KUBERNETES_GROWS") or "").lower() in ("true", "1", "yes"),
        pod=(name, uid) if name and uid else None,
        node=env("OASIS_FLOWS_NODE_NAME") or "",
    )


def _gpu(name: str) -> Mapping[str, Any]:
    found = _written(name)
    kinds = {"resource": str, "nodeSelector": dict, "tolerations": list}
    if found is None:
        return {}
    if not isinstance(found, dict) or any(
        key not in kinds or not isinstance(value, kinds[key]) for key, value in found.items()
    ):
        raise DescriptionError(
            f"The setting {name} makes no sense. Write what pods with GPUs need, such as "
            '{"resource": "nvidia.com/gpu", "nodeSelector": {"gpu": "a100"}, "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]}.'
        )
    return found


def _written(name: str) -> Any:
    """What a setting holds that is YAML or JSON itself, or the path of a file with it."""
    text = (os.environ.get(name) or "").strip()
    try:
        return yaml.safe_load(text if not text or "{" in text or "\n" in text else Path(text).expanduser().read_text())
    except (OSError, yaml.YAMLError) as error:
        raise DescriptionError(
            f"The setting {name} cannot be read. Give the path of a YAML file, or JSON. The cause: {type(error).__name__}: {error}"
        ) from error


def _keys(name: str) -> Mapping[str, tuple[str, ...]]:
    found = _written(name)
    rows = (
        {key: (value,) if isinstance(value, str) else value for key, value in found.items()} if isinstance(found, dict) else {}
    )
    wrong = found is not None and not isinstance(found, dict)
    if wrong or any(not isinstance(row, tuple | list) or not all(isinstance(key, str) for key in row) for row in rows.values()):
        raise DescriptionError(f'The setting {name} holds no keys of stations. Write {{"hospital-a": "its public key"}}.')
    return {str(station): tuple(row) for station, row in rows.items()}


def _table(name: str) -> Mapping[str, Any]:
    found = _written(name)
    if found is not None and not (isinstance(found, dict) and all(isinstance(rows, dict) for rows in found.values())):
        raise DescriptionError(
            f"The setting {name} holds no table. Write engines, and their storages below: "
            '{"docker": {"datasets": {"path": "/srv/datasets"}}}.'
        )
    return found or {}


def _seconds(name: str, default: str) -> float:
    text = os.environ.get(name) or default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise DescriptionError(f"The setting {name} is {text!r} and must be a number that is not negative, such as {default}.")
    return value


def _part(name: str, default: str) -> float:
    value = _seconds(name, default)
    if not 0 < value <= 1:
        raise DescriptionError(f"The setting {name} is {value:g} and must be more than 0 and at most 1, such as {default}.")
    return value
