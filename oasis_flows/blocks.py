"""The block types: what people describe once, by hand in Prefect's UI, in YAML (`catalogue`) or in Python.

A document never holds a secret in clear and never grows with the data. Whatever is wrong with a description is said here,
when it is made, with what to write instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast
from urllib.parse import urlsplit

from prefect.blocks.core import Block
from prefect_docker.credentials import DockerRegistryCredentials
from prefect_docker.host import DockerHost
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator

from .command import VARIABLE_PREFIX, Scalar, as_argv
from .errors import OasisError
from .item import parse, requirements
from .job import parse_bytes
from .storages import checked_path
from .template import SECRET_PREFIX

__all__ = ["Algorithm", "Dataset", "DatasetStore", "DockerImage", "Prerequisite", "Station"]

_DOCUMENTATION = "https://docs.prefect.io/v3/concepts/blocks"
# Block logos must be public addresses: these are the ones that prefect-docker's own blocks show.
_LOGO = DockerHost._logo_url

# A refusal must not quote what was given: it may be a secret in the wrong place.
_CONFIG = ConfigDict(hide_input_in_errors=True)

RESERVED_VARIABLES = frozenset(
    {"OASIS_INPUT", "OASIS_OUTPUT", "OASIS_RUN_ID", "OASIS_GPU_COUNT", "OASIS_SHARD_INDEX", "OASIS_SHARD_COUNT"}
)
STATION_VARIABLES = frozenset({"OASIS_RESPONSE_FILE"})
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
_PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(:[A-Za-z0-9_][A-Za-z0-9_.\-]*)?")
# Docker refuses containers with less.
_LEAST_MEMORY = 6 << 20


class _Known:
    """Of a block type: it is found for its own documents at once, also within others.

    Prefect imports all block types that are installed first, and prefect-kubernetes takes half as long as Prefect itself.
    """

    @classmethod
    def get_block_class_from_key(cls, key: str) -> Any:
        """The block type of this slug; see Prefect's `Block`."""
        own = cast(type[Block], cls)
        return own if key == own.get_block_type_slug() else super().get_block_class_from_key(key)  # type: ignore[misc]


class DockerImage(_Known, Block):
    """A container image: from a registry, or from a file made by `docker save`.

    Attributes:
        image_id: A registry reference.
        image_file: An image archive.
        registry_credentials: A login for a private registry.

    Example:
        Describe an image once:
        ```python
        from oasis_flows.blocks import DockerImage

        DockerImage(image_id="ghcr.io/acme/detector:1.4").save("detector")
        ```
        Load it:
        ```python
        from oasis_flows.blocks import DockerImage

        image = DockerImage.load("BLOCK_NAME")
        ```
    """

    model_config = _CONFIG

    _block_type_name = "Docker Image"
    _block_type_slug = "docker-image"
    _description = "A container image: from a registry, or from a file made by docker save."
    _logo_url = _LOGO
    _documentation_url: ClassVar[Any] = _DOCUMENTATION

    image_id: str | None = Field(
        default=None,
        description="Registry reference with a tag or digest, such as ghcr.io/acme/detector:1.4. Leave image_file empty then.",
    )
    image_file: str | None = Field(
        default=None,
        description="Path or URL of an archive made by `docker save` (or an OCI layout), plain or gzip. Leave image_id empty then.",
    )
    registry_credentials: DockerRegistryCredentials | None = Field(
        default=None, description="Login for a registry that asks for one."
    )

    @model_validator(mode="after")
    def _one_source(self) -> DockerImage:
        if self.image_id and self.image_file:
            raise ValueError(
                "both image_id and image_file are given. Keep the one that the image comes from and remove the other"
            )
        if not self.image_id and not self.image_file:
            raise ValueError(
                "neither image_id nor image_file is given. Write image_id: NAME:TAG, or image_file: /path/to/image.tar"
            )
        if self.image_id and (re.search(r"\s", self.image_id) or "://" in self.image_id):
            raise ValueError(
                f"image_id {self.image_id!r} is no image reference. Write it as for `docker pull`: registry/name:tag, without https://"
            )
        _no_credentials(self.image_file or "")
        if self.image_file and "://" not in self.image_file and not Path(self.image_file).expanduser().is_absolute():
            raise ValueError(
                f"image_file {self.image_file!r} is relative. Write the whole path: {Path(self.image_file).absolute()}"
            )
        return self


