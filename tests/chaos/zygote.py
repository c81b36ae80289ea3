"""A process that has imported everything once, and forks a process for each run: an interpreter that imports Prefect
takes seconds of a processor, a fork milliseconds.

It reads an order a line on its standard input, in JSON, and answers with the number of the process that carries it out,
in a session of its own. It never starts a thread, so that a fork has everything that it needs.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any
from uuid import UUID

# A SIGTERM that interrupts an import leaves CPython's import lock held, so all that is imported late is imported here.
import anyio._backends._asyncio  # noqa: F401
from prefect import tags
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import Scheduled

import oasis_flows.engines.docker
import oasis_flows.store.objects  # noqa: F401 - imported for the forks
from oasis_flows.__main__ import main as command_line
from oasis_flows.flows.algorithm_task import algorithm_task


def serve() -> None:
    """Fork for each order; a fork returns from here once it has carried its order out, and ends like any process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    assert threading.active_count() == 1
    assert len(list(Path("/proc/self/task").iterdir())) == 1
    print("ready", flush=True)
    while line := os.read(0, 1 << 16):
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _carry_out(order)
            return
        print(pid, flush=True)


def _carry_out(order: dict[str, Any]) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(descriptor, number)
    faulthandler.register(signal.SIGUSR1)
    os.environ.update(order.get("env", {}))
    if "command" in order:
        sys.exit(command_line(order["command"]))
    result = Path(order["result"])
    try:
        url = _run(order).url
    except BaseException as error:
        told = {"raised": type(error).__name__, "code": getattr(error, "code", None), "message": str(error)}
        result.write_text(json.dumps(told))
        raise
    result.write_text(json.dumps({"url": url}))


def _run(order: dict[str, Any]) -> Any:
    """Call the flow as a user's Python does, or once more for a run that there is, as `prefect flow-run retry` has it done."""
    if "run_id" not in order:
        with tags(order["tag"]):
            return algorithm_task(**order["parameters"])
    run_id = UUID(order["run_id"])
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, Scheduled(name="AwaitingRetry"), force=True)
        flow_run = client.read_flow_run(run_id)
    return run_flow(algorithm_task, flow_run=flow_run, parameters=order["parameters"])


if __name__ == "__main__":
    serve()
