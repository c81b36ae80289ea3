"""What a container used: from the kernel's files and the engine's answers to a few samples. What is parsed is captured."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from oasis_flows.engines import docker_usage
from oasis_flows.engines.cgroup import Cgroup, find_cgroup, kills_for_memory
from oasis_flows.engines.docker_usage import reading_of
from oasis_flows.engines.usage import MOST_SAMPLES, Reading, Usage

ID = "bbe6486c96dfc891d85a7241ea3222f26b5c712185bf7c8b100ac05086b0c0ec"
# Docker 20.10 on cgroup v1, where the tree of version 2 is there as well and empty.
V1_LINES = f"8:pids:/docker/{ID}\n4:memory:/docker/{ID}\n2:cpu,cpuacct:/docker/{ID}\n0::/docker/{ID}\n"
V1_FILES = {
    f"memory/docker/{ID}/memory.usage_in_bytes": "2641920\n",
    f"memory/docker/{ID}/memory.max_usage_in_bytes": "4083712\n",
    f"memory/docker/{ID}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n",
    f"memory/docker/{ID}/memory.stat": "cache 1892352\ninactive_file 1\nactive_file 327680\ntotal_inactive_file 1564672\n",
    f"cpuacct/docker/{ID}/cpuacct.usage": "49768804\n",
    f"pids/docker/{ID}/pids.events": "max 0\n",
    f"cpuacct/docker/{ID}/cpu.stat": "nr_periods 23\n",
}
V2_AT = f"system.slice/docker-{ID}.scope"
V2_FILES = {
    f"{V2_AT}/memory.current": "2641920\n",
    f"{V2_AT}/memory.peak": "4083712\n",
    f"{V2_AT}/memory.events": "low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n",
    f"{V2_AT}/memory.stat": "anon 61440\nfile 1892352\ninactive_file 1564672\nactive_file 327680\n",
    f"{V2_AT}/cpu.stat": "usage_usec 49768\nuser_usec 30000\nsystem_usec 19768\nnr_periods 23\n",
    f"{V2_AT}/pids.events": "max 7\n",
}
SEEN = Reading(cpu_seconds=0.049768804, memory_bytes=1077248, memory_peak_bytes=4083712)
# The engine's client, of an engine on this machine and on another one.
HERE, ELSEWHERE = SimpleNamespace(base_url="http+docker://localhost"), SimpleNamespace(base_url="https://10.0.0.7:2376")
# Docker 20.10 on cgroup v1, shortened; then the same of cgroup v2, which keeps other words and no maximum.
STATS_V1 = {
    "memory_stats": {
        "usage": 18366464,
        "max_usage": 18366469,
        "stats": {"inactive_file": 5, "total_inactive_file": 1564672},
        "limit": 67108864,
    },
    "cpu_stats": {"cpu_usage": {"total_usage": 1118151587, "usage_in_usermode": 1110000000}, "online_cpus": 2},
    "pids_stats": {"current": 1, "limit": 10},
}
STATS_V2 = {**STATS_V1, "memory_stats": {"usage": 18366464, "stats": {"inactive_file": 1564672}, "limit": 67108864}}
STATS_ENDED = {"memory_stats": {}, "cpu_stats": {"cpu_usage": {"total_usage": 0}}, "pids_stats": {}}


def machine(root: Path, lines: str, files: Mapping[str, str]) -> Path:
    """A root folder with the process 7 and these files of cgroups."""
    for name, text in {"proc/7/cgroup": lines, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def cgroup(root: Path, lines: str, files: Mapping[str, str]) -> Cgroup:
    found = find_cgroup(7, ID, machine(root, lines, files))
    assert found
    return found


def test_cgroup_v1(tmp_path: Path) -> None:
    found = cgroup(tmp_path, V1_LINES, V1_FILES)
    assert found.read() == SEEN
    (tmp_path / f"sys/fs/cgroup/memory/docker/{ID}/memory.oom_control").write_text("oom_kill_disable 0\noom_kill 2\n")
    (tmp_path / f"sys/fs/cgroup/pids/docker/{ID}/pids.events").write_text("max 41\n")
    assert (found.read().killed_for_memory, found.read().forks_refused) == (True, 41)


def test_cgroup_v2(tmp_path: Path) -> None:
    read = cgroup(tmp_path, f"0::/{V2_AT}\n", V2_FILES).read()
    assert read == Reading(
        cpu_seconds=pytest.approx(0.049768),
        memory_bytes=1077248,
        memory_peak_bytes=4083712,
        killed_for_memory=True,
        forks_refused=7,
    )


def test_a_kernel_that_keeps_no_peak(tmp_path: Path) -> None:
    files = {name: text for name, text in V2_FILES.items() if not name.endswith(".peak")}
    read = cgroup(tmp_path, f"0::/{V2_AT}\n", files).read()
    assert (read.memory_peak_bytes, read.memory_bytes) == (None, 1077248)


def test_a_container_that_has_ended_leaves_what_was_read_before(tmp_path: Path) -> None:
    found, usage = cgroup(tmp_path, V1_LINES, V1_FILES), Usage()
    usage.add(1.0, found.read())
    for file in tmp_path.rglob("*.*"):
        file.unlink()
    usage.add(1.2, found.read())
    assert (usage.cpu_seconds, usage.memory_peak_bytes, len(usage.samples())) == (SEEN.cpu_seconds, 4083712, 1)


@pytest.mark.parametrize(
    "lines",
    [
        V1_LINES.replace(ID, "somebody-else"),
        V1_LINES.replace(f"memory:/docker/{ID}", "memory:/docker/somebody-else").replace(f"0::/docker/{ID}", "0::/"),
        f"0::/docker/{ID}\n",
    ],
)
def test_only_the_containers_own_cgroup_is_taken(tmp_path: Path, lines: str) -> None:
    assert find_cgroup(7, ID, machine(tmp_path, lines, V1_FILES)) is None
    assert find_cgroup(8, ID, tmp_path) is None


def test_the_kernels_count_of_kills(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/vmstat").write_text("drop_slab 0\noom_kill 12\noom_kills 3\n")
    assert kills_for_memory(tmp_path) == 12
    assert kills_for_memory(tmp_path / "nowhere") is None
    assert (kills_for_memory() or 0) >= 0


def test_a_kill_for_memory_that_nobody_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([3, 3, 5, 5])
    found = cgroup(tmp_path, V1_LINES, V1_FILES)
    monkeypatch.setattr(docker_usage, "kills_for_memory", lambda: next(counts))
    monkeypatch.setattr(docker_usage, "find_cgroup", lambda *_: found)
    watch = docker_usage.UsageWatch(HERE, ID)
    watch.begin({"Pid": 7, "Running": True})
    watch.sample()
    for file in tmp_path.rglob("memory.*"):
        file.unlink()
    watch.sample()
    # What happens from now on is somebody else's.
    watch.result()
    assert watch.killed_unseen()


@pytest.mark.parametrize(
    "state", [{"Pid": 0, "Running": False}, {"Pid": 7, "Running": True}], ids=["ended", "not told to have ended"]
)
def test_a_kill_for_memory_before_the_first_reading(monkeypatch: pytest.MonkeyPatch, state: Mapping[str, object]) -> None:
    counts = iter([3, 4])
    monkeypatch.setattr(docker_usage, "kills_for_memory", lambda: next(counts))
    monkeypatch.setattr(docker_usage, "find_cgroup", lambda *_: None)
    watch = docker_usage.UsageWatch(HERE, ID)
    watch.begin(state)
    watch.result()
    assert watch.killed_unseen()


@pytest.mark.parametrize(
    ("api", "read", "stats"),
    [(HERE, True, {}), (HERE, False, STATS_V1), (ELSEWHERE, False, {})],
    ids=["read", "alive", "elsewhere"],
)
def test_the_machines_kills_are_no_word_on_a_container_that_was_read_since_or_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: SimpleNamespace, read: bool, stats: Mapping[str, object]
) -> None:
    found = cgroup(tmp_path, V1_LINES, V1_FILES)
    kills, asked = [3], threading.Event()
    monkeypatch.setattr(docker_usage, "kills_for_memory", lambda: kills[0])
    monkeypatch.setattr(docker_usage, "find_cgroup", lambda *_: found if read else None)
    api.stats = lambda *_, **__: asked.set() or stats
    watch = docker_usage.UsageWatch(api, ID)
    watch.begin({"Pid": 7, "Running": True})
    assert read or asked.wait(10)
    time.sleep(0.1)
    kills[0] += 1
    watch.sample()
    watch.result()
    assert not watch.killed_unseen()


def test_what_the_engine_says() -> None:
    seen = Reading(cpu_seconds=1.118151587, memory_bytes=16801792, memory_peak_bytes=18366469)
    assert reading_of(STATS_V1) == seen
    assert reading_of(STATS_V2) == Reading(cpu_seconds=1.118151587, memory_bytes=16801792, memory_peak_bytes=None)
    assert reading_of(STATS_ENDED) == Reading(cpu_seconds=None, memory_bytes=None, memory_peak_bytes=None)


def followed(seconds: float, step: float = 0.2) -> Usage:
    """A container that uses half a processor, and in its third second a gigabyte, else one more byte each second."""
    usage = Usage()
    for number in range(1, round(seconds / step) + 1):
        now = number * step
        memory = 1 << 30 if 3 <= now < 3 + step else int(now)
        usage.add(now, Reading(cpu_seconds=now / 2, memory_bytes=memory, memory_peak_bytes=memory))
    return usage


@pytest.mark.parametrize(("seconds", "step", "least"), [(2, 0.2, 9), (47, 0.2, 200), (60, 0.1, 120), (86_400, 5.0, 120)])
def test_a_run_of_any_length_has_enough_samples_and_never_too_many(seconds: float, step: float, least: int) -> None:
    samples = followed(seconds, step).samples()
    assert least <= len(samples) <= MOST_SAMPLES
    assert [s.seconds for s in samples] == sorted({s.seconds for s in samples})
    assert samples[-1].seconds == pytest.approx(seconds)
    assert {s.cpus for s in samples} == {0.5}


def test_joining_samples_forgets_no_memory() -> None:
    assert max(sample.memory_bytes for sample in followed(3_000).samples()) == 1 << 30


def test_a_last_moment_too_short_for_an_average_joins_the_one_before() -> None:
    usage = Usage()
    for seconds, cpu, memory in ((0.19, 0.1, 5), (0.201, 0.111, 9)):
        usage.add(seconds, Reading(cpu_seconds=cpu, memory_bytes=memory, memory_peak_bytes=9))
    assert [(s.seconds, s.cpus, s.memory_bytes) for s in usage.samples()] == [(0.2, 0.552, 9)]


def test_a_container_that_was_met_later_has_an_average_of_what_was_missed() -> None:
    usage = Usage()
    usage.add(1_000.0, Reading(cpu_seconds=250.0, memory_bytes=7, memory_peak_bytes=9))
    assert [(s.seconds, s.cpus) for s in usage.samples()] == [(1_000.0, 0.25)]
    assert usage.cpu_seconds == 250.0
