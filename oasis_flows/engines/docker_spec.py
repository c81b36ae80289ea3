"""A job in the Docker Engine API's own words, and what the engine made of it: pure functions over JSON.

The environment in the container is the image's, the job's over it, and three names that engine and runtime add when
neither has them: HOSTNAME (the container's id), HOME (of its user) and PATH; Podman adds TERM and `container`, too. With `entrypoint` given and `command` not,
the image's own CMD is dropped, as `docker run --entrypoint` does.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from socket import gethostname
from typing import Any

from ..errors import DescriptionError, UnsupportedByEngine
from ..job import ContainerJob, Mount, Resources, StorageMount
from .docker_errors import HOW_TO_DELEGATE

RUN_ID = "io.oasis.run-id"
ATTEMPT = "io.oasis.attempt"
LEASE = "io.oasis.lease"
RETRY_WINDOW = "io.oasis.retry-window"
HOST = "io.oasis.host"
PACKAGE = "io.oasis.package"
JOB = "io.oasis.job"
PACKAGE_NAME = "oasis-flows"

# A run that comes back after its process died reads its log here, so the driver must keep bytes exactly and keep all of
# them: `local` does; `json-file` replaces what is not UTF-8. The bound stops a flood from filling the engine's disk; a
# longer log is still whole for a run that stays attached, for then nothing is read back. `local` takes some 25 bytes more
# for each line. Podman's `k8s-file` keeps them too, and its usual driver may be journald; with a bound it would drop what
# came first, so it has none.
KEPT_LOG: Mapping[str, Mapping[str, str]] = {
    "local": {"max-size": "256m", "max-file": "4", "compress": "false"},
    "k8s-file": {},
}

_DISCARDED = re.compile(r"discarded|not support|does not match|without swap|not compiled|not mounted", re.IGNORECASE)
# fmt: off
_DEFAULT_CAPABILITIES = frozenset((
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD",
    "NET_BIND_SERVICE", "NET_RAW", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
))
# fmt: on


def container_name(job: ContainerJob) -> str:
    """The one name that a container of this attempt can have, so that it can be removed before its id is known."""
    readable = re.sub(r"[^a-zA-Z0-9_.-]+", "-", job.run_id)[:100].strip("-") or "run"
    suffix = "" if readable == job.run_id else "-" + hashlib.sha256(job.run_id.encode("utf-8", "replace")).hexdigest()[:8]
    return f"oasis-{readable}{suffix}-{job.attempt}"


def job_digest(job: ContainerJob) -> str:
    """Tells whether a container found under a run's id does what the run asks for now. No secret value goes into it."""
    said: list[object] = [
        job.image,
        job.entrypoint,
        job.command,
        sorted(job.environment.items()),
        sorted(job.secret_environment),
    ]
    said += [[(str(m.source), m.target, m.read_only) for m in job.mounts], job.working_dir, job.user, repr(job.resources)]
    said += [repr(job.storages), job.wrapper and job.wrapper.argv]
    return hashlib.sha256(json.dumps([*said, repr(job.sandbox)]).encode("utf-8", "backslashreplace")).hexdigest()[:32]


def create_body(job: ContainerJob, info: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, Any]:
    """The body of `POST /containers/create`. `info` is the engine's, `image` the inspected image."""
    environment = {**job.environment, **job.secret_environment}
    entrypoint, command = job.entrypoint, job.command
    if command == () and entrypoint is None:
        # An empty list means "the image's own" to the engine, unless an entrypoint is given.
        entrypoint = tuple((image.get("Config") or {}).get("Entrypoint") or ())
    if job.wrapper is not None:
        entrypoint, command = job.wrapper.argv, _argv(job, image)
    return {
        "Image": job.image,
        "Entrypoint": None if entrypoint is None else list(entrypoint) or [""],
        "Cmd": None if command is None else list(command),
        "Env": [f"{name}={value}" for name, value in environment.items()],
        "WorkingDir": job.working_dir,
        "User": job.user,
        "AttachStdout": True,
        "AttachStderr": True,
        "Labels": {
            RUN_ID: job.run_id,
            ATTEMPT: str(job.attempt),
            LEASE: str(job.lease),
            RETRY_WINDOW: str(job.retry_window_seconds),
            HOST: gethostname(),
            PACKAGE: PACKAGE_NAME,
            JOB: job_digest(job),
        },
        "HostConfig": _host_config(job, info, image),
    }


