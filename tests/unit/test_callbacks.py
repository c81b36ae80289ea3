"""What a run makes of the wrapper's notes, also of those that an algorithm forged."""

from __future__ import annotations

import json
import os

import pytest

from oasis_flows import item
from oasis_flows.callbacks import Notes, Ran, corrected, read
from oasis_flows.job import ContainerExit, Reason
from oasis_flows.prerequisites import Found, Resolution, resolve
from oasis_flows.verdict import Case, judge

CALLBACKS = [{"event": event, "commands": [f"first {event}", f"second {event}"]} for event in ("taskStarts", "taskEnds")]


@pytest.fixture
def resolution() -> Resolution:
    fields = {"plugin_params": {"callbacks": CALLBACKS}}
    return resolve(
        "a", (item.Requirement("p"),), lambda _: Found(item.parse(fields, "p"), "p", ""), working_dir="/work", network=False
    )


def ran(event: str, code: int | None, *, ignored: bool = False) -> Ran:
    return Ran(prerequisite="p", event=event, seconds=1.0, exit_code=code, command=f"do {event}", ignored=ignored)


def test_notes_are_read_as_they_were_written_and_survive_json(resolution, tmp_path):
    for name, text in {"0.began": "", "0.at": "2\n", "0.ended": "", "0.failed": "7\n", "1.began": "", "1.at": "1\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "algorithm").write_text("7\n")
    os.utime(tmp_path / "0.began", (100, 100))
    os.utime(tmp_path / "0.ended", (103.5, 103.5))
    notes = read(tmp_path, resolution)

    assert [(each.command, each.exit_code, each.seconds) for each in notes.ran] == [
        ("second taskStarts", 7, 3.5),
        ("first taskEnds", None, None),
    ]
    assert (notes.algorithm, notes.refused) == (7, None)
    assert Notes.from_json(json.loads(json.dumps(notes.to_json()))) == notes
    assert Notes.from_json(None) == read(tmp_path / "nowhere", resolution) == Notes()


def test_notes_that_are_no_notes_do_no_harm(resolution, tmp_path):
    (tmp_path / "secret").write_text("42")
    (tmp_path / "0.began").symlink_to("/etc/passwd")
    (tmp_path / "0.at").write_text("99999999999")
    (tmp_path / "0.ended").mkdir()
    os.mkfifo(tmp_path / "0.failed")
    (tmp_path / "algorithm").symlink_to(tmp_path / "secret")
    (tmp_path / "refused").write_bytes(b"\xff" * 100)
    notes = read(tmp_path, resolution)

    assert (notes.algorithm, notes.refused) == (None, None)
    assert notes.ran[0].command == "second taskStarts"


STARTED, ENDED = ran("taskStarts", 0), ran("taskEnds", 0)


@pytest.mark.parametrize(
    ("reason", "code", "notes", "expected"),
    [
        (Reason.OK, 0, Notes((STARTED,)), (Reason.OK, 0)),
        (Reason.EXIT_NONZERO, 3, Notes((STARTED,)), (Reason.EXIT_NONZERO, 3)),
        (Reason.EXIT_NONZERO, 7, Notes((ran("taskStarts", 7),)), (Reason.PREREQUISITE_FAILED, 7)),
        (Reason.KILLED, 137, Notes((ran("taskStarts", 137),)), (Reason.PREREQUISITE_FAILED, 137)),
        (Reason.KILLED, 137, Notes((ran("taskStarts", None),)), (Reason.KILLED, 137)),
        (Reason.EXIT_NONZERO, 3, Notes((ran("taskStarts", 7, ignored=True),), 3), (Reason.EXIT_NONZERO, 3)),
        (Reason.EXIT_NONZERO, 3, Notes((STARTED, ran("taskEnds", 7)), 3), (Reason.EXIT_NONZERO, 3)),
        (Reason.EXIT_NONZERO, 7, Notes((STARTED, ran("taskEnds", 7)), 0), (Reason.PREREQUISITE_FAILED, 7)),
        (Reason.KILLED, 137, Notes((STARTED, ran("taskEnds", None)), 0), (Reason.PREREQUISITE_FAILED, None)),
        (Reason.KILLED, 137, Notes((STARTED, ran("taskFails", None)), 3), (Reason.EXIT_NONZERO, 3)),
        (Reason.EXIT_NONZERO, 137, Notes((STARTED, ENDED), 137), (Reason.KILLED, 137)),
        (Reason.EXIT_NONZERO, 127, Notes((STARTED,), None, 127), (Reason.COMMAND_NOT_FOUND, 127)),
        (Reason.EXIT_NONZERO, 126, Notes((STARTED, ENDED), 126, 126), (Reason.NOT_EXECUTABLE, 126)),
        (Reason.TIMED_OUT, 143, Notes((ran("taskStarts", 143),), 143), (Reason.TIMED_OUT, 143)),
        (Reason.OUT_OF_MEMORY, 137, Notes((STARTED, ran("taskEnds", 1)), 137), (Reason.OUT_OF_MEMORY, 137)),
    ],
)
def test_the_containers_end_is_told_apart_from_the_wrappers(reason, code, notes, expected):
    found = corrected(ContainerExit(reason=reason, exit_code=code, last_words=("mine", "oasis-flows: not mine")), notes)

    assert (found.reason, found.exit_code) == expected
    assert found.last_words == ("mine",)


def test_words_that_look_like_a_wrappers_are_the_algorithms_where_there_is_none():
    exit = ContainerExit(reason=Reason.EXIT_NONZERO, exit_code=1, last_words=("oasis-flows: mine",))

    assert corrected(exit, Notes()) == exit


def test_a_verdict_on_a_prerequisite_says_what_its_words_mean():
    notes = Notes((ran("taskStarts", 4),))
    words = ("wget: bad address 'example.org'",)
    exit = corrected(ContainerExit(reason=Reason.EXIT_NONZERO, exit_code=4, last_words=words), notes)
    verdict = judge(Case(algorithm="a", exit=exit, network=False, prerequisite=notes.failed))

    assert (verdict.code, verdict.blame) == ("prerequisite_failed", "policy")
    assert verdict.sentence.startswith(
        "The algorithm a did not start, because its prerequisite p failed: `do taskStarts` (taskStarts) ended with exit code 4, because "
    )
    assert "network: true" in verdict.advice
    assert verdict.evidence[0] == words[0]
