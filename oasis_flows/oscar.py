"""What programs written for OSCAR-Batch and its `config.json` expect. Pure: texts in, values out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .capacity import byte_count, quantity
from .errors import DescriptionError
from .manifest import Entry, check_name
from .sharding import Shard

# The folder beside `input` that says which files are a container's.
RANGE_FOLDER, RANGE_FILE, RANGE_VARIABLE = "oscar", "range.json", "INPUT_FILE_PATH"
INDEX = "index.txt"

_TEXTS = (
    "MinIO.url",
    "MinIO.access_key",
    "MinIO.secret_key",
    "bucket.name",
    "bucket.folder_prefix",
    "output.file",
    "service.name",
)
_OPTIONAL = (
    "oscar_cluster.url",
    "oscar_cluster.auth_basic.username",
    "oscar_cluster.auth_basic.password",
    "oscar_cluster.auth_token.token",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """An OSCAR-Batch configuration. Its secrets never show in `repr`."""

    endpoint_url: str
    access_key: str
    secret_key: str = field(repr=False)
    dataset_url: str
    index: str
    service: str
    cluster_url: str
    username: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)


def parse_config(text: str | bytes) -> Config:
    """The configuration in a `config.json`, as OSCAR-Batch documents it.

    Raises:
        DescriptionError: it is no JSON; or keys are missing, or their values are no text: all are named, values never.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DescriptionError(f"The OSCAR-Batch configuration is not JSON: {error}. Correct the file.") from None
    values: dict[str, str] = {}
    problems: list[str] = []
    for name in (*_TEXTS, *_OPTIONAL):
        value = _at(content, name)
        if value is None and name in _OPTIONAL:
            value = ""
        if value is None:
            problems.append(f"`{name}` is missing")
        elif not isinstance(value, str):
            problems.append(f"`{name}` is {_kind(value)} and must be text")
        elif not value.strip() and name in _TEXTS and name != "bucket.folder_prefix":
            problems.append(f"`{name}` is empty")
        else:
            values[name] = value.strip()
    if problems:
        raise DescriptionError(f"The OSCAR-Batch configuration cannot be used: {'; '.join(problems)}. Correct the file.")
    index = values["output.file"]
    check_name(index)
    prefix = values["bucket.folder_prefix"].strip("/")
    return Config(
        endpoint_url=_with_scheme(values["MinIO.url"]),
        access_key=values["MinIO.access_key"],
        secret_key=values["MinIO.secret_key"],
        dataset_url=f"s3://{values['bucket.name']}" + (f"/{prefix}" if prefix else ""),
        index=index,
        service=values["service.name"],
        cluster_url=_with_scheme(values["oscar_cluster.url"]) if values["oscar_cluster.url"] else "",
        username=values["oscar_cluster.auth_basic.username"],
        password=values["oscar_cluster.auth_basic.password"],
        token=values["oscar_cluster.auth_token.token"],
    )


def resources_of(service: object) -> dict[str, Any]:
    """The `cpus` and `memory` of an Algorithm document, from OSCAR's description of a service.

    Raises:
        DescriptionError: it does not say them.
    """
    if not isinstance(service, Mapping) or "cpu" not in service or "memory" not in service:
        raise DescriptionError(
            "OSCAR's description of the service lacks `cpu` or `memory`. Give --service-cpus and --service-memory."
        )
    return {"cpus": float(quantity(service["cpu"])), "memory": str(byte_count(service["memory"]))}


def range_of(shard: Shard) -> bytes:
    """The lines of the index that are a shard's: counted from 1, both ends included."""
    return json.dumps({"start": shard.start + 1, "end": shard.end}).encode() + b"\n"


def index_lines(entries: Iterable[Entry]) -> Iterable[str]:
    """The lines of the index: names as a program finds them that starts in the working directory."""
    return (f"input/{entry.path}\n" for entry in entries)


def _at(content: object, name: str) -> object:
    for part in name.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return None
        content = content[part]
    return content


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _with_scheme(address: str) -> str:
    # OSCAR-Batch writes MinIO's host alone, and always speaks TLS to it.
    return address.rstrip("/") if "://" in address else f"https://{address.rstrip('/')}"
