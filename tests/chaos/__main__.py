"""The chaos suite: runs are started, everything that they need is killed, stalled, cut and corrupted, and nothing may be lost.

    python -m tests.chaos

`CHAOS_SECONDS` says how long new rounds are begun (480), `CHAOS_SEED` repeats what an earlier call did, `CHAOS_ROUND` only that
round of it. It has to be root, on Linux. Exit code 1 tells of findings.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

from .house import inside


def main(folder: Path) -> int:
    """Play rounds until the time is over."""
    from .plan import plan_round
    from .report import Report
    from .rounds import play
    from .world import build

    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(1_000_000))
    only = os.environ.get("CHAOS_ROUND")
    until = time.monotonic() + float(os.environ.get("CHAOS_SECONDS") or 480)
    report = Report(seed)
    with build(folder) as world:
        report.say("everything is up")
        number = int(only or 0)
        try:
            while True:
                report.add(world, play(world, plan_round(seed, number)))
                number += 1
                if only or time.monotonic() > until:
                    break
        finally:
            report.close()
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(inside("tests.chaos", main))
