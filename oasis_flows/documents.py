"""Asking the Prefect server: for documents by the names that people give them, and patiently where it is away."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast, get_args, get_type_hints
from uuid import UUID

import httpx
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.exceptions import ObjectNotFound, ParameterTypeError
from prefect.flows import Flow
from prefect.tasks import Task

from . import heartbeat, interruption, kept_client
from .errors import DescriptionError, ServerDenied, ServerUnavailable

PATIENCE_SECONDS = 600.0

AnyBlock = TypeVar("AnyBlock", bound=Block)
P = ParamSpec("P")
R = TypeVar("R")


def load(block_type: type[AnyBlock], name: str) -> AnyBlock:
    """The document of this type and name.

    Raises:
        DescriptionError: there is none; the message names those that there are.
    """
    found = find(block_type, name)
    if found is not None:
        return found
    slug = block_type.get_block_type_slug()
    known = names(block_type)
    there_are = f"There are: {', '.join(known)}." if known else f"There is no {slug} document at all."
    raise DescriptionError(
        f"There is no {slug} document {name!r}. {there_are} Make one with `oasis-flows apply`, or in the Prefect UI."
    )


def resolved(block_type: type[AnyBlock], given: AnyBlock | str) -> AnyBlock:
    """The document itself, where a name may have been given in its place; raises as `load`."""
    return load(block_type, given) if isinstance(given, str) else given


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


def name_of(block_type: type[Block], id: UUID) -> str | None:
    """The name of the document of this type and id, or `None`."""
    with get_client(sync_client=True) as client:
        try:
            found = client.read_block_document(id)
        except ObjectNotFound:
            return None
    is_one = found.block_type is not None and found.block_type.slug == block_type.get_block_type_slug()
    return found.name if is_one else None


def _pause() -> None:
    interruption.check()
    time.sleep(1)


def patiently(
    ask: Callable[[], R],
    *,
    of: type[Exception] | tuple[type[Exception], ...] = (httpx.TransportError, httpx.HTTPStatusError),
    pause: Callable[[], None] = _pause,
) -> R:
    """Do what asks the Prefect server; again where it does not answer, ten minutes long. So `ask` must bear repetition.

    Raises:
        ServerUnavailable: it still does not answer.
        ServerDenied: it refuses.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except of as error:
            said = unanswered(error)
            if said is None:
                raise
            if isinstance(said, ServerDenied) or time.monotonic() > until:
                raise said from error
        pause()


def placed(run: Callable[[], R], pause: Callable[[], None] = _pause) -> R:
    """Do what runs a task; again where the server is away as Prefect's engine asks, once, whether the limits of the run's tags leave room."""
    return patiently(run, of=ConcurrencySlotAcquisitionError, pause=pause)


def unanswered(error: Exception) -> ServerUnavailable | ServerDenied | None:
    """What it means, if the Prefect server did not answer, or lets nobody in without the right password or key."""
    asked = error.__cause__ if isinstance(error, ConcurrencySlotAcquisitionError) else error
    if isinstance(asked, httpx.HTTPStatusError) and asked.response.status_code < 500:
        return denied(asked)
    if not isinstance(asked, httpx.TransportError | httpx.HTTPStatusError):
        return None
    return ServerUnavailable(
        f"The Prefect server does not answer. Start it again, and retry the run: nothing done so far is lost. "
        f"The cause: {type(asked).__name__}: {asked}"
    )


def denied(error: Exception) -> ServerDenied | None:
    """What it means, if it is the Prefect server's refusal to let anybody in without the right password or key."""
    if not isinstance(error, httpx.HTTPStatusError) or error.response.status_code not in (401, 403):
        return None
    return ServerDenied(
        f"The Prefect server refuses this process. Give it, and each worker, the server's own PREFECT_API_AUTH_STRING, or a "
        f"valid PREFECT_API_KEY. It said: {error.response.status_code} {error.response.reason_phrase}"
    )


def await_server() -> None:
    """Return once the Prefect server answers; raises as `patiently`."""

    def hello() -> None:
        with get_client(sync_client=True) as client:
            client.hello().raise_for_status()

    patiently(hello)


class PatientTask(Task[P, R]):
    """A task that is `placed`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task; see Prefect's `Task`."""
        return placed(partial(super().__call__, *args, **kwargs))


def task(**options: Any) -> Callable[[Callable[P, R]], Task[P, R]]:
    """As Prefect's `task`, for a `PatientTask`."""
    return lambda function: PatientTask(function, log_prints=None, **options)


class DocumentFlow(Flow[P, R]):
    """A flow whose parameters refer to documents, and which says what is wrong with a reference."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the flow in this process; see Prefect's `Flow`. It ends when its work does, not when its heart has beaten."""
        with interruption.kept_in_mind(), kept_client.kept(), heartbeat.ours():
            return super().__call__(*args, **kwargs)

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters with their references resolved.

        Raises:
            DescriptionError: a document does not exist or is of another type; or a value is wrong.
        """
        try:
            return super().validate_parameters(_with_documents(self.fn, parameters))
        except ParameterTypeError as error:
            # Prefect keeps the reason of an unresolved reference in the cause, and only there.
            why = " ".join(str(error.__cause__ or error).split())
            raise DescriptionError(
                f"The parameters cannot be used: {why}. A reference to a document is written "
                '{"$ref": {"block_document_slug": "TYPE/NAME"}}, and NAME must exist: `prefect block ls` lists them.'
            ) from error


def _with_documents(function: Callable[..., Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, with those references resolved that are to a document of their parameter's own type.

    Prefect looks for a reference's type among all block types that are installed, and imports them for it: prefect-kubernetes
    takes half as long as Prefect itself. What cannot be resolved here is left for Prefect to say.
    """
    hints = get_type_hints(function)
    return {name: _resolved_reference(hints.get(name), value) for name, value in parameters.items()}


def _resolved_reference(hint: Any, value: Any) -> Any:
    types = [each for each in get_args(hint) or (hint,) if isinstance(each, type) and issubclass(each, Block)]
    reference = value.get("$ref") if isinstance(value, dict) else None
    if len(types) != 1 or not isinstance(reference, dict):
        return value
    with suppress(ValueError, RuntimeError):
        slug, _, name = str(reference.get("block_document_slug") or "").partition("/")
        if id := reference.get("block_document_id"):
            name = name_of(types[0], UUID(str(id))) or ""
        elif slug != types[0].get_block_type_slug():
            return value
        return (name and find(types[0], name)) or value
    return value


def document_flow(**options: Any) -> Callable[[Callable[P, R]], DocumentFlow[P, R]]:
    """Prefect's `flow` decorator, for a `DocumentFlow`."""
    return lambda function: DocumentFlow(function, **options)
