"""Objects in an S3 bucket: botocore finds, lists and deletes them, obstore moves their bytes.

obstore moves small objects at a fifth of botocore's CPU; but its listing drops leading and trailing slashes, does not
keep the order, and stops at names with control characters, which it cannot read or write either.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property, lru_cache
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from ..errors import DatasetChanged, DatasetError, StoreDenied, StoreUnavailable
from ..manifest import Entry
from .transfer import CHUNK_BYTES, Chunk, Location, checkpoint, pause, translated, turn, wait
from .verdicts import OutOfRange

if TYPE_CHECKING:
    from obstore import BytesStream, GetOptions
    from obstore.store import ClientConfig, S3Credential

R = TypeVar("R")

PART_BYTES = 5 << 20
SINGLE_PUT_BYTES = 1 << 20
TINY_BYTES = 64 << 10
MOST_PARTS = 9000
# What is moved at once blocks its thread, and whoever stops a transfer waits so long for it at most. Where less than enough comes in that
# time, all is asked for patiently for a while; where less than ample, the rest of that object is.
AT_ONCE_SECONDS = 1.0
ENOUGH_BYTES, AMPLE_BYTES = 1 << 20, 32 << 20
PIECE_BYTES = 256 << 10
# botocore returns when all of a piece is there, and cannot be told to stop.
AWKWARD_PIECE_BYTES = 16 << 10
PATIENT_SECONDS = 60.0
# Each holds up to three parts; together with the small files of all workers 76 MiB at most, and 58 MiB as measured.
_large_uploads = threading.BoundedSemaphore(4)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a silent server is waited for: `seconds` each of `attempts` times; what is uploaded in bulk may take longer."""

    connect_seconds: float = 5
    seconds: float = 10
    part_seconds: float = 60
    attempts: int = 3


PATIENCE = Patience()
HASTE = Patience(connect_seconds=0.5, seconds=0.7, attempts=1)


