"""The last ring of cleanup: removes what runs left whose process is gone, and says so to Prefect.

Everything else cleans up after itself; only a process that was killed outright, and a worker that was told to stop, leave
something for this. It trusts leases alone (see `lease`) and has a lease locked while it removes what that covers, so it
never touches what somebody works on: a container that another machine started, and whatever this user may not look at, is
left to its own reaper.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Crashed

from . import lease, workspace
from .errors import EngineUnavailable
from .machine import open_engine
from .settings import Settings
from .workspace import Workspace

# A run whose last step has failed holds its lease no longer, and Prefect may learn of that late.
SILENCE_SECONDS = 30.0
PATIENCE_SECONDS = 600.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaped:
    """Ids of runs: whose containers and workspaces are gone now, and which Prefect was told the end of."""

    containers: tuple[str, ...]
    workspaces: tuple[str, ...]
    runs: tuple[str, ...]


def reap(settings: Settings, *, now: bool = False) -> Reaped:
    """Remove containers that nobody owns and workspaces that nobody came back for, and mark runs that died as crashed.

    So that a retry finds them, a dead run's container may stay for the setting `OASIS_FLOWS_RETRY_WINDOW`, unless `now`, and its
    workspace for `OASIS_FLOWS_KEEP_HOURS`. A Prefect server that does not answer is no error; it is told by the next call.

    Raises:
        EngineUnavailable: nobody can tell which containers there are.
    """
    window = 0.0 if now else settings.retry_window_seconds
    try:
        runs = _tell_ends(settings, min(window, SILENCE_SECONDS))
    except Exception as error:  # noqa: BLE001 - whatever Prefect's trouble is, containers must not stay for it
        logger.warning("Prefect could not be told which runs are dead: %s: %s", type(error).__name__, error)
        runs = ()
    containers = open_engine(settings).reap(grace_seconds=window, below=settings.workspaces)
    return Reaped(containers=containers, workspaces=workspace.reap(settings.workspaces, settings.keep_seconds), runs=runs)


def reap_until_quiet(settings: Settings) -> Iterator[Reaped]:
    """Reap again and again, until every run that is dead by now has been seen to: as long as the retry window, and a little.

    An engine that does not answer is asked again, ten minutes long.
    """
    began = time.monotonic()
    while (waited := time.monotonic() - began) < PATIENCE_SECONDS:
        try:
            yield reap(settings)
        except EngineUnavailable as error:
            logger.warning("The engine is away; it is asked again. %s", error)
        else:
            if waited > settings.retry_window_seconds:
                return
        time.sleep(min(5, settings.retry_window_seconds / 4))


def _tell_ends(settings: Settings, silence_seconds: float) -> tuple[str, ...]:
    """Mark the runs whose process died while Prefect believes them running; return their ids."""
    silent = [id for id in workspace.abandoned(settings.workspaces, silence_seconds) if _is_run_id(id)]
    if not silent:
        return ()
    running = FlowRunFilter(
        id=FlowRunFilterId(any_=[UUID(id) for id in silent]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING])),
    )
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=running)
        return tuple(str(run.id) for run in found if _tell_end(client, run, settings, silence_seconds))


def _tell_end(client: SyncPrefectClient, run: FlowRun, settings: Settings, silence_seconds: float) -> bool:
    path = Workspace(settings.workspaces / str(run.id)).lease
    with lease.taken(path, silence_seconds) as dead:
        # An owner that was last seen before the run began to run was that of an earlier attempt.
        if not dead or run.state is None or path.stat().st_mtime < run.state.timestamp.timestamp():
            return False
        if run.state.is_cancelling():
            state: State[Any] = Cancelled(message="It was cancelled, and its process is gone.")
        else:
            state = Crashed(
                message="The process that ran it is gone: it was killed, or its worker was stopped. Run it again: "
                f"prefect flow-run retry {run.id}"
            )
        client.set_flow_run_state(run.id, state)
        return True


def _is_run_id(name: str) -> bool:
    try:
        UUID(name)
    except ValueError:
        return False
    return True
