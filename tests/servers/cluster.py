"""A real cluster for tests: the one that `KUBECONFIG` names, whose node sees this machine's folders, such as one on this machine.

Each session has a namespace of its own there, with a claim on the folder of its temporary files.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from oasis_flows.engines import kube_image, pod as spec
from oasis_flows.engines.kube_access import find_access
from oasis_flows.engines.kube_api import KubeApi, Refused
from oasis_flows.engines.kubernetes import KubernetesEngine
from oasis_flows.job import ImageSource
from tests.images import TinyImage, busybox_layer, docker_archive, layer, module_image
from tests.servers.engine import containers_of
from tests.servers.registry import Registry

# A suite that is run on no cluster has no tests of it, rather than tests that are passed over.
HERE = ("kubernetes",) if os.environ.get("KUBECONFIG") else ()
# The same, with files carried to a claim that is not mounted.
CARRIED = ("carried",) if HERE else ()
CLAIM = "oasis-test"


@dataclass(frozen=True, eq=False)
class TestCluster:
    """The engine, the API, and what tests run in it."""

    __test__ = False

    engine: KubernetesEngine
    api: KubeApi
    namespace: str
    image: str
    home: Path
    settings: dict[str, str]
    claim: str = CLAIM

    def objects(self, kind: str, run_id: str) -> list[dict[str, Any]]:
        """A run's Jobs, pods or Secrets."""
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs" if kind == "jobs" else self.core(kind)
        found: list[dict[str, Any]] = self.api.call("GET", path, query={"labelSelector": f"{spec.RUN}={run_id}"})["items"]
        return found

    def left(self) -> list[str]:
        """Names of the Jobs, pods and Secrets that are there, and of folders of runs whose files were carried."""
        found = [f"carried/{path.name}" for path in self.home.glob("carried/*")]
        for path in (f"/apis/batch/v1/namespaces/{self.namespace}/jobs", *(self.core(kind) for kind in ("pods", "secrets"))):
            items = self.api.call("GET", path, query={"labelSelector": spec.SELECTOR})["items"]
            found += [f"{path.rpartition('/')[2]}/{item['metadata']['name']}" for item in items]
        return found

    def core(self, kind: str) -> str:
        """The path of the namespace's objects of a kind."""
        return f"/api/v1/namespaces/{self.namespace}/{kind}"


@cache
def carrier_of(cluster: TestCluster) -> str:
    """An image that carries files, where the cluster gets it."""
    archive = docker_archive(cluster.home / "carrier.tar", module_image("oasis_flows.engines.carrier"))
    return cluster.engine.prepare(ImageSource(image_file=str(archive)))


def carrying(cluster: TestCluster, home: Path, **changes: Any) -> KubernetesEngine:
    """An engine of the cluster whose home is not on the claim."""
    place = spec.Place(
        namespace=cluster.namespace, claim=cluster.claim, home=home, pending_seconds=120, carrier=carrier_of(cluster)
    )
    return KubernetesEngine(replace(place, **changes), patience_seconds=60)


@pytest.fixture(scope="session")
def cluster(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """The cluster of `KUBECONFIG`; fails where none answers."""
    with open_cluster(registry, tmp_path_factory.getbasetemp()) as found:
        yield found


@contextmanager
def open_cluster(registry: Registry, home: Path) -> Iterator[TestCluster]:
    """A namespace of its own on the cluster of `KUBECONFIG`, with a claim on the folder `home`, for the time of the block."""
    api = KubeApi(find_access())
    namespace = f"oasis-test-{uuid.uuid4().hex[:8]}"
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": namespace},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteMany"],
            "hostPath": {"path": str(home)},
            "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"namespace": namespace, "name": CLAIM},
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM, "namespace": namespace},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "volumeName": namespace,
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    api.call("POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    try:
        api.call("POST", "/api/v1/persistentvolumes", volume)
        api.call("POST", f"/api/v1/namespaces/{namespace}/persistentvolumeclaims", claim)
        place = spec.Place(namespace=namespace, claim=CLAIM, home=home, pending_seconds=120)
        repository = kube_image.Repository.parse(f"http://{registry.address}/algorithms")
        engine = KubernetesEngine(place, images=repository, patience_seconds=60)
        strange = {
            "opt/noexec": (0o644, b"#!/bin/sh\n"),
            "opt/elsewhere": (0o755, b"\x7fELF\x02\x01\x01\0garbage of another architecture\n"),
        }
        archive = docker_archive(home / "busybox.tar", TinyImage(layers=(busybox_layer(), layer(strange))))
        settings = {
            "OASIS_FLOWS_ENGINE": "kubernetes",
            "OASIS_FLOWS_HOME": str(home),
            "OASIS_FLOWS_KUBERNETES_NAMESPACE": namespace,
            "OASIS_FLOWS_KUBERNETES_CLAIM": CLAIM,
            "OASIS_FLOWS_KUBERNETES_REGISTRY": f"http://{registry.address}/algorithms",
            "OASIS_FLOWS_KUBERNETES_PENDING": "120",
        }
        image = engine.prepare(ImageSource(image_file=str(archive)))
        yield TestCluster(engine, api, namespace, image, home, settings)
    finally:
        for path in (f"/api/v1/namespaces/{namespace}", f"/api/v1/persistentvolumes/{namespace}"):
            with suppress(Refused):
                api.call("DELETE", path, {"propagationPolicy": "Background"})


@dataclass(frozen=True)
class Ground:
    """What a test's runs run on: the engine's name, the home of this process's runs, and an image that the engine has.

    `seen` is what the engine tells of a run's containers, as text, empty where there are none; Secrets are not told. `running` is
    the id of the algorithm's container while it runs, else empty. `patience` is how many seconds longer than the machine's own
    engine it may take to end one.
    """

    name: str
    home: Path
    image: str
    seen: Callable[[str], str]
    running: Callable[[str], str]
    patience: float = 0.0


@pytest.fixture(params=["docker", *HERE, *CARRIED])
def ground(request: pytest.FixtureRequest, here: Path, busybox: str, monkeypatch: pytest.MonkeyPatch) -> Ground:
    """The machine's engine; and the cluster, where there is one, with a home on its claim, and with one that is not."""
    if request.param == "docker":
        api = request.getfixturevalue("docker_api")

        def on_docker(run_id: str) -> str:
            return next((str(row["Id"]) for row in containers_of(api, run_id) if row["State"] == "running"), "")

        return Ground("docker", here, busybox, lambda run_id: _text(containers_of(api, run_id)), on_docker)
    cluster: TestCluster = request.getfixturevalue("cluster")
    for name, value in cluster.settings.items():
        monkeypatch.setenv(name, value)

    def seen(run_id: str) -> str:
        return _text([*cluster.objects("jobs", run_id), *cluster.objects("pods", run_id)])

    def running(run_id: str) -> str:
        pods = [pod for pod in cluster.objects("pods", run_id) if spec.CARRIER not in pod["metadata"]["labels"]]
        rows = [row for pod in pods for row in pod["status"].get("containerStatuses") or ()]
        return next((str(row["containerID"]) for row in rows if "running" in row["state"]), "")

    if request.param == "kubernetes":
        return Ground("kubernetes", cluster.home, cluster.image, seen, running, 60.0)
    monkeypatch.setenv("OASIS_FLOWS_HOME", str(here))
    monkeypatch.setenv("OASIS_FLOWS_KUBERNETES_CARRIER", carrier_of(cluster))
    return Ground("kubernetes", here, cluster.image, seen, running, 90.0)


def _text(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows) if rows else ""
