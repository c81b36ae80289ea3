"""What one visit of a train to a station will be, with every document resolved; and what the station says to it.

A visit decides nothing by itself: the train comes with an image, the station with an environment, mounts and a policy. What
is asked of a train before it runs is asked in a closed sandbox, without network, environment and mounts, unless the Train API
says that the train needs them for its answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from .answer import RESPONSE_FILE
from .blocks import Station
from .errors import AlgorithmFailed, DescriptionError, OasisError, ProtocolError, TrainFailed, TrainStopped
from .job import (
    ContainerExit,
    ContainerJob,
    Mount,
    Reason,
    RegistryLogin,
    Resources,
    Sandbox,
    StorageMount,
    human_bytes,
    parse_bytes,
)
from .plan import login_of, secret_value
from .protocol import Generation, RunResponse, TrainState
from .requirement import Probe
from .settings import Settings
from .storages import Storage, mounts as storage_mounts
from .workspace import Workspace

FOLDER = "/run/oasis-flows"
ANSWER = "response.json"
_ASK_SECONDS = 300.0
_LOG_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A train at a station. `secrets` are values by variable, and never in anything that is written down."""

    run_id: str
    attempt: int
    image: str
    station: Station
    station_name: str
    generation: Generation | None
    track_info: str | None
    user_data: str | None
    storages: tuple[StorageMount, ...]
    secrets: Mapping[str, str] = field(repr=False)
    login: RegistryLogin | None = field(repr=False)

    @property
    def train(self) -> str:
        """The name of the train: the last part of its image's name."""
        return repository_of(self.image).rpartition("/")[2]

    @property
    def environment(self) -> dict[str, str]:
        """What the station gives, secret or not."""
        return {**self.station.environment, **self.secrets}

    @property
    def mounted(self) -> tuple[str, ...]:
        """Where something is mounted into the train's container."""
        return (FOLDER, *(mount.target for mount in self.storages))


def plan_visit(
    image: str,
    station: Station,
    *,
    generation: str,
    track_info: str | None,
    user_data: str | None,
    settings: Settings,
    run_id: str,
    attempt: int,
) -> Visit:
    """The visit, with secrets fetched and storages found.

    Raises:
        DescriptionError: the image has no name; a secret or a storage does not exist.
    """
    if not re.fullmatch(r"[^\s@:/][^\s]*", image) or "://" in image:
        raise DescriptionError(f"{image!r} is no train. Write its image as for `docker pull`: registry/name:tag.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", repository_of(image).rpartition("/")[2]):
        raise DescriptionError(f"{image!r} is no train: its name has to be of lower-case letters, digits, dots, dashes and _.")
    return Visit(
        run_id=run_id,
        attempt=attempt,
        image=image,
        station=station,
        station_name=station._block_document_name or f"station-{station.station_id}",
        generation=None if generation == "auto" else Generation(generation),
        track_info=track_info,
        user_data=user_data,
        storages=_storages(station, settings),
        secrets={name: secret_value(name, block) for name, block in station.secret_environment.items()},
        login=login_of(station.registry_credentials),
    )


def _storages(station: Station, settings: Settings) -> tuple[StorageMount, ...]:
    found = []
    for mount in station.mounts:
        if mount.host_path:
            found.append(StorageMount(source=mount.host_path, target=mount.target, read_only=mount.read_only))
        else:
            wanted = Storage(str(mount.storage), mount.target, mount.read_only, "the station")
            found += storage_mounts([wanted], settings.storages, settings.engine)
    return tuple(found)


def login_for(visit: Visit, image: str) -> RegistryLogin | None:
    """The login that fetches an image: the station's, where it is for the registry that the image comes from."""
    login = visit.login
    if login is None or not login.registry:
        return login
    given = re.sub(r"^https?://", "", login.registry).split("/")[0]
    return login if image.startswith(f"{given}/") else None


def question_job(
    visit: Visit, workspace: Workspace, image: str, argv: Iterable[str], settings: Settings, *, at_station: bool = False
) -> ContainerJob:
    """The container in which a train answers. `at_station`: with what the station gives, as when it runs."""
    return _job(visit, workspace, image, argv, settings, at_station=at_station, writable=False, timeout=_ASK_SECONDS)


def run_job(visit: Visit, workspace: Workspace, image: str, argv: Iterable[str], settings: Settings) -> ContainerJob:
    """The container in which the train runs. It may write anywhere in its own files: that is what travels on."""
    return _job(visit, workspace, image, argv, settings, at_station=True, writable=True, timeout=visit.station.timeout_seconds)


