"""A real situation for each way to fail: the same code, sentence, evidence and advice in state, artifact, record and command."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect_docker.credentials import DockerRegistryCredentials

from oasis_flows import machine, tasks
from oasis_flows.__main__ import main
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.engines import pod
from oasis_flows.engines.kube_api import Refused
from oasis_flows.job import ImageSource
from oasis_flows.reaper import LABEL_OUTPUT
from oasis_flows.verdict import Verdict
from tests.images import TinyImage, docker_archive
from tests.servers.cluster import CARRIED, HERE, Ground, TestCluster
from tests.servers.engine import eventually
from tests.servers.registry import free_port


@dataclass(frozen=True)
class Surroundings:
    """What a situation is made of. `folder` is the test's own."""

    folder: Path
    ground: Ground
    request: pytest.FixtureRequest
    stack: ExitStack
    monkeypatch: pytest.MonkeyPatch

    @property
    def cluster(self) -> TestCluster:
        found: TestCluster = self.request.getfixturevalue("cluster")
        return found

    def mount(self, path: Path, *options: str) -> Path:
        """A file system of its own at a folder, until the test ends."""
        path.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", path], check=True)
        self.stack.callback(subprocess.run, ["umount", "-l", path], check=True)
        return path


Make = Callable[[Surroundings], dict[str, Any]]
EITHER, EVERYWHERE = ("docker", "kubernetes"), ("docker", "kubernetes", "carried")


@dataclass(frozen=True)
class Situation:
    """A way to fail. `exit` is the command's exit code, `says` words of the sentence, `does` words of the advice.

    `on` is where it fails so: on the machine's engine, on a cluster, and on one to which files are carried.
    """

    code: str
    stage: str
    blame: str
    says: str
    does: str
    exit: int = 1
    script: str = "true"
    algorithm: dict[str, Any] = field(default_factory=dict)
    make: Make = lambda _: {}
    on: tuple[str, ...] = EITHER


def shell(
    code: str, blame: str, says: str, does: str, script: str, on: tuple[str, ...] = EVERYWHERE, **algorithm: Any
) -> Situation:
    """A container that fails."""
    return Situation(code, "run_container", blame, says, does, script=script, algorithm=algorithm, on=on)


def image(code: str, blame: str, says: str, does: str, exit: int, make: Make, on: tuple[str, ...] = EITHER) -> Situation:
    """An image that cannot be had."""
    return Situation(code, "prepare_image", blame, says, does, exit, make=make, on=on)


def data(code: str, blame: str, says: str, does: str, exit: int, make: Make) -> Situation:
    """An input that cannot be read, or a store that cannot be written."""
    return Situation(code, "stage_input", blame, says, does, exit, make=make)


def cluster(code: str, blame: str, says: str, does: str, exit: int, make: Make, **more: Any) -> Situation:
    """What a cluster does not start, or ends."""
    return Situation(code, "run_container", blame, says, does, exit, make=make, on=("kubernetes",), **more)


def not_in_the_registry(here: Surroundings) -> dict[str, Any]:
    registry = here.request.getfixturevalue("registry")
    return {"docker_image": DockerImage(image_id=f"{registry.address}/no-such-image:1")}


def private_image(here: Surroundings) -> tuple[str, str]:
    """The name of an image in a registry that wants a login, and the registry's."""
    private, api = here.request.getfixturevalue("private_registry"), here.request.getfixturevalue("docker_api")
    return private.push(api, here.request.getfixturevalue("busybox"), f"secret-{secrets.token_hex(4)}"), private.address


def wrong_password(here: Surroundings) -> dict[str, Any]:
    reference, registry = private_image(here)
    login = DockerRegistryCredentials(username="tester", password="wrong", registry_url=registry)
    return {"docker_image": DockerImage(image_id=reference, registry_credentials=login)}


def no_password(here: Surroundings) -> dict[str, Any]:
    return {"docker_image": DockerImage(image_id=private_image(here)[0])}


