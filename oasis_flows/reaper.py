"""The last ring of cleanup: removes what runs left whose process is gone, and says so to Prefect.

Everything else cleans up after itself; only a process that was killed outright, and a worker that was told to stop, leave
something for this. It trusts leases alone (see `lease`) and has a lease locked while it removes what that covers, so it
never touches what somebody works on: a container that another machine started, and whatever this user may not look at, is
left to its own reaper.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http.client import NOT_FOUND
from itertools import chain
from socket import gethostname
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from httpx import HTTPStatusError
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, Worker, WorkerStatus
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Cancelling, Crashed

from . import caches, documents, lease, store, workspace
from .artifacts import tell_failure
from .blocks import DatasetStore
from .errors import EngineUnavailable, OasisError, ProcessGone
from .fetched import fetched
from .machine import image_engine, open_engine
from .plan import options_of
from .settings import Settings
from .store import Location
from .verdict import Verdict, judge
from .workspace import Workspace

LABEL_HOST, LABEL_OUTPUT, LABEL_STORE = "oasis.host", "oasis.output", "oasis.store"
# Which attempt of a run came so far as to have a workspace with a watchdog, and to name its machine.
LABEL_ATTEMPT = "oasis.attempt"
# Begins the tag of a run that is a shard of a batch, whose id follows.
SHARD_TAG = "batch:"
PROCESS_GONE = "The process that ran it is gone: it was killed, or its worker was stopped. What it left is removed."
# All deployments of `prefect.yaml` have it, and so have their runs.
TAG = "oasis-flows"
NEVER_BEGAN = "A worker took it and it never began: its worker died."
ENDED_AT_ONCE = "Its process ended before the run began, as it does where the Prefect server is away in that moment. The log of its worker says why."
DIED_AT_ONCE = "The process that ran it died before it had done anything."
NEVER_CANCELLED = "It was to be cancelled, and nobody was there to do it."
LABEL_WORKER, LABEL_POOL = "prefect.worker.name", "prefect.work-pool.name"
_PAGE = 200
# A run whose last step has failed holds its lease no longer, and Prefect may learn of that late.
SILENCE_SECONDS = 30.0
PATIENCE_SECONDS = 600.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaped:
    """Ids of runs: whose containers and workspaces are gone now, and which Prefect was told the end of.

    `caches` are names of folders that prerequisites had kept.
    """

    containers: tuple[str, ...] = ()
    workspaces: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()

    def plus(self, other: Reaped) -> Reaped:
        """All of both, each once."""
        return Reaped(
            containers=tuple(dict.fromkeys(self.containers + other.containers)),
            workspaces=tuple(dict.fromkeys(self.workspaces + other.workspaces)),
            runs=tuple(dict.fromkeys(self.runs + other.runs)),
            caches=tuple(dict.fromkeys(self.caches + other.caches)),
        )


def reap(settings: Settings, *, now: bool = False) -> Reaped:
    """`sweep`, and tell Prefect the end of runs, of whatever machine, that nobody works on.

    These are runs of deployments with the tag `oasis-flows` that for the setting `OASIS_FLOWS_BEGIN_WITHIN` have been cancelled and did not end,
    or were taken by a worker and did not begin: one that starts processes, for these do not wait, or one that is gone; and
    runs, calls too, that for as long have been Running and never came so far as to have a watchdog, and calls that have been Pending. An
    automation does much the same; but a server that is killed before it has acted on an event does not know of it afterwards.

    Raises:
        EngineUnavailable: as `sweep` does. Prefect was told all the same.
    """
    ended = tuple[str, ...]()
    with _noted("Prefect could not be told which runs nobody works on"):
        ended = _end_forgotten(settings)
    swept = sweep(settings, now=now)
    return replace(swept, runs=swept.runs + ended)


def sweep(settings: Settings, *, now: bool = False, drafts: bool = True) -> Reaped:
    """Remove containers that nobody owns and workspaces that nobody came back for, and tell Prefect of runs that died.

    So that a retry finds them, a dead run's container may stay for the setting `OASIS_FLOWS_RETRY_WINDOW`, unless `now`, and its
    workspace for `OASIS_FLOWS_KEEP_HOURS`. What prerequisites keep goes when no run has used it for
    `OASIS_FLOWS_KEEP_CACHES_HOURS`. Drafts of images are left for a later call where `drafts` is False (see `Engine.reap`). A
    Prefect server that does not answer is no error; the next call tells it.

    Raises:
        EngineUnavailable: nobody can tell which containers there are. Prefect was told of the dead runs all the same.
    """
    window = 0.0 if now else settings.retry_window_seconds
    engine, ended = open_engine(settings), Reaped()
    try:
        # Before Prefect, which may take minutes to say that it is away.
        containers = engine.reap(grace_seconds=window, below=settings.workspaces, drafts=drafts)
    finally:
        with _noted("Prefect could not be told which runs are dead"):
            ended = _tell_ends(settings, min(window, SILENCE_SECONDS))
    swept = Reaped(
        containers=containers,
        workspaces=workspace.reap(settings.workspaces, settings.keep_seconds, _leaving(settings)),
        caches=caches.reap(settings.caches, settings.keep_caches_seconds),
    )
    return swept.plus(ended)


def reap_until_quiet(settings: Settings) -> Iterator[Reaped]:
    """Reap again and again, until every run that is dead by now has been seen to: as long as the retry window, and a little.

    An engine or a Prefect server that does not answer is asked again, ten minutes longer.
    """
    began, window = time.monotonic(), max(settings.retry_window_seconds, SILENCE_SECONDS)
    while (waited := time.monotonic() - began) < window + PATIENCE_SECONDS:
        try:
            yield sweep(settings)
        except EngineUnavailable as error:
            logger.warning("The engine is away; it is asked again. %s", error)
        else:
            if waited > min(settings.retry_window_seconds, window) and not _still_silent(settings):
                return
        time.sleep(max(0.5, min(5.0, settings.retry_window_seconds / 4)))


def _still_silent(settings: Settings) -> bool:
    """Are there dead runs of which Prefect could not be told?"""
    try:
        return bool(_running(_silent(settings, 0)))
    except Exception:  # noqa: BLE001 - it is away
        return True


@contextmanager
def _noted(what: str, *about: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - what one thing that is away prevents, must not keep the others from being done
        logger.warning(f"{what}: %s: %s", *about, type(error).__name__, error)


def _silent(settings: Settings, silence_seconds: float) -> list[UUID]:
    return [UUID(id) for id in workspace.abandoned(settings.workspaces, silence_seconds) if _is_run_id(id)]


def _running(ids: Sequence[UUID]) -> list[FlowRun]:
    """Those of the runs that Prefect believes running on this machine."""
    if not ids:
        return []
    running = FlowRunFilter(
        id=FlowRunFilterId(any_=list(ids)),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED])),
    )
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=running)
    # One that is paused waits in its process; one that is suspended has none.
    awake = [run for run in found if run.state is not None and not run.state.state_details.pause_reschedule]
    return [run for run in awake if run.labels.get(LABEL_HOST, gethostname()) == gethostname()]


def _tell_ends(settings: Settings, silence_seconds: float) -> Reaped:
    """Tell Prefect of the runs whose process died and which it believes running; return these, and what of them was removed."""
    told = Reaped()
    for run in _running(_silent(settings, silence_seconds)):
        with _noted("Prefect could not be told the end of run %s", run.id):
            told = told.plus(_tell_end(run, settings, silence_seconds))
    return told


def _tell_end(run: FlowRun, settings: Settings, silence_seconds: float) -> Reaped:
    place = Workspace(settings.workspaces / str(run.id))
    with lease.taken(place.lease, silence_seconds) as dead, get_client(sync_client=True) as client:
        # The owner that died may have been that of an earlier attempt, and the one of this attempt is only on its way here.
        if not dead or run.state is None or lease.attempt_of(place.lease) != _attempt(run):
            return Reaped()
        cancelled, verdict = run.state.is_cancelling(), gone(run)
        state: State[Any] = (
            Cancelled(message=verdict.sentence) if cancelled else Crashed(message=f"{verdict.sentence} {verdict.advice}")
        )
        if client.set_flow_run_state(run.id, state).status is not SetStateStatus.ACCEPT:
            return Reaped()
        if not cancelled:
            with _noted("The failure of run %s could not be told", run.id):
                tell_failure(client, run.id, run.name, verdict)
    told = Reaped(runs=(str(run.id),))
    abandon_uploads(run)
    if cancelled:
        cancel_shards(run)
    if cancelled or not may_return(run):
        # Nobody comes back for what it left.
        told = told.plus(remove_rest(run, settings))
    return told


def _end_forgotten(settings: Settings) -> tuple[str, ...]:
    ended, seconds = [], settings.begin_seconds
    with get_client(sync_client=True) as client:
        for found in chain(_waiting(client), _called(client), _begun(client, settings)):
            with _noted("Prefect could not be told the end of run %s", found.id):
                if _is_forgotten(client, found, seconds) and _end(client, client.read_flow_run(found.id), seconds):
                    ended.append(str(found.id))
    return tuple(ended)


def _each(client: SyncPrefectClient, **filters: Any) -> Iterator[FlowRun]:
    """All of these runs, the oldest first; the server tells so many at a time."""
    found = list[FlowRun]()
    while page := client.read_flow_runs(**filters, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=_PAGE, offset=len(found)):
        found += page
        if len(page) < _PAGE:
            break
    # They are ended while they are looked through, and would no longer be counted.
    yield from found


def _waiting(client: SyncPrefectClient) -> Iterator[FlowRun]:
    states = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.CANCELLING]))
    wanted = FlowRunFilter(state=states, tags=FlowRunFilterTags(all_=[TAG]))
    return (run for run in _each(client, flow_run_filter=wanted) if run.deployment_id is not None)


def _called(client: SyncPrefectClient) -> Iterator[FlowRun]:
    """Calls that have not begun. Those out of other flows may wait for what they are called with; others wait for nothing."""
    found = _of_ours(client, StateType.PENDING)
    return (run for run in found if not (run.deployment_id or run.work_pool_name or run.parent_task_run_id))


def _begun(client: SyncPrefectClient, settings: Settings) -> Iterator[FlowRun]:
    """Runs whose process died, if it did, before there was anything else that knew of it."""
    found = _of_ours(client, StateType.RUNNING)
    return (run for run in found if not _had_a_watchdog(run) and not _is_owned(run, settings))


def _of_ours(client: SyncPrefectClient, state: StateType) -> Iterator[FlowRun]:
    wanted = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[state])))
    named = FlowFilter(name=FlowFilterName(any_=["algorithm-task", "batch", "train"]))
    return filter(_is_ours, _each(client, flow_filter=named, flow_run_filter=wanted))


def _attempt(run: FlowRun) -> int:
    """Which attempt it is: Prefect counts a run that goes on after a pause as another one."""
    return run.run_count - bool(run.empirical_policy.resuming)


def _had_a_watchdog(run: FlowRun) -> bool:
    return int(str(run.labels.get(LABEL_ATTEMPT, 0))) >= _attempt(run)


def _is_owned(run: FlowRun, settings: Settings) -> bool:
    """Does a process of this machine work on it?"""
    place = Workspace(settings.workspaces / str(run.id))
    with lease.taken(place.lease, 0) as free:
        return not free and not lease.missing(place.lease)


def _is_ours(run: FlowRun) -> bool:
    # Anybody may call a flow "batch".
    return (
        TAG in run.tags
        or {"algorithm", "input_dataset"} <= run.parameters.keys()
        or {"image", "station"} <= run.parameters.keys()
    )


def _is_forgotten(client: SyncPrefectClient, run: FlowRun, begin_seconds: float) -> bool:
    if run.state is None or age(run.state) < begin_seconds:
        return False
    if not run.state.is_pending() or run.deployment_id is None or worker_is_gone(client, run):
        return True
    return run.work_pool_name is not None and client.read_work_pool(run.work_pool_name).type == "process"


def _end(client: SyncPrefectClient, run: FlowRun, begin_seconds: float) -> bool:
    """End a run that is as it was when it was found: it may have begun while others were seen to."""
    if run.state is None or age(run.state) < begin_seconds:
        return False
    if run.state.is_running():
        is_over, verdict = not _had_a_watchdog(run), judge(ProcessGone(DIED_AT_ONCE + _again(run)))
    else:
        why = NEVER_BEGAN if run.deployment_id is not None else DIED_AT_ONCE
        is_over, verdict = run.state.is_pending() or run.state.is_cancelling(), judge(ProcessGone(why + _again(run)))
    if not is_over:
        return False
    crashed = not run.state.is_cancelling()
    state: State[Any] = (
        Crashed(message=f"{verdict.sentence} {verdict.advice}") if crashed else Cancelled(message=NEVER_CANCELLED)
    )
    if client.set_flow_run_state(run.id, state).status is not SetStateStatus.ACCEPT:
        return False
    if crashed:
        with _noted("The failure of run %s could not be told", run.id):
            tell_failure(client, run.id, run.name, verdict)
    else:
        cancel_shards(run)
    return True


def worker_is_gone(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Has the server missed the signs of life of the worker that took the run?"""
    name, pool = run.labels.get(LABEL_WORKER), run.labels.get(LABEL_POOL)
    workers = workers_of(client, str(pool)) if pool else []
    return name is not None and all(each.status is WorkerStatus.OFFLINE for each in workers if each.name == name)


