"""Signals that ask this process to end, kept in mind: the exception that Python makes of one can get lost.

It is raised in the main thread wherever that happens to be, and there are places that pass none on. In a callback of the garbage
collector or of the import system it is printed and dropped; Prefect's engine and pydantic may make an error of their own of it.
The run would go on as if nobody had said a word. So what the kernel delivers is noted here, too, and whoever waits for
something long asks for it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_reader: int | None = None
_came: set[int] = set()


@contextmanager
def kept_in_mind() -> Iterator[None]:
    """Note the signals that come until the block ends. In the main thread only, where alone they are raised.

    Where somebody else has Python's one place for this, such as an event loop, nothing is noted.
    """
    global _reader
    if _reader is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    try:
        for end in (reader, writer):
            os.set_blocking(end, False)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if before == -1:
            _reader = reader
        else:
            signal.set_wakeup_fd(before)
        yield
    finally:
        _reader = None
        _came.clear()
        now = signal.set_wakeup_fd(-1)
        if now not in (-1, writer):
            signal.set_wakeup_fd(now)
        os.close(reader)
        os.close(writer)


def check() -> None:
    """Raise what a signal stands for that has come, if any has: called where its exception is not on its way already.

    Only those handlers are called that are known to raise: a program's own has done its work.
    """
    if _reader is None or threading.current_thread() is not threading.main_thread():
        return
    with suppress(BlockingIOError):
        _came.update(os.read(_reader, 4096))
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if number in _came and callable(handler) and _raises(handler):
            handler(number, None)


def _raises(handler: Any) -> bool:
    return handler is signal.default_int_handler or getattr(handler, "__module__", "").startswith("prefect.")


def _forget() -> None:
    """A fork's signals are none of its parent's business."""
    global _reader
    if _reader is not None:
        _reader = None
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)
