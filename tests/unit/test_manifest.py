"""The manifest: order, round trip, and what it refuses."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given, strategies as st

from oasis_flows.errors import DatasetError, UnsafeName
from oasis_flows.manifest import Entry, Tally, check_name, checked, parse, parse_line, sort_key, to_line

segments = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12)
names = st.lists(segments.filter(lambda s: s not in (".", "..")), min_size=1, max_size=5).map("/".join)
entries = st.builds(Entry, names, st.integers(0, 2**60), st.none() | st.text("0123456789abcdef", min_size=64, max_size=64))


def sort(paths: list[str]) -> list[Entry]:
    return [Entry(path, 1) for path in sorted(paths, key=sort_key)]


@given(entries)
def test_an_entry_comes_back_from_its_line_whatever_its_name(entry: Entry) -> None:
    line = to_line(entry)
    assert line.count(b"\n") == 1
    assert parse_line(line) == entry


@given(st.sets(names, max_size=20))
def test_names_that_pass_come_back_in_order_and_fit_into_one_folder(paths: set[str]) -> None:
    wanted = sort(list(paths))
    try:
        passed = list(checked(wanted))
    except UnsafeName:
        folders = {path[:at] for path in paths for at in range(len(path)) if path[at] == "/"}
        normal = {unicodedata.normalize("NFC", path) for path in paths}
        too_long = any(len(segment.encode()) > 255 for path in paths for segment in path.split("/"))
        assert too_long or len(normal) < len(paths) or folders & paths
    else:
        assert passed == wanted
        assert list(parse(map(to_line, wanted))) == wanted


@given(st.lists(names, min_size=2, max_size=6, unique=True))
def test_entries_out_of_order_are_refused(paths: list[str]) -> None:
    backwards = list(reversed(sort(paths)))
    with pytest.raises(DatasetError):
        list(checked(backwards))


@pytest.mark.parametrize(
    "name",
    [
        "/a",
        "a//b",
        "a/../b",
        "..",
        ".",
        "a/./b",
        "a/",
        "",
        "a\0b",
        "a" * 256,
        "\udcff",
        "/".join("d" * 256),
        "/".join(["d" * 200] * 20),
    ],
)
def test_a_name_that_could_leave_the_folder_or_fits_no_file_system_is_refused(name: str) -> None:
    with pytest.raises(UnsafeName):
        check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "a\nb",
        "é",
        "e\u0301",
        "数据/ñ.txt",
        "-rf",
        "~",
        "a" * 255,
        "/".join("d" * 255),
        "/".join(["d" * 199] * 20),
        "\u202e.txt",
    ],
)
def test_any_other_name_is_carried(name: str) -> None:
    check_name(name)


def test_two_names_that_are_one_after_normalisation_are_refused() -> None:
    with pytest.raises(UnsafeName, match="NFC and NFD"):
        list(checked(sort(["caf\u00e9", "cafe\u0301"])))


def test_a_file_that_is_also_a_folder_is_refused_though_other_names_sort_between() -> None:
    with pytest.raises(UnsafeName, match="'a' is a file and also the folder of 'a/b'"):
        list(checked(sort(["a", "a-b", "a/b"])))


def test_the_digest_is_known_only_when_every_file_was_read() -> None:
    whole, part = Tally(), Tally()
    for tally, sha256 in ((whole, "0" * 64), (part, None)):
        tally.add(Entry("a", 1, "1" * 64))
        tally.add(Entry("b", 2, sha256))
    assert whole.summary().digest is not None
    assert part.summary().digest is None
    assert (part.summary().file_count, part.summary().size_bytes) == (2, 3)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"path":1,"bytes":1}',
        b'{"path":"a","bytes":-1}',
        b'{"path":"a","bytes":"1"}',
        b'{"path":"a","bytes":true}',
    ],
)
def test_a_damaged_line_is_named_by_its_number(line: bytes) -> None:
    with pytest.raises(DatasetError, match="Line 2"):
        list(parse([b'{"path":"0","bytes":1}\n', line]))


@given(st.text(min_size=1), st.integers(0, 1 << 62), *[st.one_of(st.none(), st.text()) for _ in range(3)])
def test_a_line_says_what_json_says_it_says(path, size, sha256, etag, at):
    entry = Entry(path, size, sha256, etag, at)
    line = to_line(entry)

    assert parse_line(line) == entry
    assert json.loads(line) == {
        "path": path,
        "bytes": size,
        **{name: value for name, value in (("sha256", sha256), ("etag", etag), ("at", at)) if value is not None},
    }
    assert parse_line(json.dumps(json.loads(line)).encode()) == entry