def workers_of(client: SyncPrefectClient, pool: str) -> list[Worker]:
    """The workers of a pool; none where somebody has deleted it."""
    try:
        return client.read_workers_for_work_pool(pool)
    except HTTPStatusError as error:
        if error.response.status_code != NOT_FOUND:
            raise
        return []


def age(state: State[Any]) -> float:
    """How many seconds ago it was reached."""
    return (datetime.now(UTC) - state.timestamp).total_seconds()


def may_return(run: FlowRun) -> bool:
    """Can the run be tried again, and find what it left? A batch does not try the run of a shard again: it makes another."""
    return run.deployment_id is not None and not any(tag.startswith(SHARD_TAG) for tag in run.tags)


def gone(run: FlowRun) -> Verdict:
    """What there is to say of a run whose process is gone."""
    return judge(ProcessGone((PROCESS_GONE if run.run_count else ENDED_AT_ONCE) + _again(run)))


def _again(run: FlowRun) -> str:
    return f" Run it again: prefect flow-run retry {run.id}" if may_return(run) else ""


def remove_rest(run: FlowRun, settings: Settings, *, folder: bool = True) -> Reaped:
    """Remove a dead run's container, and its workspace (`folder`), unless somebody else works on the run by now; return what went.

    What cannot be removed now is for the next `reap`; it raises nothing.
    """
    removed = Reaped()
    place = Workspace(settings.workspaces / str(run.id))
    with lease.taken(place.lease, 0) as free:
        if not free and not lease.missing(place.lease):
            return removed
        with _noted("The container of run %s may be left behind", run.id):
            removed = removed.plus(Reaped(containers=open_engine(settings).reap(str(run.id))))
    with _noted("The workspace of run %s may be left behind", run.id):
        if folder and place.remove_abandoned(0, _leaving(settings)):
            removed = removed.plus(Reaped(workspaces=(str(run.id),)))
    return removed


