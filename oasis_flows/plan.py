"""What one run is going to do, decided and checked before anything starts.

`plan_run` refuses whatever can be known to be wrong without touching the data: names, parameters, secrets that do not
exist, a GPU that is not there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from prefect.blocks.system import Secret
from prefect_docker.credentials import DockerRegistryCredentials
from pydantic import BaseModel, Field

from . import command as commands, documents, oscar, storages, wrapper
from .blocks import Algorithm, Dataset, DatasetStore, DockerImage
from .command import Scalar
from .errors import DescriptionError, NoGpu
from .item import requirements
from .job import ContainerJob, ImageSource, Mount, RegistryLogin, Resources, Sandbox, StorageMount, Wrapper, parse_bytes
from .machine import open_engine
from .marketplace import finder
from .prerequisites import Resolution, Step, resolve
from .settings import Settings
from .sharding import Shard
from .store import Location
from .template import secret_variable
from .workspace import Workspace

# How people get into a container of each engine; its own shell fills in the name that it has there.
_LOOK_INSIDE = {"docker": "docker exec -it $HOSTNAME sh", "kubernetes": "kubectl exec -it $HOSTNAME -- sh"}
_HOW_TO_GET_A_GPU = {
    "docker": "install NVIDIA's driver and the NVIDIA Container Toolkit here (nvidia-ctk runtime configure)",
    "kubernetes": "install the device plugin of the nodes' GPUs",
}
# The folders of a batch's output in which its shards are published, and in which it is written down.
SHARDS, HEAD = "shards", "batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A run's place in a batch: which files of a saved `listing` it reads, whose names are relative to the folder `base`.

    With `oscar`, its container sees all files, and is told which are its own as OSCAR-Batch would: `oscar.range_of`.
    """

    shard: Shard
    listing: Location
    base: Location
    oscar: bool = False


