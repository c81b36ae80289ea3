"""Archives of images, `docker save`'s and OCI's: what is in one, and the same as a stream that any engine loads.

Pure over an open file, in constant memory: layers are passed over or passed on, never held. Names in an archive are
data: they are looked up among its members and never used as paths; the stream that goes to the engine bears our own.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, cast

from ..errors import InvalidImageFile

_CHUNK = 1 << 20
_MAX_MEMBERS = 100_000
_MAX_JSON = 4 << 20
_MAX_JSON_TOTAL = 32 << 20
_SAVE = "Make one with `docker save NAME:TAG -o FILE`."
_MAGIC = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; use gzip or nothing",
    b"\xfd7zXZ\x00": "compressed with xz; use gzip or nothing",
    b"BZh": "compressed with bzip2; use gzip or nothing",
    b"\x7fELF": "a program",
    b"<": "a web page or XML (is the URL right?)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageArchive:
    """The one image in an archive. `config` and `layers` are names of its members; `id` is the configuration's digest."""

    id: str
    config: str
    config_bytes: bytes = field(repr=False)
    layers: tuple[str, ...]
    architecture: str
    os: str
    names: tuple[str, ...]


@dataclass(slots=True)
class _Contents:
    files: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    documents: dict[str, bytes] = field(default_factory=dict)
    count: int = 0
    room: int = _MAX_JSON_TOTAL

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Note one member; of the small ones that may be JSON, the content."""
        self.count += 1
        if self.count > _MAX_MEMBERS:
            return
        name = posixpath.normpath(member.name)
        if member.issym():
            self.links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        elif member.islnk():
            self.links[name] = posixpath.normpath(member.linkname)
        elif member.isreg():
            self.files[name] = member.size
            if _may_be_json(name) and member.size <= min(_MAX_JSON, self.room) and (body := tar.extractfile(member)):
                self.documents[name] = body.read()
                self.room -= member.size

    def resolve(self, name: str) -> str | None:
        """The regular file that a name stands for, through links inside the archive."""
        name = posixpath.normpath(name)
        for _ in range(8):
            if name in self.files:
                return name
            if name not in self.links:
                return None
            name = self.links[name]
        return None

    def json(self, label: str, name: str) -> Any:
        found = self.resolve(name)
        if found is None or found not in self.documents:
            raise InvalidImageFile(
                f"{label} is not a complete image: its {name} is missing. The file may be cut short. {_SAVE}"
            )
        try:
            return json.loads(self.documents[found])
        except ValueError as error:
            raise InvalidImageFile(f"{label} is not an image: its {name} is no JSON ({error}). {_SAVE}") from error


def read_archive(file: IO[bytes], label: str) -> ImageArchive:
    """The one image in an archive, plain or gzip; `label` names the file in messages.

    Raises:
        InvalidImageFile: it is no archive of exactly one image; the message says what it is instead.
    """
    contents = _scan(file, label)
    try:
        if "manifest.json" in contents.files:
            return _docker_image(contents, label)
        if "index.json" in contents.files:
            return _oci_image(contents, label)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise InvalidImageFile(f"{label} is not an image: its manifest is malformed ({error!r}). {_SAVE}") from error
    top = {name.split("/")[0] for name in (*contents.files, *contents.links)}
    if {"etc", "usr", "bin", "proc", "dev"} & top:
        raise InvalidImageFile(f"{label} is a `docker export` of a container's files, not an image. {_SAVE}")
    raise InvalidImageFile(
        f"{label} is a tar archive, but not of an image: it has neither manifest.json nor index.json. "
        f"It may be cut short. {_SAVE}"
    )


@dataclass(frozen=True, slots=True)
class Extension:
    """A layer on top of an image, with the configuration and the one name that the whole gets."""

    layer: IO[bytes]
    config_bytes: bytes
    tag: str


def docker_stream(file: IO[bytes], image: ImageArchive, label: str, extension: Extension | None = None) -> Iterator[bytes]:
    """The image as a tar archive for `POST /images/load`, without any tag; or an image that extends it."""
    names = {name: f"layer-{number}.tar" for number, name in enumerate(dict.fromkeys(image.layers))}
    layers = [names[name] for name in image.layers]
    more, tags, config = (
        (["extension.tar"], [extension.tag], extension.config_bytes) if extension else ([], None, image.config_bytes)
    )
    manifest = [{"Config": "config.json", "RepoTags": tags, "Layers": [*layers, *more]}]
    for name, data in (("manifest.json", json.dumps(manifest).encode()), ("config.json", config)):
        yield _header(name, len(data)) + data + _padding(len(data))
    if extension is not None:
        size = extension.layer.seek(0, 2)
        extension.layer.seek(0)
        yield _header("extension.tar", size)
        while data := extension.layer.read(_CHUNK):
            yield data
        yield _padding(size)
    with _readable(label):
        for tar, member in _members(file):
            wanted = names.pop(posixpath.normpath(member.name), None) if member.isreg() else None
            body = tar.extractfile(member) if wanted else None
            if wanted is None or body is None:
                continue
            yield _header(wanted, member.size)
            while data := body.read(_CHUNK):
                yield data
            yield _padding(member.size)
    yield bytes(2 * tarfile.BLOCKSIZE)


def layer_bodies(file: IO[bytes], image: ImageArchive, label: str) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size and content of each layer, each once, in the order of the archive; to be read before the next is taken."""
    wanted = set(image.layers)
    with _readable(label):
        for tar, member in _members(file):
            name = posixpath.normpath(member.name)
            if member.isreg() and name in wanted and (body := tar.extractfile(member)):
                wanted.discard(name)
                yield name, member.size, body


