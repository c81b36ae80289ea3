"""`python -m benchmarks.memory_of SCENARIO FOLDER`: one run in a process of its own, which prints the most memory it ever had, in MiB.

Python functions are in the place of containers here: they make files and logs, and what is measured is what our side does with them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.engines.docker import DockerEngine
from oasis_flows.flows.algorithm_task import algorithm_task
from oasis_flows.job import ContainerJob, ImageSource, LogSink
from oasis_flows.machine import stand_in
from oasis_flows.testing import FakeEngine, host_path


def nothing(job: ContainerJob, log: LogSink) -> int:  # noqa: ARG001
    """A run that does what every run does."""
    return 0


def big_file(job: ContainerJob, log: LogSink) -> int:  # noqa: ARG001
    """A GiB in one file."""
    with (host_path(job, "/work/output") / "big").open("wb") as file:
        file.truncate(1 << 30)
    return 0


def huge_file(job: ContainerJob, log: LogSink) -> int:  # noqa: ARG001
    """Eight GiB in one file."""
    with (host_path(job, "/work/output") / "huge").open("wb") as file:
        file.truncate(8 << 30)
    return 0


def many_files(job: ContainerJob, log: LogSink) -> int:  # noqa: ARG001
    """As many files as are in the input."""
    source, target = host_path(job, "/work/input"), host_path(job, "/work/output")
    for folder in sorted(source.iterdir()):
        (target / folder.name).mkdir()
        for file in folder.iterdir():
            (target / folder.name / file.name).touch()
    return 0


def big_log(job: ContainerJob, log: LogSink) -> int:  # noqa: ARG001
    """900 MB of log, as fast as it is taken."""
    chunk = (b"y" * 99 + b"\n") * 2500
    for _ in range(3600):
        log("stdout", chunk)
    return 0


SCENARIOS: dict[str, Callable[[ContainerJob, LogSink], int]] = {
    "nothing": nothing,
    "big_file": big_file,
    "huge_file": huge_file,
    "many_files": many_files,
    "big_log": big_log,
}


def main(scenario: str, folder: Path) -> None:
    """Run it, and print the peak."""
    if scenario == "image_file":
        DockerEngine().prepare(ImageSource(image_file=str(folder / "image.tar")))
    else:
        image = DockerImage(image_id="nothing:1")
        algorithm = Algorithm(docker_image=image, max_output_size="16GiB", max_log_size="2GiB", max_output_files=1_000_000)
        target = DatasetStore(url=f"{folder}/out-{os.getpid()}")
        with stand_in(FakeEngine(SCENARIOS[scenario])):
            algorithm_task(algorithm, Dataset(url=str(folder / "in")), store=target)
    # `ru_maxrss` would be the parent's, where that had more.
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    print(int(peak) / 1024)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