class ShardOf(BaseModel):
    """Which part of a batch a run is: the files from `start` to before `end` of a listing. Batches make it; people do not."""

    listing: str = Field(description="URL of the folder with the batch's listing.")
    base: str = Field(description="URL of the folder that the names in the listing are relative to.")
    name: str = Field(pattern=r"^\d+(\.[01])*$", description="Name of the shard.")
    index: int = Field(ge=0, description="Place of the shard among those that were planned.")
    count: int = Field(ge=1, description="How many shards were planned.")
    start: int = Field(ge=0, description="Its first file, by its place in the listing.")
    end: int = Field(ge=1, description="The file behind its last one.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run: what goes in, what runs, and where what comes out is published.

    `output` is a folder of the store's `root`. `document_name` is what the output's Dataset document will be called. `argv` holds entrypoint and command with their
    parameters filled in; `None` leaves the image's own. `part` is set where the run is a shard of a batch.
    """

    run_id: str
    attempt: int
    algorithm: Algorithm
    algorithm_name: str
    dataset: Dataset
    dataset_name: str
    store: DatasetStore | None
    output_name: str
    document_name: str
    source: Location
    root: Location
    output: Location
    parameters: Mapping[str, Scalar]
    entrypoint: tuple[str, ...] | None
    command: tuple[str, ...] | None
    environment: Mapping[str, str]
    secrets: Mapping[str, str] = field(repr=False)
    prerequisites: Resolution = field(default_factory=Resolution)
    storages: tuple[StorageMount, ...] = ()
    part: Part | None = None

    @property
    def image(self) -> ImageSource:
        """Where the image comes from, with the login it needs."""
        return image_source(self.algorithm.docker_image)


def plan_run(
    algorithm: Algorithm,
    dataset: Dataset,
    *,
    output_name: str | None,
    store: DatasetStore | None,
    parameters: Mapping[str, object] | None,
    settings: Settings,
    run_id: str,
    attempt: int,
) -> Plan:
    """Decide everything about a run.

    Raises:
        DescriptionError: something is wrong as written.
        NoGpu: it needs one, and this machine's engine has none.
        MarketplaceUnavailable: where one of its prerequisites is published did not answer.
    """
    values = commands.bind(algorithm.parameters, parameters or {})
    name = algorithm._block_document_name or "algorithm"
    prerequisites = prerequisites_of(algorithm, settings)
    if algorithm.user and os.getuid() and algorithm.user.partition(":")[0] != str(os.getuid()):
        raise DescriptionError(
            f"This worker runs as user {os.getuid()} and could neither read nor remove what user {algorithm.user} writes. "
            "Leave `user` empty, or run the worker as root."
        )
    folder = checked_name(output_name or f"{name[:180]}-output")
    root = store.url if store else str(settings.datasets)
    output = Location(f"{root}/{folder}/{run_id}", options_of(store))
    _check_apart(location(dataset), output)
    # A name with the run's own id in it is new, or this run's.
    document = output_name or f"{folder}-{run_id[:8]}"
    if output_name:
        _check_not_taken(document, f"{root}/{folder}/")
    if algorithm.gpu and open_engine(settings).describe().gpu is None:
        raise NoGpu(
            f"The algorithm {name} needs a GPU and the engine of this machine has none to give. Run it on a work pool with GPUs; or "
            f"{_HOW_TO_GET_A_GPU.get(settings.engine, _HOW_TO_GET_A_GPU['docker'])}, or set gpu: false."
        )
    entrypoint, command = _argv(algorithm, values)
    environment = {name: commands.render_text(text, values) for name, text in algorithm.environment.items()}
    wanted = {**algorithm.secret_environment, **{secret_variable(block): block for block in prerequisites.secrets}}
    secrets = {variable: secret_value(variable, block) for variable, block in wanted.items()}
    argv = (*_wrapped(prerequisites, settings), *(entrypoint or ()), *(command or ()))
    commands.check_sizes(argv, environment | secrets | commands.variables(values))
    return Plan(
        run_id=run_id,
        attempt=attempt,
        algorithm=algorithm,
        algorithm_name=name,
        dataset=dataset,
        dataset_name=dataset._block_document_name or dataset.url,
        store=store,
        output_name=folder,
        document_name=document,
        source=location(dataset),
        root=Location(root, options_of(store)),
        output=output,
        parameters=values,
        entrypoint=entrypoint,
        command=command,
        environment=environment,
        secrets=secrets,
        prerequisites=prerequisites,
        storages=storages.mounts(prerequisites.storages, settings.storages, settings.engine),
    )


def prerequisites_of(algorithm: Algorithm, settings: Settings) -> Resolution:
    """What has to be in place before the algorithm runs; see `prerequisites.resolve`."""
    return resolve(
        algorithm._block_document_name or "algorithm",
        requirements(algorithm.prerequisites, "prerequisites"),
        finder(settings),
        working_dir=algorithm.working_dir,
        network=algorithm.network,
    )


def _wrapped(prerequisites: Resolution, settings: Settings) -> tuple[str, ...]:
    if not prerequisites.callbacks:
        return ()
    look_inside = _LOOK_INSIDE.get(settings.engine, _LOOK_INSIDE["docker"])
    return wrapper.argv(prerequisites, look_inside=look_inside, linger_seconds=settings.hold_seconds)


def as_part(plan: Plan, part: Part) -> Plan:
    """The plan of one shard of the batch that `plan` is: a run of its own, published below the batch's place."""
    name = part.shard.name
    return replace(plan, run_id=f"{plan.run_id}.{name}", output=plan.output.child(f"{SHARDS}/{name}"), part=part)


def as_shard(plan: Plan, of: ShardOf) -> Plan:
    """The plan of a run that is a shard of another run's batch: published below that batch's place.

    Raises:
        DescriptionError: that place is not in the store of this run.
    """
    place, _, folder = of.listing.rpartition("/")
    if folder != HEAD or not place.startswith(f"{plan.root.url.rstrip('/')}/"):
        raise DescriptionError(
            f"The listing {of.listing} is not that of a batch in the store {plan.root.url}. Worker and batch need the same store: "
            "name it in `store`, or make one a document named default."
        )
    shard = Shard(name=of.name, index=of.index, count=of.count, start=of.start, end=of.end)
    base = Location(of.base, plan.source.options)
    part = Part(shard=shard, listing=Location(of.listing, plan.root.options), base=base)
    return replace(plan, output=Location(f"{place}/{SHARDS}/{of.name}", plan.root.options), part=part)


def container_job(plan: Plan, workspace: Workspace, *, image: str, input_folder: Path, settings: Settings) -> ContainerJob:
    """The container that carries the plan out, on this machine."""
    algorithm = plan.algorithm
    folder = algorithm.working_dir
    gpus = algorithm.gpu_count if algorithm.gpu else 0
    shard = plan.part.shard if plan.part else None
    told = plan.part is not None and plan.part.oscar
    job = ContainerJob(
        run_id=plan.run_id,
        attempt=plan.attempt,
        lease=workspace.lease,
        image=image,
        entrypoint=plan.entrypoint,
        command=plan.command,
        environment={
            **plan.environment,
            **commands.variables(plan.parameters),
            "OASIS_INPUT": f"{folder}/input",
            "OASIS_OUTPUT": f"{folder}/output",
            "OASIS_RUN_ID": plan.run_id,
            "OASIS_GPU_COUNT": str(gpus),
            **({"OASIS_SHARD_INDEX": str(shard.index), "OASIS_SHARD_COUNT": str(shard.count)} if shard else {}),
            **({oscar.RANGE_VARIABLE: f"{folder}/{oscar.RANGE_FOLDER}/{oscar.RANGE_FILE}"} if told else {}),
        },
        secret_environment=plan.secrets,
        mounts=(
            Mount(source=input_folder, target=f"{folder}/input", read_only=True),
            Mount(source=workspace.output, target=f"{folder}/output", read_only=False),
            *(
                (Mount(source=workspace.path / oscar.RANGE_FOLDER, target=f"{folder}/{oscar.RANGE_FOLDER}", read_only=True),)
                if told
                else ()
            ),
        ),
        storages=plan.storages,
        working_dir=folder,
        user=algorithm.user or f"{os.getuid()}:{os.getgid()}",
        resources=Resources(
            cpus=algorithm.cpus,
            memory_bytes=parse_bytes(algorithm.memory),
            shm_bytes=parse_bytes(algorithm.shm_size) if algorithm.shm_size else None,
            tmp_bytes=parse_bytes(algorithm.tmp_size) if algorithm.tmp_size else None,
            pids=algorithm.pids_limit,
            gpus=gpus,
            output_bytes=parse_bytes(algorithm.max_output_size),
            output_files=algorithm.max_output_files,
            log_bytes=parse_bytes(algorithm.max_log_size),
        ),
        sandbox=Sandbox(
            network=algorithm.network,
            writable_root=algorithm.writable_root,
            new_privileges=algorithm.new_privileges,
            capabilities=tuple(algorithm.capabilities),
        ),
        timeout_seconds=algorithm.timeout_seconds,
        stop_grace_seconds=settings.stop_grace_seconds,
        retry_window_seconds=settings.retry_window_seconds,
    )
    return _with_wrapper(job, plan.prerequisites.around_algorithm(), workspace, settings)


def preparing_job(
    plan: Plan, job: ContainerJob, step: Step, *, folder: Path, workspace: Workspace, settings: Settings
) -> ContainerJob:
    """The container that prepares in `folder` what a step keeps, with all that comes before it, in place of the algorithm's."""
    mounts = [mount for mount in job.mounts if mount.target != wrapper.FOLDER]
    bare = replace(
        job,
        entrypoint=(wrapper.SHELL,),
        command=("-c", ":"),
        mounts=(*mounts, Mount(source=folder, target=step.cache_path, read_only=False)),
    )
    return _with_wrapper(bare, plan.prerequisites.to_prepare(step), workspace, settings)


def _with_wrapper(job: ContainerJob, prerequisites: Resolution, workspace: Workspace, settings: Settings) -> ContainerJob:
    argv = _wrapped(prerequisites, settings)
    if not argv:
        return job
    return replace(
        job,
        mounts=(*job.mounts, Mount(source=workspace.notes, target=wrapper.FOLDER, read_only=False)),
        wrapper=Wrapper(argv=argv, ended=workspace.notes / wrapper.ALGORITHM, linger_seconds=settings.hold_seconds),
    )


def image_source(image: DockerImage) -> ImageSource:
    """The image that a document means."""
    return ImageSource(image_id=image.image_id, image_file=image.image_file, login=login_of(image.registry_credentials))


def login_of(credentials: DockerRegistryCredentials | None) -> RegistryLogin | None:
    """The login that a document means, if there is one."""
    if credentials is None:
        return None
    password = credentials.password.get_secret_value()
    _check_secret(password, "registry_credentials")
    return RegistryLogin(registry=credentials.registry_url, username=credentials.username, password=password)


def location(dataset: Dataset) -> Location:
    """Where a dataset's files are, with what opens the place."""
    return Location(dataset.url, options_of(dataset.store))


def options_of(store: DatasetStore | None) -> dict[str, str]:
    if store is None:
        return {}
    secret = store.secret_access_key.get_secret_value() if store.secret_access_key else None
    if secret:
        _check_secret(secret, "store")
    values = {
        "endpoint_url": store.endpoint_url,
        "access_key_id": store.access_key_id,
        "secret_access_key": secret,
        "region": store.region,
    }
    return {name: value for name, value in values.items() if value}


def _check_secret(value: str, parameter: str) -> None:
    # Prefect writes asterisks for secrets when a block object, not a reference, travels in a flow run's parameters.
    if value and not value.strip("*"):
        raise DescriptionError(
            f"The secret in `{parameter}` arrived as asterisks, because a block object was passed through a deployment. "
            'Pass a reference instead: {"$ref": {"block_document_slug": "TYPE/NAME"}}.'
        )


def checked_name(name: str) -> str:
    """The name, if a document can have it.

    Raises:
        DescriptionError: with one that could be taken instead.
    """
    if re.fullmatch(r"[a-z0-9]+(-+[a-z0-9]+)*", name) and len(name) <= 200:
        return name
    suggestion = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:200] or "result"
    raise DescriptionError(
        f"Prefect cannot store a document named {name!r}. Use lower-case letters, digits and single dashes, such as {suggestion!r}."
    )


