"""A pod's log on its way to a sink: every byte once, in the order in which kubelet has them.

Kubelet turns a log file over at 10 MiB, and keeps only the newest for who comes late: so the log is followed live, by a thread
that waits for nobody; what the sink cannot take at once lies in a file without a name. Each line bears its time. After a broken
connection that is where to go on: kubelet repeats whole seconds, and what of them was delivered is passed over.

Who writes faster than kubelet reads loses what was turned over twice meanwhile. No API tells, but the times do: they leap over what was
written long before the last line was read, and so long that a file's worth can have been written. Or the newest file is empty.

Kubelet tells stdout and stderr apart in no stream, and turns "\\r\\n" into "\\n".
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import IO, Any

from ..errors import EngineUnavailable
from .docker_output import Delivery
from .kube_api import KubeApi, Refused
from .shield import shielded

logger = logging.getLogger(__name__)

_CHUNK = 1 << 18
_HEAD_BYTES = 1024
_IN_MEMORY = 4 << 20
_STAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d) ")
_LONGEST_STAMP = 40
# Kubelet turns a file over when it is larger than 10 MiB. It looks every ten seconds, but while it packs other files it is late, and
# then two follow one another closely.
_LEAST_OF_A_FILE, _LEAST_OF_A_GAP = 8 << 20, 1.0
_LEAST_IN_PARTS = 16 << 10
_WHOLE_LINE = 1 << 62
_TOO_FAST = "the algorithm wrote faster than its node reads, and the node throws away what it has turned over twice"


class _Stamps:
    """The times of the lines of this second and of the one before, for two streams may be a little out of order. There may be a million in a second.

    `second` is the newest, `last` the time of the last line; both are empty before the first.
    """

    def __init__(self) -> None:
        self.second, self.last = b"", b""
        # Without what all of a second have in common, but for one that came late.
        self._now, self._before = bytearray(), (b"", bytearray())

    def add(self, stamp: bytes, second: bytes) -> None:
        if second > self.second:
            self._before, self._now = (self.second, self._now), bytearray()
            self.second = second
        self._now += stamp[len(second) :] if second == self.second else stamp
        self.last = stamp

    def counted(self) -> Counter[bytes]:
        """How often each time came."""
        found = Counter[bytes]()
        for second, stamps in (self._before, (self.second, self._now)):
            found.update((b"" if each[:1].isdigit() else second) + each + b" " for each in stamps.split())
        return found


class Stamped:
    """Takes timestamps off a log, and passes over what was delivered before the connection broke.

    What does not begin with a time is kubelet's own word, such as that the log of an evicted pod cannot be had; `foreign` is
    how that began. `gap_seconds` is of how long a time lines seem to be missing: kubelet has turned its file over twice while it read.
    """

    def __init__(self) -> None:
        self.foreign, self.gap_seconds = b"", 0.0
        self.taken_bytes, self._took_last = 0, 0.0
        # How far behind the last new line was when it was read; when the connection was made, and whether it brought a line yet
        # that is new, or the last one again, so that it is of the same file.
        self._behind_seconds = 0.0
        self._resumed, self._is_first, self._is_same_file = 0.0, False, False
        self._second_began, self._most_in_a_second = 0, 0
        self._buffer, self._in_line = b"", False
        # The zone of the last line, the times of lines that may come again, and how much of the last one is delivered.
        self._zone, self._stamps = b"Z", _Stamps()
        self._last_bytes, self._in_last = 0, False
        self._known: Counter[bytes] = Counter()
        self._skip = 0

    @property
    def since(self) -> str | None:
        """From where to ask again, a second before that of the last line."""
        if not self._stamps.last:
            return None
        last = datetime.fromisoformat((self._stamps.second + self._zone).decode())
        return (last.astimezone(UTC) - timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")

    def resume(self) -> None:
        """From now on the log comes again, from `since` on."""
        self._known = self._stamps.counted()
        self._buffer, self._in_line, self._skip = b"", False, 0
        self._resumed, self._is_first, self._is_same_file = time.time(), bool(self._stamps.last), False

    def feed(self, data: bytes) -> bytes:
        """What of the log is new in these bytes."""
        self._buffer += data
        at, buffer = 0, self._buffer
        fresh: list[bytes] = []
        while at < len(buffer):
            if not self._in_line:
                found = _STAMP.match(buffer, at)
                if found is None:
                    end = buffer.find(b"\n", at)
                    if end < 0 and len(buffer) - at < _LONGEST_STAMP:
                        break
                    stop = len(buffer) if end < 0 else end + 1
                    self.foreign = (self.foreign + buffer[at:stop])[:_HEAD_BYTES]
                    at = stop
                    continue
                at = found.end()
                self._begin(found)
            end = buffer.find(b"\n", at)
            stop = len(buffer) if end < 0 else end + 1
            self._in_line = end < 0
            if self._skip >= stop - at:
                self._skip -= stop - at
            else:
                fresh.append(buffer[at + self._skip : stop])
                self._skip = 0
                if self._in_last:
                    self._last_bytes += len(fresh[-1])
            at = stop
        self._buffer = buffer[at:]
        if fresh:
            self.taken_bytes, self._took_last = self.taken_bytes + len(data), time.time()
            self._behind_seconds = self._took_last - _moment(self._stamps.last)
        return b"".join(fresh)

    def close(self) -> None:
        """The stream has ended: what is left without a time is no log."""
        self.foreign = (self.foreign + self._buffer)[:_HEAD_BYTES]
        self._buffer = b""

    def may_have_lost_its_end(self) -> bool:
        """The newest file is empty: may there have been one between it and the one that was read to its end?"""
        return self._is_a_file(self._behind_seconds)

    @property
    def last(self) -> bytes | None:
        """The time of the last line, as it was told."""
        return self._stamps.last or None

    def _begin(self, found: re.Match[bytes]) -> None:
        stamp, second, self._zone = found[0], found[1], found[2]
        if self._known.get(stamp):
            self._known[stamp] -= 1
            # The last line may have been delivered in part; every other one was, to its end.
            self._in_last = stamp == self._stamps.last and not self._known[stamp]
            self._is_same_file = self._is_same_file or self._in_last
            self._skip = self._last_bytes if self._in_last else _WHOLE_LINE
            return
        if second > self._stamps.second:
            self._most_in_a_second = max(self._most_in_a_second, self.taken_bytes - self._second_began)
            self._second_began = self.taken_bytes
            if self._stamps.last:
                self._note_gap(_moment(self._stamps.last), _moment(stamp))
        self._is_first = False
        self._stamps.add(stamp, second)
        self._skip, self._last_bytes, self._in_last = 0, 0, True

    def _note_gap(self, before: float, after: float) -> None:
        """A line comes that was there when the one before it was read, or when it was asked again, and is much younger."""
        if self._is_first and self._is_same_file:
            return
        # A long line comes in parts, and bears the time of the first.
        is_there = after < (self._resumed if self._is_first else self._took_last) and self._last_bytes < _LEAST_IN_PARTS
        if is_there and self._is_a_file(after - before):
            self.gap_seconds += after - before

    def _is_a_file(self, seconds: float) -> bool:
        """Can a file have come and gone in so many seconds, at the pace at which this log was written?"""
        most = max(self._most_in_a_second, self.taken_bytes - self._second_began)
        return self.taken_bytes >= _LEAST_OF_A_FILE and seconds >= _LEAST_OF_A_GAP and seconds * most >= _LEAST_OF_A_FILE


def _moment(stamp: bytes) -> float:
    return datetime.fromisoformat(stamp.decode().rstrip()).timestamp()


class Spool:
    """Bytes between one who must not wait and one who may: the first 4 MiB in memory, more in a file. Order is kept."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._chunks: deque[bytes] = deque()
        self._held, self._closed = 0, False
        self._file: IO[bytes] | None = None
        self._read, self._written = 0, 0

    def put(self, data: bytes) -> None:
        """Take bytes at once."""
        with self._ready:
            if self._file is not None or self._held + len(data) > _IN_MEMORY:
                self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 - closed when it is read out
                self._file.seek(self._written)
                self._file.write(data)
                self._written += len(data)
            else:
                self._chunks.append(data)
                self._held += len(data)
            self._ready.notify()

    def close(self) -> None:
        """There will be no more."""
        with self._ready:
            self._closed = True
            self._ready.notify()

    def __iter__(self) -> Iterator[bytes]:
        """The bytes, as they come, until it is closed."""
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._chunks or self._file is not None or self._closed)
                if self._chunks:
                    data = self._chunks.popleft()
                    self._held -= len(data)
                elif self._file is not None:
                    self._file.seek(self._read)
                    data = self._file.read(_CHUNK)
                    self._read += len(data)
                    if self._read == self._written:
                        self._file.close()
                        self._file, self._read, self._written = None, 0, 0
                else:
                    return
            yield data