class DatasetStore(_Known, Block):
    """Where datasets are published, and how to get at what is there.

    Attributes:
        url: The folder or bucket under which output datasets are published.

    Example:
        ```python
        from oasis_flows.blocks import DatasetStore

        DatasetStore(url="s3://results/oasis", endpoint_url="https://s3.example.org").save("results")
        store = DatasetStore.load("BLOCK_NAME")
        ```
    """

    model_config = _CONFIG

    _block_type_name = "Dataset Store"
    _block_type_slug = "dataset-store"
    _description = "A folder or bucket under which output datasets are published, with its credentials."
    _logo_url = _LOGO
    _documentation_url: ClassVar[Any] = _DOCUMENTATION

    url: str = Field(description="Root of the published datasets: s3://bucket/folder, or the whole path of a folder.")
    endpoint_url: str | None = Field(
        default=None, description="Address of an S3 server that is not Amazon's, such as https://s3.example.org."
    )
    access_key_id: str | None = Field(default=None, description="S3 access key. Empty: what the machine is configured with.")
    secret_access_key: SecretStr | None = Field(default=None, description="S3 secret key that belongs to the access key.")
    region: str | None = Field(default=None, description="S3 region, where the server asks for one.")

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        return _folder_url(value)

    @field_validator("endpoint_url")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        _no_credentials(value or "")
        if value and not re.match(r"https?://[^/\s]+", value):
            raise ValueError(f"{value!r} is no address of a server. Write http://HOST:PORT or https://HOST")
        return value or None

    @model_validator(mode="after")
    def _both_keys(self) -> DatasetStore:
        if bool(self.access_key_id) != bool(self.secret_access_key):
            raise ValueError(
                "access_key_id and secret_access_key belong together. Give both, or neither to use the machine's own"
            )
        return self


class Dataset(_Known, Block):
    """A folder of files, anywhere: what an algorithm reads, and what it leaves.

    Attributes:
        url: The folder.
        store: Where the credentials for it are.

    Example:
        ```python
        from oasis_flows.blocks import Dataset

        Dataset(url="s3://images/2026-11").save("november")
        dataset = Dataset.load("BLOCK_NAME")
        ```
    """

    model_config = _CONFIG

    _block_type_name = "Dataset"
    _block_type_slug = "dataset"
    _description = "A folder of files: what an algorithm reads, and what it leaves."
    _logo_url = _LOGO
    _documentation_url: ClassVar[Any] = _DOCUMENTATION

    url: str = Field(description="The folder: the whole path of a local one, or a URL such as s3://bucket/folder.")
    store: DatasetStore | None = Field(
        default=None, description="The store whose credentials open it. Not needed for local folders."
    )
    file_count: int | None = Field(default=None, ge=0, description="How many files were found; filled in by oasis-flows.")
    size_bytes: int | None = Field(
        default=None, ge=0, description="How many bytes they have together; filled in by oasis-flows."
    )
    manifest_digest: str | None = Field(
        default=None, description="SHA-256 of the manifest: names, sizes and digests of all files; filled in by oasis-flows."
    )

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        return _folder_url(value)


