"""The Train API in its three generations: what a train is asked, and what its answers mean; pure.

Readers take the key spellings of all generations and keep what they do not know. Where a response is: see `answer`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from .answer import Question, no_answer
from .errors import ProtocolError
from .requirement import NAME, NAME_WITH_DIGITS, Clause, Demand, Literal, Requirement, Result, Target, all_of, any_of

# https://docs.docker.com/reference/cli/docker/image/tag/ and the Train API's own rule, which has no upper case and no "_".
_TAG = re.compile(r"[a-z0-9][-.a-z0-9]{0,127}")


class Generation(StrEnum):
    """A generation of the Train API."""

    ZERO = "0.x"
    V1 = "V1"
    ONE = "1.0"


class TrainState(StrEnum):
    """How a train says that it ended. `application` is neither success nor failure: the algorithm's own kind of end."""

    SUCCESS = "success"
    FAILURE = "failure"
    APPLICATION = "application"


_COMMANDS = {
    Generation.ZERO: ("list_requirements", "check_requirements", "print_summary", "run_algorithm"),
    Generation.V1: ("list_requirements", "check_requirements", "print_model_summary", "run_algorithm"),
    Generation.ONE: ("describe", "describe", "describe", "run"),
}


def argv(
    generation: Generation,
    question: Question,
    *,
    station_id: int,
    track_info: str | None = None,
    user_data: str | None = None,
) -> tuple[str, ...]:
    """The command line of a question."""
    command = _COMMANDS[generation][list(Question).index(question)]
    if generation is Generation.V1:
        return (command,)
    if generation is Generation.ZERO:
        return (command, "--stationid", str(station_id), "--mode", "immediate")
    track = ("--track-info", track_info) if track_info is not None else ()
    user = ("--user-data", user_data) if user_data is not None else ()
    return (command, "--station-id", str(station_id), *track, *user)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a train says of itself. `states` are its own words about each requirement, where it gave any."""

    generation: Generation
    demand: Demand
    name: str = ""
    version: str = ""
    summary: str | None = None
    states: tuple[Result, ...] = ()
    unknown: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rebase:
    """The base image that a successor is built on, and the files of the ended container that travel in it."""

    base: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResponse:
    """What a train says of its run. `rebase` is `None` where the whole ended container is to travel."""

    state: TrainState
    reason: str = ""
    message: str = ""
    tags: tuple[str, ...] = ()
    rebase: Rebase | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)


def generation_of(answer: Mapping[str, Any], question: str) -> Generation | None:
    """Which generation gave this answer to `describe`, or to `list_requirements`; `None` where it is neither's."""
    if question == "describe":
        return Generation.ONE if "properties" in answer or "descriptionVersion" in answer else None
    rows = answer.get("requirements")
    if not isinstance(rows, list):
        return None
    return Generation.ZERO if rows and all(isinstance(row, str) for row in rows) else Generation.V1


def read_description(generation: Generation, answer: Mapping[str, Any]) -> Description:
    """What the answer to `list_requirements` or `describe` says.

    Raises:
        ProtocolError: something in it is missing, or of the wrong type.
    """
    read = _Reader(Question.LIST, answer)
    if generation is Generation.ONE:
        return _described(read)
    warnings: list[str] = []
    rows = read.list(answer, "requirements")
    if generation is Generation.ZERO and all(isinstance(row, str) for row in rows):
        listed = tuple(Requirement(id=number, name=name, target=Target.VALUE) for number, name in enumerate(rows))
    else:
        listed = tuple(_listed(read, row, warnings) for row in rows)
    _check_ids(read, listed)
    relations = read.pick(answer, "relations", "clauses")
    formula = all_of(each.id for each in listed) if relations is None else _relations(read, relations, listed)
    return Description(
        generation=generation,
        demand=Demand(listed, formula, tuple(warnings)),
        unknown=_rest(answer, "requirements", "relations", "clauses"),
    )


