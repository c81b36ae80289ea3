"""Moves bytes between a URL and this machine: what every kind of store has in common.

A store is a `Files`: `objects.Objects` for `s3://`, `folder.Folder` for local paths, `anywhere.Anywhere` for every other
URL that fsspec knows. Foreign exceptions leave none of them: `translated` is the border.

Transfers run in threads, and stop when the caller's thread gets an exception, whichever: `in_order` owns the threads,
`checkpoint` and `wait` are where they notice.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from ..errors import DatasetError, OasisError
from ..manifest import Entry
from .verdicts import verdict

Chunk = bytes | memoryview
T = TypeVar("T")
R = TypeVar("R")

WORKERS = 16
WINDOW = 64
CHUNK_BYTES = 1 << 20
# What is written to see that a place can be written.
TRIED = ".oasis-flows-write-test"


class Progress(Protocol):
    """Is told, a few times a second, how many files and bytes are done and how many there are in all, and at the end."""

    def __call__(self, files: int, all_files: int, bytes: int, all_bytes: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Location:
    """A folder, by any fsspec URL, and how to get in.

    `options` may hold `endpoint_url`, `access_key_id`, `secret_access_key` and `region`, for `s3://`. What is not given
    comes from where AWS clients look: the environment, then the profiles of `~/.aws`, then the machine's role.

    Raises:
        DatasetError: the URL holds a password, or is empty.
    """

    url: str
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), repr=False)

    def __post_init__(self) -> None:
        if not self.url.strip():
            raise DatasetError(
                "The URL of a dataset or store is empty. Write a folder's path or URL, such as s3://bucket/folder."
            )
        if "://" in self.url and urlsplit(self.url).password is not None:
            raise DatasetError("The URL holds a password, and URLs are shown. Keep credentials in the DatasetStore document.")

    @property
    def scheme(self) -> str:
        """`file` for local paths, else what stands before `://`."""
        before, found, _ = self.url.partition("://")
        return before.lower() if found else "file"

    @property
    def is_local(self) -> bool:
        """Is it a folder that the kernel can reach by a path?"""
        return self.scheme in ("file", "local")

    @property
    def path(self) -> str:
        """The local path, or the URL without scheme; no slash at the end."""
        path = self.url.partition("://")[2] if "://" in self.url else self.url
        return path.rstrip("/") or "/"

    def child(self, name: str) -> Location:
        """The folder or file `name` in this folder."""
        return Location(f"{self.url.rstrip('/')}/{name}", self.options)


class Files(Protocol):
    """The files under one URL. Names are relative to it; errors are this package's. `in_parts`: was anything written in parts?"""

    in_parts: bool

    def list(self, folder: str = "") -> Iterator[Entry]:
        """Every file below `folder` ("" or a name that ends with "/"), names relative to it, sorted; not yet checked."""
        ...

    def read(self, name: str, *, start: int = 0, etag: str | None = None, has_digest: bool = False) -> Iterator[bytes]:
        """The bytes from `start` on, in pieces of a MiB at most; survives a connection that breaks.

        With `has_digest`, its caller has a digest to compare the bytes with: then they need not be compared here, and come faster.

        Raises:
            Missing: there is no such file.
            DatasetError: `etag` is given and the file is another by now (`DatasetChanged`, where an answer may have been damaged).
        """
        ...

    def write(self, name: str, chunks: Iterable[Chunk], size: int, *, last: bool = False) -> None:
        """Write a file of about `size` bytes, whole or not at all; `last` means that it must survive a power cut."""
        ...

    def size(self, name: str) -> int:
        """How many bytes the file has; raises `Missing`."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete these files; one that is not there is no error."""
        ...

    def abandon(self, *, hurry: bool = False) -> None:
        """Remove what writes left that were broken off, when nobody writes; with `hurry`, what can be done in a second or two."""
        ...


def files(location: Location) -> Files:
    """The store behind a location. Nothing is asked of it yet."""
    if location.is_local:
        from .folder import Folder

        return Folder(location)
    if location.scheme in ("s3", "s3a"):
        from .objects import Objects

        return Objects(location)
    from .anywhere import Anywhere

    return Anywhere(location)


class translated:  # noqa: N801 - reads as a statement
    """Turns every exception of the outside world in its block into one of this package's, which names `where`.

    A class, for it is entered several times for each file, and a generator takes four times as long.
    """

    __slots__ = ("_where", "_writing")

    def __init__(self, where: str, *, writing: bool = False) -> None:
        self._where, self._writing = where, writing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, OasisError):
            ours = verdict(error, self._where, writing=self._writing)
            if ours is not None:
                raise ours from error


