"""A container's output on its way from the engine to a log sink: every byte once, in order.

The way is `attach`, opened before the start. When it breaks while the container lives, the rest is read back from the
engine's own log, without what has been delivered already.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from ..errors import ContainerLost, EngineUnavailable
from ..job import LogSink, Stream
from .docker_errors import is_gone, translated
from .docker_verdict import parse_time

_STREAMS: dict[int, Stream] = {1: "stdout", 2: "stderr"}
_HEADER = struct.Struct(">BxxxL")
_HEAD_BYTES = 1024
_CHUNK = 1 << 18


class Demultiplexer:
    """Splits the engine's framed stream (https://docs.docker.com/reference/api/engine/ "Stream format")."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._stream: Stream = "stdout"
        self._left = 0

    def feed(self, data: bytes) -> Iterator[tuple[Stream, bytes]]:
        """The payloads in the bytes so far, neighbours of one stream joined; a frame need not be complete.

        Raises:
            ContainerLost: the engine sent an error of its own.
        """
        self._buffer += data
        ready: list[bytes] = []
        at = 0
        while at < len(self._buffer):
            if self._left == 0:
                if len(self._buffer) - at < _HEADER.size:
                    break
                number, self._left = _HEADER.unpack_from(self._buffer, at)
                at += _HEADER.size
                if number not in _STREAMS:
                    # 3 is the engine's own error in the middle of a log, such as that of a damaged file.
                    words = bytes(self._buffer[at : at + self._left]).decode(errors="replace")
                    raise ContainerLost(
                        f"The engine cannot read the log of a container. Run it again. The engine said: {words}"
                    )
                if ready and _STREAMS[number] != self._stream:
                    yield self._stream, b"".join(ready)
                    ready = []
                self._stream = _STREAMS[number]
                continue
            with memoryview(self._buffer) as view:
                payload = bytes(view[at : at + self._left])
            at += len(payload)
            self._left -= len(payload)
            ready.append(payload)
        del self._buffer[:at]
        if ready:
            yield self._stream, b"".join(ready)


class Delivery:
    """Hands bytes to the sink and remembers how many of each stream, and how stderr began.

    The sink gets the first `limit` bytes of both streams together; `overflowed` says that there were more.
    """

    def __init__(self, sink: LogSink, limit: int | None = None) -> None:
        self._sink = sink
        self._left = limit
        self.overflowed = False
        self.bytes: dict[Stream, int] = {"stdout": 0, "stderr": 0}
        self.stderr_head = b""

    def deliver(self, stream: Stream, data: bytes) -> None:
        """One piece of output that the sink has not had."""
        if self._left is not None:
            self.overflowed |= len(data) > self._left
            data = data[: self._left]
            self._left -= len(data)
            if not data:
                return
        self.bytes[stream] += len(data)
        if stream == "stderr" and len(self.stderr_head) < _HEAD_BYTES:
            self.stderr_head += data[: _HEAD_BYTES - len(self.stderr_head)]
        self._sink(stream, data)

    def complete(self, pieces: Iterable[tuple[Stream, bytes]]) -> None:
        """Take the whole output from its beginning and deliver what is missing."""
        skip = dict(self.bytes)
        for stream, data in pieces:
            rest = data[skip[stream] :]
            skip[stream] = max(0, skip[stream] - len(data))
            if rest:
                self.deliver(stream, rest)


class Pump(threading.Thread):
    """Feeds the sink until the container has ended; then `done` is set, and `state` or `failure`.

    `news` is set then, and when the container's output ends: its end is near, or has come.
    `outages` counts how often the engine went away meanwhile. `read_back` says that some of the output came from the engine's own log.
    """

    def __init__(self, api: Any, container: str, delivery: Delivery, attached: Any, patience_seconds: float) -> None:
        super().__init__(name=f"oasis-log-{container[:12]}", daemon=True)
        self._api, self._id, self._delivery, self._attached = api, container, delivery, attached
        self._patience = patience_seconds
        self.done, self.news = threading.Event(), threading.Event()
        self.state: Mapping[str, Any] = {}
        self.failure: BaseException | None = None
        self.outages, self.read_back = 0, False

    def run(self) -> None:
        """Called by the thread."""
        try:
            self._follow()
        except BaseException as error:  # noqa: BLE001 - a sink's exception, whatever it is, belongs to the caller of `run`
            self.failure = error
        finally:
            self.done.set()
            self.news.set()

    def _follow(self) -> None:
        whole = self._attached is not None and self._copy_attached()
        stopped = datetime.now(UTC)
        while True:
            try:
                ended = self._ended_within(3.0)
                if ended and whole and self._ended_by(stopped):
                    return
                # Not attached at all, or the stream ended well before the container did: it was cut. A log that is
                # followed may end before the container's last words are in it; one of an ended container has them.
                whole = False
                if self._read_back(follow=not ended) and ended:
                    return
            except EngineUnavailable as error:
                whole = False
                self._await_engine(error)

    def _ended_by(self, stopped: datetime) -> bool:
        """Did the container end no later than its output stopped, by the engine's clock, give or take?"""
        finished = parse_time(self.state.get("FinishedAt", ""))
        return finished is not None and (finished - stopped).total_seconds() < 0.25

    def _copy_attached(self) -> bool:
        """Copy until the stream ends; False if it broke."""
        split = Demultiplexer()
        while True:
            try:
                data = self._attached.recv(_CHUNK)
            except OSError:
                return False
            if not data:
                self.news.set()
                return True
            for stream, payload in split.feed(data):
                self._delivery.deliver(stream, payload)

    def _read_back(self, *, follow: bool) -> bool:
        """Take the engine's own log from its beginning, delivering what is missing; False if it broke off."""
        import requests
        import urllib3

        self.read_back = True
        url = f"{self._api.base_url}/v{self._api.api_version}/containers/{self._id}/logs"
        wanted = {"stdout": 1, "stderr": 1, "follow": int(follow)}
        with translated("reading the log of a container"):
            response = self._api.get(url, params=wanted, stream=True, timeout=None)
        if response.status_code == 404:
            raise ContainerLost(f"The container {self._id[:12]} vanished while it ran. Somebody removed it; run it again.")
        split = Demultiplexer()
        with response:
            response.raise_for_status()
            try:
                self._delivery.complete(piece for data in response.raw.stream(_CHUNK) for piece in split.feed(data))
            except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, ConnectionError):
                return False
        return True

    def _ended_within(self, seconds: float) -> bool:
        """Whether the container has ended or does so soon; keeps its state."""
        import docker.errors

        began, pause = time.monotonic(), 0.004
        while True:
            try:
                with translated("asking for the state of a container"):
                    try:
                        self.state = self._api.inspect_container(self._id)["State"]
                    except docker.errors.APIError as error:
                        if not is_gone(error):
                            raise
                        raise ContainerLost(
                            f"The container {self._id[:12]} vanished while it ran. Somebody removed it; run it again."
                        ) from error
            except EngineUnavailable:
                self.state = {}
                raise
            if self.state["Status"] in ("exited", "dead"):
                return True
            if time.monotonic() - began > seconds:
                return False
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)

    def _await_engine(self, error: EngineUnavailable) -> None:
        """Return once the engine answers again."""
        self.outages += 1
        until = time.monotonic() + self._patience
        while time.monotonic() < until:
            time.sleep(0.1)
            try:
                with translated("coming back"):
                    self._api.ping()
            except EngineUnavailable as still:
                error = still
            else:
                return
        raise error
