"""What is asked of a train before it runs and after, and how it answers: plain functions, which need no run."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from . import answer as answers, log, protocol
from .answer import MAX_RESPONSE_BYTES, RESPONSE_FILE, Question
from .errors import ContainerLost, OasisError, ProtocolError
from .job import ContainerExit, Reason, Stream
from .lineage import Content, Envelope
from .machine import image_engine
from .protocol import Description, Generation
from .requirement import Result, unmet
from .settings import Settings
from .visit import ANSWER, Visit, question_job, run_job
from .workspace import Workspace

MARKER_DESCRIBED, MARKER_CHECKED, MARKER_RUN = "describe_train", "check_train", "run_train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """A train that has arrived: exactly these bytes, what they are, and the record that came with them.

    `fetched` are names of images that the engine did not have before the visit, so that they go again with it.
    """

    image: str
    content: Content
    chain: tuple[Envelope, ...]
    fetched: tuple[str, ...]


def describe(visit: Visit, train: Train, workspace: Workspace, settings: Settings) -> Description:
    """What the train says of itself; what it said is kept in the workspace.

    Raises:
        ProtocolError: it speaks no Train API.
    """
    done = workspace.done(MARKER_DESCRIBED)
    if done is None:
        generation, answer = _described(visit, train, workspace, settings)
        done = {"api": generation, "answer": answer}
        workspace.mark_done(MARKER_DESCRIBED, done)
    return protocol.read_description(Generation(done["api"]), done["answer"])


def _described(visit: Visit, train: Train, workspace: Workspace, settings: Settings) -> tuple[Generation, Mapping[str, Any]]:
    """The answer of the train that describes it, and the generation that it is of."""
    known = settings.trains / "generations" / train.content.digest.partition(":")[2]
    generation = visit.generation
    if generation is None:
        with suppress(OSError, ValueError):
            generation = Generation(known.read_text())
    if generation is not None:
        argv = protocol.argv(generation, Question.LIST, station_id=visit.station.station_id)
        return generation, _asked(visit, train.image, argv, Question.LIST, workspace, settings)
    failures = []
    for asks, word in (
        (Generation.ONE, "describe"),
        (Generation.V1, "list_requirements"),
        (Generation.ZERO, "list_requirements"),
    ):
        argv = protocol.argv(asks, Question.LIST, station_id=visit.station.station_id)
        try:
            answer = _asked(visit, train.image, argv, Question.LIST, workspace, settings)
        except ProtocolError as error:
            failures.append(f"To {' '.join(argv)}: {error}")
            continue
        found = protocol.generation_of(answer, word)
        if found is not None:
            # One that answers only where it is asked as in 0.x wants all of its questions so, whatever its answers look like.
            generation = asks if asks is Generation.ZERO else found
            protocol.read_description(generation, answer)
            with suppress(OSError):
                known.parent.mkdir(parents=True, exist_ok=True)
                known.write_text(generation)
            return generation, answer
        failures.append(f"To {' '.join(argv)} it gave an answer without requirements.")
    raise ProtocolError(
        f"The image {visit.image} speaks no Train API that is known. It was asked `describe` and `list_requirements`; correct the train, or "
        f"set its generation. {' '.join(failures)}"
    )


def check_inside(
    visit: Visit, train: Train, description: Description, workspace: Workspace, settings: Settings
) -> tuple[tuple[Result, ...], tuple[str, ...]]:
    """What the train finds of its requirements, with all that the station gives: each one's result, and what is missing in words."""
    generation, done = description.generation, workspace.done(MARKER_CHECKED)
    # One question more would end the train that an earlier attempt has let run.
    if done is None or not _has_begun(visit, train, generation, workspace, settings):
        argv = protocol.argv(generation, Question.CHECK, station_id=visit.station.station_id)
        done = {"answer": _asked(visit, train.image, argv, Question.CHECK, workspace, settings, at_station=True)}
        workspace.mark_done(MARKER_CHECKED, done)
    said = protocol.read_check(generation, done["answer"], description.demand)
    said = tuple(replace(result, reason=log.redact(result.reason, visit.secrets.values())) for result in said)
    names = {result.name for result in said}
    demanded = {requirement.name for requirement in description.demand.requirements}
    # What it does not speak of it has nothing against.
    silent = tuple(Result(name, True) for name in demanded - names)
    beyond = tuple(result.reason or result.name for result in said if not result.met and result.name not in demanded)
    return said, (*unmet(description.demand, (*said, *silent)), *beyond)