def registry_away(here: Surroundings) -> dict[str, Any]:
    here.monkeypatch.setenv("OASIS_FLOWS_KUBERNETES_PENDING", "4")
    return {"docker_image": DockerImage(image_id=f"127.0.0.1:{free_port()}/x:1")}


def broken_archive(here: Surroundings) -> dict[str, Any]:
    whole = docker_archive(here.folder / "whole.tar", TinyImage())
    (here.folder / "cut.tar").write_bytes(whole.read_bytes()[:500_000])
    return {"docker_image": DockerImage(image_file=str(here.folder / "cut.tar"))}


def two_images(here: Surroundings) -> dict[str, Any]:
    both = TinyImage(tags=("one:1",)), TinyImage(tags=("two:1",), config={"Cmd": ["true"]})
    return {"docker_image": DockerImage(image_file=str(docker_archive(here.folder / "both.tar", *both)))}


def other_machine(here: Surroundings) -> dict[str, Any]:
    archive = docker_archive(here.folder / "arm.tar", TinyImage(architecture="arm64"))
    return {"docker_image": DockerImage(image_file=str(archive))}


def only_for_others(here: Surroundings) -> dict[str, Any]:
    """An image that a registry has for other machines alone, as such images are published: by an index."""
    archive = docker_archive(here.folder / "arm.tar", TinyImage(architecture="arm64"))
    name, _, digest = here.cluster.engine.prepare(ImageSource(image_file=str(archive))).partition("@")
    registry, _, path = name.partition("/")
    oci, at = "application/vnd.oci.image", f"http://{registry}/v2/{path}/manifests"
    wanted = urllib.request.Request(f"{at}/{digest}", headers={"Accept": f"{oci}.manifest.v1+json"})
    with urllib.request.urlopen(wanted, timeout=30) as answer:
        row = {"mediaType": f"{oci}.manifest.v1+json", "digest": digest, "size": len(answer.read())}
    rows = [row | {"platform": {"architecture": "arm64", "os": "linux"}}]
    index = json.dumps({"schemaVersion": 2, "mediaType": f"{oci}.index.v1+json", "manifests": rows}).encode()
    kind = {"Content-Type": f"{oci}.index.v1+json"}
    urllib.request.urlopen(urllib.request.Request(f"{at}/arm-only", index, kind, method="PUT"), timeout=30).close()
    return {"docker_image": DockerImage(image_id=f"{name}:arm-only")}


def no_engine(here: Surroundings) -> dict[str, Any]:
    here.monkeypatch.setenv("DOCKER_HOST", f"unix://{here.folder}/no-engine.sock")
    return {}


def no_gpu(here: Surroundings) -> dict[str, Any]:
    """A cluster may have GPUs; none of its nodes has such."""
    here.monkeypatch.setenv("OASIS_FLOWS_KUBERNETES_GPU", "{resource: example.org/gpu}")
    return {}


def required(here: Surroundings, text: str) -> dict[str, Any]:
    """An algorithm that requires a prerequisite of this specification."""
    (here.folder / "required.yaml").write_text(text)
    return {"prerequisites": [f"file://{here.folder}/required.yaml"]}


def failing_prerequisite(here: Surroundings) -> dict[str, Any]:
    return required(here, "name: get\ncallbacks: [{event: taskStarts, commands: ['exit 4']}]")


def prerequisite_without_its_variable(here: Surroundings) -> dict[str, Any]:
    return required(here, "name: get\ntemplate_variables: [{name: dataPath}]")


def marketplace_away(here: Surroundings) -> dict[str, Any]:
    return {"prerequisites": [f"http://127.0.0.1:{free_port()}/x.yaml"]}


def no_input(here: Surroundings) -> dict[str, Any]:
    return {"dataset": Dataset(url=str(here.folder / "gone"))}


def no_files(here: Surroundings) -> dict[str, Any]:
    (here.folder / "empty").mkdir()
    return {"dataset": Dataset(url=str(here.folder / "empty"))}


