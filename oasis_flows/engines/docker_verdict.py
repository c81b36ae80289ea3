"""From the engine's last word on a container to how it ended: pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..job import ContainerExit, ContainerJob, Reason
from .docker_errors import init_failure
from .quota import Passed
from .usage import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was seen of one container, from the engine, the kernel, and the run itself. `log_lost` is as in `ContainerExit`."""

    state: Mapping[str, Any]
    in_force: Mapping[str, object]
    usage: Usage = field(default_factory=Usage)
    stopped_at_timeout: bool = False
    passed: Passed | None = None
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stderr_head: bytes = b""
    log_lost: str = ""


def container_exit(job: ContainerJob, evidence: Evidence) -> ContainerExit:
    """How a container ended that did end.

    Memory comes first: with a killed child even an exit code of 0 says nothing about the output. The kernel kills only
    when the limit is reached, so then the peak is the limit at least, whatever the last sample was. An output or a log that
    passed its limit comes before any exit code.
    """
    state, limit = evidence.state, job.resources.memory_bytes
    reason, detail = _reason(evidence)
    peak = evidence.usage.memory_peak_bytes
    return ContainerExit(
        reason=reason,
        exit_code=int(state["ExitCode"]),
        started_at=parse_time(state.get("StartedAt", "")),
        finished_at=parse_time(state.get("FinishedAt", "")),
        memory_limit_bytes=limit,
        memory_peak_bytes=max(peak or 0, limit) if reason is Reason.OUT_OF_MEMORY else peak,
        cpu_seconds=evidence.usage.cpu_seconds,
        forks_refused=evidence.usage.forks_refused,
        usage=evidence.usage.samples(),
        timeout_seconds=job.timeout_seconds,
        limit_passed=evidence.passed.limit if evidence.passed and reason is evidence.passed.reason else None,
        in_force=evidence.in_force,
        log_lost=evidence.log_lost,
        detail=" ".join(part for part in (detail, str(state.get("Error") or "")) if part),
    )


def _reason(evidence: Evidence) -> tuple[Reason, str]:
    state = evidence.state
    code = int(state["ExitCode"])
    if state.get("OOMKilled") or evidence.usage.killed_for_memory:
        return Reason.OUT_OF_MEMORY, "" if code == 137 else "a process inside was killed for memory"
    if evidence.stopped_at_timeout:
        return Reason.TIMED_OUT, ""
    if evidence.passed:
        return evidence.passed.reason, ""
    if code == 0:
        return Reason.OK, ""
    if code == 137:
        return Reason.KILLED, ""
    failed = init_failure(code, evidence.stdout_bytes, evidence.stderr_head, evidence.stderr_bytes)
    return failed or (Reason.EXIT_NONZERO, signal_name(code))


def signal_name(code: int) -> str:
    """The signal that an exit code above 128 stands for, as a detail; empty when none."""
    try:
        return f"ended by {signal.Signals(code - 128).name}" if code > 128 else ""
    except ValueError:
        return ""


_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)")


def parse_time(text: str) -> datetime | None:
    """The engine's RFC 3339 time, cut to microseconds; `None` for its "never" (year 1) and for what is no time."""
    found = _TIME.fullmatch(text)
    if not found or found[1].startswith("0001"):
        return None
    fraction = (found[2] or "")[:6].ljust(6, "0")
    return datetime.fromisoformat(f"{found[1]}.{fraction}{found[3].replace('Z', '+00:00')}").astimezone(UTC)