def _leaving(settings: Settings) -> Callable[[Workspace], bool]:
    """What is done before the workspace of a dead run goes; False where something that is away is to be asked again."""
    away = set[object]()

    def leave(place: Workspace) -> bool:
        with _in_haste():
            return leave_hastily(place)

    def leave_hastily(place: Workspace) -> bool:
        _drop_fetched(settings, place)
        if not _is_run_id(place.run_id):
            return True
        run: FlowRun | None = None
        if None not in away:
            with _noted("Where run %s was sending to is not known", place.run_id), get_client(sync_client=True) as client:
                try:
                    run = client.read_flow_run(UUID(place.run_id))
                except ObjectNotFound:
                    return True
        if run is None:
            # The server: it is not asked for each of the others.
            away.add(None)
            return False
        if run.state is None or not run.state.is_final():
            # An attempt elsewhere is sending.
            return True
        which = (run.labels.get(LABEL_STORE), urlsplit(str(run.labels.get(LABEL_OUTPUT) or "")).netloc)
        # The store may have been away when the run died, and some of its requests arrive when it is back.
        if which in away or not abandon_uploads(run):
            away.add(which)
            return False
        return True

    return leave


@contextmanager
def _in_haste() -> Iterator[None]:
    """Let the Prefect server be asked once, and not for long: a retry of the run waits for its lease meanwhile, and not for long either."""
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: 2.0}):
        yield


