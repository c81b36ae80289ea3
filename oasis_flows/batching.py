"""What a batch is going to do: its files listed, cut into shards, and written down in the store before anything runs.

<store>/<output name>/<run id>/
    batch/head.json                 what was asked; written last: from then on the batch can be resumed
         /listing.jsonl, .idx       the files that shards are ranges of
         /layout.json               where each shard ends, and its bytes
         /ledger/<shard>.json       see `ledger`
    shards/<shard>/…                a published run for each shard
    shards.jsonl, failed.jsonl, log.txt, task.json, manifest.jsonl
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from . import oscar, store
from .capacity import Demand, Fit, Node, fit, too_big
from .errors import DatasetError, DescriptionError, NoCapacity
from .include import included
from .job import parse_bytes
from .manifest import check_name
from .plan import HEAD, SHARDS, Part, Plan, as_part
from .record import document
from .sharding import Layout, Shard, by_bytes, by_files, weigh
from .store import Listing, Location, Notes

# So that the last shards of a batch do not leave machines idle for long.
SHARDS_PER_PLACE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a batch is to be run; see the flow for what each means.

    Raises:
        DescriptionError: two of them contradict each other, or one makes no sense.
    """

    files_per_shard: int | None = None
    shards: int | None = None
    max_parallel: int | None = None
    include: str | None = None
    on_failed_files: Literal["fail", "accept"] = "fail"
    max_failed_files: int = 100
    algorithm_retries: int = 0
    oscar_compat: bool = False
    oscar_index: str = oscar.INDEX

    def __post_init__(self) -> None:
        if self.shards is not None and self.files_per_shard is not None:
            raise DescriptionError(
                "Both `shards` and `files_per_shard` are given, and each decides the other. Give one of them."
            )
        least = {"shards": 1, "files_per_shard": 1, "max_parallel": 1, "max_failed_files": 0, "algorithm_retries": 0}
        for name, most in least.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < most):
                raise DescriptionError(
                    f"`{name}` is {value!r} and must be a whole number from {most}. Correct it, or leave it out."
                )
        if self.on_failed_files not in ("fail", "accept"):
            raise DescriptionError(f"`on_failed_files` is {self.on_failed_files!r}. Write fail or accept.")
        if self.include is not None and not self.include.strip():
            raise DescriptionError("`include` is empty. Write a pattern such as *.jpg, or leave it out to take every file.")
        check_name(self.oscar_index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch that is written down. `base` is the folder that the files' names are relative to."""

    plan: Plan
    options: Options
    image: str
    base: Location
    layout: Layout
    bytes: array[int]
    listing_digest: str

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(self.bytes)

    @property
    def listing(self) -> Location:
        """Where the listing that shards are ranges of is saved."""
        return self.plan.output.child(HEAD)

    def shard_plan(self, shard: Shard) -> Plan:
        """The plan of the run that a shard is."""
        return as_part(self.plan, Part(shard=shard, listing=self.listing, base=self.base, oscar=self.options.oscar_compat))

    def file_at(self, number: int) -> str:
        """The name of a file, by its place in the listing."""
        return next(store.read_slice(self.listing, number, number + 1)).path


def stage_whole(batch: Batch, folder: Path) -> Path:
    """Bring the whole dataset to this machine, with an index of the batch's files in it; return the folder to mount.

    Files of a local dataset are linked, not copied.

    Raises:
        DatasetError: the dataset has a file where the index must be.
    """
    whole, _ = store.stage_files(batch.base, partial(store.scan, batch.plan.source), folder)
    index, entries = whole / batch.options.oscar_index, store.read_slice(batch.listing, 0, batch.layout.file_count)
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with index.open("x") as file:
            file.writelines(oscar.index_lines(entries))
    except OSError as error:
        raise DatasetError(
            f"The index {batch.options.oscar_index!r} cannot be put into the dataset's folder: {error.strerror}. If the dataset has a "
            "file of this name, choose another `oscar_index`."
        ) from error
    return whole


def demand_of(plan: Plan) -> Demand:
    """What one container of the plan's algorithm needs; with `memory_max`, as much as it may come to need."""
    algorithm = plan.algorithm
    return Demand(
        cpus=algorithm.cpus,
        memory_bytes=parse_bytes(algorithm.memory_max or algorithm.memory),
        gpus=algorithm.gpu_count if algorithm.gpu else 0,
    )


def check_fits(plan: Plan, nodes: Sequence[Node], headroom: float) -> None:
    """Return if a container of the algorithm fits on some machine, sooner or later.

    Raises:
        NoCapacity: none is large enough, however long one waits.
    """
    if why := too_big(nodes, demand_of(plan), headroom=headroom):
        raise NoCapacity(
            f"{why} Lower `cpus`, `memory` or `gpu_count` in its document, use a larger machine, or raise OASIS_FLOWS_HEADROOM."
        )


def places(plan: Plan, nodes: Sequence[Node], options: Options, headroom: float, *, grows: bool = False) -> tuple[int, Fit]:
    """How many containers may run at once now, and how many fit where.

    Among machines that are made when they are needed (`grows`), what fits nowhere yet is what has one made: a container, or as
    many as the user wants.
    """
    found = fit(nodes, demand_of(plan), headroom=headroom)
    count = max(found.count, options.max_parallel or 1) if grows else found.count
    return min(count, options.max_parallel or count), found


def places_when_empty(plan: Plan, nodes: Sequence[Node], options: Options, headroom: float, *, grows: bool = False) -> int:
    """How many containers could run at once if nothing else did.

    Raises:
        NoCapacity: none, however long one waits.
    """
    if not grows:
        check_fits(plan, nodes, headroom)
    return places(plan, [node.emptied() for node in nodes], options, headroom, grows=grows)[0]


def list_files(plan: Plan, options: Options, folder: Path) -> tuple[Listing, Location]:
    """List the files that the batch is about into a folder of this machine; return what they add up to, and their base.

    Raises:
        DatasetError: there are none.
    """
    known = store.published(plan.source)
    listing = store.write_listing(included(store.scan(plan.source), options.include), folder)
    if not listing.file_count and options.include:
        raise DatasetError(
            f"No file of the dataset {plan.dataset_name} matches `include`, {options.include!r}. Correct the pattern: upper and lower "
            "case count, and one without a slash is about names in any folder."
        )
    if not listing.file_count:
        raise DatasetError(f"The dataset {plan.dataset_name} holds no files. Put files there, or take another dataset.")
    return listing, known.base if known else plan.source


def cut(listing: Listing, options: Options, at_once: int) -> tuple[Layout, array[int]]:
    """The shards of a listing, and their bytes."""
    if options.files_per_shard is not None:
        layout = by_files(listing.file_count, options.files_per_shard)
    else:
        count = options.shards or SHARDS_PER_PLACE * max(1, at_once)
        layout = by_bytes(listing.sizes, count, file_count=listing.file_count, size_bytes=listing.size_bytes)
    return layout, weigh(layout, listing.sizes)


def open_batch(plan: Plan, options: Options, folder: Path, *, image: str, at_once: int) -> Batch:
    """Write a new batch down, or find the one that an earlier attempt of this run wrote.

    `at_once` is how many containers are thought to run at once, where the options do not say how many shards to make.

    Raises:
        DatasetError: there are no files; or they are others than when the batch was begun.
        DescriptionError: it is to go on as another batch than it began.
    """
    notes = Notes(plan.output.child(HEAD))
    listing, base = list_files(plan, options, folder)
    asked = _asked(plan, options, image, listing)
    head = _noted(notes, "head.json", plan.output)
    if head is None:
        store.check_writable(plan.root)
        store.begin(plan.output)
        layout, bytes = cut(listing, options, at_once)
        store.save_listing(folder, plan.output.child(HEAD))
        notes.write("layout.json", json.dumps({"ends": list(layout.ends), "bytes": list(bytes)}).encode())
        notes.write("head.json", json.dumps(asked, indent=2, ensure_ascii=False, default=str).encode())
    else:
        _check_same(
            head,
            json.loads(json.dumps(asked, default=str)),
            partial(store.changes, folder, plan.output.child(HEAD)),
        )
        found = _noted(notes, "layout.json", plan.output) or {}
        layout, bytes = Layout(found.get("ends", ())), array("q", found.get("bytes", ()))
        if layout.file_count != listing.file_count:
            raise DatasetError(
                f"{plan.output.url}/{HEAD}/layout.json tells of {layout.file_count} files, and there are {listing.file_count}. Somebody "
                "removed or changed it; begin a new batch."
            )
    return Batch(plan=plan, options=options, image=image, base=base, layout=layout, bytes=bytes, listing_digest=listing.digest)


def _noted(notes: Notes, name: str, output: Location) -> dict[str, Any] | None:
    """What a note of the batch says; `None` where there is none."""
    content = notes.read(name)
    try:
        return None if content is None else dict(json.loads(content))
    except (ValueError, TypeError):
        raise DatasetError(
            f"{output.url}/{HEAD}/{name}, which says what the batch is, is damaged. Begin a new batch; what this one has published of its "
            f"shards stays in {output.url}/{SHARDS}."
        ) from None


def _asked(plan: Plan, options: Options, image: str, listing: Listing) -> dict[str, Any]:
    return {
        "image": image,
        "algorithm": document(plan),
        "entrypoint": plan.entrypoint,
        "command": plan.command,
        "parameters": dict(plan.parameters),
        "input": plan.source.url,
        "include": options.include,
        "files_per_shard": options.files_per_shard,
        "shards": options.shards,
        "oscar_compat": options.oscar_compat and options.oscar_index,
        "files": {"count": listing.file_count, "bytes": listing.size_bytes, "digest": listing.digest},
    }


def _check_same(began: dict[str, Any], now: dict[str, Any], changes: Callable[[], list[str]]) -> None:
    if began["files"] != now["files"] and began["include"] == now["include"]:
        raise DatasetError(
            f"The input of the batch is not what it was when the batch was begun: {'; '.join(changes())}. Restore it, or begin a new batch."
        )
    for name in now:
        if began.get(name) != now[name]:
            raise DescriptionError(
                f"The batch was begun with another `{name}`: {_difference(began.get(name), now[name])}. Restore it, or begin a new batch."
            )


def _difference(began: object, now: object) -> str:
    """What was, and what is; of documents those fields alone that are others."""
    if not isinstance(began, dict) or not isinstance(now, dict):
        return f"it was {_short(began)} and is {_short(now)}"
    names = [name for name in {**began, **now} if began.get(name) != now.get(name)]
    return "; ".join(f"`{name}` was {_short(began.get(name))} and is {_short(now.get(name))}" for name in names)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}…"
