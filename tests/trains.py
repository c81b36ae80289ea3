"""Trains of busybox: sound ones of each generation, and bad ones. What differs between them is a line of shell."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.images import TinyImage, busybox_layer, docker_archive, layer

MODEL = "/opt/pht_train/model/output"
# One that adds 1 to its model, and needs a URL, and a token or a folder.
LISTED = (
    '{"requirements": [{"id": 0, "requirement": {"type": "environmentVariable", "target": "URL", "name": "PHT_URL"}},'
    ' {"id": 1, "requirement": {"type": "environmentVariable", "target": "token", "name": "PHT_TOKEN"}},'
    ' {"id": 2, "requirement": {"type": "environmentVariable", "target": "directory", "name": "PHT_DATA"}}],'
    ' "relations": [{"type": "all", "requirements": [0]}, {"type": "any", "requirements": [1, 2]}]}'
)
ADD = f"echo $(($(cat {MODEL}) + 1)) > {MODEL}.new; mv {MODEL}.new {MODEL}"
V1 = f"""#!/bin/sh
case "$1" in
list_requirements) echo 'listing {{braces}} {{"log": true}}'; echo '{LISTED}' ;;
check_requirements)
  if [ -n "$PHT_URL" ]; then echo '{{"unmet": []}}'; else echo '{{"unmet": [0], "message": "no url"}}'; fi ;;
print_model_summary) printf '{{"content": "counted  to %s"}}' "$(cat {MODEL})" ;;
run_algorithm) echo "reads from $PHT_URL"; RUN ;;
*) echo "no such command" >&2; exit 2 ;;
esac
"""
SUCCESS = f"{ADD}; echo '{{\"success\": true}}'"

ZERO = f"""#!/bin/sh
[ "$2" = --stationid ] && [ "$4" = --mode ] && [ "$5" = immediate ] || exit 2
case "$1" in
list_requirements) echo '{{"requirements": ["PHT_URL"]}}' ;;
check_requirements) if [ -n "$PHT_URL" ]; then echo '{{"unmet": []}}'; else echo '{{"unmet": ["PHT_URL"]}}'; fi ;;
print_summary) printf '{{"content": "counted to %s"}}' "$(cat {MODEL})" ;;
run_algorithm) RUN ;;
*) exit 2 ;;
esac
"""
DESCRIBED = (
    '{"trainName": "train_count", "trainVersion": "1.0", "descriptionVersion": "1.0", "properties": [{"id": 1, "data": '
    '{"@typeName": "UrlEnvironmentVariableProperty", "description": "data", "environmentVariableName": "PHT_URL", '
    '"state": {"isAvailable": %s, "reason": "%s"}}}], "formula": [{"id": 1, "data": {"value": [[1]]}}], '
    '"model": {"summary": {"value": "counted to %s"}}, "algorithm": {"requirement": {"formula_id": 1}}}'
)
ONE = f"""#!/bin/sh
case "$1" in
describe)
  if [ -n "$PHT_URL" ]; then ok=true; why=; else ok=false; why='not set'; fi
  printf '{DESCRIBED}\\n' "$ok" "$why" "$(cat {MODEL})" ;;
run) [ "$2" = --station-id ] || exit 2; RUN ;;
*) exit 2 ;;
esac
"""


def ended(state: str = "success", *, reason: str = "", rebase: str = "null") -> str:
    """A line of shell that prints a response of 1.0."""
    exit = f'{{"state": "{state}", "reason": "{reason}"}}'
    return f"""echo '{{"runResponseVersion": "1.0", "exit": {exit}, "freeTextMessage": "", "rebase": {rebase}}}'"""


def zero(run: str = SUCCESS) -> str:
    """The script of a train of 0.x."""
    return ZERO.replace("RUN", run)


def v1(run: str = SUCCESS) -> str:
    """The script of a train of V1."""
    return V1.replace("RUN", run)


def one(run: str = f"{ADD}; {ended()}") -> str:
    """The script of a train of 1.0."""
    return ONE.replace("RUN", run)


@contextmanager
def train_image(api: Any, folder: Path, script: str, name: str = "") -> Iterator[str]:
    """A train in the engine, for the time of the block; its model counts 0."""
    name = name or f"oasis-test/train_{uuid.uuid4().hex[:12]}:1"
    files = {"train": (0o755, script.encode()), MODEL[1:]: (0o644, b"0\n"), "opt/unique": (0o644, name.encode())}
    config = {"Env": ["PATH=/bin", "FROM_IMAGE=yes"], "Entrypoint": ["/train"]}
    archive = docker_archive(
        folder / f"{uuid.uuid4().hex}.tar", TinyImage(tags=(name,), layers=(busybox_layer(), layer(files)), config=config)
    )
    with archive.open("rb") as file:
        list(api.load_image(file))
    archive.unlink()
    try:
        yield name
    finally:
        api.remove_image(name, force=True)
