"""What surrounds the steps of a run: whose it is, and what is left of it.

Rings of cleanup, from the inside: the engine removes its container whatever happens (`engines`); `owned_workspace` guards
the flow; `clean_up` is called by Prefect when a run was cancelled or crashed; `reaper` takes what outlived its process,
called by the run's own `watchdog`, by the next run on the machine, by a schedule, or by hand.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings

from . import backoff, settings, watchdog
from .artifacts import FAILED_TAG, first_files, tell_failure
from .documents import patiently
from .errors import OasisError, UnsafeName
from .heartbeat import beating
from .log import last_lines
from .machine import open_engine
from .manifest import Summary
from .plan import Plan
from .reaper import (
    LABEL_ATTEMPT,
    LABEL_HOST,
    LABEL_OUTPUT,
    LABEL_STORE,
    abandon_uploads,
    cancel_shards,
    gone,
    may_return,
    remove_rest,
    sweep,
)
from .record import Account
from .settings import Settings
from .tasks import MARKER_PUBLISHED, MARKER_RUN, stage_seconds
from .workspace import Workspace, open_workspace

LEFT_BEHIND = "This user may not delete all of the workspace %s, such as files that the container wrote as root. Delete it."


def announce(plan: Plan) -> None:
    """Write on the flow run whose it is and where its output goes, so that people and `oasis-flows log` find both."""
    labels = {LABEL_OUTPUT: plan.output.url}
    if plan.store is not None and plan.store._block_document_name:
        labels[LABEL_STORE] = plan.store._block_document_name
    mark([f"algorithm:{plan.algorithm_name}", f"dataset:{plan.dataset_name}"], labels)


def mark(tags: Sequence[str], labels: Mapping[str, str]) -> None:
    """Add tags and labels to the flow run, and the machine that it is on."""
    run_id = UUID(str(runtime.flow_run.id))
    # What an earlier attempt of this run failed of is no longer so.
    earlier = {tag for tag in runtime.flow_run.tags if not tag.startswith(FAILED_TAG)}
    told: dict[str, Any] = {**labels, LABEL_HOST: socket.gethostname(), LABEL_ATTEMPT: runtime.flow_run.run_count or 1}

    def write() -> None:
        with get_client(sync_client=True) as client:
            if tags:
                client.update_flow_run(run_id, tags=sorted({*earlier, *tags}))
            client.update_flow_run_labels(run_id, told)

    patiently(write)


@contextmanager
def owned_workspace(here: Settings, account: Account) -> Iterator[Workspace]:
    """The run's workspace, with its lease held and a watchdog beside it. No container of the run outlives the block.

    What the workspace knows goes to `account` as soon as the steps are over (`account.settle`); then it is emptied, unless
    a retry can go on from it. Lease and watchdog stay until the block ends: until Prefect can be told.

    Raises:
        RunInUse: another process works on this run.
        StoreFull: the folder cannot be made.
    """
    with beating(), _watched(_environment(here)), _opened(here) as workspace:
        account.settle = partial(_settle, workspace, account, here)
        with get_client(sync_client=True) as client:
            backoff.shorten(client)
        try:
            _sweep(here)
            yield workspace
        except BaseException as error:
            # Where Prefect tries again in this very process, what is kept stays.
            if not isinstance(error, OasisError):
                # An engine that is away now must not turn a cancellation into a failure; the lease tells the reaper.
                with suppress(OasisError):
                    open_engine(here).reap(workspace.run_id)
            raise
        finally:
            if not workspace.is_resumable:
                workspace.remove()


@contextmanager
def _watched(changes: Mapping[str, str]) -> Iterator[None]:
    """Have a watchdog for the time of the block. Without one (no process can be made) the block runs all the same.

    Its environment is this process's with `changes`; it works elsewhere, so what is relative here means nothing to it.
    """
    # It must not look like the run itself.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")} | dict(changes)
    dog: subprocess.Popen[bytes] | None = None
    with suppress(OSError):
        # In a session of its own it gets neither the terminal's signals nor those for the worker's process group.
        dog = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__],
            env=env,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield
    finally:
        if dog is not None:
            with suppress(OSError):
                dog.communicate(watchdog.FAREWELL)


def _opened(here: Settings) -> AbstractContextManager[Workspace]:
    return open_workspace(here.workspaces, str(runtime.flow_run.id), runtime.flow_run.run_count or 1)


def _settle(workspace: Workspace, account: Account, here: Settings, error: OasisError | None) -> None:
    """Take down what the workspace knows, and empty it, unless a retry of the run that `error` ended can go on from it.

    Nobody tries the run of a shard again: its batch makes another, perhaps on another machine.
    """
    account.seconds, account.tail = stage_seconds(workspace), last_lines(workspace.log, 30)
    if published := workspace.done(MARKER_PUBLISHED):
        account.published = Summary(**published["summary"])
        account.files = first_files(workspace.published_manifest)
    is_shard = account.plan is not None and account.plan.part is not None
    resumable = error is not None and ((error.transient and workspace.is_resumable) or _unpublished(workspace, error))
    if resumable and not is_shard:
        kept = "What is done so far is kept for %g hours in %s; a retry of this run goes on from there."
        get_run_logger().warning(kept, here.keep_seconds / 3600, workspace.path)
    elif not workspace.clear():
        get_run_logger().warning(LEFT_BEHIND, workspace.path)


def _environment(here: Settings) -> dict[str, str]:
    """What tells a process that starts elsewhere about this one's home, engine and Prefect server."""
    certificates = os.environ.get("DOCKER_CERT_PATH")
    return {
        **_prefect_environment(),
        "OASIS_FLOWS_HOME": str(here.home),
        **({"DOCKER_CERT_PATH": str(Path(certificates).absolute())} if certificates else {}),
    }


