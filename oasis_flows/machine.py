"""The engine that this machine's settings name, and the machines that batches run on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect_docker.host import DockerHost

from .capacity import Node
from .engines import Engine, ImageEngine
from .errors import DescriptionError, UnsupportedByEngine
from .settings import Settings
from .snapshots import nodes_in

_stand_in: Engine | None = None


def open_engine(settings: Settings) -> Engine:
    """The engine, not yet asked whether it answers.

    Raises:
        DescriptionError: the settings name an engine or a document that does not exist.
    """
    if _stand_in is not None:
        return _stand_in
    if settings.engine != "docker":
        raise DescriptionError(f"There is no engine {settings.engine!r} in this version. Set OASIS_FLOWS_ENGINE to docker.")
    from .engines.docker import DockerEngine, connect

    if settings.docker_host is None:
        return DockerEngine(connect)
    try:
        host = DockerHost.load(settings.docker_host)
    except ValueError:
        raise DescriptionError(
            f"There is no docker-host document {settings.docker_host!r}, which OASIS_FLOWS_DOCKER_HOST names. "
            "Make it in the Prefect UI, or unset the variable to use the machine's own engine."
        ) from None
    return DockerEngine(host.get_client)


def image_engine(settings: Settings) -> ImageEngine:
    """The engine, if it can make images out of containers.

    Raises:
        UnsupportedByEngine: it cannot.
        DescriptionError: as `open_engine`.
    """
    engine = open_engine(settings)
    if not isinstance(engine, ImageEngine):
        raise UnsupportedByEngine(
            "The engine cannot make images out of containers, and trains travel as such. Use a Docker engine."
        )
    return engine


def nodes_now(settings: Settings, without: str | None = None) -> tuple[Node, ...]:
    """What there is to run containers on now; of the run `without` nothing is counted as requested.

    Raises:
        DescriptionError: the file that the settings name cannot be read, or is no snapshot.
        EngineUnavailable: the engine does not answer.
    """
    if settings.capacity is None:
        return open_engine(settings).nodes(without=without)
    return read_nodes(settings.capacity)


def read_nodes(path: Path) -> tuple[Node, ...]:
    """The nodes in a file with a snapshot, whose shape is one of those that `snapshots` knows.

    Raises:
        DescriptionError: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DescriptionError(
            f"The snapshot of the capacity {path} cannot be read. Give a file of JSON. The cause: {error}"
        ) from error
    return nodes_in(content)


@contextmanager
def stand_in(engine: Engine) -> Iterator[None]:
    """Let every run of this process use `engine` until the block ends, whatever the settings say."""
    global _stand_in
    before, _stand_in = _stand_in, engine
    try:
        yield
    finally:
        _stand_in = before
