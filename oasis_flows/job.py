"""What an engine is asked to run, and how it ended: values only.

A `ContainerJob` is complete: an engine needs nothing else, reads no environment and no setting. Sizes are bytes, times
are seconds or aware datetimes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol

from .errors import DescriptionError

Stream = Literal["stdout", "stderr"]


class LogSink(Protocol):
    """Takes the container's output. Called by one thread at a time, in the order of arrival."""

    def __call__(self, stream: Stream, data: bytes) -> None: ...


class Reason(StrEnum):
    """How a container ended: a closed set of stable codes."""

    OK = "ok"
    EXIT_NONZERO = "exit_nonzero"
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    KILLED = "killed"
    COMMAND_NOT_FOUND = "command_not_found"
    NOT_EXECUTABLE = "not_executable"
    EXEC_FORMAT = "exec_format"
    OUTPUT_TOO_LARGE = "output_too_large"
    TOO_MANY_FILES = "too_many_files"
    LOG_TOO_LARGE = "log_too_large"
    DISK_FULL = "disk_full"
    PREREQUISITE_FAILED = "prerequisite_failed"
    EVICTED = "evicted"

    @property
    def keeps_output(self) -> bool:
        """Is what was written published? Of an output that was too much nobody looks at the half, and it would fill the store."""
        return self not in (Reason.OUTPUT_TOO_LARGE, Reason.TOO_MANY_FILES, Reason.DISK_FULL)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryLogin:
    """A user name and password for one registry; the password never shows in `repr`."""

    registry: str
    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource:
    """Where an image comes from: exactly one of a registry reference and an archive.

    `image_file` is a local path or any fsspec URL; `storage_options` are fsspec's for that URL.
    """

    image_id: str | None = None
    image_file: str | None = None
    login: RegistryLogin | None = None
    storage_options: Mapping[str, object] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if bool(self.image_id) == bool(self.image_file):
            raise DescriptionError("An image comes from exactly one place. Give either image_id or image_file.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A folder or file of the host, seen in the container under `target` (absolute)."""

    source: Path
    target: str
    read_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageMount:
    """What the engine has under `source`, the whole path of a folder of its machine or the name of a volume, seen in the
    container under `target`. Unlike a `Mount` it is not the run's: nothing below it is counted, and it is never made.
    """

    source: str
    target: str
    read_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    """A program that runs the container's own: an argument vector that gets entrypoint and command as its last words.

    `ended` is a file that the wrapper makes once the container's own program has ended. From then on the job's time limit
    counts no more: what is left to do has `linger_seconds`, and is stopped then like a container that is cancelled.
    """

    argv: tuple[str, ...]
    ended: Path
    linger_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Hard limits. `gpus` is a number of devices, or "all"; 0 means none.

    `output_bytes` and `output_files` are about what is below all writable mounts together, `log_bytes` about stdout and
    stderr together; a container that passes one is stopped, with a reason of its own. `None` means no limit.
    """

    cpus: float = 1.0
    memory_bytes: int = 1 << 30
    shm_bytes: int | None = None
    tmp_bytes: int | None = None
    pids: int = 1024
    gpus: int | Literal["all"] = 0
    output_bytes: int | None = None
    output_files: int | None = None
    log_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """What the container may do beyond computing on its two folders. The defaults are the closed door."""

    network: bool = False
    writable_root: bool = False
    new_privileges: bool = False
    capabilities: tuple[str, ...] = ()

    @property
    def loosened(self) -> tuple[str, ...]:
        """The names of what was opened, for the record and for people."""
        flags = (("network", self.network), ("writable_root", self.writable_root), ("new_privileges", self.new_privileges))
        return tuple(name for name, on in flags if on) + tuple(f"capability {c}" for c in self.capabilities)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerJob:
    """One container to run once.

    `image` is what `Engine.prepare` returned. `command` and `entrypoint` are argument vectors; `None` leaves the
    image's own. `environment` is added to the image's; `secret_environment` too, and its values are in no record.
    `lease` is a file that the owner keeps locked as long as it lives (see the module `lease`): who can lock it knows that
    the owner is dead. `timeout_seconds` counts from the container's start; at its end the container gets SIGTERM, and
    SIGKILL after `stop_grace_seconds`. When the owner has died, it stays for `retry_window_seconds`, so that a retry finds it.
    """

    run_id: str
    image: str
    lease: Path
    attempt: int = 1
    entrypoint: tuple[str, ...] | None = None
    command: tuple[str, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    secret_environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    mounts: tuple[Mount, ...] = ()
    storages: tuple[StorageMount, ...] = ()
    wrapper: Wrapper | None = None
    working_dir: str = "/work"
    user: str = ""
    resources: Resources = field(default_factory=Resources)
    sandbox: Sandbox = field(default_factory=Sandbox)
    timeout_seconds: float | None = None
    stop_grace_seconds: float = 10.0
    retry_window_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What a container used: seconds since its start; since the sample before, processors on average and memory at most.

    Memory is what could not be given back at once: the file cache that nobody uses is not counted.
    """

    seconds: float
    cpus: float
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerExit:
    """How a container ended.

    `exit_code` is `None` when it never started. `in_force` is what the engine itself said, before the start, about
    limits, sandbox, user and mounts (JSON values only). `memory_peak_bytes` and `cpu_seconds` are `None` where they could
    not be read; the time is that of the last look, a moment before the end. `limit_passed` is the limit of output, files or
    log that it passed, or what must stay free of a disk: bytes or files, as the reason has it. `forks_refused` counts how
    often the limit of processes refused one. `usage` is what was seen from outside while it ran, oldest first, never more
    than 240 samples. `log_lost` says in words what may have kept a part of its output out of the log, empty where nothing
    did. `detail` quotes the engine where it said why; `last_words` are the last lines on stderr, filled in by
    who keeps the log.
    """

    reason: Reason
    exit_code: int | None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    memory_limit_bytes: int | None = None
    memory_peak_bytes: int | None = None
    cpu_seconds: float | None = None
    forks_refused: int = 0
    usage: tuple[Sample, ...] = ()
    timeout_seconds: float | None = None
    limit_passed: int | None = None
    in_force: Mapping[str, object] = field(default_factory=dict)
    log_lost: str = ""
    detail: str = ""
    last_words: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """How long the container ran; 0 when it never started."""
        if self.started_at is None or self.finished_at is None:
            return 0.0
        # A container that ends at once can have been seen to end before it was seen to start.
        return max(0.0, (self.finished_at - self.started_at).total_seconds())

    def to_json(self) -> dict[str, object]:
        """The exit as JSON values; `from_json` reads them back."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["usage"] = [astuple(sample) for sample in self.usage]
        return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ContainerExit:
        """The exit that `to_json` wrote."""
        times = {name: datetime.fromisoformat(text) for name in ("started_at", "finished_at") if (text := values[name])}
        usage = tuple(Sample(*numbers) for numbers in values["usage"])
        words = tuple(values["last_words"])
        return cls(**{**values, **times, "reason": Reason(values["reason"]), "usage": usage, "last_words": words})


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?\s*")


def parse_bytes(text: str) -> int:
    """Bytes in a size such as "512MiB", "1.5GiB", "2GB" or "1048576".

    Raises:
        DescriptionError: it is not such a size.
    """
    found = _SIZE.fullmatch(text)
    if not found:
        raise DescriptionError(f"{text!r} is not a size. Write a number and a unit, such as 512MiB, 2GiB or 4GB.")
    unit = found[2] or ""
    return int(float(found[1]) * _UNITS["k" if unit == "K" else unit])


def counted(count: int, noun: str) -> str:
    """A number and its noun: "1 file", "2 files"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def human_bytes(count: int | None) -> str:
    """A size as people read it: "1.5 GiB"; "unknown" for `None`."""
    if count is None:
        return "unknown"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError(count)