def read_layers(file: IO[bytes], image: ImageArchive, label: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Each layer of the image by its name in the archive, with its bytes before any compression, to be read at once."""
    for name, _, body in layer_bodies(file, image, label):
        packed = body.read(2) == b"\x1f\x8b"
        body.seek(0)
        yield name, cast(IO[bytes], gzip.GzipFile(fileobj=body)) if packed else body


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


class _readable:  # noqa: N801 - reads as a statement
    """Turns what tar and gzip say of a broken file into `InvalidImageFile`."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, EOFError) or (isinstance(error, tarfile.ReadError) and "unexpected end" in str(error)):
            raise InvalidImageFile(
                f"{self._label} is cut short. Copy it again, and compare sizes. The cause: {error}"
            ) from error
        if isinstance(error, tarfile.TarError | zlib.error | gzip.BadGzipFile):
            raise InvalidImageFile(f"{self._label} is damaged. Copy it again, or save it anew. The cause: {error}") from error


def _members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    file.seek(0)
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    source: Any = gzip.GzipFile(fileobj=file) if packed else file
    # A plain file is skipped through by seeking; a packed one is read once, from front to back.
    with tarfile.open(fileobj=source, mode="r|" if packed else "r:", bufsize=_CHUNK) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every member, for ever
            yield tar, member
    while packed and source.read(_CHUNK):
        pass  # up to gzip's checksum, which stands at the end


def _scan(file: IO[bytes], label: str) -> _Contents:
    file.seek(0)
    head = file.read(8)
    if not head:
        raise InvalidImageFile(f"{label} is empty. {_SAVE}")
    contents = _Contents()
    try:
        with _readable(label):
            for tar, member in _members(file):
                contents.add(tar, member)
    except InvalidImageFile:
        if contents.count or head[:2] == b"\x1f\x8b":
            raise
        kind = next((f": it is {words}" for magic, words in _MAGIC.items() if head.startswith(magic)), "")
        raise InvalidImageFile(f"{label} is not a tar archive{kind}. {_SAVE}") from None
    if contents.count > _MAX_MEMBERS:
        raise InvalidImageFile(f"{label} holds more than {_MAX_MEMBERS} files, as no image archive does. {_SAVE}")
    return contents


def _may_be_json(name: str) -> bool:
    return name.endswith(".json") or name.startswith("blobs/")


def _docker_image(contents: _Contents, label: str) -> ImageArchive:
    entries = contents.json(label, "manifest.json")
    if len(entries) != 1:
        names = ", ".join(" = ".join(e.get("RepoTags") or ()) or "an image without a name" for e in entries[:10]) or "none"
        raise InvalidImageFile(f"{label} holds {len(entries)} images: {names}. Save one: `docker save NAME:TAG -o FILE`.")
    entry = entries[0]
    return _image(contents, label, entry["Config"], entry["Layers"], tuple(entry.get("RepoTags") or ()))


def _oci_image(contents: _Contents, label: str) -> ImageArchive:
    found = list(_oci_manifests(contents, label, contents.json(label, "index.json"), 0))
    if len(found) != 1:
        platforms = ", ".join(f"{_platform(d)} ({d['digest'][:19]})" for d in found[:10]) or "none"
        raise InvalidImageFile(f"{label} holds {len(found)} images: {platforms}. Save one image for one platform.")
    manifest = contents.json(label, _blob(found[0]["digest"]))
    for layer in manifest["layers"]:
        if "zstd" in layer.get("mediaType", ""):
            raise InvalidImageFile(f"{label} has layers compressed with zstd, which not every engine reads. Save it with gzip.")
    name = (found[0].get("annotations") or {}).get("org.opencontainers.image.ref.name")
    layers = [_blob(layer["digest"]) for layer in manifest["layers"]]
    return _image(contents, label, _blob(manifest["config"]["digest"]), layers, (name,) if name else ())


def _oci_manifests(contents: _Contents, label: str, index: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
    for descriptor in index["manifests"]:
        # BuildKit keeps provenance beside the image: https://docs.docker.com/build/metadata/attestations/attestation-storage/
        attestation = (descriptor.get("annotations") or {}).get("vnd.docker.reference.type") == "attestation-manifest"
        if attestation:
            continue
        nested = "index" in descriptor.get("mediaType", "") or "manifest.list" in descriptor.get("mediaType", "")
        if nested and depth < 4:
            yield from _oci_manifests(contents, label, contents.json(label, _blob(descriptor["digest"])), depth + 1)
        else:
            yield descriptor


def _platform(descriptor: Mapping[str, Any]) -> str:
    platform = descriptor.get("platform") or {}
    return f"{platform.get('os', 'unknown')}/{platform.get('architecture', 'unknown')}"


def _blob(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/", 1)


def _image(contents: _Contents, label: str, config: str, layers: list[str], names: tuple[str, ...]) -> ImageArchive:
    described = contents.json(label, config)
    resolved = [contents.resolve(layer) for layer in layers]
    missing = [layer for layer, found in zip(layers, resolved, strict=True) if found is None]
    if missing:
        raise InvalidImageFile(
            f"{label} is not a complete image: its layer {missing[0]} is missing. The file may be cut short. {_SAVE}"
        )
    expected = len(described["rootfs"]["diff_ids"])
    if expected != len(layers):
        raise InvalidImageFile(f"{label} is not a complete image: it has {len(layers)} of {expected} layers. {_SAVE}")
    config_name = contents.resolve(config) or config
    data = contents.documents[config_name]
    return ImageArchive(
        id=f"sha256:{hashlib.sha256(data).hexdigest()}",
        config=config_name,
        config_bytes=data,
        layers=tuple(layer for layer in resolved if layer is not None),
        architecture=str(described.get("architecture") or ""),
        os=str(described.get("os") or ""),
        names=names,
    )
