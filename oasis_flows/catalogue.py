"""The catalogue: block documents as files, `blocks/<type-slug>/<name>.yaml`.

A file holds the document's fields. Another document is referred to as Prefect does it,
`"{{ prefect.blocks.docker-image.NAME }}"`; secrets are written as references to Secret blocks only. `read` checks
everything that can be checked without a server; `apply` saves what differs, in dependency order, and never deletes.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml
from prefect.blocks.core import Block
from prefect.blocks.system import Secret
from pydantic import SecretStr, ValidationError

from .blocks import Algorithm, Dataset, DatasetStore, DockerImage, Prerequisite, Station
from .errors import InvalidDocument, InvalidPrerequisite
from .item import UniqueKeys, document_name, parse, read as read_item, requirements
from .prerequisites import Found, resolve

BLOCK_TYPES: Mapping[str, type[Block]] = {
    block.get_block_type_slug(): block for block in (DockerImage, DatasetStore, Dataset, Prerequisite, Algorithm, Station)
}
_REFERENCE = re.compile(r"\{\{\s*prefect\.blocks\.([a-z0-9-]+)\.([a-z0-9-]+)\s*\}\}")

Outcome = Literal["created", "updated", "unchanged"]


@dataclass(frozen=True)
class Document:
    """One file of the catalogue. `references` maps fields to (type slug, name) of the document they mean."""

    slug: str
    name: str
    path: Path
    fields: Mapping[str, Any]

    @property
    def key(self) -> str:
        return f"{self.slug}/{self.name}"

    @property
    def block_type(self) -> type[Block]:
        return BLOCK_TYPES[self.slug]

    @cached_property
    def references(self) -> dict[str, tuple[str, str]]:
        found = {field: _REFERENCE.fullmatch(value) for field, value in self.fields.items() if isinstance(value, str)}
        return {field: (match[1], match[2]) for field, match in found.items() if match}


def read(folder: Path) -> list[Document]:
    """The documents of a catalogue in dependency order, every one checked as far as possible offline.

    Raises:
        InvalidDocument: with every problem found.
    """
    problems: list[str] = []
    documents = {document.key: document for document in _load_all(folder, problems)}
    ordered = _ordered(documents, problems)
    if not problems:
        built: dict[str, Block] = {}
        for document in ordered:
            problems += [f"{document.path}: {problem}" for problem in _check(document, documents, built)]
        problems += (
            [problem for document in ordered for problem in _check_prerequisites(document, documents)] if not problems else []
        )
    if problems:
        raise InvalidDocument(
            "The catalogue has problems. Correct these files:\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    return ordered


def apply(documents: Sequence[Document]) -> Iterator[tuple[str, Outcome]]:
    """Register the block types and save the documents that differ from the server's; yield each one's key and outcome.

    Raises:
        InvalidDocument: a Secret or a login that a document refers to is not on the server; nothing was saved then.
    """
    outside = {reference: _load_outside(document, reference) for document in documents for reference in _outside(document)}
    for block_type in BLOCK_TYPES.values():
        block_type.register_type_and_schema()
    for document in documents:
        fields = dict(document.fields)
        for field, (slug, name) in document.references.items():
            fields[field] = outside[slug, name] if (slug, name) in outside else BLOCK_TYPES[slug].load(name)
        block = document.block_type(**fields)
        outcome = _outcome(document, block)
        if outcome != "unchanged":
            block.save(document.name, overwrite=True)
        yield document.key, outcome


def write(documents: Mapping[str, Mapping[str, Any]], folder: Path) -> Iterator[Path]:
    """Write documents, given by `type/name`, into a catalogue, once they are known to be right; yield their files.

    Raises:
        InvalidDocument: they are not right, or another document has one's file; nothing was written then.
    """
    texts = {
        f"{key}.yaml": yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True) for key, fields in documents.items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        list(_written(texts, Path(scratch)))
        read(Path(scratch))
    for name, text in texts.items():
        if (folder / name).exists() and (folder / name).read_text() != text:
            raise InvalidDocument(f"There is already another {folder / name}. Move it away, or give another folder.")
    yield from _written(texts, folder)


def _written(texts: Mapping[str, str], folder: Path) -> Iterator[Path]:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        yield path


def problems_of(error: ValidationError) -> list[str]:
    """What pydantic found, one line each: the field and what is wrong with it."""
    return [
        f"{'.'.join(str(part) for part in found['loc'] if not str(part).startswith(('list[', 'dict['))) or 'document'}: "
        f"{found['msg'].removeprefix('Value error, ')}"
        for found in error.errors(include_url=False, include_input=False)
    ]


def _load_all(folder: Path, problems: list[str]) -> Iterator[Document]:
    if not folder.is_dir():
        raise InvalidDocument(f"There is no folder {folder}. Give the folder that holds docker-image/, algorithm/ and so on.")
    paths = sorted(folder.glob("*/*"))
    if not paths:
        raise InvalidDocument(
            f"The folder {folder} holds no documents. They are files such as docker-image/NAME.yaml and algorithm/NAME.yaml in it."
        )
    for path in paths:
        slug, name = path.parent.name, path.stem
        if slug not in BLOCK_TYPES:
            problems.append(f"{path}: {slug!r} is no block type. The folders are {', '.join(BLOCK_TYPES)}.")
        elif path.suffix != ".yaml":
            problems.append(f"{path}: only .yaml files belong here. Rename it to {name}.yaml, or move it away.")
        elif not re.fullmatch(r"[a-z0-9]+(-+[a-z0-9]+)*", name):
            better = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "name"
            problems.append(f"{path}: Prefect cannot store the name {name!r}. Rename the file to {better}.yaml.")
        else:
            try:
                text = path.read_text()
                fields = read_item(text) if slug == "prerequisite" else yaml.load(text, UniqueKeys)  # noqa: S506  # a SafeLoader
            except InvalidPrerequisite as error:
                problems.append(f"{path}: {error}.")
                continue
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                problems.append(f"{path}: is not YAML: {' '.join(str(error).split())}.")
                continue
            if isinstance(fields, dict):
                yield Document(slug, name, path, fields)
            else:
                problems.append(f"{path}: holds no fields. Write lines such as `url: s3://bucket/folder`.")


def _ordered(documents: Mapping[str, Document], problems: list[str]) -> list[Document]:
    graph = {
        key: {f"{slug}/{name}" for slug, name in document.references.values() if f"{slug}/{name}" in documents}
        for key, document in documents.items()
    }
    try:
        return [documents[key] for key in TopologicalSorter(graph).static_order()]
    except CycleError as error:
        problems.append(
            f"These documents refer to one another in a circle: {' → '.join(error.args[1])}. Remove one of the references."
        )
        return []


def _check(document: Document, documents: Mapping[str, Document], built: dict[str, Block]) -> Iterator[str]:
    """The problems of one document whose references have been checked before it."""
    known = document.block_type.model_fields
    for field in document.fields.keys() - known.keys():
        close = difflib.get_close_matches(str(field), known, n=1)
        yield f"{field}: there is no such field. " + (
            f"Did you mean {close[0]}?" if close else f"The fields are {', '.join(known)}."
        )
    fields = dict(document.fields)
    wrong = False
    for field in fields.keys() & known.keys():
        problem, fields[field] = _resolved(document, field, documents, built)
        if problem:
            wrong = True
            yield f"{field}: {problem}"
    if wrong:
        return
    try:
        built[document.key] = document.block_type(**{name: value for name, value in fields.items() if name in known})
    except ValidationError as error:
        yield from problems_of(error)


class _ElsewhereError(Exception):
    """An item is not in the catalogue, and need not be."""


def _check_prerequisites(document: Document, documents: Mapping[str, Document]) -> Iterator[str]:
    """What is wrong with an algorithm's prerequisites, if all of them are in the catalogue."""

    def find(uri: str) -> Found:
        address = uri.partition("#")[0]
        if "://" in address:
            raise _ElsewhereError
        key = f"prerequisite/{document_name(address)}"
        if key not in documents:
            raise InvalidPrerequisite(f"there is no {key}.yaml in the catalogue. Add the file, or correct the name")
        return Found(parse(documents[key].fields, documents[key].name), key, key)

    if document.slug != "algorithm":
        return
    try:
        resolve(
            document.name,
            requirements(document.fields.get("prerequisites") or [], "prerequisites"),
            find,
            working_dir=str(document.fields.get("working_dir") or "/work").rstrip("/"),
            network=bool(document.fields.get("network")),
        )
    except _ElsewhereError:
        return
    except InvalidPrerequisite as error:
        yield f"{document.path}: prerequisites: {error}"


