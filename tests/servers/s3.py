"""A real S3 server for tests: Ceph's RADOS gateway over one monitor and one store in memory, all on loopback.

Needs the programs of Debian's packages ceph-mon, ceph-osd, ceph-common and radosgw. It starts in about two seconds,
checks signatures, and holds everything in RAM (twice what is stored).
"""

from __future__ import annotations

import http.client
import secrets
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from obstore.store import S3Store

CAPACITY_BYTES = 6 << 30

# What the defaults cost: without `paxos propose interval` creating the user takes 9 s; without cephx the gateway insists
# on an encrypted monitor connection unless told `crc`; without `tcp_nodelay` a small request takes 36 ms; without the gc
# settings deleted objects stay in RAM for two hours; admin sockets need paths under 108 bytes; without `cluster addr` the
# store also listens on all interfaces.
CONFIGURATION = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr1 = false
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
ms mon service mode = crc
ms mon cluster mode = crc
keyring = {folder}/keyring
admin socket =
log file = {folder}/$name.log
crash dir = {folder}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail warn = 2
mon data avail crit = 1
paxos propose interval = 0.05
paxos min wait = 0.02
debug ms = 0/0
debug osd = 0/0
debug memstore = 0/0
debug mon = 0/0
debug paxos = 0/0
debug rgw = 0/0
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = {capacity}
[client.rgw]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 64
rgw gc obj min wait = 1
rgw gc processor period = 5
rgw gc processor max time = 30
rgw enable lc threads = false
rgw enable quota threads = false
rgw run sync thread = false
rgw enable usage log = false
rgw dynamic resharding = false
"""


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """How to reach the server. There is one user, who may do everything."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)

    @property
    def options(self) -> dict[str, str]:
        """The endpoint and the credentials, as `oasis_flows.store.transfer.Location` takes them."""
        return {
            "endpoint_url": self.endpoint,
            "access_key_id": self.access_key,
            "secret_access_key": self.secret_key,
            "region": "us-east-1",
        }

    @property
    def environment(self) -> dict[str, str]:
        """The same as the environment variables that AWS clients read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }

    def store(self, bucket: str, prefix: str = "") -> S3Store:
        """A plain obstore client for a bucket, to arrange and to look behind the scenes."""
        return S3Store(
            bucket,
            prefix=prefix or None,
            endpoint=self.endpoint,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def new_bucket(self) -> str:
        """The name of a new, empty bucket."""
        name = f"b-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        return name

    def client(self) -> Any:
        """A plain botocore client."""
        return botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _step(folder: Path, *command: str) -> None:
    """Run one step of the start; its output is in the exception's message."""
    done = subprocess.run([*command, "--conf", f"{folder}/ceph.conf"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")


@contextmanager
def _daemon(folder: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Keep a daemon running for the block. It also dies with this process (`setpriv --pdeathsig`)."""
    with (folder / f"{command[0]}.out").open("wb") as output:
        line = ["setpriv", "--pdeathsig", "KILL", *command, "-f", "--conf", f"{folder}/ceph.conf"]
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        # What they hold is thrown away, so there is nothing to end in order.
        process.kill()
        process.wait(30)


def _wait_until_it_answers(port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.05)
    log = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
    raise RuntimeError(f"The S3 gateway does not answer on port {port}. Its logs: {log}")


@contextmanager
def serve(folder: Path) -> Iterator[S3Server]:
    """Run a server whose files are in `folder`; at the end exactly its own processes are stopped."""
    port, mon_port, fsid = free_port(), free_port(), str(uuid.uuid4())
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    (folder / "keyring").touch()
    configuration = CONFIGURATION.format(fsid=fsid, mon_port=mon_port, port=port, folder=folder, capacity=CAPACITY_BYTES)
    (folder / "ceph.conf").write_text(configuration)
    access, secret, osd = secrets.token_hex(10).upper(), secrets.token_hex(20), str(uuid.uuid4())
    monmap = f"{folder}/monmap"
    _step(folder, "monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", monmap)
    _step(folder, "ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
    with ExitStack() as daemons:
        daemons.enter_context(_daemon(folder, "ceph-mon", "-i", "a"))
        _step(folder, "ceph", "--connect-timeout", "60", "osd", "new", osd)
        _step(folder, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        daemons.enter_context(_daemon(folder, "ceph-osd", "-i", "0"))
        user = ("--uid=tests", "--display-name=tests", f"--access-key={access}", f"--secret-key={secret}")
        _step(folder, "radosgw-admin", "user", "create", *user)
        gateway = daemons.enter_context(_daemon(folder, "radosgw", "-n", "client.rgw"))
        _wait_until_it_answers(port, gateway, folder)
        yield S3Server(endpoint=f"http://127.0.0.1:{port}", access_key=access, secret_key=secret)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server, the same one for all tests of the session."""
    with serve(tmp_path_factory.mktemp("s3")) as server:
        yield server
