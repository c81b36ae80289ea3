"""A job in Kubernetes' own words, and what the cluster made of it: pure functions over JSON.

What stands in a pod beyond the job: HOSTNAME, and KUBERNETES_… variables with the address of the API server, which kubelet
adds to every container and nobody can leave out; there is no token to use it with. The limit of processes is the node's
(kubelet's podPidsLimit): a pod cannot ask for one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DescriptionError, UnsupportedByEngine
from ..job import ContainerJob, Mount, RegistryLogin
from ..snapshots import GPU_RESOURCE

Json = Mapping[str, Any]

PACKAGE, PACKAGE_NAME = "app.kubernetes.io/managed-by", "oasis-flows"
SELECTOR = f"{PACKAGE}={PACKAGE_NAME}"
RUN = "oasis-flows.io/run"
NETWORK, CLOSED = "oasis-flows.io/network", "none"
CARRIER = "oasis-flows.io/carrier"
RUN_ID, ATTEMPT, LEASE, CLAIM, JOB = (f"oasis-flows.io/{name}" for name in ("run-id", "attempt", "lease", "claim", "job"))
HOST, RETRY_WINDOW = "oasis-flows.io/host", "oasis-flows.io/retry-window"
CONTAINER = "main"
POLICY = "oasis-flows-no-network"

# The lease is mounted here, and then, as kubelet does it, the file for the termination message. From a claim that is not the one of
# this process's home the lease would be a folder, which kubelet has just made; and a file cannot be mounted over a folder: so the
# container does not start.
PROOF = "/run/oasis-flows-claim"

_WORKSPACE, _SHM = "workspace", "shm"
_KEPT_SECONDS = 86_400
# Beyond the time limit and the wait for a place: a process that watches ends a container long before.
_SPARE_SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a cluster jobs run. `home` is where this process has the claim mounted.

    `node` is the only one that can mount the claim, or empty; `owner` is a reference to what Jobs shall not outlive;
    `pending_seconds` is how long a pod may wait for its start.

    `carrier` is the image of the pods that carry files to and from the claim, for a process that has it not mounted. For what these
    pods serve, `home` is where they have it; `host` the machine that has the leases; and `proof` a file of the claim. `one_node`: the
    claim is mounted on one node at a time. `avoided` are nodes that are taken only where no other will do.
    """

    namespace: str
    claim: str
    home: Path
    node: str = ""
    owner: Json | None = None
    gpu_resource: str = GPU_RESOURCE
    gpu_node_selector: Mapping[str, str] = field(default_factory=dict)
    gpu_tolerations: tuple[Json, ...] = ()
    ephemeral_bytes: int = 1 << 30
    pending_seconds: float = 3600.0
    carrier: str = ""
    host: str = ""
    proof: Path | None = None
    one_node: bool = False
    avoided: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """What is known of an image: its configuration, where a registry told it, and the login that it needs."""

    config: Json | None = None
    login: RegistryLogin | None = None


def run_label(run_id: str) -> str:
    """A run's id as the value of a label: itself, or a fingerprint of what cannot be one."""
    fits = re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", run_id)
    return run_id if fits else hashlib.sha256(run_id.encode("utf-8", "replace")).hexdigest()[:40]


def job_name(job: ContainerJob) -> str:
    """The one name that the Job of this attempt can have: so nobody makes two, however often they ask."""
    readable = re.sub(r"[^a-z0-9]+", "-", job.run_id.lower())[:40].strip("-") or "run"
    suffix = "" if readable == job.run_id else "-" + hashlib.sha256(job.run_id.encode("utf-8", "replace")).hexdigest()[:8]
    return f"oasis-{readable}{suffix}-{job.attempt}"


def job_digest(job: ContainerJob) -> str:
    """Tells whether a Job found under a run's id does what the run asks for now. No secret value goes into it."""
    said: list[object] = [job.image, job.entrypoint, job.command, sorted(job.environment.items())]
    said += [sorted(job.secret_environment), [(str(m.source), m.target, m.read_only) for m in job.mounts]]
    said += [repr(job.storages), job.wrapper and job.wrapper.argv, job.working_dir, job.user, repr(job.resources)]
    return hashlib.sha256(json.dumps([*said, repr(job.sandbox)]).encode("utf-8", "backslashreplace")).hexdigest()[:32]


