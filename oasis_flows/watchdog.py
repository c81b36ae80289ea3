"""A process that outlives the one it watches: it sees to it that what a killed run leaves is removed.

A worker that is told to stop kills its runs, and nobody calls a hook; nor does anybody for a Python process that is killed.
The watchdog waits at the end of a pipe. When that closes without a word, its owner is dead, and it becomes
`oasis-flows reap --wait`. It costs some MiB and no time: nothing but the standard library is loaded until then.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

_FAREWELL = b"done"


@contextmanager
def watched(changes: Mapping[str, str]) -> Iterator[None]:
    """Have a watchdog for the time of the block. Without one (no process can be made) the block runs all the same.

    Its environment is this process's with `changes`; it works elsewhere, so what is relative here means nothing to it.
    """
    # It must not look like the run itself.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")} | dict(changes)
    watchdog: subprocess.Popen[bytes] | None = None
    with suppress(OSError):
        # In a session of its own it gets neither the terminal's signals nor those for the worker's process group.
        watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            env=env,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield
    finally:
        if watchdog is not None:
            with suppress(OSError):
                watchdog.communicate(_FAREWELL)


def _watch() -> None:
    hurry = []
    # A service that stops sends this to all of its processes: the owner will end, and nobody comes back for what it leaves.
    signal.signal(signal.SIGTERM, lambda *_: hurry.append("--now"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.stdin.buffer.read() != _FAREWELL:
        # Until the command has a handler of its own the signal has to wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        os.execv(sys.executable, [sys.executable, "-m", "oasis_flows", "reap", *(hurry or ["--wait"])])  # noqa: S606


if __name__ == "__main__":
    _watch()
