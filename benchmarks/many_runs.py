"""A hundred runs of a container that does nothing, two at a time in one process."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.surroundings import IMAGE, container, make_files
from benchmarks.table import Row, in_turns, speed
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.flows.algorithm_task import algorithm_task


def rows(folder: Path, *, quick: bool) -> Iterator[Row]:
    """One row."""
    count = 20 if quick else 100
    algorithm = Algorithm(docker_image=DockerImage(image_id=IMAGE), command="true", cpus=0.5)
    dataset = Dataset(url=str(make_files(folder / "in", 1, 1)))
    DatasetStore(url=str(folder / "out")).save("benchmark", overwrite=True)
    target = DatasetStore.load("benchmark")
    line = ["xargs", "-P2", "-I{}", *container("true", options=["--cpus=0.5"])]
    numbers = "\n".join(map(str, range(count)))

    def ours() -> None:
        with ThreadPoolExecutor(2) as two:
            for done in [two.submit(algorithm_task, algorithm, dataset, store=target) for _ in range(count)]:
                done.result()

    def theirs() -> None:
        subprocess.run(line, input=numbers, text=True, check=True, stdout=subprocess.DEVNULL)

    algorithm_task(algorithm, dataset, store=target)
    mine, bare = in_turns(1 if quick else 3, ours, theirs, warm_up=0)
    ratio = speed(mine, bare)
    yield Row(
        what=f"{count} such runs in one process, two at a time",
        ours=str(mine),
        beside="`xargs -P2 docker run`",
        theirs=str(bare),
        figure=f"{ratio:.0%} of its throughput",
        mark="≥ 75%",
        reached=ratio >= 0.75,
    )
