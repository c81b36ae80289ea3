"""The dataset verbs, on every kind of store: a local folder, fsspec's memory, and a real S3 server."""

from __future__ import annotations

import gc
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import obstore
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from oasis_flows import store
from oasis_flows.errors import (
    ChecksumMismatch,
    DatasetChanged,
    DatasetError,
    DatasetNotFound,
    OasisError,
    StoreDenied,
    StoreFull,
    StoreUnavailable,
    UnsafeName,
)
from oasis_flows.manifest import Entry, Summary, parse
from oasis_flows.store import Location, objects, publishing
from oasis_flows.store.folder import Folder
from oasis_flows.store.journal import Journal
from oasis_flows.store.transfer import TRIED, files
from oasis_flows.store.verdicts import Missing
from tests.servers.faultproxy import FaultProxy, Faults, between
from tests.servers.s3 import S3Server

NAMES = {
    "hello.txt": b"DATA\n",
    "empty": b"",
    "with space/and more.bin": bytes(range(256)) * 5000,
    "new\nline.txt": b"newline",
    "tab\t\x01\x7f": b"control",
    "Ünïcödé/数据.txt": "数据".encode(),
    "e\u0301": b"NFD alone",
    "percent%20+&?#.txt": b"percent",
    "quote\"'\\<>|*.txt": b"quote",
    "d/" * 60 + "deep": b"deep",
    "foo/bar.txt": b"1",
    "foo/bar/baz.txt": b"3",
    "foo-bar": b"between",
    "big": os.urandom(6 << 20) + b"x",
}


def write_tree(folder: Path, content: Mapping[str, bytes]) -> Path:
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def record(summary: Summary) -> bytes:
    return json.dumps({"oasis_flows": 1, "output": {"manifest_digest": summary.digest}}).encode()


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.new_bucket()


@pytest.fixture
def s3_place(s3: S3Server, bucket: str) -> Location:
    return Location(f"s3://{bucket}/root/a dataset", s3.options)


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A folder, in each kind of store, that does not exist yet."""
    if request.param == "s3":
        return request.getfixturevalue("s3_place")
    if request.param == "memory":
        return Location(f"memory://{secrets.token_hex(8)}/a dataset")
    return Location(str(tmp_path / "store" / "a dataset"))


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Summary]:
    """Publish a tree, given as a mapping or a folder."""

    def run(place: Location, content: Mapping[str, bytes] | Path, *, commit: bool = True, **more: object) -> Summary:
        work = tmp_path / secrets.token_hex(4)
        output = content if isinstance(content, Path) else write_tree(work / "output", content)
        log = write_tree(work, {"log": b"HI\n"}) / "log"
        return store.publish(output, place, log=log, record=record, workspace=work, commit=commit, **more)  # type: ignore[arg-type]

    return run


def put_raw(place: Location, content: Mapping[str, bytes]) -> None:
    """Put files as a user would, with the outside world's tools."""
    if place.is_local:
        write_tree(Path(place.path), content)
    elif place.scheme == "memory":
        for name, data in content.items():
            fsspec.filesystem("memory").pipe_file(f"{place.path}/{name}", data)
    else:
        for name, data in content.items():
            files(place).write(name, [data], len(data))


# --- publish, look, bring back


