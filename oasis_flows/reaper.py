"""The last ring of cleanup: removes what runs left whose process is gone.

Everything else cleans up after itself; only a process that was killed outright, and a worker that was told to stop, leave
something for this. It trusts leases alone (see `lease`) and has a lease locked while it removes what that covers, so it
never touches what somebody works on: a container that another machine started, and whatever this user may not look at, is
left to its own reaper.
"""

from __future__ import annotations

from . import workspace
from .machine import open_engine
from .settings import Settings

GRACE_SECONDS = 60.0


def reap(settings: Settings, grace_seconds: float = GRACE_SECONDS) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Remove containers that nobody owns and workspaces that nobody came back for; return the run ids of both.

    Only what is really gone is returned.

    A dead run's container may stay for `grace_seconds`, its workspace for the setting `OASIS_FLOWS_KEEP_HOURS`, so that a
    retry finds them.

    Raises:
        EngineUnavailable: nobody can tell which containers there are.
    """
    containers = open_engine(settings).reap(grace_seconds=grace_seconds, below=settings.workspaces)
    return containers, workspace.reap(settings.workspaces, settings.keep_seconds)