def escaped(text: str) -> str:
    """A text that Kubernetes leaves as it is: `$(NAME)` in commands and variables is replaced, and `$$` becomes `$`."""
    return text.replace("$", "$$")


def sub_path(place: Place, path: Path) -> str:
    """A folder or file below the home, as a path of the claim.

    Raises:
        UnsupportedByEngine: it lies elsewhere.
    """
    if not path.is_relative_to(place.home):
        raise UnsupportedByEngine(
            f"{path} is not on the claim {place.claim}, whose files are below {place.home}, and no pod could see it. "
            "Nothing was started. Set OASIS_FLOWS_HOME to the folder where the claim is mounted; or, where it cannot be, "
            "OASIS_FLOWS_KUBERNETES_CARRIER."
        )
    return path.relative_to(place.home).as_posix()


def job_body(job: ContainerJob, place: Place, image: Pulled) -> dict[str, Any]:
    """The body of the Job.

    Raises:
        UnsupportedByEngine, DescriptionError: no pod can be what the job asks for.
    """
    name = job_name(job)
    labels = {PACKAGE: PACKAGE_NAME, RUN: run_label(job.run_id), **({} if job.sandbox.network else {NETWORK: CLOSED})}
    annotations = {RUN_ID: job.run_id, ATTEMPT: str(job.attempt), JOB: job_digest(job), **_owner(job, place)}
    metadata: dict[str, Any] = {"name": name, "namespace": place.namespace, "labels": labels, "annotations": annotations}
    if place.owner is not None:
        metadata["ownerReferences"] = [dict(place.owner)]
    spec: dict[str, Any] = {
        "backoffLimit": 0,
        "parallelism": 1,
        "completions": 1,
        # A pod that the cluster took away is not made anew: what it wrote is in the output, which has to be emptied first.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
        },
        "ttlSecondsAfterFinished": _KEPT_SECONDS,
        "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": _pod_spec(job, place, image, name)},
    }
    if job.timeout_seconds is not None:
        linger = job.wrapper.linger_seconds if job.wrapper else 0.0
        allowed = job.timeout_seconds + linger + job.stop_grace_seconds + place.pending_seconds + _SPARE_SECONDS
        spec["activeDeadlineSeconds"] = math.ceil(allowed)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _owner(job: ContainerJob, place: Place) -> dict[str, str]:
    """Where the lease is: on the claim, or on the machine of the process."""
    if not place.host:
        return {LEASE: sub_path(place, job.lease), CLAIM: place.claim}
    return {LEASE: str(job.lease), HOST: place.host, RETRY_WINDOW: f"{job.retry_window_seconds:g}"}


def _pod_spec(job: ContainerJob, place: Place, image: Pulled, name: str) -> dict[str, Any]:
    volumes, mounts = _volumes(job, place, image)
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # The pod's first process reaps orphans; and the container's own is not the first, so that SIGTERM ends it by default.
        "shareProcessNamespace": True,
        "terminationGracePeriodSeconds": max(1, math.ceil(job.stop_grace_seconds)),
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}, **_user(job)},
        "containers": [_container(job, place, image, name, mounts)],
        "volumes": volumes,
    }
    if not job.sandbox.network:
        # A name server that is not there: nothing is resolved, not even by the node's own.
        spec |= {"dnsPolicy": "None", "dnsConfig": {"nameservers": ["127.0.0.1"]}}
    if image.login is not None:
        spec["imagePullSecrets"] = [{"name": f"{name}-pull"}]
    if place.node:
        fields = [{"key": "metadata.name", "operator": "In", "values": [place.node]}]
        required = {"nodeSelectorTerms": [{"matchFields": fields}]}
        spec["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    elif place.avoided:
        # Kubernetes takes one name in each of these.
        others = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in place.avoided]
        preferred = [{"weight": 100, "preference": {"matchFields": others}}]
        spec["affinity"] = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
    if job.resources.gpus and place.gpu_tolerations:
        spec["tolerations"] = [dict(each) for each in place.gpu_tolerations]
    if job.resources.gpus and place.gpu_node_selector:
        spec["nodeSelector"] = dict(place.gpu_node_selector)
    return spec


