"""How much is in the folders that a container writes to."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from oasis_flows.engines import quota
from oasis_flows.engines.quota import Passed, Usage, Watch, measure
from oasis_flows.job import ContainerJob, Mount, Reason, Resources

FREE = Resources()


def test_names_of_every_kind_count_and_bytes_of_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x" * 10)
    (tmp_path / "folder" / "empty").touch()
    (tmp_path / "link").symlink_to("/")
    (tmp_path / "loop").symlink_to(".")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder" / ("n" * 255)).touch()
    (tmp_path / os.fsdecode(b"-\xff\n")).write_bytes(b"y")

    assert measure([tmp_path], FREE) == Usage(bytes=11, files=8)


def test_holes_count_and_a_file_of_two_names_counts_once(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "again").hardlink_to(tmp_path / "sparse")

    assert measure([tmp_path], FREE) == Usage(bytes=1 << 40, files=2)


def test_several_folders_and_single_files_add_up(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"12345")

    assert measure([tmp_path / "a", tmp_path / "b" / "file", tmp_path / "gone"], FREE) == Usage(bytes=10, files=2)


def test_no_depth_hides_anything_and_few_descriptors_do(tmp_path: Path) -> None:
    inner = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d" * 100, dir_fd=inner)
        outer, inner = inner, os.open("d" * 100, os.O_RDONLY, dir_fd=inner)
        os.close(outer)
    with open(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=inner), "wb") as file:  # noqa: PTH123
        file.write(b"deep")
    os.close(inner)
    (tmp_path / "shallow").write_bytes(b"12345678")
    before = len(list(Path("/proc/self/fd").iterdir()))

    try:
        assert measure([tmp_path], FREE) == Usage(bytes=12, files=1502)
    finally:
        subprocess.run(["rm", "-rf", tmp_path / ("d" * 100)], check=True)  # pytest's own way does not go so deep
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_it_counts_no_further_than_the_limit(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / str(number)).write_bytes(b"x" * 100)

    assert measure([tmp_path], Resources(output_files=10)).files == 11
    assert measure([tmp_path], Resources(output_bytes=1000)).bytes == 1100
    assert (
        measure([tmp_path], Resources(output_files=50, output_bytes=5000)).over(Resources(output_files=50, output_bytes=5000))
        is None
    )


def test_what_vanishes_meanwhile_harms_nobody(tmp_path: Path) -> None:
    until = time.monotonic() + 1

    def churn() -> None:
        number = 0
        while time.monotonic() < until:
            number += 1
            folder = tmp_path / f"f{number % 7}" / "g"
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True)
                (folder / "file").touch()
                (folder / "file").unlink()
                (tmp_path / f"f{(number - 3) % 7}").rename(tmp_path / f"f{(number - 3) % 7}" / ".." / f"moved{number}")
                folder.rmdir()

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    before, looks = len(list(Path("/proc/self/fd").iterdir())), 0
    while time.monotonic() < until:
        assert measure([tmp_path], FREE).bytes == 0
        looks += 1
    for thread in threads:
        thread.join()
    assert looks > 10
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def job(folder: Path, **limits: int) -> ContainerJob:
    mounts = (Mount(source=folder, target="/o", read_only=False), Mount(source=Path("/usr"), target="/i", read_only=True))
    return ContainerJob(run_id="r", image="i", lease=folder / "l", mounts=mounts, resources=Resources(**limits))


def test_a_limit_is_seen_while_it_is_passed_and_at_the_end(tmp_path: Path) -> None:
    with Watch(job(tmp_path, output_bytes=100)) as watch:
        (tmp_path / "a").write_bytes(b"x" * 100)
        assert watch.at_end() is None
    with Watch(job(tmp_path, output_bytes=100)) as watch:
        (tmp_path / "b").write_bytes(b"x")
        until = time.monotonic() + 5
        while watch.passed is None and time.monotonic() < until:
            time.sleep(0.01)
        assert watch.passed == watch.at_end() == Passed(Reason.OUTPUT_TOO_LARGE, 100)
    with Watch(job(tmp_path, output_files=1)) as watch:
        assert watch.at_end() == Passed(Reason.TOO_MANY_FILES, 1)


def test_a_big_output_costs_little_of_the_time(tmp_path: Path) -> None:
    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        for file in range(1000):
            (tmp_path / str(folder) / str(file)).touch()
    used = time.process_time()
    with Watch(job(tmp_path, output_files=1_000_000)):
        time.sleep(4)
    # A twentieth of the time for names and one for sizes, and the first look of each, which nothing precedes.
    assert time.process_time() - used < 0.15 * 4


def test_names_are_counted_while_sizes_are_added_up_however_long_that_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    def slow(folders: list[Path], limits: Resources, go_on: Callable[[], bool]) -> Usage:
        begun.set()
        while go_on():
            time.sleep(0.001)
        return Usage()

    monkeypatch.setattr(quota, "measure", slow)
    with Watch(job(tmp_path, output_files=100, output_bytes=1 << 40)) as watch:
        assert begun.wait(10)
        for number in range(101):
            (tmp_path / str(number)).touch()
        until = time.monotonic() + 10
        while watch.passed is None and time.monotonic() < until:
            time.sleep(0.01)
        assert watch.passed == Passed(Reason.TOO_MANY_FILES, 100)


def test_to_be_too_many_no_file_is_asked_for_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(101):
        (tmp_path / str(number)).touch()
    monkeypatch.delattr(quota, "measure")
    limits = Resources(output_files=100, output_bytes=1)

    assert quota.passed([tmp_path], limits) == Passed(Reason.TOO_MANY_FILES, 100)
    assert quota.count([tmp_path], Resources(output_files=101)) == Usage(0, 101)
