"""Images made of containers in the Docker engine, without `docker commit`.

A commit would carry the container's environment into the image: the engine merges it into whatever configuration it is
given, and keeps the whole of it under `container_config`. So an image is saved, and loaded again with one layer more and a
configuration of ours. Until a run is over, it is known as the run's draft, by a name that says whose it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from typing import IO, Any

from .. import lease
from ..errors import EngineError, ImageNotFound
from ..job import ContainerJob, RegistryLogin
from ..lineage import Content, steps
from . import docker_spec as spec
from .docker_errors import push_error, words_of
from .docker_image import _inspect, _load_error, check_login
from .docker_run import remove_container
from .image_archive import Extension, docker_stream, read_archive
from .shield import shielded

Change = Callable[[Mapping[str, Any]], Mapping[str, Any]]

DRAFTS = "oasis-flows/draft"
# A draft has this name, too, while it is pushed: then its others are of the push, and of nobody else.
PUSHING = "oasis-flows/pushing"
_TIMEOUT = 1800
_CHUNK = 1 << 20


class _Stream(io.RawIOBase):
    """Chunks as a file that is read from front to back."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            found = next(self._chunks, None)
            if found is None:
                return 0
            self._rest = found
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


@contextmanager
def exported(api: Any, container: str) -> Iterator[IO[bytes]]:
    """The files of a container as a tar archive. Like the engine's own export, without what was mounted into it."""
    chunks = api.export(container, chunk_size=_CHUNK)
    with contextlib.closing(chunks):
        yield io.BufferedReader(_Stream(iter(chunks)), _CHUNK)


@contextmanager
def files_of_image(api: Any, job: ContainerJob) -> Iterator[IO[bytes]]:
    """See `ImageEngine.files`."""
    labels = {
        spec.RUN_ID: job.run_id,
        spec.ATTEMPT: str(job.attempt),
        spec.LEASE: str(job.lease),
        spec.HOST: gethostname(),
        spec.PACKAGE: spec.PACKAGE_NAME,
    }
    name = f"{spec.container_name(job)}-files"
    body = {"Image": job.image, "Entrypoint": ["never started"], "Labels": labels, "HostConfig": {"NetworkMode": "none"}}
    try:
        made = shielded(lambda: api.create_container_from_config(body, name))
        with exported(api, made["Id"]) as stream:
            yield stream
    finally:
        shielded(lambda: remove_container(api, name))


def content(api: Any, image: str) -> Content | None:
    """See `ImageEngine.content`."""
    found = _inspect(api, image)
    if found is None:
        return None
    return Content(
        config=found.get("Config") or {},
        layers=tuple((found.get("RootFS") or {}).get("Layers") or ()),
        platform=f"{found.get('Os')}/{found.get('Architecture')}",
        # The engine tells the newest first.
        history=steps(reversed(api.history(found["Id"])), "CreatedBy", "Comment"),
    )


def extend(api: Any, image: str, layer: Path, change: Change, owner: Path, spool: Path) -> str:
    """See `ImageEngine.extend`."""
    found = _inspect(api, image)
    if found is None:
        raise ImageNotFound(f"The image {image} is no longer in the engine. Somebody removed it meanwhile; run it again.")
    draft, label = _draft(owner), f"The image {image}"
    before = _inspect(api, draft)
    spool.mkdir(parents=True, exist_ok=True)
    api.timeout = _TIMEOUT
    # It has no name, so it is gone with the process, however that ends.
    with tempfile.TemporaryFile(dir=spool) as saved, layer.open("rb") as added:
        for chunk in api.get_image(found["Id"], _CHUNK):
            saved.write(chunk)
        archive = read_archive(saved, label)
        digest = hashlib.file_digest(added, "sha256").hexdigest()
        config = _extended(json.loads(archive.config_bytes), change, f"sha256:{digest}")
        stream = docker_stream(saved, archive, label, Extension(added, json.dumps(config).encode(), draft))
        _load(api, stream, label)
    if _inspect(api, draft) is None:
        raise EngineError(f"The engine loaded {draft} and does not have it. See the engine's own log.")
    if before is not None and before["Id"] != image:
        _remove(api, before["Id"])
    return draft


def _extended(config: Mapping[str, Any], change: Change, layer: str) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat()
    history = [*(config.get("history") or ()), {"created": now, "created_by": "oasis-flows"}]
    platform = {key: config[key] for key in ("architecture", "os", "os.version", "variant") if key in config}
    rootfs = {"type": "layers", "diff_ids": [*config["rootfs"]["diff_ids"], layer]}
    return {
        **platform,
        "created": now,
        "config": dict(change(config.get("config") or {})),
        "rootfs": rootfs,
        "history": history,
    }


