"""A process that outlives the one it watches: it sees to it that what a killed run leaves is removed.

A worker that is told to stop kills its runs, and nobody calls a hook; nor does anybody for a Python process that is killed.
The watchdog waits at the end of a pipe. When that closes without a word, its owner is dead, and it becomes
`oasis-flows reap --wait`. Every run waits for its start and its end, so it loads nothing that it can do without.
"""

import os
import signal
import sys

FAREWELL = b"done"


def watch() -> None:
    """Wait for the owner's end; return if it said farewell, and become the reaper if it did not."""
    hurry = []
    # A service that stops sends this to all of its processes: the owner will end, and nobody comes back for what it leaves.
    signal.signal(signal.SIGTERM, lambda *_: hurry.append("--now"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.stdin.buffer.read() != FAREWELL:
        # Until the command has a handler of its own the signal has to wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        os.execv(sys.executable, [sys.executable, "-m", "oasis_flows", "reap", *(hurry or ["--wait"])])  # noqa: S606


if __name__ == "__main__":
    watch()
    # Nothing is open that an orderly end would have to close, and that takes ten times as long.
    os._exit(0)
