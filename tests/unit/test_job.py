"""Values of `oasis_flows.job`: sizes, explanations, and what never shows."""

from __future__ import annotations

import json
import pickle
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from oasis_flows.errors import AlgorithmFailed, DescriptionError, first_sentence
from oasis_flows.job import (
    ContainerExit,
    ContainerJob,
    ImageSource,
    Reason,
    RegistryLogin,
    Sandbox,
    explain,
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


def ended(reason: Reason, **more: object) -> ContainerExit:
    values = {"exit_code": 7, "started_at": START, "finished_at": START + timedelta(seconds=2), "timeout_seconds": 60.0, **more}
    return ContainerExit(reason=reason, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("reason", [r for r in Reason if r is not Reason.OK])
def test_every_failure_is_explained(reason: Reason) -> None:
    with pytest.raises(AlgorithmFailed) as caught:
        ended(reason).raise_for_status("The algorithm CO2", ["one", "two"])
    message = str(caught.value)
    assert message.startswith("The algorithm CO2 ")
    assert message.endswith("one | two")
    assert len(first_sentence(caught.value)) > 20
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert (str(again), again.exit) == (message, caught.value.exit)


def test_success_raises_nothing() -> None:
    ended(Reason.OK).raise_for_status()
    assert explain(ended(Reason.OK)) == ("succeeded after 2.0 s", "")


def test_memory_names_limit_and_peak() -> None:
    sentence, advice = explain(ended(Reason.OUT_OF_MEMORY, memory_limit_bytes=1 << 30, memory_peak_bytes=1 << 30))
    assert "limit 1.0 GiB, peak 1.0 GiB" in sentence
    assert "Raise `memory`" in advice


@pytest.mark.parametrize(
    ("reason", "limit", "said"),
    [
        (Reason.OUTPUT_TOO_LARGE, 5 << 30, "wrote more than 5.0 GiB of output after 2.0 s"),
        (Reason.TOO_MANY_FILES, 2000, "wrote more than 2000 files and folders after 2.0 s"),
        (Reason.LOG_TOO_LARGE, 1 << 20, "wrote more than 1.0 MiB to its log after 2.0 s"),
        (Reason.DISK_FULL, 1 << 30, "was stopped after 2.0 s, because less than 1.0 GiB was free on the disk of its output"),
    ],
)
def test_too_much_names_the_limit(reason: Reason, limit: int, said: str) -> None:
    exit = ended(reason, limit_passed=limit)
    assert explain(exit)[0] == said
    assert ContainerExit.from_json(json.loads(json.dumps(exit.to_json()))) == exit


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
