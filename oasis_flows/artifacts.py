"""What people see of a run in Prefect: its page, its output files, how far a long transfer is, and a failure's code.

What Prefect does not take changes nothing about what becomes of the run: a warning says so, once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import SyncPrefectClient
from prefect.events import emit_event
from prefect.logging import get_run_logger

from .documents import await_server
from .errors import OasisError
from .job import counted, human_bytes
from .manifest import Entry, Summary
from .store import MANIFEST, read_manifest
from .verdict import Verdict

PAGE, FILES, SHARD_TABLE, WAITING = "oasis-run", "oasis-output", "oasis-batch", "oasis-waiting"
DIFFERENCE = "oasis-train-difference"
FAILED_EVENT, FAILED_TAG = "oasis-flows.run.failed", "failed:"
MOST_FILES = 500
_PATIENCE_SECONDS = 3.0


def show_page(text: str, about: str) -> None:
    """Show a page in Markdown as the run's; `about` is what lists of artifacts say of it. A server that is away is waited for."""
    show = partial(create_markdown_artifact, text, key=PAGE, description=about)
    with harmless("The run's page"):
        try:
            show()
        except (httpx.TransportError, httpx.HTTPStatusError):
            await_server()
            show()


def first_files(manifest: Path) -> tuple[Entry, ...]:
    """As many of a manifest's entries as are shown; the others are not read. None, where it cannot be read."""
    try:
        return tuple(islice(read_manifest(manifest), MOST_FILES))
    except OasisError:
        return ()


def show_files(files: Sequence[Entry], published: Summary, url: str, *, whole: bool, folder: str = "data") -> None:
    """Show the published files, which are in a `folder` of `url`, as a table. `whole`: they are a dataset, and have a manifest."""
    if not files:
        return
    rows = [{"file": file.path, "size": human_bytes(file.bytes), "sha256": (file.sha256 or "")[:12]} for file in files]
    about = f"{counted(published.file_count, 'file')}, {human_bytes(published.size_bytes)}, in `{url}/{folder}`."
    more = published.file_count - len(files)
    if more:
        rest = f"all are listed in `{url}/{MANIFEST}`" if whole else f"see `{url}/{folder}` for all"
        about = f"{about} The first {len(files)} are shown, {more} more are not: {rest}."
    with harmless("The list of output files"):
        create_table_artifact(rows, key=FILES, description=about)


def show_shards(rows: Sequence[Mapping[str, Any]], all_rows: int) -> None:
    """Show the shards of a batch as a table; `all_rows` is how many there are, more than are shown perhaps."""
    if rows:
        about = (
            f"{all_rows} shards. The first {len(rows)} are shown, failed ones first."
            if len(rows) < all_rows
            else f"{all_rows} shards."
        )
        with harmless("The list of shards"):
            create_table_artifact([dict(row) for row in rows], key=SHARD_TABLE, description=about)


def show_waiting(text: str) -> None:
    """Show what a run or a batch waits for, or that it waits no longer."""
    with harmless("What the run waits for"):
        create_markdown_artifact(text, key=WAITING, description=text.partition(":")[0])


class Waiting:
    """Tells, in the run's log and among its artifacts, what a batch waits for, and that it goes on: once each."""

    def __init__(self, look_seconds: float) -> None:
        self._look_seconds, self._waits = look_seconds, False

    def tell(self, what: str) -> None:
        """Say what is waited for; nothing (`""`) where it goes on."""
        if bool(what) is not self._waits:
            text = (
                f"The batch waits: {what}. It looks again every {self._look_seconds:g} seconds."
                if what
                else "The batch goes on."
            )
            get_run_logger().warning("%s", text)
            show_waiting(text)
        self._waits = bool(what)


def show_difference(rows: Sequence[Mapping[str, Any]], about: str) -> None:
    """Show what a train would carry away as a table."""
    with harmless("What the train carries away"):
        create_table_artifact([dict(row) for row in rows], key=DIFFERENCE, description=about)


def tell_failure(client: SyncPrefectClient, run_id: UUID, name: str, verdict: Verdict) -> None:
    """Let automations know the code: by an event of ours, and by a tag that Prefect's own events of the run carry."""
    resource = {
        "prefect.resource.id": f"prefect.flow-run.{run_id}",
        "prefect.resource.name": name,
        "oasis.code": verdict.code,
        "oasis.stage": verdict.stage,
        "oasis.blame": str(verdict.blame),
        "oasis.transient": str(verdict.transient).lower(),
    }
    emit_event(FAILED_EVENT, resource=resource, payload=verdict.to_json())
    tags = {*client.read_flow_run(run_id).tags, f"{FAILED_TAG}{verdict.code}"}
    client.update_flow_run(run_id, tags=sorted(tags))


class TransferBar:
    """A bar for one transfer, which appears when that takes longer than three seconds.

    It moves once a second at most, and ends at 100 % when all files are done.
    """

    def __init__(self, step: str) -> None:
        self._step = step
        self._began = time.monotonic()
        self._moved = 0.0
        self._shown: float | None = None
        self._artifact: UUID | None = None
        self._given_up = False

    def move(self, files: int, all_files: int, bytes: int, all_bytes: int) -> None:
        """Say how far the transfer is."""
        now, done = time.monotonic(), files == all_files
        if self._artifact is None and (done or self._given_up or now - self._began < _PATIENCE_SECONDS):
            return
        percent = 100.0 if done else float(min(99, 100 * bytes // all_bytes if all_bytes else 100 * files // all_files))
        if percent == self._shown or (not done and (self._given_up or now - self._moved < 1.0)):
            return
        # A server that stalls may take minutes to refuse. It is asked once more at the end, so that no bar stays short of it.
        warned, self._given_up = self._given_up, True
        with suppress(Exception) if warned else harmless("The progress of a transfer"):
            if self._artifact is None:
                key = f"oasis-{self._step.replace('_', '-')}"
                made = create_progress_artifact(percent, key=key, description=self._step.replace("_", " "))
                self._artifact = cast(UUID, made)
            else:
                update_progress_artifact(self._artifact, percent)
            self._given_up = False
        self._moved, self._shown = time.monotonic(), percent


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Warn that `what` could not be shown, rather than fail."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # see the module
        get_run_logger().warning("%s could not be shown in Prefect: %s", what, error)
