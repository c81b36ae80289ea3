"""The steps of a visit, each a Prefect task that finishes once; see `tasks` for what that means."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from prefect.logging import get_run_logger
from prefect.logging.loggers import PrefectLogAdapter

from . import difference as differences, lineage, log, protocol
from .answer import Question
from .asking import (
    MARKER_CHECKED,
    MARKER_DESCRIBED,
    MARKER_RUN,
    Stdout,
    Train,
    answer_of,
    check_inside,
    describe,
    run_argv,
    summarise,
)
from .difference import Difference
from .documents import task
from .engines import Files, ImageEngine
from .errors import ImageNotFound, OasisError, ProtocolError, TrainFailed, TrainRefused
from .fetched import drop, fetch, fetched
from .job import ContainerExit, ContainerJob, ImageSource, Reason, Stream
from .lineage import Content, Envelope
from .machine import image_engine
from .protocol import Description, Generation, RunResponse
from .requirement import Result, evaluate, unmet
from .settings import Settings
from .tasks import TRANSFER, step
from .verdict import Case, failure, judge
from .visit import (
    Visit,
    allowed,
    judge_run,
    login_for,
    probe,
    refused_by_policy,
    run_job,
)
from .workspace import Workspace

MARKER_ARRIVED = "prepare_train"
LAYER, DIFFERENCE, BASE_LABELS = "layer.tar", "difference.jsonl", lineage.PREFIX


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A run that succeeded: how the container ended, what the train said, and what would travel."""

    exit: ContainerExit
    argv: tuple[str, ...]
    answer: RunResponse
    difference: Difference


@dataclass(frozen=True, slots=True)
class Draft:
    """A successor without its record, the base that it is built on, by digest, and that base's name where the visit fetched it."""

    name: str
    base: str
    fetched: str | None


@task(**TRANSFER)
@step(MARKER_ARRIVED)
def prepare_train(visit: Visit, workspace: Workspace, settings: Settings) -> Train:
    """Fetch the train, and see that the station's policy lets it in. A retry goes on with the same bytes, wherever a tag went since.

    Raises:
        TrainRefused: it does not; where the image's name tells so, nothing was fetched.
        ChainBroken: the record that the policy demands does not hold.
    """
    done = workspace.done(MARKER_ARRIVED)
    arrived = prepare(visit, workspace, settings, name=done["image"] if done else visit.image)
    workspace.mark_done(MARKER_ARRIVED, {"image": arrived.image})
    get_run_logger().info("The train is %s, after %d visits.", arrived.image, len(arrived.chain))
    return arrived


def prepare(visit: Visit, workspace: Workspace, settings: Settings, *, name: str) -> Train:
    """As the task, outside a run, by one of the image's names."""
    engine = image_engine(settings)
    if allowed(visit, visit.image) is False:
        raise _not_allowed(visit, visit.image)
    image = fetch(engine, ImageSource(image_id=name, login=login_for(visit, name)), workspace)
    mine = fetched(workspace)
    try:
        content, chain = _let_in(visit, image, engine)
    except BaseException:
        for each in mine:
            drop(engine, each, workspace)
        raise
    return Train(image=image, content=content, chain=chain, fetched=mine)


def _let_in(visit: Visit, image: str, engine: ImageEngine) -> tuple[Content, tuple[Envelope, ...]]:
    content = engine.content(image)
    if content is None:
        raise ImageNotFound(f"The image {image} is no longer in the engine. Somebody removed it meanwhile; run it again.")
    if not allowed(visit, visit.image, [image.rpartition("@")[2]]):
        raise _not_allowed(visit, visit.image)
    chain = lineage.read(content.chain)
    if visit.station.policy.require_signature and not chain:
        raise TrainRefused(
            f"The train {visit.train} comes without any record, and the policy of station {visit.station_name} demands one. "
            "Let it visit a trusted station first."
        )
    return content, chain


def _not_allowed(visit: Visit, image: str) -> TrainRefused:
    patterns = ", ".join(visit.station.policy.allowed_images)
    return TrainRefused(
        f"The policy of station {visit.station_name} does not allow the image {image}. Nothing of it was run. Correct "
        f"`policy.allowed_images` of the Station document, which lists: {patterns}."
    )


@task(**TRANSFER)
@step(MARKER_DESCRIBED)
def describe_train(visit: Visit, train: Train, workspace: Workspace, settings: Settings) -> Description:
    """Ask the train what it requires, in the generation of the Train API that it speaks.

    Raises:
        ProtocolError: it speaks none.
    """
    found = describe(visit, train, workspace, settings)
    for warning in found.demand.warnings:
        get_run_logger().warning("%s", warning)
    words = ", ".join(requirement.name for requirement in found.demand.requirements) or "nothing"
    get_run_logger().info("The train speaks the Train API %s, and requires: %s.", found.generation, words)
    return found


