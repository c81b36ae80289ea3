"""Workspaces and leases: what is done stays done, and only what nobody owns is taken away."""

import concurrent.futures
import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from oasis_flows import lease, lifecycle, workspace
from oasis_flows.errors import StoreFull

HOLDER = """
import sys, time
from pathlib import Path
from oasis_flows import lease
with lease.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

# Fills the file size that this process may write; SIGXFSZ is ignored by Python, so that writing fails with an error.
SMALL_DISK = """
import resource, sys
from pathlib import Path
from oasis_flows import workspace
from oasis_flows.errors import StoreFull
with workspace.open_workspace(Path(sys.argv[1]), "run") as space:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        space.mark_done("step", {"found": "x" * 1000})
    except StoreFull as error:
        print(error)
    assert space.done("step") is None
"""

# What runs as nobody, beside files of root, as a worker beside a container that writes as root.
NOT_ROOT = """
import os, sys
from pathlib import Path
from oasis_flows import workspace
os.setgroups([]); os.setgid(65534); os.setuid(65534)
"""


def lapsed(path, grace_seconds):
    with lease.taken(path, grace_seconds) as free:
        return free


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
    assert not lapsed(path, 0)
    holder.send_signal(signal.SIGKILL)
    holder.wait()

    assert lapsed(path, 0)
    assert not lapsed(path, 60)


def test_an_old_lease_of_a_living_owner_never_lapses(tmp_path, holder):
    os.utime(tmp_path / "run" / "lease", (0, 0))

    assert not lapsed(tmp_path / "run" / "lease", 60)


def test_a_lease_that_is_gone_proves_nothing(tmp_path):
    assert not lapsed(tmp_path / "none", 0)
    assert lease.missing(tmp_path / "none")


def test_a_look_at_a_lease_does_not_keep_its_owner_away(tmp_path):
    with lease.hold(tmp_path / "lease"):
        pass
    looker = os.open(tmp_path / "lease", os.O_RDWR)
    fcntl.flock(looker, fcntl.LOCK_SH)
    threading.Timer(0.3, os.close, [looker]).start()

    with lease.hold(tmp_path / "lease"):
        assert not lapsed(tmp_path / "lease", 0)


def test_who_waited_for_a_lease_that_was_then_removed_owns_a_new_one(tmp_path):
    with workspace.open_workspace(tmp_path, "run") as first:
        opened = []

        def open_again():
            with workspace.open_workspace(tmp_path, "run") as second:
                opened.append(second.path.stat().st_mode & 0o777)
                assert not lapsed(second.lease, 0)

        waiting = threading.Thread(target=open_again)
        waiting.start()
        time.sleep(0.2)
        assert first.remove()
    waiting.join()

    assert opened == [0o700]


def test_two_processes_cannot_work_on_one_run(tmp_path, holder):
    with pytest.raises(lease.RunInUse, match="Wait for it"), workspace.open_workspace(tmp_path, "run"):
        pass


def test_a_finished_step_is_found_by_the_next_attempt(tmp_path):
    with workspace.open_workspace(tmp_path, "run") as first:
        assert first.done("stage_input") is None
        first.mark_done("stage_input", {"files": 3})
    with workspace.open_workspace(tmp_path, "run") as second:
        assert second.done("stage_input") == {"files": 3}


def test_no_finished_step_is_noted_any_more_when_its_files_begin_to_go(tmp_path, monkeypatch):
    with workspace.open_workspace(tmp_path, "run") as place:
        place.mark_done("stage_input", {"folder": str(place.input)})
        place.input.mkdir()
        noted = []

        def look_and_delete(path, delete=workspace.delete):
            noted.append((path.name, place.done("stage_input")))
            delete(path)

        monkeypatch.setattr(workspace, "delete", look_and_delete)
        place.clear()

    assert ("input", None) in noted


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


def test_a_folder_without_a_lease_is_taken_once_it_is_old(tmp_path):
    for name in ("old", "young"):
        (tmp_path / name / "done").mkdir(parents=True)
    os.utime(tmp_path / "old", (0, 0))

    assert workspace.reap(tmp_path, 3600) == ("old",)
    assert [path.name for path in tmp_path.iterdir()] == ["young"]


def test_opening_and_reaping_at_once_harm_nobody(tmp_path):
    began = time.monotonic()
    counts = [0, 0]

    def going():
        # Long enough to meet one another, also on a machine that is busy with other things.
        waited = time.monotonic() - began
        return waited < 2 or (min(counts) <= 10 and waited < 60)

    def work(run_id):
        while going():
            # Two share a run: they may find it in use, and nothing else.
            with contextlib.suppress(lease.RunInUse), workspace.open_workspace(tmp_path, run_id) as space:
                (space.fresh_output() / "file").write_text("x")
                time.sleep(0.001)
                assert (space.output / "file").read_text() == "x"
                assert space.lease.exists()
                counts[0] += 1
                if counts[0] % 3 == 0:
                    assert space.remove()

    def reap():
        while going():
            counts[1] += len(workspace.reap(tmp_path, 0))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(work, run_id) for run_id in ("a", "b", "c", "c")] + [pool.submit(reap) for _ in range(4)]
    for job in jobs:
        job.result()
    assert min(counts) > 10


def test_looking_for_dead_runs_never_fails_a_living_one(monkeypatch, caplog):
    def broken(_, **__):
        raise PermissionError(13, "Permission denied", "/elsewhere")

    monkeypatch.setattr(lifecycle, "sweep", broken)
    monkeypatch.setattr(lifecycle, "get_run_logger", lambda: logging.getLogger("test"))
    lifecycle._sweep(None)

    assert "PermissionError" in caplog.text
    assert "/elsewhere" in caplog.text


def test_a_step_that_cannot_be_noted_says_where_there_is_no_room(tmp_path):
    said = subprocess.run([sys.executable, "-c", SMALL_DISK, tmp_path], capture_output=True, text=True, check=True).stdout

    assert f"{tmp_path}/run/done/step.json cannot be written: File too large. Free space" in said
    assert "OASIS_FLOWS_HOME" in said


def test_an_output_folder_that_cannot_be_made_says_so(tmp_path, monkeypatch):
    with workspace.open_workspace(tmp_path, "run") as space:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "mkdir", full)
        with pytest.raises(StoreFull, match="output cannot be written: No space left on device"):
            space.fresh_output()


def test_what_cannot_be_deleted_keeps_its_lease_and_is_not_reported(tmp_path):
    with workspace.open_workspace(tmp_path, "run") as space:
        (space.fresh_output() / "sub").mkdir()
        (space.output / "sub" / "file").write_text("of root")
    os.chown(space.path, 65534, 65534)
    os.chown(space.lease, 65534, 65534)
    script = NOT_ROOT + "print(workspace.reap(Path(sys.argv[1]), 0), workspace.Workspace(Path(sys.argv[1], 'run')).remove())"
    with opened_up(tmp_path):
        said = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True).stdout

    assert said == "() False\n"
    assert space.lease.exists()
    assert (space.output / "sub" / "file").exists()


def test_what_this_user_may_not_look_at_has_an_owner(tmp_path):
    with workspace.open_workspace(tmp_path, "run") as space:
        pass
    script = NOT_ROOT + (
        "from oasis_flows import lease\n"
        "path = Path(sys.argv[1], 'run', 'lease')\n"
        "with lease.taken(path, 0) as free: print(free, lease.missing(path), workspace.reap(Path(sys.argv[1]), 0))"
    )
    with opened_up(tmp_path):
        said = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True).stdout

    assert said == "False False ()\n"
    assert space.lease.exists()


@contextlib.contextmanager
def opened_up(path):
    """Let every user reach `path`: pytest's folders are for one alone."""
    closed = [folder for folder in (path, *path.parents) if not folder.stat().st_mode & 1]
    modes = [(folder, folder.stat().st_mode) for folder in closed]
    for folder, mode in modes:
        folder.chmod(mode | 0o5)
    yield
    for folder, mode in modes:
        folder.chmod(mode)


def test_folders_closed_to_their_owner_are_removed(tmp_path):
    script = NOT_ROOT + (
        "with workspace.open_workspace(Path(sys.argv[1], 'runs'), 'run') as space:\n"
        "    (space.fresh_output() / 'a/b').mkdir(parents=True)\n"
        "    (space.output / 'a/b/file').touch()\n"
        "    (space.output / 'a/b').chmod(0)\n"
        "    (space.output / 'a').chmod(0)\n"
        "    print(list(space.fresh_output().iterdir()), space.remove(), space.path.exists())"
    )
    (tmp_path / "runs").mkdir()
    os.chown(tmp_path / "runs", 65534, 65534)
    with opened_up(tmp_path):
        said = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True).stdout

    assert said == "[] True False\n"


def test_folders_nested_deeper_than_python_counts_are_removed(tmp_path):
    with workspace.open_workspace(tmp_path, "run") as space:
        inner = os.open(space.fresh_output(), os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("d", dir_fd=inner)
            outer, inner = inner, os.open("d", os.O_RDONLY, dir_fd=inner)
            os.close(outer)
        os.close(inner)

        assert list(space.fresh_output().iterdir()) == []
