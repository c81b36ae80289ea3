"""What everybody types first."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.surroundings import run
from benchmarks.table import Row, in_turns, said


def rows(*, quick: bool) -> Iterator[Row]:
    """One row."""
    program = Path(sys.executable).with_name("oasis-flows")
    ours, bare = in_turns(
        5 if quick else 15, lambda: run(program, "--help"), lambda: run(sys.executable, "-c", "import argparse")
    )
    yield Row(
        what="`oasis-flows --help`",
        ours=str(ours),
        beside="Python importing argparse",
        theirs=str(bare),
        figure=said(ours.median),
        mark="≤ 300 ms",
        reached=ours.median <= 0.3,
    )
