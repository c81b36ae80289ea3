"""What a container prints, on its way into the log."""

from __future__ import annotations

import hashlib
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from benchmarks.surroundings import IMAGE, container
from benchmarks.table import Row, Series
from oasis_flows import log
from oasis_flows.engines.docker import DockerEngine
from oasis_flows.job import ContainerJob, ImageSource, Resources

LINE = "x" * 999


def rows(folder: Path, *, quick: bool) -> Iterator[Row]:
    """One row: the rate beyond a container that prints nothing."""
    size = 100_000_000
    command = ("sh", "-c", f"yes {LINE} | head -c {size}")
    engine = DockerEngine()
    image = engine.prepare(ImageSource(image_id=IMAGE))
    ours, theirs, ours_idle, theirs_idle = (Series() for _ in range(4))
    wanted = hashlib.sha256((f"{LINE}\n" * (size // 1000)).encode()).hexdigest()
    whole = True

    def run_ours(*argv: str) -> None:
        job = ContainerJob(
            run_id=f"benchmark-{uuid.uuid4()}",
            attempt=1,
            lease=folder / "lease",
            image=image,
            command=argv,
            user=f"{os.getuid()}:{os.getgid()}",
            resources=Resources(cpus=1, memory_bytes=1 << 30, log_bytes=1 << 30),
        )
        with log.record(folder / "log.txt", lambda _: None) as sink:
            engine.run(job, sink)

    def run_theirs(*argv: str) -> None:
        with (folder / "theirs.txt").open("wb") as file:
            subprocess.run(container(*argv), stdout=file, check=True)

    for turn in range(3 if quick else 8):
        for series, idle, run in ((ours, ours_idle, run_ours), (theirs, theirs_idle, run_theirs)):
            (idle if turn else Series()).time(lambda run=run: run("true"))  # type: ignore[misc]
            (series if turn else Series()).time(lambda run=run: run(*command))  # type: ignore[misc]
        whole &= hashlib.sha256((folder / "log.txt").read_bytes()).hexdigest() == wanted
    rates = [size / 1e6 / (full.median - idle.median) for full, idle in ((ours, ours_idle), (theirs, theirs_idle))]
    yield Row(
        what="100 MB of container output into `log.txt`" + ("" if whole else ": NOT EVERY BYTE"),
        ours=f"{ours}; {rates[0]:.0f} MB/s",
        beside="`docker run` into a file: the engine's own attach rate",
        theirs=f"{theirs}; {rates[1]:.0f} MB/s",
        figure=f"{rates[0]:.0f} MB/s, {rates[0] / rates[1]:.0%} of the engine's",
        mark="≥ 100 MB/s, or the engine's rate",
        reached=whole and rates[0] >= min(100, rates[1]),
    )