def read_check(generation: Generation, answer: Mapping[str, Any], demand: Demand) -> tuple[Result, ...]:
    """What the train itself found of its requirements.

    Raises:
        ProtocolError: as `read_description`.
    """
    read = _Reader(Question.CHECK, answer)
    if generation is Generation.ONE:
        return _described(read).states
    names = {str(each.id): each.name for each in demand.requirements} | {each.name: each.name for each in demand.requirements}
    if "unmet" not in answer and isinstance(answer.get("success"), bool):
        missing = [] if answer["success"] else list(names.values())
    else:
        missing = [_unmet_name(read, row, names) for row in read.list(answer, "unmet")]
    said = str(read.pick(answer, "message", "freeTextMessage") or "the train says that it is not met")
    known = [each.name for each in demand.requirements]
    return tuple(
        Result(name, name not in missing, said if name in missing else "") for name in dict.fromkeys([*known, *missing])
    )


def read_summary(generation: Generation, answer: Mapping[str, Any]) -> str:
    """The summary of the model.

    Raises:
        ProtocolError: as `read_description`.
    """
    read = _Reader(Question.SUMMARY, answer)
    if generation is Generation.ONE:
        return _described(read).summary or ""
    content = read.pick(answer, "content", "summary")
    if content is None:
        raise read.error("has no `content`, the text of the summary")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def read_run(answer: Mapping[str, Any]) -> RunResponse:
    """What became of the algorithm, in the spelling of any generation.

    Raises:
        ProtocolError: as `read_description`; or a tag that an image cannot have.
    """
    read = _Reader(Question.RUN, answer)
    exit = answer.get("exit") if isinstance(answer.get("exit"), Mapping) else {}
    state = read.pick(exit, "state") or answer.get("state")
    if state is None and "success" in answer:
        if not isinstance(answer["success"], bool):
            raise read.error("has a `success` that is neither true nor false")
        state = "success" if answer["success"] else "failure"
    if not isinstance(state, str) or state.lower() not in list(TrainState):
        raise read.error("does not say how it ended. Write `exit.state`: success, failure or application")
    place = answer.get("rebase")
    if place is not None and not isinstance(place, Mapping):
        raise read.error("has a `rebase` that is no object")
    place = place or {}
    if place.get("type", "docker") != "docker":
        raise read.error(f"asks for a rebase of type {place['type']!r}. Only docker is known")
    base = read.pick(place, "from", "from_image") or read.pick(answer, "dockerBaseImage", "docker_base_image")
    files = _export_files(read, place, answer)
    if base is not None and not isinstance(base, str):
        raise read.error("names a base image that is no text")
    return RunResponse(
        state=TrainState(state.lower()),
        reason=read.text(exit, "reason"),
        message=read.text(answer, "freeTextMessage", "free_text_message", "message"),
        tags=_tags(read, place, answer),
        rebase=Rebase(base, files) if base and files else None,
        unknown=_rest(answer, "exit", "state", "success", "rebase", "freeTextMessage", "message", "runResponseVersion"),
    )


def checked_tag(tag: object) -> bool:
    """Is it a tag that the Train API and registries take?"""
    return isinstance(tag, str) and _TAG.fullmatch(tag) is not None


class _Reader:
    """Takes values out of an answer, and says what is wrong with it."""

    def __init__(self, question: Question, answer: Mapping[str, Any]) -> None:
        self._question, self._answer = question, answer

    def error(self, why: str) -> ProtocolError:
        return no_answer(self._question, why, json.dumps(self._answer, ensure_ascii=False))

    def pick(self, values: Any, *keys: str) -> Any:
        return next((values[key] for key in keys if isinstance(values, Mapping) and values.get(key) is not None), None)

    def text(self, values: Any, *keys: str) -> str:
        value = self.pick(values, *keys)
        if value is not None and not isinstance(value, str):
            raise self.error(f"has a `{keys[0]}` that is no text")
        return value or ""

    def list(self, values: Any, *keys: str) -> list[Any]:
        value = self.pick(values, *keys)
        if not isinstance(value, list):
            raise self.error(f"has no list of `{keys[0]}`")
        return value

    def id(self, value: object, least: int = 0) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(f"has an id {value!r}, which is no whole number from {least}")
        return value