def _argv(job: ContainerJob, image: Mapping[str, Any]) -> tuple[str, ...]:
    """What the engine would run by itself."""
    config = image.get("Config") or {}
    own = job.entrypoint if job.entrypoint is not None else tuple(config.get("Entrypoint") or ())
    more = job.command if job.command is not None else () if job.entrypoint is not None else tuple(config.get("Cmd") or ())
    return (*own, *more)


def refuse_wrapped(job: ContainerJob, image: Mapping[str, Any]) -> None:
    """Return if a shell can be the job's wrapper.

    Raises:
        DescriptionError: there is nothing to run; or the shell would drop a variable, because it could not name it.
    """
    if not _argv(job, image):
        raise DescriptionError(
            "Neither the algorithm nor its image says what to run. Write `command` in the Algorithm document."
        )
    own = [variable.partition("=")[0] for variable in (image.get("Config") or {}).get("Env") or ()]
    if strange := [name for name in (*own, *job.environment) if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)]:
        raise DescriptionError(
            f"A shell, which runs the prerequisites, cannot keep the variable {strange[0]!r} for the algorithm. Give it a name of "
            "letters, digits and _ in the document or the image, or leave out the prerequisites."
        )


def _host_config(job: ContainerJob, info: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, Any]:
    resources, sandbox = job.resources, job.sandbox
    # The engine gives each VOLUME of an image a folder on its own disk: writable under a read-only root, and without limit.
    volumes = () if sandbox.writable_root else (image.get("Config") or {}).get("Volumes") or ()
    in_memory = {"/tmp", *map(posixpath.normpath, volumes)} - {m.target for m in _mounted(job)}  # noqa: S108
    tmp = "rw,exec,nosuid,nodev,mode=1777" + (f",size={resources.tmp_bytes}" if resources.tmp_bytes else "")
    config: dict[str, Any] = {
        "NetworkMode": "bridge" if sandbox.network else "none",
        "CapDrop": ["ALL"],
        "CapAdd": list(sandbox.capabilities),
        "SecurityOpt": [] if sandbox.new_privileges else ["no-new-privileges"],
        "ReadonlyRootfs": not sandbox.writable_root,
        "Tmpfs": dict.fromkeys(sorted(in_memory), tmp),
        "PidsLimit": resources.pids,
        "Memory": resources.memory_bytes,
        "NanoCpus": round(resources.cpus * 1e9),
        "Init": True,
        "Mounts": [_mount(str(m.source), m.target, read_only=m.read_only) for m in _mounted(job)],
        "DeviceRequests": _device_requests(resources),
    }
    if info.get("SwapLimit"):
        config["MemorySwap"] = resources.memory_bytes
    if resources.shm_bytes:
        config["ShmSize"] = resources.shm_bytes
    drivers = (info.get("Plugins") or {}).get("Log") or ()
    if driver := next((name for name in KEPT_LOG if name in drivers), None):
        config["LogConfig"] = {"Type": driver, "Config": KEPT_LOG[driver]}
    return config


def _mounted(job: ContainerJob) -> tuple[Mount | StorageMount, ...]:
    return (*job.mounts, *job.storages)


def _mount(source: str, target: str, *, read_only: bool) -> dict[str, Any]:
    mount: dict[str, Any] = {"Source": source, "Target": target, "ReadOnly": read_only}
    # The engine would fill an empty volume with what the image has there.
    return mount | ({"Type": "bind"} if source.startswith("/") else {"Type": "volume", "VolumeOptions": {"NoCopy": True}})


def _device_requests(resources: Resources) -> list[dict[str, Any]]:
    if not resources.gpus:
        return []
    return [{"Count": -1 if resources.gpus == "all" else resources.gpus, "Capabilities": [["gpu"]]}]


