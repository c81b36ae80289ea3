"""The engine that this machine's settings name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect_docker.host import DockerHost

from .engines import Engine
from .errors import DescriptionError
from .settings import Settings

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


@contextmanager
def stand_in(engine: Engine) -> Iterator[None]:
    """Let every run of this process use `engine` until the block ends, whatever the settings say."""
    global _stand_in
    before, _stand_in = _stand_in, engine
    try:
        yield
    finally:
        _stand_in = before
