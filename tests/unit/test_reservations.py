"""What batches set aside: it counts as long as its owner lives, and whoever counts does it alone."""

import signal
import subprocess
import sys
import threading

import pytest

from oasis_flows import reservations
from oasis_flows.capacity import Vector
from oasis_flows.reservations import counting, release, reserve, reserved
from oasis_flows.workspace import open_workspace

AMOUNT = Vector(800, 64 << 20, 1, 2)
OWNER = """
import sys, time
from pathlib import Path
from oasis_flows.capacity import Vector
from oasis_flows.reservations import reserve
from oasis_flows.workspace import open_workspace
with open_workspace(Path(sys.argv[1]), "other") as workspace:
    reserve(workspace, Vector(800, 64 << 20, 1, 2))
    print("reserved", flush=True)
    time.sleep(600)
"""


def test_what_a_living_run_has_reserved_counts_for_all_but_itself(tmp_path):
    with open_workspace(tmp_path, "mine") as workspace:
        reserve(workspace, Vector(1, 1, 1, 1))
        reserve(workspace, AMOUNT)
        assert reserved(tmp_path) == {"mine": AMOUNT}
        assert reserved(tmp_path, "mine") == {}
        release(workspace)
        assert reserved(tmp_path) == {}
        release(workspace)


def test_a_reservation_dies_with_its_process(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "reserved\n"
    assert reserved(tmp_path, "mine") == {"other": AMOUNT}
    owner.send_signal(signal.SIGKILL)
    owner.communicate()

    assert (tmp_path / "other/reservation").exists()
    assert reserved(tmp_path, "mine") == {}


@pytest.mark.parametrize("content", ["", "[1, 2", "[1, 2, 3, 4, 5]", '["a", 2, 3, 4]'])
def test_a_damaged_reservation_is_none(tmp_path, content):
    with open_workspace(tmp_path, "other") as workspace:
        workspace.reservation.write_text(content)
        assert reserved(tmp_path) == {}


def test_one_counts_after_the_other(tmp_path):
    counted, begins = [], threading.Event()

    def count():
        begins.set()
        with counting(tmp_path):
            counted.append("second")

    thread = threading.Thread(target=count)
    with counting(tmp_path):
        thread.start()
        assert begins.wait(60)
        thread.join(0.3)
        counted.append("first")
    thread.join(60)

    assert counted == ["first", "second"]


def test_one_that_hangs_while_it_counts_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(reservations, "PATIENCE_SECONDS", 0.2)
    with counting(tmp_path), counting(tmp_path):
        pass