_told: tuple[object, dict[str, str]] | None = None


def _prefect_environment() -> dict[str, str]:
    """This process's Prefect settings as variables: made once for as long as they are the same, for it takes 50 ms."""
    global _told
    settings, told = get_current_settings(), _told
    if told is None or told[0] is not settings:
        found = settings.to_environment_variables(exclude_unset=True)
        told = _told = (settings, {name: value for name, value in found.items() if value is not None})
    return told[1]


def _unpublished(workspace: Workspace, error: OasisError) -> bool:
    """Is what the container left only here?"""
    finished, published = workspace.done(MARKER_RUN), workspace.done(MARKER_PUBLISHED)
    return finished is not None and published is None and not isinstance(error, UnsafeName)


def _sweep(here: Settings) -> None:
    """Take away what dead runs left. That is nobody's business but theirs: it never fails this run.

    Drafts of images, which hold no processor and no GPU, are for the watchdog and `oasis-flows reap`: to ask for them took as
    long as all else here, and longer the more images an engine has.
    """
    try:
        reaped = sweep(here, drafts=False)
    except Exception as error:  # noqa: BLE001 - whatever it is, this run did not do it
        get_run_logger().warning("Could not look for what dead runs left: %s: %s", type(error).__name__, error)
    else:
        for run_id in reaped.containers:
            get_run_logger().warning("Removed the container of run %s, whose process is gone.", run_id)


def clean_up(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001
    """Remove what a cancelled or crashed run may have left on this machine. Prefect calls it with exactly these names."""
    here = settings.current()
    with suppress(Exception), get_client(sync_client=True) as client:
        # A worker hands over the run as it was before its process began: without its labels and attempts.
        flow_run = client.read_flow_run(flow_run.id)
    if state.is_cancelled():
        cancel_shards(flow_run)
    abandon_uploads(flow_run)
    # A crashed run that can be retried then finds its workspace.
    remove_rest(flow_run, here, folder=not (state.is_crashed() and may_return(flow_run)))
    if state.is_crashed():
        with get_client(sync_client=True) as client:
            tell_failure(client, flow_run.id, flow_run.name, gone(flow_run))
