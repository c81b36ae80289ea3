"""The four steps of a run, each a Prefect task that finishes once, and before them a look at what earlier attempts finished.

A step that is done says so by its marker in the workspace, written last; called again, it returns what it found. Steps
are called directly by the flow, never submitted: only in the main thread does Prefect's cancellation reach the container
at once. What may be tried again is decided by the error (`transient`), never by its sort: a failed algorithm is a result
and no error here.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from prefect import runtime
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.logging.loggers import PrefectLogAdapter
from prefect.tasks import Task, exponential_backoff

from . import caches, callbacks, documents, interruption, log, progress, saving, store
from .artifacts import TransferBar, show_waiting
from .blocks import Dataset
from .callbacks import Notes
from .documents import task
from .engines import Engine
from .errors import DatasetError, DatasetNotFound, OasisError, ServerUnavailable, UnsafeName
from .job import ContainerExit, ContainerJob, Mount, Reason, counted, human_bytes, parse_bytes
from .machine import open_engine, telling
from .manifest import Summary
from .plan import Plan, container_job, preparing_job
from .prerequisites import Step
from .record import Recalled, recalled, task_json, written
from .settings import Settings
from .verdict import PUBLISH, Case, Verdict, judge
from .workspace import Workspace, room_for

MARKER_STAGED, MARKER_IMAGE, MARKER_RUN, MARKER_PUBLISHED = "stage_input", "prepare_image", "run_container", PUBLISH
# The end of a container that was killed for memory and is run again with more.
MARKER_FIRST_TRY = "first_try"


def _may_succeed_later(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    error = state.result(raise_on_failure=False)
    # The Prefect server has been waited for already.
    return isinstance(error, OasisError) and error.transient and not isinstance(error, ServerUnavailable)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Note on an error which step it ended, and how often that was tried."""
    interruption.check()
    try:
        yield
    except OasisError as error:
        error.stage, error.tries = name, runtime.task_run.run_count or 1
        raise


TRANSFER: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(2),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": _may_succeed_later,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}


@task(**TRANSFER)
@step(MARKER_STAGED)
def recall(plan: Plan, workspace: Workspace) -> None:
    """Note the steps of this run as finished if an earlier attempt has published, and died before Prefect knew.

    Then there is a dataset, and perhaps its document, and somebody may use it by now: nothing may be written over it, which might fail.
    """
    steps = (MARKER_STAGED, MARKER_IMAGE, MARKER_RUN, MARKER_PUBLISHED)
    noted = [step for step in steps if workspace.done(step)]
    if len(noted) == len(steps):
        return
    try:
        known = _recalled(plan, workspace)
    except DatasetError as error:
        if not error.transient or MARKER_STAGED not in noted:
            raise
        get_run_logger().warning(
            "Whether an earlier attempt of this run has published is asked again before it does. %s", error
        )
        return
    if known is None:
        if MARKER_PUBLISHED in noted:
            # Only half of what was recalled is noted, by an attempt that died; and what it was about is no more.
            workspace.forget_steps()
        return
    if known.first_try:
        workspace.mark_done(MARKER_FIRST_TRY, known.first_try.to_json())
    notes: dict[str, dict[str, Any]] = {
        MARKER_PUBLISHED: {"summary": asdict(known.published)},
        MARKER_IMAGE: {"image": known.image},
        MARKER_RUN: {"exit": known.exit.to_json(), "notes": known.notes.to_json(), "disk_free_bytes": None},
        MARKER_STAGED: {"folder": str(workspace.input), "summary": asdict(known.staged)},
    }
    for name, note in notes.items():
        workspace.mark_done(name, {**note, "seconds": known.seconds.get(name, 0.0)})
    get_run_logger().info("An earlier attempt of this run has published its output.")


def _recalled(plan: Plan, workspace: Workspace) -> Recalled | None:
    """What an earlier attempt of this run published, with its log and its manifest; `None` if none has, or not as it is described now."""
    try:
        found = store.published(plan.output)
    except DatasetNotFound:
        return None
    known = recalled(found.record, plan) if found else None
    if known is None:
        return None
    digest = hashlib.sha256()
    with room_for(workspace.published_manifest), workspace.published_manifest.open("wb") as file:
        for chunk in store.read_file(plan.output, store.MANIFEST):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != known.published.digest:
        # It is of another attempt than the record, and nobody can read the dataset.
        return None
    with room_for(workspace.log), workspace.log.open("wb") as file, suppress(DatasetNotFound):
        file.writelines(store.read_file(plan.output, store.LOG))
    return known


