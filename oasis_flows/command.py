"""From what people write in an Algorithm document to argument vectors and environments.

A parameter's value is data and stays data. In an ordinary argument or environment value, `{name}` is replaced by the
text of the value, which is never split again. In the script of a shell (`sh -c "… {name} …"`) it is replaced by a quoted
reference to the variable `OASIS_PARAMETER_<name>`, so no shell ever parses the value. `{{name}}` stands for a literal
`{name}`; braces around anything that is not a declared parameter are left alone.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence

from .errors import DescriptionError

Scalar = str | int | float | bool

MAX_COMMAND_CHARACTERS = 100_000
VARIABLE_PREFIX = "OASIS_PARAMETER_"

# Linux: MAX_ARG_STRLEN, the end of the string included.
MAX_WORD_BYTES = 131_071

# Programs that read the word behind `-c` as shell script; su does by another shell.
_SHELL = re.compile(r"((ba|da|a|k|mk|pdk|z|rba|fi|tc|c)?sh(-?[\d.]+)?(-static)?|su)")
_TAKES_A_WORD = frozenset({"-o", "+o", "-O", "+O"})


def as_argv(written: str | Sequence[str] | None, field: str) -> tuple[str, ...] | None:
    """The argument vector that a string (split as a shell would) or a list means; `None` for nothing written.

    Raises:
        DescriptionError: unbalanced quotes, a NUL character, or too long.
    """
    if not written:
        return None
    if isinstance(written, str):
        if len(written) > MAX_COMMAND_CHARACTERS:
            raise DescriptionError(_too_long(field, len(written)))
        try:
            argv = tuple(shlex.split(written))
        except ValueError as error:
            raise DescriptionError(
                f"`{field}` cannot be split into arguments: {error} in {written[:80]!r}. Close the quote, or write a list of arguments."
            ) from None
    else:
        argv = tuple(written)
        if sum(map(len, argv)) > MAX_COMMAND_CHARACTERS:
            raise DescriptionError(_too_long(field, sum(map(len, argv))))
    if any("\0" in word for word in argv):
        raise DescriptionError(f"`{field}` holds a NUL character, which no program can be given. Remove it.")
    return argv or None


def _too_long(field: str, count: int) -> str:
    return (
        f"`{field}` has {count} characters, and {MAX_COMMAND_CHARACTERS} are the limit. "
        "Put long scripts into the image and lists of files into the dataset."
    )


def check_sizes(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Return if a kernel takes these words and variables.

    Raises:
        DescriptionError: one is too long.
    """
    said = [(word, f"The argument {word[:40]!r}…") for word in argv]
    said += [(f"{name}={value}", f"The variable {name}") for name, value in environment.items()]
    for text, what in said:
        if len(text.encode()) > MAX_WORD_BYTES:
            raise DescriptionError(
                f"{what} has {len(text.encode())} bytes, and Linux takes {MAX_WORD_BYTES}. Put long texts and lists of files into the dataset."
            )


