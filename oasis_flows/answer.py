"""Where the response of a train is in what it wrote; pure.

A train writes free text to stdout, and its response as the suffix of it: the `{` whose JSON ends at stdout's trimmed end.
That suffix is unique. A train that can writes its response to the file that `OASIS_RESPONSE_FILE` names instead; then
nothing on stdout can be taken for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

from .errors import ProtocolError

RESPONSE_FILE = "OASIS_RESPONSE_FILE"
MAX_RESPONSE_BYTES = 4 << 20
MAX_LEVELS = 500
_MARKS = re.compile(r'["{}\[\]]')
_CLIP = 300


class Question(StrEnum):
    """What a train can be asked."""

    LIST = "list"
    CHECK = "check"
    SUMMARY = "summary"
    RUN = "run"


def response(stdout: bytes, question: Question, *, cut: bool = False) -> dict[str, Any]:
    """The response that is the suffix of stdout; `cut` says that stdout had more before these bytes.

    Raises:
        ProtocolError: there is none, or there are two.
    """
    text = stdout.rstrip().decode("utf-8", "surrogateescape")
    found = _suffix(text)
    if found is None:
        if cut and "}" in text[-1:]:
            raise no_answer(
                question, f"has no beginning within its last {MAX_RESPONSE_BYTES >> 20} MiB, which is the limit", text
            )
        after = " Nothing may be printed behind it." if "}" in text else ""
        raise no_answer(question, f"is no JSON object at the end of its stdout.{after}", text)
    start, answer = found
    if len(text) - start > MAX_RESPONSE_BYTES:
        raise no_answer(question, f"has more than {MAX_RESPONSE_BYTES >> 20} MiB, which is the limit", text)
    if re.search("[\ud800-\udfff]", text[start:]):
        raise no_answer(question, "is not UTF-8", text[start:])
    before = _suffix(text[:start].rstrip())
    if before is not None and _looks_like_one(before[1], question):
        raise no_answer(question, "comes twice: there are two responses, one behind the other, and only one can hold", text)
    return answer


def response_in_file(content: bytes, question: Question) -> dict[str, Any]:
    """The response that a train wrote to its response file.

    Raises:
        ProtocolError: the file is not exactly one JSON object.
    """
    text = content.decode("utf-8", "surrogateescape")
    if len(content) > MAX_RESPONSE_BYTES:
        raise no_answer(question, f"has more than {MAX_RESPONSE_BYTES >> 20} MiB, which is the limit", text)
    trimmed = text.strip(" \t\r\n")
    answer, end = _parsed(trimmed)
    if not isinstance(answer, dict) or end != len(trimmed) or re.search("[\ud800-\udfff]", text):
        raise no_answer(question, f"is not one JSON object, in the file that {RESPONSE_FILE} names", text)
    return answer


def _suffix(text: str) -> tuple[int, dict[str, Any]] | None:
    """The JSON object that ends where the text does, and where it begins."""
    start = _beginning(text)
    if start is None:
        return None
    value, end = _parsed(text, start)
    return (start, value) if end == len(text) else None


def _beginning(text: str) -> int | None:
    """Where an object that ends with the text would have to begin: the brace that closes the last one, read from the right.

    From the right there is only one way to read JSON: outside of a string a quote ends one, and inside one a quote with an even
    number of backslashes before it begins the string. So each letter is looked at once, whatever a train printed.
    """
    if not text.endswith("}"):
        return None
    depth, inside = 0, False
    for at in _marks_from_the_right(text):
        letter = text[at]
        if letter == '"':
            inside = not inside or _is_escaped(text, at)
        elif not inside:
            depth += 1 if letter in "}]" else -1
            if depth == 0:
                return at if letter == "{" else None
    return None


def _marks_from_the_right(text: str, piece: int = 1 << 16) -> Iterator[int]:
    for end in range(len(text), 0, -piece):
        yield from reversed([found.start() for found in _MARKS.finditer(text, max(0, end - piece), end)])


def _is_escaped(text: str, at: int) -> bool:
    before = at
    while before and text[before - 1] == "\\":
        before -= 1
    return (at - before) % 2 == 1


def _parsed(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins there, and where it ends; `None` and -1 where none does that nests at most `MAX_LEVELS` deep."""
    try:
        value, end = json.JSONDecoder(parse_constant=_no_constant).raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, -1
    # How deep Python itself reads, and writes again, is another number in each of its versions.
    level = [value]
    for _ in range(MAX_LEVELS):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list)))
        level = [each for values in inner for each in values]
    return (value, end) if not level else (None, -1)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _looks_like_one(answer: Mapping[str, Any], question: Question) -> bool:
    keys = {
        Question.LIST: ("requirements", "properties"),
        Question.CHECK: ("unmet", "properties"),
        Question.SUMMARY: ("content", "model"),
        Question.RUN: ("exit", "success", "runResponseVersion"),
    }
    return any(key in answer for key in keys[question])


def no_answer(question: Question, why: str, text: str) -> ProtocolError:
    """The error of an answer that is none: `why` goes on where "The train's answer to …" ends, and `text` is what it said."""
    shown = text if len(text) <= _CLIP else f"… {text[-_CLIP:]}"
    said = shown.encode("utf-8", "replace").decode().strip()
    return ProtocolError(
        f"The train's answer to `{question}` {why}. Correct the train: it ends stdout with exactly one response of the Train API, "
        f"or writes that to the file that {RESPONSE_FILE} names. The train said: {said or 'nothing'}"
    )
