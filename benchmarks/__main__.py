"""`make bench`: how long the things take that people wait for, beside the plainest way to do the same.

    python -m benchmarks [--quick] [SUBJECT ...]

The subject `kubernetes` is measured only where it is named: it needs a cluster, the one of KUBECONFIG. The table is printed row by row. A whole run of all subjects is written to `benchmarks/results.md`.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

# First, for it has to be there before Prefect is imported.
from benchmarks.surroundings import IMAGE, LIMITS, ROOT, ensure_image, quiet_prefect

# isort: split
from benchmarks import command_line, kubernetes, local_store, many_runs, memory, object_store, one_run, output, start
from benchmarks.table import HEADER, Row
from tests.servers.prefect import PrefectServer

__all__ = ["IMAGE", "LIMITS", "quiet_prefect"]

METHOD = """Ours and what is beside it are measured in turns, in one go, on a machine that does other things, too: only what is in one row can be
compared. A figure is the median of the turns' own ratios or differences; `cpu` is the processor time of this process and of
what it started, without the engine's and the server's. The first turns do not count where a warm process is meant. How, row by row:
the modules beside this file. What the figures mean: [performance](../docs/explanation/performance.md)."""

LESS = " With `--quick`: sizes and turns are smaller than in a whole run."

# What needs a Prefect server comes first: at the end it has gone.
SERVED = ("one_run", "many_runs", "start", "memory")
ASKED_FOR = ("kubernetes",)
ALONE = ("command_line", "output", "local_store", "object_store")


def rows(subject: str, folder: Path, server: PrefectServer | None, *, quick: bool) -> Iterator[Row]:
    """The rows of one subject."""
    match subject, server:
        case "start", PrefectServer():
            return start.rows(folder, server, quick=quick)
        case "one_run", _:
            return one_run.rows(folder, quick=quick)
        case "many_runs", _:
            return many_runs.rows(folder, quick=quick)
        case "memory", _:
            return memory.rows(folder, quick=quick)
        case "kubernetes", _:
            return kubernetes.rows(folder, quick=quick)
        case "output", _:
            return output.rows(folder, quick=quick)
        case "local_store", _:
            return local_store.rows(folder, quick=quick)
        case "object_store", _:
            return object_store.rows(folder, quick=quick)
        case _:
            return command_line.rows(quick=quick)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller and fewer: less than three minutes on an idle machine")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results.md, as a whole run does")
    parser.add_argument(
        "subject", nargs="*", choices=[*SERVED, *ALONE, *ASKED_FOR, []], help="what to measure; everything, by default"
    )
    options = parser.parse_args()
    began, load, lines = time.time(), os.getloadavg()[0], list[str]()
    chosen = options.subject or [*SERVED, *ALONE]
    print(HEADER)
    with tempfile.TemporaryDirectory(prefix="oasis-bench-") as name:
        ensure_image()
        for group, needs_server in (((*SERVED, *ASKED_FOR), True), (ALONE, False)):
            subjects = [subject for subject in group if subject in chosen]
            with quiet_prefect(Path(name)) if needs_server and subjects else nullcontext() as server:
                for subject in subjects:
                    with tempfile.TemporaryDirectory(dir=name) as folder:
                        for row in rows(subject, Path(folder), server, quick=options.quick):
                            lines.append(str(row))
                            print(row, flush=True)
    print(f"\n{time.time() - began:.0f} s, {machine(load)}")
    if options.write or not (options.quick or options.subject):
        table = "\n".join([HEADER, *lines])
        (ROOT / "benchmarks" / "results.md").write_text(
            f"# Measured\n\n{machine(load)}.{LESS if options.quick else ''}\n\n{METHOD}\n\n{table}\n"
        )


def machine(load: float) -> str:
    """What all of it ran on."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    engine = subprocess.run(
        ["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=True
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    kernel = ".".join(platform.release().split(".")[:2])
    return (
        f"Linux {kernel}, {os.cpu_count()} processors ({cpu[1] if cpu else platform.machine()}), {memory} GiB, "
        f"Docker {engine.stdout.strip().partition('+')[0]}, Python {platform.python_version()}, Prefect {version('prefect')}, "
        f"load {load:.1f} before and {os.getloadavg()[0]:.1f} at the end"
    )


if __name__ == "__main__":
    main()
