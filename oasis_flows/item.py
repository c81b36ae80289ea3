"""One prerequisite as it is written: OpenPAI's spelling, from a document or a file, checked by itself.

The older form, with `callbacks` beside `plugin`, means the same as with `callbacks` in `plugin_params`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import yaml

from .command import Scalar
from .errors import InvalidPrerequisite
from .storages import Storage, checked_path
from .template import is_name, placeholders

EVENTS = ("taskStarts", "taskSucceeds", "taskFails", "taskEnds")
_ALIASES = {"containerStart": "taskStarts", "containerExit": "taskEnds"}
_PLUGINS = ("cmd", "pvc_storage")

# What a specification may say about itself, and nobody here reads.
_CARRIED = (
    "type",
    "description",
    "id",
    "uri",
    "version",
    "contributor",
    "author",
    "protocolVersion",
    "title",
    "summary",
    "tags",
)
_READ = (
    "name",
    "plugin",
    "plugin_params",
    "callbacks",
    "require",
    "template_variables",
    "requireStorages",
    "failurePolicy",
    "share_environment",
    "network",
)


_UNQUOTED = re.compile(r"^(\s*(?:- +)*(?:[\w.-]+:\s+)?)(\{\{.*?)(\s+#.*|\s*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Callback:
    """A list of shell commands, run by one shell when its event happens."""

    event: str
    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Requirement:
    """Somebody's wish for an item: where it is, and the values of its variables."""

    uri: str
    variables: tuple[tuple[str, Scalar], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A prerequisite. Its callbacks, and the storages of the plugin pvc_storage, hold templates.

    `ignores_failure`: a failed callback is logged, and the run goes on. `shares_environment`: what its start callbacks export,
    and where they `cd` to, holds for what comes after. `network`: it cannot do without. `cache_path`: what its start callbacks leave
    there is kept for the next run; a template, empty where nothing is kept.
    """

    name: str
    callbacks: tuple[Callback, ...] = ()
    storages: tuple[Storage, ...] = ()
    requires: tuple[Requirement, ...] = ()
    variables: tuple[str, ...] = ()
    ignores_failure: bool = False
    shares_environment: bool = False
    network: bool = False
    cache_path: str = ""


def read(text: str) -> dict[str, Any]:
    """The fields of a specification in YAML or JSON: a mapping, or a list that holds a single one.

    `{{ name }}` as the beginning of a value need not be in quotes, as OpenPAI writes it; YAML itself takes that for a mapping.

    Raises:
        InvalidPrerequisite: it is none; what was given is not quoted, for it may be anything.
    """
    found = loaded(text)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, dict):
        raise InvalidPrerequisite("it holds no fields. Write name:, plugin: and plugin_params:")
    return found


def loaded(text: str) -> Any:
    """What a text in YAML or JSON holds; raises as `read`."""
    try:
        return _loaded(text)
    except yaml.YAMLError:
        try:
            return _loaded(_UNQUOTED.sub(_in_quotes, text))
        except yaml.YAMLError as error:
            mark, why = getattr(error, "problem_mark", None), getattr(error, "problem", None)
            where = f" in line {mark.line + 1}" if mark else ""
            raise InvalidPrerequisite(f"it is neither YAML nor JSON: {why or 'unreadable'}{where}. Correct it") from None


def _loaded(text: str) -> Any:
    try:
        return yaml.load(text, UniqueKeys)  # noqa: S506  # a SafeLoader
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError from error


def document_name(name: str) -> str:
    """A name as a document can have it: `install_wget`, `prerequisite/install_wget` and `Install-Wget` are all `install-wget`.

    Raises:
        InvalidPrerequisite: nothing of it is left.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.strip().removeprefix("prerequisite/").lower()).strip("-")
    if not plain:
        raise InvalidPrerequisite(f"{name!r} is no name of a prerequisite. Use letters, digits and dashes")
    return plain


