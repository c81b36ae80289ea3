"""The memory of a run's process, beyond that of one that does nothing."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.surroundings import ROOT
from benchmarks.table import Row
from oasis_flows.engines.docker import connect
from tests.images import TinyImage, docker_archive, layer


def rows(folder: Path, *, quick: bool) -> Iterator[Row]:
    """A row for each thing that can be large."""
    _inputs(folder / "in", 1)
    floor = [_peak("nothing", folder) for _ in range(1 if quick else 3)]
    large = "big_file" if quick else "huge_file"
    yield _row(f"a run with an output file of {1 if quick else 8} GiB", _peak(large, folder), floor)
    yield _row("a run with 900 MB of log", _peak("big_log", folder), floor)
    count = 10_000 if quick else 100_000
    _inputs(folder / "in", count)
    yield _row(f"a run with {count} files in and out", _peak("many_files", folder), floor)
    shutil.rmtree(folder / "in")
    if not quick:
        yield from _image_files(folder)


def _image_files(folder: Path) -> Iterator[Row]:
    peaks = {}
    for mebibytes in (1, 1024):
        # Holes are not written here; the engine writes the zeros.
        image = TinyImage(layers=(layer({"content": (0o644, bytes(mebibytes << 20))}),), config={"Cmd": [f"{os.getpid()}"]})
        docker_archive(folder / "image.tar", image)
        del image
        before = _ids()
        peaks[mebibytes] = _peak("image_file", folder)
        for new in _ids() - before:
            subprocess.run(["docker", "rmi", "--force", new], capture_output=True, check=False)
        (folder / "image.tar").unlink()
    yield _row("an image file of 1 GiB loaded", peaks[1024], [peaks[1]])


def _ids() -> set[str]:
    client = connect()
    try:
        return {
            str(tag)
            for image in client.api.images()
            for tag in image["RepoTags"] or ()
            if tag.startswith("oasis-flows/image-file:")
        }
    finally:
        client.close()


def _row(what: str, peak: float, floor: list[float]) -> Row:
    least = statistics.median(floor)
    return Row(
        what=f"memory: {what}",
        ours=f"{peak:.0f} MiB at most",
        beside="the same process with next to nothing",
        theirs=f"{least:.0f} MiB ({min(floor):.0f}–{max(floor):.0f})",
        figure=f"{peak - least:+.0f} MiB",
        mark="≤ 64 MiB more",
        reached=peak - least <= 64,
    )


def _peak(scenario: str, folder: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.memory_of", scenario, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{scenario} failed: {done.stderr[-3000:]}")
    for made in folder.glob("out-*"):
        shutil.rmtree(made)
    return float(done.stdout.splitlines()[-1])


def _inputs(folder: Path, count: int) -> None:
    for number in range(count):
        file = folder / f"{number // 1000:04}" / f"{number:06}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