def _check_not_taken(document: str, folder: str) -> None:
    """An output's document may replace an older output of the same name, never something else."""
    found = documents.find(Dataset, document)
    if found is not None and not found.url.startswith(folder):
        raise DescriptionError(
            f"There is already a dataset {document!r}, and it is not an output of this name: {found.url}. Choose another `output_name`."
        )


def _argv(algorithm: Algorithm, values: Mapping[str, Scalar]) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Entrypoint and command, filled in together: a shell in the one may get its script from the other."""
    entrypoint = commands.as_argv(algorithm.entrypoint, "entrypoint") or ()
    command = commands.as_argv(algorithm.command, "command") or ()
    argv = commands.render((*entrypoint, *command), values)
    return argv[: len(entrypoint)] or None, argv[len(entrypoint) :] or None


def secret_value(variable: str, block: str) -> str:
    """The text that a Secret block holds, for a variable.

    Raises:
        DescriptionError: there is no such block, or it holds no text.
    """
    found = documents.find(Secret, block)
    if found is None:
        raise DescriptionError(
            f"There is no Secret block {block!r}, which `secret_environment` or a prerequisite names for {variable}. "
            "Make it in the Prefect UI."
        )
    value = found.get()
    # What is no text would reach the container in a form of ours, in which its parts could not be kept out of the log.
    if not isinstance(value, str) or "\0" in value:
        raise DescriptionError(
            f"The Secret block {block!r} must hold text without NUL characters, to be the variable {variable}."
        )
    return value


def _check_apart(source: Location, output: Location) -> None:
    """An input that holds the place of the output would grow by every run."""
    if output.url.startswith(f"{source.url.rstrip('/')}/"):
        raise DescriptionError(
            f"The input {source.url} holds the place where the output would be published, {output.url}. "
            "Publish to another store, or take a folder of the input."
        )
