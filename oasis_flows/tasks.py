"""The four steps of a run, each a Prefect task that finishes once.

A step that is done says so by its marker in the workspace, written last; called again, it returns what it found. Steps
are called directly by the flow, never submitted: only in the main thread does Prefect's cancellation reach the container
at once. What may be tried again is decided by the error (`transient`), never by its sort: a failed algorithm is a result
and no error here.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.logging.loggers import PrefectLogAdapter
from prefect.tasks import Task, exponential_backoff

from . import log, store
from .blocks import Dataset
from .errors import OasisError, UnsafeName
from .job import ContainerExit, Reason, counted, human_bytes
from .machine import open_engine
from .manifest import Summary
from .plan import Plan, container_job
from .record import task_json
from .settings import Settings
from .workspace import Workspace

MARKER_STAGED, MARKER_IMAGE, MARKER_RUN, MARKER_PUBLISHED = "stage_input", "prepare_image", "run_container", "publish_output"


def _may_succeed_later(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, OasisError) and error.transient


_TRANSFER: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(2),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": _may_succeed_later,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}


@task(**_TRANSFER)
def stage_input(plan: Plan, workspace: Workspace) -> tuple[Path, Summary]:
    """Bring the input to this machine; return the folder to mount and what it holds.

    Before a byte is moved, the store shows that the output can be written to it.
    """
    if done := workspace.done(MARKER_STAGED):
        return Path(done["folder"]), Summary(**done["summary"])
    started = time.monotonic()
    store.check_writable(plan.root)
    folder, summary = store.stage(plan.source, workspace.path, progress=_progress("Staged"))
    _finish(workspace, MARKER_STAGED, started, folder=str(folder), summary=asdict(summary))
    files, size = counted(summary.file_count, "file"), human_bytes(summary.size_bytes)
    get_run_logger().info("The input %s has %s, %s.", plan.dataset_name, files, size)
    return folder, summary


@task(**_TRANSFER)
def prepare_image(plan: Plan, workspace: Workspace, settings: Settings) -> str:
    """Pull or load the image; return a reference to exactly these bytes."""
    # Not skipped on a retry: the engine may have lost the image since, and asking it costs milliseconds.
    started = time.monotonic()
    image = open_engine(settings).prepare(plan.image)
    _finish(workspace, MARKER_IMAGE, started, image=image)
    get_run_logger().info("The image is %s.", image)
    return image


@task(**{**_TRANSFER, "retries": 2})
def run_container(plan: Plan, workspace: Workspace, settings: Settings, *, image: str, input_folder: Path) -> ContainerExit:
    """Run the container to its end, or re-attach to the one that an earlier attempt of this run left; return how it ended."""
    if done := workspace.done(MARKER_RUN):
        return ContainerExit.from_json(done["exit"])
    started = time.monotonic()
    engine = open_engine(settings)
    job = container_job(plan, workspace, image=image, input_folder=input_folder, settings=settings)
    if not engine.find(job):
        workspace.fresh_output()
    show = cast(PrefectLogAdapter, get_run_logger()).getChild(log.VIEW_LOGGER).info
    secrets = tuple(plan.secrets.values())
    try:
        with log.record(workspace.log, show, secrets) as sink:
            exit = engine.run(job, sink)
    except OasisError as error:
        error.args = tuple(log.redact(str(part), secrets) for part in error.args)
        raise
    exit = replace(exit, detail=log.redact(exit.detail, secrets))
    _finish(workspace, MARKER_RUN, started, exit=exit.to_json())
    return exit


@task(**_TRANSFER)
def publish_output(
    plan: Plan, workspace: Workspace, *, image: str, staged: Summary, exit: ContainerExit, flow_run: Mapping[str, str]
) -> tuple[Summary, Dataset | None]:
    """Publish what the container wrote, with its log and record; a Dataset document only if it succeeded.

    Of an output that was too much: log and record only; its files are deleted first, for these may need the room.

    Raises:
        UnsafeName: the output cannot be a dataset; it was kept like that of a failed run.
    """
    succeeded = exit.reason is Reason.OK
    if done := workspace.done(MARKER_PUBLISHED):
        summary = Summary(**done["summary"])
    else:
        started = time.monotonic()
        if not exit.reason.keeps_output:
            workspace.fresh_output()

        def publish(refused: UnsafeName | None = None) -> Summary:
            def record(found: Summary) -> bytes:
                content = task_json(
                    plan,
                    image=image,
                    staged=staged,
                    exit=exit,
                    published=found,
                    seconds=stage_seconds(workspace) | {MARKER_PUBLISHED: time.monotonic() - started},
                    flow_run=flow_run,
                    refused=refused,
                )
                return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"

            return store.publish(
                workspace.output,
                plan.output,
                log=workspace.log,
                record=record,
                commit=succeeded and refused is None,
                workspace=workspace.path,
                skipped=get_run_logger().warning,
                progress=_progress("Published"),
            )

        try:
            summary = publish()
        except UnsafeName as error:
            publish(error)
            raise
        _finish(workspace, MARKER_PUBLISHED, started, summary=asdict(summary))
    if not succeeded:
        return summary, None
    dataset = Dataset(
        url=plan.output.url,
        store=plan.store,
        file_count=summary.file_count,
        size_bytes=summary.size_bytes,
        manifest_digest=summary.digest,
    )
    dataset.save(plan.document_name, overwrite=True)
    files, size = counted(summary.file_count, "file"), human_bytes(summary.size_bytes)
    get_run_logger().info("Published %s, %s, as dataset %s: %s", files, size, plan.document_name, plan.output.url)
    return summary, dataset


def stage_seconds(workspace: Workspace) -> dict[str, float]:
    """How long each finished step took."""
    steps = (MARKER_STAGED, MARKER_IMAGE, MARKER_RUN, MARKER_PUBLISHED)
    return {step: round(done["seconds"], 3) for step in steps if (done := workspace.done(step))}


def _finish(workspace: Workspace, step: str, started: float, **found: object) -> None:
    workspace.mark_done(step, {**found, "seconds": time.monotonic() - started})


def _progress(verb: str) -> Callable[[int, int | None, int], None]:
    """Tell how a long transfer goes, every ten seconds."""
    logger: logging.Logger | logging.LoggerAdapter[Any] = get_run_logger()
    last = time.monotonic()

    def tell(files: int, total: int | None, size: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            logger.info("%s %d%s files, %s.", verb, files, f" of {total}" if total else "", human_bytes(size))

    return tell
