"""Listings of which any slice can be read, and one manifest out of many: over folders of this machine."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from oasis_flows import ledger
from oasis_flows.errors import DatasetError, DuplicateName, StoreUnavailable
from oasis_flows.manifest import Entry, Tally, sort_key, to_line
from oasis_flows.schedule import Attempt, Ending
from oasis_flows.sharding import by_count
from oasis_flows.store import Location, changes, merge, read_manifest, read_slice, save_listing, write_listing
from oasis_flows.store.folder import Folder

SHA = "0" * 64


def entries(count):
    return [Entry(f"{number:05}-ä.txt", number, etag=str(number)) for number in range(count)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A listing of 1000 files, saved elsewhere."""
    folder = tmp_path_factory.mktemp("listing")
    listing = write_listing(entries(1000), folder / "here")
    save_listing(folder / "here", Location(str(folder / "there")))
    return listing, folder


def test_a_listing_adds_up(saved):
    listing, _ = saved

    assert (listing.file_count, listing.size_bytes, list(listing.sizes[:3])) == (1000, sum(range(1000)), [0, 1, 2])


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_any_slice_can_be_read(saved, first, second):
    start, end = sorted((first, second))

    assert list(read_slice(Location(str(saved[1] / "there")), start, end)) == entries(1000)[start:end]


@pytest.mark.parametrize(("start", "end"), [(999, 1001), (5000, 5001)])
def test_a_slice_that_is_not_there_is_an_error(saved, start, end):
    with pytest.raises(DatasetError, match="was changed"):
        list(read_slice(Location(str(saved[1] / "there")), start, end))


def test_a_listing_whose_bytes_are_others_is_an_error_where_they_are(saved, tmp_path):
    save_listing(saved[1] / "here", Location(str(tmp_path)))
    content = bytearray((tmp_path / "listing.jsonl").read_bytes())
    content[-20] ^= 1
    (tmp_path / "listing.jsonl").write_bytes(content)

    assert list(read_slice(Location(str(tmp_path)), 0, 768)) == entries(1000)[:768]
    with pytest.raises(DatasetError, match="another than was saved") as caught:
        list(read_slice(Location(str(tmp_path)), 768, 770))
    assert not caught.value.transient


def test_a_listing_that_arrives_damaged_may_arrive_whole_later(saved, tmp_path, monkeypatch):
    really_read, times = Folder.read, []

    def damaged(self, name, **more):
        times.append(name)
        for chunk in really_read(self, name, **more):
            yield chunk.replace(b"00003", b"00007") if times.count("listing.jsonl") == 1 else chunk

    monkeypatch.setattr(Folder, "read", damaged)
    with pytest.raises(StoreUnavailable, match="arrived damaged"):
        list(read_slice(Location(str(saved[1] / "there")), 0, 10))
    assert list(read_slice(Location(str(saved[1] / "there")), 0, 10)) == entries(10)


def test_what_changed_is_told(saved, tmp_path):
    now = [Entry("0-new", 1), *entries(1000)[1:500], Entry("00500-ä.txt", 7), *entries(1000)[501:]]
    write_listing(now, tmp_path)

    told = changes(tmp_path, Location(str(saved[1] / "there")))
    assert told == ["'0-new' is new", "'00000-ä.txt' is gone", "'00500-ä.txt' has changed"]
    assert changes(saved[1] / "here", Location(str(saved[1] / "there"))) == []


def publish(root, part, names):
    """A published part, as far as a merge looks at it."""
    folder = root / part
    folder.mkdir(parents=True)
    ordered = sorted(names, key=sort_key)
    (folder / "manifest.jsonl").write_bytes(b"".join(to_line(Entry(name, len(name), SHA)) for name in ordered))
    (folder / "task.json").write_text(json.dumps({"oasis_flows": 1}))


NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0."), min_size=1), unique=True)


@settings(max_examples=40)
@given(NAMES, st.integers(1, 5))
def test_many_manifests_become_one_that_points_at_all_files(names, count):
    plain = [name for name in names if name.isascii()]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in range(count):
            publish(root, f"shards/{part}", plain[part::count])
        summary = merge(Location(folder), {f"shards/{part}": None for part in range(count)}, root / "manifest.jsonl")
        merged = list(read_manifest(root / "manifest.jsonl"))

    assert [entry.path for entry in merged] == sorted(plain, key=sort_key)
    assert all(entry.at == f"shards/{plain.index(entry.path) % count}/data/{entry.path}" for entry in merged)
    whole = Tally()
    for name in sorted(plain, key=sort_key):
        whole.add(Entry(name, len(name), SHA))
    assert summary == whole.summary()


def test_more_parts_than_files_may_be_open_are_merged(tmp_path):
    for part in range(200):
        publish(tmp_path, f"shards/{part}", [f"{199 - part:03}", f"x{part:03}"])
    summary = merge(Location(str(tmp_path)), {f"shards/{part}": None for part in range(200)}, tmp_path / "manifest.jsonl")

    assert summary.file_count == 400
    assert [entry.path for entry in read_manifest(tmp_path / "manifest.jsonl")][:3] == ["000", "001", "002"]


def test_a_name_in_two_parts_is_an_error_that_names_both(tmp_path):
    publish(tmp_path, "shards/0", ["a", "same"])
    publish(tmp_path, "shards/1.0", ["b", "same"])

    with pytest.raises(DuplicateName, match=r"The parts shards/0 and shards/1\.0 both wrote 'same'"):
        merge(Location(str(tmp_path)), {"shards/0": None, "shards/1.0": None}, tmp_path / "manifest.jsonl")


def test_the_ledger_gives_back_what_was_written_and_passes_over_what_a_crash_cut(tmp_path):
    books = ledger.Ledger(Location(str(tmp_path)))
    rows = [
        ledger.Row.of(Attempt(shard, 2), Ending.FAILED, seconds=1.5, code="exit_nonzero", tail=("a", "b"))
        for shard in by_count(10, 3)
    ]
    for row in rows:
        books.write(row)
    damaged = tmp_path / ledger.FOLDER / "1.json"
    damaged.write_bytes(damaged.read_bytes()[:40])

    assert sorted(books.rows(), key=lambda row: row.index) == [rows[0], rows[2]]
    assert books.read("2") == rows[2]
    assert books.read("1") is None
    assert books.read("7") is None
