"""How listings are cut: for any number of files, sizes and shards."""

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from oasis_flows.errors import DescriptionError
from oasis_flows.sharding import Layout, Shard, by_bytes, by_count, by_files, weigh

COUNTS = st.integers(0, 3000)
SHARDS = st.integers(1, 400)
SIZES = st.lists(st.one_of(st.just(0), st.integers(0, 100), st.integers(0, 1 << 40)), max_size=300)


def balanced(sizes, shards):
    return by_bytes(iter(sizes), shards, file_count=len(sizes), size_bytes=sum(sizes))


def assert_sound(layout, file_count):
    """Disjoint, complete, in order, none empty, numbered."""
    shards = list(layout)
    assert [file for shard in shards for file in range(shard.start, shard.end)] == list(range(file_count))
    assert all(shard.files > 0 for shard in shards)
    assert [(shard.index, shard.name, shard.count) for shard in shards] == [
        (i, str(i), len(shards)) for i in range(len(shards))
    ]
    assert list(Layout(layout.ends)) == shards


@given(COUNTS, SHARDS)
def test_by_count_is_sound_and_even(file_count, shards):
    layout = by_count(file_count, shards)

    assert_sound(layout, file_count)
    assert len(layout) == min(file_count, shards)
    assert len({shard.files for shard in layout}) <= 2
    assert max((shard.files for shard in layout), default=0) - min((shard.files for shard in layout), default=0) <= 1


@given(COUNTS, SHARDS)
def test_by_files_is_sound_and_full_but_for_the_last(file_count, each):
    layout = by_files(file_count, each)

    assert_sound(layout, file_count)
    assert all(shard.files == each for shard in list(layout)[:-1])
    assert all(shard.files <= each for shard in layout)


@given(SIZES, SHARDS)
def test_by_bytes_is_sound_the_same_every_time_and_no_shard_of_several_files_is_much_heavier(sizes, shards):
    layout = balanced(sizes, shards)

    assert_sound(layout, len(sizes))
    assert len(layout) == min(len(sizes), shards)
    assert list(balanced(sizes, shards)) == list(layout)
    for shard in layout:
        if shard.files > 1:
            weight = sum(sizes[shard.start : shard.end])
            assert weight * len(layout) <= sum(sizes) + (max(sizes) + 1) * len(layout)


@given(st.integers(0, 2000), SHARDS)
def test_by_bytes_of_empty_files_balances_their_number(file_count, shards):
    files = [shard.files for shard in balanced([0] * file_count, shards)]

    assert not files or max(files) - min(files) <= 1


@given(SIZES, SHARDS)
def test_shards_weigh_what_their_files_do(sizes, shards):
    layout = by_count(len(sizes), shards)

    assert list(weigh(layout, iter(sizes))) == [sum(sizes[shard.start : shard.end]) for shard in layout]


def test_by_bytes_gives_a_large_file_a_shard_of_its_own():
    assert [(shard.start, shard.end) for shard in balanced([1, 1, 1, 1000, 1, 1], 3)] == [(0, 3), (3, 4), (4, 6)]


def test_by_bytes_refuses_sizes_that_are_not_those_that_were_added_up():
    with pytest.raises(ValueError, match="There are 2 files, not the 3"):
        by_bytes([1, 2], 2, file_count=3, size_bytes=3)


@pytest.mark.parametrize(("file_count", "shards"), [(10, 3), (5000, 14), (2, 4)])
def test_no_file_is_in_two_shards_where_oscar_batch_had_it_in_two(file_count, shards):
    """Its ranges shared their boundaries: (1, 5), (5, 8), (8, 11) of ten files; and it started empty ones."""
    starts_at_1 = [(shard.start + 1, shard.end) for shard in by_count(file_count, shards)]

    assert starts_at_1[0][0] == 1
    assert starts_at_1[-1][1] == file_count
    assert all(end + 1 == start for (_, end), (start, _) in pairwise(starts_at_1))
    assert len(starts_at_1) == min(file_count, shards)


@pytest.mark.parametrize("cut", [by_count, by_files])
@pytest.mark.parametrize("number", [0, -1])
def test_a_number_that_is_not_positive_is_refused(cut, number):
    with pytest.raises(DescriptionError, match="must be at least 1"):
        cut(10, number)


def leaves(shard):
    return [shard] if shard.files == 1 else [leaf for half in shard.halves() for leaf in leaves(half)]


@given(st.integers(0, 1000), st.integers(1, 300))
def test_halves_of_halves_end_in_single_files_with_names_of_their_own(start, files):
    shard = Shard(name="7", index=7, count=9, start=start, end=start + files)
    single = leaves(shard)

    assert [leaf.start for leaf in single] == list(range(start, start + files))
    assert len({leaf.name for leaf in single}) == files
    assert {(leaf.index, leaf.count) for leaf in single} == {(7, 9)}
    assert max(leaf.name.count(".") for leaf in single) <= (files - 1).bit_length()


def test_a_single_file_has_no_halves():
    with pytest.raises(ValueError, match="Shard 3 is one file"):
        Shard(name="3", index=3, count=4, start=5, end=6).halves()