def _listed(read: _Reader, row: object, warnings: list[str]) -> Requirement:
    if not isinstance(row, Mapping) or not isinstance(row.get("requirement"), Mapping):
        raise read.error("has a requirement that is not written as {id, requirement}")
    what = row["requirement"]
    type = read.text(what, "type")
    target = read.text(what, "target")
    if type != "environmentVariable":
        return Requirement(id=read.id(row.get("id")), name=read.text(what, "name") or type, target=Target.UNKNOWN, said=type)
    return _variable(read, read.id(row.get("id")), read.text(what, "name"), target, what, warnings)


def _variable(read: _Reader, id: int, name: str, said: str, what: Mapping[str, Any], warnings: list[str]) -> Requirement:
    if not NAME.fullmatch(name):
        if not NAME_WITH_DIGITS.fullmatch(name):
            raise read.error(f"requires a variable {name!r}, which is no name: upper-case words joined by single underscores")
        warnings.append(f"The variable {name} has a digit, which the Train API does not allow; it is taken all the same.")
    choices = read.pick(what, "choices", "values", "enum") or ()
    if not isinstance(choices, list | tuple) or not all(isinstance(each, str) for each in choices):
        raise read.error(f"has choices for {name} that are no list of texts")
    return Requirement(
        id=id,
        name=name,
        target=_target(said, choices, read.text(what, "mountType", "mount_type")),
        choices=tuple(choices),
        description=read.text(what, "description"),
        said=said,
    )


def _target(said: str, choices: object, mount: str) -> Target:
    word = said.lower()
    if mount:
        return Target.DIRECTORY if mount.lower() in ("directory", "dir", "folder") else Target.FILE
    for words, target in (
        (("url",), Target.URL),
        (("token",), Target.TOKEN),
        (("enum", "choice"), Target.ENUM),
        (("directory", "folder"), Target.DIRECTORY),
        (("file",), Target.FILE),
    ):
        if any(each in word for each in words):
            return target
    if choices:
        return Target.ENUM
    return Target.UNKNOWN if said else Target.VALUE


def _described(read: _Reader) -> Description:
    answer, warnings = read._answer, list[str]()
    listed, states = [], []
    for row in read.list(answer, "properties"):
        data = read.pick(row, "data")
        if not isinstance(data, Mapping):
            raise read.error("has a property that is not written as {id, data}")
        name = read.text(data, "environmentVariableName", "environment_variable_name", "name")
        # What a property is stands in its class: a chain of names in @type, the last of them in @typeName.
        kind = read.text(data, "target", "@typeName") or read.text(data, "type")
        listed.append(_variable(read, read.id(row.get("id"), 1), name, kind, data, warnings))
        state = data.get("state")
        if isinstance(state, Mapping) and isinstance(state.get("isAvailable"), bool):
            states.append(Result(name, state["isAvailable"], read.text(state, "reason")))
    _check_ids(read, listed)
    algorithm, model = answer.get("algorithm"), answer.get("model")
    summary = read.pick(read.pick(model, "summary"), "value") if isinstance(model, Mapping) else None
    return Description(
        generation=Generation.ONE,
        demand=Demand(tuple(listed), _formula(read, read.pick(algorithm, "requirement"), listed), tuple(warnings)),
        name=read.text(answer, "trainName"),
        version=read.text(answer, "trainVersion"),
        summary=summary if isinstance(summary, str) or summary is None else json.dumps(summary, ensure_ascii=False),
        states=tuple(states),
        unknown=_rest(
            answer, "trainName", "trainVersion", "descriptionVersion", "properties", "formula", "model", "algorithm",
            "@type", "@typeName", "@typeSystem",
        ),
    )  # fmt: skip


