"""Images where a cluster gets them: in registries, asked and filled over HTTP without an engine.

https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode, urljoin

from ..errors import EngineError, ImageDenied, ImageNotFound, InvalidImageFile, OasisError, RegistryUnavailable
from ..job import RegistryLogin
from .docker_errors import login_advice
from .docker_image import check_login
from .image_archive import ImageArchive, layer_bodies, read_archive
from .image_file import find_file, fingerprint, label_of, opened

logger = logging.getLogger(__name__)
Json = Mapping[str, Any]

_OCI, _DOCKER = "application/vnd.oci.image", "application/vnd.docker.distribution"
_INDEXES = (f"{_OCI}.index.v1+json", f"{_DOCKER}.manifest.list.v2+json")
_MANIFESTS = (f"{_OCI}.manifest.v1+json", f"{_DOCKER}.manifest.v2+json", *_INDEXES)
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_CHUNK = 8 << 20
_NAME = re.compile(
    r"(?P<path>[a-z0-9]+(?:(?:[._]|__|-+|/)[a-z0-9]+)*)(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """Where images are pushed to: host, and path in it. `plain` speaks HTTP without TLS."""

    host: str
    path: str
    plain: bool = False
    login: RegistryLogin | None = None

    @property
    def name(self) -> str:
        """As an image's reference begins."""
        return f"{self.host}/{self.path}"

    @classmethod
    def parse(cls, text: str, login: RegistryLogin | None = None) -> Repository:
        """From a setting such as `registry.example.org/algorithms`, or `http://127.0.0.1:5000/algorithms`.

        Raises:
            ImageNotFound: it is no repository's name.
        """
        name = re.sub(r"^https?://", "", text.rstrip("/"))
        host, _, path = name.partition("/")
        if not re.search(r"[.:]|^localhost$", host) or not re.fullmatch(r"[a-z0-9]+([._/-]+[a-z0-9]+)*", path):
            raise ImageNotFound(
                f"{text!r} is not a repository's name. Write OASIS_FLOWS_KUBERNETES_REGISTRY as host/path, such as "
                "registry.example.org/algorithms, or http://host:port/path for one without TLS."
            )
        return cls(host=host, path=path, plain=text.startswith("http://") or _is_loopback(host), login=login)


def _is_loopback(host: str) -> bool:
    return re.match(r"(localhost|127\.[\d.]+|\[::1\])(:\d+)?$", host) is not None


def parse_reference(reference: str) -> tuple[Repository, str]:
    """Repository and tag or digest of an image's name, as engines read it: without a host it is the Docker Hub's.

    Raises:
        ImageNotFound: it is none.
    """
    first, slash, rest = reference.partition("/")
    has_host = bool(slash) and (re.search(r"[.:]", first) is not None or first == "localhost")
    host, name = (first, rest) if has_host else ("docker.io", reference)
    found = _NAME.fullmatch(name)
    if not found:
        raise ImageNotFound(f"{reference!r} is not an image's name. Write it as registry/name:tag, in lower case.")
    path = found["path"]
    if host in ("docker.io", "index.docker.io"):
        host, path = "registry-1.docker.io", path if "/" in path else f"library/{path}"
    return Repository(host=host, path=path, plain=_is_loopback(host)), found["digest"] or found["tag"] or "latest"


def whole_name(reference: str) -> str:
    """An image's name as nodes list it: with host and tag."""
    repository, version = parse_reference(reference)
    host = repository.host.replace("registry-1.docker.io", "docker.io")
    return f"{host}/{repository.path}{'@' if version.startswith('sha256:') else ':'}{version}"


def pin(reference: str, login: RegistryLogin | None) -> tuple[str, Json | None]:
    """The reference to exactly the bytes that it means now, and the image's configuration.

    Raises:
        ImageNotFound, ImageDenied, RegistryUnavailable: as the registry says.
        DescriptionError: the login is another registry's.
    """
    repository, version = parse_reference(reference)
    check_login(reference.partition("@")[0], login)
    registry = _Registry(repository, login)
    digest, manifest = registry.manifest(version)
    head, slash, tail = reference.partition("@")[0].rpartition("/")
    return f"{head}{slash}{tail.partition(':')[0]}@{digest}", registry.config(manifest)


