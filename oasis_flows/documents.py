"""Finding documents on the Prefect server by the names that people give them."""

from __future__ import annotations

from typing import TypeVar, cast

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client

from .errors import DescriptionError

AnyBlock = TypeVar("AnyBlock", bound=Block)


def load(block_type: type[AnyBlock], name: str) -> AnyBlock:
    """The document of this type and name.

    Raises:
        DescriptionError: there is none; the message names those that there are.
    """
    try:
        return cast(AnyBlock, block_type.load(name))
    except ValueError as error:
        if "Unable to find" not in str(error):
            raise
    slug = block_type.get_block_type_slug()
    known = names(block_type)
    there_are = f"There are: {', '.join(known)}." if known else f"There is no {slug} document at all."
    raise DescriptionError(
        f"There is no {slug} document {name!r}. {there_are} Make one with `oasis-flows apply`, or in the Prefect UI."
    )


def find(block_type: type[AnyBlock], name: str) -> AnyBlock | None:
    """The document of this type and name, or `None`."""
    try:
        return cast(AnyBlock, block_type.load(name))
    except ValueError as error:
        if "Unable to find" not in str(error):
            raise
        return None


def names(block_type: type[Block]) -> list[str]:
    """The names of all documents of a type, sorted."""
    with get_client(sync_client=True) as client:
        found = client.read_block_documents_by_type(block_type.get_block_type_slug())
    return sorted(document.name for document in found if document.name)
