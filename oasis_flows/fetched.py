"""Images that a run fetched for itself alone: its workspace names them before they come, so that they go however it ends."""

from __future__ import annotations

from .engines import ImageEngine
from .job import ImageSource
from .workspace import Workspace

_NOTE = "fetched"


def fetch(engine: ImageEngine, source: ImageSource, workspace: Workspace) -> str:
    """Prepare an image, and note it in the workspace if the engine does not have it; raises as `Engine.prepare`."""
    name = str(source.image_id)
    if engine.content(name) is None:
        workspace.mark_done(_NOTE, {"images": sorted({*fetched(workspace), name})})
    return engine.prepare(source)


def fetched(workspace: Workspace) -> tuple[str, ...]:
    """The names of what the run fetched, in this attempt or an earlier one, and did not drop."""
    return tuple((workspace.done(_NOTE) or {}).get("images", ()))


def drop(engine: ImageEngine, name: str, workspace: Workspace) -> None:
    """Take an image out of the engine that this run fetched."""
    engine.forget(name)
    # From now on it is somebody else's, where it is there.
    if name in (names := fetched(workspace)):
        workspace.mark_done(_NOTE, {"images": [each for each in names if each != name]})
