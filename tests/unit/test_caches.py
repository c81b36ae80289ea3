"""What prerequisites keep: made once, held while it is used, and removed when nobody has used it for long."""

import fcntl
import os
import threading
import time

import pytest

from oasis_flows import caches

DAY = 86_400


def fill(folder):
    (folder / "data").write_text("data")
    return True


def never(*_):
    raise AssertionError("not expected")


def age(root, name, seconds):
    then = time.time() - seconds
    os.utime(root / f"{name}.lock", (then, then))


@pytest.fixture
def root(tmp_path):
    """With one folder that is kept, `a`."""
    with caches.held(tmp_path, "a", fill, never) as kept:
        assert (kept / "data").read_text() == "data"
    return tmp_path


def test_what_is_kept_is_there_the_next_time(root):
    with caches.held(root, "a", never, never) as kept:
        assert kept == root / "a"


def test_what_nobody_has_used_for_long_is_removed_and_made_anew(root):
    assert caches.reap(root, DAY) == ()
    age(root, "a", 2 * DAY)
    (root / "a.12345678.new").mkdir()

    assert caches.reap(root, DAY) == ("a",)
    assert list(root.iterdir()) == []
    with caches.held(root, "a", fill, never) as kept:
        assert (kept / "data").exists()
    assert caches.reap(root, DAY) == ()


def test_a_use_is_a_reason_to_keep_it(root):
    age(root, "a", 2 * DAY)
    with caches.held(root, "a", never, never):
        pass

    assert caches.reap(root, DAY) == ()


def test_what_is_in_use_stays_however_long_that_takes(root):
    with caches.held(root, "a", never, never) as kept, caches.held(root, "a", never, never) as same:
        age(root, "a", 2 * DAY)
        assert caches.reap(root, DAY) == ()
        assert kept == same
        assert (kept / "data").exists()


def test_a_lock_that_is_removed_while_it_is_waited_for_says_nothing_about_its_successor(tmp_path):
    lock, waits, used, goes = tmp_path / "a.lock", threading.Event(), threading.Event(), threading.Event()

    def use():
        with caches.held(tmp_path, "a", fill, waits.set):
            used.set()
            goes.wait(60)

    thread = threading.Thread(target=use)
    with lock.open("w") as reaper:
        fcntl.flock(reaper, fcntl.LOCK_EX)
        thread.start()
        assert waits.wait(60)
        lock.unlink()
    assert used.wait(60)
    age(tmp_path, "a", 2 * DAY)
    kept = caches.reap(tmp_path, DAY)
    goes.set()
    thread.join()

    assert kept == ()
    assert (tmp_path / "a/data").exists()


def test_what_is_being_made_stays(tmp_path):
    def reaped_meanwhile(folder):
        age(tmp_path, "a", 2 * DAY)
        assert caches.reap(tmp_path, DAY) == ()
        return fill(folder)

    with caches.held(tmp_path, "a", reaped_meanwhile, never) as kept:
        assert (kept / "data").exists()


def test_what_fails_is_not_kept_and_does_not_stand_in_the_way(tmp_path):
    with caches.held(tmp_path, "a", lambda folder: fill(folder) and False, never) as kept:
        assert kept is None
    with caches.held(tmp_path, "a", fill, never) as kept:
        assert kept is not None


def test_many_at_once_make_it_once_and_use_it_together(tmp_path):
    made, together = [], threading.Barrier(4, timeout=60)

    def slow(folder):
        made.append(folder)
        time.sleep(0.3)
        return fill(folder)

    def use():
        with caches.held(tmp_path, "a", slow, lambda: None) as kept:
            together.wait()
            used.append(kept)

    used = []
    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(made) == 1
    assert used == [tmp_path / "a"] * 4
