"""What has to be in place before an algorithm runs: from the list in its document to callbacks and storages, in order.

Pure: `resolve` is told where to find an item. Whatever an item requires comes before it, and each item comes once for the
same values of its variables, however often it is required.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .command import Scalar, as_text
from .errors import InvalidPrerequisite, MarketplaceUnavailable
from .item import Callback, Item, Requirement
from .storages import Storage, checked_path, merged
from .template import in_command, in_text, placeholders

_DEEPEST = 50


@dataclass(frozen=True, slots=True)
class Found:
    """An item, where it really came from, and the SHA-256 of what was read there."""

    item: Item
    source: str
    sha256: str

    @property
    def identity(self) -> tuple[str, str]:
        """The same bytes under the same name are the same item, wherever they lie."""
        return self.item.name, self.sha256


Find = Callable[[str], Found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An item with its variables filled in. `chain` leads to it from the algorithm, by names; `uri` is how it was asked for."""

    item: Item
    uri: str
    source: str
    sha256: str
    chain: tuple[str, ...]
    variables: Mapping[str, Scalar]
    callbacks: tuple[Callback, ...]
    storages: tuple[Storage, ...]
    secrets: tuple[str, ...]
    cache_path: str = ""

    def with_callbacks(self, wanted: Callable[[Callback], bool]) -> Step:
        """The step with these of its callbacks only."""
        return replace(self, callbacks=tuple(callback for callback in self.callbacks if wanted(callback)))


@dataclass(frozen=True, slots=True)
class Resolution:
    """All prerequisites of an algorithm: the steps, dependencies first, and the storages to mount, each path once."""

    steps: tuple[Step, ...] = ()
    storages: tuple[Storage, ...] = ()

    @property
    def callbacks(self) -> tuple[tuple[Step, Callback], ...]:
        """Every callback with its step, in the order of the steps."""
        return tuple((step, callback) for step in self.steps for callback in step.callbacks)

    @property
    def cached(self) -> tuple[Step, ...]:
        """The steps whose result is kept."""
        return tuple(step for step in self.steps if step.cache_path)

    def around_algorithm(self) -> Resolution:
        """What is left to do beside an algorithm, once what is kept has been mounted."""
        return replace(self, steps=tuple(_once_cached(step) for step in self.steps))

    def to_prepare(self, step: Step) -> Resolution:
        """What has to be done for the result of a step that is kept: the start callbacks up to its own."""
        before = self.steps[: self.steps.index(step)]
        own = [_once_cached(each) for each in before] + [step]
        return replace(self, steps=tuple(each.with_callbacks(lambda c: c.event == "taskStarts") for each in own))

    @property
    def secrets(self) -> tuple[str, ...]:
        """The Secret blocks that commands refer to."""
        return tuple(sorted({block for step in self.steps for block in step.secrets}))


def resolve(algorithm: str, required: Sequence[Requirement], find: Find, *, working_dir: str, network: bool) -> Resolution:
    """Everything that the algorithm requires, found, filled in, and put in order.

    Raises:
        InvalidPrerequisite: an item that is not there or makes no sense, a variable that is missing or unknown or would be
            read as shell syntax, a circle, a storage in another's place, or an item that needs the network, which the
            algorithm (`network`) does not have. The message has the chain from the algorithm to the culprit.
        MarketplaceUnavailable: where an item should be did not answer.
    """
    steps: dict[tuple[object, ...], Step] = {}

    def add(requirement: Requirement, chain: tuple[str, ...], under: tuple[tuple[str, str], ...]) -> None:
        asked = (*chain, requirement.uri)
        try:
            found = find(requirement.uri)
        except (InvalidPrerequisite, MarketplaceUnavailable) as error:
            raise type(error)(_at(asked, str(error))) from error
        here = (*chain, found.item.name)
        if found.identity in under:
            circle = (*here[under.index(found.identity) + 1 :],)
            raise InvalidPrerequisite(
                _at(here, f"they require one another in a circle, {' → '.join(circle)}. Remove one of the requirements")
            )
        if len(here) > _DEEPEST:
            raise InvalidPrerequisite(_at(here[:3], f"they require one another more than {_DEEPEST} deep. Require fewer"))
        try:
            _check_variables(found.item, dict(requirement.variables))
            _check_network(found.item, network=network)
        except InvalidPrerequisite as error:
            raise InvalidPrerequisite(_at(here, str(error))) from None
        key = (found.identity, tuple(sorted((name, as_text(value)) for name, value in requirement.variables)))
        if key in steps:
            return
        for each in found.item.requires:
            add(each, here, (*under, found.identity))
        steps[key] = _step(found, requirement, here)

    for requirement in required:
        add(requirement, (algorithm,), ())
    ordered = tuple(steps.values())
    storages = [storage for step in ordered for storage in step.storages]
    merged([*storages, *(_cache(step) for step in ordered if step.cache_path)], working_dir)
    return Resolution(ordered, merged(storages, working_dir))


def _cache(step: Step) -> Storage:
    """What is kept takes its place as a storage does, and shares it with nobody."""
    return Storage(f"(the cache of {step.item.name} {dict(step.variables)})", step.cache_path, needed_by=" → ".join(step.chain))


def _once_cached(step: Step) -> Step:
    return step.with_callbacks(lambda callback: callback.event != "taskStarts") if step.cache_path else step


def _step(found: Found, requirement: Requirement, chain: tuple[str, ...]) -> Step:
    values, item = dict(requirement.variables), found.item
    try:
        callbacks = tuple(Callback(c.event, tuple(in_command(text, values) for text in c.commands)) for c in item.callbacks)
        cache_path = checked_path(in_text(item.cache_path, values)) if item.cache_path else ""
        storages = tuple(_storage(storage, values, " → ".join(chain)) for storage in item.storages)
    except InvalidPrerequisite as error:
        raise InvalidPrerequisite(_at(chain, str(error))) from None
    return Step(
        item=item,
        uri=requirement.uri,
        source=found.source,
        sha256=found.sha256,
        chain=chain,
        variables=values,
        callbacks=callbacks,
        storages=storages,
        secrets=tuple(sorted(set(_secrets(item)))),
        cache_path=cache_path,
    )


def _storage(storage: Storage, values: Mapping[str, Scalar], needed_by: str) -> Storage:
    path = checked_path(in_text(storage.path, values))
    return replace(storage, name=in_text(storage.name, values), path=path, needed_by=needed_by)


def _secrets(item: Item) -> Iterator[str]:
    for callback in item.callbacks:
        for command in callback.commands:
            yield from (found.secret for found in placeholders(command) if found.secret)


def _check_variables(item: Item, given: Mapping[str, Scalar]) -> None:
    if missing := [name for name in item.variables if name not in given]:
        raise InvalidPrerequisite(
            f"it asks for the template variable {missing[0]}, which is not given. Whoever requires it writes "
            f"template_variables: {{{missing[0]}: VALUE}}"
        )
    if unknown := [name for name in given if name not in item.variables]:
        known = f"It has {', '.join(item.variables)}" if item.variables else "It has none"
        raise InvalidPrerequisite(f"it has no template variable {unknown[0]}. {known}")


def _check_network(item: Item, *, network: bool) -> None:
    if item.network and not network:
        raise InvalidPrerequisite(
            "it needs the network, which the algorithm does not have. Set network: true in the Algorithm document"
        )


def _at(chain: Sequence[str], why: str) -> str:
    return f"A prerequisite cannot be used ({' → '.join(chain)}): {why.rstrip('.')}."