def _job(
    visit: Visit,
    workspace: Workspace,
    image: str,
    argv: Iterable[str],
    settings: Settings,
    *,
    at_station: bool,
    writable: bool,
    timeout: float | None,
) -> ContainerJob:
    station = visit.station
    return ContainerJob(
        run_id=visit.run_id,
        attempt=visit.attempt,
        lease=workspace.lease,
        image=image,
        command=tuple(argv),
        environment={**(station.environment if at_station else {}), RESPONSE_FILE: f"{FOLDER}/{ANSWER}"},
        secret_environment=visit.secrets if at_station else {},
        mounts=(Mount(source=workspace.notes, target=FOLDER, read_only=False),),
        storages=visit.storages if at_station else (),
        # The image's own: trains are made to run from anywhere, and as whoever their image says.
        working_dir="",
        user="",
        resources=Resources(
            cpus=station.cpus,
            memory_bytes=parse_bytes(station.memory),
            output_bytes=64 << 20,
            output_files=1000,
            log_bytes=_LOG_BYTES,
        ),
        sandbox=Sandbox(network=at_station and not station.policy.forbid_network, writable_root=writable),
        timeout_seconds=timeout,
        stop_grace_seconds=settings.stop_grace_seconds,
        retry_window_seconds=settings.retry_window_seconds,
    )


def probe(visit: Visit) -> Probe:
    """What lies at a path of the train's container, as far as this machine can tell."""

    def look(path: str) -> str | None:
        for mount in visit.storages:
            if path != mount.target and not path.startswith(f"{mount.target}/"):
                continue
            if not mount.source.startswith("/"):
                return "?"
            place = Path(mount.source + path.removeprefix(mount.target))
            return "folder" if place.is_dir() else "file" if place.is_file() else None
        return None

    return look


def allowed(visit: Visit, image: str, digests: Iterable[str] | None = None) -> bool | None:
    """Does the policy allow an image: the train's, or a base? `None` where that cannot be said before its digests are known."""
    patterns = visit.station.policy.allowed_images
    wanted = {pattern for pattern in patterns if re.fullmatch(r"(.*@)?sha256:[0-9a-f]{64}", pattern)}
    names = {image, image.partition("@")[0], repository_of(image)}
    if not patterns or any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
        return True
    known = {image.partition("@")[2], *(digests or ())}
    if {pattern.rpartition("@")[2] for pattern in wanted} & known:
        return True
    return None if wanted and digests is None else False


def repository_of(reference: str) -> str:
    """An image's name without tag and digest."""
    name = reference.partition("@")[0]
    head, slash, tail = name.rpartition("/")
    return f"{head}{slash}{tail.partition(':')[0]}"


def successors(visit: Visit, tags: Iterable[str], number: int) -> tuple[str, ...]:
    """The names under which the train travels on: by the tags that it asks for, or by the station and the visit's number."""
    repository = repository_of(visit.image)
    place = f"{visit.station.registry}/{visit.train}" if visit.station.registry else repository
    return tuple(f"{place}:{tag}" for tag in (*tags,) or (f"{visit.station_name}-{number}",))


def refused_by_policy(visit: Visit, response: RunResponse, brings: int) -> str:
    """Why a successor may not leave; empty where it may."""
    policy = visit.station.policy
    if policy.demand_rebase and response.rebase is None:
        return "names no base image and no files to export, and the station's policy demands a rebase"
    if policy.max_size and brings > parse_bytes(policy.max_size):
        return f"would carry {human_bytes(brings)} away, and the station's policy allows {policy.max_size}"
    return ""


def judge_run(
    train: str, exit: ContainerExit, answer: RunResponse | ProtocolError, failed: AlgorithmFailed | None
) -> OasisError | None:
    """What a run that did not succeed ends with; `None` where it did.

    An exit code alone is no verdict, for the reference library ends with 0 on failure; nor is the train's word alone.
    `failed` is the verdict on the container, where that did not end with 0.
    """
    if exit.reason not in (Reason.OK, Reason.EXIT_NONZERO):
        return failed
    if isinstance(answer, ProtocolError):
        return answer if failed is None else failed
    said = " ".join(text for text in (answer.reason, answer.message) if text) or "nothing more"
    if answer.state is TrainState.APPLICATION:
        return TrainStopped(
            f"The train {train} says that it neither succeeded nor failed. Nothing travels on: only a success does. Ask whoever "
            f"made it what this end of its algorithm means. It said: {said}"
        )
    if answer.state is TrainState.FAILURE:
        return TrainFailed(
            f"The train {train} says that it failed. Read its log, and correct the train or what it was given. It said: {said}"
        )
    if exit.exit_code != 0:
        return TrainFailed(
            f"The train {train} says that it succeeded, and ended with exit code {exit.exit_code}. Correct the train: both must "
            f"agree. It said: {said}"
        )
    return None
