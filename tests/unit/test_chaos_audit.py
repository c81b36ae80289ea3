"""The chaos suite's auditor finds every sort of lie; the suite itself can only show that it finds none."""

import hashlib
from dataclasses import replace

import pytest

from tests.chaos.algorithms import ALGORITHMS, SOURCES, Output
from tests.chaos.audit import Claims, Place, Truth, examine
from tests.chaos.plan import plan_round

OUTPUT = Output({"a": b"1", "b/c": b"22"}, out=b"out 1\nout 2\n", err=b"err 1\n")
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in OUTPUT.files.items()}
LOG = b"out 1\nerr 1\nout 2\n"
TRUTH = Truth(token="t", output=OUTPUT, exit_code=0, against=frozenset({"kill the flow"}), hit=frozenset({"kill the flow"}))
PLACE = Place(data=DIGESTS, manifest=DIGESTS, manifest_digest="d", record={"verdict": {"code": "ok"}}, log=LOG)
COMPLETED = Claims(state="COMPLETED", place=PLACE, document={"manifest_digest": "d"}, told={"url": "x"})
FAILED = Claims(
    state="FAILED",
    code="exit_nonzero",
    place=Place(data=DIGESTS, record={"verdict": {"code": "exit_nonzero"}}, log=LOG),
    told={"raised": "AlgorithmFailed", "code": "exit_nonzero"},
)
FAILING = replace(TRUTH, exit_code=3)
TOLD_LOST = replace(PLACE, record={"verdict": {"code": "ok"}, "exit": {"log_lost": "its engine was killed"}}, log=b"out 2\n")
ENGINE = replace(TRUTH, against=frozenset({"kill the engine"}), hit=frozenset({"kill the engine"}))
AWAY = replace(TRUTH, against=frozenset({"kill the server"}), hit=frozenset({"kill the server"}))
SILENT = Claims(state="CRASHED", message="No sign of life for 90 seconds.", told={"raised": "RemoteProtocolError"})
CUT = replace(TRUTH, against=frozenset({"cut the server"}), hit=frozenset({"cut the server"}))


@pytest.mark.parametrize(
    ("truth", "claims"),
    [
        (TRUTH, COMPLETED),
        (FAILING, FAILED),
        (TRUTH, Claims(state="CRASHED")),
        (TRUTH, Claims(state="SCHEDULED")),
        (TRUTH, replace(COMPLETED, state="CRASHED", told=None, document=None)),
        (TRUTH, Claims(state="CRASHED", place=Place(log=LOG[:9]))),
        (ENGINE, replace(COMPLETED, place=TOLD_LOST)),
        (TRUTH, replace(COMPLETED, state="FAILED", code="engine_unavailable", told=None, document=None, attempts=2)),
        (
            CUT,
            Claims(
                state="CRASHED", message="It was taken an hour ago and never began.", told={"raised": "RemoteProtocolError"}
            ),
        ),
        (AWAY, SILENT),
        (
            replace(AWAY, called=False),
            Claims(state="CRASHED", message="It was taken an hour ago and never began.", attempts=0),
        ),
        (
            replace(CUT, called=False),
            Claims(
                state="CRASHED", message="Process exited with status code: 1. Process exited with a general error.", attempts=0
            ),
        ),
    ],
    ids=[
        "completed",
        "failed",
        "crashed early",
        "killed before it began",
        "crashed behind the commit",
        "crashed with half a log",
        "its log may lack something, and says so",
        "crashed behind the commit, and failed when it was tried again",
        "refused by the server",
        "begun while the server was away for a minute",
        "taken by a worker while the server was away for a minute",
        "its process was refused by the server",
    ],
)
def test_what_is_true_is_no_finding(truth, claims):
    assert list(examine(truth, claims)) == []


