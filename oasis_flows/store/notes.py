"""Small files in a folder of a store, each written whole: what a long job writes down about itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress

from .transfer import Location, files, in_order
from .verdicts import Missing


class Notes:
    """The notes in one folder. Safe to use from many threads."""

    def __init__(self, location: Location) -> None:
        self._files = files(location)

    def write(self, name: str, content: bytes) -> None:
        """Write a note, in place of one of the same name; a reader sees the old one or the new one, never a part."""
        self._files.write(name, [content], len(content))

    def read(self, name: str) -> bytes | None:
        """What a note says; `None` where there is none."""
        with suppress(Missing):
            return b"".join(self._files.read(name))
        return None

    def all(self) -> Iterator[bytes]:
        """What all of the notes say, in the order of their names."""
        found = in_order(lambda entry: b"".join(self._files.read(entry.path)), self._files.list())
        with suppress(Missing), closing(found):
            yield from found
