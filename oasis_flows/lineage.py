"""The record that travels with a train: a chain of signed links, one for each visit; pure.

A link is a DSSE envelope (https://github.com/secure-systems-lab/dsse) around JSON, signed with the station's ed25519 key. It
names the content that came and the content that left, by `content_digest`, and the link before it by the digest of its
payload. The chain is a label of the image, which `content_digest` leaves out.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ChainBroken

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PAYLOAD_TYPE = "application/vnd.oasis-flows.train-link+json"
LINK_VERSION = 1
PREFIX = "io.oasis.train."
LABEL_CHAIN = f"{PREFIX}chain"
# What of an image's configuration decides what it does.
_EFFECTIVE = (
    "Env", "Cmd", "Entrypoint", "User", "WorkingDir", "ExposedPorts", "Volumes", "StopSignal", "Healthcheck", "Shell", "OnBuild",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Content:
    """What an image is: its configuration, its layers by the digests of their bytes, and what it says of its making.

    The platform is `os/architecture`. The history has a step's command and comment, oldest first. Times are no part of it.
    """

    config: Mapping[str, Any]
    layers: tuple[str, ...]
    platform: str = ""
    history: tuple[tuple[str, str], ...] = ()

    @property
    def chain(self) -> str:
        """The text of the chain that travels in it; empty where there is none."""
        return str((self.config.get("Labels") or {}).get(LABEL_CHAIN) or "")

    @property
    def digest(self) -> str:
        """Tells one content from another, whatever the chain in it says."""
        effective: dict[str, Any] = {name: self.config[name] for name in _EFFECTIVE if self.config.get(name)}
        labels = {name: text for name, text in (self.config.get("Labels") or {}).items() if name != LABEL_CHAIN}
        said = {"platform": self.platform, "history": self.history}
        return digest_of(canonical({"config": effective, "labels": labels, "layers": self.layers, **said}))


def steps(rows: Iterable[Mapping[str, Any]], command: str, comment: str) -> tuple[tuple[str, str], ...]:
    """A history, oldest first, of rows with these keys. What says nothing is left out: engines make such rows themselves."""
    told = ((str(row.get(command) or ""), str(row.get(comment) or "")) for row in rows)
    return tuple(step for step in told if any(step))


@dataclass(frozen=True, slots=True)
class Envelope:
    """A signed link. `key` is the public key of who signed it, in base64."""

    payload: bytes
    key: str
    signature: bytes

    @property
    def link(self) -> dict[str, Any]:
        return dict(json.loads(self.payload))

    @property
    def digest(self) -> str:
        """Of the payload: what the next link names."""
        return digest_of(self.payload)

    def to_json(self) -> dict[str, Any]:
        """The envelope as DSSE writes it."""
        signature = {"keyid": f"ed25519:{self.key}", "sig": base64.b64encode(self.signature).decode()}
        return {"payload": base64.b64encode(self.payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": [signature]}


@dataclass(frozen=True, slots=True)
class Finding:
    """A link that holds: which visit, at which station, and the digest of what left it."""

    number: int
    station: str
    link: Mapping[str, Any]


def labelled(config: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """A configuration with these labels, and none of an earlier visit."""
    kept = {name: text for name, text in (config.get("Labels") or {}).items() if not name.startswith(PREFIX)}
    return {**config, "Labels": {**kept, **labels}}


def canonical(value: object) -> bytes:
    """JSON in one spelling."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(data: bytes) -> str:
    """`sha256:…`"""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def public_key(private: Ed25519PrivateKey) -> str:
    """The public key that belongs to a private one, in base64."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return base64.b64encode(private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def sign(link: Mapping[str, Any], private: Ed25519PrivateKey) -> Envelope:
    """The link in an envelope."""
    payload = canonical(link)
    return Envelope(payload, public_key(private), private.sign(_encoding(payload)))


def written(chain: Sequence[Envelope]) -> str:
    """The chain as the text of a label."""
    return canonical([envelope.to_json() for envelope in chain]).decode()


def read(text: str) -> tuple[Envelope, ...]:
    """The chain that a label holds; empty text is an empty chain.

    Raises:
        ChainBroken: it is none.
    """
    try:
        rows = json.loads(text) if text else []
        return tuple(_envelope(row) for row in rows)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ChainBroken(
            f"The chain of records cannot be read. Somebody changed it, or it is none. The cause: {type(error).__name__}: {error}"
        ) from None


def _envelope(row: Mapping[str, Any]) -> Envelope:
    (signature,) = row["signatures"]
    kind, _, key = signature["keyid"].partition(":")
    if row["payloadType"] != PAYLOAD_TYPE or kind != "ed25519":
        raise ValueError(f"a link of type {row['payloadType']!r} by {kind!r}")
    payload = base64.b64decode(row["payload"], validate=True)
    return Envelope(payload, key, base64.b64decode(signature["sig"], validate=True))


def _encoding(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def verify(chain: Sequence[Envelope], trusted: Mapping[str, Iterable[str]]) -> tuple[Finding, ...]:
    """Every link, where all of them hold; `trusted` are the public keys of each station, by its name.

    Raises:
        ChainBroken: with the first thing that does not hold.
    """
    findings: list[Finding] = []
    before: Envelope | None = None
    for number, envelope in enumerate(chain, 1):
        _check_signature(envelope, number)
        link = _link(envelope, number)
        station = link["station"]["name"]
        if envelope.key not in set(trusted.get(station, ())):
            raise ChainBroken(
                f"Link {number} is signed with a key that is not one of station {station!r}. Ask that station for its public "
                f"key, and add it to the setting OASIS_FLOWS_TRUSTED_STATIONS. The key: {envelope.key}"
            )
        if link["visit"] != number:
            raise ChainBroken(
                f"Link {number} says that it is of visit {link['visit']}. Links are missing, or were put in another order."
            )
        if link["previous_link"] != (before.digest if before else None):
            raise ChainBroken(
                f"Link {number} does not follow the link before it. One of the two was changed, taken out or put in."
            )
        if before is not None and link["predecessor"]["content"] != before.link["successor"]["content"]:
            raise ChainBroken(
                f"Link {number} is of a train with another content than link {number - 1} left behind. "
                "The image was changed between these two stations."
            )
        findings.append(Finding(number, station, link))
        before = envelope
    return tuple(findings)


def own_keys(chain: Sequence[Envelope]) -> dict[str, tuple[str, ...]]:
    """The keys that the links themselves name: with these, `verify` says that nothing was changed, and nothing of whom to trust."""
    named = [(_link(envelope, number)["station"]["name"], envelope.key) for number, envelope in enumerate(chain, 1)]
    return {station: tuple(key for name, key in named if name == station) for station, _ in named}


def _check_signature(envelope: Envelope, number: int) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(envelope.key, validate=True))
        key.verify(envelope.signature, _encoding(envelope.payload))
    except (InvalidSignature, ValueError):
        raise ChainBroken(
            f"The signature of link {number} does not fit what it says. Somebody changed the link, or its signature."
        ) from None


def _link(envelope: Envelope, number: int) -> dict[str, Any]:
    try:
        link = envelope.link
        ok = link["version"] == LINK_VERSION and isinstance(link["station"]["name"], str)
        _ = (link["visit"], link["previous_link"], link["predecessor"]["content"], link["successor"]["content"])
    except (ValueError, KeyError, TypeError):
        ok = False
    if not ok:
        raise ChainBroken(f"Link {number} is of no version that this one reads. Update oasis-flows, or ask who made it.")
    return link


def check_content(content: Content, last: Mapping[str, Any]) -> None:
    """Return if an image is what the last link of its chain says that left the station.

    Raises:
        ChainBroken: its layers or its configuration are others.
    """
    layers = tuple(last["successor"]["layers"])
    for number, (is_now, was) in enumerate(zip(content.layers, layers, strict=False), 1):
        if is_now != was:
            raise ChainBroken(
                f"Layer {number} of the image is not the one that left the last station. The image was changed. It is {is_now}, and was {was}."
            )
    if len(content.layers) != len(layers):
        raise ChainBroken(
            f"The image has {len(content.layers)} layers, and {len(layers)} left the last station. The image was changed."
        )
    if content.digest != last["successor"]["content"]:
        raise ChainBroken(
            "The configuration of the image is not the one that left the last station. Its command, environment, labels, platform or "
            "history were changed."
        )
