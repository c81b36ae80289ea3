"""The bar of a long transfer: there on a terminal, moving, and gone at the end; nowhere else."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from oasis_flows import Algorithm, Dataset, DatasetStore, DockerImage
from tests.servers.faultproxy import Faults, between
from tests.servers.prefect import BIN, ROOT, PrefectServer
from tests.servers.s3 import S3Server

ANEW = "\r\x1b[K"


@dataclass(frozen=True)
class Ended:
    """What a command printed, and where it ended."""

    code: int
    out: str
    err: str

    @property
    def frames(self) -> list[str]:
        """What the line of the bar showed, one after the other."""
        return self.err.split(ANEW)[1:]


def typed(server: PrefectServer, *arguments: str, columns: int = 0) -> Ended:
    """Run a command whose stderr is a terminal, and read what it shows."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    with subprocess.Popen(
        [str(BIN / "oasis-flows"), *arguments],
        env=server.env,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=slave,
    ) as process:
        os.close(slave)
        shown = bytearray()
        try:
            while data := os.read(master, 65536):
                shown += data
        except OSError:
            pass  # EIO: the last process with this terminal has ended
        finally:
            os.close(master)
        out = process.stdout.read().decode() if process.stdout else ""
    return Ended(process.returncode, out, shown.decode())


def piped(server: PrefectServer, *arguments: str) -> Ended:
    """The same without a terminal."""
    done = server.run("oasis-flows", *arguments, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def far(prefect_server: PrefectServer, s3: S3Server, busybox: str) -> Iterator[None]:
    """A dataset and a store behind a slow line; the small files arrive before the large ones."""
    bucket = s3.new_bucket()
    for number in range(1, 13):
        s3.store(bucket, "letters").put(f"{number:02}.bin", bytes(number * 16_384))
    with between(int(s3.endpoint.rpartition(":")[2])) as line:
        line.set(Faults(bytes_per_second=200_000))
        options = s3.options | {"endpoint_url": f"http://127.0.0.1:{line.port}"}
        store = DatasetStore(url=f"s3://{bucket}/published", **options)
        store.save("far", overwrite=True)
        Dataset(url=f"s3://{bucket}/letters", store=store).save("far", overwrite=True)
        copies = Algorithm(docker_image=DockerImage(image_id=busybox), command=["sh", "-c", "cp input/* output/; echo copied"])
        copies.save("copies", overwrite=True)
        yield


def assert_moves_and_vanishes(frames: list[str], verb: str) -> None:
    """The bar grew, and the last thing on its line is nothing."""
    pattern = re.compile(rf"\[(#*) *\] (\d+)/12 files {verb}, (\d.*), \d.*/s")
    seen = [found for frame in frames if (found := pattern.fullmatch(frame))]
    files = [int(found[2]) for found in seen]

    assert files == sorted(files)
    assert 12 not in files
    assert len({(found[2], found[3]) for found in seen}) >= 3
    bars = [len(found[1]) for found in seen]
    assert bars == sorted(bars)
    assert bars[-1] <= 19
    assert frames[frames.index(seen[-1][0]) + 1] == ""


def test_a_copy_shows_a_bar_on_a_terminal_and_nothing_elsewhere(
    prefect_server: PrefectServer, far: None, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(3) as pool:
        wide = pool.submit(typed, prefect_server, "dataset", "get", "far", str(tmp_path / "wide"))
        narrow = pool.submit(typed, prefect_server, "dataset", "get", "far", str(tmp_path / "narrow"), columns=30)
        plain = pool.submit(piped, prefect_server, "dataset", "get", "far", str(tmp_path / "plain"))

    assert [ended.result().code for ended in (wide, narrow, plain)] == [0, 0, 0]
    assert wide.result().out == f"12 files, 1.2 MiB in {tmp_path / 'wide'}\n"
    assert_moves_and_vanishes(wide.result().frames, "copied")
    assert max(map(len, narrow.result().frames)) == 29
    assert plain.result().err == ""


def test_a_run_shows_a_bar_unless_the_log_is_shown(prefect_server: PrefectServer, far: None) -> None:
    run = ("run", "copies", "far", "--store", "far")
    with ThreadPoolExecutor(2) as pool:
        silent, followed = pool.submit(typed, prefect_server, *run), pool.submit(typed, prefect_server, *run, "--follow")

    assert silent.result().out.startswith("Succeeded (Completed)")
    for verb in ("staged", "published"):
        assert_moves_and_vanishes(silent.result().frames, verb)
    assert "".join(frame for frame in silent.result().frames if " files " not in frame) == ""
    assert followed.result().out.startswith("Succeeded (Completed)")
    assert "Beginning flow run" in followed.result().err
    assert followed.result().frames == []


def test_reading_a_folder_shows_how_much_was_found(prefect_server: PrefectServer, tmp_path: Path) -> None:
    for number in range(60):
        # Holes cost no disk, and their digests cost time.
        with (tmp_path / f"{number}.bin").open("wb") as file:
            file.truncate(16 << 20)
    ended = typed(prefect_server, "dataset", "add", "holes", str(tmp_path))

    assert ended.out == f"dataset/holes: 60 files, 960.0 MiB in {tmp_path}\n"
    assert any(re.fullmatch(r"\d+ files found, \d.*, \d.*/s", frame) for frame in ended.frames)
    assert ended.frames[-1] == ""
