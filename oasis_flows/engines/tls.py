"""TLS for a connection that one thread reads while another writes, as WebSockets do.

OpenSSL's connections are for one thread at a time, and Python's `ssl` lets two in: where one sends while the other receives what belongs to the
handshake, such as a session ticket of TLS 1.3, the process dies of SIGSEGV (https://github.com/python/cpython/issues/151508).
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")


class InTurns:
    """An `SSLContext`, of which only `wrap_socket` is different: what it makes is read and written in turns."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def wrap_socket(self, sock: socket.socket, **options: Any) -> TurnsSocket:
        """Shake hands, within the socket's timeout; raises as `SSLContext.wrap_socket`."""
        return TurnsSocket(self._context.wrap_socket(sock, **options))


class TurnsSocket:
    """An `SSLSocket` whose `recv` and `sendall` wait outside of OpenSSL. Whatever else it does is the socket's own."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock, self._number = sock, sock.fileno()
        self._turn = threading.Lock()
        self._timeout, self._over = sock.gettimeout(), False
        sock.setblocking(False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def settimeout(self, seconds: float | None) -> None:
        """How long each wait may take; `None` is for ever."""
        self._timeout = seconds

    def recv(self, size: int) -> bytes:
        """What has arrived, at least one byte; none where the other side has ended, or `shutdown` was called."""
        return self._in_turn(lambda: b"" if self._over else self._sock.recv(size), select.POLLIN)

    def sendall(self, data: bytes) -> None:
        """Send all of it."""
        rest = memoryview(data)
        while rest:
            sent = self._in_turn(lambda rest=rest: self._sock.send(rest), select.POLLOUT)  # type: ignore[misc]
            rest = rest[sent:]

    def shutdown(self, how: int) -> None:
        """Shut the connection down; who waits in `recv` returns."""
        with self._turn:
            self._over |= how != socket.SHUT_WR
            self._sock.shutdown(how)

    def close(self) -> None:
        """Close the socket."""
        with self._turn:
            self._over = True
            self._sock.close()

    def _in_turn(self, do: Callable[[], R], event: int) -> R:
        while True:
            with self._turn:
                try:
                    return do()
                except ssl.SSLWantReadError:
                    event = select.POLLIN
                except ssl.SSLWantWriteError:
                    event = select.POLLOUT
                except BlockingIOError:
                    pass
            waited = select.poll()
            waited.register(self._number, event)
            if not waited.poll(None if self._timeout is None else self._timeout * 1000):
                raise TimeoutError("timed out")
