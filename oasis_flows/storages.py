"""Storages: folders that prerequisites ask for by name, and that a machine maps to what its engine has.

The table has a row for each storage of each engine:

    {"docker": {"datasets": {"path": "/srv/datasets"}, "scratch": {"volume": "scratch", "readOnly": false}}}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import DescriptionError, InvalidPrerequisite
from .job import StorageMount

SETTING = "OASIS_FLOWS_STORAGES"

_VOLUME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TAKEN = ("/proc", "/sys", "/dev", "/run/oasis-flows")


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage that has to be mounted at a path; who needs it, `needed_by`, is for messages."""

    name: str
    path: str
    read_only: bool = True
    needed_by: str = ""


def checked_path(path: str) -> str:
    """The path in its one spelling, if something can be mounted there.

    Raises:
        InvalidPrerequisite: it is relative, the root, not normal, or belongs to the kernel or to this package.
    """
    plain = "/" + "/".join(part for part in path.split("/") if part)
    if not path.startswith("/") or plain == "/" or {".", ".."} & set(plain.split("/")) or any(ord(c) < 32 for c in path):
        raise InvalidPrerequisite(f"nothing can be mounted at {path!r}. Write a whole path, such as /mnt/datasets")
    if any(_within(plain, taken) for taken in _TAKEN):
        raise InvalidPrerequisite(
            f"nothing can be mounted at {path!r}, which is not free. Write another path, such as /mnt/datasets"
        )
    return plain


def merged(wanted: Iterable[Storage], working_dir: str) -> tuple[Storage, ...]:
    """Each storage once at each of its paths, in order; writable where any asks for that.

    Raises:
        InvalidPrerequisite: two storages at one path, or one where the run has its input or output.
    """
    by_path: dict[str, Storage] = {}
    for storage in wanted:
        for taken in (f"{working_dir}/input", f"{working_dir}/output"):
            if _within(storage.path, taken) or _within(taken, storage.path):
                raise InvalidPrerequisite(
                    f"The storage {storage.name}, which {storage.needed_by} needs at {storage.path}, would cover {taken}, "
                    "which belongs to the run. Mount it elsewhere, such as at "
                    f"/mnt/{storage.name}."
                )
        other = by_path.setdefault(storage.path, storage)
        if other.name != storage.name:
            raise InvalidPrerequisite(
                f"Two storages are to be mounted at {storage.path}: {other.name}, which {other.needed_by} needs, and "
                f"{storage.name}, which {storage.needed_by} needs. Give one of them another mountPath."
            )
        by_path[storage.path] = replace(other, read_only=other.read_only and storage.read_only)
    return tuple(by_path.values())


def mounts(storages: Sequence[Storage], table: Mapping[str, Any], engine: str) -> tuple[StorageMount, ...]:
    """What the table of this engine has for the storages.

    Raises:
        DescriptionError: one is not in it, or its row makes no sense; or it may not be written to.
    """
    rows = table.get(engine) or {}
    return tuple(_mount(storage, rows, engine) for storage in storages)


def _mount(storage: Storage, rows: Mapping[str, Any], engine: str) -> StorageMount:
    row = rows.get(storage.name)
    if row is None:
        known = f"It has {', '.join(sorted(rows))}." if rows else "It has none."
        raise DescriptionError(
            f"The storage {storage.name}, which {storage.needed_by} needs, is not mapped for the engine {engine} of this machine. "
            f'{known} Add a row to the setting {SETTING}: {{"{engine}": {{"{storage.name}": {{"path": "/folder/of/the/machine"}}}}}}.'
        )
    source = _source(row)
    if source is None:
        raise DescriptionError(
            f"The setting {SETTING} makes no sense for the storage {storage.name} of the engine {engine}: {row!r}. "
            'Write {"path": "/folder/of/the/machine"} or {"volume": "name"}; and "readOnly": true where nobody may write.'
        )
    if row.get("readOnly") and not storage.read_only:
        raise DescriptionError(
            f"The storage {storage.name} is read-only on this machine, and {storage.needed_by} asks to write to it. "
            f"Leave out readOnly: false there, or readOnly in the setting {SETTING}."
        )
    return StorageMount(source=source, target=storage.path, read_only=storage.read_only)


def _source(row: object) -> str | None:
    if not isinstance(row, dict) or row.keys() - {"path", "volume", "readOnly"} or ("path" in row) == ("volume" in row):
        return None
    source = row.get("path", row.get("volume"))
    if not isinstance(source, str) or not (source.startswith("/") if "path" in row else _VOLUME.fullmatch(source)):
        return None
    return source


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")