def push(location: str, options: dict[str, Any], repository: Repository) -> tuple[str, Json | None]:
    """Push an image file, layer by layer, what the registry has already left out; return reference and configuration.

    A file is not read at all when its size and version are those of one pushed before.

    Raises:
        InvalidImageFile, StoreDenied, StoreFull, StoreUnavailable: the file cannot be read, or is no image.
        ImageDenied, RegistryUnavailable, EngineError: the registry does not take it.
    """
    label = label_of(location)
    filesystem, path = find_file(location, options, label)
    tag = fingerprint(filesystem, path, label)
    registry = _Registry(repository, repository.login, push=True)
    if tag:
        try:
            digest, manifest = registry.manifest(tag)
            return f"{repository.name}@{digest}", registry.config(manifest)
        except ImageNotFound:
            logger.debug("%s is not in %s yet.", label, repository.name)
    with opened(filesystem, path, Path(tempfile.gettempdir()), label) as file:
        archive = read_archive(file, label)
        digest = _push(registry, file, archive, label, tag)
    return f"{repository.name}@{digest}", dict(json.loads(archive.config_bytes).get("config") or {})


def _push(registry: _Registry, file: IO[bytes], archive: ImageArchive, label: str, tag: str) -> str:
    described: dict[str, dict[str, Any]] = {}
    identities = dict(zip(archive.layers, json.loads(archive.config_bytes)["rootfs"]["diff_ids"], strict=True))
    for name, size, body in layer_bodies(file, archive, label):
        head = body.read(2)
        packed = head == b"\x1f\x8b"
        # A blob of an OCI archive is named by its digest, a layer that is not packed has that of its content.
        expected = (
            f"sha256:{name.rpartition('/')[2]}" if name.startswith("blobs/sha256/") else None if packed else identities[name]
        )
        digest = expected
        if expected is None or not registry.has_blob(expected):
            digest = registry.upload(_with_head(head, body), size)
            if expected is not None and digest != expected:
                raise InvalidImageFile(f"{label} is damaged: a layer has other bytes than it says. Save it again.")
        described[name] = {"mediaType": f"{_OCI}.layer.v1.tar{'+gzip' if packed else ''}", "digest": digest, "size": size}
    if archive.id != registry.upload(iter((archive.config_bytes,)), len(archive.config_bytes)):
        raise EngineError(f"The registry stored another configuration than that of {label}. Run it again.")
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFESTS[0],
        "config": {"mediaType": f"{_OCI}.config.v1+json", "digest": archive.id, "size": len(archive.config_bytes)},
        "layers": [described[name] for name in archive.layers],
    }
    return registry.put_manifest(json.dumps(manifest).encode(), tag)


def _with_head(head: bytes, body: IO[bytes]) -> Iterator[bytes]:
    yield head
    while data := body.read(_CHUNK):
        yield data


