"""Where prerequisites are found: on the Prefect server, in catalogues of specifications, or at an address of their own.

    install-wget, prerequisite/install-wget        a Prerequisite document
    marketplace://name/NAME                        the first of the machine's catalogues (`settings`) that has it
    marketplace://prerequisites/itemId/ID          the same, by its id
    https://…, http://…, file:///…                 a specification in YAML or JSON

Behind each may stand `#sha256=…`: then it is these bytes or nothing. A catalogue is `prefect` (the server), a folder or the
URL of one (`NAME.yaml` in it, or in `prerequisite/` in it), or the address of an index: a list of entries with `name` and `id`, each of
which has the specification itself, its text under `protocol`, or its address under `url`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from uuid import UUID

import httpx

from . import documents, item, store
from .blocks import Prerequisite
from .errors import DatasetError, InvalidPrerequisite, MarketplaceUnavailable, StoreUnavailable
from .prerequisites import Find, Found
from .settings import Settings
from .store import Location

PREFECT = "prefect"
MOST_BYTES = 1 << 20
_SECONDS = 20.0
_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class Entry:
    """One specification of a catalogue: `text` fetches it. `name` is spelled as a document's name."""

    name: str
    id: str
    source: str
    text: Callable[[], str]


def finder(settings: Settings) -> Find:
    """What finds the item that a URI means; the same item for the same URI, as long as it is used.

    It raises `InvalidPrerequisite` where there is none, or none of these bytes, and `MarketplaceUnavailable` where nobody answers.
    """

    @cache
    def find(uri: str) -> Found:
        address, marked, pin = uri.partition("#")
        wanted = re.fullmatch(r"sha256=([0-9a-f]{64})", pin)
        if marked and wanted is None:
            raise InvalidPrerequisite(f"{uri!r} does not say which bytes it means. Write #sha256= and 64 hexadecimal digits")
        kept = settings.specifications / wanted[1] if wanted else None
        if kept and address.startswith(("http", "marketplace:")) and kept.exists():
            source, text = address, kept.read_bytes().decode()
        else:
            source, text = _looked_up(address, settings)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        if wanted and sha256 != wanted[1]:
            raise InvalidPrerequisite(
                f"{address} is not what it is pinned to: its SHA-256 is {sha256}. Look at what changed; if it is right, pin it anew"
            )
        _keep(settings.specifications / sha256, text)
        return Found(item.parse(item.read(text), _stem(source)), source, sha256)

    return find


def entries(catalogue: str) -> Iterator[Entry]:
    """What a catalogue has, in its order.

    Raises:
        InvalidPrerequisite, MarketplaceUnavailable: it cannot be read.
    """
    if catalogue == PREFECT:
        for name in documents.names(Prerequisite):
            yield Entry(name, "", f"prerequisite/{name}", lambda name=name: _document(name) or "")  # type: ignore[misc]
    elif catalogue.startswith(("http://", "https://")) or catalogue.endswith(_SUFFIXES):
        yield from _indexed(catalogue)
    else:
        yield from _folder(catalogue)


def _looked_up(address: str, settings: Settings) -> tuple[str, str]:
    """Where the item really is, and its text."""
    scheme, _, rest = address.partition("://")
    if scheme == "marketplace":
        kind, _, name = rest.partition("/")
        if kind == "name" and name:
            return _in_catalogues(settings, lambda entry: entry.name == item.document_name(name), address)
        if kind == "prerequisites" and (found := re.fullmatch(r"itemId/([^/]+)", name)):
            return _by_id(settings, found[1], address)
        raise InvalidPrerequisite(
            f"{address!r} is no item of a marketplace. Write marketplace://name/NAME or marketplace://prerequisites/itemId/ID"
        )
    if scheme in ("http", "https", "file") and rest:
        return address, fetch(address)
    if "://" in address:
        raise InvalidPrerequisite(
            f"nothing here can read {address!r}. Write a name, marketplace://, https://, http:// or file:///"
        )
    name = item.document_name(address)
    text = _document(name)
    if text is None:
        known = documents.names(Prerequisite)
        there_are = f"There are: {', '.join(known)}" if known else "There is none at all"
        raise InvalidPrerequisite(f"there is no prerequisite document {name!r}. {there_are}. Make one with `oasis-flows apply`")
    return f"prerequisite/{name}", text


def _in_catalogues(settings: Settings, wanted: Callable[[Entry], bool], address: str) -> tuple[str, str]:
    for catalogue in settings.marketplaces:
        for entry in entries(catalogue):
            if wanted(entry):
                return entry.source, entry.text()
    raise InvalidPrerequisite(
        f"no marketplace has {address}. These were asked: {', '.join(settings.marketplaces)}. Correct the name, or add the "
        "catalogue that has it to the setting OASIS_FLOWS_MARKETPLACES"
    )


def _by_id(settings: Settings, id: str, address: str) -> tuple[str, str]:
    if PREFECT in settings.marketplaces and (name := _document_of(id)):
        return f"prerequisite/{name}", _document(name) or ""
    return _in_catalogues(settings, lambda entry: id in (entry.id, _id_in(entry)), address)