@pytest.mark.parametrize(
    ("truth", "claims", "finding"),
    [
        (TRUTH, Claims(state="RUNNING"), "its state is RUNNING"),
        (replace(TRUTH, called=False), Claims(state="PENDING"), "its state is PENDING"),
        (replace(TRUTH, hung=True), COMPLETED, "did not end by itself"),
        (FAILING, COMPLETED, "is Completed and its algorithm fails"),
        (TRUTH, replace(COMPLETED, place=replace(PLACE, manifest=None)), "there is no manifest"),
        (TRUTH, replace(COMPLETED, document=None), "no Dataset document"),
        (TRUTH, replace(COMPLETED, document={"manifest_digest": "e"}), "another manifest's digest"),
        (TRUTH, Claims(state="CRASHED", document={"manifest_digest": "d"}), "a place without manifest"),
        (TRUTH, replace(COMPLETED, state="FAILED", told=None), "left a dataset"),
        (replace(TRUTH, hit=frozenset()), replace(COMPLETED, state="CRASHED", told=None), "left a dataset"),
        (TRUTH, replace(COMPLETED, place=replace(PLACE, data={**DIGESTS, "a": "0"})), "its data is not what"),
        (TRUTH, replace(COMPLETED, place=replace(PLACE, manifest={"a": DIGESTS["a"]})), "its manifest is not what"),
        (TRUTH, replace(COMPLETED, place=replace(PLACE, data={**DIGESTS, ".x.part": "0"})), "its data is not what"),
        (TRUTH, replace(COMPLETED, place=replace(PLACE, log=LOG[:-1])), "lacks the last 1 bytes"),
        (TRUTH, replace(COMPLETED, place=replace(PLACE, log=LOG + b"out 2\n")), "its log has"),
        (TRUTH, Claims(state="CRASHED", place=Place(log=b"out 2\n")), "its log has"),
        (TRUTH, replace(COMPLETED, place=TOLD_LOST), "and nobody ended that"),
        (ENGINE, replace(COMPLETED, place=replace(TOLD_LOST, log=b"out 2\nout 1\n")), "its log has"),
        (CUT, Claims(state="CRASHED", told={"raised": "RemoteProtocolError"}), "nobody ended its process"),
        (CUT, SILENT, "nobody ended its process"),
        (
            replace(CUT, called=False),
            Claims(state="CRASHED", message="It was taken an hour ago and never began.", attempts=0),
            "nobody ended its process",
        ),
        (AWAY, replace(SILENT, told=None), "nobody ended its process"),
        (AWAY, replace(SILENT, told={"raised": "TypeError"}), "nobody ended its process"),
        (AWAY, replace(SILENT, place=Place(log=b"")), "nobody ended its process"),
        (
            replace(CUT, called=False, hit=frozenset()),
            Claims(state="CRASHED", message="Process exited with status code: 1.", attempts=0),
            "nobody ended its process",
        ),
        (
            replace(CUT, called=False),
            Claims(state="CRASHED", message="Process exited with status code: 1."),
            "nobody ended its process",
        ),
        (TRUTH, FAILED, "is blamed for what was done to it"),
        (TRUTH, replace(COMPLETED, told={"raised": "X"}), "its caller was told"),
        (TRUTH, replace(FAILED, place=Place(record={"verdict": {"code": "killed"}}), told=None), "nobody did"),
        (replace(TRUTH, against=frozenset()), Claims(state="FAILED"), "nothing was done to it"),
        (TRUTH, Claims(state="FAILED", code="internal"), "is blamed (internal)"),
        (TRUTH, Claims(state="FAILED", message="KeyError: 3"), "has no code: KeyError: 3"),
        (
            TRUTH,
            Claims(state="FAILED", told={"raised": "X", "code": "image_invalid"}),
            "its description or the engine is blamed",
        ),
        (replace(TRUTH, hit=frozenset()), Claims(state="CRASHED"), "nobody ended its process"),
        (TRUTH, Claims(state="FAILED", told={"raised": "ValueError", "code": None}), "is not explained"),
    ],
)
def test_what_is_not_true_is_found(truth, claims, finding):
    assert finding in " | ".join(examine(truth, claims))


def test_a_round_follows_from_its_seed_alone():
    assert plan_round(1, 2) == plan_round(1, 2)
    assert plan_round(1, 2) != plan_round(2, 2) != plan_round(2, 3)
    assert not plan_round(1, 0).faults
    assert all(fault.token for fault in plan_round(1, 3).faults)


def test_the_truth_about_a_run_follows_from_its_token_and_its_input():
    first, second = (ALGORITHMS["steps"].writes(token, SOURCES["local"].files) for token in ("a", "b"))
    assert first.files["seen"] == second.files["seen"]
    assert first.files["step-1"] != second.files["step-1"]
