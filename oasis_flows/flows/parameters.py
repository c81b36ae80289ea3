"""How the flows take their parameters, and what a run is called after them."""

from __future__ import annotations

from prefect import runtime
from prefect.blocks.core import Block
from pydantic import WithJsonSchema, WrapValidator

# A Python caller may give a document's name; the form and the schema know documents only.
OR_NAME = WrapValidator(lambda value, validate: value if isinstance(value, str) else validate(value))
# Prefect's form shows a JSON editor for a value of no particular type, and nothing to type into for `object or null`.
JSON_EDITOR = WithJsonSchema({})


def run_name() -> str:
    """The name of the flow run that begins."""
    given = runtime.flow_run.parameters
    return f"{_name_of(given.get('algorithm'))} on {_name_of(given.get('input_dataset'))}"


def visit_name() -> str:
    """The name of a visit's flow run that begins."""
    given = runtime.flow_run.parameters
    return f"{str(given.get('image', '?')).partition('@')[0].rpartition('/')[2][:100]} at {_name_of(given.get('station'))}"


def _name_of(value: object) -> str:
    if isinstance(value, Block):
        return str(value._block_document_name or getattr(value, "url", value.get_block_type_slug()))
    return value if isinstance(value, str) else "?"
