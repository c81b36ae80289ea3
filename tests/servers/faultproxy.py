"""A TCP proxy that misbehaves on command, to be put between a client and a real server."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

CHUNK = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What is done to a connection. Offsets count the bytes that come from the server; `connections` is how many suffer.

    Latency is for every piece of at most 64 KiB, latency and rate are for each direction.
    """

    refuse: bool = False
    black_hole: bool = False
    reset_after: int | None = None
    flip_bit_at: int | None = None
    latency_seconds: float = 0
    bytes_per_second: float | None = None
    connections: int | None = None


class FaultProxy:
    """Listens on `port` of an address; each connection suffers the faults that were set when it was accepted."""

    def __init__(self, target_port: int, address: str = "127.0.0.1") -> None:
        self._target = target_port
        self._faults, self._left = Faults(), 0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self.accepted = self.faulted = 0
        self._listener = socket.create_server((address, 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def set(self, faults: Faults) -> None:
        """From now on, and drop what is open: clients keep connections for later."""
        with self._lock:
            self._faults, self._left = faults, faults.connections if faults.connections is not None else 1 << 30
        self.drop()

    def drop(self) -> int:
        """Reset every open connection; return how many sockets that were."""
        with self._lock:
            sockets = list(self._sockets)
        for each in sockets:
            _reset(each)
        return len(sockets)

    def close(self) -> None:
        """Stop listening, and drop everything."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                faults = self._faults if self._left > 0 else Faults()
                self._left -= 1
                self.accepted += 1
                self.faulted += faults != Faults()
                self._sockets.add(client)
            threading.Thread(target=self._serve, args=(client, faults), daemon=True).start()

    def _serve(self, client: socket.socket, faults: Faults) -> None:
        if faults.refuse:
            self._end(client)
        elif faults.black_hole:
            with suppress(OSError):
                while client.recv(CHUNK):
                    pass
            self._end(client)
        else:
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return self._end(client)
            for each in (client, server):
                # `drop` may have closed it since.
                with suppress(OSError):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets.add(server)
            upwards = replace(faults, reset_after=None, flip_bit_at=None)
            threading.Thread(target=self._carry, args=(client, server, upwards), daemon=True).start()
            self._carry(server, client, faults)
            self._end(client, server)
        return None

    def _carry(self, source: socket.socket, sink: socket.socket, faults: Faults) -> None:
        offset = 0
        with suppress(OSError):
            while data := source.recv(CHUNK):
                if faults.flip_bit_at is not None and offset <= faults.flip_bit_at < offset + len(data):
                    changed = bytearray(data)
                    changed[faults.flip_bit_at - offset] ^= 1
                    data = bytes(changed)
                if faults.reset_after is not None and offset + len(data) > faults.reset_after:
                    sink.sendall(data[: faults.reset_after - offset])
                    # What was sent must arrive before the reset, which would overtake it.
                    time.sleep(0.05)
                    return _reset(sink)
                offset += len(data)
                time.sleep(faults.latency_seconds + (len(data) / faults.bytes_per_second if faults.bytes_per_second else 0))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        return None

    def _end(self, *sockets: socket.socket) -> None:
        for each in sockets:
            with self._lock:
                self._sockets.discard(each)
            _reset(each)


def _reset(each: socket.socket) -> None:
    """Close with RST, which SO_LINGER of zero seconds means."""
    with suppress(OSError):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        each.shutdown(socket.SHUT_RDWR)
    each.close()


@contextmanager
def between(target_port: int, address: str = "127.0.0.1") -> Iterator[FaultProxy]:
    """A proxy in front of a port of loopback, for the time of the block, which listens on another address of this machine."""
    proxy = FaultProxy(target_port, address)
    try:
        yield proxy
    finally:
        proxy.close()
