"""What an ended container's files add to those of its image, and the image layer that holds just that; pure over streams.

Both sides are tar archives as `docker export` writes them. Times of change are no content; what the engine itself puts into
every container is nobody's file.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import IO

from .errors import TrainFailed

_CHUNK = 1 << 20
# The engine mounts these into every container, and makes the names that it needs for that.
_ENGINES_OWN = (
    ".dockerenv",
    "etc/hosts",
    "etc/hostname",
    "etc/resolv.conf",
    "etc/mtab",
    "sbin/docker-init",
    "run/.containerenv",
)
_KERNELS = ("dev", "proc", "sys")
# A shorter secret would be found everywhere by chance.
LEAST_SECRET_BYTES = 6


class Kind(StrEnum):
    """What became of a file."""

    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"
    # Of a rebase: a file that travels as it was.
    KEPT = "kept"


@dataclass(frozen=True, slots=True)
class Change:
    """A file, link or folder that differs; `bytes` is its size now, 0 for what is none or is gone."""

    path: str
    kind: Kind
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Difference:
    """All changes, sorted by path."""

    changes: tuple[Change, ...]

    @property
    def size(self) -> int:
        """What the layer holds: the sizes of all files that it brings."""
        return sum(change.bytes for change in self.changes)

    def count(self, kind: Kind) -> int:
        return sum(change.kind is kind for change in self.changes)

    def lines(self) -> bytes:
        """One line of JSON for each change, sorted: what a record signs the digest of."""
        return b"".join(json.dumps(asdict(change), sort_keys=True).encode() + b"\n" for change in self.changes)

    @classmethod
    def from_lines(cls, data: bytes) -> Difference:
        """What `lines` wrote."""
        rows = [json.loads(line) for line in data.splitlines()]
        return cls(tuple(Change(row["path"], Kind(row["kind"]), row["bytes"]) for row in rows))


@dataclass(frozen=True, slots=True)
class _Node:
    """What is compared of a member; `content` is a digest of a file's bytes, or where a link leads."""

    type: bytes
    mode: int
    owner: tuple[int, int]
    bytes: int
    content: str


Listing = Mapping[str, _Node]


def listing(stream: IO[bytes]) -> Listing:
    """All files, links and folders of an export."""
    nodes: dict[str, _Node] = {}
    for tar, member in _members(stream):
        nodes[_path(member.name)] = _node(tar, member, nodes)
    return nodes


def _node(tar: tarfile.TarFile, member: tarfile.TarInfo, before: Mapping[str, _Node]) -> _Node:
    mode, owner = member.mode, (member.uid, member.gid)
    if member.islnk():
        # A second name of a file that came before: it is that file.
        return before.get(_path(member.linkname)) or _Node(member.type, mode, owner, 0, member.linkname)
    body = tar.extractfile(member) if member.isreg() else None
    if body is None:
        return _Node(member.type, mode, owner, 0, f"{member.linkname}:{member.devmajor}:{member.devminor}")
    digest = hashlib.sha256()
    while data := body.read(_CHUNK):
        digest.update(data)
    return _Node(tarfile.REGTYPE, mode, owner, member.size, digest.hexdigest())


def compare(before: Listing, after: Listing, mounted: Collection[str] = ()) -> Difference:
    """The changes from one listing to another. Where something was `mounted` (whole paths), what is below is none."""
    points = (*(path.strip("/") for path in mounted), *_KERNELS, *_ENGINES_OWN)
    changes = []
    for path in before.keys() | after.keys():
        if not _counts(path, points) or (path not in before and _leads_to_a_mount(path, after, points)):
            continue
        old, new = before.get(path), after.get(path)
        if new is None:
            changes.append(Change(path, Kind.REMOVED))
        elif old is None:
            changes.append(Change(path, Kind.ADDED, new.bytes))
        elif old != new:
            changes.append(Change(path, Kind.CHANGED, new.bytes))
    return Difference(tuple(sorted(changes, key=lambda change: change.path)))


def exported(before: Listing, after: Listing, files: Iterable[str]) -> Difference:
    """The files that a train exports by name, as they differ from before.

    Raises:
        TrainFailed: one of them is not there, or is no regular file.
    """
    changes = []
    for name in files:
        path = name.strip("/")
        new, old = after.get(path), before.get(path)
        if new is None or new.type != tarfile.REGTYPE:
            what = "there is none" if new is None else "it is no regular file"
            raise TrainFailed(
                f"The train exports the file {name}, and {what} in its ended container. Correct the train: only files travel."
            )
        kind = Kind.ADDED if old is None else Kind.CHANGED if old != new else Kind.KEPT
        changes.append(Change(path, kind, new.bytes))
    return Difference(tuple(sorted(changes, key=lambda change: change.path)))


