"""What a train requires of a station, and whether a station has it; pure.

A requirement is an environment variable whose value is a URL, a token, one of some choices, or the path of a file or folder
that is mounted into the container. How requirements belong together is a formula in conjunctive normal form: each clause
needs one of its literals, and a literal asks that a requirement is met, or forbids it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit

# The specification's rule has no digits, and its own examples have some (PHT_REQ1, PHT_RESOURCE_FHIR_DSTU3).
NAME = re.compile(r"[A-Z]+(_[A-Z]+)*")
NAME_WITH_DIGITS = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")


class Target(StrEnum):
    """What the value of a required variable is."""

    URL = "URL"
    TOKEN = "token"  # noqa: S105  # the field's word
    ENUM = "enum"
    FILE = "file"
    DIRECTORY = "directory"
    VALUE = "value"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """A variable that a train needs. `choices` are those of an enum; `said` is what the train called an unknown target."""

    id: int
    name: str
    target: Target
    choices: tuple[str, ...] = ()
    description: str = ""
    said: str = ""


@dataclass(frozen=True, slots=True)
class Literal:
    """That a requirement is met, or (`forbidden`) that it is not."""

    id: int
    forbidden: bool = False


Clause = tuple[Literal, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """Is a requirement met, and if not, why not. The reason never quotes a value."""

    name: str
    met: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Demand:
    """All that a train requires; every clause of the formula has to hold."""

    requirements: tuple[Requirement, ...] = ()
    formula: tuple[Clause, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    def named(self, id: int) -> str:
        """The name of the requirement with this id."""
        return next(requirement.name for requirement in self.requirements if requirement.id == id)

    def violated(self, met: Mapping[int, bool]) -> tuple[Clause, ...]:
        """The clauses that do not hold where these requirements are met."""
        return tuple(clause for clause in self.formula if not any(met[each.id] != each.forbidden for each in clause))

    def in_words(self, clause: Clause) -> str:
        """A clause as people say it: "FOO", "FOO or BAR", "FOO or not BAR"."""
        return " or ".join(f"{'not ' if each.forbidden else ''}{self.named(each.id)}" for each in clause)


# What lies at a path in the container, as the station's side sees it; `None` where nothing does, "?" where nobody can tell.
Probe = Callable[[str], str | None]


def evaluate(requirement: Requirement, environment: Mapping[str, str], probe: Probe) -> Result:
    """Is the requirement met by an environment?"""
    value = environment.get(requirement.name)
    if value is None or not value.strip():
        return Result(requirement.name, False, f"{requirement.name} is not set")
    reason = _wrong(requirement, value, probe)
    return Result(requirement.name, not reason, f"{requirement.name} {reason}" if reason else "")


def all_of(ids: Iterable[int]) -> tuple[Clause, ...]:
    """The clauses of "all of these"."""
    return tuple((Literal(id),) for id in ids)


def any_of(ids: Iterable[int]) -> tuple[Clause, ...]:
    """The clause of "at least one of these"."""
    return (tuple(Literal(id) for id in ids),)


def _wrong(requirement: Requirement, value: str, probe: Probe) -> str:
    if requirement.target is Target.URL:
        return _url_problem(value)
    if requirement.target is Target.ENUM and value not in requirement.choices:
        return f"must be one of {', '.join(requirement.choices)}, and is something else"
    if requirement.target in (Target.FILE, Target.DIRECTORY):
        kind = "file" if requirement.target is Target.FILE else "folder"
        return _mount_problem(value, kind, probe)
    if requirement.target is Target.UNKNOWN:
        return f"is asked for as {requirement.said!r}, which this station cannot check"
    return ""


def _url_problem(value: str) -> str:
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError as error:
        return f"is no URL: {str(error).partition(':')[0]}"
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]*", parts.scheme) or not parts.hostname:
        return "is no URL. Write one such as https://HOST/PATH"
    if re.search(r"[\s\x00-\x1f<>\"{}|\\^`]", value):
        return "is no URL: it holds a character that a URL must escape"
    return ""


def _mount_problem(value: str, kind: str, probe: Probe) -> str:
    if not value.startswith("/"):
        return f"must be the whole path of a {kind} in the container"
    found = probe(value)
    if found is None:
        return f"names no {kind} that a mount of the station puts into the container"
    return "" if found in (kind, "?") else f"names a {found}, and must name a {kind}"


def unmet(demand: Demand, results: Sequence[Result]) -> tuple[str, ...]:
    """What is missing, in words: for each clause that does not hold, its literals, and why each of them does not."""
    by_name = {result.name: result for result in results}
    met = {requirement.id: by_name[requirement.name].met for requirement in demand.requirements}
    told = []
    for clause in demand.violated(met):
        reasons = [
            f"{demand.named(each.id)} is set, and must not be" if each.forbidden else by_name[demand.named(each.id)].reason
            for each in clause
        ]
        told.append("; ".join(reasons) if len(clause) == 1 else f"one of {demand.in_words(clause)} ({'; '.join(reasons)})")
    return tuple(told)
