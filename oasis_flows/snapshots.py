"""Whose word on capacity it is: Docker's, Kubernetes's, OSCAR's or a table's, as nodes. Pure functions over their JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .capacity import Node, Vector, byte_count, millicpus, quantity
from .errors import DescriptionError

Json = Mapping[str, Any]

# What a container with a GPU asks for on Kubernetes, and what it puts up with, unless the settings say otherwise.
GPU_RESOURCE = "nvidia.com/gpu"
GPU_TOLERATIONS: Sequence[Json] = ({"key": GPU_RESOURCE, "operator": "Exists"},)

# No engine of this package says how many containers it takes; a machine has other limits before that.
MANY = 1 << 20

_KNOWN = (
    'a table {"nodes": [{"name": "a", "cpus": 8, "memory": "32Gi", "gpus": 1}]}, the output of '
    "`kubectl get nodes,pods --all-namespaces -o json`, or OSCAR's /system/status"
)


def nodes_in(content: object) -> tuple[Node, ...]:
    """The nodes in a snapshot of any shape that is known.

    Raises:
        DescriptionError: it has another shape, or a value in it is none.
    """
    readers: dict[str, Callable[[Any], tuple[Node, ...]]] = {"nodes": static_nodes, "items": kubernetes_nodes}
    readers |= {"cluster": oscar_nodes, "detail": oscar_nodes}
    for key, read in readers.items():
        if isinstance(content, Mapping) and isinstance(content.get(key), list | Mapping):
            try:
                return read(content)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise DescriptionError(
                    f"The snapshot of the capacity lacks a value, or has one of the wrong type, below {key!r} "
                    f"({type(error).__name__}: {error}). It must be {_KNOWN}."
                ) from error
    keys = ", ".join(map(repr, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
    raise DescriptionError(f"The snapshot of the capacity has an unknown shape (it has {keys or 'nothing'}). Give {_KNOWN}.")


def static_nodes(table: Json) -> tuple[Node, ...]:
    """Nodes written down by hand: `name`, `cpus`, `memory`, and `gpus` and `pods` if they matter."""
    return tuple(
        Node(
            name=str(row["name"]),
            allocatable=Vector(
                millicpus(row["cpus"]), byte_count(row["memory"]), int(row.get("gpus", 0)), int(row.get("pods", MANY))
            ),
        )
        for row in table["nodes"]
    )


def docker_node(info: Json, containers: Iterable[Json], *, gpus: int = 0) -> Node:
    """The host of a Docker engine: its processors and memory, less the limits of these running containers (as inspected).

    A container without a limit requests nothing.
    """
    requested = Vector()
    for container in containers:
        host = container["HostConfig"]
        quota, period = host.get("CpuQuota") or 0, host.get("CpuPeriod") or 100_000
        cpus = -(-(host.get("NanoCpus") or 0) // 10**6) or (-(-quota * 1000 // period) if quota > 0 else 0)
        wanted = [request.get("Count", 0) for request in host.get("DeviceRequests") or () if _wants_gpu(request)]
        taken = sum(gpus if count < 0 else count for count in wanted)
        requested = requested.plus(Vector(cpus, host.get("Memory") or 0, taken, 1))
    return Node(
        name=str(info.get("Name") or "engine"),
        allocatable=Vector(int(info["NCPU"]) * 1000, int(info["MemTotal"]), gpus, MANY),
        requested=requested,
    )


def _wants_gpu(request: Json) -> bool:
    return any("gpu" in names for names in request.get("Capabilities") or ())


def kubernetes_nodes(
    listing: Json, gpu_tolerations: Sequence[Json] = GPU_TOLERATIONS, gpu_resource: str | None = None
) -> tuple[Node, ...]:
    """A cluster's nodes: what is allocatable, less the requests of pods that are scheduled and have not finished.

    A node that is cordoned, not ready, or tainted against ordinary pods is closed; where these tolerations, which pods with
    GPUs have, put up with its taints, it is open to such pods alone. GPUs are what has the name `gpu_resource`; without it, any that ends in
    `/gpu`. A pod's request is what the scheduler
    counts: its containers together or, where that is more, its largest initial container, sidecars added to both.
    """
    items = listing["items"]
    pods = [item for item in items if "nodeName" in item["spec"] and item["status"].get("phase") not in ("Succeeded", "Failed")]
    requested: dict[str, Vector] = {}
    for pod in pods:
        name = pod["spec"]["nodeName"]
        requested[name] = requested.get(name, Vector()).plus(_pod_request(pod["spec"], gpu_resource))
    return tuple(
        Node(
            name=item["metadata"]["name"],
            allocatable=_amount(item["status"]["allocatable"], gpu_resource)._replace(
                pods=int(quantity(item["status"]["allocatable"].get("pods", MANY)))
            ),
            requested=requested.get(item["metadata"]["name"], Vector()),
            **_closed(item, gpu_tolerations),
        )
        for item in items
        if "allocatable" in item["status"]
    )


def _closed(node: Json, gpu_tolerations: Sequence[Json]) -> dict[str, Any]:
    """What closes a node, as fields of `Node`. The cluster's own taints are signs of a trouble that passes."""
    ready = [each["status"] for each in node["status"].get("conditions", ()) if each["type"] == "Ready"]
    if ready and ready[0] != "True":
        return {"closed": "not ready", "for_now": True}
    if node["spec"].get("unschedulable"):
        return {"closed": "cordoned", "for_now": True}
    taints = [each for each in node["spec"].get("taints", ()) if each["effect"] in ("NoSchedule", "NoExecute")]
    minded = [each for each in taints if not any(_tolerates(toleration, each) for toleration in gpu_tolerations)]
    if minded:
        for_now = all(each["key"].startswith("node.kubernetes.io/") for each in minded)
        return {"closed": f"tainted {minded[0]['key']}", "for_now": for_now}
    return {"gpus_only": bool(taints)}


