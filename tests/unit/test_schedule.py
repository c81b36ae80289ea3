"""What a batch does next, proved by thousands of batches on a clock that is only a number."""

import heapq
import math
import random
from array import array
from itertools import count

import pytest
from hypothesis import given, settings, strategies as st

from oasis_flows.capacity import HEADROOM, Demand, Node, Vector, fit, too_big
from oasis_flows.schedule import TRIES, Attempt, Ending, Schedule
from oasis_flows.sharding import by_bytes, by_count, weigh

GIB = 1 << 30


def scheduled(sizes, shards, **options):
    layout = by_bytes(iter(sizes), shards, file_count=len(sizes), size_bytes=sum(sizes))
    return Schedule(layout, weigh(layout, sizes), **options)


def run(schedule, how, *, at_once=1):
    """Drive a batch to its end; `how` tells the ending of an attempt. Returns all attempts."""
    now, attempts, under_way = 0.0, [], []
    while not schedule.finished:
        while len(under_way) < at_once and (attempt := schedule.start(now)):
            under_way.append(attempt)
            attempts.append(attempt)
        if under_way:
            attempt = under_way.pop(0)
            schedule.ended(attempt, how(attempt), now)
        else:
            now += 1.0
    return attempts


def all_done(_):
    return Ending.DONE


@given(st.integers(0, 500), st.integers(1, 60), st.integers(1, 8))
def test_every_file_is_done_once(files, shards, at_once):
    schedule = scheduled([1] * files, shards)
    attempts = run(schedule, all_done, at_once=at_once)

    assert sorted(file for each in attempts for file in range(each.shard.start, each.shard.end)) == list(range(files))
    assert schedule.files_done == files
    assert (schedule.failed, schedule.stopped) == ([], False)


@settings(max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 30), st.data())
def test_bad_files_stand_alone_after_few_runs_and_all_others_are_done(files, shards, data):
    bad = set(data.draw(st.lists(st.integers(0, files - 1), max_size=12)))
    schedule = scheduled([1] * files, shards)
    attempts = run(
        schedule, lambda a: Ending.FAILED if bad & set(range(a.shard.start, a.shard.end)) else Ending.DONE, at_once=3
    )

    assert {shard.start for shard in schedule.failed} == bad
    assert all(shard.files == 1 for shard in schedule.failed)
    assert schedule.files_done == files - len(bad)
    largest = -(-files // min(shards, files))
    extra = len(attempts) - min(shards, files)
    assert extra <= 2 * len(bad) * math.ceil(math.log2(largest)) if largest > 1 else extra == 0


def test_an_algorithm_that_fails_on_everything_is_given_up_after_a_few_files():
    schedule = scheduled([1] * 1_000_000, 100, most_failed=20)
    attempts = run(schedule, lambda _: Ending.FAILED)

    assert schedule.too_many_failed
    assert len(attempts) < 100


def test_accidents_are_tried_again_later_and_later_and_then_end_the_batch():
    schedule, starts, now = scheduled([1, 1], 2), [], 0.0
    while not schedule.finished:
        if attempt := schedule.start(now):
            starts.append((now, attempt.shard.name, attempt.number))
            schedule.ended(attempt, Ending.UNKNOWN if attempt.shard.name == "0" else Ending.DONE, now)
        else:
            now += 1.0

    assert [(when, number) for when, name, number in starts if name == "0"] == [(0, 1), (2, 2), (6, 3), (14, 4)]
    assert schedule.stopped
    assert schedule.files_done == 1


def test_a_container_that_is_killed_every_time_has_itself_to_blame():
    schedule = scheduled([1, 1], 1)
    attempts = run(schedule, lambda a: Ending.KILLED if a.shard.start == 0 else Ending.DONE)

    assert [shard.name for shard in schedule.failed] == ["0.0"]
    assert len(attempts) == 2 * TRIES + 1


def test_what_would_be_the_same_for_every_shard_ends_the_batch_at_once():
    schedule = scheduled([1] * 100, 10)

    assert len(run(schedule, lambda _: Ending.HOPELESS)) == 1
    assert schedule.stopped


def test_the_algorithm_is_tried_again_only_if_the_user_asks():
    assert len(run(scheduled([1], 1), lambda _: Ending.FAILED)) == 1
    retried = run(scheduled([1], 1, algorithm_retries=2), lambda _: Ending.FAILED)
    assert [(each.number, each.failures) for each in retried] == [(1, 0), (2, 1), (3, 2)]


@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 400), st.data())
def test_a_batch_that_is_killed_at_any_point_goes_on_where_it_was(files, shards, killed_after, data):
    bad = set(data.draw(st.lists(st.integers(0, files - 1), max_size=4)))

    def how(attempt):
        return Ending.FAILED if bad & set(range(attempt.shard.start, attempt.shard.end)) else Ending.DONE

    ledger, before = {}, scheduled([1] * files, shards)
    for _ in range(killed_after):
        if attempt := before.start(0.0):
            ledger[attempt.shard.name] = how(attempt)
            before.ended(attempt, how(attempt), 0.0)
    after = scheduled([1] * files, shards, known=ledger)
    attempts = run(after, how)

    assert not {each.shard.name for each in attempts} & ledger.keys()
    assert after.files_done == files - len(bad)
    assert {shard.start for shard in after.failed} == bad


