"""Podman's service instead of Docker's: the same promises and the same tests, and what is its own written out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import docker
import pytest

from oasis_flows.engines.docker import DockerEngine
from oasis_flows.errors import DescriptionError
from oasis_flows.job import ContainerExit, ContainerJob, Reason, Resources
from tests.contract import test_docker_engine, test_engine
from tests.contract.test_engine import Log, Program, apart, patience
from tests.images import shell_image
from tests.servers.podman import podman_service

__all__ = ["apart", "patience"]

MIB = 1 << 20
Make = Callable[..., ContainerJob]
Sh = Callable[..., tuple[ContainerExit, Log]]


@pytest.fixture(scope="module")
def podman() -> Iterator[str]:
    with podman_service() as host:
        yield host


@pytest.fixture(autouse=True)
def _podman_is_the_engine(podman: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of processes that a test starts."""
    monkeypatch.setenv("DOCKER_HOST", podman)


@pytest.fixture(scope="module")
def docker_api(podman: str) -> Iterator[Any]:
    with contextlib.closing(docker.DockerClient(podman, version="auto")) as client:
        yield client.api


@pytest.fixture(scope="module")
def busybox(docker_api: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with shell_image(docker_api, tmp_path_factory.mktemp("image")) as name:
        yield name


@pytest.fixture
def docker_engine() -> DockerEngine:
    return DockerEngine()


@pytest.fixture
def sh(docker_engine: DockerEngine, make_job: Make) -> Sh:
    """Run a shell script in a container."""

    def run(script: str, **changes: Any) -> tuple[ContainerExit, Log]:
        log = Log()
        return docker_engine.run(make_job("sh", "-c", script, **changes), log), log

    return run


@pytest.fixture
def start(docker_engine: DockerEngine, make_job: Make) -> Callable[..., ContainerExit]:
    """Run a program of the promises."""

    def run(program: Program, log: Log, **changes: Any) -> ContainerExit:
        return docker_engine.run(make_job("sh", "-c", program.shell, **changes), log)

    return run


class TestPromises(test_engine.TestPromises):
    """All of them."""


class TestDeaths(test_docker_engine.TestDeaths):
    """All of them; its own flag says nothing of a death by memory (4.3), so these are the kernel's own word."""

    @pytest.mark.parametrize(
        ("command", "reason", "code"),
        [
            ("notacommand", Reason.COMMAND_NOT_FOUND, 1),
            ("/opt/noexec", Reason.NOT_EXECUTABLE, 1),
            ("/opt/elsewhere", Reason.EXEC_FORMAT, 127),
        ],
    )
    def test_a_command_that_cannot_start(
        self, docker_engine: DockerEngine, make_job: Make, command: str, reason: Reason, code: int
    ) -> None:
        super().test_a_command_that_cannot_start(docker_engine, make_job, command, reason, code)


class TestOwners:
    """One way to die with a chance to clean up, one without."""

    test_sigterm_leaves_nothing = test_docker_engine.TestOwners.test_sigterm_leaves_nothing
    test_after_sigkill_the_next_call_takes_it_up = test_docker_engine.TestOwners.test_after_sigkill_the_next_call_takes_it_up


class TestSandbox:
    test_pids_are_limited = test_docker_engine.TestSandbox.test_pids_are_limited

    def test_from_inside(self, sh: Sh) -> None:
        script = """
            grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | cut -f2
            touch /root-file /etc/x /sys/x 2>/dev/null; ls /root-file /etc/x /sys/x 2>/dev/null; ls /sys/class/net; id -u; id -g
            df -k /tmp | tail -1 | awk '{print $2}'; df -k /dev/shm | tail -1 | awk '{print $2}'
        """
        resources = Resources(memory_bytes=64 * MIB, tmp_bytes=8 * MIB, shm_bytes=16 * MIB, pids=50, cpus=0.5)
        ended, log = sh(script, resources=resources, user="1234:5678")
        nothing = "0" * 16
        assert log.text("stdout").decode().split() == [nothing, nothing, "1", "2", "lo", "1234", "5678", "8192", "16384"]
        assert {k: ended.in_force[k] for k in ("network", "read_only_root", "pids", "cpus", "user", "log_driver")} == {
            "network": "none",
            "read_only_root": True,
            "pids": 50,
            "cpus": 0.5,
            "user": "1234:5678",
            "log_driver": "json-file",  # so it calls its own k8s-file
        }
        assert ended.in_force["memory_bytes"] == ended.in_force["memory_and_swap_bytes"] == 64 * MIB

    def test_the_environment_has_two_names_more(self, sh: Sh) -> None:
        _, log = sh("env -0", environment={"A": "1"})
        names = {item.partition("=")[0] for item in log.text("stdout").decode().split("\0") if item}
        assert names - {"SHLVL", "PWD", "_"} == {"A", "FROM_IMAGE", "PATH", "HOME", "HOSTNAME", "TERM", "container"}


def test_the_log_is_exact(sh: Sh) -> None:
    test_docker_engine.TestLog().test_exact(sh)


def test_an_unknown_user_is_the_descriptions_fault(docker_engine: DockerEngine, make_job: Make) -> None:
    with pytest.raises(DescriptionError, match=r"unable to find user nosuchuser"):
        docker_engine.run(make_job("true", user="nosuchuser"), Log())
