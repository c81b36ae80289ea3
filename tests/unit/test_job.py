"""Values of `oasis_flows.job`: sizes, exits, and what never shows."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from oasis_flows.errors import DescriptionError
from oasis_flows.job import (
    ContainerExit,
    ContainerJob,
    ImageSource,
    Reason,
    RegistryLogin,
    Sample,
    Sandbox,
    human_bytes,
    parse_bytes,
)

START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1 << 20),
        ("1GiB", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("2GB", 2 * 10**9),
        ("512 MiB", 512 << 20),
        ("4k", 4000),
        ("4K", 4000),
    ],
)
def test_parse_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 apple", "1e9", "1GiBB", "0x10", "1,5GiB"])
def test_no_size(text: str) -> None:
    with pytest.raises(DescriptionError, match=r"is not a size"):
        parse_bytes(text)


@given(st.integers(0, 1 << 60))
def test_plain_numbers_are_bytes(count: int) -> None:
    assert parse_bytes(str(count)) == pytest.approx(count)


@pytest.mark.parametrize(
    ("count", "text"), [(None, "unknown"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 40, "1024.0 GiB")]
)
def test_human_bytes(count: int | None, text: str) -> None:
    assert human_bytes(count) == text


def test_an_exit_survives_json() -> None:
    exit = ContainerExit(
        reason=Reason.EXIT_NONZERO,
        exit_code=7,
        started_at=START,
        finished_at=START + timedelta(seconds=2),
        cpu_seconds=1.5,
        usage=(Sample(0.5, 1.0, 1 << 20), Sample(1.0, 0.5, 2 << 20)),
        in_force={"network": "none"},
        log_lost="the engine was started anew",
        last_words=("one", "two"),
    )
    assert ContainerExit.from_json(json.loads(json.dumps(exit.to_json()))) == exit
    assert exit.seconds == 2


def test_never_started_took_no_time() -> None:
    assert ContainerExit(reason=Reason.COMMAND_NOT_FOUND, exit_code=None).seconds == 0


def test_exactly_one_place_for_an_image() -> None:
    for both in ({}, {"image_id": "a", "image_file": "b"}, {"image_id": ""}):
        with pytest.raises(DescriptionError, match=r"exactly one place"):
            ImageSource(**both)  # type: ignore[arg-type]


def test_secrets_do_not_show() -> None:
    login = RegistryLogin(registry="r", username="u", password="s3cret")
    source = ImageSource(image_file="s3://b/i.tar", login=login, storage_options={"secret": "s3cret"})
    job = ContainerJob(run_id="r", image="i", lease=Path("l"), secret_environment={"K": "s3cret"})
    assert "s3cret" not in repr(login) + repr(source) + repr(job)


def test_the_sandbox_is_closed_and_says_what_was_opened() -> None:
    assert Sandbox().loosened == ()
    assert Sandbox(network=True, capabilities=("NET_RAW",)).loosened == ("network", "capability NET_RAW")
