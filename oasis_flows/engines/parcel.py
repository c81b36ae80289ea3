"""Folders as one stream of bytes, and back: in constant memory, checked, and safe against whoever wrote the stream.

A stream is a walk: into a folder, its files, out of it. Nobody on either side ever follows a path, only one name after another, from
descriptor to descriptor, so that no link leads out and no depth is too deep. Links, holes, pipes, sockets, and several names of
one file stay what they are; devices, and bits like setuid, are left out. It ends with a SHA-256 of all before.

Why no tar: it wants a size before the bytes, of files that may change; it cannot say that it is whole; and Python's keeps all
members in memory, and follows paths when it unpacks.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..job import Resources
from .quota import Usage

_HEAD = struct.Struct(">cI")  # what follows, and how many bytes of it
_FACTS = struct.Struct(">Iq")  # permissions; time of the last change, in ns
_LENGTH = struct.Struct(">Q")
_FOLDER, _UP, _FILE, _DATA, _HOLE, _LINK, _SAME, _PIPE, _SOCKET, _END = (bytes([letter]) for letter in b"d.fcolnpsE")
_SPECIAL = {_PIPE: stat.S_IFIFO, _SOCKET: stat.S_IFSOCK}
_PIECE, _MOST = 1 << 18, 16 << 20
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAKE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Damaged(Exception):
    """What came is not what was sent: it was cut off, or is no such stream."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a stream held: names of every kind but folders, bytes of files (holes count), and the SHA-256 of the stream."""

    files: int
    bytes: int
    sha256: str