class LogFollower:
    """Follows one container's log, from its start to its end. `head` is how it began.

    `failure` is what the sink raised; `lost` says in words what kept the log from being read to its end.
    """

    def __init__(self, api: KubeApi, path: str, container: str, delivery: Delivery, patience_seconds: float) -> None:
        self._api, self._path, self._container = api, path, container
        self._delivery, self._patience = delivery, patience_seconds
        self._spool, self._stamped = Spool(), Stamped()
        self._over = threading.Event()
        self._response: Any = None
        self._touched, self._kept_bytes = time.monotonic(), 0
        self.head, self.lost = b"", ""
        self.failure: BaseException | None = None
        self.failed = threading.Event()
        self._reader = threading.Thread(target=self._read, name="oasis-log-read", daemon=True)
        self._writer = threading.Thread(target=self._write, name="oasis-log-write", daemon=True)

    def start(self) -> None:
        """Begin. A signal that arrives meanwhile is raised when both threads run, for `ended` waits for them."""
        shielded(self._start)

    def _start(self) -> None:
        self._reader.start()
        self._writer.start()

    def ended(self, seconds: float) -> None:
        """The container has ended: take the rest, for so many seconds after now and after the last byte at most, and return."""
        # One that said nothing for long before its end has its last words still to come.
        self._touched = time.monotonic()
        self._over.set()
        while self._reader.is_alive():
            self._reader.join(0.2)
            if time.monotonic() - self._touched > seconds and self._reader.is_alive():
                self.lost = self.lost or "the rest of its log did not come"
                self.cut()
                self._reader.join(2.0)
                break
        self._writer.join()

    def cut(self) -> None:
        """Read no more of it."""
        self._over.set()
        self._patience = 0.0
        self._spool.close()
        response = self._response
        if response is not None:
            with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
                response.shutdown()

    def _write(self) -> None:
        try:
            for data in self._spool:
                self._delivery.deliver("stdout", data)
        except BaseException as error:  # noqa: BLE001 - a sink's exception belongs to who called `run`
            self.failure = error
            self.failed.set()

    def _read(self) -> None:
        try:
            self._follow()
        except Exception as error:  # noqa: BLE001 - told with the exit
            self.lost = f"its log could not be read to the end: {error}"
        finally:
            if self._stamped.gap_seconds:
                self.lost = self.lost or _TOO_FAST
            self._spool.close()

    def _follow(self) -> None:
        until = time.monotonic() + self._patience
        while True:
            ended_before, delivered_before = self._over.is_set(), self._kept_bytes
            try:
                whole = self._read_once()
                until = time.monotonic() + self._patience
                # A log that is followed ends a little before the container is seen to end.
                whole = whole and self._over.wait(5.0) and self._is_all(delivered_before)
            except Refused as error:
                if error.status == 404 or (error.status == 400 and ended_before):
                    # The pod is gone, or never had a container: there is no log any more.
                    self.lost = "" if error.status == 400 else f"its log is gone: {error.words}"
                    return
                whole = False
            except EngineUnavailable as error:
                whole = False
                if time.monotonic() > until:
                    self.lost = f"its log could not be read to the end: {error}"
                    return
            if whole or self.failed.is_set():
                return
            if self._over.is_set() and time.monotonic() - self._touched > self._patience:
                self.lost = self.lost or "its log could not be read to the end"
                return
            self._over.wait(1.0) if not self._over.is_set() else time.sleep(1.0)

    def _is_all(self, delivered_before: int) -> bool:
        """Was that the newest file? Of a container that has ended kubelet reads the one that it has open to the end, and no other."""
        if self._stamped.taken_bytes < _LEAST_OF_A_FILE:
            return True
        broken, newest = self._last_of_the_newest()
        if broken:
            return False
        if newest is None and self._stamped.may_have_lost_its_end():
            self.lost = _TOO_FAST
        # A line that was written in parts has the time of its first here, and of its last there.
        return newest in (None, self._stamped.last) or self._kept_bytes == delivered_before

    def _last_of_the_newest(self) -> tuple[bool, bytes | None]:
        """Did the answer break off? The time of the last line of the newest file; `None` if that is empty."""
        query, said = {"container": self._container, "timestamps": "true", "tailLines": "1"}, bytearray()
        whole = self._take(query, said.extend)
        found = _STAMP.match(said[:_LONGEST_STAMP])
        return not whole and found is None, found[0] if found else None

    def _read_once(self) -> bool:
        """Read until the stream ends; False if it broke."""
        query = {"container": self._container, "follow": "true", "timestamps": "true"}
        if since := self._stamped.since:
            query["sinceTime"] = since
        self._stamped.resume()
        whole = self._take(query, self._feed)
        if whole:
            self._stamped.close()
        return whole

    def _take(self, query: dict[str, str], sink: Callable[[bytes], None]) -> bool:
        """Hand over what is answered; False if it broke off."""
        import urllib3

        with self._api.stream(self._path, query) as response:
            self._response = response
            try:
                while data := response.read1(_CHUNK):
                    self._touched = time.monotonic()
                    sink(data)
            except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
                logger.debug("The log %s broke off: %s", self._path, error)
                return False
            finally:
                self._response = None
        return True

    def _feed(self, data: bytes) -> None:
        if fresh := self._stamped.feed(data):
            self._keep(fresh)

    def _keep(self, data: bytes) -> None:
        self._kept_bytes += len(data)
        if len(self.head) < _HEAD_BYTES:
            self.head += data[: _HEAD_BYTES - len(self.head)]
        self._spool.put(data)
