"""Run container images on datasets with Prefect.

The names below are the package; each is imported when it is first used, because Prefect takes seconds to import and not
everybody who imports this needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .blocks import Algorithm, Dataset, DatasetStore, DockerImage, Prerequisite, Station
    from .errors import AlgorithmFailed, DatasetError, DescriptionError, EngineError, OasisError
    from .flows.algorithm_task import algorithm_task
    from .flows.batch import batch
    from .flows.train import train
    from .flows.train_route import train_route

__all__ = [
    "Algorithm",
    "AlgorithmFailed",
    "Dataset",
    "DatasetError",
    "DatasetStore",
    "DescriptionError",
    "DockerImage",
    "EngineError",
    "OasisError",
    "Prerequisite",
    "Station",
    "algorithm_task",
    "batch",
    "train",
    "train_route",
]

_HOMES = {
    "blocks": ("Algorithm", "Dataset", "DatasetStore", "DockerImage", "Prerequisite", "Station"),
    "errors": ("AlgorithmFailed", "DatasetError", "DescriptionError", "EngineError", "OasisError"),
    "flows.algorithm_task": ("algorithm_task",),
    "flows.batch": ("batch",),
    "flows.train": ("train",),
    "flows.train_route": ("train_route",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
