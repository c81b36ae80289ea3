"""The part of the double of a cluster that runs programs: carriers, as processes of this machine, with a folder for a claim.

The programs are the real ones, and so is the protocol of `exec`, as far as it is written down; what a real API server, kubelet and
runtime do to a stream between them is for `tests/contract/test_kubernetes_carried.py`, on a cluster.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve


def program(command: list[str], claim: Path, **pipes: Any) -> subprocess.Popen[bytes]:
    """A container's program, on this machine."""
    here = [sys.executable if word == "python" else word for word in command]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([*here, str(claim)], env=env, stdout=subprocess.PIPE, **pipes)


@contextmanager
def exec_server(claim: Path, cut_after: list[int]) -> Iterator[int]:
    """The port of a server of `exec` alone; a connection is cut after so many bytes, either way, once for each number."""

    def handle(connection: ServerConnection) -> None:
        assert connection.request is not None
        command = parse_qs(urlsplit(connection.request.path).query)["command"]
        left = cut_after.pop(0) if cut_after else None
        running = program(command, claim, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        assert running.stdout
        assert running.stderr

        def count(data: bytes) -> None:
            nonlocal left
            if left is not None:
                left -= len(data)
                if left < 0:
                    connection.socket.shutdown(socket.SHUT_RDWR)

        def take() -> None:
            assert running.stdin
            with suppress(ConnectionClosed, OSError), running.stdin:
                for message in connection:
                    assert isinstance(message, bytes)
                    assert message[0] == 0
                    count(message)
                    running.stdin.write(message[1:])
                    running.stdin.flush()

        taking = threading.Thread(target=take, daemon=True)
        taking.start()
        with suppress(ConnectionClosed, OSError):
            # What a real one says first, of each channel.
            connection.send(b"\1")
            connection.send(b"\2")
            while data := running.stdout.read1(1 << 15):
                count(data)
                connection.send(b"\1" + data)
            if words := running.stderr.read():
                connection.send(b"\2" + words)
            code = running.wait()
            causes = {"details": {"causes": [{"reason": "ExitCode", "message": str(code)}]}}
            connection.send(b"\3" + json.dumps({"status": "Failure", **causes} if code else {"status": "Success"}).encode())
        running.kill()
        running.wait()
        running.stderr.close()
        running.stdout.close()

    with serve(handle, "127.0.0.1", 0, subprotocols=["v4.channel.k8s.io"], max_size=None, compression=None) as server:  # type: ignore[list-item]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.socket.getsockname()[1]
        server.shutdown()


def splice(near: socket.socket, request: bytes, port: int) -> None:
    """Hand a connection over to another server, from a request on, until either side ends it."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    with socket.create_connection(("127.0.0.1", port)) as far:
        far.sendall(request)
        back = threading.Thread(target=pump, args=(far, near), daemon=True)
        back.start()
        pump(near, far)
        back.join()