@task(**TRANSFER)
@step(MARKER_STAGED)
def stage_input(plan: Plan, workspace: Workspace, *, go_on: Callable[[], None] = lambda: None) -> tuple[Path, Summary]:
    """Bring the input, or a shard's part of it, to this machine; return the folder to mount and what it holds.

    Before a byte is moved, the store shows that the output can be written to it; a batch has seen to that for its shards.
    For these, `go_on` is called again and again meanwhile, and may raise.
    """
    if done := workspace.done(MARKER_STAGED):
        return Path(done["folder"]), Summary(**done["summary"])
    started = time.monotonic()
    if plan.part is None:
        store.check_writable(plan.root)
        folder, summary = store.stage(plan.source, workspace.path, progress=_progress("Staged", MARKER_STAGED))
    else:
        shard = plan.part.shard
        files = partial(store.read_slice, plan.part.listing, shard.start, shard.end)
        folder, summary = store.stage_files(plan.part.base, files, workspace.path, progress=lambda *_: go_on())
    _finish(workspace, MARKER_STAGED, started, folder=str(folder), summary=asdict(summary))
    if plan.part is None:
        count, size = counted(summary.file_count, "file"), human_bytes(summary.size_bytes)
        get_run_logger().info("The input %s has %s, %s.", plan.dataset_name, count, size)
    return folder, summary


@task(**TRANSFER)
@step(MARKER_IMAGE)
def prepare_image(plan: Plan, workspace: Workspace, settings: Settings) -> str:
    """Pull or load the image; return a reference to exactly these bytes."""
    known = workspace.done(MARKER_IMAGE)
    if known and workspace.done(MARKER_RUN):
        return str(known["image"])
    # Not skipped before: the engine may have lost the image since, and asking it costs milliseconds.
    started = time.monotonic()
    image = open_engine(settings).prepare(plan.image)
    _finish(workspace, MARKER_IMAGE, started, image=image)
    get_run_logger().info("The image is %s.", image)
    return image


@task(**{**TRANSFER, "retries": 2})
@step(MARKER_RUN)
def run_container(
    plan: Plan,
    workspace: Workspace,
    settings: Settings,
    *,
    image: str,
    input_folder: Path,
    go_on: Callable[[], None] = lambda: None,
) -> tuple[ContainerExit, Verdict]:
    """Run the container to its end, or re-attach to the one that an earlier attempt of this run left; judge how it ended.

    One that is killed for memory is run again, once, where its document has a `memory_max`. `go_on` may raise when it has
    ended, so that the end does not count: somebody else stopped it.
    """
    done = workspace.done(MARKER_RUN)
    if done is None:
        started, engine = time.monotonic(), open_engine(settings)
        job = container_job(plan, workspace, image=image, input_folder=input_folder, settings=settings)
        with ExitStack() as held:
            prepared = _with_caches(plan, workspace, settings, engine, job, held)
            if isinstance(prepared, ContainerJob):
                exit = _run_with_enough_memory(plan, workspace, engine, prepared)
                notes = callbacks.read(workspace.notes, plan.prerequisites.around_algorithm())
            else:
                exit, notes = prepared
        go_on()
        done = _finish(
            workspace,
            MARKER_RUN,
            started,
            exit=callbacks.corrected(exit, notes).to_json(),
            notes=notes.to_json(),
            disk_free_bytes=workspace.disk_free_bytes(),
        )
    exit, notes = ContainerExit.from_json(done["exit"]), Notes.from_json(done.get("notes"))
    case = Case(
        algorithm=plan.algorithm_name,
        exit=exit,
        last_lines=notes.without_marks(log.last_lines(workspace.log, 30)),
        network=plan.algorithm.network,
        gpu=plan.algorithm.gpu,
        writable_root=plan.algorithm.writable_root,
        disk_free_bytes=done["disk_free_bytes"],
        action=_action(first_try(workspace), exit),
        prerequisite=notes.failed,
    )
    return exit, judge(case)


