"""The verdict on a run: what happened, whose turn it is, and what to do; one pure function from what was seen.

What an engine, the kernel and the container's last words say is weighed here and nowhere else. The same record is in
`task.json`, on the run's page, in its event, in the exception and on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from .errors import (
    AlgorithmFailed,
    DatasetError,
    DescriptionError,
    DuplicateName,
    FilesFailed,
    ImageDenied,
    NoCapacity,
    OasisError,
    RunInUse,
    StoreDenied,
    StoreFull,
    StoreUnavailable,
    UnsafeName,
    first_sentence,
)
from .job import ContainerExit, Reason, human_bytes
from .symptoms import Blame, Symptom, recognise

PUBLISH = "publish_output"
SILENT = "It wrote nothing to its log."


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a run.

    `code` is stable, `sentence` stands alone, `advice` says what to do. `transient`: the same run may succeed later.
    `evidence` quotes what was seen, never nothing for a failure. `limit_bytes` and `peak_bytes` are of memory. `action`
    says what was already done about it; empty when nothing.
    """

    code: str
    stage: str
    blame: Blame | None
    transient: bool
    sentence: str
    advice: str
    evidence: tuple[str, ...] = ()
    limit_bytes: int | None = None
    peak_bytes: int | None = None
    action: str = ""

    def to_json(self) -> dict[str, object]:
        """The verdict as JSON values."""
        return {**asdict(self), "evidence": list(self.evidence)}


