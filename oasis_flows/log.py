"""The log of one container: every byte to a file, and a readable view of it to people while it happens.

The file is exact, but for the values of secrets, which are replaced by `***`. The view is coalesced: at most one block
a second, each cut in the middle when the container writes faster than anybody can read.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import StoreFull
from .job import Stream

# Prefect Cloud takes 25 000 characters a record.
BLOCK_CHARACTERS = 20_000
VIEW_CHARACTERS = 5_000_000
SECONDS_BETWEEN_BLOCKS = 1.0
LAST_WORDS_BYTES = 8192
MASK = b"***"
_CHANCE = 3  # bytes
# Of the lines that wait to be shown, so many of the first and so many of the last are kept.
_KEPT_LINES = 1000
# Name of the logger of the view, below that of the task: so the container's words can be told from the step's.
VIEW_LOGGER = "container"


class Redactor:
    """Replaces secret values in a stream of bytes, also those that are cut by the edge of a chunk."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets: Sequence[bytes] = sorted({s.encode() for s in secrets if s}, key=len, reverse=True)
        self._any = re.compile(b"|".join(map(re.escape, self._secrets)))
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """The part of the stream so far that can be shown; the beginning of what may be a secret is held back."""
        if not self._secrets:
            return data
        text = self._held + data
        edge = len(text) - self._unfinished(text)
        for found in self._any.finditer(text):
            if found.start() < edge < found.end():
                edge = found.start()
        self._held = text[edge:]
        return self._any.sub(MASK, text[:edge])

    def close(self) -> bytes:
        """What was held back, at the end of the stream: masked, where it is more of a secret than chance would have it.

        The end may be a limit of the log, in the middle of a secret.
        """
        held, self._held = self._held, b""
        if len(held) > _CHANCE:
            return MASK
        return self._any.sub(MASK, held) if self._secrets else held

    def _unfinished(self, text: bytes) -> int:
        """How many of the last bytes may be the beginning of a secret."""
        lengths = (n for s in self._secrets for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n]))
        return max(lengths, default=0)


def redact(text: str, secrets: Iterable[str]) -> str:
    """A text with every secret value replaced, also where somebody quoted it with escapes."""
    forms = {
        form for s in secrets if s for form in (s, repr(s)[1:-1], json.dumps(s)[1:-1], json.dumps(s, ensure_ascii=False)[1:-1])
    }
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, MASK.decode())
    return text


class RunLog:
    """A log sink (`job.LogSink`) that writes the file and shows the view. Made by `record`.

    A call raises `StoreFull` when the file cannot take all of the bytes.
    """

    def __init__(self, file: BinaryIO, show: Callable[[str], None], secrets: Iterable[str]) -> None:
        secrets = tuple(secrets)
        self._file = file
        self._view = _View(show)
        self._redactors: dict[Stream, Redactor] = {"stdout": Redactor(secrets), "stderr": Redactor(secrets)}
        self._lock = threading.Lock()
        self._stderr_tail = b""

    def __call__(self, stream: Stream, data: bytes) -> None:
        with self._lock:
            self._write(stream, self._redactors[stream].feed(data))

    def last_words(self, count: int = 20) -> tuple[str, ...]:
        """The last lines on stderr that hold more than blanks."""
        return tuple(_lines(self._stderr_tail)[-count:])

    def show_due(self) -> None:
        """Show what has waited long enough. Called by a clock, so that a quiet container's last lines come too."""
        with self._lock:
            self._view.show_due()

    def close(self) -> None:
        with self._lock:
            try:
                for stream, redactor in self._redactors.items():
                    self._write(stream, redactor.close())
            finally:
                self._view.close()

    def _write(self, stream: Stream, data: bytes) -> None:
        if data:
            with _room_for(Path(self._file.name)):
                _write_all(self._file, data)
            if stream == "stderr":
                self._stderr_tail = (self._stderr_tail + data[-LAST_WORDS_BYTES:])[-LAST_WORDS_BYTES:]
            self._view.add(stream, data)