def _with_caches(
    plan: Plan, workspace: Workspace, settings: Settings, engine: Engine, job: ContainerJob, held: ExitStack
) -> ContainerJob | tuple[ContainerExit, Notes]:
    """The job with what its prerequisites keep, prepared where nobody has yet, and `held`; or how the preparation failed."""
    failed: list[tuple[ContainerExit, Notes]] = []

    def prepare(step: Step, folder: Path) -> bool:
        get_run_logger().info("The prerequisite %s is prepared, and kept for the next run.", step.item.name)
        exit = _run(
            plan, workspace, engine, preparing_job(plan, job, step, folder=folder, workspace=workspace, settings=settings)
        )
        notes = callbacks.read(workspace.notes, plan.prerequisites.to_prepare(step))
        if exit.reason is not Reason.OK:
            failed.append((exit, notes))
        return exit.reason is Reason.OK

    for step in plan.prerequisites.cached:
        wait = partial(get_run_logger().info, "Another run prepares the prerequisite %s; waiting for it.", step.item.name)
        folder = held.enter_context(caches.held(settings.caches, caches.key(step, job.image), partial(prepare, step), wait))
        if folder is None:
            return failed[0]
        job = replace(job, mounts=(*job.mounts, Mount(source=folder, target=step.cache_path, read_only=True)))
    return job


def _run_with_enough_memory(plan: Plan, workspace: Workspace, engine: Engine, job: ContainerJob) -> ContainerExit:
    most = parse_bytes(plan.algorithm.memory_max) if plan.algorithm.memory_max else 0
    more = replace(job, resources=replace(job.resources, memory_bytes=most))
    if first_try(workspace):
        return _run(plan, workspace, engine, more)
    exit = _run(plan, workspace, engine, job)
    if exit.reason is not Reason.OUT_OF_MEMORY or most <= job.resources.memory_bytes:
        return exit
    workspace.mark_done(MARKER_FIRST_TRY, exit.to_json())
    get_run_logger().warning(
        "The algorithm was killed for memory with %s. It is run again, once, with its memory_max of %s.",
        human_bytes(job.resources.memory_bytes),
        human_bytes(most),
    )
    return _run(plan, workspace, engine, more)


def _run(plan: Plan, workspace: Workspace, engine: Engine, job: ContainerJob) -> ContainerExit:
    # A container has its output folder before it is made: where there is none, nobody has to ask the engine.
    if not workspace.output.exists() or not engine.find(job):
        workspace.fresh_output()
        if job.wrapper is not None:
            workspace.fresh_notes()
    show = cast(PrefectLogAdapter, get_run_logger()).getChild(log.VIEW_LOGGER).info
    secrets = tuple(plan.secrets.values())
    try:
        with log.record(workspace.log, show, secrets) as sink, telling(show_waiting):
            exit = engine.run(job, sink)
    except OasisError as error:
        error.args = tuple(log.redact(str(part), secrets) for part in error.args)
        raise
    if exit.log_lost:
        get_run_logger().warning("A part of the log may be missing: %s.", exit.log_lost)
    return replace(exit, detail=log.redact(exit.detail, secrets), last_words=sink.last_words())


def first_try(workspace: Workspace) -> ContainerExit | None:
    """How the run's first container ended, where it was killed for memory and run again with more."""
    done = workspace.done(MARKER_FIRST_TRY)
    return ContainerExit.from_json(done) if done else None