class Stopped(BaseException):
    """Ends a worker whose result nobody waits for any more. Never leaves `in_order`."""


class _Stop:
    """Tells the workers of one `in_order` to stop, those that wait for the network included."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: set[Future[Any]] = set()
        self.requested = threading.Event()

    def request(self) -> None:
        with self._lock:
            self.requested.set()
            waiting = list(self._waiting)
        for future in waiting:
            future.cancel()

    @contextmanager
    def watching(self, future: Future[Any]) -> Iterator[None]:
        with self._lock:
            self._waiting.add(future)
        try:
            if self.requested.is_set():
                future.cancel()
            yield
        finally:
            with self._lock:
                self._waiting.discard(future)


_here = threading.local()


def _stop_of_this_thread() -> _Stop | None:
    return getattr(_here, "stop", None)


def checkpoint() -> None:
    """Return, unless this thread works for nobody any more."""
    stop = _stop_of_this_thread()
    if stop is not None and stop.requested.is_set():
        raise Stopped


def pause(seconds: float) -> None:
    """Sleep, unless this thread works for nobody any more."""
    stop = _stop_of_this_thread()
    if stop is None:
        time.sleep(seconds)
    else:
        stop.requested.wait(seconds)
        checkpoint()


@contextmanager
def turn(slots: threading.Semaphore) -> Iterator[None]:
    """Hold one of the slots; waiting for it ends like `pause`."""
    while not slots.acquire(timeout=0.1):
        checkpoint()
    try:
        yield
    finally:
        slots.release()


_loops: dict[int, asyncio.AbstractEventLoop] = {}
_loops_lock = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    """This process's event loop, in a thread of its own; a fork needs a new one."""
    with _loops_lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="oasis-flows-transfer", daemon=True).start()
        return loop


def wait(start: Callable[[], Awaitable[T]]) -> T:
    """Run what `start` begins, and wait for it; it is cancelled when this thread has to stop."""

    async def run() -> T:
        return await start()

    future = asyncio.run_coroutine_threadsafe(run(), _loop())
    stop = _stop_of_this_thread()
    try:
        if stop is None:
            return future.result()
        with stop.watching(future):
            return future.result()
    except CancelledError:
        raise Stopped from None
    except BaseException:
        future.cancel()
        raise


def in_order(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int = WORKERS,
    window: int = WINDOW,
    tick: Callable[[], None] = lambda: None,
) -> Generator[R, None, None]:
    """Map over `items` with threads; results come in the order of the items, at most `window` are under way.

    `tick` is called in the caller's thread, a few times a second at least. The first failure is raised, also when its
    turn has not come. However the generator ends (close it: `contextlib.closing`), nobody is at work on an item any more.
    """
    stop, threads = _Stop(), list[threading.Thread]()

    def begin() -> None:
        _here.stop = stop
        threads.append(threading.current_thread())

    def work(item: T) -> R:
        checkpoint()
        return function(item)

    pending: deque[Future[R]] = deque()
    try:
        with ThreadPoolExecutor(workers, "oasis-flows-transfer", begin) as pool:
            try:
                for item in items:
                    pending.append(pool.submit(work, item))
                    if len(pending) >= window:
                        yield _first(pending, tick)
                while pending:
                    yield _first(pending, tick)
            finally:
                stop.request()
                for future in pending:
                    future.cancel()
    finally:
        # The pool forgets a thread while whose start a signal comes. One that has not begun by now finds that it has to stop.
        for thread in threads:
            thread.join()


def _first(pending: deque[Future[R]], tick: Callable[[], None]) -> R:
    """Wait for the first result, or for any failure."""
    while not pending[0].done():
        tick()
        with suppress(TimeoutError):
            pending[0].exception(timeout=0.2)
            break
        for future in pending:
            if future.done() and future.exception() is not None:
                return future.result()
    tick()
    return pending.popleft().result()


class Meter:
    """Counts what moves, from any thread, and tells `progress` from the caller's, five times a second at most."""

    def __init__(self, progress: Progress | None, all_files: int = 0, all_bytes: int = 0) -> None:
        self._progress, self._all_files, self._all_bytes = progress, all_files, all_bytes
        self._lock = threading.Lock()
        self._files = self._bytes = 0
        self._told = 0.0

    def add(self, count: int) -> None:
        """So many bytes have moved."""
        with self._lock:
            self._bytes += count

    def file_done(self) -> None:
        """One more file is whole."""
        self._files += 1

    def tick(self, *, last: bool = False) -> None:
        """Tell `progress`, if it is time (or the end)."""
        if self._progress is not None and (last or time.monotonic() - self._told >= 0.2):
            self._told = time.monotonic()
            self._progress(self._files, self._all_files, self._bytes, self._all_bytes)
