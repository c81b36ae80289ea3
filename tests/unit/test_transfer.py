"""Threads in order, and the border to foreign exceptions."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import botocore.exceptions
import obstore
import obstore.exceptions
import pytest

from oasis_flows.errors import (
    DatasetError,
    DatasetNotFound,
    OasisError,
    StoreDenied,
    StoreFull,
    StoreUnavailable,
    UnsafeName,
)
from oasis_flows.manifest import Entry
from oasis_flows.store.folder import chunks_of
from oasis_flows.store.journal import Journal
from oasis_flows.store.transfer import Location, Meter, checkpoint, in_order, pause, translated, wait
from oasis_flows.store.verdicts import BY_CLASS

SECRET = "a-very-secret-value"


def transfer_threads() -> list[str]:
    """The threads of transfers that are alive; the one event loop of the process may stay."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("oasis-flows-transfer_")]


def test_results_come_in_the_order_of_the_items_though_they_are_ready_in_another() -> None:
    def slow(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return number

    assert list(in_order(slow, range(50), workers=8, window=16)) == list(range(50))


def test_no_more_items_are_taken_than_the_window_holds() -> None:
    taken: list[int] = []

    def count() -> Iterator[int]:
        for number in range(1, 1001):
            taken.append(number)
            yield number

    with closing(in_order(lambda item: item, count(), workers=4, window=10)) as results:
        assert [next(results) for _ in range(5)] == [1, 2, 3, 4, 5]
        assert len(taken) <= 15


def test_a_failure_is_raised_before_its_turn_and_ends_the_other_threads() -> None:
    def work(number: int) -> None:
        if number == 7:
            raise StoreDenied("no")
        while True:
            pause(0.01)

    started = time.monotonic()
    with pytest.raises(StoreDenied):
        list(in_order(work, range(100), workers=8, window=8))
    assert time.monotonic() - started < 2
    assert not transfer_threads()


@pytest.mark.parametrize("work", ["computing", "waiting"])
def test_a_signal_in_the_main_thread_ends_all_work_before_it_goes_on(work: str) -> None:
    class Terminated(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Terminated

    at_work = list[int]()

    def busy(number: int) -> None:
        at_work.append(number)
        try:
            while work == "computing":
                checkpoint()
            wait(lambda: asyncio.sleep(600))
        finally:
            at_work.remove(number)

    def begin_and_be_interrupted(seconds: float) -> None:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with closing(in_order(busy, range(8))) as results:
            list(results)

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        # The first ones come while threads are being started.
        for milliseconds in (*range(1, 30), 300):
            started = time.monotonic()
            with pytest.raises(Terminated):
                begin_and_be_interrupted(milliseconds / 1000)
            assert not at_work
            assert time.monotonic() - started < 2
            time.sleep(0.01)
            assert not at_work
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not transfer_threads()


def test_closing_early_ends_the_threads() -> None:
    with closing(in_order(lambda item: pause(item), [0, 100, 100], workers=3, window=3)) as results:
        next(results)
    assert not transfer_threads()


def test_progress_is_told_from_the_callers_thread_and_not_too_often() -> None:
    told: list[tuple[int, int, int, int, str]] = []
    meter = Meter(lambda *seen: told.append((*seen, threading.current_thread().name)), 400, 4000)

    def work(_: int) -> None:
        meter.add(10)
        time.sleep(0.005)

    for _ in in_order(work, range(400), workers=4, tick=meter.tick):
        meter.file_done()
    meter.tick(last=True)
    assert told[-1] == (400, 400, 4000, 4000, "MainThread")
    assert {name for *_, name in told} == {"MainThread"}
    assert len(told) <= 8


def foreign_classes() -> list[type[Exception]]:
    return [kind for kind in vars(obstore.exceptions).values() if isinstance(kind, type)]


@pytest.mark.parametrize("kind", foreign_classes())
@pytest.mark.parametrize("writing", [False, True])
def test_no_exception_of_obstore_escapes(kind: type[Exception], writing: bool) -> None:
    with pytest.raises(OasisError) as caught, translated("s3://bucket/a.txt", writing=writing):
        raise kind("some words of the store")
    assert "s3://bucket/a.txt" in str(caught.value)
    assert isinstance(caught.value.__cause__, kind)


def test_the_list_of_obstores_exceptions_is_not_empty() -> None:
    assert len(foreign_classes()) >= 12


def botocore_classes() -> list[type[Exception]]:
    kinds = vars(botocore.exceptions).values()
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, botocore.exceptions.BotoCoreError)]


