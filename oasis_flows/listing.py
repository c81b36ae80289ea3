"""Prerequisites as people look at them before anything runs: the tree, the order, the commands, the storages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .command import as_text
from .item import EVENTS
from .prerequisites import Resolution, Step

_WHEN = {
    "taskStarts": "before the algorithm",
    "taskSucceeds": "after it has succeeded",
    "taskFails": "after it has failed",
    "taskEnds": "after it, at the end",
}


def lines(algorithm: str, found: Resolution) -> Iterator[str]:
    """The resolution, a line each. What is required twice stands in the tree where it was required first."""
    yield algorithm
    yield from _tree(found, (algorithm,))
    for event in EVENTS:
        callbacks = [(step, callback) for step, callback in found.callbacks if callback.event == event]
        if callbacks:
            yield f"{_WHEN[event]}:"
        for step, callback in callbacks if event == "taskStarts" else reversed(callbacks):
            yield f"  {step.item.name}{', whose failure is ignored' if step.item.ignores_failure else ''}"
            yield from (f"    {line}" for command in callback.commands for line in command.rstrip("\n").split("\n"))
    if found.storages:
        yield "storages:"
    yield from (f"  {s.name} at {s.path}, {'read-only' if s.read_only else 'writable'}" for s in found.storages)


def as_json(algorithm: str, found: Resolution) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "algorithm": algorithm,
        "items": [
            {
                "name": step.item.name,
                "uri": step.uri,
                "source": step.source,
                "sha256": step.sha256,
                "required_by": list(step.chain[:-1]),
                "template_variables": dict(step.variables),
                "callbacks": [{"event": c.event, "commands": list(c.commands)} for c in step.callbacks],
            }
            for step in found.steps
        ],
        "storages": [{"name": s.name, "mountPath": s.path, "readOnly": s.read_only} for s in found.storages],
    }


def _tree(found: Resolution, chain: tuple[str, ...]) -> Iterator[str]:
    for number, step in enumerate(found.steps, 1):
        if step.chain[:-1] == chain:
            yield f"{'  ' * len(chain)}{number}. {step.item.name}{_values(step)}, from {step.source}"
            yield from _tree(found, step.chain)


def _values(step: Step) -> str:
    given = ", ".join(f"{name}={as_text(value)!r}" for name, value in step.variables.items())
    return f" ({given})" if given else ""