def _drop_fetched(settings: Settings, place: Workspace) -> None:
    """Take out of the engine what a dead visit of a train had fetched; most runs are none."""
    with _noted("Images that run %s had fetched may be left behind", place.run_id):
        for name in fetched(place):
            image_engine(settings).forget(name)


def cancel_shards(run: FlowRun) -> None:
    """Have the runs cancelled that are shards of this batch, which was; most runs are none and have none. It raises nothing."""
    under_way = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED]
    shards = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=under_way)),
        tags=FlowRunFilterTags(all_=[f"{SHARD_TAG}{run.id}"]),
    )
    with _noted("The shards of batch %s may go on", run.id), get_client(sync_client=True) as client:
        known = set[UUID]()
        while found := {each.id for each in client.read_flow_runs(flow_run_filter=shards)} - known:
            for shard_id in found:
                client.set_flow_run_state(shard_id, Cancelling())
            known |= found


def abandon_uploads(run: FlowRun) -> bool:
    """Abort what a dead run was sending to its store, so far as that has a document to open it with. It raises nothing.

    Returns:
        False where the store, or the Prefect server, does not answer: another time it may.
    """
    url, name = run.labels.get(LABEL_OUTPUT), run.labels.get(LABEL_STORE)
    answered = not url
    if url:
        # Of all that can be left it hurts least, and a retry aborts it, too.
        with _noted("Uploads to %s may be left behind", url):
            try:
                store.abandon(Location(str(url), options_of(documents.find(DatasetStore, str(name)) if name else None)))
                answered = True
            except OasisError as error:
                answered = not error.transient
                raise
    return answered


def _is_run_id(name: str) -> bool:
    try:
        UUID(name)
    except ValueError:
        return False
    return True
