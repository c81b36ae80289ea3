"""What runs need beside a process of their own: an engine, a Prefect server, an object store, a worker. Each can be hurt."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.servers.engine import PrivateEngine


class Service:
    """A program that is started, killed and started again; `ready` says whether it does its work."""

    def __init__(
        self, command: Sequence[str], log: Path, ready: Callable[[], bool], env: Mapping[str, str] | None = None
    ) -> None:
        self._command, self._log, self._ready, self._env = command, log, ready, env
        self.lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return once it is ready."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + 120
        while not self._ready():
            assert self._process.poll() is None, f"{self._command} ended: {self._log.read_text(errors='replace')[-2000:]}"
            assert time.monotonic() < until, f"{self._command} does not get ready"
            time.sleep(0.1)

    def keep(self) -> bool:
        """Start it again if it has ended by itself, as a service manager does; did it?"""
        ended = self._process is not None and self._process.poll() is not None
        if ended:
            self.start()
        return ended

    def end(self, number: int = signal.SIGKILL) -> None:
        """Kill it with all of its session, or tell it alone to end and wait for that."""
        assert self._process is not None
        if number == signal.SIGKILL:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            # A Prefect worker whose server is away may not come to an end; a service manager waits for it no longer, either.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)

    def stop_for(self, seconds: float) -> None:
        """Let nothing of it run for a while."""
        assert self._process is not None
        with stopped(self._process.pid, group=True):
            time.sleep(seconds)


class EngineService(PrivateEngine):
    """A private engine with the same verbs; killed, it leaves its containers running, which die when it is back."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(folder, *options)
        self.lock = threading.Lock()

    def stop_for(self, seconds: float) -> None:
        """Let the daemon not run for a while."""
        assert self.process is not None
        with stopped(self.process.pid):
            time.sleep(seconds)


@contextmanager
def stopped(pid: int, *, group: bool = False) -> Iterator[None]:
    """Stop a process, or a process group, for the time of the block."""
    send = os.killpg if group else os.kill
    send(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        send(pid, signal.SIGCONT)
