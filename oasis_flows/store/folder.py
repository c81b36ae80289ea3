"""Files in a local folder. No link is ever followed out of it, not even one that is put there while we look."""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from ctypes import c_ubyte
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path, PurePosixPath
from weakref import finalize

from ..errors import DatasetError, UnsafeName
from ..manifest import MAX_LEVELS, Entry, shown
from .transfer import CHUNK_BYTES, Chunk, Location, checkpoint, translated

MODE = 0o644

# A file that is being written, beside everything that is the dataset's.
_PART = re.compile(r"\.[0-9a-f]{16}\.part")

# Chunks are freed by other threads than those that read them, and in another order: of malloc they would take half as much again.
_free: deque[mmap] = deque(maxlen=16)

KINDS = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a fifo (named pipe)",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


@dataclass(frozen=True, slots=True)
class Found:
    """A file of a folder: its name, its size, the name where its bytes are (another one for a link), and its version."""

    name: str
    bytes: int
    real: str
    etag: str


def refuse(message: str) -> None:
    """What `walk` does with what cannot be carried, unless told otherwise."""
    raise UnsafeName(message)


def walk(root: Path, refused: Callable[[str], None] = refuse) -> Iterator[Found]:
    """The files below `root`, sorted by the bytes of their names; one folder's names are held at a time.

    Links to files inside are files; all other links, everything that is neither file nor folder, and folders too deep or
    with too long a path to be looked into go to `refused`, a sentence each.

    Raises:
        UnsafeName: by `refused`, unless another is given.
        Missing: there is no folder `root`.
    """
    levels = [_names(root, "")]
    while levels:
        name = next(levels[-1], None)
        if name is None:
            levels.pop()
        elif name.endswith("/"):
            levels.append(_names_below(root, name, refused))
        elif isinstance(found := _look(root, name), str):
            refused(found)
        else:
            yield found


def _names_below(root: Path, folder: str, refused: Callable[[str], None]) -> Iterator[str]:
    if folder.count("/") >= MAX_LEVELS:
        refused(f"{shown(folder)} is a folder more than {MAX_LEVELS - 1} levels down in {root}. Use fewer folders.")
        return iter(())
    try:
        return _names(root, folder)
    except UnsafeName:
        why = _unreachable(root, folder)
    refused(why)
    return iter(())


def _unreachable(root: Path, name: str) -> str:
    return (
        f"{shown(name)}, of {len(os.fsencode(name))} bytes, has too long a path or too many links in {root} to be followed. "
        "Use shorter names, fewer folders, and no links to links."
    )


def _names(root: Path, folder: str) -> Iterator[str]:
    """The names in one folder, folders with a slash at the end: so sorted, whole paths come in order."""
    with translated(str(root / folder)), os.scandir(root / folder) as entries:
        names = [f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries]
    return iter([folder + name for name in sorted(names, key=os.fsencode)])


def _look(root: Path, name: str) -> Found | str:
    """The file of this name, or (a str) why it cannot be carried."""
    try:
        return _file_at(root, name)
    except (UnsafeName, RecursionError):
        # The standard library follows links to links by recursion.
        return _unreachable(root, name)


def _file_at(root: Path, name: str) -> Found | str:
    where = f"{root}/{name}"
    with translated(where):
        facts = os.lstat(where)
        kind = stat.S_IFMT(facts.st_mode)
        if kind == stat.S_IFREG:
            return Found(name, facts.st_size, name, _version(facts))
        if kind != stat.S_IFLNK:
            return f"{name!r} is {KINDS.get(kind, 'no file')} in {root}. A dataset holds files only: remove it."
        real = _behind(root, name)
        if isinstance(real, str):
            return f"{name!r} is a link {real}. Replace it by the file itself (cp -L), or remove it."
        facts = (root / real).stat()
        return Found(name, facts.st_size, str(real), _version(facts))


