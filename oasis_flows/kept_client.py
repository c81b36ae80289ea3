"""One client of the Prefect server for all calls of flows in a thread.

Prefect makes a client for each flow run: a TLS context, also where the server speaks plain HTTP, a connection, and two questions before
the first request. A program that calls many flows pays that, 70 ms, each time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.context import SyncClientContext
from prefect.settings import Settings, get_current_settings

from . import backoff


@dataclass(frozen=True, slots=True)
class _Kept:
    """A client, and what it is for: settings, and process, for a fork must not share its connection."""

    settings: Settings
    process: int
    client: SyncPrefectClient


_of_thread = threading.local()


def kept() -> AbstractContextManager[object]:
    """Have the flows that are called in the block use this thread's client, unless the caller has one in use already."""
    settings = get_current_settings()
    # Where no address is set, Prefect starts a server of its own, and it must be free to start another.
    if SyncClientContext.get() is not None or settings.api.url is None:
        return nullcontext()
    return _using(_client(settings))


def _client(settings: Settings) -> SyncPrefectClient:
    known: _Kept | None = getattr(_of_thread, "kept", None)
    if known is None or known.process != os.getpid() or not _alike(known.settings, settings):
        client = get_client(sync_client=True)
        # It stays open until its thread ends.
        client.__enter__()
        backoff.shorten(client)
        known = _of_thread.kept = _Kept(settings, os.getpid(), client)
    return known.client


def _alike(one: Settings, other: Settings) -> bool:
    return one is other or (one.api == other.api and one.client == other.client)


@contextmanager
def _using(client: SyncPrefectClient) -> Iterator[None]:
    # Its constructor would make a client.
    with SyncClientContext.model_construct(client=client):
        yield
