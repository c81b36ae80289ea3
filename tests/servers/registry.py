"""A real registry, Debian's docker-registry, on loopback, which every engine trusts without TLS."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from oasis_flows.job import RegistryLogin


@dataclass(frozen=True)
class Registry:
    """A running registry; `login` is what it asks for, or nothing."""

    address: str
    login: RegistryLogin | None

    def push(self, api: Any, image: str, name: str, tag: str = "1") -> str:
        """Push an image of the engine under `name:tag` and remove that name from the engine; return the reference."""
        reference = f"{self.address}/{name}"
        auth = {"username": self.login.username, "password": self.login.password} if self.login else None
        api.tag(image, reference, tag)
        for event in api.push(reference, tag, stream=True, decode=True, auth_config=auth):
            assert "error" not in event, event
        api.remove_image(f"{reference}:{tag}")
        return f"{reference}:{tag}"


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_registry(folder: Path, password: str | None = None) -> Iterator[Registry]:
    """A registry in `folder` for the time of the block; with a password, it demands the user `tester` and that."""
    port = free_port()
    parts = [
        "version: 0.1",
        "log: {level: warn, accesslog: {disabled: true}}",
        f"storage: {{filesystem: {{rootdirectory: {folder}/data}}}}",
        f"http: {{addr: 127.0.0.1:{port}, secret: tests}}",
    ]
    if password is not None:
        # The registry takes bcrypt hashes only.
        hashed = subprocess.run(
            ["htpasswd", "-niB", "tester"], input=password, text=True, check=True, capture_output=True
        ).stdout
        (folder / "htpasswd").write_text(hashed.strip() + "\n")
        parts.append(f"auth: {{htpasswd: {{realm: tests, path: {folder}/htpasswd}}}}")
    (folder / "config.yml").write_text("\n".join(parts))
    # REGISTRY_* and OTEL_* variables would be taken for configuration.
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", folder / "config.yml"], env=environment, stdout=log, stderr=log)
    try:
        wait_for(port, process)
        login = RegistryLogin(registry=f"127.0.0.1:{port}", username="tester", password=password) if password else None
        yield Registry(f"127.0.0.1:{port}", login)
    finally:
        process.terminate()
        process.wait(10)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Return once the registry takes connections."""
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
            return
        assert process.poll() is None, "docker-registry ended"
        time.sleep(0.05)
    raise AssertionError("docker-registry does not answer")


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that anybody may read and write."""
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="session")
def private_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that demands a login."""
    with running_registry(tmp_path_factory.mktemp("private-registry"), "s3cret of the registry") as running:
        yield running
