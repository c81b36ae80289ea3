"""Work that must not be left half-way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def shielded(action: Callable[[], T]) -> T:
    """Do `action` to its end even if signals raise exceptions here meanwhile; raise the first of them afterwards."""
    results: list[T] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            results.append(action())
        except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread
            failures.append(error)

    thread = threading.Thread(target=work, name="oasis-shielded")
    interruption: BaseException | None = None
    while not (results or failures):
        try:
            if thread.ident is None:
                thread.start()
            thread.join()
        except BaseException as error:  # noqa: BLE001 - raised below, once the action is done
            interruption = interruption or error
    if interruption or failures:
        raise interruption or failures[0]
    return results[0]
