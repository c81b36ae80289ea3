"""A real PostgreSQL for tests, which the documentation advises where many runs go on at once.

Needs Debian's package postgresql. It listens on loopback only, trusts everybody there, and does not survive a power cut.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .s3 import free_port

# It refuses to run as root.
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--pdeathsig", "KILL")
SWIFT = ("-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off", "-c", "shared_buffers=64MB")


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Run a server whose files are in `folder`, which any user can reach; yield the URL of an empty database, for asyncpg."""
    programs, data, port = max(Path("/usr/lib/postgresql").glob("*/bin")), folder / "data", free_port()
    data.mkdir()
    os.chown(data, 65534, 65534)
    made = [
        *NOBODY,
        programs / "initdb",
        "--no-sync",
        "--username=prefect",
        "--auth=trust",
        "--encoding=UTF8",
        "--pgdata",
        data,
    ]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL, cwd="/")
    where = ("-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*NOBODY, programs / "postgres", *where, *SWIFT], stdout=log, stderr=log, cwd="/")
    try:
        ask = [programs / "createdb", "--host=127.0.0.1", f"--port={port}", "--username=prefect", "prefect"]
        until = time.monotonic() + 30
        while subprocess.run(ask, check=False, capture_output=True).returncode:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until, "PostgreSQL does not answer"
            time.sleep(0.1)
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
    finally:
        # Not "smart": that waits for every client to leave.
        process.send_signal(signal.SIGINT)
        process.wait(30)
        shutil.rmtree(data, ignore_errors=True)
