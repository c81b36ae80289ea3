"""Has every round audited, says what was found, and adds everything up."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from tests.servers.engine import alive

from .audit import FINAL, examine, examine_leftovers
from .plan import Round
from .rounds import Played
from .witness import Witness, watchdogs
from .world import World

SETTLE_SECONDS = 120.0
# Nobody will say anything more about a Python call.
SETTLE_CALL_SECONDS = 10.0


class Report:
    """What all rounds so far came to."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._began = time.monotonic()
        self._rounds = self._runs = 0
        self._strikes: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self.findings: list[str] = []
        print(f"CHAOS_SEED={seed}", flush=True)

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"[{time.monotonic() - self._began:5.0f} s] {text}", flush=True)

    def add(self, world: World, played: Played) -> None:
        """Audit a round that is over."""
        self.say(f"round {played.round.number} has ended")
        found, outcomes = audited(world, played)
        self._rounds += 1
        self._runs += len(played.players)
        self._strikes += played.strikes
        self._outcomes += outcomes
        self.findings += found
        said = f"{_counted(outcomes)}; {sum(played.strikes.values())} strikes; {len(found)} findings"
        self.say(f"round {played.round.number}: {said}")
        if found:
            _explain(world, played, found)

    def close(self) -> None:
        """Print the sum."""
        minutes = (time.monotonic() - self._began) / 60
        print(f"\nCHAOS_SEED={self._seed}: {self._rounds} rounds, {self._runs} runs in {minutes:.0f} minutes")
        print(f"  outcomes: {_counted(self._outcomes)}")
        print(f"  {sum(self._strikes.values())} strikes:")
        for kind, count in self._strikes.most_common():
            print(f"    {count:5} × {kind}")
        print(f"  {len(self.findings)} findings")
        for each in self.findings:
            print(f"    {each}")


def audited(world: World, played: Played) -> tuple[list[str], Counter[str]]:
    """Clean up as a machine in use does, and compare what is there with what is said; what was found, and the outcomes."""
    _wait_for_watchdogs()
    _reap(world, played)
    run_ids = {player.token: player.run_id() for player in played.players}
    _settle(world, [run_id for run_id in run_ids.values() if run_id])
    witness = Witness(world)
    found: list[str] = []
    outcomes: Counter[str] = Counter()
    for player in played.players:
        run_id = run_ids[player.token]
        if run_id is None:
            outcomes["not begun"] += 1
            continue
        claims = witness.claims(player, run_id)
        why = (claims.told or {}).get("code")
        outcomes[claims.state.capitalize() + (f" ({why})" if why else "")] += 1
        kept = (world.home / "workspaces" / run_id).exists()
        if kept and claims.state in ("COMPLETED", "CANCELLED"):
            found.append(f"{player.token} ({run_id}): it is {claims.state} and keeps a workspace")
        found += [f"{player.token} ({run_id}): {text}" for text in examine(witness.truth(played, player), claims)]
    _reap(world, played, OASIS_FLOWS_KEEP_HOURS="0")
    left = Witness(world).leftovers(run_id for run_id in run_ids.values() if run_id)
    found += [f"round {played.round.number}: {text}" for text in examine_leftovers(left)]
    witness.forget()
    return found, outcomes


def _wait_for_watchdogs() -> None:
    until = time.monotonic() + SETTLE_SECONDS
    while watchdogs() and time.monotonic() < until:
        time.sleep(0.5)


def _reap(world: World, played: Played, **env: str) -> None:
    """What a machine's timer, or its next run, does."""
    log = world.folder / "logs" / f"reap-{played.round.number}"
    pid = world.fork(command=["reap", "--now"], log=str(log), env=env)
    while alive(pid):
        time.sleep(0.1)


def _settle(world: World, run_ids: list[str]) -> None:
    """Wait until all runs are in a final state; those that a worker may still begin longer than those that have ended."""
    began = time.monotonic()
    while run_ids and (waited := time.monotonic() - began) < SETTLE_SECONDS:
        rows = world.ask("/flow_runs/filter", {"flow_runs": {"id": {"any_": run_ids}}})
        waiting = [row for row in rows if row["state_type"] not in FINAL]
        run_ids = [row["id"] for row in waiting if row["deployment_id"] or waited < SETTLE_CALL_SECONDS]
        time.sleep(0.5)


def _explain(world: World, played: Played, found: list[str]) -> None:
    """Everything that helps to understand a finding, and how to see it again."""
    plan: Round = played.round
    for each in found:
        print(f"  FINDING {each}")
    for run in plan.runs:
        if any(run.token in each for each in found):
            print(f"  {run}")
            print(_tail(world.folder / "logs" / (run.token if run.way == "call" else "worker")))
    for fault in plan.faults:
        print(f"  {fault.at:6.2f} s: {fault.kind} {fault.token or ''} for {fault.seconds} s, byte {fault.offset}")
    print(f"  struck: {dict(played.strikes)}; hit: {sorted(played.hit)}")
    print(f"  again: make chaos CHAOS_SEED={plan.seed} CHAOS_ROUND={plan.number}", flush=True)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"    | {line}" for line in lines[-60:])


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"
