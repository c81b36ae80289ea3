"""What of a kubeconfig counts, and what certificates are taken."""

import base64
import datetime
import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from oasis_flows.engines.kube_access import from_content

NAME = "cluster.test"


def issued(subject: str, issuer: str, key, signed_by, *extensions) -> x509.Certificate:
    """A certificate with nothing but these extensions."""
    now = datetime.datetime.now(datetime.UTC)
    name = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (subject, issuer)]
    made = x509.CertificateBuilder().subject_name(name[0]).issuer_name(name[1]).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + datetime.timedelta(1))
    for each in extensions:
        made = made.add_extension(each, critical=isinstance(each, x509.BasicConstraints))
    return made.sign(signed_by, hashes.SHA256())


@pytest.fixture
def authority(tmp_path):
    """An authority as old clusters have it, in PEM; and a server's context with a certificate of it."""
    own, servers = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = issued("kubernetes", "kubernetes", own, own, x509.BasicConstraints(ca=True, path_length=None))
    leaf = issued(NAME, "kubernetes", servers, own, x509.SubjectAlternativeName([x509.DNSName(NAME)]))
    pem = serialization.Encoding.PEM
    plain = servers.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "server.pem").write_bytes(plain + leaf.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    return root.public_bytes(pem), context


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True)
        except (ssl.SSLError, OSError):
            theirs.close()

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        client.wrap_socket(ours, server_hostname=name).close()
    finally:
        ours.close()
        serving.join()


def test_the_authority_of_an_old_cluster_is_taken_and_names_are_checked(authority, monkeypatch):
    """As kubectl does; Python 3.13 and later ask for more."""
    make = ssl.create_default_context

    def strict(**given):
        context = make(**given)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)
    root, server = authority
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(strict(cadata=root.decode()), server, NAME)
    config = {
        "current-context": "x",
        "clusters": [
            {
                "name": "c",
                "cluster": {"server": f"https://{NAME}", "certificate-authority-data": base64.b64encode(root).decode()},
            }
        ],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    }
    tls = from_content(config).tls
    shake_hands(tls, server, NAME)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(tls, server, "another.test")