class Objects:
    """The objects below `s3://bucket/prefix/`. Safe to use from many threads.

    Raises:
        StoreDenied: there are no credentials anywhere.
        DatasetError: the URL names no bucket, or the endpoint is no URL.
    """

    def __init__(self, location: Location) -> None:
        self._location, self._url = location, location.url.rstrip("/")
        self._bucket, _, prefix = location.path.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self.in_parts = False
        if not self._bucket or self._bucket == "/":
            raise DatasetError(f"{location.url} names no bucket. Write s3://bucket/folder.")
        with translated(self._url):
            try:
                self._connection = _connection(self._bucket, location)
                self._client = self._connection.client
            except ValueError as error:
                raise DatasetError(
                    f"{self._url} cannot be opened. {error}. Correct endpoint_url and region of its store."
                ) from error

    def list(self, folder: str = "") -> Iterator[Entry]:
        """See `Files.list`. Pages are fetched as they are needed; folder markers are left out."""
        top = self._prefix + folder
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=top)
        for page in _translated_each(pages, f"{self._url}/{folder}"):
            for item in _whole_page(page, f"{self._url}/{folder}"):
                if item["Size"] or not item["Key"].endswith("/"):
                    yield Entry(item["Key"][len(top) :], item["Size"], etag=_bare(item.get("ETag")))

    def read(self, name: str, *, start: int = 0, etag: str | None = None, has_digest: bool = False) -> Iterator[bytes]:
        """See `Files.read`. It goes on from where a connection broke, as long as each attempt brings something."""
        where, version, offset, failures = f"{self._url}/{name}", _Version(etag, lambda: self._etag(name)), start, 0
        may_haste = has_digest and not _awkward(self._prefix + name)
        while version.size is None or offset < version.size:
            in_haste, began = may_haste and not self._connection.is_patient, offset
            try:
                for chunk in (self._at_once if in_haste else self._from)(name, offset, version, where):
                    offset, failures = offset + len(chunk), 0
                    yield chunk
                if not in_haste:
                    version.must_end(offset, where)
                elif version.size is not None and offset < version.size:
                    # What was on its way when the time was up is lost, and a connection that is new is slow.
                    may_haste = offset - began >= AMPLE_BYTES
                    if offset - began < ENOUGH_BYTES:
                        self._connection.be_patient()
            except OutOfRange as error:
                if offset > start:
                    # An answer said that the object is larger than it is.
                    raise _damaged(where) from error
                raise
            except StoreUnavailable:
                failures += 1
                if failures >= PATIENCE.attempts:
                    raise
                pause(0.2 * 2**failures)

    def _at_once(self, name: str, offset: int, version: _Version, where: str) -> Iterator[bytes]:
        """What comes within `AT_ONCE_SECONDS` from `offset` on, in this very thread."""
        options: GetOptions = {"range": {"offset": offset}} if offset else {}
        with translated(where):
            result = self._connection.at_once(lambda store: obstore.get(store, self._prefix + name, options=options))
            if result is None:
                return
            version.must_be(result.meta["e_tag"], result.meta["size"], where)
            with suppress(BaseError):
                for piece in result.stream(min_chunk_size=PIECE_BYTES):
                    yield bytes(piece)

    def _from(self, name: str, offset: int, version: _Version, where: str) -> Iterator[bytes]:
        """The bytes from `offset` on, over one connection."""
        with _answered(where):
            if _awkward(self._prefix + name):
                answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name, Range=f"bytes={offset}-")
                version.must_be(answer["ETag"], offset + answer["ContentLength"], where)
                yield from answer["Body"].iter_chunks(AWKWARD_PIECE_BYTES)
                return
            stream = _Stream(self._connection, self._prefix + name, offset, where)
            version.must_be(stream.etag, stream.size, where)
            while (chunk := stream.next()) is not None:
                yield chunk

    def write(self, name: str, chunks: Iterable[Chunk], size: int, *, last: bool = False) -> None:  # noqa: ARG002
        """See `Files.write`. Small objects take one request, large ones are sent in parts."""
        key, where = self._prefix + name, f"{self._url}/{name}"
        with translated(where, writing=True):
            if _awkward(key):
                self._put_awkward(key, chunks)
            elif size <= SINGLE_PUT_BYTES:
                self._put(key, _joined(chunks))
            else:
                with turn(_large_uploads):
                    self._put_parts(key, chunks, max(PART_BYTES, size // MOST_PARTS))

    def _put(self, key: str, body: Chunk) -> None:
        connection = self._connection
        if connection.at_once(lambda store: obstore.put(store, key, body, use_multipart=False)) is not None:
            return
        writes = connection.tiny_writes if len(body) <= TINY_BYTES else connection.writes
        wait(lambda: obstore.put_async(writes, key, body, use_multipart=False))

    def _put_parts(self, key: str, chunks: Iterable[Chunk], part_bytes: int) -> None:
        self.in_parts = True
        writer = obstore.open_writer_async(self._connection.writes, key, buffer_size=part_bytes, max_concurrency=2)
        for chunk in chunks:
            wait(lambda chunk=chunk: writer.write(chunk))  # type: ignore[misc]
        wait(writer.close)

    def _put_awkward(self, key: str, chunks: Iterable[Chunk]) -> None:
        with tempfile.SpooledTemporaryFile(PART_BYTES) as body:
            for chunk in chunks:
                checkpoint()
                body.write(chunk)
            body.seek(0)
            self._client.put_object(Bucket=self._bucket, Key=key, Body=body)

    def size(self, name: str) -> int:
        """See `Files.size`."""
        with _answered(f"{self._url}/{name}"):
            return int(self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)["ContentLength"])

    def _etag(self, name: str) -> str | None:
        with _answered(f"{self._url}/{name}"):
            return _bare(self._client.head_object(Bucket=self._bucket, Key=self._prefix + name).get("ETag"))

    def delete(self, names: Iterable[str]) -> None:
        """See `Files.delete`; a thousand at a time."""
        keys = (self._prefix + name for name in names)
        while batch := list(islice(keys, 1000)):
            with _answered(self._url, writing=True):
                plain = [{"Key": key} for key in batch if not _awkward(key)]
                for key in filter(_awkward, batch):
                    self._client.delete_object(Bucket=self._bucket, Key=key)
                answer = (
                    self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": plain, "Quiet": True}) if plain else {}
                )
                for failed in answer.get("Errors", ()):
                    raise StoreDenied(
                        f"The store does not let us delete {self._url}/…/{failed.get('Key')}. It said: {failed.get('Code')}"
                    )

    def abandon(self, *, hurry: bool = False) -> None:
        """See `Files.abandon`: uploads in parts that were broken off take room until somebody aborts them."""
        ends = time.monotonic() + HASTE.seconds if hurry else math.inf
        with _answered(self._url, writing=True):
            client = _client(self._location, HASTE) if hurry else self._client
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=self._prefix)
            pages = takewhile(lambda _: time.monotonic() < ends, pages)
            for upload in [upload for page in pages for upload in page.get("Uploads", ())]:
                if time.monotonic() < ends:
                    client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def _joined(chunks: Iterable[Chunk]) -> Chunk:
    """All of them; a single one, as small files are, is not copied."""
    body = tuple(chunks)
    return body[0] if len(body) == 1 else b"".join(body)