def test_what_is_published_comes_back_byte_for_byte_under_the_same_names(
    place: Location, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    summary = publish(place, NAMES)
    assert (summary.file_count, summary.size_bytes) == (len(NAMES), sum(map(len, NAMES.values())))
    folder, staged = store.stage(place, tmp_path / "workspace")
    assert read_tree(folder) == NAMES
    assert staged == summary
    assert store.fetch_to(place, tmp_path / "copy") == summary
    assert read_tree(tmp_path / "copy") == NAMES
    listed = list(store.scan(place))
    assert [entry.path for entry in listed] == sorted(NAMES, key=str.encode)
    with (tmp_path / "workspace/input.jsonl").open("rb") as manifest:
        assert list(parse(manifest)) == listed


def test_a_published_dataset_has_log_record_and_manifest_beside_its_files(
    place: Location, publish: Callable[..., Summary]
) -> None:
    summary = publish(place, {"a": b"1"})
    known = store.published(place)
    assert known is not None
    assert known.record == {"oasis_flows": 1, "output": {"manifest_digest": summary.digest}}
    assert b"".join(store.read_file(place, store.LOG)) == b"HI\n"
    assert b"".join(store.read_file(place, store.LOG, tail=2)) == b"I\n"
    assert b"".join(store.read_file(place, store.LOG, start=1)) == b"I\n"
    assert b"".join(store.read_file(place, store.LOG, start=3)) == b""
    with pytest.raises(DatasetNotFound):
        list(store.read_file(place, "none.txt"))


def test_a_failed_runs_files_are_kept_and_are_no_dataset(
    place: Location, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    publish(place, {"partial": b"1"}, commit=False)
    for verb in (lambda: store.published(place), lambda: list(store.scan(place)), lambda: store.stage(place, tmp_path / "w")):
        with pytest.raises(DatasetNotFound, match=r"failed or has not finished.*log\.txt"):
            verb()
    assert b"".join(store.read_file(place, "data/partial")) == b"1"


def test_a_publish_that_breaks_half_way_is_no_dataset_and_a_retry_replaces_it(
    place: Location, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    publish(place, {"old": b"1", "both": b"1", "folder/old": b"1"})

    def fail(_: Summary) -> bytes:
        with pytest.raises(Missing):
            files(place).size(store.MANIFEST)
        raise KeyboardInterrupt

    output = write_tree(tmp_path / "output", {"new": b"2", "both": b"2"})
    more = {"log": tmp_path / "output/new", "workspace": tmp_path / "w", "commit": True}
    with pytest.raises(KeyboardInterrupt):
        store.publish(output, place, record=fail, **more)  # type: ignore[arg-type]
    with pytest.raises(DatasetNotFound):
        list(store.scan(place))
    store.publish(output, place, record=record, **more)  # type: ignore[arg-type]
    assert [entry.path for entry in store.scan(place)] == ["both", "new"]
    folder, _ = store.stage(place, tmp_path / "workspace")
    assert read_tree(folder) == {"new": b"2", "both": b"2"}


@pytest.mark.parametrize("at", ["progress", "record"])
def test_a_first_publish_that_is_broken_off_is_never_taken_for_a_folder_of_files(
    at: str, place: Location, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    def refused() -> None:
        for verb in (
            lambda: store.published(place),
            lambda: list(store.scan(place)),
            lambda: store.stage(place, tmp_path / "w"),
        ):
            with pytest.raises(DatasetNotFound, match="has not finished"):
                verb()

    def fail(*_: object) -> bytes:
        refused()
        raise KeyboardInterrupt

    output = write_tree(tmp_path / "output", {"a": b"1", "b": b"2"})
    with pytest.raises(KeyboardInterrupt):
        store.publish(
            output,
            place,
            log=output / "a",
            record=fail if at == "record" else record,
            workspace=tmp_path / "w",
            commit=True,
            progress=fail if at == "progress" else None,  # type: ignore[arg-type]
        )
    refused()
    publish(place, output)
    assert store.published(place) is not None
    assert [entry.path for entry in store.scan(place)] == ["a", "b"]


def test_an_output_of_no_files_is_a_dataset_but_no_input(
    place: Location, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    (tmp_path / "output/empty folder").mkdir(parents=True)
    assert publish(place, tmp_path / "output").file_count == 0
    assert store.published(place) is not None
    with pytest.raises(DatasetError, match="holds no files"):
        store.stage(place, tmp_path / "workspace")


def test_a_raw_folder_is_a_dataset_whatever_its_files_are_called(place: Location, tmp_path: Path) -> None:
    content = {"manifest.jsonl": b"mine", "task.json": b'{"mine": 1}', "data/x": b"1", "log.txt": b""}
    put_raw(place, content)
    assert store.published(place) is None
    assert [entry.path for entry in store.scan(place)] == ["data/x", "log.txt", "manifest.jsonl", "task.json"]
    folder, summary = store.stage(place, tmp_path / "workspace")
    assert read_tree(folder) == content
    assert summary.digest is not None


def test_nothing_there_is_said_so(place: Location, tmp_path: Path) -> None:
    for verb in (lambda: list(store.scan(place)), lambda: store.stage(place, tmp_path / "w")):
        with pytest.raises(DatasetNotFound, match="Check the address"):
            verb()
    assert store.published(place) is None


def test_a_file_in_the_place_of_a_folder_is_said_so(place: Location) -> None:
    put_raw(place, {"file.csv": b"1"})
    with pytest.raises(DatasetError, match="give the folder that it is in"):
        list(store.scan(place.child("file.csv")))


def test_a_place_that_can_be_written_is_left_as_it_was(place: Location) -> None:
    put_raw(place, {"a": b"1"})
    store.check_writable(place)
    assert [entry.path for entry in store.scan(place)] == ["a"]


@pytest.mark.parametrize("place", ["memory", "s3"], indirect=True)
def test_what_a_process_leaves_that_is_killed_while_it_tries_is_taken_by_the_next(
    place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(files(place)), "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            store.check_writable(place)

    assert [entry.path for entry in store.scan(place)] == [TRIED]
    put_raw(place, {"a": b"1"})
    store.check_writable(place)
    assert [entry.path for entry in store.scan(place)] == ["a"]


@pytest.mark.parametrize("written", ["task.json", "data/deep/down", "log.txt", "manifest.jsonl"])
@pytest.mark.parametrize("then", ["published again", "forgotten"])
def test_what_a_process_was_writing_to_a_folder_when_it_was_killed_goes(
    publish: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, then: str
) -> None:
    place = Location(str(tmp_path / "store" / "a dataset"))
    if not (child := os.fork()):
        try:
            really, fatal = Path.replace, Path(place.path) / written
            monkeypatch.setattr(Folder, "link", lambda *_: False)
            monkeypatch.setattr(
                Path, "replace", lambda old, new: os.kill(os.getpid(), signal.SIGKILL) if new == fatal else really(old, new)
            )
            publish(place, {"deep/down": b"1"})
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list(Path(place.path).rglob("*.part"))

    if then == "forgotten":
        store.abandon(place)
    else:
        publish(place, {"deep/.0123456789abcdef.part": b"2"})
        assert "data/deep/.0123456789abcdef.part" in read_tree(Path(place.path))
        store.abandon(place)
        assert "data/deep/.0123456789abcdef.part" in read_tree(Path(place.path))
    assert list(Path(place.path).glob("*.part")) == []


@pytest.mark.parametrize("place", ["memory"], indirect=True)
def test_what_somebody_else_deletes_first_is_deleted(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs that begin try one file at their store's root."""
    monkeypatch.setattr(MemoryFileSystem, "exists", lambda *_, **__: True)
    files(place).delete([TRIED])


def test_a_damaged_file_of_a_published_dataset_is_named(
    place: Location, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    publish(place, {"a": b"right", "b": b"right"})
    put_raw(place, {"data/b": b"wrong"})
    with pytest.raises(ChecksumMismatch, match="'b'"):
        store.stage(place, tmp_path / "workspace")
    assert not (tmp_path / "workspace/input.jsonl").exists()
    assert "b" not in read_tree(tmp_path / "workspace")


def test_a_missing_file_of_a_published_dataset_is_named(
    place: Location, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    publish(place, {"a": b"right", "b": b"right"})
    files(place).delete(["data/b"])
    with pytest.raises(DatasetError, match="'b'"):
        store.stage(place, tmp_path / "workspace")


def test_a_copy_is_made_into_an_empty_folder_only(place: Location, publish: Callable[..., Summary], tmp_path: Path) -> None:
    publish(place, {"a": b"1"})
    write_tree(tmp_path / "full", {"mine": b"1"})
    with pytest.raises(DatasetError, match="not empty"):
        store.fetch_to(place, tmp_path / "full")
    assert read_tree(tmp_path / "full") == {"mine": b"1"}


def test_progress_ends_at_the_whole(place: Location, publish: Callable[..., Summary], tmp_path: Path) -> None:
    told: list[tuple[int, ...]] = []
    publish(place, {"a": b"12", "b": b"3"}, progress=lambda *seen: told.append(seen))
    assert told[-1] == (2, 2, 3, 3)
    store.fetch_to(place, tmp_path / "copy", progress=lambda *seen: told.append(seen))
    assert told[-1] == (2, 2, 3, 3)
    store.stage(place, tmp_path, progress=lambda *seen: told.append(seen))
    assert told[-1] == (2, 2, 3, 3)


# --- what an output must not hold


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


def a_device(path: Path) -> None:
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


ODD: dict[str, Callable[[Path], None]] = {
    "fifo": a_fifo,
    "socket": a_socket,
    "device": a_device,
    "link to /etc/passwd": link("/etc/passwd"),
    "link out": link("../../secret"),
    "link out and in again": link("../output/good"),
    "link over a link out": link("out/secret"),
    "link to folder": link("folder"),
    "dangling link": link("nothing"),
    "link to itself": link("odd"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_refused_before_anything_is_written_and_left_out_of_a_failed_run(
    kind: str, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    output = write_tree(tmp_path / "output", {"folder/good": b"1", "good": b"2"})
    write_tree(tmp_path, {"secret": b"SECRET"})
    if kind == "link over a link out":
        (output / "out").symlink_to("..")
    ODD[kind](output / "odd")
    place = Location(str(tmp_path / "store"))
    with pytest.raises(UnsafeName, match=r"'o.*(remove it|Rename it)"):
        publish(place, output)
    assert not (tmp_path / "store/data").exists()
    told: list[str] = []
    assert publish(place, output, commit=False, skipped=told.append).file_count == 2
    assert any("'odd'" in line for line in told)
    assert read_tree(tmp_path / "store/data") == {"folder/good": b"1", "good": b"2"}


def test_names_that_cannot_be_carried_are_refused_before_anything_is_written(
    publish: Callable[..., Summary], tmp_path: Path
) -> None:
    for number, names in enumerate(([b"latin-\xe9"], ["caf\u00e9".encode(), "cafe\u0301".encode()])):
        output = write_tree(tmp_path / f"output{number}", {"good": b"1"})
        for name in names:
            Path(os.fsdecode(os.fsencode(output) + b"/" + name)).write_bytes(b"1")
        place = Location(str(tmp_path / f"store{number}"))
        with pytest.raises(UnsafeName, match="Rename"):
            publish(place, output)
        assert not (tmp_path / f"store{number}/data").exists()
        publish(place, output, commit=False)
        assert (tmp_path / f"store{number}/data/good").exists()


def long_path(output: Path) -> None:
    nested(output, "n" * 200, 25)


def many_folders(output: Path) -> None:
    nested(output, "n", 1500)


def links_to_links(output: Path) -> None:
    for number in range(1000):
        (output / f"n{number}").symlink_to(f"n{number + 1}")
    (output / "n1000").symlink_to("good")


def nested(top: Path, name: str, levels: int) -> None:
    """Folders in folders, deeper than a path can say, and a file in the last."""
    at = os.open(top, os.O_DIRECTORY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=at)
        below = os.open(name, os.O_DIRECTORY, dir_fd=at)
        os.close(at)
        at = below
    os.close(os.open("deep", os.O_CREAT, dir_fd=at))
    os.close(at)


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    """An output that Python could not remove."""
    yield write_tree(tmp_path / "hostile", {"a good": b"1", "good": b"2", "z/good": b"3"})
    subprocess.run(["rm", "-rf", str(tmp_path / "hostile")], check=True)


@pytest.mark.parametrize("make", [long_path, many_folders, links_to_links])
def test_folders_too_deep_to_follow_are_refused_and_left_out_of_a_failed_run(
    make: Callable[[Path], None], place: Location, hostile: Path, publish: Callable[..., Summary]
) -> None:
    make(hostile)
    with pytest.raises(UnsafeName, match="fewer folders"):
        publish(place, hostile)
    told: list[str] = []
    publish(place, hostile, commit=False, skipped=told.append)
    assert told
    assert all("'n" in line and "fewer folders" in line and len(line) < 500 for line in told)
    assert {"a good", "good", "z/good"} <= {entry.path for entry in files(place).list("data/")}
    assert b"".join(store.read_file(place, store.LOG)) == b"HI\n"
    assert json.loads(b"".join(store.read_file(place, store.RECORD)))["oasis_flows"] == 1
    with pytest.raises(DatasetNotFound):
        store.published(place)


def test_a_name_that_the_store_cannot_hold_is_left_out_of_a_failed_run(
    s3_place: Location, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    long = "/".join(["n" * 200] * 10)
    output = write_tree(tmp_path / "output", {"good": b"1", long: b"2"})
    deep = Location(str(tmp_path / "store" / "/".join(["s" * 250] * 12)))
    for place in (s3_place, deep):
        with pytest.raises(UnsafeName, match="Rename"):
            publish(place, output)
        told: list[str] = []
        assert publish(place, output, commit=False, skipped=told.append).file_count == 1
        assert len(told) == 1
        assert [entry.path for entry in files(place).list("data/")] == ["good"]


def test_a_link_to_a_file_inside_is_published_as_that_file(
    place: Location, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    output = write_tree(tmp_path / "output", {"folder/real": b"bytes"})
    (output / "link").symlink_to("folder/real")
    (output / "folder/back").symlink_to("../link")
    publish(place, output)
    store.fetch_to(place, tmp_path / "copy")
    assert read_tree(tmp_path / "copy") == dict.fromkeys(["folder/real", "folder/back", "link"], b"bytes")
    assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))


@pytest.mark.parametrize("swapped", ["file", "folder"])
def test_a_link_that_is_put_there_at_the_last_moment_is_not_followed(
    swapped: str, publish: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path / "secrets", {"a": b"SECRET"})
    output = write_tree(tmp_path / "output", {"folder/a": b"1"})
    really_open = publishing.opened

    def swap_then_open(root: Path, name: str) -> object:
        if name == "folder/a":
            shutil.rmtree(output / "folder")
            if swapped == "folder":
                (output / "folder").symlink_to(tmp_path / "secrets")
            else:
                (output / "folder").mkdir()
                (output / "folder/a").symlink_to(tmp_path / "secrets/a")
        return really_open(root, name)

    monkeypatch.setattr(publishing, "opened", swap_then_open)
    with pytest.raises(DatasetError):
        publish(Location(str(tmp_path / "store")), output)
    assert b"SECRET" not in read_tree(tmp_path / "store").values()


# --- local folders


def test_a_local_dataset_is_staged_in_place_and_published_without_copying(
    publish: Callable[..., Summary], tmp_path: Path
) -> None:
    raw = write_tree(tmp_path / "raw", {"a": b"1"})
    folder, _ = store.stage(Location(str(raw)), tmp_path / "workspace")
    assert folder == raw
    publish(Location(f"file://{tmp_path}/store"), raw)
    assert (tmp_path / "store/data/a").stat().st_ino == (raw / "a").stat().st_ino
    folder, _ = store.stage(Location(f"file://{tmp_path}/store"), tmp_path / "workspace")
    assert folder == tmp_path / "store/data"


@pytest.mark.parametrize(
    ("mode", "owner", "group", "linked"),
    [
        (0o600, 0, 0, True),
        (0o777, 0, 0, True),
        (0o4755, 0, 0, False),
        (0o2755, 0, 0, False),
        (0o1644, 0, 0, False),
        (0o644, 1234, 0, False),
        (0o644, 0, 1234, False),
    ],
)
def test_owner_and_mode_of_an_output_are_not_carried_into_a_local_store(
    mode: int, owner: int, group: int, linked: bool, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    made = write_tree(tmp_path / "output", {"a": b"1"}) / "a"
    os.chown(made, owner, group)
    made.chmod(mode)
    before = os.umask(0o077)
    try:
        publish(Location(str(tmp_path / "store")), tmp_path / "output")
    finally:
        os.umask(before)
    facts = (tmp_path / "store/data/a").stat()
    assert (facts.st_mode & 0o7777, facts.st_uid, facts.st_gid) == (0o644, os.geteuid(), os.getegid())
    assert (facts.st_ino == made.stat().st_ino) == linked


def test_a_file_that_nobody_published_is_found_in_a_local_published_dataset(
    publish: Callable[..., Summary], tmp_path: Path
) -> None:
    publish(Location(str(tmp_path / "store")), {"a": b"1"})
    (tmp_path / "store/data/extra").touch()
    with pytest.raises(DatasetError, match="'extra', which is not in the manifest"):
        store.stage(Location(str(tmp_path / "store")), tmp_path / "workspace")


def test_a_local_scan_can_hash_and_refuses_links_out(tmp_path: Path) -> None:
    raw = write_tree(tmp_path / "raw", {"a": b"1", "b/c": b""})
    assert all(entry.sha256 for entry in store.scan(Location(str(raw)), hash=True))
    assert not any(entry.sha256 for entry in store.scan(Location(str(raw))))
    (raw / "b/out").symlink_to("/etc/passwd")
    with pytest.raises(UnsafeName, match="'b/out' is a link to the absolute path"):
        list(store.scan(Location(str(raw))))


@contextmanager
def mounted(disk: Path, size: str) -> Iterator[Path]:
    """A file system in memory; to mount it needs root."""
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    with mounted(tmp_path / "disk", "4m") as disk:
        yield disk


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system on which 100 000 files are made in a second."""
    with mounted(tmp_path / "disk", "512m") as disk:
        yield disk


def test_a_hundred_thousand_local_files_are_scanned_in_little_memory(quick_disk: Path) -> None:
    for folder in range(100):
        (quick_disk / f"raw/{folder}").mkdir(parents=True)
        at = os.open(quick_disk / f"raw/{folder}", os.O_DIRECTORY)
        for number in range(1000):
            os.close(os.open(f"file-{number:06}.dat", os.O_CREAT | os.O_WRONLY, dir_fd=at))
        os.close(at)
    program = (
        "import resource, sys; from oasis_flows.store import Location, scan; peak = lambda: resource.getrusage(0).ru_maxrss\n"
        "next(iter(scan(Location(sys.argv[1] + '/0')))); before = peak()\n"
        "print(sum(1 for _ in scan(Location(sys.argv[1]))), peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(quick_disk / "raw")], capture_output=True, text=True, check=True)
    count, kib = map(int, done.stdout.split())
    assert count == 100_000
    assert kib < 4096


def test_files_of_all_sizes_are_published_to_s3_in_little_memory(s3_place: Location, tmp_path: Path) -> None:
    for megabytes, count in ((64, 6), (5, 24), (1, 48)):
        for number in range(count):
            path = tmp_path / f"output/{number}/{megabytes}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(megabytes << 20)
    (tmp_path / "log").touch()
    (tmp_path / "small").mkdir()
    (tmp_path / "small/file").touch()
    program = (
        "import json, pathlib, re, sys; from oasis_flows import store\n"
        # `ru_maxrss` would be the parent's, where that had more.
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "here = pathlib.Path(sys.argv[1]); place = store.Location(sys.argv[2], json.loads(sys.stdin.read()))\n"
        "done = lambda name: store.publish(here / name, place.child(name), log=here / 'log', record=lambda _: b'{}', workspace=here, "
        "commit=True)\n"
        "done('small'); before = peak(); print(done('output').file_count, peak() - before)"
    )
    command = [sys.executable, "-c", program, str(tmp_path), s3_place.url]
    told = json.dumps(dict(s3_place.options))
    done = subprocess.run(command, input=told, stdout=subprocess.PIPE, text=True, check=True)
    count, kib = map(int, done.stdout.split())
    assert count == 78
    assert kib < 64 << 10, f"{kib >> 10} MiB"


def test_a_full_disk_is_said_so_when_publishing_and_before_fetching(
    small_disk: Path, publish: Callable[..., Summary], s3_place: Location
) -> None:
    content = {"big": os.urandom(5 << 20)}
    with pytest.raises(StoreFull, match="no room left"):
        publish(Location(str(small_disk / "store")), content)
    publish(s3_place, content)
    with pytest.raises(StoreFull, match=r"needs 5\.0 MiB more and has"):
        store.stage(s3_place, small_disk / "workspace")


def test_small_files_that_a_disk_has_no_room_for_are_never_left_half_written(
    small_disk: Path, publish: Callable[..., Summary], s3_place: Location
) -> None:
    # Their bytes are half of the disk, and their blocks are more than all of it.
    content = {f"{number}": os.urandom(1500) for number in range(1500)}
    publish(s3_place, content)
    with pytest.raises(StoreFull, match="no room left"):
        store.stage(s3_place, small_disk)
    come = read_tree(small_disk / "input")
    assert come.items() <= content.items()
    assert come
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    folder, _ = store.stage(s3_place, small_disk)
    assert read_tree(folder) == content


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_file_that_stands_where_one_is_fetched_is_replaced_and_never_written_to(
    s3_place: Location, publish: Callable[..., Summary], tmp_path: Path, size: int
) -> None:
    content = {"folder/a": os.urandom(size)}
    publish(s3_place, content)
    users = tmp_path / "a file of the user's"
    users.write_bytes(b"theirs")
    (tmp_path / "workspace/input/folder").mkdir(parents=True)
    (tmp_path / "workspace/input/folder/a").hardlink_to(users)
    folder, _ = store.stage(s3_place, tmp_path / "workspace")
    assert read_tree(folder) == content
    assert users.read_bytes() == b"theirs"


def test_a_store_that_is_mounted_read_only_is_said_so(small_disk: Path, publish: Callable[..., Summary]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreDenied, match="Read-only file system"):
        store.check_writable(Location(str(small_disk / "a/b")))
    with pytest.raises(StoreDenied):
        publish(Location(str(small_disk / "a/b")), {"a": b"1"})


# --- S3


def test_two_thousand_small_objects_come_and_go(s3_place: Location, publish: Callable[..., Summary], tmp_path: Path) -> None:
    content = {f"{number % 10}/{number}.bin": number.to_bytes(4096, "big") for number in range(2000)}
    publish(s3_place, content)
    folder, summary = store.stage(s3_place, tmp_path / "workspace")
    assert summary.file_count == 2000
    assert read_tree(folder) == content


@pytest.mark.parametrize("key", ["a//b", "a/../b", "../b", "./a", "/a", "a/b/"])
def test_a_key_that_is_no_file_name_is_refused(key: str, s3_place: Location, tmp_path: Path) -> None:
    put_raw(s3_place, {key: b"1", "good": b"1"})
    with pytest.raises(UnsafeName, match="Rename"):
        store.stage(s3_place, tmp_path / "workspace")
    assert not (tmp_path / "workspace/input").exists()


def test_a_key_that_is_a_file_and_a_folder_is_refused(s3_place: Location) -> None:
    put_raw(s3_place, {"a": b"1", "a-b": b"1", "a/b": b"1"})
    with pytest.raises(UnsafeName, match="'a' is a file and also the folder of 'a/b'"):
        list(store.scan(s3_place))


def test_folder_markers_are_no_files(s3_place: Location) -> None:
    put_raw(s3_place, {"": b"", "folder/": b"", "folder/a": b"1", "empty": b""})
    assert [entry.path for entry in store.scan(s3_place)] == ["empty", "folder/a"]


def test_a_whole_bucket_can_be_a_dataset(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    place = Location(f"s3://{bucket}", s3.options)
    put_raw(place, {"a": b"1"})
    assert read_tree(store.stage(place, tmp_path)[0]) == {"a": b"1"}


def test_wrong_credentials_are_said_so_without_showing_them(s3_place: Location, tmp_path: Path) -> None:
    secret = "a-very-secret-value"
    for wrong in ({"secret_access_key": secret}, {"access_key_id": "NOBODY"}):
        place = Location(s3_place.url, {**s3_place.options, **wrong})
        for verb in (lambda p: store.stage(p, tmp_path), lambda p: list(store.scan(p)), store.check_writable):
            with pytest.raises(StoreDenied, match=r"SignatureDoesNotMatch|InvalidAccessKeyId|Forbidden|403") as caught:
                verb(place)
            assert secret not in str(caught.value)
            assert s3_place.options["secret_access_key"] not in repr(caught.value.__cause__)


def test_no_credentials_at_all_is_said_so(s3_place: Location, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreDenied, match="no credentials"):
        store.check_writable(Location(s3_place.url, {"endpoint_url": s3_place.options["endpoint_url"]}))


def test_endpoint_and_credentials_come_from_the_environment_or_a_profile(
    s3: S3Server, s3_place: Location, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        store.check_writable(Location(s3_place.url))
    configuration = tmp_path / "config"
    configuration.write_text(
        f"[profile mine]\nregion = eu-west-1\nendpoint_url = {s3.endpoint}\n"
        f"aws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(configuration))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    store.check_writable(Location(s3_place.url))
    # Given credentials are not mixed with a session token of the environment, nor with its endpoint.
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of somebody else")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    store.check_writable(s3_place)


def test_a_bucket_that_does_not_exist_is_said_so_for_reading_and_for_writing(s3: S3Server, tmp_path: Path) -> None:
    place = Location("s3://there-is-no-such-bucket/a", s3.options)
    for verb in (lambda: store.stage(place, tmp_path), lambda: list(store.scan(place))):
        with pytest.raises(DatasetNotFound, match=r"bucket of .* does not exist"):
            verb()
    with pytest.raises(DatasetError, match="Create it first"):
        store.check_writable(place)


@pytest.mark.parametrize("url", ["s3://", "s3:///a", "nonsense://a/b", "gs://bucket/a", "s3://Bad_Bucket!/a"])
def test_a_url_that_leads_nowhere_is_said_so(url: str, s3: S3Server) -> None:
    with pytest.raises(DatasetError):
        list(store.scan(Location(url, s3.options)))


def test_staging_again_fetches_only_what_is_missing_or_changed(s3_place: Location, tmp_path: Path) -> None:
    put_raw(s3_place, {"a": b"1", "b": b"2", "c": b"3", "gone/x": b"4"})
    folder, _ = store.stage(s3_place, tmp_path)
    kept = (folder / "a").stat().st_ino
    put_raw(s3_place, {"b": b"changed", "gone": b"a file now"})
    files(s3_place).delete(["gone/x"])
    (folder / "c").unlink()
    (folder / "left over").touch()
    assert read_tree(store.stage(s3_place, tmp_path)[0]) == {"a": b"1", "b": b"changed", "c": b"3", "gone": b"a file now"}
    assert (folder / "a").stat().st_ino == kept


def test_an_etag_that_is_no_md5_does_not_stop_a_raw_dataset(
    s3_place: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_raw(s3_place, {"a": b"1"})
    really_list, really_read = objects.Objects.list, objects.Objects.read

    def list_encrypted(self: objects.Objects, folder: str = "") -> Iterator[Entry]:
        for entry in really_list(self, folder):
            yield entry._replace(etag="0" * 32)

    monkeypatch.setattr(objects.Objects, "list", list_encrypted)
    monkeypatch.setattr(objects.Objects, "read", lambda self, name, **_: really_read(self, name))
    assert read_tree(store.stage(s3_place, tmp_path)[0]) == {"a": b"1"}


def test_where_etags_are_no_md5_it_is_asked_for_one_object_more_and_no_others(
    s3_place: Location, faulty: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_raw(s3_place, dict.fromkeys("abc", b"1"))
    asked: list[str] = []
    really_get = objects.obstore.get_async

    def get(there: Any, key: str, **more: Any) -> Any:
        asked.append(key.rpartition("/")[2])
        return really_get(there, key, **more)

    monkeypatch.setattr(objects.obstore, "get_async", get)
    monkeypatch.setattr(objects, "_is_other", lambda content, etag: True)
    assert [b"".join(files(faulty).read(name)) for name in "abc"] == [b"1"] * 3
    assert asked == ["a", "a", "b", "c"]


def test_parts_of_uploads_that_were_broken_off_are_removed(
    s3: S3Server, s3_place: Location, publish: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_place.path.partition("/")[0]

    def broken(chunks: Iterator[bytes]) -> Iterator[bytes]:
        for number, chunk in enumerate(chunks):
            if number == 7:
                raise KeyboardInterrupt
            yield chunk

    put_raw(s3_place, {store.RECORD: publishing.PROVISIONAL})
    with pytest.raises(KeyboardInterrupt):
        files(s3_place).write("data/big", broken(iter([b"x" * (1 << 20)] * 9)), 9 << 20)
    listing = objects._client(s3_place, objects.PATIENCE).list_multipart_uploads
    assert "Uploads" in listing(Bucket=bucket)
    publish(s3_place, {"a": b"1"})
    assert "Uploads" not in listing(Bucket=bucket)


def test_an_upload_that_was_begun_twice_leaves_no_parts_behind(
    s3_place: Location, publish: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to the first request was lost, and the client sent it again."""
    client, (bucket, _, prefix) = objects._client(s3_place, objects.PATIENCE), s3_place.path.partition("/")
    really_put = objects.Objects._put_parts

    def twice(self: objects.Objects, key: str, *rest: Any) -> None:
        client.create_multipart_upload(Bucket=bucket, Key=key)
        assert "Uploads" in client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)
        really_put(self, key, *rest)

    monkeypatch.setattr(objects.Objects, "_put_parts", twice)
    publish(s3_place, {"big": b"x" * (9 << 20)})
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)


def test_a_publish_that_is_broken_off_leaves_no_parts_behind_and_raises_what_broke_it_off(
    s3: S3Server, s3_place: Location, publish: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    really_read, bucket = publishing.chunks_of, s3_place.path.partition("/")[0]

    def broken(descriptor: int, where: str) -> Iterator[bytes]:
        for number, chunk in enumerate(really_read(descriptor, where)):
            if number == 7:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(publishing, "chunks_of", broken)
    listing = objects._client(s3_place, objects.PATIENCE).list_multipart_uploads
    with pytest.raises(KeyboardInterrupt):
        publish(s3_place, {"big": b"x" * (9 << 20)})
    assert "Uploads" not in listing(Bucket=bucket)

    def denied(*_: object, hurry: bool = False) -> None:
        if hurry:
            raise StoreDenied("No.")

    monkeypatch.setattr(objects.Objects, "abandon", denied)
    with pytest.raises(KeyboardInterrupt):
        publish(s3_place, {"big": b"x" * (9 << 20)})
    assert "Uploads" in listing(Bucket=bucket)


def test_a_publish_that_is_interrupted_reads_nothing_more_and_leaves_no_parts_behind(
    s3_place: Location, publish: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    really_read, bucket = publishing.chunks_of, s3_place.path.partition("/")[0]
    read = list[int]()

    def interrupting(descriptor: int, where: str) -> Iterator[bytes]:
        for number, chunk in enumerate(really_read(descriptor, where)):
            if number == 7:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
            read.append(number)
            yield chunk

    monkeypatch.setattr(publishing, "chunks_of", interrupting)
    # hypothesis counts collections in a callback, and Python drops what a signal raises in one.
    gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            publish(s3_place, {"big": b"x" * (30 << 20)})
    finally:
        gc.enable()
    seen = len(read)
    assert "Uploads" not in objects._client(s3_place, objects.PATIENCE).list_multipart_uploads(Bucket=bucket)
    time.sleep(0.3)
    assert len(read) == seen <= 9


# --- faults between here and there


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with between(int(s3.endpoint.rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture
def faulty(s3_place: Location, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Location:
    """The same place as `s3_place`, through the proxy, with less patience than in earnest."""
    monkeypatch.setattr(objects, "PATIENCE", objects.Patience(connect_seconds=1, seconds=0.5, part_seconds=0.5, attempts=2))
    return Location(s3_place.url, {**s3_place.options, "endpoint_url": f"http://127.0.0.1:{proxy.port}"})


def test_a_connection_that_breaks_inside_a_file_is_resumed_where_it_broke(
    s3_place: Location, faulty: Location, proxy: FaultProxy, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    content = {"big": os.urandom(9 << 20)}
    publish(s3_place, content)
    proxy.set(Faults(reset_after=3_500_000))
    folder, _ = store.stage(faulty, tmp_path / "workspace")
    assert read_tree(folder) == content
    assert proxy.faulted >= 3


def test_what_does_not_come_at_once_is_asked_for_patiently_and_all_else_is_for_a_while(
    s3_place: Location,
    proxy: FaultProxy,
    publish: Callable[..., Summary],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(objects, "AT_ONCE_SECONDS", 0.05)
    slow = Location(s3_place.url, {**s3_place.options, "endpoint_url": f"http://127.0.0.1:{proxy.port}"})
    proxy.set(Faults(latency_seconds=0.1))
    content = {str(number): os.urandom(100) for number in range(40)}
    publish(slow, content)
    folder, _ = store.stage(slow, tmp_path / "workspace")
    assert read_tree(folder) == content
    connection = objects._Connection(s3_place.path.partition("/")[0], slow)
    assert connection.at_once(lambda _: "asked") == "asked"
    assert connection.at_once(lambda there: obstore.get(there, "any")) is None
    assert connection.at_once(lambda _: "asked") is None


@pytest.mark.parametrize(
    ("enough", "ample", "is_patient"), [(64 << 10, 128 << 10, False), (64 << 10, 1 << 20, False), (1 << 20, 1 << 20, True)]
)
def test_a_large_file_is_fetched_at_once_as_long_as_ample_of_it_comes(
    s3_place: Location,
    proxy: FaultProxy,
    publish: Callable[..., Summary],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    enough: int,
    ample: int,
    is_patient: bool,
) -> None:
    for name, value in (("AT_ONCE_SECONDS", 0.1), ("ENOUGH_BYTES", enough), ("AMPLE_BYTES", ample), ("PIECE_BYTES", 16 << 10)):
        monkeypatch.setattr(objects, name, value)
    asked, told = list[int](), list[bool]()
    really = objects.Objects._at_once

    def at_once(self: objects.Objects, name: str, offset: int, *rest: Any) -> Iterator[bytes]:
        asked.append(offset)
        return really(self, name, offset, *rest)

    monkeypatch.setattr(objects.Objects, "_at_once", at_once)
    monkeypatch.setattr(
        objects._Connection, "be_patient", lambda self: (told.append(True), setattr(self, "_patient_until", 1e99))
    )
    content = {"big": os.urandom(4 << 20)}
    publish(s3_place, content)
    slow = Location(s3_place.url, {**s3_place.options, "endpoint_url": f"http://127.0.0.1:{proxy.port}"})
    proxy.set(Faults(bytes_per_second=5e6))
    folder, _ = store.stage(slow, tmp_path / "workspace")
    assert read_tree(folder) == content
    assert bool(told) is is_patient
    assert asked == sorted(set(asked))
    assert len(asked) >= 3 if ample < 1 << 20 else len(asked) == 1


def test_a_flipped_bit_is_detected_and_the_file_fetched_again(
    s3_place: Location, faulty: Location, proxy: FaultProxy, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    content = {"big": os.urandom(3 << 20)}
    publish(s3_place, content)
    put_raw(s3_place.child("raw"), content)
    for number, place in enumerate((faulty, faulty.child("raw"))):
        proxy.set(Faults(flip_bit_at=1_000_000, connections=4))
        before = proxy.faulted
        folder, _ = store.stage(place, tmp_path / str(number))
        assert read_tree(folder) == content
        assert proxy.faulted > before


def test_a_flipped_bit_never_makes_something_else_of_a_dataset(
    s3_place: Location, faulty: Location, proxy: FaultProxy, publish: Callable[..., Summary]
) -> None:
    publish(s3_place, {"a": b"1"})
    taken_for = {}
    for offset in range(0, 700, 7):
        proxy.set(Faults(flip_bit_at=offset, connections=1))
        try:
            taken_for[offset] = store.published(faulty) is not None
        except OasisError:
            taken_for[offset] = True

    assert [offset for offset, known in taken_for.items() if not known] == []


@pytest.mark.parametrize("compared_with_etags", [True, False], ids=["small", "large"])
def test_a_flipped_bit_in_a_manifest_is_never_blamed_on_the_data(
    s3_place: Location,
    faulty: Location,
    proxy: FaultProxy,
    publish: Callable[..., Summary],
    monkeypatch: pytest.MonkeyPatch,
    *,
    compared_with_etags: bool,
) -> None:
    if not compared_with_etags:
        monkeypatch.setattr(objects, "CHUNK_BYTES", 64)
    publish(s3_place, {"a": b"1", "b": b"2"})
    truth, wrong = list(store.scan(s3_place)), {}
    for offset in range(0, 2600, 41):
        proxy.set(Faults(flip_bit_at=offset, connections=1))
        try:
            found = list(store.scan(faulty))
        except DatasetError as error:
            if not error.transient:
                wrong[offset] = str(error)
        else:
            if found != truth:
                wrong[offset] = str(found)

    assert wrong == {}
    assert proxy.faulted


def test_a_manifest_that_is_another_than_its_record_says_is_said_so(place: Location, publish: Callable[..., Summary]) -> None:
    publish(place, {"a": b"1", "b": b"2"})
    manifest = b"".join(store.read_file(place, store.MANIFEST))
    put_raw(place, {store.MANIFEST: manifest.splitlines(keepends=True)[0]})
    with pytest.raises(DatasetError, match="another than was published") as caught:
        list(store.scan(place))
    assert not caught.value.transient


def test_a_flipped_bit_never_leaves_a_file_out_of_a_folder(s3_place: Location, faulty: Location, proxy: FaultProxy) -> None:
    put_raw(s3_place, dict.fromkeys("abc", b"1"))
    found: dict[int, int] = {}
    for offset in range(300, 1300, 17):
        proxy.set(Faults(flip_bit_at=offset, connections=2))
        try:
            found[offset] = len(list(store.scan(faulty)))
        except OasisError:
            found[offset] = 3

    assert {offset: count for offset, count in found.items() if count != 3} == {}


def test_bits_that_flip_every_time_are_a_checksum_mismatch(
    s3_place: Location, faulty: Location, proxy: FaultProxy, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    # Every connection is damaged early and ends soon, so both fetches of the large file need their own: the small ones come first.
    # No answer's head comes to lie where the bit flips: pieces are of 1 MiB and more, so the last has between 0.7 and 1.2 MB.
    publish(s3_place, {"big": os.urandom(3_300_000), **{f"z{number}": b"1" for number in range(3)}})
    proxy.set(Faults(flip_bit_at=600_000, reset_after=1_300_000))
    with pytest.raises(ChecksumMismatch, match="'big'"):
        store.stage(faulty, tmp_path / "workspace")


@pytest.mark.parametrize("listed", [True, False])
def test_a_flipped_bit_in_an_etag_is_not_taken_for_a_change(
    s3_place: Location, faulty: Location, proxy: FaultProxy, *, listed: bool
) -> None:
    put_raw(s3_place, {"big": bytes(2 << 20)})
    (entry,) = store.files(s3_place).list()
    lasting, said = list[OasisError](), set[str]()
    for offset in range(100, 400, 11):
        # The rest comes over another connection, whose answer has the right etag.
        proxy.set(Faults(flip_bit_at=offset, reset_after=1_500_000, connections=1))
        try:
            for _ in store.files(faulty).read("big", etag=entry.etag if listed else None):
                pass
        except OasisError as error:
            said.add(str(error))
            if not error.transient:
                lasting.append(error)

    assert lasting == []
    assert any("or arrived damaged" in each for each in said) is not listed


def test_a_flipped_bit_in_a_listing_is_never_blamed_on_the_data(
    s3_place: Location, faulty: Location, proxy: FaultProxy, tmp_path: Path
) -> None:
    put_raw(s3_place, {"big": bytes(1 << 20), "small": b"1"})
    lasting = {}
    for offset in range(200, 1300, 17):
        proxy.set(Faults(flip_bit_at=offset, connections=1))
        try:
            store.stage(faulty, tmp_path / str(offset))
        except DatasetError as error:
            # What the store says in a code that nobody knows is passed on as it is.
            if not error.transient and "NoSuch" not in str(error):
                lasting[offset] = str(error)

    assert lasting == {}


def test_an_object_that_an_answer_says_is_larger_than_it_is_is_only_damage(
    s3: S3Server, s3_place: Location, faulty: Location, proxy: FaultProxy
) -> None:
    put_raw(s3_place, {"a": bytes(262144)})
    (entry,) = store.files(s3_place).list()
    bucket, _, key = s3_place.path.partition("/")
    url = objects._client(s3_place, objects.PATIENCE).generate_presigned_url(
        "get_object", Params={"Bucket": bucket, "Key": f"{key}/a"}
    )
    there = urlsplit(url)
    with socket.create_connection((there.hostname or "", there.port or 80)) as asking:
        asking.sendall(f"GET {there.path}?{there.query} HTTP/1.1\r\nHost: {there.netloc}\r\n\r\n".encode())
        digits = asking.recv(4096).index(b"262144")
    said = list[str]()
    for offset, has_digest in product(range(digits, digits + 6), (True, False)):
        proxy.set(Faults(flip_bit_at=offset, connections=1))
        objects._connected.cache_clear()
        try:
            came = sum(map(len, store.files(faulty).read("a", etag=entry.etag, has_digest=has_digest)))
        except OasisError as error:
            said.append(str(error) if error.transient else f"for good: {error}")
        else:
            said.append(f"{came}")
    assert not [each for each in said if "for good" in each]
    assert any("arrived damaged" in each for each in said)


def test_an_object_that_became_larger_is_not_fetched_whole(
    s3_place: Location, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    publish(s3_place, {"a": b"1"})
    put_raw(s3_place.child("data"), {"a": bytes(64 << 20)})
    moved = list[int]()
    with pytest.raises(ChecksumMismatch, match="found: more"):
        store.stage(s3_place, tmp_path / "workspace", progress=lambda *counts: moved.append(counts[2]))
    assert max(moved) <= 4 << 20


def test_what_was_put_in_place_and_not_noted_is_not_taken_for_what_was_there_before(
    s3_place: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Journal) -> Any:
        raise KeyboardInterrupt

    first, second = {"a": b"AAAA", "b": b"1"}, {"a": b"BBBB", "b": b"1"}
    put_raw(s3_place, first)
    folder, _ = store.stage(s3_place, tmp_path / "workspace")
    put_raw(s3_place, second)
    with monkeypatch.context() as now:
        now.setattr(Journal, "appending", killed)
        with pytest.raises(KeyboardInterrupt):
            store.stage(s3_place, tmp_path / "workspace")
    (folder / "a").write_bytes(b"BBBB")
    put_raw(s3_place, first)
    folder, _ = store.stage(s3_place, tmp_path / "workspace")
    assert read_tree(folder) == first


@pytest.mark.parametrize("ask", ["size", "missing", "read", "write", "delete", "abandon"])
def test_a_flipped_bit_in_any_answer_is_only_damage(s3_place: Location, faulty: Location, proxy: FaultProxy, ask: str) -> None:
    # obstore cannot hold this name, so that all of them are botocore's.
    name, files = "a\tb", store.files(faulty)
    asked = {
        "size": lambda: files.size(name),
        "missing": lambda: files.size("missing"),
        "read": lambda: list(files.read(name)),
        "write": lambda: files.write(name, [b"1"], 1),
        "delete": lambda: files.delete([name, "other"]),
        "abandon": files.abandon,
    }[ask]
    lasting = {}
    for offset in sorted({9, 10, 11, *range(1, 400, 4)}):
        put_raw(s3_place, {name: b"1"})
        proxy.set(Faults(flip_bit_at=offset, connections=1))
        try:
            asked()
        except OasisError as error:
            # A missing name's 404 is one bit from 400, which S3 answers, too.
            if not error.transient and not (ask == "missing" and (isinstance(error, Missing) or "(400)" in str(error))):
                lasting[offset] = str(error)

    assert lasting == {}
    assert proxy.faulted


def test_what_is_another_than_was_listed_is_listed_anew_by_another_try(
    s3_place: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_raw(s3_place, {"big": b"1" * (1 << 20)})
    with monkeypatch.context() as once:
        once.setattr(objects.Objects, "list", lambda *_: iter([Entry("big", 1 << 20, etag="0" * 32)]))
        with pytest.raises(DatasetChanged, match="was changed while it was read") as caught:
            store.stage(s3_place, tmp_path / "workspace")
    assert caught.value.transient
    folder, _ = store.stage(s3_place, tmp_path / "workspace")
    assert read_tree(folder) == {"big": b"1" * (1 << 20)}


def test_a_server_that_is_down_for_a_moment_is_tried_again(
    faulty: Location, proxy: FaultProxy, publish: Callable[..., Summary]
) -> None:
    proxy.set(Faults(refuse=True, connections=1))
    publish(faulty, {"a": b"1"})
    assert proxy.faulted == 1


@pytest.mark.parametrize("fault", [Faults(black_hole=True), Faults(refuse=True)])
def test_a_server_that_never_answers_is_given_up_in_bounded_time(
    fault: Faults, faulty: Location, proxy: FaultProxy, publish: Callable[..., Summary], tmp_path: Path
) -> None:
    proxy.set(fault)
    for verb in (
        lambda: store.check_writable(faulty),
        lambda: list(store.scan(faulty)),
        lambda: store.stage(faulty, tmp_path / "w"),
        lambda: publish(faulty, {"a": b"1"}),
    ):
        started = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            verb()
        assert caught.value.transient
        assert time.monotonic() - started < 0.5 * 2 + 2


@pytest.mark.parametrize("direction", ["stage", "publish"])
@pytest.mark.parametrize("fault", [Faults(black_hole=True), Faults(bytes_per_second=100_000)], ids=["stuck", "slow"])
@pytest.mark.parametrize(("count", "size"), [(8, 9 << 20), (8, 3 << 20), (1000, 1 << 10)], ids=["in parts", "large", "small"])
def test_a_signal_ends_a_transfer_at_once_and_nothing_writes_afterwards(
    direction: str,
    fault: Faults,
    count: int,
    size: int,
    s3_place: Location,
    proxy: FaultProxy,
    publish: Callable[..., Summary],
    tmp_path: Path,
) -> None:
    patient = Location(s3_place.url, {**s3_place.options, "endpoint_url": f"http://127.0.0.1:{proxy.port}"})
    content = {str(number): os.urandom(size) for number in range(count)}
    output = write_tree(tmp_path / "output", content)
    put_raw(s3_place, content)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def misbehave_then_signal() -> None:
        time.sleep(0.05)
        proxy.set(fault)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, stop)
    proxy.set(Faults(latency_seconds=0.01))
    thread = threading.Thread(target=misbehave_then_signal)
    # hypothesis counts collections in a callback, and Python drops what a signal raises in one.
    gc.disable()
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            store.stage(patient, tmp_path / "workspace") if direction == "stage" else publish(patient, output)
        ended = time.monotonic()
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
        gc.enable()
    assert time.monotonic() - ended < 2
    assert not [each.name for each in threading.enumerate() if each.name.startswith("oasis-flows-transfer_")]
    state = read_tree(tmp_path / "workspace") if direction == "stage" else {}
    time.sleep(0.3)
    assert state == (read_tree(tmp_path / "workspace") if direction == "stage" else {})