@pytest.mark.parametrize("kind", botocore_classes())
def test_no_exception_of_botocore_escapes(kind: type[Exception]) -> None:
    error = kind.__new__(kind)
    Exception.__init__(error, "some words")
    with pytest.raises(OasisError), translated("s3://bucket/a.txt"):
        raise error


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("SignatureDoesNotMatch", StoreDenied),
        ("InvalidAccessKeyId", StoreDenied),
        ("AccessDenied", StoreDenied),
        ("NoSuchBucket", DatasetNotFound),
        ("NoSuchKey", DatasetNotFound),
        ("SlowDown", StoreUnavailable),
        ("InvalidPart", StoreUnavailable),
        ("NoSuchUpload", StoreUnavailable),
        ("InternalError", StoreUnavailable),
        ("503", StoreUnavailable),
        ("QuotaExceeded", StoreFull),
        ("PermanentRedirect", DatasetError),
        ("NoRuchKey", StoreUnavailable),
        ("JnternalError", StoreUnavailable),
        ("KMS.DisabledException", DatasetError),
    ],
)
def test_each_code_of_s3_has_its_remedy(code: str, expected: type[OasisError]) -> None:
    with pytest.raises(expected) as caught, translated("s3://bucket/a.txt"):
        raise botocore.exceptions.ClientError({"Error": {"Code": code, "Message": "because"}}, "GetObject")
    with pytest.raises(expected), translated("s3://bucket/a.txt"):
        raise obstore.exceptions.GenericError(f"status code: 400: <Error><Code>{code}</Code><Message>because</Message></Error>")
    assert caught.value.transient == (expected is StoreUnavailable)


@pytest.mark.parametrize(("status", "expected"), [(404, DatasetNotFound), (401, StoreDenied), (403, StoreDenied)])
def test_a_code_that_is_not_known_means_what_its_status_means(status: int, expected: type[OasisError]) -> None:
    answer = {"Error": {"Code": "Uncommon"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(expected), translated("s3://bucket/a.txt"):
        raise botocore.exceptions.ClientError(answer, "GetObject")
    name = next(name for name, code in BY_CLASS.items() if code == str(status))
    with pytest.raises(expected), translated("s3://bucket/a.txt"):
        raise getattr(obstore.exceptions, name)("<Error><Code>Uncommon</Code></Error>")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EROFS, StoreDenied),
        (errno.EACCES, StoreDenied),
        (errno.EPERM, StoreDenied),
        (errno.ENOENT, DatasetNotFound),
        (errno.ENOTDIR, DatasetNotFound),
        (errno.ENAMETOOLONG, UnsafeName),
        (errno.ELOOP, UnsafeName),
        (errno.EISDIR, DatasetError),
        (errno.ECONNREFUSED, StoreUnavailable),
        (errno.ETIMEDOUT, StoreUnavailable),
        (errno.EIO, StoreUnavailable),
    ],
)
def test_each_error_of_the_system_has_its_remedy(number: int, expected: type[OasisError]) -> None:
    with pytest.raises(expected) as caught, translated("/data/a.txt"):
        raise OSError(number, os.strerror(number), "/data/a.txt")
    assert os.strerror(number) in str(caught.value)


def test_an_error_of_ours_and_a_mistake_in_our_code_pass_unchanged() -> None:
    for error in (StoreFull("full"), AssertionError("a bug"), KeyError("a bug")):
        with pytest.raises(type(error)) as caught, translated("x"):
            raise error
        assert caught.value is error


def test_secrets_show_in_no_repr_and_a_password_in_a_url_is_refused_without_showing_it() -> None:
    location = Location("s3://bucket/folder", {"secret_access_key": SECRET})
    assert SECRET not in repr(location)
    assert SECRET not in repr(location.child("a"))
    with pytest.raises(DatasetError) as caught:
        Location(f"ftp://user:{SECRET}@host/folder")
    assert SECRET not in str(caught.value)


def test_a_journal_gives_the_latest_of_each_file_in_order_and_survives_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    assert list(journal.entries()) == []
    for sha256, names in (("1", "ace"), ("2", "abd")):
        with journal.appending() as note:
            for name in names:
                note(Entry(name, 1, sha256 * 64))
        with path.open("ab") as file:
            file.write(b'{"path":"zz","byt')
    with journal.appending() as note:
        note(Entry("c", 3, "3" * 64))
    known = {entry.path: (entry.sha256 or "")[0] for entry in journal.entries()}
    assert known == {"a": "2", "b": "2", "c": "3", "d": "2", "e": "1"}
    assert list(known) == sorted(known)


def test_what_somebody_holds_of_a_file_is_not_written_over_by_what_is_read_next(tmp_path: Path) -> None:
    content = b"".join(bytes([number]) * (1 << 20) for number in range(5)) + b"end"
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb", buffering=0) as file:
        chunks = chunks_of(file.fileno(), "the file")
        first = next(chunks)
        part, view = first[10:20], memoryview(first)[-5:]
        del first
        second = obstore.Bytes(next(chunks))
        slice_of_second = second[100:110]
        del second
        assert b"".join(chunks) == content[2 << 20 :]
    assert (bytes(part), bytes(view), bytes(slice_of_second)) == (bytes(10), bytes(5), b"\1" * 10)
