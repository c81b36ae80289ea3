"""`python -m benchmarks.batch`: what a batch costs beside the plainest way to do the same.

Three things: planning a million files, 200 shards of a container that does nothing beside `xargs -P2 docker run`, and the
bookkeeping of a thousand shards without containers. Each in a process of its own, so that its peak memory is its own. The table
is printed and written to `benchmarks/batch.md`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.__main__ import IMAGE, LIMITS, quiet_prefect
from oasis_flows import store
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.flows.batch import batch
from oasis_flows.machine import stand_in
from oasis_flows.sharding import by_bytes, weigh
from oasis_flows.store import Location
from oasis_flows.testing import FakeEngine

HERE = Path(__file__).parent
SHARDS = 200


def peak_mib() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def planning(folder: Path, count: int = 1_000_000) -> str:
    """From the manifest of a published dataset to shards, and the slices of ten of these."""
    dataset = folder / "large"
    dataset.mkdir()
    (dataset / "task.json").write_text('{"oasis_flows": 1}')
    digest = hashlib.sha256(b"").hexdigest()
    with (dataset / "manifest.jsonl").open("w") as manifest:
        manifest.writelines(
            f'{{"path":"{number // 1000:04}/{number:08}.jpg","bytes":{number * 7919 % 100_000},"sha256":"{digest}"}}\n'
            for number in range(count)
        )
    before, began, worked = peak_mib(), time.perf_counter(), time.process_time()
    listing = store.write_listing(store.scan(Location(str(dataset))), folder / "listing")
    layout = by_bytes(listing.sizes, 2000, file_count=listing.file_count, size_bytes=listing.size_bytes)
    weigh(layout, listing.sizes)
    worked = time.process_time() - worked
    seconds, began = time.perf_counter() - began, time.perf_counter()
    for index in range(0, 2000, 200):
        shard = layout[index]
        assert sum(1 for _ in store.read_slice(Location(str(folder / "listing")), shard.start, shard.end)) == shard.files  # noqa: S101
    lookup = (time.perf_counter() - began) / 10
    return f"| plan {count} files | {seconds:.1f} s, {worked:.1f} s of processor time | peak {peak_mib():.0f} MiB ({before:.0f} before) | a shard's files found in {1000 * lookup:.1f} ms |"


def containers(folder: Path) -> str:
    """Shards of a container that does nothing, two at once, beside the same containers started by xargs."""
    for number in range(SHARDS):
        (folder / "in" / f"{number:03}").mkdir(parents=True)
        (folder / "in" / f"{number:03}" / "file").write_text("x")
    image = DockerImage(image_id=IMAGE)
    algorithm = Algorithm(docker_image=image, command="true", cpus=0.5, memory="64MiB")
    dataset, target = Dataset(url=str(folder / "in")), DatasetStore(url=str(folder / "out"))
    limits = ["--cpus=0.5" if each.startswith("--cpus") else each for each in LIMITS]
    limits = [each.replace("=1g", "=64m") for each in limits]
    line = ["xargs", "-P2", "-I{}", "docker", "run", "--rm", *limits, IMAGE, "true"]
    numbers = "\n".join(map(str, range(SHARDS)))
    batch(algorithm, dataset, store=target, shards=4, max_parallel=2)
    ours, theirs = [], []
    for _ in range(2):
        began = time.perf_counter()
        batch(algorithm, dataset, store=target, files_per_shard=1, max_parallel=2)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        subprocess.run(line, input=numbers, text=True, check=True, stdout=subprocess.DEVNULL)
        theirs.append(time.perf_counter() - began)
    ratio = min(theirs) / min(ours)
    return f"| {SHARDS} shards, two at once | {min(ours):.1f} s | `xargs -P2 docker run`: {min(theirs):.1f} s | throughput {ratio:.0%} of theirs; peak {peak_mib():.0f} MiB |"


def bookkeeping(folder: Path, count: int) -> str:
    """Shards without containers: staging, publishing, task runs and ledger only."""
    (folder / "files").mkdir()
    for number in range(count):
        (folder / "files" / f"{number:05}").write_text("x")
    dataset, target = Dataset(url=str(folder / "files")), DatasetStore(url=str(folder / "books"))
    algorithm = Algorithm(docker_image=DockerImage(image_id="nothing"), cpus=0.5)
    before, began = peak_mib(), time.perf_counter()
    with stand_in(FakeEngine()):
        batch(algorithm, dataset, store=target, files_per_shard=1, max_parallel=2)
    seconds = time.perf_counter() - began
    return f"| {count} shards without containers | {seconds:.1f} s | {1000 * seconds / count:.1f} ms a shard, all its steps | peak {peak_mib():.0f} MiB ({before:.0f} before) |"


def ledger(folder: Path, count: int = 1000) -> str:
    """What the ledger alone costs: a record of each shard written, and all of them read again."""
    from oasis_flows.ledger import Ledger, Row
    from oasis_flows.schedule import Attempt, Ending, Schedule
    from oasis_flows.sharding import by_count

    layout = by_count(count, count)
    books, schedule = Ledger(Location(str(folder / "ledger"))), Schedule(layout, weigh(layout, [1] * count))
    began = time.perf_counter()
    while attempt := schedule.start(0.0):
        assert isinstance(attempt, Attempt)  # noqa: S101
        books.write(Row.of(attempt, Ending.DONE, seconds=1.0, url="somewhere"))
        schedule.ended(attempt, Ending.DONE, 0.0)
    assert sum(1 for _ in books.rows()) == count  # noqa: S101
    seconds = time.perf_counter() - began
    return (
        f"| ledger and schedule of {count} shards, in a folder | {seconds:.2f} s | {1000 * seconds / count:.2f} ms a shard | |"
    )


def main(which: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if which == "planning":
            print(planning(folder))
        elif which == "ledger":
            print(ledger(folder))
        else:
            with quiet_prefect(folder):
                print(containers(folder) if which == "containers" else bookkeeping(folder, int(which)))


def every() -> None:
    rows = []
    for which in ("planning", "ledger", "250", "1000", "containers"):
        done = subprocess.run([sys.executable, "-m", "benchmarks.batch", which], check=True, capture_output=True, text=True)
        rows.append(next(line for line in done.stdout.splitlines() if line.startswith("| ")))
        print(rows[-1], flush=True)
    machine = f"{platform.system()}, {os.cpu_count()} cpus, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    table = "| what | ours | | |\n|---|---|---|---|\n" + "\n".join(rows)
    (HERE / "batch.md").write_text(f"# Measured: batches\n\n{machine}\n\n{table}\n")


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) > 1 else every()
