"""The log of a pod, whatever its connection does to it: every byte once."""

from __future__ import annotations

import io
import threading
import time
from contextlib import contextmanager
from datetime import datetime

import pytest
import urllib3
from hypothesis import given, settings, strategies as st

from oasis_flows.engines.docker_output import Delivery
from oasis_flows.engines.kube_log import LogFollower, Spool, Stamped
from oasis_flows.errors import EngineUnavailable


def stamp(nanoseconds: int, zone: str = "Z") -> bytes:
    seconds, fraction = divmod(nanoseconds, 10**9)
    return f"2026-11-21T10:{seconds // 60:02}:{seconds % 60:02}.{fraction:09}{zone} ".encode()


lines = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 1, 10**6, 7 * 10**8, 10**9, 3 * 10**9]),
        st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")),
    ),
    min_size=1,
    max_size=25,
)


@settings(deadline=None)
@given(lines, st.booleans(), st.sampled_from(["Z", "+05:30", "-08:00"]), st.data())
def test_every_byte_comes_once_wherever_the_way_breaks(told, newline, zone, data):
    moment, entries = 0, list[tuple[int, bytes]]()
    for number, (after, content) in enumerate(told):
        moment += after
        ending = b"\n" if newline or number < len(told) - 1 else b""
        entries.append((moment, content + ending))
    whole = b"".join(content for _, content in entries)
    log, taken = Stamped(), b""
    for _ in range(data.draw(st.integers(0, 4))):
        log.resume()
        sent = sent_since(entries, log.since, zone)
        cut = sent[: data.draw(st.integers(0, len(sent)))]
        step = data.draw(st.integers(1, 40))
        for at in range(0, len(cut), step):
            taken += log.feed(cut[at : at + step])
    log.resume()
    taken += log.feed(sent_since(entries, log.since, zone))
    log.close()

    assert taken == whole
    assert log.foreign == b""


def sent_since(entries: list[tuple[int, bytes]], since: str | None, zone: str) -> bytes:
    """What kubelet answers: it leaves out what is before the second that it was asked for."""

    def is_wanted(moment: int) -> bool:
        if since is None:
            return True
        return datetime.fromisoformat(stamp(moment, zone)[:19].decode() + zone) >= datetime.fromisoformat(since)

    return b"".join(stamp(moment, zone) + content for moment, content in entries if is_wanted(moment))


def test_what_is_no_line_of_a_container_is_not_taken_for_one():
    log = Stamped()

    assert log.feed(b"unable to retrieve container logs for containerd://3ac01057c739") == b""
    log.close()
    assert log.foreign.startswith(b"unable to retrieve")


def test_lines_a_little_out_of_order_are_not_lost():
    log = Stamped()
    first, second, third = stamp(2 * 10**9) + b"a\n", stamp(19 * 10**8) + b"b\n", stamp(21 * 10**8) + b"c\n"
    assert log.feed(first) == b"a\n"
    log.resume()

    assert log.feed(first + second + third) == b"b\nc\n"


@given(st.lists(st.binary(min_size=1, max_size=50)))
def test_a_spool_keeps_the_order(pieces):
    spool = Spool()
    for piece in pieces:
        spool.put(piece)
    spool.close()

    assert b"".join(spool) == b"".join(pieces)


def test_a_spool_takes_more_than_it_keeps_in_memory():
    spool, piece = Spool(), bytes(range(256)) * 4096
    for number in range(40):
        spool.put(bytes([number]) + piece)
    spool.close()

    assert b"".join(spool) == b"".join(bytes([number]) + piece for number in range(40))


def written(tenth: int, size: int) -> bytes:
    """About so many bytes in lines of a KiB, of a tenth of a second of the past."""
    return (stamp(tenth * 10**8) + b"x" * 1023 + b"\n") * max(1, size >> 10)


def test_a_leap_over_what_had_been_written_long_before_is_a_gap():
    log = Stamped()
    log.feed(written(0, 9 << 20))
    log.feed(written(70, 10))
    assert log.gap_seconds == 7


def test_a_leap_in_which_a_file_can_have_come_and_gone_is_a_gap():
    log = Stamped()
    for tenth in range(60):
        log.feed(written(tenth, 1 << 20))
    assert log.gap_seconds == 0
    log.feed(stamp(7_900_000_000) + b"x\n")
    assert log.gap_seconds == pytest.approx(2.0)


@pytest.mark.parametrize(("read_at", "lost"), [("10:00:15", True), ("10:00:05", False)], ids=["late", "at once"])
def test_an_empty_newest_file_tells_of_a_lost_end_if_the_one_before_was_read_late(monkeypatch, read_at, lost):
    moment = datetime.fromisoformat(f"2026-11-21T{read_at}+00:00").timestamp()
    monkeypatch.setattr("oasis_flows.engines.kube_log.time.time", lambda: moment)
    log = Stamped()
    for second in range(6):
        log.feed(written(10 * second, 9 << 20))
    assert log.may_have_lost_its_end() is lost


