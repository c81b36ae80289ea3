"""The documentation is complete and whole: what the code has, the pages name; what the pages link to, is there."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import pkgutil
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.blocks.core import Block
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import oasis_flows
from oasis_flows import catalogue, symptoms
from oasis_flows.__main__ import _parser
from oasis_flows.blocks import RESERVED_VARIABLES, STATION_VARIABLES, StationMount, StationPolicy
from oasis_flows.errors import OasisError
from oasis_flows.job import Reason
from oasis_flows.verdict import _SIGNALS, Verdict
from tests.e2e.test_docs import PAGES, ROOT, files_of

REFERENCE = ROOT / "docs" / "reference"


def section(page: Path, heading: str) -> str:
    """The text under a heading, up to the next one of its level or above."""
    text = page.read_text()
    found = re.search(rf"^(#+) {heading}(?!\w).*$", text, re.MULTILINE)
    assert found, f"{page.name} has no heading that begins with {heading!r}"
    rest = text[found.end() :]
    after = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: after.start()] if after else rest


def type_words(annotation: Any) -> str:
    """A type as YAML writers know it."""
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_words(part) for part in arguments if part is not type(None)))
    if origin is list:
        return f"list of {type_words(arguments[0])}"
    if origin is dict:
        return f"map of name to {type_words(arguments[1])}"
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return f"reference to a `{annotation.get_block_type_slug()}`"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "fields"
    return names.get(annotation) or "reference to a `secret`"


def default_words(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if field.is_required():
        return "required"
    if default in (None, "", {}, []) or isinstance(default, BaseModel):
        return "empty"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def block_rows() -> Iterator[tuple[str, str]]:
    for slug, block in catalogue.BLOCK_TYPES.items():
        for name, field in block.model_fields.items():
            words = type_words(field.annotation)
            yield slug, f"| `{name}` | {words} | {default_words(field)} | {field.description} |"


def test_every_field_of_every_block_is_in_the_reference():
    missing = [
        f"{slug}: {row}"
        for slug, row in block_rows()
        if row not in section(REFERENCE / "blocks.md", catalogue.BLOCK_TYPES[slug].__name__)
    ]

    assert not missing, "docs/reference/blocks.md lacks:\n" + "\n".join(missing)


@pytest.mark.parametrize("model", [StationMount, StationPolicy])
def test_every_field_below_a_field_is_in_the_reference(model):
    text = section(REFERENCE / "blocks.md", "Station")
    rows = [
        f"| `{name}` | {type_words(field.annotation)} | {default_words(field)} | {field.description} |"
        for name, field in model.model_fields.items()
    ]

    assert [row for row in rows if row not in text] == []


def test_every_variable_of_a_container_is_in_the_reference():
    text = (REFERENCE / "blocks.md").read_text()

    assert [name for name in [*RESERVED_VARIABLES, *STATION_VARIABLES, "OASIS_PARAMETER_"] if f"`{name}" not in text] == []


def commands(parser: argparse.ArgumentParser, words: str = "oasis-flows") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that can be given, and its parser."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield words, parser
    for action in below:
        for name, child in action.choices.items():
            yield from commands(child, f"{words} {name}")


@pytest.mark.parametrize(
    ("words", "parser"), list(commands(_parser())), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_and_option_is_in_the_reference(words, parser):
    page = REFERENCE / "command-line.md"
    text = section(page, f"`{words}")
    heading = next(line for line in page.read_text().splitlines() if line.startswith(f"## `{words}"))
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if not action.option_strings:
            assert str(action.metavar) in heading
        for option in action.option_strings:
            written = option if action.nargs == 0 or option.count("-") == 1 else f"{option} {action.metavar}"

            assert f"`{written}`" in text, f"the options of {words}"


def test_every_exit_code_is_in_the_reference():
    text = section(REFERENCE / "command-line.md", "Exit codes")
    codes = re.search(r"^SUCCESS.*= (.*)$", (ROOT / "oasis_flows/__main__.py").read_text(), re.MULTILINE)

    assert codes
    assert [code for code in codes[1].split(", ") if f"| {code} |" not in text] == []


def sources() -> str:
    return "\n".join(path.read_text() for path in sorted((ROOT / "oasis_flows").rglob("*.py")))


def test_every_setting_is_in_the_reference():
    text = (REFERENCE / "settings.md").read_text()
    names = set(re.findall(r"OASIS_FLOWS_[A-Z_]+", sources()))

    assert sorted(name for name in names if f"| `{name}` |" not in text) == []
    assert sorted(set(re.findall(r"OASIS_FLOWS_[A-Z_]+", text)) - names) == []


def errors(root: type[OasisError] = OasisError) -> Iterator[type[OasisError]]:
    yield root
    for child in root.__subclasses__():
        yield from errors(child)


def every_error() -> list[type[OasisError]]:
    for module in pkgutil.walk_packages(oasis_flows.__path__, "oasis_flows."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    # One without a code of its own is a detail of its module.
    return [error for error in dict.fromkeys(errors()) if error.__module__.startswith("oasis_flows.") and "code" in vars(error)]


def test_every_error_is_in_the_reference():
    lines = (REFERENCE / "errors.md").read_text().splitlines()
    for error in every_error():
        row = next((line for line in lines if line.startswith(f"| `{error.__name__}` |")), "")

        assert f"| `{error.code}` | {error.exit_code} |" in row, error
        assert error.transient == ("**Again.**" in row), error


def test_every_reason_is_in_the_reference():
    text = section(REFERENCE / "errors.md", "How a container ended")

    assert [reason.value for reason in Reason if f"| `{reason.value}` |" not in text] == []


def test_every_code_and_key_of_a_verdict_is_in_the_reference():
    text = (REFERENCE / "errors.md").read_text()
    found = {value.code for value in vars(symptoms).values() if isinstance(value, symptoms.Symptom)}
    keys = [field.name for field in dataclasses.fields(Verdict)]

    assert [code for code in sorted(found | {code for code, *_ in _SIGNALS.values()}) if f"| `{code}` |" not in text] == []
    assert [key for key in keys if f"`{key}`" not in section(REFERENCE / "errors.md", "The verdict")] == []
    assert [
        blame.value for blame in symptoms.Blame if f"`{blame.value}`" not in section(REFERENCE / "errors.md", "The verdict")
    ] == []


def keys_returned_by(module: str, function: str) -> list[str]:
    """The keys of the dictionary that a function returns, as its source has them."""
    tree = ast.parse((ROOT / "oasis_flows" / module).read_text())
    body = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    returned = next(node.value for node in ast.walk(body) if isinstance(node, ast.Return))
    assert isinstance(returned, ast.Dict)
    return [str(key.value) for key in returned.keys if isinstance(key, ast.Constant)]


def test_every_key_of_the_record_is_in_the_reference():
    text = section(REFERENCE / "dataset-format.md", "`task.json`")
    sandbox = (ROOT / "docs/explanation/sandbox.md").read_text()

    assert [key for key in keys_returned_by("record.py", "task_json") if f"| `{key}` |" not in text] == []
    for module in ("engines/docker_spec.py", "engines/pod.py"):
        assert [key for key in keys_returned_by(module, "in_force") if f"`{key}`" not in sandbox] == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page

        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md" or not page.exists():
            continue
        reached.add(page)
        waiting += [(page.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s:]+)[)#]", page.read_text())]

    assert sorted(set((ROOT / "docs").rglob("*.md")) - reached) == []


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_document_shown_is_valid(page, tmp_path):
    catalogues = set()
    for path, content in files_of(page):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content.replace("ENDPOINT", "https://s3.example.org").replace("BUCKET", "bucket"))
        if file.parent.name in catalogue.BLOCK_TYPES:
            catalogues.add(file.parent.parent)
    for folder in catalogues:
        assert catalogue.read(folder)


def test_the_shipped_automations_are_valid_and_fit_the_heartbeat():
    shipped = yaml.safe_load((ROOT / "deployments/silent-runs.yaml").read_text())["automations"]
    automation, pending, cancelling = (AutomationCore.model_validate(each) for each in shipped)
    heartbeat = json.loads((ROOT / "deployments/work-pools/gpu-process.json").read_text())["variables"]["properties"]["env"]

    assert isinstance(automation.trigger, EventTrigger)
    assert isinstance(pending.trigger, EventTrigger)
    assert isinstance(cancelling.trigger, EventTrigger)
    assert automation.trigger.within.total_seconds() >= 2 * int(heartbeat["default"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])


def test_the_shop_window_shows_what_can_be_had():
    assert sorted(oasis_flows.__all__) == oasis_flows.__all__
    assert [name for name in oasis_flows.__all__ if not hasattr(oasis_flows, name)] == []
    assert set(oasis_flows.__all__) == {name for names in oasis_flows._HOMES.values() for name in names}