def _tolerates(toleration: Json, taint: Json) -> bool:
    """Does a pod with this toleration put up with the taint, by Kubernetes's rules?"""
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return toleration.get("key") == taint["key"] and (toleration.get("value") or "") == (taint.get("value") or "")


def _pod_request(spec: Json, gpu_resource: str | None) -> Vector:
    running, most = Vector(), Vector()
    for each in spec.get("initContainers", ()):
        wanted = _amount(each.get("resources", {}).get("requests", {}), gpu_resource)
        if each.get("restartPolicy") == "Always":
            running = running.plus(wanted)
            most = Vector(*map(max, most, running))
        else:
            most = Vector(*map(max, most, running.plus(wanted)))
    for each in spec["containers"]:
        running = running.plus(_amount(each.get("resources", {}).get("requests", {}), gpu_resource))
    whole = Vector(*map(max, most, running)).plus(_amount(spec.get("overhead", {}), gpu_resource))
    return whole._replace(pods=1)


def _amount(values: Json, gpu_resource: str | None) -> Vector:
    names = [name for name in values if (name.endswith("/gpu") if gpu_resource is None else name == gpu_resource)]
    gpus = sum(int(quantity(values[name])) for name in names)
    return Vector(millicpus(values.get("cpu", 0)), byte_count(values.get("memory", 0)), gpus)


def oscar_nodes(status: Json) -> tuple[Node, ...]:
    """A cluster as OSCAR's `/system/status` tells it, in its present and in its old shape.

    The present one has requests. The old one has use only, which is taken for want of better. In both, "cores" are
    thousandths of a processor, and of GPUs it is only said that there are some: one a node is counted, as free.
    """
    if "detail" in status:
        return tuple(
            Node(
                name=str(row["nodeName"]),
                allocatable=Vector(
                    _whole(row["cpuCapacity"]), _whole(row["memoryCapacity"]), int(_true(row.get("hasGPU"))), MANY
                ),
                requested=Vector(_whole(row["cpuUsage"]), _whole(row["memoryUsage"])),
            )
            for row in status["detail"]
        )
    return tuple(
        Node(
            name=str(row["name"]),
            allocatable=Vector(_whole(row["cpu"]["capacity_cores"]), _whole(row["memory"]["capacity_bytes"]), _gpus(row), MANY),
            requested=Vector(_whole(row["cpu"]["request_cores"]), _whole(row["memory"]["request_bytes"])),
            closed=_oscar_closed(row),
            for_now=not _true(row.get("is_interlink")),
        )
        for row in status["cluster"]["nodes"]
    )


def _oscar_closed(row: Json) -> str:
    if _true(row.get("is_interlink")):
        return "a virtual node"
    state = str(row.get("status") or "Ready")
    return "" if state == "Ready" else state


def _gpus(row: Json) -> int:
    found = row.get("gpu") or 0
    return int(found) if isinstance(found, int) else int(quantity(found))


def _whole(value: object) -> int:
    return int(quantity(value))


def _true(value: object) -> bool:
    return value is True or str(value).lower() == "true"