def _version(facts: os.stat_result) -> str:
    """What is another one after a change, as a store's etag is: the time of the last one, as exactly as the file system tells."""
    return f"mtime {facts.st_mtime_ns}"


def _behind(root: Path, name: str) -> PurePosixPath | str:
    """The file inside that a link leads to, or (a str) why it must not be followed."""
    target = os.readlink(root / name)  # noqa: PTH115
    if target.startswith("/"):
        return f"to the absolute path {target!r}, which is another place inside a container"
    lexical = os.path.normpath(PurePosixPath(name).parent / target)
    if lexical.startswith("../") or lexical == "..":
        return f"to {target!r}, outside of {root}"
    top, real = Path(os.path.realpath(root)), Path(os.path.realpath(root / name))
    if not real.is_relative_to(top):
        return f"to {target!r}, which leads out of {root}"
    if real.is_dir():
        return f"to the folder {target!r}, and links to folders cannot be carried"
    if not real.is_file():
        return f"to {target!r}, which is no file"
    return PurePosixPath(real.relative_to(top))


@contextmanager
def opened(root: Path, name: str) -> Iterator[int]:
    """A descriptor of the regular file `name` (no link on the way), for the time of the block."""
    with translated(f"{root}/{name}"):
        *folders, last = name.split("/")
        at = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for folder in folders:
                below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
                os.close(at)
                at = below
            file = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
        finally:
            os.close(at)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise UnsafeName(f"{name!r} in {root} is no file any more. Run it again once nobody writes there.")
        yield file
    finally:
        os.close(file)


def chunks_of(descriptor: int, where: str) -> Iterator[memoryview]:
    """What is in an open file, a MiB at a time. The memory is used again when nobody has the chunk, or a part of it, any more."""
    while True:
        checkpoint()
        with translated(where):
            memory = _unused()
            count = os.readv(descriptor, [memory])
        if not count:
            _free.append(memory)
            return
        yield _lent(memory, count)


def _unused() -> mmap:
    try:
        return _free.pop()
    except IndexError:
        return mmap(-1, CHUNK_BYTES, MAP_PRIVATE | MAP_ANONYMOUS)


def _lent(memory: mmap, count: int) -> memoryview:
    # Every view of a view holds this object, and not the view that it is of.
    held = (c_ubyte * CHUNK_BYTES).from_buffer(memory)
    finalize(held, _free.append, memory).atexit = False
    return memoryview(held).cast("B")[:count]


def _is_plainly_ours(facts: os.stat_result) -> bool:
    """Does a file belong to this process's user and group, with no setuid, setgid or sticky bit?"""
    special = facts.st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX)
    return (facts.st_uid, facts.st_gid, special) == (os.geteuid(), os.getegid(), 0)


def _link(descriptor: int, path: Path | str) -> bool:
    try:
        _try_to_link(descriptor, path)
    except OSError:
        return False
    return True


def _try_to_link(descriptor: int, path: Path | str) -> None:
    # Python passes `follow_symlinks` on only where a descriptor is given, too.
    os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor, follow_symlinks=True)