class _answered(translated):  # noqa: N801 - reads as a statement
    """`translated`, for what botocore is asked: a time or a number in its answer that is none, or a field that it lacks."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | KeyError) and not isinstance(error, UnicodeEncodeError):
            raise _damaged(self._where) from error
        super().__exit__(kind, error, trace)


def _translated_each(pages: Iterable[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    iterator = iter(pages)
    while True:
        with _answered(where):
            page = next(iterator, None)
        if page is None:
            return
        yield page


def _whole_page(page: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The entries of a page of a listing; a bit that flipped in the name of an XML element must not leave one out."""
    items: list[dict[str, Any]] = page.get("Contents", [])
    # Not every server counts.
    if page.get("KeyCount", len(items)) != len(items) or not all("Key" in item and "Size" in item for item in items):
        raise _damaged(where)
    return items


def _damaged(where: str) -> StoreUnavailable:
    return StoreUnavailable(f"What the store answered for {where} arrived damaged. Try again; check the network.")


def _awkward(key: str) -> bool:
    """Is it a name that obstore cannot hold?"""
    return re.search(r"[\x00-\x1f\x7f]", key) is not None or not {"", ".", ".."}.isdisjoint(key.split("/"))


@cache
def _loader() -> Any:
    """botocore's descriptions of S3: reading them takes 0.15 s, and each session would do it anew."""
    import botocore.session

    return botocore.session.Session().get_component("data_loader")


def _client(location: Location, patience: Patience) -> Any:
    """botocore's client; it also finds endpoint, region and credentials where they are not given."""
    import botocore.session
    from botocore.config import Config

    options = {key: value for key, value in location.options.items() if value}
    session = botocore.session.Session()
    session.register_component("data_loader", _loader())
    region = options.get("region") or os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
    client = session.create_client(
        "s3",
        endpoint_url=options.get("endpoint_url"),
        aws_access_key_id=options.get("access_key_id"),
        aws_secret_access_key=options.get("secret_access_key"),
        region_name=region,
        config=Config(
            s3={"addressing_style": "path"},
            connect_timeout=patience.connect_seconds,
            read_timeout=patience.seconds,
            retries={"total_max_attempts": patience.attempts, "mode": "standard"},
            # Not every server understands the trailers that newer clients add.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            max_pool_connections=32,
        ),
    )
    if _Credentials(client).found is None:
        raise StoreDenied(
            f"There are no credentials for {location.url}. Give access_key_id and secret_access_key in its DatasetStore "
            "document, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws."
        )
    return client


class _Connection:
    """The clients of a bucket: botocore's, and obstore's, each made when it is first needed, for it takes 20 ms."""

    def __init__(self, bucket: str, location: Location) -> None:
        self._bucket, self.client = bucket, _client(location, PATIENCE)
        # False once an object has shown that etags are no MD5 here, as those of encrypted ones.
        self.etags_tell = True
        self._patient_until = 0.0
        # Refuse what is no address now, and not with the first byte.
        _ = self.reads

    @cached_property
    def reads(self) -> S3Store:
        """For what goes on by itself, at the right offset."""
        return self._store(PATIENCE.seconds, retries=0)

    @cached_property
    def tiny_writes(self) -> S3Store:
        """For what is sent in a moment."""
        return self._store(PATIENCE.seconds, retries=PATIENCE.attempts - 1)

    @cached_property
    def writes(self) -> S3Store:
        """For what is sent in bulk."""
        return self._store(PATIENCE.part_seconds, retries=PATIENCE.attempts - 1)

    @cached_property
    def _hasty(self) -> S3Store:
        seconds = min(AT_ONCE_SECONDS, PATIENCE.seconds)
        return self._store(seconds, retries=0, in_all=timedelta(seconds=seconds))

    def at_once(self, ask: Callable[[S3Store], R]) -> R | None:
        """What is asked for in this very thread, which costs a third of what `wait` does.

        `None` where it did not come, whyever, so that it is asked for patiently; so is all else for a while.
        """
        if self.is_patient:
            return None
        checkpoint()
        try:
            return ask(self._hasty)
        except BaseError:
            self.be_patient()
            return None

    @property
    def is_patient(self) -> bool:
        """Has something not come at once, a while ago?"""
        return time.monotonic() < self._patient_until

    def be_patient(self) -> None:
        """Let nothing be asked for at once for a while."""
        self._patient_until = time.monotonic() + PATIENT_SECONDS

    def _store(self, seconds: float, retries: int, in_all: timedelta = timedelta(days=7)) -> S3Store:
        endpoint = self.client.meta.endpoint_url
        client: ClientConfig = {
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=PATIENCE.connect_seconds),
            "read_timeout": timedelta(seconds=seconds),
            # It counts the whole body; silence is what `read_timeout` bounds.
            "timeout": in_all,
        }
        bundle = os.environ.get("AWS_CA_BUNDLE")
        if bundle and endpoint.startswith("https://"):
            client["root_certificate"] = Path(bundle).read_bytes()
        return S3Store(
            self._bucket,
            # The environment's value would win over `endpoint`.
            endpoint=endpoint,
            aws_endpoint_url_s3=endpoint,
            region=self.client.meta.region_name,
            virtual_hosted_style_request=False,
            credential_provider=_Credentials(self.client),
            client_options=client,
            retry_config={
                "max_retries": retries,
                "retry_timeout": timedelta(seconds=seconds * max(retries, 1)),
                "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=2), "base": 2},
            },
        )