def _resolved(document: Document, field: str, documents: Mapping[str, Document], built: Mapping[str, Block]) -> tuple[str, Any]:
    """What is wrong with a field's reference (or that it is none), and what stands for its value in an offline check."""
    value = document.fields[field]
    wanted = _block_or_secret(document, field)
    reference = document.references.get(field)
    if wanted is None:
        if _REFERENCE.search(str(value)):
            secret = " For a secret, name its block in secret_environment." if field == "environment" else ""
            return f"a reference to another document cannot stand here. Write the value itself.{secret}", value
        return "", value
    slug = "secret" if wanted is SecretStr else cast(type[Block], wanted).get_block_type_slug()
    if reference is None:
        if value is None:
            return "", value
        secret = " Secrets are never written into a catalogue." if slug == "secret" else ""
        return f'must be a reference: "{{{{ prefect.blocks.{slug}.NAME }}}}".{secret}', value
    if reference[0] != slug:
        return f"refers to a {reference[0]}, and must refer to a {slug}.", value
    if slug == "secret":
        return "", "a secret of the server"
    if slug not in BLOCK_TYPES:
        return "", cast(type[Block], wanted).model_construct()
    key = f"{slug}/{reference[1]}"
    if key not in documents:
        return f"there is no {key}.yaml in the catalogue. Add the file, or correct the name.", value
    # A document that was found wrong is reported once, not again by everyone who refers to it.
    return "", built.get(key) or cast(type[Block], wanted).model_construct()