def test_a_leap_while_the_connection_was_away_is_a_gap_unless_the_file_is_the_same(monkeypatch):
    moment = datetime.fromisoformat("2026-11-21T10:00:03+00:00").timestamp()
    monkeypatch.setattr("oasis_flows.engines.kube_log.time.time", lambda: moment)
    same, other = Stamped(), Stamped()
    for log in (same, other):
        log.feed(a_file(0, 30))
    moment += 60
    for log in (same, other):
        log.resume()
    same.feed(written(29, 1 << 20) + written(590, 10))
    other.feed(written(590, 10))

    assert same.gap_seconds == 0
    assert other.gap_seconds == pytest.approx(56.1)


def test_a_line_that_took_long_is_no_gap():
    log = Stamped()
    log.feed(a_file(0, 30) + stamp(3 * 10**9) + b"x" * (16 << 10))
    log.feed(b"and on\n" + written(200, 10))
    assert log.gap_seconds == 0


def test_a_pause_of_a_short_log_is_none_and_neither_is_a_short_leap():
    short, steady = Stamped(), Stamped()
    short.feed(written(0, 10))
    short.feed(written(70, 10))
    for second in range(0, 40, 4):
        steady.feed(written(10 * second, 1 << 20))
    assert (short.gap_seconds, steady.gap_seconds) == (0, 0)


def test_a_pause_that_was_waited_for_is_no_gap(monkeypatch):
    moment = datetime.fromisoformat("2026-11-21T10:00:00+00:00").timestamp()
    monkeypatch.setattr("oasis_flows.engines.kube_log.time.time", lambda: moment)
    log = Stamped()
    log.feed(written(0, 9 << 20))
    moment += 60
    log.feed(written(600, 10))
    assert log.gap_seconds == 0


class LateWords:
    """In the place of the API: a log that says nothing until its container has ended, and a second after that its last words."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._told = [stamp(0) + b"last words\n"]

    @contextmanager
    def stream(self, _path, _query):
        yield self

    def read1(self, _size):
        self.over.wait(30)
        time.sleep(1.0 if self._told else 0)
        return self._told.pop() if self._told else b""

    def shutdown(self):
        self._told.clear()


def test_the_last_words_of_who_was_silent_for_long_are_waited_for():
    api, got = LateWords(), []
    follower = LogFollower(api, "path", "main", Delivery(lambda _, data: got.append(data), None), 60.0)
    follower._touched -= 3600
    follower.start()
    api.over.set()
    follower.ended(20.0)

    assert (b"".join(got), follower.lost) == (b"last words\n", "")


class TurnedOver:
    """In the place of the API: of a container that has ended, the file that was open at its end is followed, and then the newest is read."""

    def __init__(self, *files: bytes, breaks: list[Exception]) -> None:
        self._files, self._newest, self.asked, self._breaks = list(files), files[-1], list[str](), breaks

    @contextmanager
    def stream(self, _path, query):
        if "tailLines" in query:
            self.asked.append("the last line")
            if self._breaks:
                raise self._breaks.pop()
            yield io.BytesIO(self._newest.splitlines(keepends=True)[-1] if self._newest else b"")
        else:
            self.asked.append("all")
            yield io.BytesIO(self._files.pop(0) if len(self._files) > 1 else self._newest)


def followed(*files: bytes, breaks: list[Exception] | None = None) -> tuple[list[str], bytes, str]:
    """What was asked for, what came, and what is said to be lost."""
    api, got = TurnedOver(*files, breaks=breaks or []), list[bytes]()
    follower = LogFollower(api, "path", "main", Delivery(lambda _, data: got.append(data), None), 60.0)
    follower.start()
    follower.ended(30.0)
    return api.asked, b"".join(got), follower.lost


def a_file(first: int, last: int) -> bytes:
    return b"".join(written(tenth, 1 << 20) for tenth in range(first, last))


def test_a_large_log_in_one_file_is_read_once():
    asked, got, lost = followed(a_file(0, 30))
    assert (asked, len(got), lost) == (["all", "the last line"], 30 << 20, "")


def test_a_newer_file_is_read_too():
    asked, got, lost = followed(a_file(0, 30), a_file(30, 42))
    assert (asked, len(got), lost) == (["all", "the last line"] * 2, 42 << 20, "")


def test_an_api_that_is_away_when_the_last_line_is_asked_for_costs_nothing():
    asked, got, lost = followed(a_file(0, 30), a_file(30, 42), breaks=[EngineUnavailable("away")])
    assert (asked, len(got), lost) == (["all", "the last line"] * 2, 42 << 20, "")


def test_an_answer_that_breaks_off_is_asked_for_again(monkeypatch):
    read, breaks = io.BytesIO.read1, [urllib3.exceptions.ProtocolError()]

    class Breaking(io.BytesIO):
        def read1(self, size=-1):
            if len(self.getvalue()) < 1 << 20 and breaks:
                raise breaks.pop()
            return read(self, size)

    monkeypatch.setattr("tests.unit.test_kube_log.io.BytesIO", Breaking)
    asked, got, lost = followed(a_file(0, 30), a_file(30, 42))
    assert breaks == []
    assert (asked, len(got), lost) == (["all", "the last line"] * 2, 42 << 20, "")


def test_a_file_that_went_unread_is_told_of_whether_more_came_after_it_or_not():
    assert "throws away" in followed(a_file(0, 30), b"")[2]
    assert "throws away" in followed(a_file(0, 30), a_file(45, 47))[2]
