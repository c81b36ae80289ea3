"""A hundred runs of a container that does nothing, two at a time in one process."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.one_run import prefects_own
from benchmarks.surroundings import IMAGE, container, make_files, run
from benchmarks.table import Row, in_turns, speed
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.flows.algorithm_task import algorithm_task


def rows(folder: Path, *, quick: bool) -> Iterator[Row]:
    """The row of the mark, and what Prefect itself leaves of the throughput."""
    count = 20 if quick else 100
    algorithm = Algorithm(docker_image=DockerImage(image_id=IMAGE), command="true", cpus=0.5)
    dataset = Dataset(url=str(make_files(folder / "in", 1, 1)))
    DatasetStore(url=str(folder / "out")).save("benchmark", overwrite=True)
    target = DatasetStore.load("benchmark")
    command = container("true", options=["--cpus=0.5"])
    numbers, four = "\n".join(map(str, range(count))), prefects_own()

    def two_at_a_time(once: Callable[[], object]) -> None:
        with ThreadPoolExecutor(2) as two:
            for done in [two.submit(once) for _ in range(count)]:
                done.result()

    def ours() -> None:
        algorithm_task(algorithm, dataset, store=target)

    def prefect() -> None:
        four()
        run(*command)

    def bare() -> None:
        subprocess.run(["xargs", "-P2", "-I{}", *command], input=numbers, text=True, check=True, stdout=subprocess.DEVNULL)

    ours()
    prefect()
    mine, least, plain = in_turns(
        1 if quick else 3, lambda: two_at_a_time(ours), lambda: two_at_a_time(prefect), bare, warm_up=0
    )
    ratio = speed(mine, plain)
    yield Row(
        what=f"{count} such runs in one process, two at a time",
        ours=str(mine),
        beside="`xargs -P2 docker run`",
        theirs=str(plain),
        figure=f"{ratio:.0%} of its throughput",
        mark="≥ 75%",
        reached=ratio >= 0.75,
    )
    yield Row(
        what="Prefect's own: a flow with four tasks that do nothing, and `docker run` behind it, as many",
        ours="",
        beside="Prefect",
        theirs=str(least),
        figure=f"{speed(least, plain):.0%} of the throughput of `xargs`",
    )