class Prerequisite(_Known, Block):
    """Something that has to be in place before an algorithm runs: commands around it, or a storage.

    Attributes:
        plugin: What it is.
        plugin_params: Its commands, or its storage.

    Example:
        ```python
        from oasis_flows.blocks import Prerequisite

        Prerequisite(
            plugin_params={"callbacks": [{"event": "taskStarts", "commands": ["mkdir -p {{ dataPath }}"]}]},
            template_variables=[{"name": "dataPath"}],
        ).save("data-folder")
        prerequisite = Prerequisite.load("BLOCK_NAME")
        ```
    """

    model_config = _CONFIG

    _block_type_name = "Prerequisite"
    _block_type_slug = "prerequisite"
    _description = "Something that has to be in place before an algorithm runs: commands around it, or a storage."
    _logo_url = _LOGO
    _documentation_url: ClassVar[Any] = _DOCUMENTATION

    name: str | None = Field(default=None, description="What messages call it. Empty: the document's name.")
    plugin: str = Field(default="cmd", description="What it is: cmd, commands in the container; or pvc_storage, a storage.")
    plugin_params: dict[str, Any] = Field(
        default_factory=dict,
        description="For cmd: callbacks, a list of {event, commands}. For pvc_storage: name, mountPath, readOnly.",
    )
    require: list[Any] = Field(
        default_factory=list, description="What has to be in place before it: names, or {name, template_variables}."
    )
    template_variables: list[Any] = Field(
        default_factory=list,
        description="The variables in plugin_params, a list of {name}; whoever requires it gives them all.",
    )
    requireStorages: list[Any] = Field(  # noqa: N815  # OpenPAI's spelling
        default_factory=list, description="Storages to mount, a list of {name, mountPath, readOnly}."
    )
    failurePolicy: Literal["fail", "ignore"] = Field(  # noqa: N815
        default="fail", description="What a failed command does to the run: fail it, or be logged and nothing else."
    )
    type: str | None = Field(default=None, description="What kind of thing it is, such as data or script; for readers.")
    description: str | None = Field(default=None, description="What it is for; for readers.")
    callbacks: list[Any] = Field(default_factory=list, description="The older place of plugin_params.callbacks.")
    share_environment: bool = Field(
        default=False, description="What its start commands export, and where they cd to, holds for what comes after."
    )
    network: bool = Field(default=False, description="It needs the network; an algorithm that has none is refused.")

    @model_validator(mode="after")
    def _makes_sense(self) -> Prerequisite:
        _as_value_error(parse, self.specification(), "prerequisite")
        return self

    def specification(self) -> dict[str, Any]:
        """Its fields as OpenPAI spells them, without those that are empty."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in fields.items() if value not in (None, "", [], {}, False)}


class Algorithm(_Known, Block):
    """What to run in an image, with what, and within which limits.

    Attributes:
        docker_image: The image.
        command: What to run.

    Example:
        ```python
        from oasis_flows.blocks import Algorithm, DockerImage

        Algorithm(
            docker_image=DockerImage.load("detector"),
            command="detect --threshold {threshold} input output",
            parameters={"threshold": 0.5},
            gpu=True,
            memory="8GiB",
        ).save("detect-ships")
        algorithm = Algorithm.load("BLOCK_NAME")
        ```
    """

    model_config = _CONFIG

    _block_type_name = "Algorithm"
    _block_type_slug = "algorithm"
    _description = "What to run in a container image, with what, and within which limits."
    _logo_url = _LOGO
    _documentation_url: ClassVar[Any] = _DOCUMENTATION

    docker_image: DockerImage = Field(description="The image that holds the program.")
    command: str | list[str] | None = Field(
        default=None,
        description="What to run, split like a shell would, or a list. {name} is replaced by a parameter. Empty: the image's own.",
    )
    entrypoint: str | list[str] | None = Field(
        default=None, description="Replaces the image's entrypoint; written like command."
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="Environment variables; {name} in a value is replaced by a parameter."
    )
    secret_environment: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables whose values are secret: variable name to the name of a Prefect Secret block.",
    )
    gpu: bool = Field(default=False, description="It needs a GPU; where the engine has none, a run is refused at once.")
    gpu_count: int | Literal["all"] = Field(default=1, description="How many GPUs, when it needs any; or all.")
    cpus: float = Field(default=1, description="Hard limit of processors; 0.5 is half of one.")
    memory: str = Field(default="1GiB", description="Hard limit of memory, such as 512MiB or 8GiB; there is no swap beyond it.")
    shm_size: str | None = Field(default=None, description="Size of /dev/shm, such as 1GiB; PyTorch's data loaders need it.")
    timeout_seconds: float | None = Field(default=None, description="Hard limit of its running time. Empty: none.")
    network: bool = Field(default=False, description="It may use the network.")
    user: str | None = Field(
        default=None, description="User it runs as, such as 1000:1000. Empty: the worker's own user and group."
    )
    working_dir: str = Field(default="/work", description="Folder it starts in; input and output are below it.")
    parameters: dict[str, Scalar | None] = Field(
        default_factory=dict,
        description='Parameter names and defaults, such as {"threshold": 0.5}; a null default means that each run must give a value.',
    )
    prerequisites: list[Any] = Field(
        default_factory=list,
        description="What must be in place before it runs, in order: names of prerequisites, or {name, template_variables}.",
    )
    writable_root: bool = Field(
        default=False, description="It may write anywhere in its own file system, not only to output and /tmp."
    )
    new_privileges: bool = Field(default=False, description="Its programs may gain privileges, as sudo does.")
    capabilities: list[str] = Field(
        default_factory=list, description="Linux capabilities it keeps, such as SYS_PTRACE; by default none."
    )
    pids_limit: int = Field(default=1024, description="Hard limit of processes and threads at once.")
    tmp_size: str | None = Field(
        default=None, description="Hard limit of /tmp, which lives in its memory. Empty: half of the machine's memory."
    )
    memory_max: str | None = Field(
        default=None,
        description="Run it again, once, with this much memory when `memory` did not suffice. Empty: never.",
    )
    max_output_size: str = Field(
        default="100GiB", description="It is killed when its output has more bytes than this, such as 5GiB."
    )
    max_output_files: int = Field(
        default=1_000_000, description="It is killed when its output has more files and folders than this."
    )
    max_log_size: str = Field(default="1GiB", description="It is killed when its log has more bytes than this, such as 10MiB.")

    @field_validator("prerequisites", mode="before")
    @classmethod
    def _prerequisites(cls, value: object) -> object:
        _as_value_error(requirements, value or [], "prerequisites")
        return value or []

    @field_validator("command", "entrypoint")
    @classmethod
    def _splittable(cls, value: str | list[str] | None, info: ValidationInfo) -> str | list[str] | None:
        _as_value_error(as_argv, value, str(info.field_name))
        return value

    @field_validator("environment", "secret_environment", mode="before")
    @classmethod
    def _variables(cls, value: object, info: ValidationInfo) -> object:
        return _checked_variables(value, secret=info.field_name == "secret_environment", reserved=RESERVED_VARIABLES)

    @field_validator("cpus", "timeout_seconds")
    @classmethod
    def _positive(cls, value: float | None, info: ValidationInfo) -> float | None:
        return _checked_amount(value, str(info.field_name))

    @field_validator("gpu_count", mode="before")
    @classmethod
    def _gpus(cls, value: object) -> object:
        if value != "all" and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024):
            raise ValueError(f"{value!r} makes no sense. Write a whole number from 1, or all; for none at all leave gpu: false")
        return value

    @field_validator("pids_limit", "max_output_files")
    @classmethod
    def _count(cls, value: int, info: ValidationInfo) -> int:
        least, most, example = {"pids_limit": (2, 4_194_304, 1024), "max_output_files": (1, 10**9, 1_000_000)}[
            str(info.field_name)
        ]
        if not least <= value <= most:
            raise ValueError(f"{value} makes no sense. Write a whole number from {least} to {most}, such as {example}")
        return value

    @field_validator("memory", "shm_size", "tmp_size", "memory_max", "max_output_size", "max_log_size", mode="before")
    @classmethod
    def _size(cls, value: object, info: ValidationInfo) -> object:
        if value is None and info.field_name in ("shm_size", "tmp_size", "memory_max"):
            return None
        text = str(value)
        least = _LEAST_MEMORY if info.field_name in ("memory", "memory_max") else 1 << 10
        size: int = _as_value_error(parse_bytes, text)
        if not least <= size <= 1 << 50:
            raise ValueError(f"{text} makes no sense. Write a size from {least >> 10}KiB to 1024TiB, such as 512MiB or 8GiB")
        return text

    @field_validator("user")
    @classmethod
    def _user(cls, value: str | None) -> str | None:
        if value and not _USER.fullmatch(value):
            raise ValueError(f"{value!r} is no user. Write UID:GID, such as 1000:1000, or a name that exists in the image")
        return value or None

    @field_validator("working_dir")
    @classmethod
    def _working_dir(cls, value: str) -> str:
        path = value.rstrip("/")
        parts = path.split("/")[1:]
        if not value.startswith("/") or not path or any(p in ("", ".", "..") for p in parts) or any(ord(c) < 32 for c in value):
            raise ValueError(
                f"{value!r} cannot be the working directory. Write a whole path with at least one folder, such as /work"
            )
        if parts[0] in ("proc", "sys", "dev"):
            raise ValueError(f"{value!r} belongs to the kernel. Write another folder, such as /work")
        return path

    @field_validator("parameters", mode="before")
    @classmethod
    def _parameters(cls, value: object) -> object:
        for name, default in value.items() if isinstance(value, Mapping) else ():
            if not isinstance(name, str) or not _PARAMETER.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a parameter. Use letters, digits and _, not beginning with a digit")
            if not isinstance(default, str | int | float | bool | None):
                raise ValueError(
                    f"the default of {name} is {default!r}. Write text, a number, true or false; or null if each run must give it"
                )
            if isinstance(default, float) and not math.isfinite(default):
                raise ValueError(f"the default of {name} is {default}. Write a number")
        return value

    @field_validator("capabilities")
    @classmethod
    def _capabilities(cls, value: list[str]) -> list[str]:
        names = [name.upper().removeprefix("CAP_") for name in value]
        if bad := [name for name in names if not re.fullmatch(r"[A-Z_]+", name) or name == "ALL"]:
            raise ValueError(f"{bad[0]!r} is no single capability. Name each one, such as SYS_PTRACE")
        return names

    @model_validator(mode="after")
    def _disjoint(self) -> Algorithm:
        if both := sorted(self.environment.keys() & self.secret_environment.keys()):
            raise ValueError(f"{both[0]} is in environment and in secret_environment. Keep one of them")
        return self

    @model_validator(mode="after")
    def _more_memory(self) -> Algorithm:
        if self.memory_max and parse_bytes(self.memory_max) <= parse_bytes(self.memory):
            raise ValueError(
                f"memory_max is {self.memory_max} and must be more than memory, {self.memory}. Raise it, or leave it empty"
            )
        return self


class StationMount(BaseModel):
    """What a station gives a train to read: exactly one of a folder or file of its machine and one of its storages."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    target: str = Field(description="Path in the train's container, such as /data.")
    host_path: str | None = Field(default=None, description="Folder or file of the station's machine.")
    storage: str | None = Field(default=None, description="Name of a storage in the machine's setting OASIS_FLOWS_STORAGES.")
    read_only: bool = Field(default=True, description="The train may not write to it.")

    @model_validator(mode="after")
    def _one_source(self) -> StationMount:
        if bool(self.host_path) == bool(self.storage):
            raise ValueError("a mount has exactly one source. Give either host_path or storage")
        if self.host_path and not self.host_path.startswith("/"):
            raise ValueError(f"host_path {self.host_path!r} is relative. Write the whole path")
        self.target = _as_value_error(checked_path, self.target)
        return self