def _action(first: ContainerExit | None, exit: ContainerExit) -> str:
    if first is None:
        return ""
    again = (
        f"It was killed for memory with {human_bytes(first.memory_limit_bytes)}, and run again, once, with "
        f"{human_bytes(exit.memory_limit_bytes)}."
    )
    peak, most = exit.memory_peak_bytes, exit.memory_limit_bytes
    if exit.reason is not Reason.OK or peak is None or most is None:
        return again
    enough = min(peak * 5 // 4, most)
    return f"{again} It then used {human_bytes(peak)}: `memory: {-(-enough >> 20)}MiB` would do."


@task(**TRANSFER)
@step(MARKER_PUBLISHED)
def publish_output(
    plan: Plan,
    workspace: Workspace,
    *,
    image: str,
    staged: Summary,
    exit: ContainerExit,
    verdict: Verdict,
    flow_run: Mapping[str, str],
    go_on: Callable[[], None] = lambda: None,
) -> tuple[Summary, Dataset | None]:
    """Publish what the container wrote, with its log and record; a Dataset document only if it succeeded and is no shard.

    For a shard, `go_on` is called again and again meanwhile, and may raise. Of an output that was too much: log and record only; its files are deleted first, for these may need the room.

    Raises:
        UnsafeName: the output cannot be a dataset; it was kept like that of a failed run.
    """
    started = time.monotonic()
    if done := workspace.done(MARKER_PUBLISHED):
        summary = Summary(**done["summary"])
    elif plan.attempt > 1 and plan.part is None and (known := _recalled(plan, workspace)):
        summary = known.published
        _finish(workspace, MARKER_PUBLISHED, started, summary=asdict(summary))
    else:
        if not exit.reason.keeps_output:
            workspace.fresh_output()

        def publish(verdict: Verdict) -> Summary:
            def record(found: Summary) -> bytes:
                content = task_json(
                    plan,
                    image=image,
                    staged=staged,
                    exit=exit,
                    first_try=first_try(workspace),
                    notes=Notes.from_json((workspace.done(MARKER_RUN) or {}).get("notes")),
                    verdict=verdict,
                    published=found,
                    seconds=stage_seconds(workspace) | {MARKER_PUBLISHED: time.monotonic() - started},
                    flow_run=flow_run,
                )
                return written(content)

            return store.publish(
                workspace.output,
                plan.output,
                log=workspace.log,
                record=record,
                commit=verdict.code == Reason.OK,
                workspace=workspace.path,
                skipped=get_run_logger().warning,
                progress=(lambda *_: go_on()) if plan.part else _progress("Published", MARKER_PUBLISHED),
            )

        try:
            summary = publish(verdict)
        except UnsafeName as error:
            error.stage = MARKER_PUBLISHED
            publish(judge(error))
            raise
        _finish(workspace, MARKER_PUBLISHED, started, summary=asdict(summary))
    if exit.reason is not Reason.OK or plan.part is not None:
        return summary, None
    return summary, save_document(plan, summary)


def save_document(plan: Plan, summary: Summary) -> Dataset:
    """Save the Dataset document of what was published; ask the server patiently."""
    dataset = Dataset(
        url=plan.output.url,
        store=plan.store,
        file_count=summary.file_count,
        size_bytes=summary.size_bytes,
        manifest_digest=summary.digest,
    )
    documents.patiently(lambda: saving.save(dataset, plan.document_name))
    files, size = counted(summary.file_count, "file"), human_bytes(summary.size_bytes)
    get_run_logger().info("Published %s, %s, as dataset %s: %s", files, size, plan.document_name, plan.output.url)
    return dataset


def stage_seconds(workspace: Workspace) -> dict[str, float]:
    """How long each finished step took."""
    steps = (MARKER_STAGED, MARKER_IMAGE, MARKER_RUN, MARKER_PUBLISHED)
    return {step: round(done["seconds"], 3) for step in steps if (done := workspace.done(step))}


def _finish(workspace: Workspace, step: str, started: float, **found: object) -> dict[str, Any]:
    done = {**found, "seconds": time.monotonic() - started}
    workspace.mark_done(step, done)
    return done


def _progress(verb: str, step: str) -> store.Progress:
    """Tell how a long transfer goes: by a bar among the run's artifacts, and in the log every ten seconds."""
    bar = TransferBar(step)
    logger: logging.Logger | logging.LoggerAdapter[Any] = get_run_logger()
    last = time.monotonic()

    def tell(files: int, all_files: int, bytes: int, all_bytes: int) -> None:
        nonlocal last
        interruption.check()
        bar.move(files, all_files, bytes, all_bytes)
        progress.tell(verb.lower(), files, all_files, bytes, all_bytes)
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            logger.info("%s %d of %d files, %s of %s.", verb, files, all_files, human_bytes(bytes), human_bytes(all_bytes))

    return tell
