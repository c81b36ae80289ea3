"""Podman's service, run by root in a folder of its own: a second engine behind Docker's API."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import docker

# Limits that a machine without CAP_SYS_RESOURCE can set; no systemd needed; Debian's crun knows no machine with both cgroup versions.
CONFIGURATION = """\
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
runtime = "runc"
"""


@contextlib.contextmanager
def podman_service() -> Iterator[str]:
    """The service's address, for the time of the block. Containers have no network but their own loopback."""
    folder = Path(tempfile.mkdtemp(prefix="oasis-podman-"))  # a socket's path holds 107 bytes, pytest's folders may not fit
    host = f"unix://{folder}/podman.sock"
    (folder / "containers.conf").write_text(CONFIGURATION)
    apart = ["--root", f"{folder}/root", "--runroot", f"{folder}/run", "--tmpdir", f"{folder}/tmp"]
    # In a mount namespace of its own it leaves no mounts; `env` also keeps the storage of the machine's own Podman out.
    command = ["unshare", "--net", "--mount", "env", f"CONTAINERS_CONF={folder}/containers.conf", "podman", *apart]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--storage-driver", "overlay", "system", "service", "--time", "0", host],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            start_new_session=True,
        )
    try:
        _wait_until_it_answers(host, process, folder / "log")
        yield host
    finally:
        with contextlib.suppress(docker.errors.DockerException), contextlib.closing(docker.DockerClient(host)) as client:
            for row in client.api.containers(all=True):
                client.api.remove_container(row["Id"], force=True)
        process.terminate()
        process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_answers(host: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        with contextlib.suppress(docker.errors.DockerException), contextlib.closing(docker.DockerClient(host, version="auto")):
            return
        assert process.poll() is None, log.read_text()[-2000:]
        time.sleep(0.05)
    raise AssertionError("Podman's service does not answer")