def _formula(read: _Reader, which: Any, listed: list[Requirement]) -> tuple[Clause, ...]:
    """The formula that the algorithm requires; none where it requires none."""
    if which is None:
        return ()
    wanted = read.pick(which, "formula_id", "formulaId") if isinstance(which, Mapping) else which
    for row in read.list(read._answer, "formula"):
        if isinstance(row, Mapping) and row.get("id") == wanted:
            value = read.pick(read.pick(row, "data"), "value")
            if not isinstance(value, list) or not all(isinstance(clause, list) and clause for clause in value):
                raise read.error(f"has a formula {wanted!r} that is no list of clauses")
            return tuple(tuple(_literal(read, number, listed) for number in clause) for clause in value)
    raise read.error(f"requires the formula {wanted!r}, which it does not have")


def _literal(read: _Reader, number: object, listed: list[Requirement]) -> Literal:
    if isinstance(number, bool) or not isinstance(number, int) or number == 0:
        raise read.error(f"has a literal {number!r} in a formula, which is no id, positive or negative")
    if abs(number) not in {each.id for each in listed}:
        raise read.error(f"has a literal {number} in a formula, which is the id of none of its properties")
    return Literal(abs(number), number < 0)


def _relations(read: _Reader, relations: object, listed: tuple[Requirement, ...]) -> tuple[Clause, ...]:
    clauses: list[Clause] = []
    for row in relations if isinstance(relations, list) else [None]:
        type, ids = read.text(row, "type"), read.pick(row, "requirements")
        if type not in ("all", "any") or not isinstance(ids, list) or (type == "any" and not ids):
            raise read.error("has a relation that is not written as {type: all or any, requirements: ids}")
        if unknown := [id for id in ids if read.id(id) not in {each.id for each in listed}]:
            raise read.error(f"relates the id {unknown[0]}, which is none of its requirements")
        clauses += all_of(ids) if type == "all" else any_of(ids)
    return tuple(clauses)


def _check_ids(read: _Reader, listed: tuple[Requirement, ...] | list[Requirement]) -> None:
    ids = [each.id for each in listed]
    if len(set(ids)) < len(ids):
        raise read.error("has two requirements of one id")


def _unmet_name(read: _Reader, row: object, names: Mapping[str, str]) -> str:
    if isinstance(row, Mapping):
        row = read.pick(row, "name", "id", "requirement")
    if isinstance(row, bool) or not isinstance(row, str | int):
        raise read.error("has something in `unmet` that is neither a name nor an id")
    return names.get(str(row), str(row))


def _tags(read: _Reader, place: Any, answer: Mapping[str, Any]) -> tuple[str, ...]:
    keys = ("nextTrainTags", "nextTrainTag", "next_train_tags", "next_train_tag")
    found = read.pick(place, *keys) or read.pick(answer, *keys) or []
    tags = [found] if isinstance(found, str) else found
    if not isinstance(tags, list):
        raise read.error("has `nextTrainTags` that are no list")
    if wrong := [tag for tag in tags if not checked_tag(tag)]:
        raise read.error(f"names its successor {wrong[0]!r}, which is no tag: lower-case letters, digits, dots and dashes")
    return tuple(dict.fromkeys(tags))


def _export_files(read: _Reader, place: Any, answer: Mapping[str, Any]) -> tuple[str, ...]:
    keys = ("exportFiles", "export_files")
    rows = read.pick(place, *keys) or read.pick(answer, *keys) or []
    if not isinstance(rows, list):
        raise read.error("has `exportFiles` that are no list")
    paths = [read.pick(row, "absolutePhysicalPath", "path") if isinstance(row, Mapping) else row for row in rows]
    for path in paths:
        if not isinstance(path, str) or not path.startswith("/") or {"", ".", ".."} & set(path[1:].split("/")):
            raise read.error(f"exports {path!r}, which is not the whole path of a file")
    return tuple(dict.fromkeys(paths))


def _rest(answer: Mapping[str, Any], *known: str) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key not in known}
