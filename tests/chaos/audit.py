"""Compares what is claimed about a round's runs with what is true. Pure: `witness` has looked before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .algorithms import Output

FINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})
# Of the retry of a Python call that was killed before Prefect called the flow: none of our code has run.
NOT_BEGUN = frozenset({"SCHEDULED"})
# What may end a run's process behind its dataset's commit, so that nobody is left to say Completed.
ENDS_A_PROCESS = frozenset({"kill the flow", "terminate the flow", "cancel the run", "kill the worker", "terminate the worker"})
# Every run is described as it should be, the engine can do all of it, the data are there, and nothing of ours breaks.
UNDESERVED = frozenset(
    [
        "invalid_description",
        "image_not_found",
        "image_invalid",
        "image_denied",
        "unsupported",
        "no_gpu",
        "invalid_dataset",
        "dataset_not_found",
        "unsafe_name",
        "run_in_use",
        "out_of_memory",
        "disk_full",
        "internal",
    ]
)
# What httpx raises where a server does not answer.
TRANSPORT = {"ConnectError", "ConnectTimeout", "ReadError", "ReadTimeout", "RemoteProtocolError", "WriteError"}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is certain about a run: what its container writes if it gets to its end, and what was done to it.

    `called` tells a Python call from a deployment's run. `against` has the faults that could touch it at all, `hit` those
    that did hit it or what it used.
    """

    token: str
    output: Output
    exit_code: int
    called: bool = True
    against: frozenset[str] = frozenset()
    hit: frozenset[str] = frozenset()
    hung: bool = False