class Folder:
    """The files of a local folder. Those that are written or linked there are ours, with mode 644."""

    in_parts = False

    def __init__(self, location: Location) -> None:
        self.root = Path(location.path).expanduser()

    def _where(self, name: str) -> str:
        return f"{self.root}/{name}"

    def list(self, folder: str = "") -> Iterator[Entry]:
        """See `Files.list`.

        Raises:
            UnsafeName: something there is no file, or a link that cannot be carried.
        """
        top = self.root / folder
        if top.exists() and not top.is_dir():
            raise DatasetError(f"{top} is a file. A dataset is a folder: give the folder that it is in.")
        for found in walk(top):
            yield Entry(found.name, found.bytes, etag=found.etag)

    def read(self, name: str, *, start: int = 0, etag: str | None = None, has_digest: bool = False) -> Iterator[bytes]:  # noqa: ARG002
        """See `Files.read`."""
        with self._opened(name, etag) as file:
            os.lseek(file, start, os.SEEK_SET)
            yield from map(bytes, chunks_of(file, self._where(name)))

    def _real(self, name: str) -> str:
        with translated(self._where(name)):
            return str(_behind(self.root, name)) if (self.root / name).is_symlink() else name

    @contextmanager
    def _opened(self, name: str, etag: str | None) -> Iterator[int]:
        with opened(self.root, self._real(name)) as file:
            if etag not in (None, _version(os.fstat(file))):
                raise DatasetError(
                    f"{self._where(name)} was changed after it had been listed. Restore it as it was, its time included, or begin anew "
                    "once nobody writes there."
                )
            yield file

    def check_writable(self) -> None:
        """See `store.check_writable`. The file that is tried has no name: whoever is killed here leaves nothing."""
        with translated(str(self.root), writing=True):
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as file:
                file.write(b"May this be written?\n")
                file.flush()
                os.fsync(file.fileno())

    def link_to(self, path: Path, name: str, *, etag: str | None = None) -> bool:
        """Give the file `name` a second name, `path`; `False` where the kernel does not (another file system, for one).

        Raises:
            DatasetError: `etag` is given and the file is another by now.
        """
        with self._opened(name, etag) as descriptor, translated(str(path), writing=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            return _link(descriptor, path)

    def write(self, name: str, chunks: Iterable[Chunk], size: int, *, last: bool = False) -> None:  # noqa: ARG002
        """See `Files.write`: under another name first, then renamed."""
        with translated(self._where(name), writing=True):
            path = self._room_for(name)
            part = self.root / f".{secrets.token_hex(8)}.part"
            try:
                with part.open("xb") as file:
                    with suppress(PermissionError):  # some file systems have no modes
                        os.fchmod(file.fileno(), MODE)
                    for chunk in chunks:
                        checkpoint()
                        file.write(chunk)
                    file.flush()
                    if last:
                        os.fsync(file.fileno())
                checkpoint()
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            if last:
                self._settle(path.parent)

    def link(self, name: str, descriptor: int) -> bool:
        """Give the open file a second name here, and mode 644.

        `False` where the kernel does not (another file system, for one), and for a file that is another user's or group's
        or has a special mode: it has to be copied.
        """
        facts, where = os.fstat(descriptor), self._where(name)
        if not _is_plainly_ours(facts):
            return False
        with translated(where, writing=True):
            try:
                if stat.S_IMODE(facts.st_mode) != MODE:
                    os.fchmod(descriptor, MODE)
                # Nearly always the folder is there and the file is not.
                _try_to_link(descriptor, where)
            except (FileNotFoundError, FileExistsError):
                path = self._room_for(name)
                try:
                    path.unlink(missing_ok=True)
                except OSError:
                    return False
                return _link(descriptor, path)
            except OSError:
                return False
        return True

    def _room_for(self, name: str) -> Path:
        path = self.root / name
        if path.is_dir() and not path.is_symlink():
            raise DatasetError(f"{path} is a folder where a file has to be written. Move it away.")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _settle(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def size(self, name: str) -> int:
        """See `Files.size`."""
        with translated(self._where(name)):
            return (self.root / name).stat().st_size

    def delete(self, names: Iterable[str]) -> None:
        """See `Files.delete`; folders that become empty go too."""
        for name in names:
            with translated(self._where(name), writing=True):
                path = self.root / name
                path.unlink(missing_ok=True)
                with suppress(OSError):
                    while path.parent != self.root:
                        path = path.parent
                        path.rmdir()

    def abandon(self, *, hurry: bool = False) -> None:  # noqa: ARG002
        """See `Files.abandon`: what is being written lies at the root, where nothing of anybody's has such a name."""
        with translated(str(self.root), writing=True), suppress(FileNotFoundError):
            for path in self.root.iterdir():
                if _PART.fullmatch(path.name):
                    path.unlink(missing_ok=True)