def _write_all(file: BinaryIO, data: bytes) -> None:
    """A file without a buffer may take a part only."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreFull(
            f"The log {path} cannot be written: {error.strerror}. Free space there, or set OASIS_FLOWS_HOME to a folder with room."
        ) from error


@contextmanager
def record(path: Path, show: Callable[[str], None], secrets: Iterable[str] = ()) -> Iterator[RunLog]:
    """Write a container's output to `path` (emptied first) and show it by `show`, until the block ends.

    Raises:
        StoreFull: the file cannot be made, or cannot take what is written last.
    """
    with _room_for(path):
        opened = path.open("wb", buffering=0)
    with opened as file:
        log = RunLog(file, show, secrets)
        done = threading.Event()

        def tick() -> None:
            while not done.wait(SECONDS_BETWEEN_BLOCKS):
                log.show_due()

        clock = threading.Thread(target=tick, name="oasis-log-view", daemon=True)
        clock.start()
        try:
            yield log
        finally:
            done.set()
            clock.join()
            log.close()


class _View:
    """Collects lines into blocks. Lines of stderr begin with `stderr | `.

    Of a flood only the beginning and the end are kept, and only what is shown is decoded: the rest is in the file.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._first: list[bytes] = []
        self._latest: deque[bytes] = deque(maxlen=_KEPT_LINES)
        self._waiting = 0
        self._partial: dict[Stream, bytes] = {"stdout": b"", "stderr": b""}
        self._shown = 0
        self._last = 0.0

    def add(self, stream: Stream, data: bytes) -> None:
        text = self._partial[stream] + data
        *lines, rest = text.split(b"\n")
        # A line without an end is shown in pieces rather than kept for ever.
        if len(rest) > BLOCK_CHARACTERS:
            lines, rest = [*lines, rest], b""
        self._partial[stream] = rest
        self._take(stream, lines)
        self.show_due()

    def show_due(self) -> None:
        if self._waiting and time.monotonic() - self._last >= SECONDS_BETWEEN_BLOCKS:
            self._flush()

    def close(self) -> None:
        for stream, rest in self._partial.items():
            self._take(stream, [rest] if rest else [])
        self._partial = {"stdout": b"", "stderr": b""}
        if self._waiting:
            self._flush()

    def _take(self, stream: Stream, lines: Sequence[bytes]) -> None:
        mark = b"stderr | " if stream == "stderr" else b""
        self._waiting += len(lines)
        room = _KEPT_LINES - len(self._first)
        self._first += [mark + line for line in lines[:room]]
        self._latest.extend(mark + line for line in lines[max(room, len(lines) - _KEPT_LINES) :])

    def _flush(self) -> None:
        block = self._block()
        self._first, self._waiting = [], 0
        self._latest.clear()
        self._last = time.monotonic()
        if self._shown >= VIEW_CHARACTERS:
            return
        self._shown += len(block)
        if self._shown >= VIEW_CHARACTERS:
            block += "\n[This view of the log ends here; log.txt goes on and has every byte.]"
        self._show(block)

    def _block(self) -> str:
        half = BLOCK_CHARACTERS // 2 - 100
        first, latest = [_shown(line) for line in self._first], [_shown(line) for line in self._latest]
        if self._waiting == len(first) + len(latest):
            lines = first + latest
            if sum(len(line) + 1 for line in lines) <= 2 * half:
                return "\n".join(lines)
            head = _fitting(lines, half)
            latest = lines[len(head) :]
        else:
            head = _fitting(first, half)
        tail = _fitting(latest[::-1], half)[::-1]
        left_out = self._waiting - len(head) - len(tail)
        return "\n".join([*head, f"[{left_out} lines left out here; log.txt has every byte.]", *tail])


def _shown(line: bytes) -> str:
    text = line[: 4 * BLOCK_CHARACTERS].decode(errors="replace").replace("\0", "�")
    return text.removesuffix("\r")[:BLOCK_CHARACTERS]


def _fitting(lines: Sequence[str], characters: int) -> list[str]:
    """As many of the first lines as fit; the first is cut rather than left out."""
    taken: list[str] = []
    for line in lines:
        characters -= len(line) + 1
        if characters < 0:
            if not taken:
                taken.append(line[: characters - 1] + " …")
            break
        taken.append(line)
    return taken


def last_lines(path: Path, count: int, characters: int = 2000) -> list[str]:
    """The last lines of a log file that hold more than blanks, at most `characters` long together."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 4 * characters))
            data = file.read()
    except FileNotFoundError:
        return []
    return _lines(data, characters)[-count:]


def _lines(data: bytes, characters: int = LAST_WORDS_BYTES) -> list[str]:
    text = data.decode(errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}")
    return [line.rstrip() for line in text[-characters:].splitlines() if line.strip()]
