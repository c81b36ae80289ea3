"""What a container used, put together from readings while it runs: pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..job import Sample

MOST_SAMPLES = 240
# Two of the kernel's periods for the limit of processors: within one, a container may use more than its share.
_FINEST_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a container has used by some moment. `None` could not be read.

    `memory_bytes` leaves out the file cache that the kernel would give back at once, as `docker stats` does;
    `memory_peak_bytes` is the kernel's own maximum, with it.
    """

    cpu_seconds: float | None
    memory_bytes: int | None
    memory_peak_bytes: int | None
    killed_for_memory: bool | None = False
    forks_refused: int = 0


class _Point(NamedTuple):
    seconds: float
    cpu_seconds: float
    memory_bytes: int


class Usage:
    """The course of one container's use, and what it adds up to. Readings come in the order of time.

    It keeps one point for each span of time. When there would be more than `MOST_SAMPLES`, two neighbouring spans become
    one: memory stays constant, and two seconds are drawn as well as a day.
    """

    def __init__(self) -> None:
        self.cpu_seconds: float | None = None
        self.memory_peak_bytes: int | None = None
        self.killed_for_memory = False
        self.forks_refused = 0
        self._span_seconds = _FINEST_SECONDS
        self._points: dict[int, _Point] = {}

    def add(self, seconds: float, reading: Reading) -> None:
        """Take a reading, made so many seconds after the container's start."""
        self.killed_for_memory |= bool(reading.killed_for_memory)
        self.forks_refused = max(self.forks_refused, reading.forks_refused)
        self.memory_peak_bytes = self.memory_peak_bytes if reading.memory_peak_bytes is None else reading.memory_peak_bytes
        self.cpu_seconds = self.cpu_seconds if reading.cpu_seconds is None else reading.cpu_seconds
        if reading.cpu_seconds is None or reading.memory_bytes is None:
            return
        while seconds >= MOST_SAMPLES * self._span_seconds:
            self._span_seconds *= 2
            points, self._points = self._points, {}
            for span, point in points.items():
                self._put(span // 2, point)
        self._put(int(seconds / self._span_seconds), _Point(seconds, reading.cpu_seconds, reading.memory_bytes))

    def _put(self, span: int, point: _Point) -> None:
        """The later point takes the earlier one's place, and keeps the most memory of both."""
        before = self._points.get(span, point)
        self._points[span] = point._replace(memory_bytes=max(before.memory_bytes, point.memory_bytes))

    def samples(self) -> tuple[Sample, ...]:
        """One for each span that had a reading: processors on average since the sample before, memory at its most."""
        points = list(self._points.values())
        if len(points) > 1 and points[-1].seconds - points[-2].seconds < _FINEST_SECONDS / 2:
            last = points.pop()
            points[-1] = last._replace(memory_bytes=max(last.memory_bytes, points[-1].memory_bytes))
        found: list[Sample] = []
        before = _Point(0.0, 0.0, 0)
        for point in points:
            cpus = (point.cpu_seconds - before.cpu_seconds) / max(point.seconds - before.seconds, 0.001)
            found.append(Sample(round(point.seconds, 2), round(cpus, 3), point.memory_bytes))
            before = point
        return tuple(found)