def not_enforced(info: Mapping[str, Any]) -> tuple[str, ...]:
    """The limits that the engine cannot hold a container to, as far as it says.

    On cgroup v1 only root may set limits. A rootless dockerd says so here, and repeats the limits of a container as if
    they were in force; a rootless Podman says here that it has them all, and drops them from each container.
    """
    limits = {"MemoryLimit": "memory", "CpuCfsQuota": "cpus", "PidsLimit": "pids"}
    powerless = _rootless(info) and not _cgroup_v2(info)
    return tuple(word for key, word in limits.items() if powerless or info.get(key) is False)


def how_to_enforce(info: Mapping[str, Any]) -> str:
    """Why an engine may not hold a container to its limits, and what to change on its machine."""
    if not _rootless(info):
        return (
            "Its machine has the cgroup controllers switched off, or not mounted: /proc/cgroups and /sys/fs/cgroup show "
            "which. Boot with cgroup_enable=memory on the kernel's command line, or mount them, and restart the engine."
        )
    if not _cgroup_v2(info):
        return (
            "It runs rootless on cgroup v1, where only root may set limits. Use an engine that runs as root, or boot its "
            "machine with cgroup v2 (systemd.unified_cgroup_hierarchy=1 on the kernel's command line)."
        )
    return HOW_TO_DELEGATE


def _rootless(info: Mapping[str, Any]) -> bool:
    # Docker's word is a security option, Podman's a field of its own.
    return bool(info.get("Rootless")) or "name=rootless" in (info.get("SecurityOptions") or ())


def _cgroup_v2(info: Mapping[str, Any]) -> bool:
    return str(info.get("CgroupVersion", 1)) == "2"


def is_podman(info: Mapping[str, Any]) -> bool:
    """Is it Podman's service behind Docker's API?"""
    return "BuildahVersion" in info


def gpu_support(info: Mapping[str, Any]) -> str | None:
    """By what way the engine hands out GPUs, as far as it says; `None` when it has none."""
    if "nvidia" in (info.get("Runtimes") or {}):
        return "the nvidia runtime"
    devices = [d for d in info.get("DiscoveredDevices") or () if "nvidia" in str(d.get("ID", "")).lower()]
    if devices:
        return f"{len(devices)} CDI devices"
    # Docker also takes the hook alone, without a configured runtime; only its own machine can tell.
    return "nvidia-container-runtime-hook" if shutil.which("nvidia-container-runtime-hook") else None


def gpu_count(info: Mapping[str, Any]) -> int:
    """How many GPUs the engine can hand out, as far as it, or the driver of this machine, says; 1 where neither counts."""
    if gpu_support(info) is None:
        return 0
    names = [str(device.get("ID", "")).rpartition("=")[2] for device in info.get("DiscoveredDevices") or ()]
    listed = sum(name.isdigit() for name in names) or len(info.get("GenericResources") or ())
    return listed or len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or 1


def refuse_unenforced(info: Mapping[str, Any]) -> None:
    """Return if the engine can hold a container to its limits.

    Swap is not asked for: where the kernel cannot count it, memory itself is still limited.

    Raises:
        UnsupportedByEngine: it says that it cannot; the message names the limits, and what to change on its machine.
    """
    missing = not_enforced(info)
    if missing:
        raise UnsupportedByEngine(
            f"The container engine cannot limit {' and '.join(missing)}, and no algorithm runs without limits. "
            f"{how_to_enforce(info)}"
        )


def refuse_warnings(name: str, warnings: list[str] | None) -> None:
    """Return if the engine created the container as asked.

    Raises:
        UnsupportedByEngine: it says that it dropped a limit.
    """
    dropped = [w for w in warnings or () if _DISCARDED.search(w)]
    if dropped:
        raise UnsupportedByEngine(
            f"The engine created {name} without all of its limits, so it was removed. It said: {' '.join(dropped)}"
        )