def _id_in(entry: Entry) -> str:
    if entry.id or entry.source.startswith("prerequisite/"):
        return entry.id
    try:
        return str(item.read(entry.text()).get("id") or "")
    except InvalidPrerequisite:
        return ""


def _document(name: str) -> str | None:
    """The specification in a document of the server, in its one spelling."""
    found = documents.find(Prerequisite, name)
    return None if found is None else canonical({"name": name} | found.specification())


def _document_of(id: str) -> str | None:
    """The name of the Prerequisite document with this id."""
    try:
        return documents.name_of(Prerequisite, UUID(id))
    except ValueError:
        return None


def canonical(fields: Mapping[str, Any]) -> str:
    """Fields as the one text whose SHA-256 pins them, where there is no file."""
    return json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _indexed(address: str) -> Iterator[Entry]:
    try:
        found = item.loaded(fetch(address))
    except InvalidPrerequisite as error:
        raise InvalidPrerequisite(f"the marketplace {address} cannot be read: {error}") from None
    listed = found.get("items") if isinstance(found, dict) else found
    if not isinstance(listed, list):
        raise InvalidPrerequisite(f"the marketplace {address} is no index. It must hold a list, or a list under items")
    for each in listed:
        if isinstance(each, dict) and isinstance(each.get("name"), str):
            name, id = item.document_name(each["name"]), str(each.get("id") or "")
            source = urljoin(address, each["url"]) if isinstance(each.get("url"), str) else f"{address}#{name}"
            yield Entry(name, id, source, lambda each=each, source=source: _text_of(each, source))  # type: ignore[misc]


def _text_of(entry: Mapping[str, Any], source: str) -> str:
    if isinstance(entry.get("protocol"), str):
        return str(entry["protocol"])
    return fetch(source) if isinstance(entry.get("url"), str) else canonical(entry)


def _folder(url: str) -> Iterator[Entry]:
    root = str(Path(url).expanduser()) if "://" not in url else url.rstrip("/")
    try:
        names = sorted(entry.path for entry in store.scan(Location(root)))
    except StoreUnavailable as error:
        raise MarketplaceUnavailable(f"the marketplace {url} does not answer. {error}") from error
    except DatasetError as error:
        raise InvalidPrerequisite(f"the marketplace {url} cannot be read. {error}") from error
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder in ("", "prerequisite") and file.endswith(_SUFFIXES):
            source = f"{root}/{name}"
            yield Entry(item.document_name(_stem(file)), "", source, lambda source=source: fetch(source))  # type: ignore[misc]


def fetch(address: str) -> str:
    """The text at an address: http, https, any other URL, or a path.

    Raises:
        InvalidPrerequisite: there is none, it is too long or no UTF-8; or the address holds a password.
        MarketplaceUnavailable: nobody answers.
    """
    parts = urlsplit(address)
    if parts.password is not None:
        raise InvalidPrerequisite("the address of a prerequisite holds a password, and addresses are shown. Remove it")
    try:
        data = _from_the_web(address) if parts.scheme in ("http", "https") else _from_a_store(address)
        if len(data) > MOST_BYTES:
            raise InvalidPrerequisite(
                f"{address} has more than {MOST_BYTES} bytes. That is no specification; correct the address"
            )
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidPrerequisite(f"{address} is no text in UTF-8. Correct the address") from None


def _from_the_web(address: str) -> bytes:
    data = b""
    try:
        with httpx.stream("GET", address, follow_redirects=True, timeout=_SECONDS) as answer:
            if answer.status_code >= 500:
                raise MarketplaceUnavailable(f"{address} does not answer. Try again later. It said: HTTP {answer.status_code}")
            if answer.status_code != 200:
                raise InvalidPrerequisite(
                    f"there is nothing at {address}. Correct the address. It said: HTTP {answer.status_code}"
                )
            for chunk in answer.iter_bytes():
                data += chunk
                if len(data) > MOST_BYTES:
                    break
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise MarketplaceUnavailable(
            f"{address} does not answer. Check the address and the network of this machine. The cause: {type(error).__name__}: {error}"
        ) from error
    return data


def _from_a_store(address: str) -> bytes:
    place = unquote(urlsplit(address).path) if address.startswith("file://") else address
    folder, _, name = place.rpartition("/")
    data = b""
    try:
        for chunk in store.read_file(Location(folder or "/"), name):
            data += chunk
            if len(data) > MOST_BYTES:
                break
    except StoreUnavailable as error:
        raise MarketplaceUnavailable(f"{address} cannot be read. {error}") from error
    except DatasetError as error:
        raise InvalidPrerequisite(f"{address} cannot be read. {error}") from error
    return data


def _keep(path: Path, text: str) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{token_hex(4)}")
        new.write_bytes(text.encode())
        new.replace(path)


def _stem(address: str) -> str:
    return re.sub(r"\.(ya?ml|json)$", "", address.rpartition("/")[2])