def _container(job: ContainerJob, place: Place, image: Pulled, name: str, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    resources = _resources(job, place)
    command, arguments = _argv(job, image)
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": job.image,
        "imagePullPolicy": "IfNotPresent",
        "workingDir": job.working_dir,
        "terminationMessagePath": PROOF,
        "env": [
            *({"name": key, "value": escaped(value)} for key, value in job.environment.items()),
            *(
                {"name": key, "valueFrom": {"secretKeyRef": {"name": name, "key": f"v{number}"}}}
                for number, key in enumerate(job.secret_environment)
            ),
        ],
        "resources": {"limits": resources, "requests": dict(resources)},
        "securityContext": {
            "privileged": False,
            "allowPrivilegeEscalation": job.sandbox.new_privileges or "SYS_ADMIN" in _capabilities(job),
            "readOnlyRootFilesystem": not job.sandbox.writable_root,
            "capabilities": {"drop": ["ALL"], **({"add": _capabilities(job)} if job.sandbox.capabilities else {})},
        },
        "volumeMounts": mounts,
    }
    if command is not None:
        container["command"] = [escaped(word) for word in command]
    if arguments is not None:
        container["args"] = [escaped(word) for word in arguments]
    return container


def _capabilities(job: ContainerJob) -> list[str]:
    return [name.removeprefix("CAP_") for name in job.sandbox.capabilities]


def _argv(job: ContainerJob, image: Pulled) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Kubernetes' `command` and `args`; an empty list would mean the image's own, as none does."""
    config = image.config
    if job.wrapper is None and job.entrypoint is None and job.command == ():
        own = tuple((config or {}).get("Entrypoint") or ())
        if not own:
            raise DescriptionError("The image has no entrypoint, and the command is empty. Write `command` in the document.")
        return own, None
    if job.wrapper is None:
        return job.entrypoint, job.command
    if config is None and (job.entrypoint is None or job.command is None) and job.entrypoint is None:
        raise UnsupportedByEngine(
            "The algorithm has prerequisites, which are a shell around its image's own program, and what that is could not be "
            "read from the image's registry. Nothing was started. Write `entrypoint` and `command` in the Algorithm document."
        )
    entrypoint = job.entrypoint if job.entrypoint is not None else tuple((config or {}).get("Entrypoint") or ())
    default = () if job.entrypoint is not None else tuple((config or {}).get("Cmd") or ())
    program = (*entrypoint, *(job.command if job.command is not None else default))
    if not program:
        raise DescriptionError(
            "Neither the algorithm nor its image says what to run. Write `command` in the Algorithm document."
        )
    return job.wrapper.argv, program


def _resources(job: ContainerJob, place: Place) -> dict[str, str]:
    wanted = {
        "cpu": f"{max(1, round(job.resources.cpus * 1000))}m",
        "memory": str(job.resources.memory_bytes),
        "ephemeral-storage": str(place.ephemeral_bytes),
    }
    if job.resources.gpus == "all":
        raise UnsupportedByEngine(
            "Kubernetes hands out GPUs by number and knows no `gpu_count: all`. Nothing was started. Write a number."
        )
    return wanted | ({place.gpu_resource: str(job.resources.gpus)} if job.resources.gpus else {})


def _user(job: ContainerJob) -> dict[str, Any]:
    if not job.user:
        return {}
    user, _, group = job.user.partition(":")
    if not user.isdigit() or (group and not group.isdigit()):
        raise UnsupportedByEngine(
            f"Kubernetes knows users by number only, and the user is {job.user!r}. Nothing was started. Write one such as "
            '"1000:1000" in the Algorithm document.'
        )
    found: dict[str, Any] = {"runAsUser": int(user)} | ({"runAsGroup": int(group)} if group else {})
    return found | ({"runAsNonRoot": True} if int(user) else {})


def _volumes(job: ContainerJob, place: Place, image: Pulled) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes of the pod, and their mounts in the container."""
    resources = job.resources
    in_memory = {"medium": "Memory", "sizeLimit": str(resources.tmp_bytes or resources.memory_bytes)}
    volumes: list[dict[str, Any]] = [
        {"name": _WORKSPACE, "persistentVolumeClaim": {"claimName": place.claim}},
    ]
    proof = place.proof if place.host else job.lease
    ours = (*([Mount(source=proof, target=PROOF, read_only=True)] if proof else []), *job.mounts)
    mounts = list[dict[str, Any]]()
    for mount in ours:
        path = sub_path(place, mount.source)
        below = {"subPath": path} if path != "." else {}
        mounts.append({"name": _WORKSPACE, "mountPath": mount.target, **below, "readOnly": mount.read_only})
    for number, storage in enumerate(job.storages):
        if storage.source.startswith("/"):
            source: dict[str, Any] = {"hostPath": {"path": storage.source, "type": "Directory"}}
        else:
            source = {"persistentVolumeClaim": {"claimName": storage.source}}
        volumes.append({"name": f"storage-{number}", **source})
        mounts.append({"name": f"storage-{number}", "mountPath": storage.target, "readOnly": storage.read_only})
    taken = {mount["mountPath"] for mount in mounts}
    # Each VOLUME of an image would be a folder of the node's disk: writable under a read-only root, and without limit.
    declared = () if job.sandbox.writable_root else ((image.config or {}).get("Volumes") or ())
    for number, target in enumerate(sorted({"/tmp", *map(posixpath.normpath, declared)} - taken)):  # noqa: S108
        volumes.append({"name": f"memory-{number}", "emptyDir": in_memory})
        mounts.append({"name": f"memory-{number}", "mountPath": target})
    if resources.shm_bytes and "/dev/shm" not in taken:  # noqa: S108
        volumes.append({"name": _SHM, "emptyDir": {"medium": "Memory", "sizeLimit": str(resources.shm_bytes)}})
        mounts.append({"name": _SHM, "mountPath": "/dev/shm"})  # noqa: S108
    return volumes, mounts


