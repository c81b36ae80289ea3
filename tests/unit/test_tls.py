"""A TLS connection that is read and written at once."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from oasis_flows.engines.tls import InTurns, TurnsSocket
from tests.unit.test_kube_access import issued

PIECE, PIECES = bytes(range(256)) * 256, 200


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's."""
    key = ec.generate_private_key(ec.SECP256R1())
    made = issued("localhost", "localhost", key, key, x509.SubjectAlternativeName([x509.DNSName("localhost")]))
    file: Path = tmp_path_factory.mktemp("tls") / "server.pem"
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cafile=file)


@pytest.fixture
def connected(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> Iterator[Callable[[Callable[[ssl.SSLSocket], None]], TurnsSocket]]:
    """Connects to a server that does this with its side."""
    server, client = contexts
    threads: list[threading.Thread] = []
    made: list[TurnsSocket] = []

    def connect(serve: Callable[[ssl.SSLSocket], None]) -> TurnsSocket:
        listening = socket.create_server(("127.0.0.1", 0))

        def work() -> None:
            with listening, suppress(OSError):
                accepted, _ = listening.accept()
                with server.wrap_socket(accepted, server_side=True) as theirs:
                    serve(theirs)

        threads.append(threading.Thread(target=work))
        threads[-1].start()
        plain = socket.create_connection(listening.getsockname(), timeout=10)
        made.append(InTurns(client).wrap_socket(plain, server_hostname="localhost"))
        made[-1].settimeout(None)
        return made[-1]

    yield connect
    for each in made:
        each.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def echo(theirs: ssl.SSLSocket) -> None:
    while data := theirs.recv(65536):
        theirs.sendall(data)


def test_what_is_sent_and_received_at_once_is_whole(connected):
    ours = connected(echo)
    arrived = bytearray()

    def read() -> None:
        while len(arrived) < len(PIECE) * PIECES:
            arrived.extend(ours.recv(65536))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(PIECES):
        ours.sendall(PIECE)
    reader.join(60)

    assert bytes(arrived) == PIECE * PIECES


def test_nobody_is_in_openssl_beside_somebody_else(connected, monkeypatch):
    ours = connected(echo)
    inside, beside = threading.Lock(), []
    for name in ("recv", "send"):
        really = getattr(ours._sock, name)

        def alone(data: object, really: Callable[[object], object] = really, name: str = name) -> object:
            if not inside.acquire(blocking=False):
                beside.append(name)
                return really(data)
            try:
                return really(data)
            finally:
                inside.release()

        monkeypatch.setattr(ours._sock, name, alone)
    reader = threading.Thread(target=lambda: [ours.recv(4096) for _ in range(500)])
    reader.start()
    while reader.is_alive():
        ours.sendall(b"x" * 4096)
    assert not beside


def test_a_wait_ends_in_time_by_a_shutdown_and_by_the_other_side(connected):
    ours = connected(lambda theirs: theirs.recv(1))
    ours.settimeout(0.2)
    with pytest.raises(TimeoutError):
        ours.recv(1)
    ours.settimeout(None)
    threading.Timer(0.2, lambda: ours.shutdown(socket.SHUT_RDWR)).start()
    assert ours.recv(1) == b""
    with pytest.raises(OSError):
        ours.sendall(b"x")

    assert connected(lambda theirs: theirs.sendall(b"bye")).recv(10) == b"bye"
    gone = connected(lambda _: None)
    assert gone.recv(10) == b""
