"""What the measurements happen in: a Prefect server as the documentation starts it, an image, limits, and files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# It has to be imported before Prefect is.
from tests.servers import prefect as servers

# What runs log goes to the server, as ever, but not between the rows of the table.
os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"

ROOT = Path(__file__).parents[1]
IMAGE = "oasis-flows/co2-report:1"
LIMITS = [
    "--network=none",
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--pids-limit=1024",
    "--init",
    "--memory=1g",
    "--memory-swap=1g",
    "--cpus=1",
    "--tmpfs=/tmp",
    "--user=0:0",
]


@contextmanager
def quiet_prefect(folder: Path) -> Iterator[servers.PrefectServer]:
    """A Prefect server with the shipped settings on a database of its own, whose client this process is."""
    os.environ["OASIS_FLOWS_HOME"] = str(folder / "home")
    server = servers.PrefectServer(
        servers.PORT, servers.client_env(servers.PORT, servers.HOME, folder / "home"), folder / "home"
    )
    with servers.server_process(server, folder / "server.log"):
        yield server


def ensure_image() -> None:
    """Make the image unless it is there."""
    if subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True, check=False).returncode:
        subprocess.run([sys.executable, ROOT / "deployments/images/co2-report/build.py"], check=True)


def container(*command: str, options: Sequence[str] = ()) -> list[str]:
    """The command line of a bare container with the limits that an algorithm has by default."""
    return ["docker", "run", "--rm", *LIMITS, *options, IMAGE, *command]


def make_files(folder: Path, count: int, size: int) -> Path:
    """A folder of so many random files, a thousand to a folder."""
    for number in range(count):
        file = folder / f"{number // 1000}" / f"{number}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as content:
            for written in range(0, size, 1 << 20):
                content.write(os.urandom(min(size - written, 1 << 20)))
    return folder


def program(name: str) -> str | None:
    """Where a program is, if it is: on the PATH, or in a folder that BENCH_PATH names."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("BENCH_PATH", ""), os.environ["PATH"]]))


def run(*command: str | Path, **options: object) -> None:
    """Run a program quietly, to its good end."""
    done = subprocess.run([str(part) for part in command], capture_output=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]!r}")
