"""Folders through a stream and back; streams that somebody has bent."""

from __future__ import annotations

import io
import os
import socket
import stat
import struct
import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from oasis_flows.engines.parcel import Damaged, pack, unpack
from oasis_flows.job import Resources
from oasis_flows.workspace import delete


def packed(**sources: Path) -> bytes:
    out = io.BytesIO()
    pack(out.write, sources)
    return out.getvalue()


def part(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">cI", kind, len(body)) + body


def facts(mode: int = 0o755) -> bytes:
    return struct.pack(">Iq", mode, 0)


def tree(folder: Path) -> dict[str, object]:
    """All that is told of what is below a folder."""
    found: dict[str, object] = {}
    for at, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(at, name)
            row = path.lstat()
            content: object = None
            if stat.S_ISLNK(row.st_mode):
                content = str(path.readlink())
            elif stat.S_ISREG(row.st_mode):
                content = (path.read_bytes(), row.st_mtime_ns)
            found[str(path.relative_to(folder))] = (row.st_mode if not stat.S_ISLNK(row.st_mode) else "link", content)
    return found


def test_all_that_a_folder_can_hold_arrives_as_it_was(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "empty").mkdir(mode=0o700)
    (source / "deep" / "a").write_bytes(b"a" * 700_001)
    (source / "deep" / "er" / "run").write_bytes(b"#!")
    (source / "deep" / "er" / "run").chmod(0o755)
    os.utime(source / "deep" / "a", ns=(1, 1_500_000_000_123_456_789))
    (source / "nothing").touch()
    (source / os.fsdecode(b"odd \xff\n name")).write_text("odd")
    (source / "away").symlink_to("/etc/passwd")
    (source / "up").symlink_to("../../../..")
    (source / "broken").symlink_to("nowhere")
    os.mkfifo(source / "pipe", 0o600)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(source / "s"))
        (source / "s").chmod(0o600)
    os.link(source / "deep" / "a", source / "same")
    target.mkdir()

    out = io.BytesIO()
    sent = pack(out.write, {"0": source})
    out.seek(0)

    assert unpack(out.read, target) == sent
    assert tree(target / "0") == tree(source)
    assert (target / "0" / "same").samefile(target / "0" / "deep" / "a")
    assert sent.files == 10
    assert sent.bytes == 700_001 + 2 + 3


def test_a_file_alone_and_a_link_to_a_folder_are_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "in").write_text("y")
    (tmp_path / "to-folder").symlink_to("folder")
    (tmp_path / "to-file").symlink_to("f")
    target = tmp_path / "target"
    target.mkdir()
    unpack(io.BytesIO(packed(a=tmp_path / "to-file", b=tmp_path / "to-folder")).read, target)

    assert (target / "a").read_text() == "x"
    assert not (target / "a").is_symlink()
    assert (target / "b" / "in").read_text() == "y"


def test_holes_stay_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    with (source / "sparse").open("wb") as file:
        file.seek(1 << 34)
        file.write(b"middle")
        file.truncate(1 << 35)
    stream = packed(s=source)

    assert len(stream) < 1 << 20
    assert unpack(io.BytesIO(stream).read, target).bytes == 1 << 35
    with (target / "s" / "sparse").open("rb") as file:
        file.seek(1 << 34)
        assert file.read(7) == b"middle\0"
    facts = (target / "s" / "sparse").stat()
    assert (facts.st_size, facts.st_blocks * 512 < 1 << 20) == (1 << 35, True)


def test_folders_deeper_than_any_path(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    try:
        at = os.open(source, os.O_RDONLY)
        for _ in range(1200):
            os.mkdir("n" * 20, dir_fd=at)
            below = os.open("n" * 20, os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = below
        os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=at))
        os.close(at)
        out = io.BytesIO()
        sent = pack(out.write, {"0": source})
        out.seek(0)

        assert unpack(out.read, target) == sent
    finally:
        # Nor does pytest get so deep.
        delete(source)
        delete(target)


