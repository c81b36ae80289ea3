"""A run's sign of life, given by us where Prefect's own would hold up the run's end.

Prefect's thread for it sleeps in whole seconds, and the end of a flow run waits for that thread. A run in a process of its own does
not care; one that is a call in somebody's program would end a second late. So for such a call Prefect's is turned off, and
the same event is sent as often by a thread that wakes up at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context

from prefect import runtime
from prefect.context import SettingsContext
from prefect.events import emit_event
from prefect.settings import Settings, get_current_settings

EVENT = "prefect.flow-run.heartbeat"

_ours_seconds: ContextVar[int | None] = ContextVar("oasis_flows_heartbeat_seconds", default=None)


@contextmanager
def ours() -> Iterator[None]:
    """Turn Prefect's heartbeat off for flows that begin in the block; `beating` makes up for it, as often as the settings say."""
    context = SettingsContext.get()
    seconds = get_current_settings().flows.heartbeat_frequency
    if context is None or seconds is None:
        yield
        return
    token = _ours_seconds.set(seconds)
    try:
        with SettingsContext(profile=context.profile, settings=_without(context.settings)):
            yield
    finally:
        _ours_seconds.reset(token)


_last: tuple[Settings, Settings] | None = None


def _without(settings: Settings) -> Settings:
    """The settings without the heartbeat; the same object as long as they are the same."""
    global _last
    known = _last
    if known is None or known[0] is not settings:
        # Prefect's own `temporary_settings` validates all settings anew, which takes a tenth of a second.
        flows = settings.flows.model_copy(update={"heartbeat_frequency": None})
        known = _last = (settings, settings.model_copy(update={"flows": flows}))
    return known[1]


@contextmanager
def beating() -> Iterator[None]:
    """Give the signs of life of the flow run that this thread is in, until the block ends, where `ours` turned Prefect's off."""
    seconds = _ours_seconds.get()
    if seconds is None:
        yield
        return
    over, lock = threading.Event(), threading.Lock()
    resource = {
        "prefect.resource.id": f"prefect.flow-run.{runtime.flow_run.id}",
        "prefect.resource.name": str(runtime.flow_run.name),
    }

    def beat() -> None:
        while not over.wait(seconds):
            with lock:
                if not over.is_set():
                    emit_event(EVENT, resource=resource)

    # None may come behind the run's end: an automation would wait for the next one, and call the run crashed.
    emit_event(EVENT, resource=resource)
    # The event's way to the server is found by the context's settings.
    threading.Thread(target=copy_context().run, args=(beat,), name="oasis-heartbeat", daemon=True).start()
    try:
        yield
    finally:
        with lock:
            over.set()
