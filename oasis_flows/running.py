"""Finding a run again: to go on with it, or to read its log, while it runs and afterwards.

Where the log is:

While it runs: in the workspace, for those on the same machine. Afterwards: beside its output in the store. In between, for
those on another machine: the view that Prefect has of it.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort, LogSort
from prefect.flow_engine import run_flow
from prefect.flows import Flow
from prefect.settings import get_current_settings
from prefect.states import Scheduled
from prefect.utilities.urls import url_for

from . import documents, lease, store as stores
from .blocks import DatasetStore
from .errors import DatasetError, DescriptionError, RunInUse
from .log import VIEW_LOGGER
from .plan import options_of
from .reaper import LABEL_HOST, LABEL_OUTPUT, LABEL_STORE
from .settings import Settings
from .store import Location
from .workspace import Workspace

_POLL_SECONDS = 0.5
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSource:
    """The log of one run. `url` is where its output is or will be; `None` when it has not begun.

    `elsewhere` says that another machine runs it, or ran it: then only Prefect's view of it can be followed.
    """

    run_id: UUID
    url: str | None
    ui_url: str | None
    live: Path
    elsewhere: bool
    kept: Location | None = field(repr=False)

    def read(self) -> Iterator[bytes]:
        """The log as it is now, from the beginning."""
        if self.live.exists():
            yield from _read_file(self.live)
        else:
            yield from self._read_kept()

    def tail(self, count: int) -> Iterator[bytes]:
        """The last lines of the log as it is now."""
        kept = b""
        for chunk in self.read():
            kept = b"".join(split_lines(kept + chunk)[-count:]) if count else b""
        yield kept

    def _read_kept(self) -> Iterator[bytes]:
        if self.kept is not None:
            # Where the store does not have it, or does not answer, Prefect's view is better than nothing.
            with suppress(DatasetError):
                yield from stores.read_file(self.kept, "log.txt")
                return
        yield from _view_of(self.run_id)


def split_lines(data: bytes) -> list[bytes]:
    """The lines with their ends. A carriage return ends none: it is how progress bars stay on theirs."""
    return re.findall(rb"[^\n]*\n|[^\n]+", data)


def open_log(run: str, settings: Settings) -> LogSource:
    """The log of the run with this id or name (of several of the same name, the newest).

    Raises:
        DescriptionError: there is no such run.
    """
    flow_run = _find(run)
    told = {name: str(value) for name, value in flow_run.labels.items()}
    url, store, host = told.get(LABEL_OUTPUT), told.get(LABEL_STORE), told.get(LABEL_HOST)
    return LogSource(
        run_id=flow_run.id,
        url=url,
        ui_url=url_for(flow_run) if get_current_settings().api.url or get_current_settings().ui_url else None,
        live=Workspace(settings.workspaces / str(flow_run.id)).log,
        elsewhere=host is not None and host != socket.gethostname(),
        kept=Location(url, options_of(documents.find(DatasetStore, store) if store else None)) if url else None,
    )


def follow(source: LogSource) -> Iterator[bytes]:
    """The log from its beginning until the run has ended, as it grows."""
    if source.elsewhere:
        yield from _follow_view(source.run_id)
        return
    while not source.live.exists():
        if _ended(source.run_id):
            yield from source.read()
            return
        time.sleep(_POLL_SECONDS)
    with source.live.open("rb") as file:
        while True:
            # Ended is asked for before the last look, so that nothing written in between is missed.
            ended = _ended(source.run_id)
            while chunk := file.read(_CHUNK):
                yield chunk
            if ended:
                return
            time.sleep(_POLL_SECONDS)


def begin_again(run: str, flow: Flow[..., Any], parameters: Mapping[str, Any], settings: Settings) -> State[Any]:
    """Go on with a run of `flow` in this process, as Prefect's retry does on a worker; return what becomes of it.

    Raises:
        DescriptionError: there is no such run, or it is another flow's.
        RunInUse: somebody works on it.
    """
    flow_run = _find(run)
    with get_client(sync_client=True) as client:
        name = client.read_flow(flow_run.flow_id).name
    if name != flow.name:
        raise DescriptionError(f"The run {run} is one of {name!r}, and not of {flow.name!r}. Give the id of a batch.")
    workspace = Workspace(settings.workspaces / str(flow_run.id))
    with lease.taken(workspace.lease, 0) as free:
        held = not free and not lease.missing(workspace.lease)
    elsewhere = str(flow_run.labels.get(LABEL_HOST, socket.gethostname())) != socket.gethostname()
    if held or (elsewhere and flow_run.state is not None and not flow_run.state.is_final()):
        raise RunInUse(
            f"Somebody works on the run {run}, on {flow_run.labels.get(LABEL_HOST)}. Wait for it, or cancel it first."
        )
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, Scheduled(name="AwaitingRetry"), force=True)
        flow_run = client.read_flow_run(flow_run.id)
    return cast(State[Any], run_flow(flow, flow_run=flow_run, parameters=dict(parameters), return_type="state"))


def _find(run: str) -> FlowRun:
    with get_client(sync_client=True) as client:
        try:
            wanted = FlowRunFilter(id={"any_": [UUID(run)]})  # type: ignore[arg-type]  # pydantic makes the filter of the dict
        except ValueError:
            wanted = FlowRunFilter(name=FlowRunFilterName(any_=[run]))
        found = client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)
    if not found:
        raise DescriptionError(f"There is no run {run!r}. `prefect flow-run ls` lists them.")
    return found[0]


def _ended(run_id: UUID) -> bool:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run_id).state
    return state is not None and state.is_final()


def _follow_view(run_id: UUID) -> Iterator[bytes]:
    seen = 0
    while True:
        ended = _ended(run_id)
        for line in _view_of(run_id, seen):
            seen += 1
            yield line
        if ended:
            return
        time.sleep(_POLL_SECONDS)


def _view_of(run_id: UUID, start: int = 0) -> Iterator[bytes]:
    """What Prefect shows of the container's log, from the record `start` on; what the steps say themselves is left empty."""
    with get_client(sync_client=True) as client:
        wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]))
        while page := client.read_logs(log_filter=wanted, sort=LogSort.TIMESTAMP_ASC, offset=start, limit=200):
            for line in page:
                yield line.message.encode() + b"\n" if line.name.endswith(f".{VIEW_LOGGER}") else b""
            start += len(page)


def _read_file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
