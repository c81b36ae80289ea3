"""A program that is started in a container that runs, and what it reads and writes: `pods/exec`, over a WebSocket.

https://github.com/kubernetes/kubernetes/blob/v1.32.0/staging/src/k8s.io/apimachinery/pkg/util/remotecommand/constants.go
In version 4 of its protocol nobody can close the program's stdin alone: both sides have to know when enough was said.
"""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

from ..errors import EngineError, EngineUnavailable
from .kube_api import ALIVE, PASSING, KubeApi, refusal
from .tls import InTurns

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

_PROTOCOL = "v4.channel.k8s.io"
_STDIN, _STDOUT, _STDERR, _STATUS = 0, 1, 2, 3
_WORDS_BYTES = 2000
NO_RIGHT = (
    "This process may not start programs in the pods that carry its files to the claim. Give it the rights `get` and `create` on "
    "`pods/exec`; see docs/how-to/run-on-kubernetes.md."
)


class Exited(Exception):
    """The program ended by itself, though more was expected of it. `code` is its exit code, `words` what it said on stderr."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(f"exit code {code}: {words}")
        self.code, self.words = code, words


class Program(io.RawIOBase):
    """A program's stdout, to read, and its stdin, to write.

    Raises, from both:
        Exited: it ended with an error.
        EngineUnavailable: the connection broke, or nothing came for `patience_seconds`.
    """

    def __init__(self, connection: ClientConnection, patience_seconds: float) -> None:
        self._connection, self._patience = connection, patience_seconds
        self._rest, self._words = memoryview(b""), b""

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and (message := self._message()) is not None:
            self._rest = message
        piece = self._rest[: len(buffer)]
        buffer[: len(piece)] = piece
        self._rest = self._rest[len(piece) :]
        return len(piece)

    def write(self, data: Any) -> int:
        from websockets.exceptions import ConnectionClosed

        try:
            self._connection.send(bytes([_STDIN]) + data)
        except (ConnectionClosed, OSError) as error:
            # It may have said why before it left.
            while self._message() is not None:
                pass
            raise EngineUnavailable(
                f"A program in the cluster ended before it had heard everything. The cause: {error}"
            ) from error
        return len(data)

    def _message(self) -> memoryview | None:
        """The next of its stdout; `None` when it has ended well."""
        from websockets.exceptions import ConnectionClosed

        while True:
            try:
                message = self._connection.recv(self._patience, decode=False)
            except TimeoutError:
                raise EngineUnavailable(f"A program in the cluster has said nothing for {self._patience:.0f} s.") from None
            except (ConnectionClosed, OSError) as error:
                raise EngineUnavailable(f"The connection to a program in the cluster broke. The cause: {error}") from error
            channel, data = message[0], memoryview(message)[1:]
            if channel == _STDOUT and data:
                return data
            if channel == _STDERR:
                self._words = (self._words + bytes(data))[-_WORDS_BYTES:]
            if channel == _STATUS and data:
                self._raise_failure(json.loads(bytes(data)))
                return None

    def _raise_failure(self, status: dict[str, Any]) -> None:
        if status.get("status") == "Success":
            return
        causes = (status.get("details") or {}).get("causes") or ()
        code = next((int(cause["message"]) for cause in causes if cause.get("reason") == "ExitCode"), -1)
        said = self._words.decode(errors="replace").strip()
        if code < 0:
            raise EngineUnavailable(
                f"A program in the cluster could not be run. The cluster said: {status.get('message')} {said}"
            )
        raise Exited(code, said)


@contextmanager
def started(api: KubeApi, pod: str, container: str, command: Sequence[str], patience_seconds: float) -> Iterator[Program]:
    """Start a program in the container of a pod, whose path in the API is `pod`; the connection ends with the block.

    Raises:
        Refused, EngineError: the API server says no.
        EngineUnavailable: it does not answer, or the node does not.
    """
    from websockets.exceptions import InvalidHandshake, InvalidStatus
    from websockets.sync.client import connect

    api.count("get pods/exec")
    flags = {"container": container, "stdin": "true", "stdout": "true", "stderr": "true", "tty": "false"}
    query = urlencode([*flags.items(), *(("command", word) for word in command)])
    access = api.access
    try:
        connection = connect(
            f"{access.server.replace('http', 'ws', 1)}{pod}/exec?{query}",
            ssl=access.tls and InTurns(access.tls),  # type: ignore[arg-type]
            subprotocols=[_PROTOCOL],  # type: ignore[list-item]
            compression=None,
            additional_headers={"User-Agent": "oasis-flows", **access.headers()},
            user_agent_header=None,
            proxy=access.proxy,
            open_timeout=30,
            # Who is busy answers late: a connection that is gone is noticed by the sockets.
            ping_timeout=None,
            close_timeout=2,
            max_size=None,
        )
    except InvalidStatus as error:
        refused = refusal(error.response.status_code, bytes(error.response.body or b""))
        if refused.status in PASSING:
            raise EngineUnavailable(f"A program could not be started in the cluster. It said: {refused.words}") from error
        if refused.status == 403:
            raise EngineError(f"{NO_RIGHT} The cluster said: {refused.words}") from error
        raise refused from error
    except (InvalidHandshake, OSError, EOFError) as error:
        host = urlsplit(access.server).netloc
        raise EngineUnavailable(
            f"The cluster at {host} did not start a program. The cause: {type(error).__name__}: {error}"
        ) from error
    with connection:
        for option in ALIVE:
            if connection.socket.family in (socket.AF_INET, socket.AF_INET6):
                connection.socket.setsockopt(*option)
        yield Program(connection, patience_seconds)
