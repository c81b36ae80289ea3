"""Flow runs as pods of Prefect's Kubernetes worker, all of it from what is shipped: manifests, rights, pool, and the runner's image.

Collected only where KUBECONFIG names a cluster: see `tests/conftest.py`. The cluster must have no namespace `oasis-flows`, its node must be
this machine, and its pods must reach the API server and this machine. `FLOW_RUNNER` names an image file that was built by the Dockerfile;
without it the image is one of this environment's own packages, and the Dockerfile is not proven. Nor are flow runs on several nodes, and a
storage class.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from oasis_flows.blocks import Algorithm, Dataset, DockerImage
from oasis_flows.engines import pod as spec
from oasis_flows.engines.kube_api import Refused
from oasis_flows.job import ImageSource
from tests.images import docker_archive, flow_runner_image
from tests.servers.cluster import TestCluster
from tests.servers.engine import eventually
from tests.servers.faultproxy import between
from tests.servers.prefect import ROOT, PrefectServer, begin, deploy_to

NAMESPACE = "oasis-flows"
MOUNTED = Path("/var/lib/oasis-flows")
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


def kubectl(*words: str, stdin: str | None = None) -> str:
    done = subprocess.run(["kubectl", *words], input=stdin, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """The shipped manifests, applied, with a worker that runs. `folders` are those of the claims, by their names."""

    server: PrefectServer
    cluster: TestCluster
    deployment: str
    folders: dict[str, Path]

    def begin(self, algorithm: str, **job_variables: str) -> str:
        """Have the worker run it on the letters; return the run's id."""
        return begin(self.server, algorithm, "letters-in-claim", self.deployment, **job_variables)

    def rows(self, path: str, selector: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.cluster.api.call("GET", path, query={"labelSelector": selector})["items"]
        return found

    def flow_pod(self, run_id: str) -> dict[str, Any]:
        """The pod of a flow run, once there is one."""
        selector = f"prefect.io/flow-run-id={run_id}"
        eventually(lambda: self.rows(PODS, selector), 120)
        return self.rows(PODS, selector)[0]

    def algorithm_pod(self, run_id: str) -> dict[str, Any]:
        """The pod of the run's algorithm, once it runs."""
        selector = f"{spec.RUN}={run_id}"
        eventually(lambda: [row for row in self.rows(PODS, selector) if row["status"]["phase"] == "Running"], 240)
        return self.rows(PODS, selector)[0]

    def left(self, run_id: str) -> list[str]:
        """What there is of a run's algorithm."""
        return [row["metadata"]["name"] for path in (JOBS, PODS) for row in self.rows(path, f"{spec.RUN}={run_id}")]

    def log(self) -> str:
        return kubectl("-n", NAMESPACE, "logs", "deployment/oasis-flows-worker", "--tail=-1")

    def job(self, command: str) -> str:
        """Have a command of ours run as the how-to has it done, in a pod of the shipped CronJob's kind; what it said."""
        name = f"{command}-{uuid.uuid4().hex[:8]}"
        like = ("create", "job", name, "--from=cronjob/oasis-flows-reap", "--dry-run=client", "-o", "yaml")
        kubectl("apply", "-f", "-", stdin=kubectl("-n", NAMESPACE, *like).replace("- reap\n", f"- {command}\n"))

        def conditions() -> list[str]:
            time.sleep(0.5)
            found = self.cluster.api.call("GET", f"{JOBS}/{name}")["status"].get("conditions") or ()
            return [row["type"] for row in found if row["status"] == "True" and row["type"] in ("Complete", "Failed")]

        eventually(conditions, 240)
        said = kubectl("-n", NAMESPACE, "logs", f"job/{name}")
        assert conditions() == ["Complete"], said
        return said

    def here(self, url: str, claim: str = "oasis-flows-workspace") -> Path:
        """Where a folder of a claim is on this machine."""
        return self.folders[claim] / Path(url).relative_to(MOUNTED)


def apply(cluster: TestCluster, folder: Path, runner: str) -> dict[str, Path]:
    """Apply what is shipped, as the how-to says, with our own image, and claims of both kinds on folders of this machine."""
    shutil.copytree(ROOT / "deployments/kubernetes", folder / "shipped")
    name, _, digest = runner.partition("@")
    folders = {}
    claims = []
    for claim, mode in (("oasis-flows-workspace", "ReadWriteOnce"), ("shared-workspace", "ReadWriteMany")):
        folders[claim] = folder / claim
        folders[claim].mkdir()
        folders[claim].chmod(0o777)
        bound = {"accessModes": [mode], "storageClassName": "", "volumeName": f"{cluster.namespace}-{mode.lower()}"}
        volume = {
            "capacity": {"storage": "100Gi"},
            "accessModes": [mode],
            "hostPath": {"path": str(folders[claim])},
            "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"namespace": NAMESPACE, "name": claim},
        }
        metadata = {"name": bound["volumeName"]}
        cluster.api.call(
            "POST",
            "/api/v1/persistentvolumes",
            {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata, "spec": volume},
        )
        claims.append(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": claim, "namespace": NAMESPACE},
                "spec": {**bound, "resources": {"requests": {"storage": "100Gi"}}},
            }
        )
    (folder / "shared.yaml").write_text(yaml.safe_dump(claims[1]))
    ours = {
        "resources": ["shipped", "shared.yaml"],
        "images": [{"name": "oasis-flows/flow-runner", "newName": name, "digest": digest}],
        "patches": [{"patch": yaml.safe_dump(claims[0])}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(ours))
    kubectl("apply", "-k", str(folder))
    return folders


@pytest.fixture(scope="module")
def installed(deployed: PrefectServer, cluster: TestCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    folder = tmp_path_factory.mktemp("installed")
    with pytest.raises(Refused, match="not found"):
        cluster.api.call("GET", f"/api/v1/namespaces/{NAMESPACE}")
    built = os.environ.get("FLOW_RUNNER") or docker_archive(cluster.home / "runner.tar", flow_runner_image())
    runner = cluster.engine.prepare(ImageSource(image_file=str(built)))
    (node,) = (row for row in cluster.api.call("GET", "/api/v1/nodes")["items"] if not row["spec"].get("unschedulable"))
    (address,) = (row["address"] for row in node["status"]["addresses"] if row["type"] == "InternalIP")
    with ExitStack() as stack:
        server = stack.enter_context(between(deployed.port, address))
        stack.callback(remove, cluster)
        folders = apply(cluster, folder, runner)
        url = f"http://{address}:{server.port}/api"
        kubectl("-n", NAMESPACE, "create", "configmap", "oasis-flows-server", f"--from-literal=url={url}")
        deployment = deploy_to(deployed, "gpu-kubernetes", image=runner)
        for each in folders.values():
            (each / "letters").mkdir()
            (each / "letters" / "a.txt").write_text("a")
        Dataset(url=str(MOUNTED / "letters")).save("letters-in-claim", overwrite=True)
        image = DockerImage(image_id=cluster.image)
        scripts = {
            "copies": "cp input/a.txt output; echo copied",
            "fails": "echo alas; exit 3",
            "lasts": "echo half > output/half; echo began; sleep 600",
        }
        for name, script in scripts.items():
            Algorithm(docker_image=image, command=["sh", "-c", script], cpus=0.1, memory="64MiB").save(
                f"in-pod-{name}", overwrite=True
            )
        kubectl("-n", NAMESPACE, "rollout", "status", "deployment/oasis-flows-worker", "--timeout=100s")
        yield Installed(deployed, cluster, deployment, folders)


def remove(cluster: TestCluster) -> None:
    """What was applied: nothing else of the cluster has these names."""
    rights = "clusterrole/oasis-flows-capacity", "clusterrolebinding/oasis-flows-capacity"
    volumes = [f"persistentvolume/{cluster.namespace}-{mode}" for mode in ("readwriteonce", "readwritemany")]
    kubectl("delete", "--ignore-not-found", "--wait=false", f"namespace/{NAMESPACE}", *rights, *volumes)
    path = f"/api/v1/namespaces/{NAMESPACE}"

    def gone() -> bool:
        time.sleep(1)
        try:
            cluster.api.call("GET", path)
        except Refused:
            return True
        return False

    eventually(gone, 120)


@pytest.mark.parametrize("claim", ["oasis-flows-workspace", "shared-workspace"])
def test_a_flow_run_is_a_pod_that_makes_one_job_and_leaves_a_dataset(installed: Installed, claim: str) -> None:
    run_id = installed.begin("in-pod-copies", workspace_claim=claim)
    flow = installed.flow_pod(run_id)
    run = installed.server.wait_for(run_id, "COMPLETED", "FAILED", "CRASHED", seconds=300)

    assert run["state_type"] == "COMPLETED", (run["state"], installed.log())
    output = installed.here(run["labels"]["oasis.output"], claim)
    assert (output / "data" / "a.txt").read_text() == "a"
    assert (output / "log.txt").read_text() == "copied\n"
    assert (output / "manifest.jsonl").exists()
    force = json.loads((output / "task.json").read_text())["sandbox"]["in_force"]
    assert (force["user"], force["network"], force["service_account_token"]) == ("1000:1000", "none", False)
    assert {mount["source"].partition("/")[0] for mount in force["mounts"]} == {claim}
    assert installed.left(run_id) == []
    assert not (installed.folders[claim] / "workspaces" / run_id).exists()
    # A GPU is never held while bytes are copied; and no pod of ours but the flow run's has a way to the API server.
    (container,) = flow["spec"]["containers"]
    assert not any("gpu" in name for kind in container["resources"].values() for name in kind)
    assert flow["spec"]["serviceAccountName"] == "oasis-flows-runner"


def test_a_failure_has_its_verdict(installed: Installed) -> None:
    run_id = installed.begin("in-pod-fails")
    run = installed.server.wait_for(run_id, "COMPLETED", "FAILED", "CRASHED", seconds=300)

    assert (run["state_type"], "failed:exit_nonzero" in run["tags"]) == ("FAILED", True), (run["state"], installed.log())
    assert "ended with exit code 3" in run["state"]["message"]
    assert installed.left(run_id) == []


def test_a_cancelled_run_leaves_nothing(installed: Installed) -> None:
    run_id = installed.begin("in-pod-lasts")
    made = installed.algorithm_pod(run_id)
    (job,) = installed.rows(JOBS, f"{spec.RUN}={run_id}")
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("Pod", installed.flow_pod(run_id)["metadata"]["uid"])
    assert made["spec"]["nodeName"] == installed.flow_pod(run_id)["spec"]["nodeName"]
    installed.server.run("prefect", "flow-run", "cancel", run_id)

    run = installed.server.wait_for(run_id, "CANCELLED", "COMPLETED", "FAILED", "CRASHED", seconds=120)
    assert run["state_type"] == "CANCELLED", run["state"]
    eventually(lambda: installed.left(run_id) == [], 60)
    eventually(lambda: not (installed.folders["oasis-flows-workspace"] / "workspaces" / run_id).exists(), 60)


def test_a_flow_pod_that_somebody_deletes_is_made_anew_and_its_run_goes_on(installed: Installed) -> None:
    """Prefect's worker has a run whose pod gets SIGTERM scheduled again, as with a drain."""
    run_id = installed.begin("in-pod-lasts")
    first = installed.algorithm_pod(run_id)["metadata"]["name"]
    flow = installed.flow_pod(run_id)["metadata"]["name"]
    kubectl("-n", NAMESPACE, "delete", "pod", flow, "--grace-period=0", "--force", "--wait=false")

    eventually(lambda: first not in installed.left(run_id), 120)
    again = installed.algorithm_pod(run_id)["metadata"]
    assert again["annotations"][spec.ATTEMPT] == "2"
    installed.server.run("prefect", "flow-run", "cancel", run_id)
    run = installed.server.wait_for(run_id, "CANCELLED", "COMPLETED", "FAILED", "CRASHED", seconds=120)
    assert run["state_type"] == "CANCELLED", (run["state"], installed.log())
    eventually(lambda: installed.left(run_id) == [], 60)


@pytest.mark.parametrize("command", ["reap", "doctor"])
def test_the_shipped_job_reaps_and_looks(installed: Installed, command: str) -> None:
    said = installed.job(command)
    if command == "doctor":
        assert "mounted here at /var/lib/oasis-flows; algorithms run beside this process on" in said
        assert "missing" not in said


def test_the_worker_was_refused_nothing(installed: Installed) -> None:
    assert [line for line in installed.log().splitlines() if "forbidden" in line.lower()] == []