def _has_begun(visit: Visit, train: Train, generation: Generation, workspace: Workspace, settings: Settings) -> bool:
    """Has the train run, or does it, with all that the station gives now?"""
    if workspace.done(MARKER_RUN) is not None:
        return True
    job = run_job(visit, workspace, train.image, run_argv(visit, generation), settings)
    return image_engine(settings).find(job)


def run_argv(visit: Visit, generation: Generation) -> tuple[str, ...]:
    """The command line that runs the train."""
    return protocol.argv(
        generation,
        Question.RUN,
        station_id=visit.station.station_id,
        track_info=visit.track_info,
        user_data=visit.user_data,
    )


def summarise(visit: Visit, generation: Generation, image: str, workspace: Workspace, settings: Settings) -> str:
    """The summary of the model in an image; raises `ProtocolError` where it gives none."""
    argv = protocol.argv(generation, Question.SUMMARY, station_id=visit.station.station_id)
    answer = _asked(visit, image, argv, Question.SUMMARY, workspace, settings)
    return log.redact(protocol.read_summary(generation, answer), visit.secrets.values())


class Stdout:
    """Keeps the end of stdout."""

    def __init__(self) -> None:
        self.end = bytearray()
        self.cut = False

    def __call__(self, stream: Stream, data: bytes) -> None:
        if stream == "stdout":
            self.end += data
            if len(self.end) > 3 * MAX_RESPONSE_BYTES:
                del self.end[: -2 * MAX_RESPONSE_BYTES]
                self.cut = True


def _asked(
    visit: Visit,
    image: str,
    argv: Sequence[str],
    question: Question,
    workspace: Workspace,
    settings: Settings,
    *,
    at_station: bool = False,
) -> dict[str, Any]:
    """The train's answer to a question.

    Raises:
        ProtocolError: it is none, or did not come in time.
        ContainerLost: the engine may have lost it.
    """
    engine, stdout = image_engine(settings), Stdout()
    workspace.fresh_notes()
    job = question_job(visit, workspace, image, argv, settings, at_station=at_station)
    secrets = tuple(visit.secrets.values())
    try:
        with log.record(workspace.path / "asked.txt", lambda _: None, secrets) as sink:

            def tee(stream: Stream, data: bytes) -> None:
                stdout(stream, data)
                sink(stream, data)

            exit = engine.run(job, tee)
        if exit.reason not in (Reason.OK, Reason.EXIT_NONZERO):
            raise ProtocolError(
                f"The train did not answer `{' '.join(argv)}`: {exit.reason.value}. Correct the train. {' | '.join(sink.last_words())}"
            )
        try:
            return answer_of(stdout, workspace, question, exit)
        except ProtocolError as error:
            if exit.reason is Reason.OK:
                raise
            # Why it did not answer stands on stderr.
            raise ProtocolError(
                f"{error}. It ended with exit code {exit.exit_code}: {' | '.join(sink.last_words(5))}"
            ) from None
    except OasisError as error:
        error.args = tuple(log.redact(str(part), secrets) for part in error.args)
        raise


def answer_of(stdout: Stdout, workspace: Workspace, question: Question, exit: ContainerExit) -> dict[str, Any]:
    """The response in the file, where the train wrote one, else that on stdout.

    Raises:
        ProtocolError: there is none.
        ContainerLost: the engine may have lost it, where there is none, or where asking again costs little.
    """
    content = _response_file(workspace)
    if content:
        return answers.response_in_file(content, question)
    lost = ContainerLost(f"What the train answered may be lost: {exit.log_lost}. Run it again.") if exit.log_lost else None
    if lost and question is not Question.RUN:
        raise lost
    try:
        return answers.response(bytes(stdout.end), question, cut=stdout.cut)
    except ProtocolError:
        if lost and exit.reason is Reason.OK:
            raise lost from None
        raise


def _response_file(workspace: Workspace) -> bytes:
    try:
        # The train may have made a link to a file of this machine, or a pipe.
        descriptor = os.open(workspace.notes / ANSWER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ProtocolError(
            f"The file that {RESPONSE_FILE} names cannot be read: {error.strerror}. Let the train write a plain file that "
            "everybody may read."
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ProtocolError(f"What {RESPONSE_FILE} names is no plain file. Let the train write one.")
        return file.read(MAX_RESPONSE_BYTES + 1)
