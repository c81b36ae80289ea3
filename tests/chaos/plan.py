"""What happens in a round: which runs there are, and what is done to whom, and when. All of it follows from the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .algorithms import ALGORITHMS, SOURCES

RUNS = 12
SECONDS = 40.0

# How often each fault is drawn, and for how many seconds it lasts.
ON_RUNS: dict[str, tuple[float, float, float]] = {
    "kill the flow": (8, 0, 0),
    "terminate the flow": (3, 0, 0),
    "stall the flow": (2, 1, 6),
    "kill the container": (4, 0, 0),
    "remove the container": (1, 0, 0),
    "pause the container": (1, 1, 4),
}
ON_SERVICES: dict[str, tuple[float, float, float]] = {
    "kill the engine": (2, 0.2, 3),
    "terminate the engine": (1, 0.2, 3),
    "stall the engine": (1, 1, 6),
    "kill the server": (1, 0.2, 5),
    "stall the server": (1, 1, 6),
    "cut the server": (3, 0, 0),
    "kill the store": (2, 0.2, 4),
    "stall the store": (1, 1, 8),
    "cut the store": (2, 0, 0),
    "break the store's answers": (4, 1, 4),
    "flip bits of the store's answers": (6, 1, 6),
    "swallow requests to the store": (1, 1, 5),
    "kill the worker": (1, 0.2, 2),
    "terminate the worker": (1, 0.2, 2),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One flow run. `retried` is how long after its process was killed somebody tries it again, if anybody does."""

    token: str
    algorithm: str
    source: str
    store: str
    way: str
    starts: float
    cancelled: float | None
    retried: float | None


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done `at` so many seconds into the round; to a run's process or container, so long after it has begun.

    It lasts for `seconds`. `offset` says to which byte, where it matters.
    """

    at: float
    kind: str
    token: str | None
    seconds: float
    offset: int


@dataclass(frozen=True, slots=True)
class Round:
    """All that happens. `calm` is one without any fault."""

    seed: int
    number: int
    runs: tuple[Run, ...]
    faults: tuple[Fault, ...]

    def against(self, run: Run) -> frozenset[str]:
        """What is done to this run: to itself, and to what all runs use."""
        cancelled = {"cancel the run"} if run.cancelled else set()
        return frozenset(cancelled | {fault.kind for fault in self.faults if fault.token in (None, run.token)})


def plan_round(seed: int, number: int) -> Round:
    """The plan of a round. The first has no faults, so that the suite cannot blame everything on them."""
    dice = random.Random(f"{seed} {number}")
    runs = tuple(_run(dice, seed, number, n) for n in range(RUNS))
    faults = []
    if number:
        faults = [_on_run(dice, run) for run in dice.choices(runs, k=dice.randint(9, 18))]
        # In every third round only single runs are hit, and must not hit each other.
        if number % 3:
            faults += [_on_service(dice) for _ in range(dice.randint(10, 22))]
    return Round(seed, number, runs, tuple(faults))


def _run(dice: random.Random, seed: int, number: int, n: int) -> Run:
    deployed = dice.random() < 0.15
    return Run(
        token=f"{seed}-{number}-{n}",
        algorithm=dice.choice(list(ALGORITHMS)),
        source=dice.choice(list(SOURCES)),
        store=dice.choice(["local", "objects", "objects"]),
        way="deployment" if deployed else "call",
        starts=round(dice.uniform(0, 0.4 * SECONDS), 2),
        cancelled=round(dice.uniform(2, SECONDS), 2) if deployed and number and dice.random() < 0.3 else None,
        retried=round(dice.uniform(0.2, 4), 2) if dice.random() < 0.5 else None,
    )


def _drawn(dice: random.Random, table: dict[str, tuple[float, float, float]]) -> tuple[str, float, int]:
    kind = dice.choices(list(table), [weight for weight, _, _ in table.values()])[0]
    _, shortest, longest = table[kind]
    # Most of an answer's first 600 bytes are its head; the rest is for the bodies.
    offset = dice.randrange(600) if dice.random() < 0.3 else dice.randrange(600, 200_000)
    return kind, round(dice.uniform(shortest, longest), 2), offset


def _on_run(dice: random.Random, run: Run) -> Fault:
    kind, seconds, offset = _drawn(dice, ON_RUNS)
    return Fault(
        round(dice.uniform(0, 1.5) if "container" in kind else dice.triangular(0.1, 20, 3), 2), kind, run.token, seconds, offset
    )


def _on_service(dice: random.Random) -> Fault:
    kind, seconds, offset = _drawn(dice, ON_SERVICES)
    return Fault(round(dice.uniform(1, SECONDS), 2), kind, None, seconds, offset)
