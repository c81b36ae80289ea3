"""Images in the Docker engine: pulled from a registry, or loaded from a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import (
    DescriptionError,
    EngineError,
    ImageNotFound,
    InvalidImageFile,
    UnsupportedByEngine,
)
from ..job import RegistryLogin
from .docker_errors import pull_error, words_of
from .image_archive import ImageArchive, docker_stream, read_archive
from .image_file import find_file, fingerprint, label_of, opened

# Loaded images are kept under this name and a fingerprint of the file: it says what they are in `docker images`, keeps
# `docker image prune` from taking them between preparation and run, and says next time that there is nothing to load.
LOADED = "oasis-flows/image-file"

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386", "i386": "386"}
_ID = re.compile(r"(sha256:)?[0-9a-f]{64}")
_HUB = {"", "docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"}
# A large layer is unpacked before the engine says the next word.
_LOAD_TIMEOUT = 1800


def pull(api: Any, reference: str, login: RegistryLogin | None, info: Mapping[str, Any]) -> str:
    """See `DockerEngine.prepare`; `info` is the engine's word about itself."""
    image = _inspect(api, reference)
    if image is None:
        _pull(api, reference, login)
        image = _inspect(api, reference)
    if image is None:
        raise ImageNotFound(f"The engine pulled {reference} and does not have it. See the engine's own log.")
    check_platform(info, str(image.get("Os")), str(image.get("Architecture")), UnsupportedByEngine, f"The image {reference}")
    return pinned(reference, image.get("RepoDigests") or (), image["Id"])


def _inspect(api: Any, reference: str) -> dict[str, Any] | None:
    import docker.errors

    try:
        image: dict[str, Any] = api.inspect_image(reference)
    except docker.errors.NotFound:
        return None
    except docker.errors.APIError as error:
        if error.status_code == 400:
            raise pull_error(reference, words_of(error), with_login=False) from error
        raise
    return image


def _pull(api: Any, reference: str, login: RegistryLogin | None) -> None:
    import docker.errors
    from docker.utils import parse_repository_tag

    if _ID.fullmatch(reference):
        raise ImageNotFound(
            f"The engine has no image {reference}, and registries do not know an image by its id. "
            "Give its name, or registry/name@sha256:… ."
        )
    repository, tag = parse_repository_tag(reference)
    check_login(repository, login)
    auth = {"username": login.username, "password": login.password} if login else None
    try:
        for event in api.pull(repository, tag or "latest", stream=True, decode=True, auth_config=auth):
            if "error" in event:
                raise pull_error(reference, str(event["error"]), with_login=login is not None)
    except docker.errors.APIError as error:
        raise pull_error(reference, words_of(error), with_login=login is not None) from None
    except docker.errors.InvalidRepository as error:
        raise pull_error(reference, f"invalid repository name: {error}", with_login=False) from None


def check_login(repository: str, login: RegistryLogin | None) -> None:
    """Return if the login is one for the image's registry: the engine would hand the password to any.

    Raises:
        DescriptionError: it is another registry's.
    """
    if login is None or not login.registry:
        return
    wanted = _registry(repository)
    given = re.sub(r"^https?://", "", login.registry).split("/")[0]
    if given != wanted and not (given in _HUB and wanted in _HUB):
        raise DescriptionError(
            f"The credentials are for the registry {given}, and the image {repository} is at {wanted or 'docker.io'}. "
            "Give those of its registry; they were not sent."
        )


def _registry(repository: str) -> str:
    first, slash, _ = repository.partition("/")
    return first if slash and (re.search(r"[.:]", first) or first == "localhost") else ""


def _familiar(repository: str) -> str:
    """A repository as the engine writes it: without the Docker Hub's own names."""
    return re.sub(r"^(index\.)?docker\.io/", "", repository).removeprefix("library/")


def pinned(reference: str, repo_digests: Iterable[str], image_id: str) -> str:
    """The reference to exactly these bytes: by the digest that the registry knows, else the image's id."""
    name = reference.partition("@")[0]
    head, _, tail = name.rpartition("/")
    repository = _familiar(f"{head}/{tail.partition(':')[0]}" if head else tail.partition(":")[0])
    return next((d for d in repo_digests if _familiar(d.partition("@")[0]) == repository), image_id)


def check_platform(info: Mapping[str, Any], os: str, architecture: str, refusal: type[Exception], subject: str) -> None:
    """Return if the engine's machine can run such programs; an image that does not say is taken.

    Raises:
        `refusal`: it cannot.
    """
    machine = str(info.get("Architecture") or "")
    engine = (str(info.get("OSType") or "linux"), _ARCHITECTURES.get(machine, machine))
    image = (os or engine[0], architecture or engine[1])
    if image == engine or (engine[1], image[1]) == ("amd64", "386") or not engine[1]:
        return
    raise refusal(
        f"{subject} is made for {'/'.join(image)}, and the engine runs {'/'.join(engine)}. "
        f"Build it for {'/'.join(engine)} (docker build --platform {'/'.join(engine)}), or use another worker."
    )


def load(api: Any, location: str, options: dict[str, Any], spool: Path, info: Mapping[str, Any]) -> str:
    """See `DockerEngine.prepare`. A remote file crosses the network once, into an unnamed file in `spool`.

    A file is not read at all when its size and version (time and inode, or ETag) are those of one loaded before and the
    engine still has that image; otherwise it is read, and loaded only if the engine lacks the image.
    """
    label = label_of(location)
    filesystem, path = find_file(location, options, label)
    tag = fingerprint(filesystem, path, label)
    if tag and (known := _inspect(api, f"{LOADED}:{tag}")):
        return str(known["Id"])
    with opened(filesystem, path, spool, label) as file:
        archive = read_archive(file, label)
        check_platform(info, archive.os, archive.architecture, InvalidImageFile, label)
        present = _inspect(api, archive.id)
        image_id = str(present["Id"]) if present else _load(api, file, archive, label)
    if tag:
        api.tag(image_id, LOADED, tag)
    return image_id


def _load(api: Any, file: IO[bytes], archive: ImageArchive, label: str) -> str:
    import docker.errors

    api.timeout = _LOAD_TIMEOUT
    said: list[str] = []
    try:
        for event in api.load_image(docker_stream(file, archive, label)):
            if "error" in event:
                raise _load_error(label, str(event["error"]))
            said.append(str(event.get("stream", "")))
    except docker.errors.APIError as error:
        raise _load_error(label, words_of(error)) from error
    found = re.search(r"Loaded image(?: ID)?: (sha256:[0-9a-f]{64})", "".join(said))
    image = _inspect(api, found[1] if found else archive.id)
    if image is None:
        raise EngineError(f"{label} was loaded, but the engine does not have its image. It said: {''.join(said)[-300:]}")
    return str(image["Id"])


def _load_error(label: str, words: str) -> Exception:
    if re.search(r"no space left|quota exceeded", words, re.IGNORECASE):
        return EngineError(f"{label} does not fit on the engine's disk. Free some (docker system df). The engine said: {words}")
    return InvalidImageFile(f"{label} is refused by the engine. Save it again, and compare checksums. It said: {words}")