class StationPolicy(BaseModel):
    """What a station lets trains do, and what it demands of them."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    allowed_images: list[str] = Field(
        default_factory=list,
        description="Patterns of names such as registry.example.org/trains/*, or digests; a train is one of them. Empty: any.",
    )
    forbid_network: bool = Field(default=False, description="Trains run without any network.")
    demand_rebase: bool = Field(default=False, description="Only files that a train exports by name travel on.")
    max_size: str | None = Field(default=None, description="A successor brings at most this much, such as 100MiB.")
    require_signature: bool = Field(
        default=False, description="A train comes with a record, each link of it signed by a trusted station."
    )
    hold_for_approval: bool = Field(default=False, description="Nothing leaves before somebody has seen what, and agreed.")
    approval_seconds: int = Field(default=86400, ge=1, description="How long an answer is waited for; then it is no.")

    @field_validator("max_size")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        _as_value_error(parse_bytes, value) if value else None
        return value or None


class Station(_Known, Block):
    """A place that has data, and lets trains come to them.

    Attributes:
        station_id: The number by which trains know it.
        environment: What it gives a train.

    Example:
        ```python
        from oasis_flows.blocks import Station

        Station(
            station_id=1,
            environment={"PHT_FHIR_URL": "https://fhir.example.org/r4"},
            secret_environment={"PHT_FHIR_TOKEN": "fhir-token"},
            registry="registry.example.org/trains",
        ).save("hospital-a")
        station = Station.load("BLOCK_NAME")
        ```
    """

    model_config = _CONFIG

    _block_type_name = "Station"
    _block_type_slug = "station"
    _description = "A place that has data, and lets trains come to them."
    _logo_url = _LOGO
    _documentation_url: ClassVar[Any] = _DOCUMENTATION

    station_id: int = Field(ge=1, description="The number by which trains know the station.")
    work_pool: str | None = Field(
        default=None, description="Work pool whose workers are beside the data. Empty: that of the deployment train."
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="What trains require of it: addresses, choices and paths in the container."
    )
    secret_environment: dict[str, str] = Field(
        default_factory=dict,
        description="The same with secret values, such as tokens: variable name to the name of a Prefect Secret block.",
    )
    mounts: list[StationMount] = Field(
        default_factory=list, description="What trains see of its machine: a list of {target, host_path or storage, read_only}."
    )
    registry: str | None = Field(
        default=None,
        description="Where trains travel on from, such as registry.example.org/trains. Empty: they stay in the station's engine.",
    )
    registry_credentials: DockerRegistryCredentials | None = Field(
        default=None, description="Login for a registry that asks for one; trains are fetched with it, too."
    )
    policy: StationPolicy = Field(
        default_factory=StationPolicy, description="What trains may do here, and what is demanded of them."
    )
    signing_key: str | None = Field(
        default=None,
        description="Name of the Prefect Secret block of its key; made when it is not there. Empty: a file of the worker's machine.",
    )
    cpus: float = Field(default=1, description="Hard limit of a train's processors; 0.5 is half of one.")
    memory: str = Field(default="1GiB", description="Hard limit of a train's memory, such as 512MiB or 8GiB.")
    timeout_seconds: float | None = Field(default=None, description="Hard limit of a train's running time. Empty: none.")

    @field_validator("environment", "secret_environment", mode="before")
    @classmethod
    def _variables(cls, value: object, info: ValidationInfo) -> object:
        return _checked_variables(value, secret=info.field_name == "secret_environment", reserved=STATION_VARIABLES)

    @field_validator("cpus", "timeout_seconds")
    @classmethod
    def _positive(cls, value: float | None, info: ValidationInfo) -> float | None:
        return _checked_amount(value, str(info.field_name))

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str) -> str:
        if _as_value_error(parse_bytes, value) < _LEAST_MEMORY:
            raise ValueError(f"{value} makes no sense. Write a size from {_LEAST_MEMORY >> 20}MiB, such as 512MiB or 8GiB")
        return value

    @field_validator("registry")
    @classmethod
    def _registry(cls, value: str | None) -> str | None:
        if value and not re.fullmatch(r"[a-z0-9][a-z0-9._-]*(:\d+)?(/[a-z0-9][a-z0-9._-]*)*", value.rstrip("/")):
            raise ValueError(
                f"{value!r} is no place in a registry. Write HOST[:PORT]/FOLDER, without https:// and without a tag"
            )
        return (value or "").rstrip("/") or None

    @model_validator(mode="after")
    def _consistent(self) -> Station:
        if both := sorted(self.environment.keys() & self.secret_environment.keys()):
            raise ValueError(f"{both[0]} is in environment and in secret_environment. Keep one of them")
        targets = [mount.target for mount in self.mounts]
        if twice := [target for target in targets if targets.count(target) > 1]:
            raise ValueError(f"two things are to be mounted at {twice[0]}. Give one of them another target")
        return self


def _checked_variables(value: object, *, secret: bool, reserved: frozenset[str]) -> object:
    """The variables of an environment, if a container can have them; those of a secret one name Secret blocks."""
    for name, text in value.items() if isinstance(value, Mapping) else ():
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a variable. Use letters, digits and _, not beginning with a digit")
        if name in reserved or name.startswith((VARIABLE_PREFIX, SECRET_PREFIX)):
            raise ValueError(f"{name} is set by oasis-flows itself. Choose another name")
        if not isinstance(text, str):
            raise ValueError(
                f'the value of {name} is {text!r}, which is no text. Put it in quotes: {name}: "{str(text).lower()}"'
            )
        if "\0" in text:
            raise ValueError(f"the value of {name} holds a NUL character. Remove it")
        if secret and not re.fullmatch(r"[a-z0-9-]+", text):
            raise ValueError(
                f"{name} must name a Prefect Secret block (lower-case letters, digits, dashes), never hold the secret itself"
            )
    return value


def _checked_amount(value: float | None, field: str) -> float | None:
    most, example = {"cpus": (1024, "0.5 or 4"), "timeout_seconds": (10 * 365 * 86400, "3600")}[field]
    if value is not None and not (math.isfinite(value) and 0.01 <= value <= most):
        raise ValueError(f"{value} makes no sense. Write a number from 0.01 to {most}, such as {example}")
    return value


def _folder_url(value: str) -> str:
    """The URL of a folder as it is kept: no trailing slash, local paths whole."""
    if not value.strip():
        raise ValueError("the URL is empty. Write the whole path of a folder, or a URL such as s3://bucket/folder")
    if "://" in value:
        scheme, rest = value.split("://", 1)
        if scheme in ("file", "local") and not rest.startswith("/"):
            raise ValueError(f"{value!r} is relative. Write the whole path: {scheme}:///{rest}")
        if not rest.strip("/") and scheme != "memory":
            raise ValueError(f"{value!r} names no folder. Write for example {scheme}://bucket/folder")
        _no_credentials(value)
        return value if value.endswith("://") else value.rstrip("/")
    path = Path(value).expanduser()
    if not path.is_absolute():
        raise ValueError(
            f"{value!r} is relative, and a worker would look for it elsewhere. Write the whole path: {path.absolute()}"
        )
    return value.rstrip("/") or "/"


def _no_credentials(url: str) -> None:
    """Documents and records show URLs, so nothing secret may be in one."""
    parts = urlsplit(url)
    if parts.password is not None or re.search(r"(?i)((^|&)sig|signature|token|secret|password|credential)=", parts.query):
        raise ValueError(
            "the URL holds a password or a signature, and URLs are shown. Put credentials into a DatasetStore document, or the machine's own configuration"
        )


def _as_value_error(function: Any, *arguments: Any) -> Any:
    """Call a function of the floor; pydantic wants its refusals as `ValueError`."""
    try:
        return function(*arguments)
    except OasisError as error:
        raise ValueError(str(error)) from None
