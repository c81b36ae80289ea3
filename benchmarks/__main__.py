"""`make bench`: how long the things take that people wait for, beside the plainest way to do the same.

Each row is measured in turns, ours and theirs, in one go: only the ratios mean something on a machine that does other things, too.
The table is printed and written to `benchmarks/results.md`.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from oasis_flows import store
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.flows.algorithm_task import algorithm_task
from oasis_flows.store import Location

HERE = Path(__file__).parent
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


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: seconds of ours and of theirs, run by run."""

    what: str
    theirs_is: str
    ours: list[float]
    theirs: list[float]

    def __str__(self) -> str:
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        spread = f"{min(self.ours):.2f}–{max(self.ours):.2f}"
        return f"| {self.what} | {ours:.2f} s ({spread}) | {self.theirs_is} | {theirs:.2f} s | {ours / theirs:.2f} | {ours - theirs:+.2f} s |"


def measure(what: str, theirs_is: str, ours: Callable[[], object], theirs: Callable[[], object], times: int) -> Row:
    """Time both in turns, after one turn that does not count."""
    row = Row(what, theirs_is, [], [])
    for turn in range(times + 1):
        for action, seconds in ((ours, row.ours), (theirs, row.theirs)):
            began = time.perf_counter()
            action()
            if turn:
                seconds.append(time.perf_counter() - began)
    print(row, flush=True)
    return row


def whole_run(folder: Path) -> Row:
    """One run of a container that does nothing, Prefect's part included."""
    (folder / "in").mkdir()
    (folder / "in" / "file").write_text("x")
    algorithm = Algorithm(docker_image=DockerImage(image_id=IMAGE), command="true")
    dataset, target = Dataset(url=str(folder / "in")), DatasetStore(url=str(folder / "out"))
    bare = ["docker", "run", "--rm", *LIMITS, IMAGE, "true"]
    return measure(
        "`algorithm_task` with the container `true`, warm process",
        "`docker run` with the same limits",
        lambda: algorithm_task(algorithm, dataset, store=target),
        lambda: subprocess.run(bare, check=True),
        9,
    )


def publishing(folder: Path, count: int, size: int) -> Row:
    """Files of a finished container to a local store, hashed."""
    output, log = folder / f"output-{count}", folder / "log.txt"
    for number in range(count):
        file = output / f"{number // 1000}" / f"{number}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as content:
            for _ in range(0, size, 1 << 20):
                content.write(os.urandom(min(size, 1 << 20)))
    log.touch()
    plain = f"rm -rf {folder}/copy && cp -r {output} {folder}/copy && find {folder}/copy -type f -print0 | xargs -0 sha256sum > {folder}/sums"

    def ours() -> None:
        target = Location(str(folder / "published"))
        store.publish(output, target, log=log, record=lambda _: b'{"oasis_flows": 1}', workspace=folder, commit=True)

    row = measure(
        f"publish {count} × {size >> 10} KiB to a folder",
        "`cp -r` and `sha256sum`",
        ours,
        lambda: subprocess.run(["sh", "-c", plain], check=True),
        3,
    )
    shutil.rmtree(output)
    return row


def help_text() -> Row:
    """What everybody types first."""
    command = [str(Path(sys.executable).with_name("oasis-flows")), "--help"]
    bare = [sys.executable, "-c", "import argparse"]
    return measure(
        "`oasis-flows --help`",
        "Python importing argparse",
        lambda: subprocess.run(command, check=True, capture_output=True),
        lambda: subprocess.run(bare, check=True),
        5,
    )


@contextmanager
def quiet_prefect(folder: Path) -> Iterator[None]:
    """A database of our own, on Prefect's temporary server."""
    os.environ["OASIS_FLOWS_HOME"] = str(folder / "home")
    from prefect.settings import PREFECT_LOGGING_LEVEL, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    quiet = {PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120, PREFECT_LOGGING_LEVEL: "ERROR"}
    with temporary_settings(quiet), prefect_test_harness(server_startup_timeout=120):
        yield


def main() -> None:
    with tempfile.TemporaryDirectory() as name, quiet_prefect(Path(name)):
        folder = Path(name)
        rows = [help_text(), whole_run(folder), publishing(folder, 10_000, 4 << 10), publishing(folder, 2, 512 << 20)]
    header = "| what | ours: median (spread) | beside it | median | ratio | difference |\n|---|---|---|---|---|---|"
    table = "\n".join([header, *map(str, rows)])
    machine = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}, {os.cpu_count()} cpus, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    (HERE / "results.md").write_text(
        f"# Measured\n\n{machine}\n\nOurs and theirs in turns, in one go; the first turn does not count.\n\n{table}\n"
    )
    print(f"\n{table}")


if __name__ == "__main__":
    main()
