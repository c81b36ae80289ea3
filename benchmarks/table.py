"""A table of measurements: ours beside the plainest way to do the same, in turns, so that their ratio means something."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Series:
    """What one way took, turn by turn: seconds, and the processor seconds of this process and of the children it waited for."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def time(self, action: Callable[[], object]) -> None:
        """Do it once."""
        began, worked = time.perf_counter(), _cpu_seconds()
        action()
        self.seconds.append(time.perf_counter() - began)
        self.cpu_seconds.append(_cpu_seconds() - worked)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        cpu = f", cpu {said(statistics.median(self.cpu_seconds))}" if self.cpu_seconds else ""
        return f"{said(self.median)} ({said(min(self.seconds))}–{said(max(self.seconds))}){cpu}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. `reached` is `None` where there is no mark to reach."""

    what: str
    ours: str
    beside: str = ""
    theirs: str = ""
    figure: str
    mark: str = ""
    reached: bool | None = None

    def __str__(self) -> str:
        verdict = {None: "", True: "yes", False: "**no**"}[self.reached]
        return f"| {self.what} | {self.ours} | {self.beside} | {self.theirs} | {self.figure} | {self.mark} | {verdict} |"


HEADER = (
    "| what | ours: median (spread) | beside it | median (spread) | figure | mark | reached |\n|---|---|---|---|---|---|---|"
)


def in_turns(
    times: int, *actions: Callable[[], object], warm_up: int = 1, before: Callable[[], object] = lambda: None
) -> list[Series]:
    """Time the actions in turns, after some turns that do not count; `before` comes before each action, untimed."""
    found = [Series() for _ in actions]
    for turn in range(times + warm_up):
        for action, series in zip(actions, found, strict=True):
            before()
            (series if turn >= warm_up else Series()).time(action)
    return found


def difference(ours: Series, theirs: Series) -> float:
    """The median of what each turn of ours took longer."""
    return statistics.median(a - b for a, b in zip(ours.seconds, theirs.seconds, strict=True))


def speed(ours: Series, theirs: Series) -> float:
    """Our speed as a part of theirs: the median of the turns' ratios."""
    return statistics.median(b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True))


def faster(what: str, ours: Series, others: Sequence[tuple[str, Series]], least: float) -> Row:
    """A row whose mark is a part of the fastest other's speed."""
    name, best = min(others, key=lambda other: other[1].median)
    ratio = speed(ours, best)
    return Row(
        what=what,
        ours=str(ours),
        beside="; ".join(each for each, _ in others),
        theirs="; ".join(str(series) for _, series in others),
        figure=f"{ratio:.0%} of the speed of {name}",
        mark=f"≥ {least:.0%}",
        reached=ratio >= least,
    )


def said(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.995 else f"{1000 * seconds:.0f} ms"


def _cpu_seconds() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)