@dataclass(frozen=True, kw_only=True)
class Place:
    """What lies where a run publishes: SHA-256 by file below `data/`, and the files beside."""

    data: Mapping[str, str] = field(default_factory=dict)
    manifest: Mapping[str, str] | None = None
    manifest_digest: str = ""
    record: Mapping[str, Any] | None = None
    log: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What is said about a run: its state, the code in its tags, its place, its document, and what its caller was told.

    `attempts` is how often it began.
    """

    state: str
    message: str = ""
    code: str | None = None
    place: Place = field(default_factory=Place)
    document: Mapping[str, Any] | None = None
    told: Mapping[str, Any] | None = None
    attempts: int = 1


def examine(truth: Truth, claims: Claims) -> Iterator[str]:
    """Every claim about a run that is not true, a sentence each."""
    place, succeeds = claims.place, truth.exit_code == 0
    if truth.hung:
        yield "its process did not end by itself"
    if claims.state not in FINAL and not (claims.state in NOT_BEGUN and truth.called and truth.hit & ENDS_A_PROCESS):
        yield f"it has ended and its state is {claims.state}"
    yield from _dataset(truth, place)
    yield from _state(truth, claims)
    if claims.document is not None:
        if place.manifest is None:
            yield "its Dataset document names a place without manifest"
        elif claims.document["manifest_digest"] != place.manifest_digest:
            yield "its Dataset document has another manifest's digest"
    if place.log is not None:
        whole = claims.state == "COMPLETED" or _verdict(place) == "exit_nonzero" or place.manifest is not None
        may_lack = bool(((place.record or {}).get("exit") or {}).get("log_lost"))
        if may_lack and not truth.against & {"kill the engine", "terminate the engine"}:
            yield "its record says that its engine may have lost some of its log, and nobody ended that"
        yield from _log(truth.output, place.log, whole=whole and not may_lack, may_lack=may_lack)
    verdict = _verdict(place)
    told = claims.told or {}
    for said in {verdict, told.get("code"), claims.code}:
        if said == "exit_nonzero" and succeeds:
            yield "its algorithm is blamed for what was done to it"
        if said in UNDESERVED:
            yield f"its description or the engine is blamed ({said}): {told.get('message', claims.message)}"
    if verdict == "ok" and not succeeds:
        yield "its record says that a failing algorithm succeeded"
    if verdict == "killed" and not truth.against & {"kill the container", "kill the engine", "terminate the engine"}:
        yield "its record says that somebody killed its container, and nobody did"
    if ("url" in told) != (claims.state == "COMPLETED") and told:
        yield f"its caller was told {dict(told)} and its state is {claims.state}"


def _state(truth: Truth, claims: Claims) -> Iterator[str]:
    place = claims.place
    if claims.state == "COMPLETED":
        if truth.exit_code:
            yield "it is Completed and its algorithm fails"
        if place.manifest is None:
            yield "it is Completed and there is no manifest"
        if claims.document is None:
            yield "it is Completed and there is no Dataset document"
    # An attempt whose process is killed behind the commit leaves a dataset, and the next one may fail before it publishes.
    elif place.manifest is not None and not (truth.hit & ENDS_A_PROCESS and (claims.state != "FAILED" or claims.attempts > 1)):
        yield f"it is {claims.state} ({claims.message}) and left a dataset"
    # A call to which Prefect's client raised what the server's connection did, before any of our code; an automation ends its run.
    refused = (
        bool(claims.told) and any(fault.endswith("the server") for fault in truth.against) and "never began" in claims.message
    )
    # The same where the call's run is Running already and its engine gets no answer, six times within Prefect's minute.
    away = "kill the server" in truth.hit and (claims.told or {}).get("raised") in TRANSPORT
    refused |= away and claims.message.startswith("No sign of life") and place.log is None and place.record is None
    # So do a worker, and the process that it starts: only who was connected once asks again where no connection can be made.
    refused |= (
        not truth.called
        and not claims.attempts
        and any(fault.endswith("the server") for fault in truth.hit)
        and (
            claims.message.startswith(("Process exited with status code: 1.", "Failed to submit flow run to infrastructure:"))
            # A worker whose server is away for Prefect's minute leaves what it took as it is.
            or ("kill the server" in truth.hit and "never began" in claims.message)
        )
    )
    if claims.state == "CRASHED" and not truth.hit & ENDS_A_PROCESS and not refused:
        yield f"it is Crashed and nobody ended its process: {claims.message}"
    # Where the answer to the word Failed was lost, Prefect asks what the state is, and raises an exception of its own with it.
    lost = {"raised": "FailedRun", "code": None, "message": claims.message}
    if claims.state == "FAILED" and not claims.code and not any(fault.endswith("the server") for fault in truth.against):
        yield f"its failure has no code: {claims.message}"
    if claims.state == "FAILED" and claims.told and not claims.told.get("code") and claims.told != lost:
        yield f"its failure is not explained: {dict(claims.told)}"
    wanted = "FAILED" if truth.exit_code else "COMPLETED"
    if not truth.against and claims.state != wanted:
        yield f"nothing was done to it and it is {claims.state}, not {wanted}: {claims.message}"


def _dataset(truth: Truth, place: Place) -> Iterator[str]:
    if place.manifest is None:
        return
    right = {name: hashlib.sha256(data).hexdigest() for name, data in truth.output.files.items()}
    if truth.exit_code:
        yield "its algorithm fails and it left a dataset"
    for what, found in (("manifest", place.manifest), ("data", place.data)):
        if found != right:
            wrong = sorted(name for name in found.keys() | right.keys() if found.get(name) != right.get(name))
            yield f"its {what} is not what the container wrote: {wrong[:5]}"
    if place.record is None or place.log is None:
        yield "its dataset lacks record or log"


def _verdict(place: Place) -> str | None:
    """The code of the record's verdict, if there is one."""
    found = (place.record or {}).get("verdict") or {}
    return found.get("code")


def _log(output: Output, log: bytes, *, whole: bool, may_lack: bool = False) -> Iterator[str]:
    """Both streams are in it line by line; each has to be the beginning of what the container wrote, or parts of it in order where it `may_lack` some."""
    at = {"out": 0, "err": 0}
    for line in log.splitlines(keepends=True):
        for stream, text in (("out", output.out), ("err", output.err)):
            found = text.find(line, at[stream])
            if found == at[stream] or (may_lack and found >= 0):
                at[stream] = found + len(line)
                break
        else:
            yield f"its log has {line[:80]!r} where {output.out[at['out'] :][:80]!r} or {output.err[at['err'] :][:80]!r} comes"
            return
    missing = len(output.out) - at["out"] + len(output.err) - at["err"]
    if whole and missing:
        yield f"its log lacks the last {missing} bytes"


@dataclass(frozen=True, kw_only=True)
class Leftovers:
    """What is there when all runs have ended and `reap` has been: names by sort of thing."""

    found: Mapping[str, tuple[str, ...]]


def examine_leftovers(left: Leftovers) -> Iterator[str]:
    """Everything that nobody owns, a sentence each."""
    for sort, names in left.found.items():
        if names:
            yield f"{len(names)} {sort} left behind: {', '.join(names[:5])}"
