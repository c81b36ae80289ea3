"""What engines and registries really said, and what it means. The constants are captured; Docker 20.10.24 where not said."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Literal

import docker.errors
import pytest
import requests
import urllib3

from oasis_flows.engines import docker_errors, docker_image, docker_spec
from oasis_flows.engines.docker_output import Delivery, Demultiplexer
from oasis_flows.engines.docker_verdict import Evidence, container_exit, parse_time, signal_name
from oasis_flows.engines.quota import Passed
from oasis_flows.engines.usage import Reading, Usage
from oasis_flows.errors import (
    DescriptionError,
    EngineError,
    EngineUnavailable,
    ImageDenied,
    ImageNotFound,
    NoGpu,
    OasisError,
    RegistryUnavailable,
    UnsupportedByEngine,
)
from oasis_flows.job import ContainerJob, Mount, Reason, Resources, Sandbox

MANIFEST_UNKNOWN = "manifest for 127.0.0.1:5000/bb:nope not found: manifest unknown: manifest unknown"
NO_CREDENTIALS = 'Head "http://127.0.0.1:5001/v2/bb/manifests/1": no basic auth credentials'
UNAUTHORIZED = "unauthorized: authentication required"
REFUSED = 'Get "http://127.0.0.1:5999/v2/": dial tcp 127.0.0.1:5999: connect: connection refused'
NO_HOST = 'Get "https://registry.invalid/v2/": dial tcp: lookup registry.invalid on 10.0.0.53:53: no such host'
UPPER = "invalid reference format: repository name must be lowercase"
BAD_NAME = "invalid reference format"
# From the Docker documentation and issue reports; the Docker Hub cannot be reached where these tests run.
HUB_DENIED = (
    "pull access denied for nosuch, repository does not exist or may require 'docker login': "
    "denied: requested access to the resource is denied"
)
HUB_LIMIT = (
    "toomanyrequests: You have reached your pull rate limit. You may increase the limit by authenticating and upgrading: "
    "https://www.docker.com/increase-rate-limit"
)
NO_PLATFORM = "no matching manifest for linux/arm64/v8 in the manifest list entries"
TIMEOUT = "net/http: request canceled while waiting for connection (Client.Timeout exceeded while awaiting headers)"
HUNG_UP = 'Get "http://127.0.0.1:33895/v2/": http: server closed idle connection'
HTTP_503 = "received unexpected HTTP status: 503 Service Unavailable"
FULL = "failed to register layer: Error processing tar file(exit status 1): write /opt/big: no space left on device"

PREFIX = "failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: "
NO_COMMAND = PREFIX + 'exec: "notacommand": executable file not found in $PATH: unknown'
NO_PERMISSION = PREFIX + 'exec: "/bin/noexec": permission denied: unknown'
FORMAT = PREFIX + "exec /bin/badfmt: exec format error: unknown"
NO_GPU = 'could not select device driver "" with capabilities: [[gpu]]'
NO_MOUNT = 'invalid mount config for type "bind": bind source path does not exist: /nonexist'
NO_USER = "unable to find user nobodyhere: no matching entries in passwd file"
RELATIVE = "the working directory 'rel' is invalid, it needs to be an absolute path"
FEW_CPUS = "Range of CPUs is from 0.01 to 2.00, as there are only 2 CPUs available"
STRANGE = "something that nobody has seen before"

TINI_MISSING = b"[FATAL tini (7)] exec notacommand failed: No such file or directory\n"
TINI_DENIED = b"[FATAL tini (7)] exec /bin/noexec failed: Permission denied\n"
TINI_FOLDER = b"[FATAL tini (8)] exec /bin failed: Permission denied\n"
SHELL_READS_A_PROGRAM = b"/bin/badfmt: line 1: \x7fELFgarbage: not found\n"
SHELL_MISSING = b"sh: nosuch: not found\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (MANIFEST_UNKNOWN, ImageNotFound),
        (NO_CREDENTIALS, ImageDenied),
        (UNAUTHORIZED, ImageDenied),
        (REFUSED, RegistryUnavailable),
        (NO_HOST, RegistryUnavailable),
        (UPPER, ImageNotFound),
        (BAD_NAME, ImageNotFound),
        (HUB_DENIED, ImageNotFound),
        (HUB_LIMIT, RegistryUnavailable),
        (NO_PLATFORM, UnsupportedByEngine),
        (TIMEOUT, RegistryUnavailable),
        (HUNG_UP, RegistryUnavailable),
        (HTTP_503, RegistryUnavailable),
        (FULL, EngineError),
        (STRANGE, EngineError),
    ],
)
def test_pull(words: str, error: type[OasisError]) -> None:
    found = docker_errors.pull_error("registry/image:1", words, with_login=False)
    assert type(found) is error
    assert found.transient is (error is RegistryUnavailable)
    assert words in str(found)


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        (NO_COMMAND, Reason.COMMAND_NOT_FOUND),
        (NO_PERMISSION, Reason.NOT_EXECUTABLE),
        (FORMAT, Reason.EXEC_FORMAT),
        (NO_GPU, NoGpu),
        (NO_MOUNT, EngineError),
        (NO_USER, DescriptionError),
        (RELATIVE, DescriptionError),
        (FEW_CPUS, UnsupportedByEngine),
        (STRANGE, EngineError),
    ],
)
def test_start(words: str, meaning: Reason | type[OasisError]) -> None:
    found = docker_errors.start_error("oasis-x-1", words, status=500)
    if isinstance(found, Reason):
        assert found is meaning
    else:
        assert type(found) is meaning
        assert not found.transient
        assert words in str(found)


@pytest.mark.parametrize(
    ("code", "stdout", "head", "reason"),
    [
        (127, 0, TINI_MISSING, Reason.COMMAND_NOT_FOUND),
        (126, 0, TINI_DENIED, Reason.NOT_EXECUTABLE),
        (126, 0, TINI_FOLDER, Reason.NOT_EXECUTABLE),
        (127, 0, SHELL_READS_A_PROGRAM, Reason.EXEC_FORMAT),
        (127, 0, SHELL_MISSING, None),
        (127, 3, TINI_MISSING, None),
        (1, 0, TINI_MISSING, None),
        (127, 0, TINI_MISSING + b"and more\n", None),
    ],
)
def test_init(code: int, stdout: int, head: bytes, reason: Reason | None) -> None:
    found = docker_errors.init_failure(code, stdout, head, len(head))
    assert (found[0] if found else None) is reason


def foreign_errors() -> list[Exception]:
    """One of every exception that the SDK defines, and of those that come through it."""
    response = requests.Response()
    response.status_code = 500
    made: list[Exception] = [requests.exceptions.ReadTimeout("slow"), requests.exceptions.ConnectionError("gone")]
    made += [
        urllib3.exceptions.ProtocolError("cut"),
        ConnectionResetError("reset"),
        BrokenPipeError("broken"),
        TimeoutError("late"),
    ]
    for kind in vars(docker.errors).values():
        if not (inspect.isclass(kind) and issubclass(kind, Exception)):
            continue
        if issubclass(kind, docker.errors.APIError):
            made.append(kind("failed", response=response, explanation="the engine's words"))
        elif kind is docker.errors.ContainerError:
            made.append(kind("c", 1, "x", "i", None))
        elif kind is docker.errors.BuildError:
            made.append(kind("reason", []))
        else:
            made.append(kind("said"))
    return made


@pytest.mark.parametrize("error", foreign_errors(), ids=lambda e: type(e).__name__)
def test_no_foreign_exception_gets_out(error: Exception) -> None:
    with pytest.raises(EngineError) as caught, docker_errors.translated("being tested"):
        raise error
    assert caught.value.__cause__ is error
    assert "being tested" in str(caught.value)


def test_all_kinds_are_tried() -> None:
    assert len(foreign_errors()) > 20


def test_a_silent_engine_is_transient() -> None:
    words = (
        "Error while fetching server API version: ('Connection aborted.', FileNotFoundError(2, 'No such file or directory'))"
    )
    with pytest.raises(EngineUnavailable), docker_errors.translated("connecting"):
        raise docker.errors.DockerException(words)


PASSED = Passed(Reason.TOO_MANY_FILES, 7)
JOB = ContainerJob(run_id="r", image="i", lease=Path("/l"), timeout_seconds=5, secret_environment={"K": "s3cret"})


@pytest.mark.parametrize(
    ("state", "more", "reason"),
    [
        ({"ExitCode": 0}, {}, Reason.OK),
        ({"ExitCode": 3}, {}, Reason.EXIT_NONZERO),
        ({"ExitCode": 137}, {}, Reason.KILLED),
        ({"ExitCode": 137, "OOMKilled": True}, {}, Reason.OUT_OF_MEMORY),
        ({"ExitCode": 0, "OOMKilled": True}, {}, Reason.OUT_OF_MEMORY),
        ({"ExitCode": 137}, {"stopped_at_timeout": True}, Reason.TIMED_OUT),
        ({"ExitCode": 0}, {"stopped_at_timeout": True}, Reason.TIMED_OUT),
        ({"ExitCode": 0}, {"passed": PASSED}, Reason.TOO_MANY_FILES),
        ({"ExitCode": 3}, {"passed": PASSED}, Reason.TOO_MANY_FILES),
        ({"ExitCode": 137}, {"passed": PASSED}, Reason.TOO_MANY_FILES),
        ({"ExitCode": 137, "OOMKilled": True}, {"passed": PASSED}, Reason.OUT_OF_MEMORY),
        ({"ExitCode": 127}, {"stderr_head": TINI_MISSING, "stderr_bytes": len(TINI_MISSING)}, Reason.COMMAND_NOT_FOUND),
        ({"ExitCode": 127}, {"stderr_head": SHELL_MISSING, "stderr_bytes": len(SHELL_MISSING)}, Reason.EXIT_NONZERO),
    ],
)
def test_verdict(state: dict[str, object], more: dict[str, object], reason: Reason) -> None:
    ended = container_exit(JOB, Evidence(state=state, in_force={}, **more))  # type: ignore[arg-type]
    assert (ended.reason, ended.exit_code) == (reason, state["ExitCode"])
    assert ended.limit_passed == (7 if reason is Reason.TOO_MANY_FILES else None)


def test_at_death_by_memory_the_peak_is_the_limit_at_least() -> None:
    state = {"ExitCode": 137, "OOMKilled": True, "Error": "the engine's words"}
    usage = Usage()
    usage.add(0.1, Reading(cpu_seconds=0.1, memory_bytes=5, memory_peak_bytes=5))
    ended = container_exit(JOB, Evidence(state=state, in_force={}, usage=usage))
    assert ended.memory_peak_bytes == ended.memory_limit_bytes == 1 << 30
    assert "the engine's words" in ended.detail


@pytest.mark.parametrize(("code", "name"), [(139, "ended by SIGSEGV"), (134, "ended by SIGABRT"), (1, ""), (255, "")])
def test_signal_name(code: int, name: str) -> None:
    assert signal_name(code) == name


def test_parse_time() -> None:
    told = parse_time("2026-11-21T08:00:01.123456789Z")
    assert told is not None
    assert told.isoformat() == "2026-11-21T08:00:01.123456+00:00"
    assert str(parse_time("2026-11-21T09:00:01+01:00")) == "2026-11-21 08:00:01+00:00"
    assert str(parse_time("2026-11-21T08:00:01.5Z")) == "2026-11-21 08:00:01.500000+00:00"
    assert parse_time("0001-01-01T00:00:00Z") is None
    assert parse_time("") is None


FRAMES = b"\1\0\0\0\0\0\0\3abc" + b"\1\0\0\0\0\0\0\1d" + b"\2\0\0\0\0\0\0\2ef" + b"\1\0\0\0\0\0\0\0" + b"\1\0\0\0\0\0\0\1g"


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 1000])
def test_frames_in_pieces_of_any_size(size: int) -> None:
    split, kept = Demultiplexer(), {"stdout": b"", "stderr": b""}
    for at in range(0, len(FRAMES), size):
        for stream, data in split.feed(FRAMES[at : at + size]):
            kept[stream] += data
    assert kept == {"stdout": b"abcdg", "stderr": b"ef"}


def test_neighbours_are_joined_and_order_is_kept() -> None:
    assert list(Demultiplexer().feed(FRAMES)) == [("stdout", b"abcd"), ("stderr", b"ef"), ("stdout", b"g")]


def test_a_completed_log_repeats_nothing() -> None:
    seen: list[tuple[str, bytes]] = []
    delivery = Delivery(lambda stream, data: seen.append((stream, data)))
    delivery.deliver("stdout", b"abc")
    delivery.complete([("stdout", b"ab"), ("stderr", b"e"), ("stdout", b"cd"), ("stdout", b"ef")])
    assert seen == [("stdout", b"abc"), ("stderr", b"e"), ("stdout", b"d"), ("stdout", b"ef")]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_log_is_cut_at_its_limit_wherever_it_comes_from(size: int) -> None:
    seen: list[bytes] = []
    delivery = Delivery(lambda stream, data: seen.append(data), 7)
    delivery.deliver("stdout", b"abc")
    whole = b"abcdefgh"
    delivery.complete(("stdout", whole[at : at + size]) for at in range(0, 7, size))
    assert (b"".join(seen), delivery.overflowed) == (whole[:7], size == 100 or 7 % size != 0)
    delivery.complete([("stdout", whole), ("stderr", b"x")])
    assert (b"".join(seen), delivery.overflowed) == (whole[:7], True)
    assert b"" not in seen


@pytest.mark.parametrize(
    ("reference", "digests", "expected"),
    [
        ("busybox", ["busybox@sha256:1"], "busybox@sha256:1"),
        ("docker.io/library/busybox:1.36", ["busybox@sha256:1"], "busybox@sha256:1"),
        ("localhost:5000/a/b:1", ["other/b@sha256:2", "localhost:5000/a/b@sha256:1"], "localhost:5000/a/b@sha256:1"),
        ("localhost:5000/b@sha256:1", ["localhost:5000/b@sha256:1"], "localhost:5000/b@sha256:1"),
        ("mine:1", ["other@sha256:2"], "sha256:id"),
        ("sha256:abc", ["other@sha256:2"], "sha256:id"),
    ],
)
def test_pinned(reference: str, digests: list[str], expected: str) -> None:
    assert docker_image.pinned(reference, digests, "sha256:id") == expected


@pytest.mark.parametrize(
    ("info", "image", "fits"),
    [
        ("x86_64", "amd64", True),
        ("amd64", "amd64", True),
        ("x86_64", "386", True),
        ("x86_64", "arm64", False),
        ("aarch64", "arm64", True),
        ("x86_64", "", True),
    ],
)
def test_platform(info: str, image: str, fits: bool) -> None:
    said = {"Architecture": info, "OSType": "linux"}
    if fits:
        docker_image.check_platform(said, "linux", image, DescriptionError, "It")
    else:
        with pytest.raises(DescriptionError, match=r"made for linux/arm64, and the engine runs linux/amd64"):
            docker_image.check_platform(said, "linux", image, DescriptionError, "It")


DISCARDED = "Your kernel does not support memory limit capabilities or the cgroup is not mounted. Limitation discarded."


def test_what_is_not_enforced_is_refused() -> None:
    docker_spec.refuse_unenforced({"MemoryLimit": True})
    with pytest.raises(UnsupportedByEngine, match=r"cannot limit memory and pids"):
        docker_spec.refuse_unenforced({"MemoryLimit": False, "PidsLimit": False, "CpuCfsQuota": True})
    docker_spec.refuse_warnings("c", None)
    with pytest.raises(UnsupportedByEngine, match=r"Limitation discarded"):
        docker_spec.refuse_warnings("c", [DISCARDED])


def test_body_and_name() -> None:
    body = docker_spec.create_body(JOB, {"SwapLimit": True}, {})
    assert body["Env"] == ["K=s3cret"]
    assert body["HostConfig"]["MemorySwap"] == body["HostConfig"]["Memory"] == 1 << 30
    assert "LogConfig" not in body["HostConfig"]
    assert "s3cret" not in str(body["Labels"]) + docker_spec.job_digest(JOB)
    odd = ContainerJob(run_id="ä b/../c", image="i", lease=Path("/l"), attempt=2)
    assert docker_spec.container_name(odd).startswith("oasis-b-..-c-")
    assert docker_spec.container_name(odd).endswith("-2")
    assert docker_spec.container_name(JOB) == "oasis-r-1"


def created(job: ContainerJob) -> dict[str, object]:
    """What an engine answers about a container that it made exactly as asked."""
    body = docker_spec.create_body(job, {"SwapLimit": True}, {})
    mounts = [
        {"Source": m["Source"], "Destination": m["Target"], "RW": not m["ReadOnly"]} for m in body["HostConfig"]["Mounts"]
    ]
    return {"Id": "c", "Image": "sha256:i", "HostConfig": body["HostConfig"], "Config": {"User": ""}, "Mounts": mounts}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, ()),
        ({"NetworkMode": "host"}, ("network",)),
        ({"Privileged": True}, ("privileged",)),
        ({"CapDrop": []}, ("capabilities",)),
        ({"CapAdd": ["SYS_ADMIN"]}, ("capabilities",)),
        ({"SecurityOpt": []}, ("no-new-privileges",)),
        ({"ReadonlyRootfs": False}, ("read-only root",)),
        ({"Memory": 0}, ("memory",)),
        ({"OomKillDisable": True}, ("memory",)),
        ({"MemorySwap": -1}, ("swap",)),
        ({"PidsLimit": 0}, ("pids",)),
        ({"NanoCpus": 0}, ("cpus",)),
        ({"NanoCpus": 0, "CpuQuota": 100_000, "CpuPeriod": 100_000}, ()),
    ],
)
def test_looser_than_asked(change: dict[str, object], named: tuple[str, ...]) -> None:
    seen = created(JOB)
    seen["HostConfig"] = {**seen["HostConfig"], **change}  # type: ignore[dict-item]
    info = {"SwapLimit": True}
    assert docker_spec.looser_than_asked(JOB, docker_spec.in_force(seen, info), info) == named


# Docker 20.10, 23 and newer, with --seccomp-profile=unconfined, a kernel without seccomp, Podman 4.3.
@pytest.mark.parametrize(
    ("options", "filtered"),
    [
        (["name=seccomp,profile=default"], True),
        (["name=apparmor", "name=seccomp,profile=builtin", "name=cgroupns"], True),
        (["name=apparmor", "name=seccomp,profile=unconfined", "name=cgroupns"], False),
        (["name=apparmor"], False),
        (["name=seccomp,profile=default", "name=rootless"], True),
    ],
)
def test_system_calls_filtered(options: list[str], filtered: bool) -> None:
    info = {"SecurityOptions": options}
    assert docker_spec.filters_system_calls(info) is filtered
    assert docker_spec.in_force(created(JOB), info)["system_calls_filtered"] is filtered


def test_a_writable_mount_that_should_not_be() -> None:
    job = ContainerJob(run_id="r", image="i", lease=Path("/l"), mounts=(Mount(source=Path("/s"), target="/t", read_only=True),))
    seen = created(job)
    assert docker_spec.looser_than_asked(job, docker_spec.in_force(seen, {}), {}) == ()
    seen["Mounts"][0]["RW"] = True  # type: ignore[index]
    assert docker_spec.looser_than_asked(job, docker_spec.in_force(seen, {}), {}) == ("read-only mounts",)


def test_a_volume_of_the_image_is_in_memory_unless_the_root_is_writable() -> None:
    image = {"Config": {"Volumes": {"/data/": {}, "/tmp": {}, "/out": {}}}}
    job = ContainerJob(
        run_id="r", image="i", lease=Path("/l"), mounts=(Mount(source=Path("/x"), target="/out", read_only=False),)
    )
    host = docker_spec.create_body(job, {}, image)["HostConfig"]
    assert list(host["Tmpfs"]) == ["/data", "/tmp"]
    opened = replace(job, sandbox=Sandbox(writable_root=True))
    assert list(docker_spec.create_body(opened, {}, image)["HostConfig"]["Tmpfs"]) == ["/tmp"]


def test_a_volume_that_the_engine_added_is_looser() -> None:
    seen = created(JOB)
    seen["Mounts"] = [{"Type": "volume", "Source": "/v", "Destination": "/data", "RW": True}]
    assert docker_spec.looser_than_asked(JOB, docker_spec.in_force(seen, {"SwapLimit": True}), {"SwapLimit": True}) == (
        "read-only root",
    )


def test_what_was_opened_is_not_looser() -> None:
    sandbox = Sandbox(network=True, writable_root=True, new_privileges=True, capabilities=("NET_RAW",))
    job = ContainerJob(run_id="r", image="i", lease=Path("/l"), sandbox=sandbox, resources=Resources(gpus=2))
    seen = docker_spec.in_force(created(job), {})
    assert docker_spec.looser_than_asked(job, seen, {}) == ()
    assert seen["gpus"] == [{"Count": 2, "Capabilities": [["gpu"]]}]


@pytest.mark.parametrize(
    ("gpus", "requests"),
    [
        (0, []),
        (1, [{"Count": 1, "Capabilities": [["gpu"]]}]),
        (3, [{"Count": 3, "Capabilities": [["gpu"]]}]),
        ("all", [{"Count": -1, "Capabilities": [["gpu"]]}]),
    ],
)
def test_gpus_are_asked_for_as_device_requests(gpus: int | Literal["all"], requests: list[object]) -> None:
    job = ContainerJob(run_id="r", image="i", lease=Path("/l"), resources=Resources(gpus=gpus))
    assert docker_spec.create_body(job, {}, {})["HostConfig"]["DeviceRequests"] == requests


RUNC = {"io.containerd.runc.v2": {"path": "runc"}, "io.containerd.runtime.v1.linux": {"path": "runc"}, "runc": {"path": "runc"}}
# With what `nvidia-ctk runtime configure` writes, on a machine without a GPU: the engine does not look.
NVIDIA = {**RUNC, "nvidia": {"path": "/usr/bin/nvidia-container-runtime"}}
# From the Docker documentation: API 1.50, Docker 28.2 and newer.
CDI = [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}, {"Source": "cdi", "ID": "nvidia.com/gpu=all"}]
OTHER_CDI = [{"Source": "cdi", "ID": "vendor.example.com/nic=0"}]


@pytest.mark.parametrize(
    ("info", "way"),
    [
        ({"Runtimes": RUNC}, None),
        ({"Runtimes": NVIDIA}, "the nvidia runtime"),
        ({"Runtimes": RUNC, "DiscoveredDevices": CDI}, "2 CDI devices"),
        ({"Runtimes": RUNC, "DiscoveredDevices": OTHER_CDI}, None),
        ({"Runtimes": None, "DiscoveredDevices": None}, None),
    ],
)
def test_gpu_support(info: dict[str, object], way: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert docker_spec.gpu_support(info) == way


def test_gpu_support_by_the_hook_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hook = tmp_path / "nvidia-container-runtime-hook"
    hook.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert docker_spec.gpu_support({"Runtimes": RUNC}) == hook.name
