"""The keys that stations sign their records with: made on first use, kept in a Prefect Secret or in a file of the machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from prefect.blocks.system import Secret
from pydantic import SecretStr

from . import documents
from .errors import DescriptionError
from .lineage import public_key
from .settings import Settings
from .workspace import room_for


def signing_key(station: str, secret: str | None, here: Settings) -> Ed25519PrivateKey:
    """The private key of a station, from the Secret block of this name or else from a file; made where there is none.

    Raises:
        DescriptionError: what is there is no ed25519 key, or others may read the file.
        StoreFull: the file cannot be written.
    """
    if secret is not None:
        return _read(_secret(secret).encode(), f"The Secret block {secret!r}")
    path = _path(station, here)
    _make(path)
    if path.stat().st_mode & 0o077:
        raise DescriptionError(f"The key {path} may be read by others. Take it from them: chmod 600 {path}.")
    return _read(path.read_bytes(), f"The file {path}")


def trusted(here: Settings) -> Mapping[str, tuple[str, ...]]:
    """The public keys that records are believed by, each station's: those of the settings, and this machine's own."""
    own = {path.stem: public_key(_read(path.read_bytes(), f"The file {path}")) for path in sorted(here.keys.glob("*.pem"))}
    names = {*here.trusted_stations, *own}
    return {name: (*here.trusted_stations.get(name, ()), *((own[name],) if name in own else ())) for name in names}


def _path(station: str, here: Settings) -> Path:
    return here.keys / f"{station}.pem"


def _secret(name: str) -> str:
    found = documents.find(Secret, name)
    if found is None:
        # Where somebody else makes it at the same time, theirs counts.
        with suppress(ValueError):
            Secret(value=SecretStr(_new())).save(name)
        found = documents.load(Secret, name)
    return str(found.get())


def _make(path: Path) -> None:
    with room_for(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(_new())
        # A link is made by one only, where several come at the same time.
        with suppress(FileExistsError):
            path.hardlink_to(temporary)
        temporary.unlink()


def _new() -> str:
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _read(pem: bytes, what: str) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise DescriptionError(f"{what} holds no ed25519 key. Remove it, and a new one is made; ask others to trust that.")
    return key
