"""How far a long transfer is: told by whoever moves bytes, shown by whoever listens."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from .job import human_bytes

# What is done (such as "staged"), how many files are done and of how many, how many bytes moved and of how many, if that is known.
Listener = Callable[[str, int, int | None, int, int | None], None]

_listener: ContextVar[Listener | None] = ContextVar("oasis_flows_progress", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Let `listener` hear of every transfer that this thread's runs make until the block ends."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(verb: str, files: int, all_files: int | None, bytes: int, all_bytes: int | None) -> None:
    """Say how far a transfer is; nothing happens where nobody listens."""
    if listener := _listener.get():
        listener(verb, files, all_files, bytes, all_bytes)


class Bar:
    """Draws how far a transfer is on stderr, where that is a terminal; it goes when all files are done, and with the block."""

    def __init__(self, *, wanted: bool = True) -> None:
        self._on = wanted and sys.stderr.isatty()
        self._verb = ""
        self._began = self._last = 0.0
        self._drawn = False

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._erase()

    def show(self, verb: str, files: int, all_files: int | None, bytes: int, all_bytes: int | None) -> None:
        """A `Listener`. Draws five times a second at most."""
        now = time.monotonic()
        if verb != self._verb:
            self._verb, self._began, self._last = verb, now, now
        if files == all_files:
            self._erase()
        elif self._on and now - self._last >= 0.2:
            self._last, self._drawn = now, True
            rate = human_bytes(int(bytes / (now - self._began)))
            # Bytes count when they are handed to the network, so the last files are on their way while all have moved.
            drawn = f"[{'#' * min(19, 20 * bytes // all_bytes):20}] " if all_bytes else ""
            of = f"/{all_files}" if all_files else ""
            line = f"{drawn}{files}{of} files {verb}, {human_bytes(bytes)}, {rate}/s"
            # A line that the terminal wraps cannot be erased. A terminal that knows no size has no columns.
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            print(f"\r\x1b[K{line[: columns - 1]}", end="", file=sys.stderr, flush=True)

    def _erase(self) -> None:
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._drawn = False