class UniqueKeys(yaml.SafeLoader):
    """YAML as usual, but a key that comes twice is an error instead of a lost value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _in_quotes(found: re.Match[str]) -> str:
    value = found[2].replace("'", "''")
    return f"{found[1]}'{value}'{found[3]}"


def parse(fields: Mapping[str, Any], name: str = "") -> Item:
    """The item that the fields mean; `name` is its name where they have none. An empty field is as good as none.

    Raises:
        InvalidPrerequisite: they make no sense; the message says what to write instead.
    """
    given = {key: value for key, value in fields.items() if value is not None and value not in ("", [], {})}
    known = (*_READ, *_CARRIED)
    if unknown := sorted(str(key) for key in given if key not in known):
        raise InvalidPrerequisite(f"there is no field {unknown[0]}.{_suggestion(unknown[0], known)}")
    plugin = str(given.get("plugin", "cmd")).removeprefix("com.microsoft.pai.runtimeplugin.")
    if plugin not in _PLUGINS:
        raise InvalidPrerequisite(f"there is no plugin {plugin!r}. The plugins are {' and '.join(_PLUGINS)}")
    params = dict(_mapping(given.get("plugin_params", {}), "plugin_params"))
    if "callbacks" in given:
        if "callbacks" in params:
            raise InvalidPrerequisite("callbacks stand in plugin_params and beside it. Keep those in plugin_params")
        params["callbacks"] = given["callbacks"]
    variables = tuple(_declared(given.get("template_variables", [])))
    _check_placeholders(params, variables)
    callbacks: tuple[Callback, ...] = ()
    storages: tuple[Storage, ...] = ()
    if plugin == "cmd":
        _only(params, "callbacks", "cache", "path")
        callbacks = tuple(_callbacks(params.get("callbacks", [])))
    else:
        storages = (_storage(params, templated=True),)
    shares = _flag(given.get("share_environment", False), "share_environment")
    return Item(
        name=_text(given.get("name", name), "name"),
        callbacks=callbacks,
        storages=storages + tuple(_storage(each) for each in _sequence(given.get("requireStorages", []), "requireStorages")),
        requires=requirements(given.get("require", []), "require"),
        variables=variables,
        ignores_failure=_one_of(given.get("failurePolicy", "fail"), "failurePolicy", ("fail", "ignore")) == "ignore",
        shares_environment=shares,
        network=_flag(given.get("network", False), "network"),
        cache_path=_cache_path(params, callbacks, shares=shares) if plugin == "cmd" else "",
    )


def requirements(written: object, field: str) -> tuple[Requirement, ...]:
    """What a list of wishes means: each a text, or a mapping with `name` and `template_variables`.

    Raises:
        InvalidPrerequisite: one is neither.
    """
    return tuple(_requirement(each, field) for each in _sequence(written, field))


def _requirement(written: object, field: str) -> Requirement:
    if isinstance(written, str):
        written = {"name": written}
    if not isinstance(written, dict) or not isinstance(written.get("name"), str) or not written["name"].strip():
        raise InvalidPrerequisite(
            f"{written!r} in {field} is no prerequisite. Write its name, or {{name: NAME, template_variables: {{variable: value}}}}"
        )
    _only(written, "name", "template_variables", of=f"{written['name']!r} in {field}")
    values = _mapping(written.get("template_variables") or {}, f"template_variables of {written['name']!r}")
    for name, value in values.items():
        if not isinstance(value, str | int | float | bool):
            raise InvalidPrerequisite(f"the value of {name} for {written['name']!r} is {value!r}. Write text or a number")
        if isinstance(value, str) and list(placeholders(value)):
            raise InvalidPrerequisite(
                f"the value of {name} for {written['name']!r} is {value!r}, and values are literals: nothing fills them in. "
                "Write the value itself"
            )
    return Requirement(written["name"].strip(), tuple(cast(Mapping[str, Scalar], values).items()))


def _declared(written: object) -> Iterator[str]:
    for each in _sequence(written, "template_variables"):
        name = each.get("name") if isinstance(each, dict) else each
        if not is_name(name):
            raise InvalidPrerequisite(f"{each!r} declares no template variable. Write - name: dataPath")
        yield str(name)


def _check_placeholders(value: object, declared: Sequence[str]) -> None:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            _check_placeholders(each, declared)
    for found in placeholders(value) if isinstance(value, str) else ():
        if found.name and found.name not in declared:
            raise InvalidPrerequisite(
                f"the template variable {found.name} is used and not declared. Add to template_variables: - name: {found.name}"
            )


def _callbacks(written: object) -> Iterator[Callback]:
    for each in _sequence(written, "callbacks"):
        _only(_mapping(each, "a callback"), "event", "commands", of="a callback")
        event = each.get("event")
        if event not in (*EVENTS, *_ALIASES):
            raise InvalidPrerequisite(f"there is no event {event!r}. The events are {', '.join(EVENTS)}")
        commands = _sequence(each.get("commands") or [], f"commands of {event}")
        if bad := [command for command in commands if not isinstance(command, str) or "\0" in command]:
            raise InvalidPrerequisite(
                f"{bad[0]!r} is no command of {event}. Write each as text, in quotes where YAML asks for them"
            )
        if commands:
            yield Callback(_ALIASES.get(event, event), tuple(commands))


def _cache_path(params: Mapping[str, Any], callbacks: Sequence[Callback], *, shares: bool) -> str:
    if not _flag(params.get("cache", False), "cache"):
        if "path" in params:
            raise InvalidPrerequisite("path says what is kept, and nothing is. Write cache: true beside it, or leave it out")
        return ""
    if "path" not in params or not any(callback.event == "taskStarts" for callback in callbacks):
        raise InvalidPrerequisite(
            "cache: true keeps what taskStarts leaves at a path. Write both: path: /dataset, and a callback"
        )
    if shares:
        raise InvalidPrerequisite(
            "what is cached is not run again, so share_environment has nothing to share. Leave one of them out"
        )
    return _text(params["path"], "path")


def _storage(written: object, *, templated: bool = False) -> Storage:
    fields = _mapping(written, "a storage")
    _only(fields, "name", "mountPath", "readOnly", of="a storage")
    name = _text(fields.get("name"), "name of a storage")
    path = _text(fields.get("mountPath") or f"/mnt/{name}", f"mountPath of {name}")
    if not templated and (list(placeholders(name)) or list(placeholders(path))):
        raise InvalidPrerequisite(
            f"the storage {name} has a template variable, which only plugin_params may. Write the value itself"
        )
    filled_in = not list(placeholders(path))
    return Storage(name, checked_path(path) if filled_in else path, _flag(fields.get("readOnly", True), f"readOnly of {name}"))


def _only(fields: Mapping[str, Any], *known: str, of: str = "plugin_params") -> None:
    if unknown := sorted(str(key) for key in fields if key not in known):
        raise InvalidPrerequisite(f"{of} has no {unknown[0]}.{_suggestion(unknown[0], known)}")


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else f" There is {', '.join(known)}."


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidPrerequisite(f"{what} is {value!r} and must hold fields, such as name: value")
    return value


def _sequence(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidPrerequisite(f"{what} is {value!r} and must be a list")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidPrerequisite(f"the {what} is missing. Write it as text")
    return value.strip()


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidPrerequisite(f"{what} is {value!r} and must be true or false")
    return value


def _one_of(value: object, what: str, known: Sequence[str]) -> str:
    if value not in known:
        raise InvalidPrerequisite(f"{what} is {value!r} and must be {' or '.join(known)}")
    return str(value)
