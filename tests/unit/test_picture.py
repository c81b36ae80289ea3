"""The picture of what a container used: what it says and where its lines are."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET

import pytest

from oasis_flows import picture
from oasis_flows.job import Sample

MIB, GIB = 1 << 20, 1 << 30
SVG = "{http://www.w3.org/2000/svg}"
TWO = (Sample(1.0, 0.25, 32 * MIB), Sample(2.0, 1.0, 64 * MIB))


def drawn(*samples: Sample, cpus: float = 1.0, memory_bytes: int = 128 * MIB) -> ET.Element:
    return ET.fromstring(picture.svg(samples, cpus=cpus, memory_bytes=memory_bytes))  # noqa: S314 - our own


def texts(root: ET.Element) -> list[str]:
    return [str(element.text) for element in root.iter(f"{SVG}text")]


def limits(root: ET.Element) -> int:
    return sum("stroke-dasharray" in element.attrib for element in root.iter(f"{SVG}path"))


def test_it_names_quantities_units_and_limits() -> None:
    root = drawn(*TWO)
    found = texts(root)
    assert "Processors in use: 1 at most, limit 1" in found
    assert "Memory in use: 64 MiB at most, limit 128 MiB" in found
    assert found[-5:] == ["0 s", "0.5 s", "1 s", "1.5 s", "2 s"]
    assert limits(root) == 2


def test_a_line_is_where_its_values_are() -> None:
    cpus, memory = [
        [tuple(map(float, pair.split(","))) for pair in str(line.get("points")).split()]
        for line in drawn(*TWO).iter(f"{SVG}polyline")
    ]
    (left, _), (middle, low), (right, high) = cpus
    assert middle - left == pytest.approx(right - middle, abs=0.2)
    # The axis of processors ends at 1, so the line does, and a quarter is a quarter of the way.
    bottom = high + (low - high) / 0.75
    assert [y for _, y in cpus] == pytest.approx([low, bottom - (bottom - high) / 4, high])
    assert memory[0][1] > memory[2][1]


@pytest.mark.parametrize(("memory", "seen"), [(32 * MIB, 2), (31 * MIB, 1)])
def test_a_limit_far_above_is_told_and_not_drawn(memory: int, seen: int) -> None:
    root = drawn(Sample(1.0, 0.5, memory), Sample(2.0, 0.5, memory))
    assert limits(root) == seen
    assert any("limit 128 MiB" in text for text in texts(root))


@pytest.mark.parametrize(("seconds", "last"), [(0.4, "0.4 s"), (100.0, "100 s"), (600.0, "10 min"), (86_400.0, "20 h")])
def test_time_has_a_unit_that_fits(seconds: float, last: str) -> None:
    assert texts(drawn(Sample(seconds / 2, 1, MIB), Sample(seconds, 1, MIB)))[-1] == last


def test_much_memory_is_in_gibibytes() -> None:
    root = drawn(Sample(1.0, 3.5, 9 * GIB), Sample(2.0, 4.0, 48 * GIB), cpus=4, memory_bytes=64 * GIB)
    assert "Memory in use: 48 GiB at most, limit 64 GiB" in texts(root)


def test_nothing_used_is_a_line_on_the_ground() -> None:
    assert "Processors in use: 0 at most, limit 1" in texts(drawn(Sample(1.0, 0.0, 0), Sample(2.0, 0.0, 0)))


def test_the_url_holds_the_picture() -> None:
    kind, _, content = picture.url("<svg/>").partition(",")
    assert (kind, base64.b64decode(content)) == ("data:image/svg+xml;base64", b"<svg/>")