@task(**TRANSFER)
@step("check_station")
def check_station(visit: Visit, description: Description) -> tuple[Result, ...]:
    """See on the station's side whether it has what the train requires.

    Raises:
        TrainRefused: it has not. The train was given nothing.
    """
    results, missing = check(visit, description)
    if missing:
        raise _refused(visit, missing, "")
    return results


def check(visit: Visit, description: Description) -> tuple[tuple[Result, ...], tuple[str, ...]]:
    """Each requirement's result, and what is missing in words."""
    demand, look = description.demand, probe(visit)
    results = tuple(evaluate(requirement, visit.environment, look) for requirement in demand.requirements)
    return results, unmet(demand, results)


@task(**TRANSFER)
@step(MARKER_CHECKED)
def check_train(
    visit: Visit, train: Train, description: Description, workspace: Workspace, settings: Settings
) -> tuple[Result, ...]:
    """Let the train itself check, with what the station gives.

    Raises:
        TrainRefused: it says that something is missing.
    """
    results, missing = check_inside(visit, train, description, workspace, settings)
    if missing:
        raise _refused(visit, missing, "by its own check, ")
    return results


def _refused(visit: Visit, missing: Sequence[str], who: str) -> TrainRefused:
    return TrainRefused(
        f"Station {visit.station_name} does not have what the train {visit.train} requires: {who}{', and '.join(missing)}. It "
        f"did not run. Set these in `environment`, `secret_environment` or `mounts` of the Station document {visit.station_name}."
    )


@task(**{**TRANSFER, "retries": 2})
@step(MARKER_RUN)
def run_train(visit: Visit, train: Train, generation: Generation, workspace: Workspace, settings: Settings) -> Ended:
    """Run the train to its end, or re-attach to the one that an earlier attempt left; judge it, and keep what would travel.

    Raises:
        TrainFailed, AlgorithmFailed, ProtocolError: it did not succeed. Nothing of it is kept but its log.
        TrainRefused: the policy does not let what it wants to take with it leave.
    """
    argv, done = run_argv(visit, generation), workspace.done(MARKER_RUN)
    if done is None:
        started, engine = time.monotonic(), image_engine(settings)
        job = run_job(visit, workspace, train.image, argv, settings)
        if not engine.find(job):
            workspace.fresh_notes()
        stdout = Stdout()
        found: list[dict[str, Any]] = []

        def at_end(exit: ContainerExit, files: Files) -> None:
            answer = answer_of(stdout, workspace, Question.RUN, exit)
            response = protocol.read_run(answer)
            if judge_run(visit.train, exit, response, None) is None and exit.reason is Reason.OK:
                found.append(answer)
                hidden = (*visit.mounted, *cast(Mapping[str, str], exit.in_force.get("tmpfs") or {}))
                _keep(visit, response, engine, job, files, workspace, hidden)

        exit = _supervised(visit, engine, job, stdout, workspace, at_end)
        if not found:
            raise _verdict(visit, exit, stdout, workspace)
        seconds = time.monotonic() - started
        workspace.mark_done(MARKER_RUN, {"exit": exit.to_json(), "answer": found[0], "seconds": seconds})
        done = workspace.done(MARKER_RUN) or {}
    kept = Difference.from_lines((workspace.path / DIFFERENCE).read_bytes())
    return Ended(
        exit=ContainerExit.from_json(done["exit"]), argv=argv, answer=protocol.read_run(done["answer"]), difference=kept
    )


def _supervised(
    visit: Visit, engine: ImageEngine, job: ContainerJob, stdout: Stdout, workspace: Workspace, at_end: Any
) -> ContainerExit:
    """Run the container with its log kept. An answer that cannot be read is told by `_verdict`, with the exit in hand."""
    show = cast(PrefectLogAdapter, get_run_logger()).getChild(log.VIEW_LOGGER).info
    secrets = tuple(visit.secrets.values())

    def look(exit: ContainerExit, files: Files) -> None:
        with suppress(ProtocolError):
            at_end(exit, files)

    try:
        with log.record(workspace.log, show, secrets) as sink:

            def tee(stream: Stream, data: bytes) -> None:
                stdout(stream, data)
                sink(stream, data)

            exit = engine.run_to(job, tee, look)
    except OasisError as error:
        error.args = tuple(log.redact(str(part), secrets) for part in error.args)
        raise
    if exit.log_lost:
        get_run_logger().warning("A part of the log may be missing: %s.", exit.log_lost)
    return replace(exit, detail=log.redact(exit.detail, secrets), last_words=sink.last_words())


def _verdict(visit: Visit, exit: ContainerExit, stdout: Stdout, workspace: Workspace) -> OasisError:
    """What a run that did not succeed ends with."""
    answer: RunResponse | ProtocolError
    try:
        answer = protocol.read_run(answer_of(stdout, workspace, Question.RUN, exit))
    except ProtocolError as error:
        answer = error
    case = Case(
        algorithm=visit.train,
        exit=exit,
        last_lines=log.last_lines(workspace.log, 30),
        network=not visit.station.policy.forbid_network,
        writable_root=True,
        disk_free_bytes=workspace.disk_free_bytes(),
    )
    failed = None if exit.reason is Reason.OK else failure(judge(case), exit, str(workspace.log))
    verdict = judge_run(visit.train, exit, answer, failed)
    assert verdict is not None  # noqa: S101 - a success was kept
    verdict.args = (log.redact(str(verdict), visit.secrets.values()), *verdict.args[1:])
    return verdict


