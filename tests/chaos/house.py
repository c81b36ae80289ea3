"""Namespaces of its own for the suite: whatever it starts ends with it, however it ends, and nothing of the machine's is seen.

In them there are no other processes, no other mounts that change and no network but loopback.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

FOLDER = "CHAOS_FOLDER"
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_PR_SET_PDEATHSIG = 1


def inside(module: str, work: Callable[[Path], int]) -> int:
    """Call `work` with a folder, in new namespaces; return what it returns. The folder is removed at the end.

    `module` is run again for it, so it has to call this first of all.
    """
    if FOLDER in os.environ:
        return _first_process(lambda: work(Path(os.environ[FOLDER])))
    folder = Path(tempfile.mkdtemp(prefix="oasis-chaos-"))  # the path of an engine's socket holds 107 bytes
    folder.chmod(0o711)  # PostgreSQL runs as nobody
    (folder / "tmp").mkdir()
    env = os.environ | {FOLDER: str(folder), "TMPDIR": str(folder / "tmp")}
    line = ["unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--net", sys.executable, "-m", module, *sys.argv[1:]]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    process = subprocess.Popen(line, env=env, preexec_fn=_die_with_parent)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
        _remove_cgroups(folder.name)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _first_process(work: Callable[[], int]) -> int:
    """Be the namespace's init: collect what dies, and end with the child that works, and everybody else with it."""
    child = os.fork()
    if child == 0:
        _raise_loopback()
        return work()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _raise_loopback() -> None:
    with socket.socket() as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _remove_cgroups(name: str) -> None:
    for top in Path("/sys/fs/cgroup").glob(f"**/{name}"):
        for path, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                Path(path).rmdir()
