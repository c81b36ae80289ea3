"""Datasets in local folders: staging, which copies nothing, and publishing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.surroundings import make_files, run
from benchmarks.table import Row, Series, faster, in_turns
from oasis_flows import store
from oasis_flows.store import Location


def rows(folder: Path, *, quick: bool) -> Iterator[Row]:
    """Staging, then publishing of few large files and of many small ones."""
    for count, size in ((1, 256 << 20), (2000, 4 << 10)) if quick else ((4, 1 << 30), (10_000, 4 << 10)):
        files = make_files(folder / "files", count, size)
        yield _staging(files, folder, count, size)
        yield _publishing(files, folder, count, size, 3)
        shutil.rmtree(files)


def _staging(files: Path, folder: Path, count: int, size: int) -> Row:
    workspace = folder / "staging"
    workspace.mkdir()
    series = Series()
    before = _written()
    series.time(lambda: store.stage(Location(str(files)), workspace))
    written = _written() - before
    place, _ = store.stage(Location(str(files)), workspace)
    manifest = (workspace / "input.jsonl").stat().st_size
    shutil.rmtree(workspace)
    # What is written is the manifest: a line for each file.
    copied = max(0, written - manifest)
    return Row(
        what=f"stage {_files(count, size)} from a local folder",
        ours=str(series),
        beside="a read-only mount of the folder itself",
        figure=f"{copied} B of data written, the same inodes" if place == files else "other inodes",
        mark="no bytes copied",
        reached=copied == 0 and place == files,
    )


def _publishing(files: Path, folder: Path, count: int, size: int, times: int) -> Row:
    log = folder / "log.txt"
    log.touch()
    published, copy, sums = folder / "published", folder / "copy", folder / "sums"

    def clear() -> None:
        shutil.rmtree(published, ignore_errors=True)
        shutil.rmtree(copy, ignore_errors=True)

    def ours() -> None:
        target = Location(str(published))
        store.publish(files, target, log=log, record=lambda _: b'{"oasis_flows": 1}', workspace=folder, commit=True)

    plain = f"cp -r {files} {copy} && find {copy} -type f -print0 | xargs -0 sha256sum > {sums}"
    mine, theirs = in_turns(times, ours, lambda: run("sh", "-c", plain), warm_up=0, before=clear)
    clear()
    return faster(f"publish {_files(count, size)} to a folder", mine, [("`cp -r` and `sha256sum`", theirs)], 0.9)


def _files(count: int, size: int) -> str:
    return f"{count} × {size >> 20} MiB" if size >= 1 << 20 else f"{count} × {size >> 10} KiB"


def _written() -> int:
    """Bytes that this process has handed to any write so far."""
    found = re.search(r"^wchar: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None  # noqa: S101
    return int(found[1])
