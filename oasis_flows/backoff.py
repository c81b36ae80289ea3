"""A shorter pause before what a Prefect server on SQLite refused for a moment is asked again.

Such a server answers 503 when two requests write at once, which is over in milliseconds. Prefect's client then sleeps for two seconds, and twice as
long each time. So the first few such answers are made to say when to come again, and that they do not count: what a server under maintenance says.
From then on Prefect's own patience begins, of two minutes. Where somebody has turned that off, nothing is asked again.
"""

from __future__ import annotations

from contextlib import suppress

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES

# Where two runs write all the time, every third request for a document meets one, and some meet five in a row.
_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5)
_COUNT = "oasis_flows_refused"


def shorten(client: SyncPrefectClient) -> None:
    """Let this client ask again soon. Where a later Prefect keeps its HTTP client elsewhere, it sleeps as ever."""
    with suppress(AttributeError):
        hooks = client._client.event_hooks
        if _soon not in hooks["response"]:
            client._client.event_hooks = {**hooks, "response": [*hooks["response"], _soon]}


def _soon(response: httpx.Response) -> None:
    refused = response.status_code == httpx.codes.SERVICE_UNAVAILABLE and "Retry-After" not in response.headers
    if refused and PREFECT_CLIENT_MAX_RETRIES.value() > 0:
        count = response.request.extensions.get(_COUNT, 0)
        if count < len(_SECONDS):
            response.request.extensions[_COUNT] = count + 1
            response.headers["Retry-After"] = str(_SECONDS[count])
            response.headers["Prefect-Maintenance"] = "true"
