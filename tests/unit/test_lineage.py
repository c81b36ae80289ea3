"""The chain of records: what holds, and that whatever is changed is named."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, strategies as st

from oasis_flows.errors import ChainBroken
from oasis_flows.lineage import (
    LABEL_CHAIN,
    Content,
    Envelope,
    check_content,
    digest_of,
    labelled,
    own_keys,
    public_key,
    read,
    sign,
    verify,
    written,
)

KEYS = {name: Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n, name in enumerate(("a", "b", "c"))}
TRUSTED = {name: (public_key(key),) for name, key in KEYS.items()}


def content(number: int, **config: Any) -> Content:
    return Content({"Env": ["PATH=/bin"], **config}, tuple(f"sha256:{n:064x}" for n in range(number + 2)))


def made(*stations: str) -> list[Envelope]:
    chain: list[Envelope] = []
    for number, station in enumerate(stations, 1):
        link = {
            "version": 1,
            "visit": number,
            "station": {"id": number, "name": station},
            "previous_link": chain[-1].digest if chain else None,
            "predecessor": {"content": content(number - 1).digest},
            "successor": {"content": content(number).digest, "layers": list(content(number).layers)},
        }
        chain.append(sign(link, KEYS[station]))
    return chain


def test_a_chain_holds_and_comes_back_as_it_was_written():
    chain = made("a", "b", "a", "c")

    assert read(written(chain)) == tuple(chain)
    assert [finding.station for finding in verify(chain, TRUSTED)] == ["a", "b", "a", "c"]
    assert verify(chain, own_keys(chain)) == verify(chain, TRUSTED)
    check_content(content(4), chain[-1].link)
    assert read("") == ()


def test_the_envelope_is_dsse_s():
    # https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
    (envelope,) = made("a")
    shown = envelope.to_json()
    type, payload = shown["payloadType"], base64.b64decode(shown["payload"])
    signed = f"DSSEv1 {len(type)} {type} {len(payload)} ".encode() + payload

    KEYS["a"].public_key().verify(base64.b64decode(shown["signatures"][0]["sig"]), signed)
    assert json.loads(payload)["visit"] == 1


CHAIN = made("a", "b", "c")


@pytest.mark.parametrize(
    ("chain", "why"),
    [
        (CHAIN[1:], "Link 1 says that it is of visit 2"),
        ([CHAIN[0], CHAIN[2]], "Link 2 says that it is of visit 3"),
        ([CHAIN[1], CHAIN[0], CHAIN[2]], "Link 1 says that it is of visit 2"),
        ([sign({**CHAIN[0].link, "more": 1}, KEYS["a"]), *CHAIN[1:]], "Link 2 does not follow the link before it"),
        (
            [CHAIN[0], sign({**CHAIN[1].link, "predecessor": {"content": "sha256:other"}}, KEYS["b"])],
            "Link 2 is of a train with another content",
        ),
        ([sign(CHAIN[0].link, KEYS["b"])], "Link 1 is signed with a key that is not one of station 'a'"),
        ([sign({"version": 2}, KEYS["a"])], "Link 1 is of no version"),
    ],
)
def test_what_does_not_hold_is_named(chain, why):
    with pytest.raises(ChainBroken, match=why):
        verify(chain, TRUSTED)


@given(st.integers(0, 2), st.integers(0, 10_000), st.integers(1, 255), st.sampled_from(["payload", "signature"]))
def test_no_byte_of_a_link_can_be_changed(number, at, flip, part):
    envelope = CHAIN[number]
    data = bytearray(getattr(envelope, part))
    data[at % len(data)] ^= flip
    changed = Envelope(bytes(data), envelope.key, envelope.signature) if part == "payload" else None
    changed = changed or Envelope(envelope.payload, envelope.key, bytes(data))

    with pytest.raises(ChainBroken, match=f"signature of link {number + 1} does not fit"):
        verify([*CHAIN[:number], changed, *CHAIN[number + 1 :]], TRUSTED)


@pytest.mark.parametrize(
    "text", ["{", "[1]", "[{}]", '[{"payload": "", "payloadType": "x", "signatures": [{"keyid": "k", "sig": ""}]}]']
)
def test_a_label_that_is_no_chain(text):
    with pytest.raises(ChainBroken, match="cannot be read"):
        read(text)


def test_an_image_that_was_changed_is_named():
    last = CHAIN[-1].link
    whole = content(3)
    swapped = Content(whole.config, (whole.layers[0], digest_of(b"x"), *whole.layers[2:]))
    for changed, why in (
        (swapped, "Layer 2 of the image is not the one"),
        (content(2), "has 4 layers, and 5 left"),
        (content(3, Cmd=["other"]), "The configuration of the image is not the one"),
        (content(3, Labels={"more": "1"}), "The configuration of the image is not the one"),
    ):
        with pytest.raises(ChainBroken, match=why):
            check_content(changed, last)


def test_the_content_is_that_of_the_image_whatever_its_chain_and_an_engine_s_defaults_are():
    plain = {"Env": ["A=1"], "Labels": {"kept": "1", "io.oasis.train.old": "x"}}
    mine = labelled(plain, {LABEL_CHAIN: "one"})
    seen = {**labelled(plain, {LABEL_CHAIN: "two"}), "Hostname": "", "OnBuild": None, "Volumes": {}}

    assert mine["Labels"] == {"kept": "1", LABEL_CHAIN: "one"}
    assert Content(mine, ("l",)).digest == Content(seen, ("l",)).digest
    assert Content(mine, ("l",)).chain == "one"