def _load(api: Any, stream: Iterator[bytes], label: str) -> None:
    import docker.errors

    try:
        for event in api.load_image(stream):
            if "error" in event:
                raise _load_error(label, str(event["error"]))
    except docker.errors.APIError as error:
        raise _load_error(label, words_of(error)) from error


def push(api: Any, image: str, reference: str, login: RegistryLogin | None) -> str:
    """See `ImageEngine.push`."""
    import docker.errors

    repository, _, tag = reference.rpartition(":")
    check_login(repository, login)
    auth = {"username": login.username, "password": login.password} if login else None
    digest = ""
    known, pushing = _inspect(api, reference), image.replace(f"{DRAFTS}:", f"{PUSHING}:", 1)
    try:
        if pushing != image:
            api.tag(image, *pushing.rsplit(":", 1), force=True)
        api.tag(image, repository, tag, force=True)
        for event in api.push(repository, tag, stream=True, decode=True, auth_config=auth):
            if "error" in event:
                raise push_error(reference, str(event["error"]), with_login=login is not None)
            digest = str((event.get("aux") or {}).get("Digest") or digest)
    except docker.errors.APIError as error:
        raise push_error(reference, words_of(error), with_login=login is not None) from None
    finally:
        if known is None:
            shielded(lambda: forget(api, reference))
        else:
            shielded(lambda: api.tag(known["Id"], repository, tag, force=True))
        if pushing != image:
            shielded(lambda: forget(api, pushing))
    if not digest:
        raise EngineError(f"The engine pushed {reference} and does not say as what. See the engine's own log.")
    return f"{repository}@{digest}"


def name(api: Any, image: str, reference: str) -> str:
    """See `ImageEngine.name`."""
    repository, _, tag = reference.rpartition(":")
    api.tag(image, repository, tag, force=True)
    return str(api.inspect_image(image)["Id"])


def forget(api: Any, reference: str) -> None:
    """See `ImageEngine.forget`."""
    _remove(api, reference)


def _remove(api: Any, reference: str) -> None:
    import docker.errors

    try:
        api.remove_image(reference)
    except docker.errors.NotFound:
        return
    except docker.errors.APIError as error:
        # 409: a container, or another name of it, is somebody's.
        if error.status_code != 409:
            raise


def _draft(owner: Path) -> str:
    """The name of the draft of the run whose lease this is. It says whose, as an engine may serve several machines and users."""
    workspace = owner.parent
    return f"{DRAFTS}:{workspace.name}.{_place(workspace.parent)}"


def _place(workspaces: Path) -> str:
    return hashlib.sha256(f"{gethostname()}:{workspaces}".encode()).hexdigest()[:8]


def reap_drafts(api: Any, run_id: str | None, *, grace_seconds: float, below: Path | None) -> None:
    """Remove the drafts of one run, or of all runs below a folder of leases whose owner is dead; see `Engine.reap`.

    One that was being pushed goes with the names that it was pushed under.
    """
    there = [name for image in api.images(filters={"reference": [PUSHING, DRAFTS]}) for name in image.get("RepoTags") or ()]
    for place in (PUSHING, DRAFTS):
        for reference in [name for name in there if name.startswith(f"{place}:")]:
            with _ownerless(reference.removeprefix(f"{place}:"), run_id, grace_seconds, below) as free:
                if free:
                    # The name that says whose it is goes last: whoever is interrupted here is followed by somebody.
                    for name in _names(api, reference) if place == PUSHING else ():
                        _remove(api, name)
                    _remove(api, reference)


def _names(api: Any, reference: str) -> list[str]:
    """The other names of an image."""
    found = _inspect(api, reference) or {}
    return [name for name in found.get("RepoTags") or () if name != reference]


@contextmanager
def _ownerless(owned: str, run_id: str | None, grace_seconds: float, below: Path | None) -> Iterator[bool]:
    """Is a draft, by its tag, one of the run; or, without a run, one whose owner is dead? A lease stays locked in the block."""
    owner, _, place = owned.rpartition(".")
    if run_id is not None:
        yield owner == run_id
    elif below is None or place != _place(below):
        yield False
    else:
        path = below / owner / "lease"
        with nullcontext(True) if lease.missing(path) else lease.taken(path, grace_seconds) as free:
            yield free