def filters_system_calls(info: Mapping[str, Any]) -> bool:
    """Does the engine give its containers a seccomp profile, by what it says of itself?"""
    said = [option for option in info.get("SecurityOptions") or () if "seccomp" in option]
    return any("unconfined" not in option for option in said)


def in_force(container: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, object]:
    """What the engine says about a created container, in this package's words."""
    host, config = container["HostConfig"], container["Config"]
    mounts = [
        {"source": m.get("Source"), "target": m["Destination"], "read_only": not m["RW"]}
        for m in container.get("Mounts") or ()
        if m.get("Type") in (None, "bind") or not m["RW"]
    ]
    cpus = (
        host.get("NanoCpus") / 1e9 if host.get("NanoCpus") else (host.get("CpuQuota") or 0) / (host.get("CpuPeriod") or 100_000)
    )
    return {
        "engine": f"{info.get('OSType', 'linux')} engine {info.get('ServerVersion', 'of unknown version')}",
        "engine_security": list(info.get("SecurityOptions") or ()),
        "system_calls_filtered": filters_system_calls(info),
        "container": container["Id"],
        "image": container["Image"],
        "user": config.get("User") or "",
        "working_dir": config.get("WorkingDir") or "",
        "network": host.get("NetworkMode"),
        "privileged": bool(host.get("Privileged")),
        "capabilities_dropped": list(host.get("CapDrop") or ()),
        "capabilities_added": list(host.get("CapAdd") or ()),
        "security_options": list(host.get("SecurityOpt") or ()),
        "read_only_root": bool(host.get("ReadonlyRootfs")),
        "tmpfs": dict(host.get("Tmpfs") or {}),
        "init": bool(host.get("Init")),
        "pids": host.get("PidsLimit"),
        "memory_bytes": host.get("Memory"),
        "memory_and_swap_bytes": host.get("MemorySwap"),
        "oom_kill_disabled": bool(host.get("OomKillDisable")),
        "cpus": cpus,
        "shm_bytes": host.get("ShmSize"),
        "gpus": list(host.get("DeviceRequests") or ()),
        "runtime": host.get("Runtime"),
        "cgroup_parent": host.get("CgroupParent") or "",
        "log_driver": (host.get("LogConfig") or {}).get("Type"),
        "mounts": sorted(mounts, key=lambda m: str(m["target"])),
        "volumes": sorted(m["Destination"] for m in container.get("Mounts") or () if m.get("Type") == "volume" and m["RW"]),
    }


def looser_than_asked(job: ContainerJob, force: Mapping[str, Any], info: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of what is less strict in force than the job asks for; empty when all is well."""
    resources, sandbox = job.resources, job.sandbox
    dropped = {c.removeprefix("CAP_") for c in force["capabilities_dropped"]}
    added = {c.removeprefix("CAP_") for c in force["capabilities_added"]}
    asked = {c.removeprefix("CAP_") for c in sandbox.capabilities}
    read_only = {m["target"] for m in force["mounts"] if m["read_only"]}
    storages = {m.target for m in job.storages if not m.read_only}
    checks = {
        "network": sandbox.network or force["network"] == "none",
        "privileged": not force["privileged"],
        "capabilities": added <= asked and ("ALL" in dropped or dropped | asked >= _DEFAULT_CAPABILITIES),
        "no-new-privileges": sandbox.new_privileges
        or any(o.startswith("no-new-privileges") for o in force["security_options"]),
        "read-only root": sandbox.writable_root or (force["read_only_root"] and set(force["volumes"]) <= storages),
        "memory": force["memory_bytes"] == resources.memory_bytes and not force["oom_kill_disabled"],
        "swap": not info.get("SwapLimit") or force["memory_and_swap_bytes"] == resources.memory_bytes,
        "pids": force["pids"] == resources.pids,
        "cpus": abs(force["cpus"] - resources.cpus) < 1e-3 * max(1.0, resources.cpus),
        "read-only mounts": all(m.target in read_only for m in _mounted(job) if m.read_only),
    }
    return tuple(name for name, holds in checks.items() if not holds)