def secret_values(job: ContainerJob, place: Place, row: Json) -> dict[str, Any] | None:
    """The Secret with the values of the job's environment, which goes with its Job `row`; `None` where it has none."""
    if not job.secret_environment:
        return None
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": row["metadata"]["name"], "uid": row["metadata"]["uid"]}
    values = {f"v{number}": value for number, value in enumerate(job.secret_environment.values())}
    return _secret(job, place, job_name(job), "Opaque", values, owner)


def pull_secret(job: ContainerJob, place: Place, image: Pulled) -> dict[str, Any] | None:
    """The Secret with the login of the image's registry; `None` where it needs none."""
    if image.login is None:
        return None
    login = {"username": image.login.username, "password": image.login.password}
    registry = re.sub(r"^https?://", "", image.login.registry) or "https://index.docker.io/v1/"
    config = {".dockerconfigjson": json.dumps({"auths": {registry: login}})}
    return _secret(job, place, f"{job_name(job)}-pull", "kubernetes.io/dockerconfigjson", config, place.owner)


def _secret(
    job: ContainerJob, place: Place, name: str, kind: str, data: Mapping[str, str], owner: Json | None
) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": place.namespace,
        "labels": {PACKAGE: PACKAGE_NAME, RUN: run_label(job.run_id)},
    }
    if owner is not None:
        metadata["ownerReferences"] = [dict(owner)]
    encoded = {key: base64.b64encode(value.encode("utf-8", "surrogateescape")).decode() for key, value in data.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": kind, "data": encoded}


def in_force(pod: Json, version: str) -> dict[str, object]:
    """What the cluster says about a pod, in this package's words; those of the Docker engine where both have one."""
    spec, metadata = pod["spec"], pod["metadata"]
    container = next(each for each in spec["containers"] if each["name"] == CONTAINER)
    outer, inner = spec.get("securityContext") or {}, container.get("securityContext") or {}
    limits = (container.get("resources") or {}).get("limits") or {}
    capabilities = inner.get("capabilities") or {}
    claims = {each["name"]: each for each in spec.get("volumes") or ()}
    mounts = [
        {
            "source": _source(claims.get(each["name"], {}), each),
            "target": each["mountPath"],
            "read_only": bool(each.get("readOnly")),
        }
        for each in container.get("volumeMounts") or ()
        if "emptyDir" not in claims.get(each["name"], {})
    ]
    status: Json = next((each for each in pod["status"].get("containerStatuses") or () if each["name"] == CONTAINER), {})
    user = inner.get("runAsUser", outer.get("runAsUser"))
    group = inner.get("runAsGroup", outer.get("runAsGroup"))
    return {
        "engine": f"Kubernetes {version}",
        "container": status.get("containerID") or "",
        "pod": f"{metadata['namespace']}/{metadata['name']}",
        "node": spec.get("nodeName") or "",
        "runtime": spec.get("runtimeClassName"),
        "image": status.get("imageID") or container["image"],
        "user": "" if user is None else f"{user}" if group is None else f"{user}:{group}",
        "working_dir": container.get("workingDir") or "",
        "network": (metadata.get("labels") or {}).get(NETWORK, "host" if spec.get("hostNetwork") else "pod"),
        "privileged": bool(inner.get("privileged")),
        "host_namespaces": [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)],
        "capabilities_dropped": list(capabilities.get("drop") or ()),
        "capabilities_added": list(capabilities.get("add") or ()),
        "security_options": [
            *(() if inner.get("allowPrivilegeEscalation", True) else ("no-new-privileges",)),
            f"seccomp={_seccomp(outer, inner)}",
        ],
        "system_calls_filtered": _seccomp(outer, inner) != "Unconfined",
        "read_only_root": bool(inner.get("readOnlyRootFilesystem")),
        "tmpfs": {
            each["mountPath"]: claims[each["name"]]["emptyDir"].get("sizeLimit")
            for each in container.get("volumeMounts") or ()
            if (claims.get(each["name"], {}).get("emptyDir") or {}).get("medium") == "Memory"
        },
        "init": bool(spec.get("shareProcessNamespace")),
        "service_account_token": bool(spec.get("automountServiceAccountToken", True)),
        "pids": None,
        "limits": dict(limits),
        "mounts": sorted(mounts, key=lambda m: str(m["target"])),
        "other_containers": [
            each["name"]
            for kind in ("initContainers", "containers")
            for each in spec.get(kind) or ()
            if each["name"] != CONTAINER
        ],
    }


