"""Workspaces and leases: what is done stays done, and only what nobody owns is taken away."""

import os
import signal
import subprocess
import sys
import time

import pytest

from oasis_flows import lease, workspace

HOLDER = """
import sys, time
from pathlib import Path
from oasis_flows import lease
with lease.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lease at `tmp_path/run/lease`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run" / "lease")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_lease_lapses_when_its_owner_is_killed(tmp_path, holder):
    path = tmp_path / "run" / "lease"
    assert not lease.lapsed(path, 0)
    holder.send_signal(signal.SIGKILL)
    holder.wait()

    assert lease.lapsed(path, 0)
    assert not lease.lapsed(path, 60)


def test_an_old_lease_of_a_living_owner_never_lapses(tmp_path, holder):
    os.utime(tmp_path / "run" / "lease", (0, 0))

    assert not lease.lapsed(tmp_path / "run" / "lease", 60)


def test_a_lease_that_is_gone_has_lapsed(tmp_path):
    assert lease.lapsed(tmp_path / "none", 60)


def test_two_processes_cannot_work_on_one_run(tmp_path, holder):
    with pytest.raises(lease.RunInUse, match="Wait for it"), workspace.open_workspace(tmp_path, "run"):
        pass


def test_a_finished_step_is_found_by_the_next_attempt(tmp_path):
    with workspace.open_workspace(tmp_path, "run") as first:
        assert first.done("stage_input") is None
        first.mark_done("stage_input", {"files": 3})
    with workspace.open_workspace(tmp_path, "run") as second:
        assert second.done("stage_input") == {"files": 3}


def test_the_output_folder_is_empty_for_each_container(tmp_path):
    with workspace.open_workspace(tmp_path, "run") as space:
        (space.fresh_output() / "old").write_text("x")

        assert list(space.fresh_output().iterdir()) == []
        assert space.output.stat().st_mode & 0o777 == 0o777


def test_reaping_takes_dead_runs_and_leaves_living_and_young_ones(tmp_path, holder):
    for name in ("old", "young"):
        with workspace.open_workspace(tmp_path, name) as space:
            (space.fresh_output() / "file").write_text("x")
    long_ago = time.time() - 7200
    os.utime(tmp_path / "old" / "lease", (long_ago, long_ago))
    os.utime(tmp_path / "run" / "lease", (long_ago, long_ago))

    assert workspace.reap(tmp_path, 3600) == ("old",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "young"]
