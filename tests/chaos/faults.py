"""How each fault is done. One that finds nobody to hit has not happened."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import docker
import requests

from tests.servers.engine import alive
from tests.servers.faultproxy import FaultProxy, Faults

from .algorithms import TOKEN
from .plan import Fault
from .services import EngineService, Service, stopped
from .world import World

PATIENCE_SECONDS = 40.0
CONNECTIONS = 3


class Target(Protocol):
    """A run, as a fault sees it."""

    token: str

    def process(self) -> int | None:
        """The number of the process that runs it, if there is one now."""
        ...


def do(world: World, fault: Fault, target: Target | None) -> int:
    """Do it, and return when it is over: how often it has hit somebody."""
    if target is not None:
        return _to_run(world, fault, target)
    verb, _, name = fault.kind.partition(" the ")
    service: Service | EngineService | None = {
        "engine": world.engine, "server": world.server, "store": world.gateway, "worker": world.worker
    }.get(name)  # fmt: skip
    if verb in ("kill", "terminate") and service is not None:
        with service.lock:
            service.end(signal.SIGKILL if verb == "kill" else signal.SIGTERM)
            time.sleep(fault.seconds)
            service.start()
        return 1
    if verb == "stall" and service is not None:
        with service.lock:
            service.stop_for(fault.seconds)
        return 1
    if verb == "cut":
        return bool((world.to_server if name == "server" else world.to_store).drop())
    faults = {
        "break the store's answers": Faults(reset_after=fault.offset, connections=CONNECTIONS),
        "flip bits of the store's answers": Faults(flip_bit_at=fault.offset, connections=CONNECTIONS),
        "swallow requests to the store": Faults(black_hole=True),
    }[fault.kind]
    return _between(world.to_store, faults, fault.seconds)


_proxy_lock = threading.Lock()


def _between(proxy: FaultProxy, faults: Faults, seconds: float) -> int:
    with _proxy_lock:
        before = proxy.faulted
        proxy.set(faults)
        time.sleep(seconds)
        proxy.set(Faults())
        return proxy.faulted - before


def _to_run(world: World, fault: Fault, target: Target) -> int:
    verb, _, what = fault.kind.partition(" the ")
    find = target.process if what == "flow" else lambda: _container(target.token)
    if _soon(find) is None:
        return 0
    time.sleep(fault.at)
    pid = find()
    if pid is None:
        return 0
    with contextlib.suppress(ProcessLookupError):
        if verb in ("stall", "pause"):
            with stopped(pid):
                time.sleep(fault.seconds)
        elif verb == "remove":
            return _remove(world, target.token)
        else:
            os.kill(pid, signal.SIGKILL if verb == "kill" else signal.SIGTERM)
        return 1
    return 0


def _soon(find: Callable[[], int | None]) -> int | None:
    until = time.monotonic() + PATIENCE_SECONDS
    while (found := find()) is None and time.monotonic() < until:
        time.sleep(0.3)
    return found


def _container(token: str) -> int | None:
    """The number of the first process that has the token as its parameter, which is the script's shell."""
    wanted = f"OASIS_PARAMETER_{TOKEN}={token}".encode()
    return process_with(wanted)


def process_with(variable: bytes) -> int | None:
    """The oldest process that has this in its environment."""
    for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            if variable in (path / "environ").read_bytes().split(b"\0") and alive(int(path.name)):
                return int(path.name)
    return None


def _remove(world: World, token: str) -> int:
    """Have the engine remove the run's container, as somebody with a broom would."""
    with (
        contextlib.suppress(docker.errors.DockerException, requests.RequestException),
        contextlib.closing(world.engine.connect()) as client,
    ):
        for row in client.api.containers():
            if f"OASIS_PARAMETER_{TOKEN}={token}" in client.api.inspect_container(row["Id"])["Config"]["Env"]:
                client.api.remove_container(row["Id"], force=True)
                return 1
    return 0
