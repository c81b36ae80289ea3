"""Signals whose exception gets lost, and what asks for them again."""

import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from oasis_flows import interruption


class Held:
    pass


def lose(number: int) -> None:
    """Have the signal's exception raised where Python prints it and drops it."""
    held = Held()
    callback = weakref.ref(held, lambda _: signal.raise_signal(number))
    del held
    assert callback() is None


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_a_signal_that_was_lost_is_raised_by_who_asks_and_again_if_it_is_lost_again():
    with interruption.kept_in_mind():
        interruption.check()
        lose(signal.SIGINT)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                interruption.check()


def test_what_came_is_forgotten_when_the_block_has_ended_and_an_inner_block_ends_nothing():
    with interruption.kept_in_mind():
        with interruption.kept_in_mind():
            pass
        lose(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interruption.check()
    interruption.check()
    with interruption.kept_in_mind():
        interruption.check()


def test_a_program_s_own_handler_is_not_called_twice():
    called = []
    before = signal.signal(signal.SIGTERM, lambda number, _: called.append(number))
    try:
        with interruption.kept_in_mind():
            signal.raise_signal(signal.SIGTERM)
            interruption.check()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == [signal.SIGTERM]


def test_in_another_thread_nothing_is_raised():
    failures = []

    def work() -> None:
        try:
            with interruption.kept_in_mind():
                interruption.check()
        except BaseException as error:  # noqa: BLE001 - for the assertion
            failures.append(error)

    with interruption.kept_in_mind():
        lose(signal.SIGINT)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        with pytest.raises(KeyboardInterrupt):
            interruption.check()
    assert failures == []


def test_who_has_the_place_for_signals_already_keeps_it():
    theirs, other = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno())
    try:
        with interruption.kept_in_mind():
            lose(signal.SIGINT)
            interruption.check()
        assert other.recv(10) == bytes([signal.SIGINT])
    finally:
        assert signal.set_wakeup_fd(-1) == theirs.fileno()
        theirs.close()
        other.close()


def test_no_descriptor_stays_open():
    before = set(Path("/proc/self/fd").iterdir())
    with interruption.kept_in_mind():
        pass
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_fork_s_signal_is_not_its_parent_s():
    with interruption.kept_in_mind():
        child = os.fork()
        if child == 0:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        interruption.check()


EARLY = """
import os, signal, sys
class Interrupted:
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
from oasis_flows.__main__ import main
sys.exit(main(["doctor"]))
"""


@pytest.mark.parametrize("module", ["oasis_flows.console", "prefect"])
def test_a_command_that_is_interrupted_while_it_is_loaded_says_so_and_no_more(module):
    done = subprocess.run([sys.executable, "-c", EARLY, module], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "oasis-flows: interrupted\n")
