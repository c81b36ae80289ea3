"""What each command of `oasis-flows` does. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from . import catalogue, documents, item, listing, marketplace, openpai, reaper, settings, store as stores
from .blocks import Algorithm, Dataset, DatasetStore
from .doctor import examine
from .documents import denied
from .errors import DescriptionError
from .job import counted, human_bytes
from .manifest import Entry, Tally, to_line
from .plan import checked_name, location, prerequisites_of
from .progress import Bar
from .run_commands import batch, plan_batch, run
from .running import follow, open_log, split_lines

__all__ = ["apply", "batch", "check", "dataset_add", "dataset_get", "dataset_ls", "doctor", "log", "plan_batch", "reap", "run"]

Options = argparse.Namespace


def apply(options: Options) -> int:
    for key, outcome in catalogue.apply(catalogue.read(Path(options.folder))):
        print(f"{outcome:9} {key}")
    return 0


def check(options: Options) -> int:
    found = catalogue.read(Path(options.folder))
    print(f"{len(found)} documents, nothing to correct.")
    return 0


def dataset_add(options: Options) -> int:
    checked_name(options.name)
    store = documents.load(DatasetStore, options.store) if options.store else None
    url = options.url if "://" in options.url else str(Path(options.url).expanduser().absolute())
    dataset = Dataset(url=url, store=store)
    existing = documents.find(Dataset, options.name)
    if existing is not None and existing.url != dataset.url:
        raise DescriptionError(
            f"There is already a dataset {options.name!r}: {existing.url}. Choose another name, or delete it first: "
            f"prefect block delete dataset/{options.name}."
        )
    tally = Tally()
    with Bar() as bar:
        for entry in stores.scan(location(dataset), hash=location(dataset).is_local):
            tally.add(entry)
            bar.show("found", tally.file_count, None, tally.size_bytes, None)
    found = tally.summary()
    if not found.file_count:
        raise DescriptionError(f"The folder {url} holds no files. Put the files there first, or correct the path.")
    dataset = Dataset(
        url=url, store=store, file_count=found.file_count, size_bytes=found.size_bytes, manifest_digest=found.digest
    )
    dataset.save(options.name, overwrite=True)
    if options.json:
        print(
            json.dumps(
                {"name": options.name, **dataset.model_dump(include={"url", "file_count", "size_bytes", "manifest_digest"})}
            )
        )
    else:
        print(f"dataset/{options.name}: {counted(found.file_count, 'file')}, {human_bytes(found.size_bytes)} in {url}")
    return 0


def dataset_ls(options: Options) -> int:
    for entry in stores.scan(location(documents.load(Dataset, options.name)), hash=False):
        print(to_line(entry).decode().rstrip("\n") if options.json else f"{human_bytes(entry.bytes):>12}  {_printable(entry)}")
    return 0


def dataset_get(options: Options) -> int:
    dataset = documents.load(Dataset, options.name)
    with Bar() as bar:
        found = stores.fetch_to(location(dataset), Path(options.folder), progress=partial(bar.show, "copied"))
    print(f"{counted(found.file_count, 'file')}, {human_bytes(found.size_bytes)} in {options.folder}")
    return 0


def prerequisites_show(options: Options) -> int:
    algorithm = documents.load(Algorithm, options.algorithm)
    found = prerequisites_of(algorithm, settings.current())
    if options.json:
        print(json.dumps(listing.as_json(options.algorithm, found)))
        return 0
    for line in listing.lines(options.algorithm, found):
        print(line)
    return 0


def marketplace_ls(options: Options) -> int:
    for catalogue_name in settings.current().marketplaces:
        for entry in marketplace.entries(catalogue_name):
            facts = {"marketplace": catalogue_name, "name": entry.name, "id": entry.id, "source": entry.source}
            print(json.dumps(facts) if options.json else f"{entry.name}  {entry.source}")
    return 0


def marketplace_show(options: Options) -> int:
    uri = options.name if "://" in options.name else f"marketplace://name/{options.name}"
    found = marketplace.finder(settings.current())(uri)
    print(f"{uri.partition('#')[0]}#sha256={found.sha256}\nfrom {found.source}\n")
    print((settings.current().specifications / found.sha256).read_text().rstrip("\n"))
    return 0


def import_openpai(options: Options) -> int:
    try:
        job = item.loaded(Path(options.job).read_text())
    except OSError as error:
        raise DescriptionError(
            f"The job {options.job} cannot be read. Correct the path. The cause: {error.strerror}"
        ) from error
    if not isinstance(job, dict):
        raise DescriptionError(f"The file {options.job} holds no OpenPAI job. Give a job of protocol version 2.")
    made = openpai.documents_of(job, Path(options.job).stem)
    for path in catalogue.write(made.documents, Path(options.folder)):
        print(f"written   {path}")
    for what in made.left_out:
        print(f"not carried over: {what}", file=sys.stderr)
    return 0


def log(options: Options) -> int:
    source = open_log(options.run, settings.current())
    chunks: Iterable[bytes]
    if options.follow:
        chunks = follow(source)
    elif options.tail is not None:
        chunks = source.tail(options.tail)
    else:
        chunks = source.read()
    left = options.head
    for chunk in chunks:
        if left is not None:
            lines = split_lines(chunk)[:left]
            left -= sum(line.endswith(b"\n") for line in lines)
            chunk = b"".join(lines)
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        if left == 0:
            break
    return 0


def reap(options: Options) -> int:
    here = settings.current()
    if options.wait:
        # A service that stops sends SIGTERM: then nobody comes back for what is left.
        signal.signal(signal.SIGTERM, _raise_hurry)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            for reaped in reaper.reap_until_quiet(here):
                _print_reaped(reaped, as_json=options.json)
        except _Hurry:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            options.now = True
        else:
            return 0
    _print_reaped(reaper.reap(here, now=options.now), as_json=options.json)
    return 0


class _Hurry(BaseException):
    """SIGTERM arrived."""


def _raise_hurry(*_: object) -> None:
    raise _Hurry


def _print_reaped(reaped: reaper.Reaped, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(reaped)))
        return
    for run_id in reaped.runs:
        print(f"told Prefect the end of run {run_id}, whose process is gone")
    for run_id in reaped.containers:
        print(f"removed the container of run {run_id}")
    for run_id in reaped.workspaces:
        print(f"removed the workspace of run {run_id}")
    for name in reaped.caches:
        print(f"removed what a prerequisite had kept in caches/{name} and nobody had used for long")
    print(f"{counted(len(reaped.containers), 'container')} and {counted(len(reaped.workspaces), 'workspace')} removed.")


def doctor(options: Options) -> int:
    healthy = True
    for finding in examine(settings.current()):
        healthy &= finding.status != "missing"
        if options.json:
            print(
                json.dumps({"check": finding.check, "status": finding.status, "found": finding.found, "remedy": finding.remedy})
            )
        else:
            print(f"{finding.status:8} {finding.check:10} {finding.found}")
            if finding.remedy:
                print(f"{'':19} → {finding.remedy}")
    return 0 if healthy else 3


def translated(error: Exception) -> tuple[str, int]:
    """A sentence and an exit code for an exception that is not ours."""
    text = " ".join(str(error).split())
    if refusal := denied(error):
        return str(refusal), refusal.exit_code
    if type(error).__module__.startswith("pydantic"):
        return f"{'; '.join(catalogue.problems_of(cast(Any, error)))}.", 2
    if type(error).__module__.startswith(("httpx", "httpcore")):
        advice = "Check PREFECT_API_URL, or start one: prefect server start."
        return f"the Prefect server does not answer ({type(error).__name__}: {text}). {advice}", 3
    return f"{type(error).__name__}: {text}. Set OASIS_FLOWS_TRACEBACK=1 to see where.", 3


def _printable(entry: Entry) -> str:
    return entry.path if entry.path.isprintable() else repr(entry.path)