def _block_or_secret(document: Document, field: str) -> type | None:
    annotation = document.block_type.model_fields[field].annotation
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if c is SecretStr or (isinstance(c, type) and issubclass(c, Block))), None)


def _outside(document: Document) -> list[tuple[str, str]]:
    return [reference for reference in document.references.values() if reference[0] not in BLOCK_TYPES]


def _load_outside(document: Document, reference: tuple[str, str]) -> Any:
    slug, name = reference
    try:
        if slug == "secret":
            return str(cast(Secret[Any], Secret.load(name)).get())
        return Block.load(f"{slug}/{name}")
    except ValueError:
        raise InvalidDocument(
            f"{document.path} refers to the {slug} document {name!r}, which the Prefect server does not have. "
            f"Make it first: in the Prefect UI, or `prefect block create {slug}`."
        ) from None


def _outcome(document: Document, block: Block) -> Outcome:
    try:
        existing = cast(Block, document.block_type.load(document.name, validate=False))
    except ValueError:
        return "created"
    return "unchanged" if _content(existing) == _content(block) else "updated"


def _content(block: Block) -> dict[str, Any]:
    """The fields of a document as they are compared: nested documents by identity, secrets in clear."""

    def plain(value: object) -> object:
        if isinstance(value, Block):
            return value._block_document_id
        return value.get_secret_value() if isinstance(value, SecretStr) else value

    return {name: plain(getattr(block, name, None)) for name in type(block).model_fields}
