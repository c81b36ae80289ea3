"""What runs in a carrier: the pod that has the claim mounted for a flow run that has not; see `kube_carry`.

    python -m oasis_flows.engines.carrier hold ORDER      the pod's own program, until SIGTERM: owns the run's folder on the claim
    python -m oasis_flows.engines.carrier receive ORDER   started in it: stdin becomes what the algorithm's pod mounts read-only
    python -m oasis_flows.engines.carrier send ORDER      started in it: what the algorithm wrote goes to stdout

    <claim>/carried/<run>/lease       locked by `hold`, which deletes the folder when it ends
    <claim>/carried/<run>/in/<n>      the job's Nth mount; `in` gets its name when it is whole
    <claim>/carried/<run>/out/<n>

Each says something as a line of JSON before bytes and after them; the last word, a byte, is the other side's, so that nothing is cut
off by an end. It needs nothing but Python and this package.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from .. import lease, workspace
from ..errors import OasisError, RunInUse
from ..job import ContainerJob, Mount, Resources, Wrapper
from ..workspace import Workspace
from . import quota
from .parcel import Damaged, pack, unpack
from .quota import Watch

PROTOCOL = 1
# Where the image of flow runs has the claim.
HOME = Path("/var/lib/oasis-flows")
# Exit codes: the claim is full; the run's folder is being deleted.
FULL, GOING = 28, 75
# A carrier that was killed outright left its folder to the next one of the same user.
_SILENCE_SECONDS = 600.0
_PATIENCE_SECONDS = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is carried for one job: its folder's name, its digest, its writable mounts by number, and its limits.

    `ended` is the file, below `out`, that its wrapper makes; empty where it has none.
    """

    folder: str
    job: str
    written: tuple[str, ...]
    ended: str
    output_bytes: int | None
    output_files: int | None
    protocol: int = PROTOCOL

    def dumped(self) -> str:
        """As text for an argument."""
        return json.dumps(asdict(self))

    @classmethod
    def loaded(cls, text: str) -> Order:
        """The order that `dumped` wrote, by a flow run of this version or another."""
        values = json.loads(text)
        if values.get("protocol") != PROTOCOL:
            raise ValueError(f"the flow run speaks protocol {values.get('protocol')}, and its carrier {PROTOCOL}")
        return cls(**{**values, "written": tuple(values["written"])})

    @property
    def limits(self) -> Resources:
        return Resources(output_bytes=self.output_bytes, output_files=self.output_files)

    def path(self, home: Path) -> Path:
        """The run's folder."""
        return home / "carried" / self.folder

    def written_folders(self, home: Path) -> dict[str, Path]:
        """Where the algorithm writes."""
        return {name: self.path(home) / "out" / name for name in self.written}


def hold(order: Order, home: Path) -> None:
    """Own the run's folder, and look at what the algorithm writes there, until SIGTERM; then delete it."""
    leaving = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leaving.set())
    root = order.path(home).parent
    if not root.is_dir():
        root.mkdir(exist_ok=True)
        # Flow runs of several users share it, like /tmp.
        root.chmod(0o1777)
    until = time.monotonic() + _PATIENCE_SECONDS
    while not leaving.is_set():
        try:
            with workspace.open_workspace(root, order.folder) as place:
                _hold(order, home, place, leaving)
            return
        except RunInUse:
            # The carrier of an earlier attempt is still deleting.
            if time.monotonic() > until:
                raise


def _hold(order: Order, home: Path, place: Workspace, leaving: threading.Event) -> None:
    try:
        place.clear()
        for folder in order.written_folders(home).values():
            folder.mkdir(parents=True)
            folder.chmod(0o777)
        _say(ready=True)
        threading.Thread(target=workspace.reap, args=(place.path.parent, _SILENCE_SECONDS), daemon=True).start()
        _look(order, home, place, leaving)
    finally:
        # From now on nobody takes for whole what is sent; see `send`.
        with suppress(OSError):
            (place.path / "out").rename(place.path / "going")
        until = time.monotonic() + _PATIENCE_SECONDS
        # Whoever still ends may still write.
        while not place.remove() and time.monotonic() < until:
            time.sleep(0.2)


def _look(order: Order, home: Path, place: Workspace, leaving: threading.Event) -> None:
    while not (place.path / "in").exists():
        lease.renew(place.lease)
        if leaving.wait(0.2):
            return
    mounts = tuple(Mount(source=path, target="/", read_only=False) for path in order.written_folders(home).values())
    wrapper = Wrapper(argv=(), ended=place.path / "out" / order.ended, linger_seconds=0) if order.ended else None
    job = ContainerJob(run_id=order.folder, image="", lease=place.lease, mounts=mounts, wrapper=wrapper, resources=order.limits)
    told, ended = False, False
    with Watch(job) as watch:
        while not leaving.wait(0.2):
            lease.renew(place.lease)
            if watch.passed is not None and not told:
                told = True
                _say(passed=[watch.passed.reason, watch.passed.limit])
            if watch.program_ended and not ended:
                ended = True
                _say(ended=True)


def receive(order: Order, home: Path) -> None:
    """Take what the algorithm reads, unless it is there already."""
    inside = order.path(home) / "in"
    _say(there=inside.exists())
    if not inside.exists():
        for abandoned in inside.parent.glob("in.*"):
            workspace.delete(abandoned)
        new = inside.with_name(f"in.{token_hex(4)}")
        new.mkdir()
        found = unpack(sys.stdin.buffer.read, new)
        new.rename(inside)
        _say(**asdict(found))
    sys.stdin.buffer.read(1)


def send(order: Order, home: Path) -> None:
    """Hand out what the algorithm has written, unless it is more than it may be; say last whether nothing was deleted meanwhile."""
    folders = order.written_folders(home)
    passed = quota.passed(list(folders.values()), order.limits)
    _say(passed=passed and [passed.reason, passed.limit])
    if passed is None:
        pack(sys.stdout.buffer.write, folders, opening=True)
        _say(whole=all(folder.is_dir() for folder in folders.values()))
    sys.stdin.buffer.read(1)


def _say(**words: Any) -> None:
    sys.stdout.buffer.write(json.dumps(words).encode() + b"\n")
    sys.stdout.buffer.flush()


def main(arguments: list[str]) -> int:
    """Do what the arguments say; return the exit code. The last of them, for tests, is where the claim is mounted."""
    action, order, *home = arguments
    try:
        {"hold": hold, "receive": receive, "send": send}[action](Order.loaded(order), Path(home[0]) if home else HOME)
    except OSError as error:
        sys.stderr.write(f"{error.strerror or error}: {error.filename or 'the claim'}\n")
        return {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.ENOENT: GOING}.get(error.errno or 0, 1)
    except (Damaged, OasisError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main(sys.argv[1:]))