@dataclass(frozen=True, slots=True)
class FailedPrerequisite:
    """A callback that failed: the command at which it ended, and its exit code; `None` where it was killed."""

    name: str
    event: str
    command: str
    exit_code: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is known of how a container ended. `last_lines` are of its whole log; `disk_free_bytes` is of its output's disk.

    `action` says what was done before this end, such as a first try with less memory. `prerequisite` is the one that failed.
    """

    algorithm: str
    exit: ContainerExit
    last_lines: Sequence[str] = ()
    network: bool = False
    gpu: bool = False
    writable_root: bool = False
    disk_free_bytes: int | None = None
    action: str = ""
    prerequisite: FailedPrerequisite | None = None


def judge(seen: Case | OasisError) -> Verdict:
    """The verdict on how a container ended, or on the error that kept a run from getting that far."""
    if isinstance(seen, AlgorithmFailed):
        return seen.verdict
    return _of_error(seen) if isinstance(seen, OasisError) else _of_exit(seen)


def failure(verdict: Verdict, exit: ContainerExit, log: str) -> AlgorithmFailed:
    """The exception that a verdict on a container stands for; `log` says where the whole log is."""
    said = f" {SILENT}" if verdict.evidence == (SILENT,) else f" Its last lines: {' | '.join(verdict.evidence)}"
    done = f" {verdict.action}" if verdict.action else ""
    return AlgorithmFailed(f"{verdict.sentence} {verdict.advice}{done}{said} The whole log: {log}", exit, verdict, log)


_BLAME: dict[type[OasisError], Blame] = {
    DescriptionError: Blame.DESCRIPTION,
    ImageDenied: Blame.DESCRIPTION,
    NoCapacity: Blame.DESCRIPTION,
    DuplicateName: Blame.ALGORITHM,
    FilesFailed: Blame.DATA,
    StoreDenied: Blame.PLATFORM,
    StoreFull: Blame.PLATFORM,
    StoreUnavailable: Blame.PLATFORM,
    DatasetError: Blame.DATA,
    RunInUse: Blame.USER,
}
_QUOTE = re.compile(r"(?:[Tt]he [a-z ]+|[Ii]t) said: (?P<said>.+)$|The cause: (?P<cause>.+)$", re.DOTALL)


def _of_error(error: OasisError) -> Verdict:
    blame = next((_BLAME[kind] for kind in type(error).__mro__ if kind in _BLAME), Blame.PLATFORM)
    if isinstance(error, UnsafeName) and error.stage == PUBLISH:
        blame = Blame.ALGORITHM
    text, sentence = " ".join(str(error).split()), first_sentence(error)
    quote = _QUOTE.search(text)
    return Verdict(
        code=error.code,
        stage=error.stage,
        blame=blame,
        transient=error.transient,
        sentence=sentence,
        advice=text[len(sentence) : quote.start() if quote else None].strip(),
        evidence=((quote["said"] or quote["cause"]) if quote else sentence,),
        action=f"It was tried {error.tries} times." if error.tries > 1 else "",
    )


def _of_exit(case: Case) -> Verdict:
    exit = case.exit
    found = None
    if exit.reason in (Reason.EXIT_NONZERO, Reason.PREREQUISITE_FAILED):
        found = recognise(
            exit.last_words or case.last_lines,
            network=case.network,
            gpu=case.gpu,
            writable_root=case.writable_root,
            forks_refused=exit.forks_refused,
            disk_free_bytes=case.disk_free_bytes,
        )
    symptom = found[0] if found else None
    blame: Blame | None
    if exit.reason is Reason.PREREQUISITE_FAILED and case.prerequisite:
        code, blame, what, advice = _prerequisite_failed(case.prerequisite, symptom)
    else:
        code, blame, what, advice = _meaning(exit, symptom)
    return Verdict(
        code=code,
        stage="run_container",
        blame=blame,
        transient=False,
        sentence=f"The algorithm {case.algorithm} {what}.",
        advice=advice,
        evidence=() if exit.reason is Reason.OK else _evidence(case, found[1] if found else ""),
        limit_bytes=exit.memory_limit_bytes,
        peak_bytes=exit.memory_peak_bytes,
        action=case.action,
    )


def _evidence(case: Case, line: str) -> tuple[str, ...]:
    words = case.exit.last_words or case.last_lines
    found = (line, *words[-5:], case.exit.detail)
    return tuple(dict.fromkeys(text for text in found if text)) or (SILENT,)


# exit code - 128: https://man7.org/linux/man-pages/man7/signal.7.html
_SIGNALS = {
    4: ("illegal_instruction", "ran into an instruction that this processor does not have", "Build the image for older processors."),
    6: ("aborted", "aborted itself", "Its last words say why."),
    7: ("bus_error", "ended with a bus error", "Often /dev/shm is too small: set `shm_size`. Or a file shrank while it was mapped."),
    8: ("arithmetic_error", "ended with an arithmetic error", "It divided by zero, or the like: see its log."),
    11: ("segfault", "crashed with a segmentation fault", "This is an error in its program, or two libraries that do not fit."),
}  # fmt: skip


def _meaning(exit: ContainerExit, symptom: Symptom | None) -> tuple[str, Blame | None, str, str]:
    """Code, blame, what happened (the end of a sentence that begins with the algorithm's name), and what to do."""
    seconds = f"after {exit.seconds:.1f} s"
    code = exit.reason.value
    match exit.reason:
        case Reason.OK:
            return code, None, f"succeeded {seconds}", ""
        case Reason.EXIT_NONZERO:
            return _nonzero(exit, symptom, seconds)
        case Reason.OUT_OF_MEMORY:
            limit, peak = human_bytes(exit.memory_limit_bytes), human_bytes(exit.memory_peak_bytes)
            what = f"was killed for memory {seconds} (limit {limit}, peak {peak}, exit code {exit.exit_code})"
            advice = "Raise `memory` in the Algorithm document (`memory_max` lets a run try again with more), or give it smaller files."
            return code, Blame.DESCRIPTION, what, advice
        case Reason.TIMED_OUT:
            what = f"was stopped at its time limit of {exit.timeout_seconds:g} s"
            return code, Blame.DESCRIPTION, what, "Raise `timeout_seconds` in the Algorithm document, or give it fewer files."
        case Reason.KILLED:
            what = f"was killed by SIGKILL {seconds} (exit code {exit.exit_code})"
            advice = "Neither its memory limit nor its time limit did it, but itself or somebody on the machine; run it again."
            if exit.memory_peak_bytes is None:
                # A Kubernetes node that is busy may learn of the exit before it learns that the kernel did it for memory.
                advice = (
                    "It did so itself, or somebody on the machine, or its memory limit did and nobody saw it; run it again, and "
                    "raise `memory` in the Algorithm document if that happens again."
                )
            return code, Blame.PLATFORM, what, advice
        case Reason.COMMAND_NOT_FOUND:
            advice = "Correct `command` or `entrypoint` in the Algorithm document; a path must exist inside the image."
            return code, Blame.DESCRIPTION, "could not start, because its command is not in the image", advice
        case Reason.NOT_EXECUTABLE:
            advice = "Make the file executable in the image (chmod +x), or call it through its interpreter."
            return code, Blame.DESCRIPTION, "could not start, because its command is not executable", advice
        case Reason.EXEC_FORMAT:
            advice = "Build the image for this machine's architecture; a script needs a first line such as #!/bin/sh."
            return code, Blame.DESCRIPTION, "could not start, because its program is not made for this machine", advice
        case Reason.OUTPUT_TOO_LARGE:
            what = f"wrote more than {_limit(exit, human_bytes)} of output {seconds}"
            advice = "Raise `max_output_size` in the Algorithm document, or let it write less; files with holes count whole."
            return code, Blame.POLICY, what, f"{advice} {_NOT_KEPT}"
        case Reason.TOO_MANY_FILES:
            what = f"wrote more than {_limit(exit, str)} files and folders {seconds}"
            advice = "Raise `max_output_files` in the Algorithm document, or let it write fewer, such as one archive."
            return code, Blame.POLICY, what, f"{advice} {_NOT_KEPT}"
        case Reason.LOG_TOO_LARGE:
            what = f"wrote more than {_limit(exit, human_bytes)} to its log {seconds}"
            advice = "Raise `max_log_size` in the Algorithm document, or let it say less. Its log ends at the limit."
            return code, Blame.POLICY, what, advice
        case Reason.PREREQUISITE_FAILED:
            return code, Blame.DESCRIPTION, f"was failed by a prerequisite {seconds}", _MEND
        case Reason.EVICTED:
            what = f"was evicted by the cluster {seconds}, because it wrote more beside its output than its pod may"
            advice = "Let it write to its output only, or raise OASIS_FLOWS_KUBERNETES_EPHEMERAL_STORAGE or `tmp_size`."
            return code, Blame.POLICY, what, advice
        case Reason.DISK_FULL:
            what = f"was stopped {seconds}, because less than {_limit(exit, human_bytes)} was free on the disk of its output"
            advice = f"Free space there, or set OASIS_FLOWS_HOME to a folder with room. {_NOT_KEPT}"
            return code, Blame.PLATFORM, what, advice


_MEND = "Its words are in the log. Correct the prerequisite, or set its failurePolicy to ignore."


def _prerequisite_failed(failed: FailedPrerequisite, symptom: Symptom | None) -> tuple[str, Blame, str, str]:
    ended = "was killed" if failed.exit_code is None else f"ended with exit code {failed.exit_code}"
    before = "did not start, because" if failed.event == "taskStarts" else "succeeded, but"
    what = f"{before} its prerequisite {failed.name} failed: `{_clipped(' '.join(failed.command.split()))}` ({failed.event}) {ended}"
    if symptom is None:
        return Reason.PREREQUISITE_FAILED.value, Blame.DESCRIPTION, what, _MEND
    return Reason.PREREQUISITE_FAILED.value, symptom.blame, f"{what}, because {symptom.what}", f"{symptom.advice} {_MEND}"


_NOT_KEPT = "Its files were not kept."


def _limit(exit: ContainerExit, words: Callable[[int], str]) -> str:
    return "its limit" if exit.limit_passed is None else words(exit.limit_passed)


def _nonzero(exit: ContainerExit, symptom: Symptom | None, seconds: str) -> tuple[str, Blame, str, str]:
    ended = f"ended with exit code {exit.exit_code} {seconds}"
    if symptom:
        return symptom.code, symptom.blame, f"{ended}, because {symptom.what}", symptom.advice
    if known := _SIGNALS.get((exit.exit_code or 0) - 128):
        code, what, advice = known
        return code, Blame.ALGORITHM, f"{what} {seconds} (exit code {exit.exit_code})", advice
    said = f": {_clipped(exit.last_words[-1])}" if exit.last_words else ""
    return exit.reason.value, Blame.ALGORITHM, f"{ended}{said}", "The reason is in its own log."


def _clipped(line: str) -> str:
    text = line.strip().rstrip(".")
    return text if len(text) <= 200 else f"{text[:200]} …"
