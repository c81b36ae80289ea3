"""Docker engines for tests: the machine's own, and private ones that a test may stop and kill."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from oasis_flows import lease
from oasis_flows.engines import docker_spec
from oasis_flows.engines.docker import DockerEngine, connect
from oasis_flows.job import ContainerJob


@pytest.fixture(scope="session")
def docker_api() -> Iterator[Any]:
    """The low-level client of the machine's engine; fails where none answers."""
    with contextlib.closing(connect()) as client:
        yield client.api


@pytest.fixture(scope="session")
def docker_engine(docker_api: Any) -> DockerEngine:
    """The machine's engine."""
    return DockerEngine()


def containers_of(api: Any, run_id: str) -> list[dict[str, Any]]:
    """The containers of a run, ended ones included."""
    return list(api.containers(all=True, filters={"label": f"{docker_spec.RUN_ID}={run_id}"}))


@pytest.fixture
def make_job(docker_api: Any, busybox: str, tmp_path: Path) -> Iterator[Callable[..., ContainerJob]]:
    """Makes jobs with run ids of their own, their leases held; fails a test that leaves a container of one behind."""
    jobs: list[ContainerJob] = []
    with contextlib.ExitStack() as held:

        def make(*command: str, **changes: Any) -> ContainerJob:
            run_id = changes.pop("run_id", f"test-{uuid.uuid4().hex}")
            path = tmp_path / "leases" / run_id / "lease"
            if changes.pop("own", True) and not any(job.lease == path for job in jobs):
                held.enter_context(lease.hold(path))
            job = ContainerJob(**{"run_id": run_id, "image": busybox, "lease": path, "command": command or None, **changes})
            jobs.append(job)
            return job

        yield make
    left = [row for job in jobs for row in containers_of(docker_api, job.run_id)]
    for row in left:
        docker_api.remove_container(row["Id"], force=True)
    assert not left, f"left behind: {[(row['Names'], row['Status']) for row in left]}"


class PrivateEngine:
    """A dockerd of one's own in a folder: no bridge, so containers have no network but their own loopback.

    It sees a machine of cgroup v1 on which the controllers `without` are not mounted.
    """

    def __init__(self, folder: Path, *options: str, without: tuple[str, ...] = (), activated: bool = False) -> None:
        self.folder, self.options, self.without = folder, options, without
        self.host = f"unix://{folder}/docker.sock"
        self.socket: socket.socket | None = None
        if activated:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.bind(f"{folder}/docker.sock")
            self.socket.listen(64)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, again: bool = True) -> None:
        """Start it, once more if it ends (`again`), and return when it answers."""
        (self.folder / "docker.pid").unlink(missing_ok=True)
        # dockerd believes its containerd alive as long as the process of this number is there, be it a zombie's.
        number = self.folder / "run/containerd/containerd.pid"
        if number.exists() and not alive(int(number.read_text())):
            number.unlink()
        where = [
            "--host",
            "fd://" if self.socket else self.host,
            "--pidfile",
            f"{self.folder}/docker.pid",
            "--data-root",
            f"{self.folder}/data",
        ]
        alone = ["--exec-root", f"{self.folder}/run", "--bridge", "none", "--iptables=false", "--ip6tables=false"]
        with (self.folder / "log").open("ab") as log:
            # A dockerd without a bridge removes docker0 from its network namespace: it must not be the machine's. What is
            # unmounted in a mount namespace of one's own stays mounted elsewhere; but removing the empty folder then would
            # unmount it everywhere, for the folder is the machine's.
            unmounted = [f"/sys/fs/cgroup/{name}" for name in self.without]
            apart = ["unshare", "--net", "--mount", "sh", "-c", f'umount {" ".join(unmounted)} && exec "$@"', "sh"]
            command = [*(apart if unmounted else apart[:2]), "dockerd", *where, *alone, *self.options]
            if self.socket:
                # https://www.freedesktop.org/software/systemd/man/latest/sd_listen_fds.html
                handed = f"exec 3<&{self.socket.fileno()}; export LISTEN_FDS=1 LISTEN_PID=$$"
                command = ["bash", "-c", f'{handed}; exec "$@"', "bash", *command]
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[self.socket.fileno()] if self.socket else [],
            )
        for _ in range(600):
            with contextlib.suppress(docker.errors.DockerException), contextlib.closing(self.connect()):
                return None
            if self.process.poll() is not None:
                # On a machine that is busy it gives its own containerd up after ten seconds.
                assert again, (self.folder / "log").read_text()[-2000:]
                return self.start(again=False)
            time.sleep(0.05)
        raise AssertionError("dockerd does not answer")

    def connect(self) -> docker.DockerClient:
        """A client."""
        return docker.DockerClient(base_url=self.host, version="auto", timeout=30)

    def end(self, number: int = signal.SIGTERM) -> None:
        """Stop or kill the daemon; killed, it leaves its containers running."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(40)

    def load(self, archive: Path) -> None:
        """Load an image with its tags."""
        with contextlib.closing(self.connect()) as client, archive.open("rb") as file:
            list(client.api.load_image(file))


@contextlib.contextmanager
def private_engine(*options: str, without: tuple[str, ...] = (), activated: bool = False) -> Iterator[PrivateEngine]:
    """A private engine for the time of the block. A test may have stopped or killed it; nothing of it stays.

    One that is `activated` got its socket from somebody else, as from systemd, who goes on to listen when it has ended.
    """
    folder = Path(tempfile.mkdtemp(prefix="oasis-dockerd-"))  # a socket's path holds 107 bytes, pytest's folders may not fit
    engine = PrivateEngine(folder, *options, without=without, activated=activated)
    try:
        engine.start()
        yield engine
    finally:
        if engine.process is not None and engine.process.poll() is not None:
            engine.start()
        with contextlib.closing(engine.connect()) as client:
            for row in client.api.containers(all=True):
                client.api.remove_container(row["Id"], force=True)
        engine.end()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if line.split()[1].startswith(f"{folder}/"):
                subprocess.run(["umount", "-l", line.split()[1]], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def alive(pid: int) -> bool:
    """Does the process run? A zombie does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def eventually(holds: Callable[[], object], seconds: float = 10.0) -> None:
    """Return once `holds()` does; fail after `seconds`."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"still not so after {seconds} s: {holds}"
        time.sleep(0.02)