def write_layer(stream: IO[bytes], layer: IO[bytes], difference: Difference, secrets: Mapping[str, str]) -> None:
    """Write the layer that makes the difference, from the same container's export; `secrets` are values by variable.

    Folders above its files come with it, and a hard link with the file that it is a name of. Two calls write the same bytes.

    Raises:
        TrainFailed: a file holds a secret of the station.
    """
    wanted = {change.path for change in difference.changes if change.kind is not Kind.REMOVED}
    above = {parent for path in wanted for parent in _parents(path)} - wanted
    gone = {change.path for change in difference.changes if change.kind is Kind.REMOVED}
    searched = {name: value.encode() for name, value in secrets.items() if searchable(value)}
    first_names: dict[str, str] = {}
    with tarfile.open(fileobj=layer, mode="w", format=tarfile.PAX_FORMAT) as out:
        for path in sorted(gone):
            # Of a folder that is gone the topmost name is enough: https://github.com/opencontainers/image-spec layer.md
            if not any(parent in gone for parent in _parents(path)):
                out.addfile(_member(f"{posixpath.dirname(path)}/.wh.{posixpath.basename(path)}".lstrip("/")))
        for tar, member in _members(stream):
            path = _path(member.name)
            if path not in wanted and not (path in above and member.isdir()):
                continue
            plain = tarfile.TarInfo(path)
            plain.type, plain.mode, plain.uid, plain.gid, plain.size = (
                member.type,
                member.mode,
                member.uid,
                member.gid,
                member.size,
            )
            plain.linkname, plain.devmajor, plain.devminor = member.linkname, member.devmajor, member.devminor
            plain.mtime = int(member.mtime)
            plain.pax_headers = {key: value for key, value in member.pax_headers.items() if key.startswith("SCHILY.xattr.")}
            if member.islnk():
                plain.linkname = first_names.get(_path(member.linkname), "")
                if not plain.linkname:
                    raise TrainFailed(
                        f"The train made /{path} a second name of /{_path(member.linkname)}, which does not travel. "
                        "Correct the train: copy the file."
                    )
            if plain.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                first_names[path] = path
                body = tar.extractfile(member)
                assert body is not None  # noqa: S101 - it is a regular file
                out.addfile(plain, _Searching(body, f"/{path}", searched))
            else:
                out.addfile(plain)


def searchable(secret: str) -> bool:
    """Is the secret long enough to be more than chance where it is found?"""
    return len(secret.encode()) >= LEAST_SECRET_BYTES


class _Searching:
    """A file that is read through; what it may not hold is looked for on the way."""

    def __init__(self, body: IO[bytes], path: str, secrets: Mapping[str, bytes]) -> None:
        self._body, self._path, self._secrets = body, path, secrets
        self._kept = b""
        self._reach = max((len(value) for value in secrets.values()), default=1) - 1

    def read(self, size: int = -1) -> bytes:
        data = self._body.read(size)
        window = self._kept + data
        for name, value in self._secrets.items():
            if value in window:
                raise TrainFailed(
                    f"The train wrote the station's secret {name} into {self._path}, and would carry it away. Nothing travels. "
                    "Correct the train, or leave that file out of what it exports."
                )
        self._kept = window[-self._reach :] if self._reach else b""
        return data


def _member(path: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(path)


def _members(stream: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    with tarfile.open(fileobj=stream, mode="r|", bufsize=_CHUNK) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every member, for ever
            yield tar, member


def _path(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _parents(path: str) -> Iterator[str]:
    while path := posixpath.dirname(path):
        yield path


def _counts(path: str, mounted: tuple[str, ...]) -> bool:
    return path not in ("", ".") and not any(path == point or path.startswith(f"{point}/") for point in mounted)


def _leads_to_a_mount(path: str, after: Listing, mounted: tuple[str, ...]) -> bool:
    """Is it a new folder that is there for a mount below it, and for nothing else?"""
    node = after.get(path)
    if node is None or node.type != tarfile.DIRTYPE or not any(point.startswith(f"{path}/") for point in mounted):
        return False
    points = {parent for point in mounted for parent in (point, *_parents(point))}
    return all(below in points for below in after if below.startswith(f"{path}/") and _counts(below, mounted))
