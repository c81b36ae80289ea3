"""Templates of prerequisites: `{{ name }}` in a shell command or in a plain text.

A value is a literal. In a command it never becomes more than it is where it stands: as it is, it must be one that the
shell reads as itself there; with `{{ name | quote }}` any value is one word. `{{ secret.NAME }}` becomes a reference to the
variable that holds the Secret block's value in the container. Braces that do not begin with a name are left alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .command import READS_TWICE, Scalar, as_text, follow
from .errors import InvalidPrerequisite

SECRET_PREFIX = "OASIS_SECRET_"  # noqa: S105  # a name's beginning

_BRACES = re.compile(r"\{\{\s*([A-Za-z_][^{}]*?)\s*\}\}")
_EXPRESSION = re.compile(
    r"(?:secret\.(?P<secret>[a-z0-9]+(?:-+[a-z0-9]+)*)|(?P<name>[A-Za-z_][A-Za-z0-9_]*))(?:\s*\|\s*(?P<filter>\w+))?"
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NAME_LIKE = re.compile(r"[A-Za-z0-9_]+")
_ONE_WORD = re.compile(r"[A-Za-z0-9_./:@%+=,-]+")
_RESERVED = frozenset(("if", "then", "else", "elif", "fi", "do", "done", "case", "esac", "while", "until", "for", "in"))
_COMMAND_BEGINS = re.compile(r"(?:^|[;&|\n(!{`]|\b(?:then|else|elif|if|do|while|until))[ \t]*$")


@dataclass(frozen=True, slots=True)
class Placeholder:
    """One `{{ … }}`: a variable's name, or a Secret block's; `start` and `end` are its place in the text."""

    start: int
    end: int
    name: str
    secret: str
    quoted: bool


def is_name(text: object) -> bool:
    """Can a variable be called so?"""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def placeholders(text: str) -> Iterator[Placeholder]:
    """The placeholders of a text.

    Raises:
        InvalidPrerequisite: one is neither a variable nor a secret, or asks for an unknown filter.
    """
    for braces in _BRACES.finditer(text):
        found = _EXPRESSION.fullmatch(braces[1])
        if found is None:
            raise InvalidPrerequisite(
                f"{braces[0]!r} is no template variable. Write {{{{ name }}}}, {{{{ name | quote }}}} or {{{{ secret.NAME }}}}, "
                "NAME being a Secret block's name."
            )
        if found["filter"] not in (None, "quote"):
            raise InvalidPrerequisite(f"{braces[0]!r} asks for an unknown filter. The only one is quote.")
        yield Placeholder(braces.start(), braces.end(), found["name"] or "", found["secret"] or "", bool(found["filter"]))


def secret_variable(block: str) -> str:
    """The variable that holds a Secret block's value in the container."""
    return SECRET_PREFIX + block.replace("-", "_")


def in_text(text: str, values: Mapping[str, Scalar]) -> str:
    """A text that no shell reads, filled in.

    Raises:
        InvalidPrerequisite: it asks for quoting, or for a secret, which only commands have.
    """
    pieces, at = [], 0
    for found in placeholders(text):
        if found.secret or found.quoted:
            raise InvalidPrerequisite(
                f"{text!r} is no command, so it has no secrets and needs no quoting. Write {{{{ name }}}}."
            )
        pieces += [text[at : found.start], as_text(values[found.name])]
        at = found.end
    return "".join(pieces) + text[at:]


def in_command(command: str, values: Mapping[str, Scalar]) -> str:
    """A shell command, filled in: whatever the values are, it has the structure that its author wrote.

    Raises:
        InvalidPrerequisite: a value would change that; the message says what to write instead.
    """
    found = {each.start: each for each in placeholders(command)}
    pieces: list[str] = []
    quotes, at = [""], 0
    while at < len(command):
        if here := found.get(at):
            pieces.append(_filled_in(here, command, quotes, values))
            at = here.end
            continue
        step = follow(command, at, quotes)
        pieces.append(command[at : at + step])
        at += step
    return "".join(pieces)


def _filled_in(found: Placeholder, command: str, quotes: list[str], values: Mapping[str, Scalar]) -> str:
    before, after = command[: found.start], command[found.end :]
    expansion = re.search(r"\$(\{[^}]*)?$", before) is not None
    opaque = expansion or "`" in quotes or READS_TWICE.search(command) is not None
    quote = quotes[-1] if quotes[-1] in ("'", '"') else ""
    if found.secret:
        if opaque:
            raise InvalidPrerequisite(
                f"the secret {found.secret} stands where it cannot be quoted (`…`, a here-document, $'…', eval, trap, a second "
                f'shell). Write "${secret_variable(found.secret)}" there'
            )
        reference = f"${{{secret_variable(found.secret)}}}"
        return {'"': reference, "'": f"'\"{reference}\"'"}.get(quote, f'"{reference}"')
    text = as_text(values[found.name])
    if "\0" in text:
        raise InvalidPrerequisite(f"the value of {found.name} holds a NUL character. Remove it")
    if opaque:
        harmless = (_NAME_LIKE if expansion else _ONE_WORD).fullmatch(text) is not None
    elif found.quoted:
        return f"{quote}{shlex.quote(text)}{quote}"
    elif quote:
        harmless = not re.search(r"'" if quote == "'" else r'["$`\\]', text)
    else:
        harmless = _is_one_word(text, before, after)
    if harmless:
        return text
    advice = (
        f"It stands where it cannot be quoted (`…`, ${{…}}, a here-document, $'…', eval, trap, a second shell). Let {found.name} "
        f"be plain, or put it into a variable before: {found.name}={{{{ {found.name} | quote }}}}"
        if opaque
        else f"Write {{{{ {found.name} | quote }}}} in the command"
    )
    raise InvalidPrerequisite(f"the value {text!r} of {found.name} would be read as shell syntax in {command!r}. {advice}")


def _is_one_word(text: str, before: str, after: str) -> bool:
    """Does a shell read the text as (a part of) one plain word where it stands without quotes?"""
    if not _ONE_WORD.fullmatch(text):
        return False
    if text.isdigit() and after[:1] in ("<", ">"):
        return False
    return not (_COMMAND_BEGINS.search(before) and ("=" in text or text in _RESERVED))