def s3_store(here: Surroundings, bucket: str, **changes: str) -> DatasetStore:
    server = here.request.getfixturevalue("s3")
    values = {"access_key_id": server.access_key, "secret_access_key": server.secret_key, **changes}
    return DatasetStore(url=f"s3://{bucket}/x", endpoint_url=server.endpoint, region="us-east-1", **values)


def wrong_keys(here: Surroundings) -> dict[str, Any]:
    return {"store": s3_store(here, "anything", secret_access_key="not the key")}


def no_bucket(here: Surroundings) -> dict[str, Any]:
    return {"store": s3_store(here, f"no-such-{secrets.token_hex(4)}")}


def store_away(here: Surroundings) -> dict[str, Any]:
    here.monkeypatch.setattr("oasis_flows.store.objects.GIVE_UP_SECONDS", 1.0, raising=False)
    return {
        "store": DatasetStore(
            url="s3://b/x", endpoint_url=f"http://127.0.0.1:{free_port()}", access_key_id="a", secret_access_key="b"
        )
    }


def full_store(here: Surroundings) -> dict[str, Any]:
    return {"store": DatasetStore(url=str(here.mount(here.folder / "store", "size=1m")))}


def read_only_store(here: Surroundings) -> dict[str, Any]:
    return {"store": DatasetStore(url=str(here.mount(here.folder / "store", "ro", "size=1m")))}


def small_disk(here: Surroundings) -> dict[str, Any]:
    here.mount(here.ground.home / "workspaces", "size=8m")
    return {"store": DatasetStore(url=str(here.folder / "elsewhere"))}


def setting(name: str, value: str) -> Make:
    """With a setting of the machine."""

    def make(here: Surroundings) -> dict[str, Any]:
        here.monkeypatch.setenv(f"OASIS_FLOWS_KUBERNETES_{name}", value)
        return {}

    return make


def no_repository(here: Surroundings) -> dict[str, Any]:
    here.monkeypatch.delenv("OASIS_FLOWS_KUBERNETES_REGISTRY")
    return {"docker_image": DockerImage(image_file=str(docker_archive(here.folder / "whole.tar", TinyImage())))}


def access(here: Surroundings, *, server: str | None = None, token: str | None = None) -> dict[str, Any]:
    """The cluster's access with another server or login, for a process that has not asked it yet."""
    config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    (context,) = (row["context"] for row in config["contexts"] if row["name"] == config["current-context"])
    for row in config["clusters"]:
        row["cluster"] |= {"server": server} if server and row["name"] == context["cluster"] else {}
    for row in config["users"]:
        row["user"] = {"token": token} if token and row["name"] == context["user"] else row["user"]
    (here.folder / "kubeconfig").write_text(yaml.safe_dump(config))
    here.monkeypatch.setenv("KUBECONFIG", str(here.folder / "kubeconfig"))
    here.monkeypatch.setattr(machine, "_kubernetes_engines", {})
    return {}


def cluster_away(here: Surroundings) -> dict[str, Any]:
    return access(here, server=f"https://127.0.0.1:{free_port()}")


def unknown_to_the_cluster(here: Surroundings) -> dict[str, Any]:
    return access(here, token="nobody's")


def without_rights(here: Surroundings) -> dict[str, Any]:
    wanted = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    path = here.cluster.core("serviceaccounts/default")
    return access(here, token=here.cluster.api.call("POST", f"{path}/token", wanted)["status"]["token"])


def quota(resource: str, amount: str) -> Make:
    """In a namespace that may have so much, until the test ends."""

    def make(here: Surroundings) -> dict[str, Any]:
        path, call = here.cluster.core("resourcequotas"), here.cluster.api.call
        spec = {"hard": {resource: amount}}
        call("POST", path, {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "failure"}, "spec": spec})
        here.stack.callback(call, "DELETE", f"{path}/failure")
        # Nothing is held to a quota before its controller has seen it.
        eventually(lambda: call("GET", f"{path}/failure").get("status", {}).get("hard") == spec["hard"], 30)
        return {}

    return make


