"""The engine that this machine's settings name, and the machines that batches run on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect_docker.credentials import DockerRegistryCredentials
from prefect_docker.host import DockerHost

from . import reservations
from .capacity import Node, Vector
from .engines import Engine, ImageEngine
from .errors import DescriptionError, UnsupportedByEngine
from .job import RegistryLogin
from .settings import Settings
from .snapshots import GPU_RESOURCE, GPU_TOLERATIONS, nodes_in

logger = logging.getLogger(__name__)

_stand_in: Engine | None = None
_kubernetes_engines: dict[str, Engine] = {}


def open_engine(settings: Settings) -> Engine:
    """The engine, not yet asked whether it answers.

    Raises:
        DescriptionError: the settings name an engine or a document that does not exist.
    """
    if _stand_in is not None:
        return _stand_in
    if settings.engine == "kubernetes":
        return _kubernetes_engine(settings)
    if settings.engine != "docker":
        raise DescriptionError(
            f"There is no engine {settings.engine!r} in this version. Set OASIS_FLOWS_ENGINE to docker or kubernetes."
        )
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


def _kubernetes_engine(settings: Settings) -> Engine:
    """The one engine of these settings in this process: all that it runs share a watch."""
    from .engines.kube_access import find_access, from_content
    from .engines.kube_image import Repository
    from .engines.kubernetes import KubernetesEngine
    from .engines.pod import Place

    here = settings.kubernetes
    made = _kubernetes_engines.get(repr((here, settings.home)))
    if made is not None:
        return made
    access = find_access
    if here.credentials is not None:
        content, context = _cluster_config(here.credentials)
        access = partial(from_content, content, context)
    images = None
    if here.registry is not None:
        images = Repository.parse(here.registry, _login(here.registry_credentials) if here.registry_credentials else None)
    owner = {"apiVersion": "v1", "kind": "Pod", "name": here.pod[0], "uid": here.pod[1]} if here.pod else None
    place = Place(
        namespace=here.namespace,
        claim=here.claim,
        home=settings.home,
        node=here.node,
        owner=owner,
        gpu_resource=str(here.gpu.get("resource") or GPU_RESOURCE),
        gpu_node_selector=here.gpu.get("nodeSelector") or {},
        gpu_tolerations=tuple(here.gpu.get("tolerations") or GPU_TOLERATIONS),
        ephemeral_bytes=here.ephemeral_bytes,
        pending_seconds=here.pending_seconds,
        carrier=here.carrier,
    )
    made = KubernetesEngine(place, access, images=images, tell=_tell, grows=here.grows)
    return _kubernetes_engines.setdefault(repr((here, settings.home)), made)


_show: ContextVar[Callable[[str], None] | None] = ContextVar("show", default=None)


@contextmanager
def telling(show: Callable[[str], None]) -> Iterator[None]:
    """Let what an engine says of its waiting be shown by `show`, too, until the block ends."""
    token = _show.set(show)
    try:
        yield
    finally:
        _show.reset(token)


def _tell(line: str) -> None:
    """Show a line in the run's log, and on its page, where there is a run."""
    try:
        get_run_logger().info("%s", line)
    except MissingContextError:
        logger.info("%s", line)
    else:
        if show := _show.get():
            show(line)


def _cluster_config(document: str) -> tuple[dict[str, Any], str | None]:
    """The kubeconfig in a `kubernetes-credentials` document, and the context to take."""
    try:
        from prefect_kubernetes.credentials import KubernetesCredentials
    except ImportError as error:
        raise DescriptionError(
            "OASIS_FLOWS_KUBERNETES_CREDENTIALS names a document of prefect-kubernetes, which is not installed. "
            "Install oasis-flows[kubernetes]."
        ) from error
    try:
        found = KubernetesCredentials.load(document)
    except ValueError:
        raise DescriptionError(
            f"There is no kubernetes-credentials document {document!r}, which OASIS_FLOWS_KUBERNETES_CREDENTIALS names. Make it in the "
            "Prefect UI, or unset the variable to use KUBECONFIG, or the cluster that this runs in."
        ) from None
    if found.cluster_config is None:
        raise DescriptionError(
            f"The kubernetes-credentials document {document!r} has no cluster config. Give it one, or unset OASIS_FLOWS_KUBERNETES_CREDENTIALS."
        )
    return dict(found.cluster_config.config), found.cluster_config.context_name


def _login(document: str) -> RegistryLogin:
    try:
        found = DockerRegistryCredentials.load(document)
    except ValueError:
        raise DescriptionError(
            f"There is no docker-registry-credentials document {document!r}, which OASIS_FLOWS_KUBERNETES_REGISTRY_CREDENTIALS names. "
            "Make it in the Prefect UI."
        ) from None
    return RegistryLogin(registry=found.registry_url, username=found.username, password=found.password.get_secret_value())


def nodes_now(settings: Settings, without: str | None = None) -> tuple[Node, ...]:
    """What there is to run containers on now; of the run `without` nothing is counted as requested.

    What other batches have reserved counts, where there is one machine. Among many, their scheduler is the judge.

    Raises:
        DescriptionError: the file that the settings name cannot be read, or is no snapshot.
        EngineUnavailable: the engine does not answer.
    """
    others = {} if settings.engine == "kubernetes" else reservations.reserved(settings.workspaces, without)
    if settings.capacity is not None:
        nodes = read_nodes(settings.capacity)
    else:
        nodes = open_engine(settings).nodes(without=[*others, *([without] if without else [])])
    if len(nodes) != 1:
        return nodes
    requested = reduce(Vector.plus, others.values(), nodes[0].requested)
    return (replace(nodes[0], requested=requested),)


def grows(settings: Settings) -> bool:
    """Are machines made when they are needed? Then there are more than `nodes_now` can tell."""
    return settings.engine == "kubernetes" and settings.kubernetes.grows and settings.capacity is None


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
