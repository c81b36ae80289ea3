"""The reaper as a flow, for a schedule."""

from __future__ import annotations

from dataclasses import asdict

from prefect import flow
from prefect.logging import get_run_logger

from .. import reaper, settings


@flow(name="reap")
def reap() -> dict[str, tuple[str, ...]]:
    """Remove what dead runs left on the worker's machine, and mark them as crashed; see `oasis-flows reap`.

    Returns:
        Lists of run ids: `containers` and `workspaces` that were removed, and `runs` that were marked; and of names: the
        `caches` of prerequisites that were removed, for nobody had used them for long.
    """
    reaped = reaper.reap(settings.current())
    get_run_logger().info("Removed %d containers and %d workspaces.", len(reaped.containers), len(reaped.workspaces))
    return asdict(reaped)