def test_the_heaviest_shards_are_started_first():
    schedule = Schedule(by_count(4, 4), array("q", [1, 9, 5, 9]))

    assert [each.shard.name for each in run(schedule, all_done)] == ["1", "3", "2", "0"]


# A cluster on a virtual clock


class Cluster:
    """Nodes with other people's load on them, and our containers; `at_once` asks what fits, as the flow does."""

    def __init__(self, rng, demand):
        self.rng, self.demand = rng, demand
        self.capacity = [
            Vector(rng.randint(1, 16) * 1000, rng.randint(1, 64) * GIB, rng.randint(0, 4), 110)
            for _ in range(rng.randint(1, 6))
        ]
        self.others = [Vector()] * len(self.capacity)
        self.ours = [0] * len(self.capacity)
        self.change()

    def change(self):
        self.others = [Vector(*(self.rng.randint(0, amount) // 2 for amount in most)) for most in self.capacity]

    @property
    def nodes(self):
        pairs = zip(self.capacity, self.others, strict=True)
        return [Node(name=str(i), allocatable=most, requested=used) for i, (most, used) in enumerate(pairs)]

    def place(self):
        """The node for one more container, or `None`."""
        room = fit(self.nodes, self.demand).nodes
        for number, (most, mine) in enumerate(zip(room, self.ours, strict=True)):
            if mine < most:
                self.ours[number] += 1
                self.assert_not_over_committed(number)
                return number
        return None

    def assert_not_over_committed(self, number):
        node = self.nodes[number]
        for have, used, want, headroom in zip(
            node.allocatable, node.requested, self.demand.on(node), (HEADROOM, HEADROOM, 1, 1), strict=True
        ):
            assert used + self.ours[number] * want <= have * headroom


def simulate(rng, *, changing):
    """One random batch on a random cluster; returns its makespan and the least that any schedule could need."""
    demand = Demand(cpus=rng.choice([0.5, 1, 2]), memory_bytes=rng.randint(1, 8) * GIB, gpus=rng.choice([0, 0, 0, 1]))
    cluster = Cluster(rng, demand)
    slots = fit(cluster.nodes, demand).count
    if not slots and (not changing or too_big(cluster.nodes, demand)):
        return None
    sizes = [rng.randint(1, 1000) for _ in range(rng.randint(1, 400))]
    layout = by_bytes(iter(sizes), max(slots, 1) * 8, file_count=len(sizes), size_bytes=sum(sizes))
    schedule = Schedule(layout, weigh(layout, sizes))
    now, events, done, ticket = 0.0, [], [], count()
    while not schedule.finished:
        while (where := cluster.place()) is not None:
            attempt = schedule.start(now)
            if attempt is None:
                cluster.ours[where] -= 1
                break
            seconds = float(sum(sizes[attempt.shard.start : attempt.shard.end]))
            heapq.heappush(events, (now + seconds, next(ticket), where, attempt))
        if events:
            now, _, where, attempt = heapq.heappop(events)
            cluster.ours[where] -= 1
            accident = changing and rng.random() < 0.02
            schedule.ended(attempt, Ending.UNKNOWN if accident else Ending.DONE, now)
            done += [] if accident else [attempt]
        else:
            now += 5.0
        if changing and rng.random() < 0.3:
            cluster.change()
        if schedule.stopped:
            break
    if not schedule.stopped:
        assert schedule.files_done == len(sizes)
        assert sorted(each.shard.start for each in done) == [shard.start for shard in layout]
    longest = max(sum(sizes[shard.start : shard.end]) for shard in layout)
    return now / max(sum(sizes) / max(slots, 1), longest, max(sizes))


@pytest.mark.parametrize("seed", range(10))
def test_random_clusters_with_changing_loads_are_never_over_committed(seed):
    rng = random.Random(seed)
    for _ in range(100):
        simulate(rng, changing=True)


@pytest.mark.parametrize("seed", range(10))
def test_the_makespan_is_within_a_quarter_of_the_lower_bound(seed):
    rng = random.Random(1000 + seed)
    ratios = [ratio for _ in range(100) if (ratio := simulate(rng, changing=False)) is not None]

    assert len(ratios) > 25
    assert max(ratios) <= 1.25


def test_an_attempt_that_ends_leaves_the_schedule_as_it_found_it():
    schedule = scheduled([1], 1)
    attempt = schedule.start(0.0)

    assert attempt == Attempt(attempt.shard)
    assert (schedule.running, schedule.finished, schedule.start(0.0)) == (1, False, None)
    assert schedule.ended(attempt, Ending.DONE, 0.0)
    assert (schedule.running, schedule.finished) == (0, True)