def unbound_claim(here: Surroundings) -> dict[str, Any]:
    path, call = here.cluster.core("persistentvolumeclaims"), here.cluster.api.call
    size = {"accessModes": ["ReadWriteMany"], "storageClassName": "", "resources": {"requests": {"storage": "1Ei"}}}
    call("POST", path, {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "unbound"}, "spec": size})
    here.stack.callback(call, "DELETE", f"{path}/unbound")
    here.monkeypatch.setenv("OASIS_FLOWS_KUBERNETES_PENDING", "4")
    return setting("CLAIM", "unbound")(here)


def strict_namespace(here: Surroundings) -> dict[str, Any]:
    path, call = f"/api/v1/namespaces/{here.cluster.namespace}", here.cluster.api.call

    def enforce(level: str) -> None:
        found = call("GET", path)
        found["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = level
        call("PUT", path, found)

    here.stack.callback(enforce, "privileged")
    enforce("baseline")
    return {}


def opened_policy(here: Surroundings) -> dict[str, Any]:
    name = here.cluster.namespace
    path, call = f"/apis/networking.k8s.io/v1/namespaces/{name}/networkpolicies", here.cluster.api.call

    def replace(policy: dict[str, Any]) -> None:
        with suppress(Refused):
            call("DELETE", f"{path}/{pod.POLICY}")
        call("POST", path, policy)

    opened = pod.network_policy(name)
    opened["spec"]["egress"] = [{}]
    here.stack.callback(replace, pod.network_policy(name))
    replace(opened)
    # An engine looks once.
    here.monkeypatch.setattr(machine, "_kubernetes_engines", {})
    return {}


def ended_by_somebody(end: Callable[[TestCluster, dict[str, Any]], object]) -> Make:
    """On a cluster where somebody ends each algorithm as soon as it runs."""

    def make(here: Surroundings) -> dict[str, Any]:
        found, over = here.cluster, threading.Event()

        def look() -> None:
            while not over.wait(0.3):
                for row in found.api.call("GET", found.core("pods"), query={"labelSelector": pod.SELECTOR})["items"]:
                    if row["status"].get("phase") == "Running" and "deletionTimestamp" not in row["metadata"]:
                        with suppress(Refused):
                            end(found, row)

        looking = threading.Thread(target=look)
        looking.start()
        here.stack.callback(looking.join)
        here.stack.callback(over.set)
        return {}

    return make


def delete_job(found: TestCluster, row: dict[str, Any]) -> None:
    name = row["metadata"]["labels"]["batch.kubernetes.io/job-name"]
    path = f"/apis/batch/v1/namespaces/{found.namespace}/jobs/{name}"
    found.api.call("DELETE", path, {"propagationPolicy": "Background"})


def evict(found: TestCluster, row: dict[str, Any]) -> None:
    name = row["metadata"]["name"]
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": found.namespace}}
    found.api.call("POST", f"{found.core('pods')}/{name}/eviction", body)


NOTHING_OF_IT = "Correct `command` or `entrypoint`"
EAT = "echo 1000 > /proc/self/oom_score_adj; x=$(yes | head -c 60000000)"
SITUATIONS = {
    "non-zero exit": shell("exit_nonzero", "algorithm", "ended with exit code 7 after", "in its own log", "echo bad >&2; exit 7"),
    "command not found": Situation("command_not_found", "run_container", "description", "its command is not in the image", NOTHING_OF_IT, algorithm={"command": ["notacommand"]}, on=EVERYWHERE),
    "not executable": Situation("not_executable", "run_container", "description", "is not executable", "chmod +x", algorithm={"command": ["/opt/noexec"]}, on=EVERYWHERE),
    "wrong architecture of the program": Situation("exec_format", "run_container", "description", "not made for this machine", "Build the image for", algorithm={"command": ["/opt/elsewhere"]}, on=EVERYWHERE),
    "wrong architecture of the image": image("image_invalid", "description", "arm64", "another worker", 2, other_machine, on=("docker",)),
    "wrong architecture of the image, for its node": cluster("unsupported", "platform", "is not made for", "Build it for that architecture", 3, only_for_others),
    "killed": shell("killed", "platform", "was killed by SIGKILL", "run it again", "sleep 0.5; kill -9 $$"),
    "segfault": shell("segfault", "algorithm", "crashed with a segmentation fault", "error in its program", "kill -SEGV $$"),
    "abort": shell("aborted", "algorithm", "aborted itself", "last words", "kill -ABRT $$"),
    "out of memory": shell("out_of_memory", "description", "was killed for memory", "Raise `memory`", EAT, memory="16MiB"),
    "out of memory in a child": shell("out_of_memory", "description", "exit code 3", "Raise `memory`", f"sleep 0.3; ({EAT}); exit 3", memory="16MiB"),
    "timeout": shell("timed_out", "description", "its time limit of 1 s", "Raise `timeout_seconds`", "sleep 60", timeout_seconds=1),
    "SIGTERM ignored": shell("timed_out", "description", "its time limit of 1 s", "Raise `timeout_seconds`", "trap '' TERM; while :; do sleep 1; done", timeout_seconds=1),
    "disk full in output": Situation("disk_full", "run_container", "platform", "No space left on device", "Free space", 3, script="head -c 20000000 /dev/zero > output/x", make=small_disk),
    "tmp full": shell("tmp_full", "description", "no room left", "Raise `tmp_size`", "cat /dev/zero > /tmp/x", tmp_size="1MiB"),
    "read-only root": shell("read_only", "policy", "only below output and /tmp", "`writable_root: true`", "touch /x"),
    "read-only input": shell("read_only", "policy", "only below output and /tmp", "its input is never writable", "touch input/x"),
    "no network": shell("no_network", "policy", "it wanted the network", "`network: true`", "wget -O /tmp/x http://example.org/"),
    "pids limit": shell("pids_limit", "policy", "more processes or threads", "Raise `pids_limit`", "i=0; while [ $i -lt 60 ]; do sleep 5 & i=$((i+1)); done", on=("docker",), pids_limit=20),
    "module missing": shell("module_missing", "algorithm", "lacks a module", "Install it in the image", "echo \"ModuleNotFoundError: No module named 'x'\" >&2; exit 1"),
    "output no dataset can hold": Situation("unsafe_name", "publish_output", "algorithm", "is a link", "", 2, "ln -s /etc/passwd output/x"),
    "output too large": shell("output_too_large", "policy", "output", "`max_output_size`", "head -c 3000000 /dev/zero > output/x; sleep 30", max_output_size="1MiB"),
    "too many files": shell("too_many_files", "policy", "more than 20 files and folders", "`max_output_files`", "i=0; while [ $i -lt 50 ]; do : > output/$i; i=$((i+1)); done; sleep 30", max_output_files=20),
    "log too large": shell("log_too_large", "policy", "log", "`max_log_size`", "yes | head -c 3000000; sleep 30", max_log_size="1MiB"),
    "image not found": image("image_not_found", "description", "There is no image", "Check its spelling", 2, not_in_the_registry),
    "registry refuses credentials": image("image_denied", "description", "refuses these credentials", "the password", 3, wrong_password),
    "registry wants credentials": image("image_denied", "description", "without a login", "Give registry_credentials", 3, no_password),
    "registry unreachable": image("registry_unavailable", "platform", "did not answer", "Check its name", 3, registry_away, on=("docker",)),
    "registry unreachable from the node": cluster("registry_unavailable", "platform", "did not answer", "Check its name", 3, registry_away),
    "broken archive": image("image_invalid", "description", "cut", "Copy it again", 2, broken_archive),
    "archive with two images": image("image_invalid", "description", "holds 2 images", "Save one", 2, two_images),
    "no GPU": Situation("no_gpu", "plan", "platform", "needs a GPU", "gpu: false", 3, algorithm={"gpu": True}, make=no_gpu),
    "unknown parameter": Situation("invalid_description", "plan", "description", "`n`", "", 2, algorithm={"parameters": {"n": None}}),
    "prerequisite failed": Situation("prerequisite_failed", "run_container", "description", "its prerequisite get failed: `exit 4` (taskStarts) ended with exit code 4", "Correct the prerequisite", make=failing_prerequisite),
    "prerequisite without its variable": Situation("invalid_prerequisite", "plan", "description", "→ get): it asks for the template variable dataPath", "template_variables: {dataPath: VALUE}", 2, make=prerequisite_without_its_variable),
    "marketplace does not answer": Situation("marketplace_unavailable", "plan", "platform", "x.yaml does not answer", "Check the address", 3, make=marketplace_away),
    "engine not running": image("engine_unavailable", "platform", "did not answer", "Start one", 3, no_engine, on=("docker",)),
    "input missing": data("dataset_not_found", "data", "There is no folder", "Check the address", 2, no_input),
    "input empty": data("invalid_dataset", "data", "holds no files", "Put files there", 2, no_files),
    "S3 credentials wrong": data("store_denied", "platform", "does not let us write", "secret_access_key", 3, wrong_keys),
    "bucket missing": data("invalid_dataset", "data", "does not exist", "Create it first", 2, no_bucket),
    "store does not answer": data("store_unavailable", "platform", "did not answer", "endpoint_url", 3, store_away),
    "store read-only": data("store_denied", "platform", "does not let us write", "its owner and mode", 3, read_only_store),
    "store full": Situation("disk_full", "publish_output", "platform", "no room left", "Free some space", 3, "head -c 3000000 /dev/zero > output/x", make=full_store),
    "too much on its node": cluster("evicted", "policy", "wrote more beside its output", "OASIS_FLOWS_KUBERNETES_EPHEMERAL_STORAGE", 1, setting("EPHEMERAL_STORAGE", "4MiB"), script="head -c 9000000 /dev/zero > /x; sleep 300", algorithm={"writable_root": True}),
    "no repository for image files": image("unsupported", "platform", "has to be pushed to a registry", "OASIS_FLOWS_KUBERNETES_REGISTRY", 3, no_repository, on=("kubernetes",)),
    "cluster away": cluster("engine_unavailable", "platform", "did not answer", "KUBECONFIG", 3, cluster_away),
    "login unknown to the cluster": cluster("engine_failed", "platform", "does not know this process", "KUBECONFIG", 3, unknown_to_the_cluster),
    "no rights in the cluster": cluster("engine_failed", "platform", "The cluster refused", "rbac.yaml", 3, without_rights),
    "more processors than any node has": cluster("no_capacity", "description", "No node of the cluster is large enough", "Ask for less", 2, lambda _: {}, algorithm={"cpus": 1000}),
    "more memory than any node has": cluster("no_capacity", "description", "No node of the cluster is large enough", "Ask for less", 2, lambda _: {}, algorithm={"memory": "500TiB"}),
    "more than its quota": cluster("no_capacity", "description", "more than its namespace may ever have", "Ask for less", 2, quota("limits.memory", "64Mi")),
    "quota of Jobs used up": cluster("no_room", "platform", "may have no more objects", "Try again later", 3, quota("count/jobs.batch", "0")),
    "claim missing": cluster("engine_failed", "platform", "claim that the algorithm needs is not there", "OASIS_FLOWS_KUBERNETES_CLAIM", 3, setting("CLAIM", "no-such-claim")),
    "claim not bound": cluster("no_room", "platform", "did not start the algorithm within 4 s", "OASIS_FLOWS_KUBERNETES_PENDING", 3, unbound_claim),
    "Pod Security": cluster("unsupported", "platform", "Pod Security does not admit", "Close its sandbox", 3, strict_namespace, algorithm={"capabilities": ["SYS_ADMIN"]}),
    "policy opened": cluster("unsupported", "platform", "no longer closes the network", "deployments/kubernetes", 3, opened_policy),
    "Job deleted by somebody": cluster("lost", "platform", "vanished while it ran", "run it again", 3, ended_by_somebody(delete_job), script="sleep 60"),
    "evicted by somebody": cluster("evicted", "platform", "was evicted", "Run it again", 3, ended_by_somebody(evict), script="sleep 60"),
}  # fmt: skip
CASES = [
    pytest.param(ground, situation, id=f"{ground}: {name}")
    for ground in ("docker", *HERE, *CARRIED)
    for name, situation in SITUATIONS.items()
    if ground in situation.on
]


@pytest.fixture
def surroundings(
    tmp_path: Path, ground: Ground, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Surroundings]:
    for each in (tasks.stage_input, tasks.prepare_image, tasks.run_container, tasks.publish_output):
        monkeypatch.setattr(each, "retry_delay_seconds", [0.0] * each.retries)
        monkeypatch.setattr(each, "retry_jitter_factor", None)
    monkeypatch.setenv("OASIS_FLOWS_STOP_GRACE", "1")
    with ExitStack() as stack:
        yield Surroundings(tmp_path, ground, request, stack, monkeypatch)


@contextmanager
def documents(situation: Situation, here: Surroundings) -> Iterator[tuple[str, str, list[str]]]:
    """Names of the documents of a situation, and more options of the command."""
    made = situation.make(here)
    name = f"failure-{secrets.token_hex(4)}"
    (here.folder / "letters").mkdir()
    (here.folder / "letters" / "a.txt").write_text("a")
    made.get("dataset", Dataset(url=str(here.folder / "letters"))).save(name)
    described = {"docker_image": DockerImage(image_id=here.ground.image), "command": ["sh", "-c", situation.script]}
    Algorithm(
        **described | situation.algorithm | {k: v for k, v in made.items() if k in ("docker_image", "prerequisites")}
    ).save(name)
    options = []
    if store := made.get("store"):
        store.save(name)
        options = ["--store", name]
    yield name, name, options


@pytest.mark.parametrize(("ground", "situation"), CASES, indirect=["ground"])
def test_every_failure_explains_itself_everywhere_the_same(
    prefect_server: Any, ground: Ground, surroundings: Surroundings, capsys: Any, situation: Situation
) -> None:
    with documents(situation, surroundings) as (algorithm, dataset, options):
        before = workspaces(ground)
        exit = main(["run", algorithm, dataset, "--json", *options])
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
    run = prefect_server.api(f"/flow_runs/{told['flow_run_id']}")
    found = prefect_server.api("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    (page,) = [artifact["data"] for artifact in found if artifact["key"] == "oasis-run"]
    verdict = told["verdict"]

    # What it is.
    assert (verdict["code"], verdict["stage"], verdict["blame"]) == (situation.code, situation.stage, situation.blame), told
    assert situation.says in verdict["sentence"]
    assert situation.does in verdict["advice"]
    assert verdict["evidence"]
    assert set(verdict) == set(Verdict.__dataclass_fields__)
    # The same everywhere: command, state, page, tag, and the record where a container ran.
    assert exit == situation.exit
    assert run["state"]["message"] == told["message"] == verdict["sentence"]
    assert run["state_type"] == "FAILED"
    assert f"failed:{situation.code}" in run["tags"]
    for part in (verdict["sentence"].rstrip("."), verdict["advice"], f"`{situation.code}`", situation.stage):
        assert part in page.replace("\\", "")
    assert [line for line in verdict["evidence"] if line not in page] == []
    if situation.stage == "run_container" and situation.exit == 1:
        assert json.loads((Path(told["url"]) / "task.json").read_text())["verdict"] == verdict
        assert not (Path(told["url"]) / "manifest.jsonl").exists()
    # Nothing stays.
    assert ground.seen(run["id"]) == ""
    place = run["labels"].get(LABEL_OUTPUT)
    assert dataset_document(prefect_server, place) is None
    # What is said to be published is, and nothing else.
    assert told["url"] in (None, place)
    if place is not None and "://" not in place:
        assert Path(place).exists() is (told["url"] is not None)
    # What is nowhere else stays in its workspace, for a retry; and what a retry would go on from.
    unpublished = situation.code == "disk_full" and situation.stage == "publish_output"
    interrupted = verdict["transient"] and situation.stage == "run_container"
    assert workspaces(ground) - before == ({run["id"]} if unpublished or interrupted else set())


def workspaces(ground: Ground) -> set[str]:
    return {path.name for path in (ground.home / "workspaces").glob("*")}


def dataset_document(server: Any, place: str | None) -> Any:
    """The Dataset document of a failed run's output: there must be none."""
    wanted = {"block_documents": {"is_anonymous": {"eq_": False}}, "limit": 200}
    documents = server.api("/block_documents/filter", wanted)
    return next((d for d in documents if place and d["data"].get("url") == place), None)


@pytest.mark.parametrize("ground", ["docker"], indirect=True)
def test_an_automation_can_match_the_code(prefect_server: Any, surroundings: Surroundings, capsys: Any) -> None:
    with documents(SITUATIONS["read-only root"], surroundings) as (algorithm, dataset, _):
        main(["run", algorithm, dataset, "--json"])
    run_id = json.loads(capsys.readouterr().out.splitlines()[-1])["flow_run_id"]

    def events() -> Any:
        wanted = {"event": {"name": ["oasis-flows.run.failed"]}, "resource": {"labels": {"oasis.code": ["read_only"]}}}
        return [
            event
            for event in prefect_server.api("/events/filter", {"filter": wanted, "limit": 50})["events"]
            if event["resource"]["prefect.resource.id"] == f"prefect.flow-run.{run_id}"
        ]

    eventually(events, 30)
    (event,) = events()
    assert {k: event["resource"][f"oasis.{k}"] for k in ("stage", "blame", "transient")} == {
        "stage": "run_container",
        "blame": "policy",
        "transient": "false",
    }
    assert event["payload"]["advice"].startswith("Let it write there")


def test_memory_that_does_not_suffice_is_raised_once_and_said(
    prefect_server: Any, ground: Ground, surroundings: Surroundings, capsys: Any
) -> None:
    hungry = "x=$(yes | head -c 20000000); echo x > output/x; echo enough"
    for most, code in (("256MiB", "ok"), ("17MiB", "out_of_memory")):
        situation = shell(code, "", "", "", hungry, memory="16MiB", memory_max=most)
        with documents(situation, surroundings) as (algorithm, dataset, _):
            exit = main(["run", algorithm, dataset, "--json"])
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        record = json.loads((Path(told["url"]) / "task.json").read_text())

        assert exit == (0 if code == "ok" else 1)
        assert record["verdict"]["code"] == code
        assert record["first_try"]["reason"] == "out_of_memory"
        assert record["first_try"]["memory_limit_bytes"] == 16 << 20
        assert record["exit"]["memory_limit_bytes"] == int(most.removesuffix("MiB")) << 20
        assert "run again, once" in record["verdict"]["action"]
        # A cluster tells no peak.
        assert ("would do" in record["verdict"]["action"]) == (code == "ok" and ground.name == "docker")
        # Of the first try only its end is kept. The shell may live to tell of its child's death.
        said = (Path(told["url"]) / "log.txt").read_bytes()
        assert said == b"enough\n" if code == "ok" else said in (b"", b"Killed\n")
        for path in surroundings.folder.glob("letters/*"):
            path.unlink()
        (surroundings.folder / "letters").rmdir()
