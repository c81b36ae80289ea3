"""Work that must not be left half-way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def shielded(action: Callable[[], T]) -> T:
    """Do `action` to its end, once, even if signals raise exceptions here meanwhile; raise the first of them afterwards.

    It is done in a thread, for signals raise in the main one only; here, where no thread can be made.
    """
    results: list[T] = []
    failures: list[BaseException] = []
    begun, done = threading.Lock(), threading.Event()

    def work() -> None:
        if not begun.acquire(blocking=False):
            return
        try:
            results.append(action())
        except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread
            failures.append(error)
        finally:
            done.set()

    interruption: BaseException | None = None
    while not done.is_set():
        try:
            # A thread whose start was interrupted may be about to begin: then the second one finds nothing to do.
            if not begun.locked():
                _start(work)
            done.wait()
        except BaseException as error:  # noqa: BLE001 - raised below, once the action is done
            interruption = interruption or error
    if interruption or failures:
        raise interruption or failures[0]
    return results[0]


def _start(work: Callable[[], None]) -> None:
    try:
        threading.Thread(target=work, name="oasis-shielded").start()
    except RuntimeError:  # the machine, or this process's limit, has no thread left
        work()