def bind(declared: Mapping[str, Scalar | None], given: Mapping[str, object]) -> dict[str, Scalar]:
    """The value of every declared parameter: the given one, or the default.

    A default of `None` means that the parameter must be given. A given value has the type of its default; a whole number
    is fine where the default has decimals.

    Raises:
        DescriptionError: a parameter is missing, unknown or of the wrong type; the message names them all.
    """
    known = ", ".join(f"`{name}`" for name in declared) or "none at all"
    problems = [f"`{name}` is unknown (it has {known})" for name in given if name not in declared]
    values: dict[str, Scalar] = {}
    for name, default in declared.items():
        value = given.get(name, default)
        if value is None:
            problems.append(f"`{name}` is missing and has no default")
        elif (wanted := _mismatch(value, default)) is not None:
            problems.append(f"`{name}` is {value!r} and must be {wanted}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"`{name}` is {value} and must be a number")
        elif "\0" in str(value):
            problems.append(f"`{name}` holds a NUL character")
        else:
            values[name] = value  # type: ignore[assignment]  # _mismatch lets scalars pass only
    if problems:
        raise DescriptionError(f"The parameters do not fit the algorithm: {'; '.join(problems)}. Correct `parameters`.")
    return values


def _mismatch(value: object, default: Scalar | None) -> str | None:
    """What the value must be instead, or `None` if it is right."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        return None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    if isinstance(default, float):
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    if isinstance(default, str):
        return None if isinstance(value, str) else "text (in quotes)"
    return None if isinstance(value, str | int | float | bool) else "text, a number, true or false"


def from_text(declared: Mapping[str, Scalar | None], written: Mapping[str, str]) -> dict[str, Scalar]:
    """Parameter values as a command line gives them, read as the types of their defaults; unreadable ones stay text."""
    values: dict[str, Scalar] = {}
    for name, text in written.items():
        default = declared.get(name)
        values[name] = text
        if isinstance(default, bool):
            values[name] = {"true": True, "false": False}.get(text.lower(), text)
        elif isinstance(default, int | float):
            try:
                values[name] = type(default)(text)
            except ValueError:
                continue
    return values


def as_text(value: Scalar) -> str:
    """How a value is written in an argument or a variable: true and false in lower case, numbers as Python does."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def variables(values: Mapping[str, Scalar]) -> dict[str, str]:
    """The environment variables by which shell scripts, and whoever likes, get the parameters."""
    return {VARIABLE_PREFIX + name: as_text(value) for name, value in values.items()}


def render(argv: Sequence[str], values: Mapping[str, Scalar]) -> tuple[str, ...]:
    """The argument vector with its `{name}`s replaced.

    Raises:
        DescriptionError: a shell script uses a placeholder where quoting cannot be told (here-documents, `$'…'`).
    """
    scripts = _scripts(argv)
    return tuple(
        _render_script(word, values) if position in scripts else render_text(word, values) for position, word in enumerate(argv)
    )


def render_text(text: str, values: Mapping[str, Scalar]) -> str:
    """A text that is no shell script, with its `{name}`s replaced."""
    return _placeholder(values).sub(lambda m: as_text(values[m[2]]) if m[2] else f"{{{m[1]}}}", text) if values else text


# Where a shell reads a text by other rules than those of plain words and quotes, or reads it again.
READS_TWICE = re.compile(r"<<(?!<)|\$'|\b(eval|trap)\b|\b(su|\w*sh(-?[\d.]+)?)\s+(-\S*\s+)*-\w*c\b")


def _placeholder(values: Mapping[str, Scalar]) -> re.Pattern[str]:
    names = "|".join(re.escape(name) for name in sorted(values, key=len, reverse=True))
    return re.compile(rf"(?<!\$)(?:\{{\{{({names})\}}\}}|\{{({names})\}})")


def _scripts(argv: Sequence[str]) -> frozenset[int]:
    """Positions of the words that a shell will read as its program: what follows `-c` behind a shell's name."""
    found = set()
    for position, word in enumerate(argv):
        if not _SHELL.fullmatch(word.rsplit("/", 1)[-1]):
            continue
        is_command = False
        rest = iter(range(position + 1, len(argv)))
        for index in rest:
            option = argv[index]
            if option in _TAKES_A_WORD:
                next(rest, None)
            elif re.fullmatch(r"[-+][A-Za-z]*|--(\w[\w-]*)?", option):
                is_command |= (option[:1] == "-" and option[:2] != "--" and "c" in option) or option == "--command"
            else:
                if is_command:
                    found.add(index)
                break
    return frozenset(found)


def _render_script(script: str, values: Mapping[str, Scalar]) -> str:
    """The script with each placeholder turned into a reference that is one word in its place, whatever its value.

    Follows the quotes as a shell does: plain text, '…', "…", and $(…) or `…` inside either.
    """
    if not values:
        return script
    pattern = _placeholder(values)
    if pattern.search(script) and READS_TWICE.search(script):
        raise DescriptionError(
            "The shell script in `command` uses {parameters} together with a here-document, $'…', eval, trap or a second shell, where they "
            f'cannot be quoted safely. Write "${VARIABLE_PREFIX}NAME" there instead; a second shell finds the variable, too.'
        )
    pieces: list[str] = []
    quotes = [""]
    at = 0
    while at < len(script):
        if found := pattern.match(script, at):
            pieces.append(_reference(found[2], quotes[-1]) if found[2] else f"{{{found[1]}}}")
            at = found.end()
            continue
        step = follow(script, at, quotes)
        pieces.append(script[at : at + step])
        at += step
    return "".join(pieces)


def _reference(name: str, quote: str) -> str:
    variable = f"${{{VARIABLE_PREFIX}{name}}}"
    return {'"': variable, "'": f"'\"{variable}\"'"}.get(quote, f'"{variable}"')


def follow(script: str, at: int, quotes: list[str]) -> int:
    """Advance over one piece of shell syntax, keeping the stack of open quotes; return how many characters it has."""
    inside, here = quotes[-1], script[at]
    if inside == "'":
        if here == "'":
            quotes.pop()
        return 1
    if here == "\\":
        return 2
    if script.startswith("$(", at):
        quotes.append(")")
        return 2
    if here == inside:
        quotes.pop()
    elif here in '"`' or (here == "'" and inside != '"'):
        quotes.append(here)
    elif here == "(" and inside != '"':
        quotes.append(")")
    elif here == "#" and inside != '"' and (at == 0 or script[at - 1] in " \t\n;&|("):
        return (script.find("\n", at) + 1 or len(script) + 1) - 1 - at or 1
    return 1
