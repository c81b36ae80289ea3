"""A picture of what a container used over time: processors above, memory below. Pure: from samples to an SVG.

Its colours are readable on white and on black, since an image in a page does not learn which the page is.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .job import Sample

WIDTH, HEIGHT = 720, 300
_LEFT, _RIGHT, _PANEL, _TOPS = 52, 696, 92, (26, 172)
_GREY, _BLUE, _ORANGE, _RED = "#7d858f", "#3b82f6", "#e08a1e", "#e5484d"
_STEPS = [float(f"{digit}e{power}") for power in range(-2, 16) for digit in (1, 2, 5)]
_MIB, _GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class _Panel:
    """One quantity over time: `values` at `times`, in a unit of its own; `limit` in the same."""

    name: str
    unit: str
    colour: str
    values: Sequence[float]
    limit: float


def svg(samples: Sequence[Sample], *, cpus: float, memory_bytes: int) -> str:
    """The picture of at least two samples, and of the limits that held."""
    times = [sample.seconds for sample in samples]
    size, unit = (_GIB, "GiB") if max(sample.memory_bytes for sample in samples) >= 8 * _GIB else (_MIB, "MiB")
    memory = [sample.memory_bytes / size for sample in samples]
    panels = (
        _Panel("Processors in use", "", _BLUE, [sample.cpus for sample in samples], cpus),
        _Panel("Memory in use", unit, _ORANGE, memory, memory_bytes / size),
    )
    drawn = "".join(_drawn(panel, times, top) for panel, top in zip(panels, _TOPS, strict=True))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{_GREY}">{drawn}{_time_axis(times[-1])}</svg>'
    )


def url(picture: str) -> str:
    """The SVG as a URL that holds it, for an image in a page."""
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.encode()).decode()}"


def _drawn(panel: _Panel, times: Sequence[float], top: int) -> str:
    most, bottom = max(panel.values), top + _PANEL
    # A limit that is far away would press the line to the ground; the title has it in any case.
    in_sight = panel.limit <= 4 * most
    shown = max(panel.limit if in_sight else most, most, 0.1)
    step = _step(shown)
    highest = step * math.ceil(shown / step - 1e-9)

    def y(value: float) -> float:
        return round(bottom - _PANEL * value / highest, 1)

    line = " ".join(f"{_x(second, times[-1])},{y(value)}" for second, value in zip(times, panel.values, strict=True))
    line = f"{_LEFT},{y(panel.values[0])} {line}"
    unit = f" {panel.unit}" if panel.unit else ""
    title = f"{panel.name}: {_number(most)}{unit} at most, limit {_number(panel.limit)}{unit}"
    parts = [f'<text x="{_LEFT}" y="{top - 9}" font-weight="600">{title}</text>']
    for number in range(round(highest / step) + 1):
        at = y(number * step)
        parts.append(f'<path d="M{_LEFT} {at}H{_RIGHT}" stroke="{_GREY}" stroke-opacity="0.25"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4}" text-anchor="end">{_number(number * step)}</text>')
    if in_sight:
        parts.append(f'<path d="M{_LEFT} {y(panel.limit)}H{_RIGHT}" stroke="{_RED}" stroke-dasharray="5 4"/>')
    parts.append(f'<path d="M{_LEFT},{bottom} L{line} {_RIGHT},{bottom}Z" fill="{panel.colour}" fill-opacity="0.15"/>')
    parts.append(f'<polyline points="{line}" fill="none" stroke="{panel.colour}" stroke-width="1.5"/>')
    return "".join(parts)


def _time_axis(end: float) -> str:
    size, unit = (1, "s") if end < 180 else (60, "min") if end < 3 * 3600 else (3600, "h")
    step, bottom = _step(end / size, 8), _TOPS[1] + _PANEL
    marks = range(int(end / size / step) + 1)
    return "".join(
        f'<text x="{_x(number * step * size, end)}" y="{bottom + 18}" text-anchor="middle">{_number(number * step)} {unit}</text>'
        for number in marks
    )


def _x(seconds: float, end: float) -> float:
    return round(_LEFT + (_RIGHT - _LEFT) * seconds / end, 1)


def _step(most: float, marks: int = 4) -> float:
    """The least of 1, 2, 5, 10, 20, … (and 0.1, 0.2, …) of which at most so many reach up to `most`."""
    return next(step for step in _STEPS if most / step <= marks + 1e-9)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
