"""How many containers fit on how much machine, now: arithmetic over a snapshot, node by node.

What counts is what others have *requested*, not what they use this minute: an idle service with a large request will want
it back. Nothing is summed over nodes before it is divided: ten nodes with half a processor free hold no container that
needs one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, Decimal
from typing import Literal, NamedTuple

from .errors import DescriptionError
from .job import human_bytes

HEADROOM = 0.8

_SUFFIXES = {"n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1)}
_SUFFIXES |= {unit: Decimal(1000) ** (power + 1) for power, unit in enumerate("kMGTPE")}
_SUFFIXES |= {f"{unit}i": Decimal(1024) ** (power + 1) for power, unit in enumerate("KMGTPE")}
_QUANTITY = re.compile(r"(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d{1,3})|([numkMGTPE]|[KMGTPE]i)?)")


def quantity(text: object) -> Decimal:
    """The number in a quantity as Kubernetes writes it: `500m`, `3Gi`, `2G`, `1e3`, or plain.

    Raises:
        DescriptionError: it is none, or it is negative.
    """
    found = _QUANTITY.fullmatch(str(text).strip()) if isinstance(text, str | int | float) else None
    if found is None or isinstance(text, bool):
        raise DescriptionError(
            f"{text!r} is not a quantity. Write a number, with a unit if need be, such as 500m, 3Gi, 2G or 1e3."
        )
    number, exponent, suffix = found.groups()
    return Decimal(f"{number}e{exponent}") if exponent else Decimal(number) * _SUFFIXES[suffix or ""]


def millicpus(text: object) -> int:
    """Thousandths of a processor in a quantity of processors, rounded up; raises as `quantity`."""
    return int((quantity(text) * 1000).to_integral_value(ROUND_CEILING))


def byte_count(text: object) -> int:
    """Bytes in a quantity of memory, rounded up; raises as `quantity`."""
    return int(quantity(text).to_integral_value(ROUND_CEILING))


class Vector(NamedTuple):
    """An amount of everything that is counted. Processors are in thousandths; a pod, or container, is 1 of `pods`."""

    millicpus: int = 0
    memory_bytes: int = 0
    gpus: int = 0
    pods: int = 0

    def plus(self, other: Vector) -> Vector:
        return Vector(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Vector) -> Vector:
        return Vector(*(a - b for a, b in zip(self, other, strict=True)))


WORDS = Vector("processors", "memory", "GPUs", "places for containers")  # type: ignore[arg-type]  # one word for each


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine: what containers may have of it in all, and what is requested already.

    `closed` says why it takes no more of them; empty when it does. With `for_now` that passes, and may be waited for.
    `gpus_only`: it takes none but those that need a GPU.
    """

    name: str
    allocatable: Vector
    requested: Vector = field(default_factory=Vector)
    closed: str = ""
    for_now: bool = False
    gpus_only: bool = False

    def emptied(self) -> Node:
        """The node as it is once nothing runs on it, and what closes it for now has passed."""
        return replace(self, requested=Vector(), closed="" if self.for_now else self.closed)

    def free(self, headroom: float) -> Vector:
        """What is left of the part of processors and memory that `headroom` allows; GPUs and places are never divided."""
        most = self.allocatable
        allowed = most._replace(millicpus=int(most.millicpus * headroom), memory_bytes=int(most.memory_bytes * headroom))
        return Vector(*(max(0, amount) for amount in allowed.minus(self.requested)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one container needs. `gpus` is a number, or "all" of a node, none of which anybody else has."""

    cpus: float
    memory_bytes: int
    gpus: int | Literal["all"] = 0

    def on(self, node: Node) -> Vector | None:
        """The demand on this node; `None` where it can never have its GPUs."""
        gpus = node.allocatable.gpus if self.gpus == "all" else self.gpus
        if self.gpus == "all" and gpus == 0:
            return None
        return Vector(max(1, -(-round(self.cpus * 1e6) // 1000)), self.memory_bytes, gpus, 1)

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPUs" if self.gpus else ""
        return f"{self.cpus:g} processors, {human_bytes(self.memory_bytes)}{gpus}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How many fit on each node (`nodes`, in the order given), and which resource is the limit."""

    nodes: tuple[int, ...]
    limit: str

    @property
    def count(self) -> int:
        """How many fit at once."""
        return sum(self.nodes)


def fit(nodes: Sequence[Node], demand: Demand, *, headroom: float = HEADROOM) -> Fit:
    """How many containers of this demand fit at once into what is free; 0 is an answer like any other."""
    ways = [_ways(node, demand, node.free(headroom)) for node in nodes]
    # What would allow the fewest if only it counted. A tie goes to the first.
    sums = [sum(way[position] for way in ways) for position in range(len(WORDS))] if ways else [0]
    return Fit(nodes=tuple(min(way) for way in ways), limit=str(WORDS[sums.index(min(sums))]))


def _ways(node: Node, demand: Demand, free: Vector) -> tuple[int, ...]:
    wanted = demand.on(node)
    if wanted is None or node.closed or (node.gpus_only and not wanted.gpus):
        return (0,) * len(WORDS)
    # What is not asked for does not limit: more places than these has no machine.
    return tuple(have // want if want else 1 << 30 for have, want in zip(free, wanted, strict=True))


def too_big(nodes: Sequence[Node], demand: Demand, *, headroom: float = HEADROOM) -> str:
    """Why the demand would fit on no node even if all were empty, in a sentence; empty when it would."""
    empty = [node.emptied() for node in nodes]
    if fit(empty, demand, headroom=headroom).count:
        return ""
    if not nodes:
        return f"The algorithm needs {demand}, and there is no node at all."
    most = "; ".join(described(node, headroom) for node in empty[:10])
    return f"The algorithm needs {demand}, and no node has that, even empty ({headroom:.0%} of processors and memory count): {most}."


def described(node: Node, headroom: float = HEADROOM) -> str:
    """What is free on a node, in words."""
    if node.closed:
        return f"{node.name} takes nothing ({node.closed})"
    free = node.free(headroom)
    gpus = f", {free.gpus} GPUs" if node.allocatable.gpus else ""
    only = ", for containers with GPUs only" if node.gpus_only else ""
    return f"{node.name} has {free.millicpus / 1000:g} processors, {human_bytes(free.memory_bytes)}{gpus} free{only}"