def _seccomp(outer: Json, inner: Json) -> str:
    return str((inner.get("seccompProfile") or outer.get("seccompProfile") or {}).get("type", "Unconfined"))


def _source(volume: Json, mount: Json) -> str:
    if "persistentVolumeClaim" in volume:
        return "/".join(part for part in (volume["persistentVolumeClaim"]["claimName"], mount.get("subPath")) if part)
    if "hostPath" in volume:
        return str(volume["hostPath"]["path"])
    return ", ".join(key for key in volume if key != "name") or "?"


def looser_than_asked(job: ContainerJob, place: Place, force: Json) -> tuple[str, ...]:
    """The names of what is less strict in the pod than the job asks for; empty when all is well.

    Whatever admits pods to the cluster may have changed it. Limits are compared as written: nobody rewrites equal ones.
    """
    sandbox, limits = job.sandbox, force["limits"]
    asked = _resources(job, place)
    read_only = {m["target"] for m in force["mounts"] if m["read_only"]}
    wanted = {m.target for m in job.mounts if m.read_only} | {m.target for m in job.storages if m.read_only}
    checks = {
        "network": sandbox.network or force["network"] == CLOSED,
        "privileged": not force["privileged"],
        "host namespaces": not force["host_namespaces"],
        "capabilities": set(force["capabilities_added"]) <= set(_capabilities(job)) and "ALL" in force["capabilities_dropped"],
        "no-new-privileges": sandbox.new_privileges
        or "SYS_ADMIN" in _capabilities(job)
        or "no-new-privileges" in force["security_options"],
        "read-only root": sandbox.writable_root or force["read_only_root"],
        "seccomp": force["system_calls_filtered"],
        "service account token": not force["service_account_token"],
        "read-only mounts": wanted <= read_only,
        **{name: name in limits and quantities_equal(limits[name], value) for name, value in asked.items()},
    }
    return tuple(name for name, holds in checks.items() if not holds)


def quantities_equal(one: str, other: str) -> bool:
    """Are two of Kubernetes' quantities the same amount? The API server writes them in a form of its own."""
    from ..capacity import quantity

    return quantity(one) == quantity(other)


def network_policy(namespace: str) -> dict[str, Any]:
    """The policy that closes the network of all pods that ask for none."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": POLICY, "namespace": namespace, "labels": {PACKAGE: PACKAGE_NAME}},
        "spec": {"podSelector": {"matchLabels": {NETWORK: CLOSED}}, "policyTypes": ["Ingress", "Egress"]},
    }


def closes_the_network(policy: Json) -> bool:
    """Does a policy of that name still close it?"""
    spec = policy.get("spec") or {}
    selector = (spec.get("podSelector") or {}).get("matchLabels") or {}
    types = set(spec.get("policyTypes") or ())
    opened = spec.get("ingress") or spec.get("egress")
    return selector.items() <= {NETWORK: CLOSED}.items() and types == {"Ingress", "Egress"} and not opened
