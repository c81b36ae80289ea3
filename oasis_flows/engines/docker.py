"""The Docker engine, or whatever answers its API (Podman's service does)."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import IO, TYPE_CHECKING, Any

from .. import lease
from ..capacity import Node
from ..errors import EngineUnavailable
from ..job import ContainerExit, ContainerJob, ImageSource, LogSink, RegistryLogin, human_bytes
from ..lineage import Content
from ..snapshots import docker_node
from . import AtEnd, Description, docker_image, docker_layer, docker_run, docker_spec as spec
from .docker_errors import HOW_TO_GET_AN_ENGINE, translated

if TYPE_CHECKING:
    from docker import DockerClient

__all__ = ["DockerEngine", "connect"]

_OLDEST_API = "1.41"
# An engine that is set up otherwise was away meanwhile, for longer than this.
_INFO_SECONDS = 5.0


def connect() -> DockerClient:
    """A client of the first engine that answers: `DOCKER_HOST` if it is set, else Docker's sockets, else Podman's.

    Raises:
        EngineUnavailable: none answers; the message says what was tried and how to get one.
    """
    import docker

    if os.environ.get("DOCKER_HOST"):
        with translated(f"connecting to DOCKER_HOST={os.environ['DOCKER_HOST']}"):
            return _speaking_its_version(docker.from_env)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    rootless = [f"{runtime}/docker.sock", f"{runtime}/podman/podman.sock"] if runtime else []
    sockets = ["/var/run/docker.sock", *rootless, "/run/podman/podman.sock"]
    tried = []
    for socket in sockets:
        if not Path(socket).exists():
            tried.append(f"{socket}: not there")
            continue
        try:
            with translated(f"connecting to {socket}"):
                return _speaking_its_version(partial(docker.DockerClient, base_url=f"unix://{socket}"))
        except EngineUnavailable as error:
            tried.append(f"{socket}: {error.__cause__}")
    raise EngineUnavailable(f"No container engine answers. {HOW_TO_GET_AN_ENGINE} Tried {'; '.join(tried)}")


def _speaking_its_version(client: Callable[..., DockerClient]) -> DockerClient:
    """A client of the engine's own version of the API.

    The SDK's "auto" asks for `/version`, for which an engine starts three programs; its answer to a ping tells, too.
    """
    with closing(client(version=_OLDEST_API)) as asking:
        _without_proxies(asking.api)
        answer = asking.api.get(f"{asking.api.base_url}/_ping", timeout=asking.api.timeout)
    answer.raise_for_status()
    return client(version=answer.headers.get("Api-Version", "auto"))


def _without_proxies(api: Any) -> None:
    # None stands before a socket of this machine, and looking for one takes a third of the time of a request.
    api.trust_env &= not api.base_url.startswith("http+docker:")


def _info(api: Any) -> Mapping[str, Any]:
    """What the engine says about itself, not older than some seconds: it starts three programs to say it."""
    # All sockets have one address.
    engine = getattr(api.get_adapter(api.base_url), "socket_path", api.base_url)
    known = _infos.get(engine)
    if known is None or time.monotonic() - known[0] > _INFO_SECONDS:
        known = _infos[engine] = (time.monotonic(), api.info())
    return known[1]


_infos: dict[str, tuple[float, Mapping[str, Any]]] = {}


class DockerEngine:
    """Implements `Engine` and `ImageEngine` with the Docker Engine API, from version 1.41 (Docker 20.10) on.

    Safe to share between threads: every call opens a client of its own and closes it.

    Args:
        connect: makes a client; prefect-docker's `DockerHost.get_client` fits.
        spool: folder for image files while they are downloaded; the system's temporary folder by default.
        patience_seconds: how long a run waits for an engine that went away meanwhile.
    """

    def __init__(
        self,
        connect: Callable[[], DockerClient] = connect,
        *,
        spool: Path | None = None,
        patience_seconds: float = 60.0,
    ) -> None:
        self._connect = connect
        self._spool = spool
        self._patience = patience_seconds

    def prepare(self, image: ImageSource) -> str:
        """Pull or load the image unless the engine has it; return `repository@sha256:…`, or `sha256:…`, its id.

        An image that is present under its name is taken as it is: a tag that moved in the registry is not looked up.
        An image file is loaded without its tags, so nobody's tag moves; see `docker_image.load`.

        Raises:
            ImageNotFound, InvalidImageFile, DescriptionError: the description is wrong.
            UnsupportedByEngine: the image is made for another architecture, or the engine cannot hold a container to its
                limits; then nothing is fetched.
            ImageDenied, RegistryUnavailable, EngineUnavailable: the surroundings are.
        """
        with self._api("preparing an image") as api:
            info = _info(api)
            spec.refuse_unenforced(info)
            if image.image_id:
                return docker_image.pull(api, image.image_id, image.login, info)
            assert image.image_file is not None  # noqa: S101 - ImageSource takes care of it
            spool = self._spool or Path(tempfile.gettempdir())
            return docker_image.load(api, image.image_file, dict(image.storage_options), spool, info)

    def run(self, job: ContainerJob, log: LogSink) -> ContainerExit:
        """Run the job to its end and remove its container; see the seam's promises.

        A container of the same `run_id` that an earlier process left is taken up: `log` then gets its output from the
        beginning, out of the engine's log (the newest GiB of it, which is 130 MB where each line has a few bytes). One that was made for another description, or that was
        killed while nobody watched, is removed and made anew.

        Raises:
            UnsupportedByEngine, NoGpu: the engine cannot do it; nothing started.
            ImageNotFound: the image went away since `prepare`.
            DescriptionError: the engine refuses the description.
            EngineUnavailable, ContainerLost: the verdict is unknown.
        """
        return self.run_to(job, log, lambda *_: None)

    def run_to(self, job: ContainerJob, log: LogSink, at_end: AtEnd) -> ContainerExit:
        """As `run`, with a look at what the container leaves; see `ImageEngine.run_to`."""
        with self._api(f"running {spec.container_name(job)}") as api:
            info = _info(api)
            spec.refuse_unenforced(info)
            try:
                found = docker_run.find_container(api, job) or docker_run.create_container(api, job, info)
                if isinstance(found, ContainerExit):
                    return found
                exit = docker_run.Supervision(api, job, found, log, self._patience, info).run()
                at_end(exit, partial(docker_layer.exported, api, found.id))
                return exit
            finally:
                docker_run.remove_run(api, job)

    def find(self, job: ContainerJob) -> bool:
        """Is there a container of the job to re-attach to; see `Engine.find`."""
        with self._api(f"looking for {spec.container_name(job)}") as api:
            return docker_run.find_container(api, job) is not None

    def content(self, image: str) -> Content | None:
        """See `ImageEngine.content`."""
        with self._api("looking at an image") as api:
            return docker_layer.content(api, image)

    @contextmanager
    def files(self, job: ContainerJob) -> Iterator[IO[bytes]]:
        """See `ImageEngine.files`."""
        with self._api(f"reading the files of {job.image}") as api, docker_layer.files_of_image(api, job) as stream:
            yield stream

    def extend(self, image: str, layer: Path, change: docker_layer.Change, owner: Path) -> str:
        """See `ImageEngine.extend`. The whole image passes through an unnamed file in `spool`."""
        with self._api("making an image") as api:
            return docker_layer.extend(api, image, layer, change, owner, self._spool or Path(tempfile.gettempdir()))

    def push(self, image: str, reference: str, login: RegistryLogin | None) -> str:
        """See `ImageEngine.push`."""
        with self._api(f"pushing {reference}") as api:
            return docker_layer.push(api, image, reference, login)

    def name(self, image: str, reference: str) -> str:
        """See `ImageEngine.name`."""
        with self._api(f"naming an image {reference}") as api:
            return docker_layer.name(api, image, reference)

    def forget(self, reference: str) -> None:
        """See `ImageEngine.forget`."""
        with self._api(f"removing the image {reference}") as api:
            docker_layer.forget(api, reference)

    def describe(self) -> Description:
        """What the engine says about itself."""
        with self._api("asking the engine about itself") as api:
            info = api.info()
        return Description(
            name=f"{info.get('Name')}: {info.get('ServerVersion')}, {info.get('NCPU')} cpus, "
            f"{human_bytes(info.get('MemTotal'))}, cgroup v{info.get('CgroupVersion', 1)}",
            gpu=spec.gpu_support(info),
            not_enforced=spec.not_enforced(info),
            how_to_enforce=spec.how_to_enforce(info) if spec.not_enforced(info) else "",
            system_calls_filtered=spec.filters_system_calls(info),
        )

    def nodes(self, *, without: Collection[str] = ()) -> tuple[Node, ...]:
        """The engine's host, less the limits of the containers that run there, whoever started them; see `Engine.nodes`."""
        with self._api("asking for its capacity") as api:
            info = api.info()
            running = docker_run.inspect_running(api, without)
        return (docker_node(info, running, gpus=spec.gpu_count(info)),)

    def reap(
        self,
        run_id: str | None = None,
        *,
        grace_seconds: float = 60.0,
        below: Path | None = None,
        stop_seconds: float = 0.0,
        drafts: bool = True,
    ) -> tuple[str, ...]:
        """Remove containers that nobody owns; see `Engine.reap`. One without lease or host on its labels is left alone."""
        with self._api("removing containers") as api:
            gone = []
            if run_id is not None and stop_seconds:
                docker_run.stop_run(api, run_id, stop_seconds)
            for row in docker_run.list_containers(api, run_id, with_parts=True):
                with nullcontext(True) if run_id is not None else _ownerless(row, grace_seconds, below) as free:
                    if free:
                        docker_run.remove_container(api, row["Id"])
                        gone.append(row["Labels"].get(spec.RUN_ID, ""))
            if drafts:
                docker_layer.reap_drafts(api, run_id, grace_seconds=grace_seconds, below=below)
            return tuple(dict.fromkeys(gone))

    @contextmanager
    def _api(self, doing: str) -> Iterator[Any]:
        with translated(doing), closing(self._connect()) as client:
            _without_proxies(client.api)
            yield client.api


@contextmanager
def _ownerless(row: Mapping[str, Any], grace_seconds: float, below: Path | None) -> Iterator[bool]:
    """Is it certain that nobody owns the container? While the block lasts its lease, where there is one, stays locked."""
    path = Path(row["Labels"].get(spec.LEASE) or "")
    ours = below is not None and path.is_relative_to(below)
    if path == Path() or row["Labels"].get(spec.HOST) != gethostname():
        yield False
    elif lease.missing(path):
        yield ours and time.time() - row["Created"] >= grace_seconds
    else:
        own_window = float(row["Labels"].get(spec.RETRY_WINDOW) or 0)
        with lease.taken(path, grace_seconds if ours else max(grace_seconds, own_window)) as free:
            yield free
