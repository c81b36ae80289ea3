"""Work that a signal must not leave half-way."""

import signal
import threading
import time

import pytest

from oasis_flows.engines.shield import shielded


def test_it_gives_what_the_work_gave_and_raises_what_it_raised():
    assert shielded(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        shielded(lambda: 1 / 0)


def test_signals_wait_until_the_work_is_done_and_nobody_spins_meanwhile():
    ended = []

    def work() -> None:
        for _ in range(5):
            time.sleep(0.1)
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.5)
        ended.append(True)

    began = time.process_time()
    with pytest.raises(KeyboardInterrupt):
        shielded(work)
    assert ended == [True]
    assert time.process_time() - began < 0.3


def test_a_start_that_is_interrupted_makes_the_work_begin_once(monkeypatch):
    begun, start = [], threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shielded(lambda: (time.sleep(0.1), begun.append(True)))
    assert begun == [True]


def test_where_no_thread_can_be_made_the_work_is_done_all_the_same(monkeypatch):
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert shielded(lambda: 7) == 7
