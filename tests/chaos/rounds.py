"""Plays a round: starts its runs, does its faults, then makes everything whole again and waits for the runs to end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.servers.engine import alive

from . import faults
from .algorithms import TOKEN
from .plan import ON_SERVICES, Fault, Round, Run
from .world import World

END_SECONDS = 420.0
# The shipped automation waits 90 s for a sign of life.
AUTOMATION_SECONDS = 150.0
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass
class Player:
    """One run on its way. `told` is what its last call told its caller; `hung` says that it had to be killed."""

    world: World
    run: Run
    pids: list[int] = field(default_factory=list)
    created: str | None = None
    hung: bool = False

    @property
    def token(self) -> str:
        return self.run.token

    @property
    def parameters(self) -> dict[str, Any]:
        given = {"algorithm": self.run.algorithm, "input_dataset": self.run.source, "store": self.run.store}
        return {**given, "parameters": {TOKEN: self.token}}

    def start(self) -> None:
        """Begin the run."""
        if self.run.way == "call":
            self.pids.append(self.world.fork(**self._order(), tag=self.token))
            return
        deployment = self.world.ask("/deployments/name/algorithm-task/algorithm-task")["id"]
        slugs = {"algorithm": "algorithm", "input_dataset": "dataset", "store": "dataset-store"}
        references = {
            name: {"$ref": {"block_document_slug": f"{slug}/{self.parameters[name]}"}} for name, slug in slugs.items()
        }
        body = {"parameters": self.parameters | references, "tags": [self.token], "idempotency_key": self.token}
        self.created = self.world.ask(f"/deployments/{deployment}/create_flow_run", body)["id"]

    def retry(self) -> None:
        """Do as somebody who saw that the run's process died."""
        run_id = self.run_id()
        if run_id is not None:
            self.pids.append(self.world.fork(**self._order(), run_id=run_id))

    def _order(self) -> dict[str, Any]:
        log, result = self.world.folder / "logs" / self.token, self.world.folder / "results" / f"{self.token}.{len(self.pids)}"
        return {"parameters": self.parameters, "log": str(log), "result": str(result)}

    def cancel(self) -> None:
        """Do as `prefect flow-run cancel` does."""
        if self.created is not None:
            body = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
            self.world.ask(f"/flow_runs/{self.created}/set_state", body)

    def run_id(self) -> str | None:
        """The id of the flow run, if it came so far as to have one.

        Prefect's client asks once more for a run where the answer was lost: then the first one never begins.
        """
        wanted = {"flow_runs": {"tags": {"all_": [self.token]}}}
        rows = self.world.ask("/flow_runs/filter", wanted)
        return next((row["id"] for row in sorted(rows, key=lambda row: -row["run_count"])), None)

    def process(self) -> int | None:
        """The process that runs it now."""
        if self.run.way == "call":
            return next((pid for pid in self.pids[-1:] if alive(pid)), None)
        return faults.process_with(f"PREFECT__FLOW_RUN_ID={self.created}".encode())

    def told(self) -> dict[str, Any] | None:
        """What the last call returned or raised."""
        path = self.world.folder / "results" / f"{self.token}.{len(self.pids) - 1}"
        return dict(json.loads(path.read_text())) if path.exists() else None

    def wait(self, until: float) -> None:
        """Return when it has ended; it is killed when that takes too long."""
        while (pid := self.process()) is not None and time.monotonic() < until:
            time.sleep(0.2)
        if pid is not None:
            self.hung = True
            with contextlib.suppress(ProcessLookupError):
                if self.run.way == "call":
                    # Its stacks go to its log.
                    os.kill(pid, signal.SIGUSR1)
                    time.sleep(1)
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Played:
    """What came of a round: its runs, and how often each fault hit somebody. `hit` is what was done to single runs."""

    round: Round
    players: tuple[Player, ...]
    strikes: Counter[str]
    hit: frozenset[tuple[str, str]]

    def struck(self, player: Player) -> frozenset[str]:
        """What did hit this run, or what it used; a worker is nothing to a Python call."""
        services = {kind for kind in ON_SERVICES if self.strikes[kind]}
        if player.run.way == "call":
            services -= {kind for kind in services if kind.endswith("the worker")}
        return frozenset(services | {kind for token, kind in self.hit if token == player.token})


def play(world: World, plan: Round) -> Played:
    """Play it to its end."""
    players = {run.token: Player(world, run) for run in plan.runs}
    strikes: Counter[str] = Counter()
    hit: set[tuple[str, str]] = set()
    began = time.monotonic()

    def strike(fault: Fault) -> None:
        target = players[fault.token] if fault.token else None
        count = faults.do(world, fault, target)
        strikes[fault.kind] += count
        if target is None or not count:
            return
        hit.add((target.token, fault.kind))
        if fault.kind == "kill the flow" and target.run.way == "call" and target.run.retried is not None:
            time.sleep(target.run.retried)
            target.retry()

    def cancel(player: Player) -> None:
        player.cancel()
        strikes["cancel the run"] += 1
        hit.add((player.token, "cancel the run"))

    deeds: list[tuple[float, Callable[[], None]]] = [(run.starts, players[run.token].start) for run in plan.runs]
    starts = {run.token: run.starts for run in plan.runs}
    deeds += [(starts[fault.token] if fault.token else fault.at, lambda fault=fault: strike(fault)) for fault in plan.faults]  # type: ignore[misc]
    deeds += [(run.cancelled, lambda run=run: cancel(players[run.token])) for run in plan.runs if run.cancelled]  # type: ignore[misc]
    with ThreadPoolExecutor(len(deeds)) as pool:
        done = [pool.submit(_at, began + when, deed) for when, deed in deeds]
    for each in done:
        each.result()
    until = time.monotonic() + END_SECONDS
    for player in players.values():
        # A worker that cannot reach the server as it starts gives up.
        if world.worker.keep():
            print(f"round {plan.number}: the worker had ended by itself, and was started again", flush=True)
        player.wait(until)
    _await_the_automations(world, [player.token for player in players.values()])
    return Played(plan, tuple(players.values()), strikes, frozenset(hit))


def _await_the_automations(world: World, tokens: list[str]) -> None:
    """Return when the server has ended the runs that died before our code was called, or when it had returned already."""
    until = time.monotonic() + AUTOMATION_SECONDS
    pending = {"flow_runs": {"tags": {"any_": tokens}, "state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}}
    while world.ask("/flow_runs/filter", pending) and time.monotonic() < until:
        time.sleep(1)


def _at(when: float, deed: Callable[[], None]) -> None:
    time.sleep(max(0.0, when - time.monotonic()))
    deed()
