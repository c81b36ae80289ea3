"""Which files of a dataset are meant, by a pattern over their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .manifest import Entry


def included(entries: Iterable[Entry], pattern: str | None) -> Iterator[Entry]:
    """The entries whose names match a pattern; without one, all."""
    if pattern is None:
        yield from entries
        return
    matches = name_pattern(pattern).fullmatch
    yield from (entry for entry in entries if matches(entry.path))


def name_pattern(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression for whole names; upper and lower case count.

    `*` and `?` stand for anything but a slash, `**` for any folders, `[abc]`, `[a-z]` and `[!abc]` for one character, which
    is no slash either. A pattern without a slash is about the last part of a name, in whatever folder; with one at its
    beginning, about the whole name.
    """
    text = pattern.removeprefix("/") if "/" in pattern else f"**/{pattern}"
    parts = re.findall(r"(?<![^/])\*\*/|\*\*|\*|\?|\[(?:!.|[^!])[^\]]*\]|.", text, re.DOTALL)
    return re.compile("".join(map(_regular, parts)), re.DOTALL)


def exactly(name: str) -> str:
    """The pattern that only this name matches. It never looks like an option of a command line."""
    escaped = re.sub(r"([*?\[])", r"[\1]", name)
    return escaped if "/" in name and not name.startswith("-") else f"/{escaped}"


def _regular(part: str) -> str:
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    if part in known:
        return known[part]
    if len(part) == 1:
        return re.escape(part)
    negated = part.startswith("[!")
    inside = "".join(map(_characters, re.findall(r".-.|.", part[1:-1].removeprefix("!"), re.DOTALL)))
    # To `re`, a class with nothing in it is an error.
    return f"[^/{inside}]" if negated else f"(?!/)[{inside}]" if inside else "(?!)"


def _characters(part: str) -> str:
    """A character, or a range of them, inside of a class; a range that runs backwards has none."""
    first, last = part[0], part[-1]
    if first > last:
        return ""
    return re.escape(first) if part == first else f"{re.escape(first)}-{re.escape(last)}"