def _keep(
    visit: Visit,
    answer: RunResponse,
    engine: ImageEngine,
    job: ContainerJob,
    files: Files,
    workspace: Workspace,
    hidden: Sequence[str],
) -> None:
    """Write down what would travel: the difference, without the places that were `hidden` by mounts; and the layer that makes it."""
    with engine.files(job) as stream:
        before = differences.listing(stream)
    with files() as stream:
        after = differences.listing(stream)
    if answer.rebase is not None:
        found = differences.exported(before, after, answer.rebase.files)
    else:
        found = differences.compare(before, after, hidden)
    if refusal := refused_by_policy(visit, answer, found.size):
        raise TrainRefused(
            f"The train {visit.train} {refusal}. Nothing of it leaves. Change the policy, or ask for another train."
        )
    if said := [
        name for name, value in visit.secrets.items() if differences.searchable(value) and value in " ".join(answer.tags)
    ]:
        raise TrainFailed(
            f"The train named its successor after the station's secret {said[0]}. Nothing travels. Correct the train."
        )
    with files() as stream, (workspace.path / LAYER).open("wb") as layer:
        differences.write_layer(stream, layer, found, visit.secrets)
    (workspace.path / DIFFERENCE).write_bytes(found.lines())


@task(**TRANSFER)
@step("draft_successor")
def draft_successor(visit: Visit, train: Train, ended: Ended, workspace: Workspace, settings: Settings) -> Draft:
    """Make the successor without its record."""
    engine, rebase = image_engine(settings), ended.answer.rebase
    base, mine = train.image, None
    if rebase is not None:
        # A base is all of an image that would travel: one of the engine's others is not for every train to take along.
        base = fetch(engine, ImageSource(image_id=rebase.base, login=login_for(visit, rebase.base)), workspace)
        mine = rebase.base if rebase.base in fetched(workspace) else None
        if not allowed(visit, rebase.base, [base.rpartition("@")[2]]):
            if mine:
                drop(engine, mine, workspace)
            raise _not_allowed(visit, rebase.base)

    def change(config: Mapping[str, Any]) -> Mapping[str, Any]:
        return lineage.labelled(config, _labels(visit, train, workspace))

    return Draft(engine.extend(base, workspace.path / LAYER, change, workspace.lease), base, mine)


@task(**TRANSFER)
@step("summarise_model")
def summarise_model(visit: Visit, generation: Generation, draft: str, workspace: Workspace, settings: Settings) -> str | None:
    """Ask the successor for the summary of its model; `None` where it has none to give."""
    try:
        return summarise(visit, generation, draft, workspace, settings)
    except ProtocolError as error:
        get_run_logger().warning("The successor gives no summary of its model. %s", error)
        return None


@task(**TRANSFER)
@step("seal_successor")
def seal_successor(
    visit: Visit, train: Train, base: str, chain: Sequence[Envelope], workspace: Workspace, settings: Settings
) -> str:
    """Make the successor with its record, which replaces the draft; return it."""
    labels = _labels(visit, train, workspace) | {lineage.LABEL_CHAIN: lineage.written(chain)}
    return image_engine(settings).extend(
        base, workspace.path / LAYER, lambda config: lineage.labelled(config, labels), workspace.lease
    )


@task(**TRANSFER)
@step("push_successor")
def push_successor(visit: Visit, draft: str, names: Sequence[str], settings: Settings) -> str:
    """Push the successor under all its names, or name it in the engine where the station has no registry; return it."""
    engine = image_engine(settings)
    if visit.station.registry is None:
        for name in names:
            engine.name(draft, name)
        get_run_logger().info("The train stays in this engine as %s.", ", ".join(names))
        return names[0]
    pushed = [engine.push(draft, name, visit.login) for name in names]
    get_run_logger().info("The train travels on as %s, which is %s.", ", ".join(names), pushed[0])
    return pushed[0]


def _labels(visit: Visit, train: Train, workspace: Workspace) -> dict[str, str]:
    done = workspace.done(MARKER_RUN) or {}
    return {
        f"{BASE_LABELS}predecessor": train.image,
        f"{BASE_LABELS}station": str(visit.station.station_id),
        f"{BASE_LABELS}station-name": visit.station_name,
        f"{BASE_LABELS}time": str(done["exit"]["finished_at"]),
    }


def results_json(results: Sequence[Result], *, reasons: bool) -> list[dict[str, Any]]:
    """Results as JSON. Reasons are the train's words, and stay at the station."""
    return [asdict(result) if reasons else {"name": result.name, "met": result.met} for result in results]