def test_what_its_owner_closed_is_opened_where_that_is_wanted(tmp_path: Path) -> None:
    """As root nothing is closed, so what is tested then is only that nothing breaks."""
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "shut").mkdir(parents=True)
    (source / "shut" / "f").write_text("x")
    (source / "shut" / "f").chmod(0)
    (source / "shut").chmod(0)
    target.mkdir()
    out = io.BytesIO()
    pack(out.write, {"0": source}, opening=True)
    out.seek(0)
    unpack(out.read, target)
    (target / "0" / "shut").chmod(0o700)
    (target / "0" / "shut" / "f").chmod(0o600)

    assert (target / "0" / "shut" / "f").read_text() == "x"


def test_setuid_is_left_behind(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "f").touch()
    (source / "f").chmod(0o6755)
    unpack(io.BytesIO(packed(s=source)).read, target)

    assert stat.S_IMODE((target / "s" / "f").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    "parts",
    [
        [part(b"f", facts() + b"../escaped")],
        [part(b"f", facts() + b"/tmp/escaped")],
        [part(b"f", facts() + b"..")],
        [part(b"d", facts() + b"..")],
        [part(b"d", facts() + b".")],
        [part(b"f", facts())],
        [part(b".")],
        [part(b"d", facts() + b"a"), part(b"."), part(b".")],
        [part(b"l", b"../escaped\0/etc")],
        [part(b"l", b"out\0/etc"), part(b"n", b"escaped\0out/passwd")],
        [part(b"n", b"escaped\0../secret")],
        [part(b"n", b"escaped\0/etc/passwd")],
        [part(b"l", b"out\0.."), part(b"d", facts() + b"out"), part(b"f", facts() + b"escaped")],
        [part(b"l", b"out\0../escaped"), part(b"f", facts() + b"out"), part(b"c", b"x")],
        [part(b"c", b"x")],
        [part(b"x", b"x")],
        [part(b"p", b"../escaped")],
        [struct.pack(">cI", b"f", 1 << 31)],
        [part(b"d", facts() + b"a"), part(b"E", b"0" * 32)],
        [],
    ],
)
def test_a_stream_that_would_leave_its_folder_is_refused(tmp_path: Path, parts: list[bytes]) -> None:
    folder = tmp_path / "inner" / "folder"
    folder.mkdir(parents=True)
    (tmp_path / "inner" / "secret").write_text("s")
    with pytest.raises((Damaged, OSError)):
        unpack(io.BytesIO(b"".join(parts)).read, folder)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner"]
    assert sorted(path.name for path in (tmp_path / "inner").iterdir()) == ["folder", "secret"]
    assert not (folder / "escaped").exists()
    assert (tmp_path / "inner" / "secret").stat().st_nlink == 1


@given(st.data())
def test_a_stream_that_was_changed_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("x")
    (folder / "source").mkdir()
    (folder / "target").mkdir()
    (folder / "source" / "a").write_text("some words")
    stream = bytearray(packed(s=folder / "source"))
    at = data.draw(st.integers(0, len(stream) - 1))
    if data.draw(st.booleans()):
        stream = stream[:at]
    else:
        stream[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises((Damaged, OSError)):
        unpack(io.BytesIO(bytes(stream)).read, folder / "target")


@pytest.mark.parametrize("limits", [Resources(output_bytes=1999), Resources(output_files=1)])
def test_more_than_an_output_may_hold_is_refused(tmp_path: Path, limits: Resources) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in "ab":
        (source / name).write_bytes(b"x" * 1000)
    with pytest.raises(Damaged, match="more than it may"):
        unpack(io.BytesIO(packed(s=source)).read, target, limits)

    assert sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) < 2000


def test_memory_does_not_grow_with_files(tmp_path: Path) -> None:
    """On neither side: 10 000 names of 200 bytes are more than is allowed here."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for number in range(10_000):
        (source / f"{number:0200}").touch()
    read, write = os.pipe()

    def send() -> None:
        with os.fdopen(write, "wb") as out:
            pack(out.write, {"0": source})

    tracemalloc.start()
    try:
        sending = threading.Thread(target=send)
        sending.start()
        with os.fdopen(read, "rb") as stream:
            found = unpack(stream.read, target)
        sending.join()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.files == 10_000
    assert peak < 1_500_000