class _Registry:
    """One repository of a registry, with a login where it asks for one."""

    def __init__(self, repository: Repository, login: RegistryLogin | None, *, push: bool = False) -> None:
        import urllib3

        self._repository, self._login, self._push = repository, login, push
        scheme = "http" if repository.plain else "https"
        self._base = f"{scheme}://{repository.host}/v2/{repository.path}/"
        self._pool = urllib3.PoolManager(retries=urllib3.Retry(2, redirect=5, backoff_factor=0.5, raise_on_status=False))
        self._authorization = ""

    def manifest(self, version: str) -> tuple[str, Json]:
        """Digest and content of a manifest, or of the index of several."""
        answer = self._ask("GET", f"manifests/{version}", {"Accept": ", ".join(_MANIFESTS)})
        digest = f"sha256:{hashlib.sha256(answer.data).hexdigest()}"
        if version.startswith("sha256:") and version != digest:
            raise EngineError(f"The registry {self._repository.host} has other bytes under {version}. Do not use it.")
        return digest, dict(json.loads(answer.data))

    def config(self, manifest: Json) -> Json | None:
        """What the image says about running it; of several, that for this machine's architecture."""
        if "manifests" in manifest:
            wanted = _ARCHITECTURES.get(platform.machine(), platform.machine())
            fitting = [m for m in manifest["manifests"] if (m.get("platform") or {}).get("architecture") == wanted]
            return self.config(self.manifest(fitting[0]["digest"])[1]) if fitting else None
        if "config" not in manifest:
            return None
        answer = self._ask("GET", f"blobs/{manifest['config']['digest']}")
        return dict(json.loads(answer.data).get("config") or {})

    def has_blob(self, digest: str) -> bool:
        """Is it there already?"""
        try:
            self._ask("HEAD", f"blobs/{digest}")
        except ImageNotFound:
            return False
        return True

    def upload(self, pieces: Iterable[bytes], size: int) -> str:
        """Store a blob and return its digest, which is known only when it has passed."""
        hashed = hashlib.sha256()

        def passed() -> Iterator[bytes]:
            for piece in pieces:
                hashed.update(piece)
                yield piece

        place = self._where(self._ask("POST", "blobs/uploads/", {"Content-Length": "0"}))
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        place = self._where(self._ask("PATCH", place, headers, passed()))
        digest = f"sha256:{hashed.hexdigest()}"
        separator = "&" if "?" in place else "?"
        self._ask("PUT", f"{place}{separator}{urlencode({'digest': digest})}", {"Content-Length": "0"})
        return digest

    def put_manifest(self, data: bytes, tag: str) -> str:
        """Store a manifest, under a tag too, so that a registry that clears up keeps it."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self._ask("PUT", f"manifests/{tag or digest}", {"Content-Type": _MANIFESTS[0]}, data)
        return digest

    def _where(self, answer: Any) -> str:
        return urljoin(self._base, str(answer.headers["Location"]))

    def _ask(self, method: str, path: str, headers: Mapping[str, str] | None = None, body: Any = None) -> Any:
        import urllib3

        url = urljoin(self._base, path)
        for again in (True, False):
            sent = dict(headers or {}) | ({"Authorization": self._authorization} if self._authorization else {})
            try:
                # What is sent once cannot be sent again: the requests before it have logged in.
                answer = self._pool.request(
                    method, url, headers=sent, body=body, timeout=urllib3.Timeout(connect=5.0, read=300.0)
                )
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise RegistryUnavailable(
                    f"The registry {self._repository.host} did not answer. Check its name and the network. "
                    f"The cause: {type(error).__name__}: {error}"
                ) from error
            if answer.status != 401 or not again or not self._log_in(answer.headers.get("WWW-Authenticate", "")):
                break
        if answer.status >= 300:
            raise self._refusal(answer)
        return answer

    def _log_in(self, challenge: str) -> bool:
        """Get what the challenge asks for; False where there is nothing to show."""
        kind, _, rest = challenge.partition(" ")
        basic = ""
        if self._login is not None:
            both = f"{self._login.username}:{self._login.password}".encode()
            basic = f"Basic {base64.b64encode(both).decode()}"
        if kind.lower() == "basic":
            fresh, self._authorization = basic != self._authorization, basic
            return bool(basic) and fresh
        if kind.lower() != "bearer":
            return False
        told = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        scope = f"repository:{self._repository.path}:{'pull,push' if self._push else 'pull'}"
        query = urlencode({"service": told.get("service", ""), "scope": scope})
        answer = self._pool.request(
            "GET", f"{told['realm']}?{query}", headers={"Authorization": basic} if basic else {}, timeout=30.0
        )
        if answer.status >= 300:
            return False
        found = json.loads(answer.data)
        self._authorization = f"Bearer {found.get('token') or found.get('access_token')}"
        return True

    def _refusal(self, answer: Any) -> OasisError:
        words = " ".join(answer.data[:500].decode(errors="replace").split()) or f"HTTP {answer.status}"
        what, said = self._repository.name, f" The registry said: {words}"
        if answer.status == 404:
            return ImageNotFound(
                f"There is no image {what} in that version. Check its spelling; a private one needs registry_credentials.{said}"
            )
        if answer.status in (401, 403):
            asked = "these credentials" if self._login else "to go on without a login"
            return ImageDenied(f"The registry of {what} refuses {asked}. {self._login_advice()}{said}")
        if answer.status in (429, 500, 502, 503, 504):
            return RegistryUnavailable(
                f"The registry of {what} is busy or broken (HTTP {answer.status}). Try again later.{said}"
            )
        return EngineError(f"The registry of {what} refused (HTTP {answer.status}). See the registry's own log.{said}")

    def _login_advice(self) -> str:
        if not self._push:
            return login_advice(with_login=self._login is not None)
        document = "the document that OASIS_FLOWS_KUBERNETES_REGISTRY_CREDENTIALS names"
        if self._login:
            return f"Correct the user name, the password or the rights in {document}."
        return f"Write a login into {document}."