def _connection(bucket: str, location: Location) -> _Connection:
    """A bucket's clients, shared for a minute: after that, a login that somebody mended in ~/.aws counts."""
    around = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    options = tuple(sorted(location.options.items()))
    return _connected(bucket, location.scheme, options, around, os.getpid(), int(time.monotonic() // 60))


@lru_cache(maxsize=8)
def _connected(bucket: str, scheme: str, options: tuple[tuple[str, str], ...], *_of: object) -> _Connection:
    return _Connection(bucket, Location(f"{scheme}://{bucket}", dict(options)))


class _Credentials:
    """Hands botocore's credentials to obstore, fresh ones when they run out."""

    def __init__(self, client: Any) -> None:
        self.found = client._request_signer._credentials

    def __call__(self) -> S3Credential:
        frozen = self.found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=10),
        }


def _bare(etag: str | None) -> str | None:
    return (etag or "").strip('"') or None


class _Version:
    """Which object is being read. `wanted` is the etag of a listing, where there is one; `now` asks for today's."""

    def __init__(self, wanted: str | None, now: Callable[[], str | None]) -> None:
        self._wanted, self._now = wanted, now
        self._etag = wanted
        self.size: int | None = None

    def must_be(self, etag: str | None, size: int, where: str) -> None:
        """Note what answered, or raise if it is another object, which a bit that flipped in an answer's head looks like."""
        if self._etag not in (None, _bare(etag)):
            if self._wanted and self._now() != self._wanted:
                raise DatasetChanged(f"{where} was changed while it was read. Run it again once nobody writes there.")
            raise StoreUnavailable(f"{where} was changed while it was read, or arrived damaged. Try again.")
        self._etag, self.size = _bare(etag), size

    def must_end(self, offset: int, where: str) -> None:
        """Return if all of it has come."""
        if offset != self.size:
            raise StoreUnavailable(f"{where} broke off after {offset} of {self.size} bytes. Try again.")


def _is_other(content: bytes, etag: str | None) -> bool:
    """Is it not what the etag says, if that is an MD5?"""
    promised = _bare(etag)
    return promised is not None and len(promised) == 32 and hashlib.md5(content, usedforsecurity=False).hexdigest() != promised


class _Stream:
    """One GET, which ends at once when its thread has to stop.

    A small object is compared with its etag: a record or a ledger has no digest of ours.
    """

    def __init__(self, connection: _Connection, key: str, offset: int, where: str) -> None:
        self._pieces: BytesStream | None = None
        self._whole: bytes | None = None
        wait(lambda: self._open(connection, key, offset, where))

    async def _open(self, connection: _Connection, key: str, offset: int, where: str) -> None:
        result = await obstore.get_async(connection.reads, key, options={"range": {"offset": offset}} if offset else None)
        self.etag, self.size = result.meta["e_tag"], result.meta["size"]
        if self.size - offset <= CHUNK_BYTES:
            self._whole = bytes(await result.bytes_async())
            if not offset and connection.etags_tell and _is_other(self._whole, self.etag):
                again = await obstore.get_async(connection.reads, key)
                if bytes(await again.bytes_async()) != self._whole:
                    raise StoreUnavailable(f"{where} arrived damaged. Try again; check the network.")
                connection.etags_tell = again.meta["e_tag"] != self.etag
        else:
            self._pieces = result.stream(min_chunk_size=CHUNK_BYTES)

    def next(self) -> bytes | None:
        """The next piece, `None` at the end."""
        if self._pieces is None:
            whole, self._whole = self._whole, None
            return whole or None
        return wait(self._next)

    async def _next(self) -> bytes | None:
        assert self._pieces is not None  # noqa: S101
        piece = await anext(self._pieces, None)
        return None if piece is None else bytes(piece)