def pack(write: Callable[[bytes], object], sources: Mapping[str, Path], *, opening: bool = False) -> Contents:
    """Write each file or folder under its name here, a single one.

    With `opening`, what is closed even to its owner, who this process is, is opened; nobody else may work there then.

    Raises:
        OSError: something cannot be read, or vanishes meanwhile.
    """
    packing = _Packing(write, opening)
    for name, path in sources.items():
        if path.is_dir():
            packing.folder(name, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        else:
            packing.file(str(path), None, path.stat(), os.fsencode(name), follow=True)
    return packing.end()


class _Packing:
    def __init__(self, write: Callable[[bytes], object], opening: bool) -> None:
        self._write, self._opening, self._buffer, self._digest = write, opening, bytearray(), hashlib.sha256()
        self._files = self._bytes = 0
        self._way: list[bytes] = []
        self._linked: dict[tuple[int, int], bytes] = {}

    def _put(self, kind: bytes, *parts: bytes) -> None:
        self._buffer += _HEAD.pack(kind, sum(map(len, parts)))
        for part in parts:
            self._buffer += part
        if len(self._buffer) >= _PIECE:
            self._flush()

    def _flush(self) -> None:
        data = bytes(self._buffer)
        self._buffer.clear()
        self._digest.update(data)
        self._write(data)

    def end(self) -> Contents:
        self._flush()
        found = Contents(self._files, self._bytes, self._digest.hexdigest())
        self._put(_END, self._digest.digest())
        self._flush()
        return found

    def folder(self, name: str, at: int) -> None:
        """A folder with all that is below it; its descriptor is closed."""
        try:
            waiting = [self._enter(os.fsencode(name), at)]
            while waiting:
                if waiting[-1]:
                    below = waiting[-1].pop()
                    at = _instead_of(at, self._opened(below, _OPEN_FOLDER, at))
                    waiting.append(self._enter(os.fsencode(below), at))
                    continue
                waiting.pop()
                self._way.pop()
                self._put(_UP)
                if waiting:
                    at = _instead_of(at, os.open("..", _OPEN_FOLDER, dir_fd=at))
        finally:
            os.close(at)

    def _enter(self, name: bytes, at: int) -> list[str]:
        """Send a folder's own files; return the names of its folders."""
        facts, folders = os.fstat(at), list[str]()
        self._put(_FOLDER, _FACTS.pack(stat.S_IMODE(facts.st_mode) & 0o777, facts.st_mtime_ns), name)
        self._way.append(name)
        with os.scandir(at) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                else:
                    self._other(entry, at)
        return folders

    def _other(self, entry: os.DirEntry[str], at: int) -> None:
        facts, name = entry.stat(follow_symlinks=False), os.fsencode(entry.name)
        kind = stat.S_IFMT(facts.st_mode)
        if kind == stat.S_IFREG:
            self.file(entry.name, at, facts, name)
            return
        if kind == stat.S_IFLNK:
            self._put(_LINK, name, b"\0", os.fsencode(os.readlink(entry.name, dir_fd=at)))
        elif kind in _SPECIAL.values():
            self._put(next(code for code, special in _SPECIAL.items() if special == kind), name)
        else:
            return
        self._files += 1

    def file(self, path: str, at: int | None, facts: os.stat_result, name: bytes, *, follow: bool = False) -> None:
        """One file, or one more name of a file that was sent."""
        inode = (facts.st_dev, facts.st_ino)
        if facts.st_nlink > 1 and inode in self._linked:
            self._files += 1
            self._put(_SAME, name, b"\0", self._linked[inode])
            return
        descriptor = self._opened(path, _READ & ~os.O_NOFOLLOW if follow else _READ, at)
        try:
            self._files += 1
            if facts.st_nlink > 1:
                self._linked[inode] = b"/".join((*self._way, name))
            self._put(_FILE, _FACTS.pack(stat.S_IMODE(facts.st_mode) & 0o777, facts.st_mtime_ns), name)
            for piece in _pieces(descriptor, facts):
                self._bytes += piece if isinstance(piece, int) else len(piece)
                self._put(*((_HOLE, _LENGTH.pack(piece)) if isinstance(piece, int) else (_DATA, piece)))
        finally:
            os.close(descriptor)

    def _opened(self, name: str, how: int, at: int | None) -> int:
        try:
            return os.open(name, how, dir_fd=at)
        except PermissionError:
            if not self._opening:
                raise
            os.chmod(name, 0o700, dir_fd=at)
            return os.open(name, how, dir_fd=at)


def _pieces(descriptor: int, facts: os.stat_result) -> Iterator[bytes | int]:
    """A file's content: bytes, and lengths of holes."""
    if facts.st_blocks * 512 >= facts.st_size:
        while piece := os.read(descriptor, _PIECE):
            yield piece
        return
    at, size = 0, facts.st_size
    while at < size:
        try:
            data = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:  # none is left
            yield size - at
            return
        if data > at:
            yield data - at
        at, end = data, os.lseek(descriptor, data, os.SEEK_HOLE)
        os.lseek(descriptor, data, os.SEEK_SET)
        while at < end and (piece := os.read(descriptor, min(_PIECE, end - at))):
            yield piece
            at += len(piece)
        if at < end:
            return  # somebody made it shorter


def unpack(read: Callable[[int], bytes], folder: Path, limits: Resources | None = None) -> Contents:
    """Make in an empty folder what a stream holds; `read` returns as many bytes as it is asked for, unless the stream is over.

    Raises:
        Damaged: it is not whole, or holds more than `limits` let an output hold. What came is there by then.
        OSError: it cannot be written.
    """
    unpacking = _Unpacking(read, folder, limits)
    try:
        return unpacking.run()
    except (struct.error, OverflowError) as error:
        raise Damaged(str(error)) from error
    finally:
        unpacking.close()


class _Unpacking:
    def __init__(self, read: Callable[[int], bytes], folder: Path, limits: Resources | None) -> None:
        self._read, self._root, self._limits, self._digest = read, folder, limits, hashlib.sha256()
        self._at = os.open(folder, _OPEN_FOLDER)
        self._way: list[tuple[bytes, int]] = []
        self._file, self._place, self._facts = -1, 0, (0, 0)
        self._files = self._bytes = 0

    def close(self) -> None:
        os.close(self._at)
        if self._file >= 0:
            os.close(self._file)

    def run(self) -> Contents:
        while True:
            head = self._exactly(_HEAD.size)
            kind, length = _HEAD.unpack(head)
            if length > _MOST:
                raise Damaged("a part is too long")
            body = self._exactly(length)
            if kind == _END:
                self._finish_file()
                if body != self._digest.digest() or self._way:
                    raise Damaged("the checksum differs")
                return Contents(self._files, self._bytes, self._digest.hexdigest())
            self._digest.update(head)
            self._digest.update(body)
            if kind in (_DATA, _HOLE):
                self._fill(kind, body)
            else:
                self._finish_file()
                self._make(kind, body)

    def _exactly(self, count: int) -> bytes:
        data = self._read(count)
        if len(data) != count:
            raise Damaged("it was cut off")
        return data

    def _make(self, kind: bytes, body: bytes) -> None:
        if kind == _UP:
            self._leave()
            return
        self._files += kind != _FOLDER
        self._hold_to_limits()
        if kind in (_FOLDER, _FILE):
            facts, name = _FACTS.unpack(body[: _FACTS.size]), _checked(body[_FACTS.size :])
            if kind == _FOLDER:
                os.mkdir(name, 0o700, dir_fd=self._at)
                self._at = _instead_of(self._at, os.open(name, _OPEN_FOLDER, dir_fd=self._at))
                self._way.append((name, facts[0]))
            else:
                self._file, self._place, self._facts = os.open(name, _MAKE, 0o600, dir_fd=self._at), 0, facts
            return
        name, _, rest = body.partition(b"\0")
        _checked(name)
        if kind == _LINK:
            os.symlink(rest, name, dir_fd=self._at)
        elif kind == _SAME:
            self._link(rest.split(b"/"), name)
        elif kind in _SPECIAL:
            os.mknod(name, _SPECIAL[kind] | 0o600, dir_fd=self._at)
        else:
            raise Damaged("a part is of no known kind")

    def _leave(self) -> None:
        if not self._way:
            raise Damaged("it leaves its own folder")
        above = os.open("..", _OPEN_FOLDER, dir_fd=self._at)
        os.fchmod(self._at, self._way.pop()[1] & 0o777)
        self._at = _instead_of(self._at, above)

    def _link(self, way: list[bytes], name: bytes) -> None:
        """Give a file that came before one more name."""
        at = os.open(self._root, _OPEN_FOLDER)
        try:
            for folder in way[:-1]:
                at = _instead_of(at, os.open(_checked(folder), _OPEN_FOLDER, dir_fd=at))
            os.link(_checked(way[-1]), name, src_dir_fd=at, dst_dir_fd=self._at, follow_symlinks=False)
        finally:
            os.close(at)

    def _fill(self, kind: bytes, body: bytes) -> None:
        if self._file < 0:
            raise Damaged("bytes of no file")
        length = len(body) if kind == _DATA else _LENGTH.unpack(body)[0]
        self._bytes += length
        self._hold_to_limits()
        left = memoryview(body if kind == _DATA else b"")
        while left:
            written = os.pwrite(self._file, left, self._place)
            self._place, left = self._place + written, left[written:]
        self._place += length if kind == _HOLE else 0

    def _finish_file(self) -> None:
        if self._file >= 0:
            os.ftruncate(self._file, self._place)
            os.fchmod(self._file, self._facts[0] & 0o777)
            os.utime(self._file, ns=(self._facts[1], self._facts[1]))
            os.close(self._file)
            self._file = -1

    def _hold_to_limits(self) -> None:
        if self._limits is not None and Usage(self._bytes, self._files).over(self._limits):
            raise Damaged("it holds more than it may")


def _checked(name: bytes) -> bytes:
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise Damaged("a name is none")
    return name


def _instead_of(old: int, new: int) -> int:
    os.close(old)
    return new
