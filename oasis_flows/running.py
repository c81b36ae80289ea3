"""Where the log of a run is, while it runs and afterwards.

While it runs: in the workspace, for those on the same machine. Afterwards: beside its output in the store. In between, for
those on another machine: the view that Prefect has of it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort, LogSort
from prefect.settings import get_current_settings
from prefect.utilities.urls import url_for

from . import documents, store as stores
from .blocks import DatasetStore
from .errors import DatasetNotFound, DescriptionError
from .flows.algorithm_task import LABEL_HOST, LABEL_OUTPUT
from .plan import options_of
from .settings import Settings
from .store import Location
from .workspace import Workspace

_POLL_SECONDS = 0.5
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSource:
    """The log of one run. `url` is where its output is or will be; `None` when it has not begun."""

    run_id: UUID
    url: str | None
    ui_url: str | None
    live: Path
    elsewhere: str | None
    kept: Location | None = field(repr=False)

    def read(self) -> Iterator[bytes]:
        """The log as it is now, from the beginning."""
        if self.live.exists():
            yield from _read_file(self.live)
        else:
            yield from self._read_kept()

    def tail(self, lines: int) -> Iterator[bytes]:
        """The last lines of the log as it is now."""
        kept = b""
        for chunk in self.read():
            kept = b"".join((kept + chunk).splitlines(keepends=True)[-lines:]) if lines else b""
        yield kept

    def _read_kept(self) -> Iterator[bytes]:
        if self.kept is not None:
            try:
                yield from stores.read_file(self.kept, "log.txt")
                return
            except DatasetNotFound:
                pass
        yield from _view_of(self.run_id)


def open_log(run: str, settings: Settings) -> LogSource:
    """The log of the run with this id or name (of several of the same name, the newest).

    Raises:
        DescriptionError: there is no such run.
    """
    flow_run = _find(run)
    output = flow_run.labels.get(LABEL_OUTPUT)
    host = flow_run.labels.get(LABEL_HOST)
    url = str(output) if output else None
    return LogSource(
        run_id=flow_run.id,
        url=url,
        ui_url=url_for(flow_run) if get_current_settings().api.url or get_current_settings().ui_url else None,
        live=Workspace(settings.workspaces / str(flow_run.id)).log,
        elsewhere=str(host) if host and host != socket.gethostname() else None,
        kept=Location(url, options_of(_store_of(flow_run))) if url else None,
    )


def follow(source: LogSource) -> Iterator[bytes]:
    """The log from its beginning until the run has ended, as it grows."""
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


def _store_of(flow_run: FlowRun) -> DatasetStore | None:
    """The store that the run was given: by reference, by name, or none (then the default one)."""
    given: Any = flow_run.parameters.get("store")
    if isinstance(given, str):
        return documents.find(DatasetStore, given)
    reference = given.get("$ref", given) if isinstance(given, dict) else None
    if isinstance(reference, dict) and "block_document_slug" in reference:
        return documents.find(DatasetStore, str(reference["block_document_slug"]).split("/", 1)[1])
    if isinstance(reference, dict) and "block_document_id" in reference:
        reference = reference["block_document_id"]
    if isinstance(reference, str):
        found = Block.load_from_ref({"block_document_id": reference})
        return found if isinstance(found, DatasetStore) else None
    return documents.find(DatasetStore, "default") if given is None else None


def _view_of(run_id: UUID) -> Iterator[bytes]:
    """What Prefect shows of the container's log."""
    with get_client(sync_client=True) as client:
        offset = 0
        wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]))
        while page := client.read_logs(log_filter=wanted, sort=LogSort.TIMESTAMP_ASC, offset=offset, limit=200):
            for line in page:
                if line.task_run_id is not None:
                    yield line.message.encode() + b"\n"
            offset += len(page)


def _read_file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
