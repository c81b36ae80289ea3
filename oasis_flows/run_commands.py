"""The commands that run something: one run, or a batch; and the one that only says what a batch would do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from uuid import uuid4

from prefect.client.schemas.objects import State
from pydantic import SecretStr

from . import documents, progress, settings
from .batch_record import called_by
from .batching import Options as BatchOptions, cut, demand_of, list_files, places, places_when_empty
from .blocks import Algorithm, Dataset, DatasetStore
from .capacity import described, quantity, too_big
from .command import from_text
from .errors import AlgorithmFailed, DescriptionError, OasisError
from .flows.algorithm_task import algorithm_task
from .flows.batch import batch as batch_flow
from .job import counted, human_bytes
from .ledger import Ledger
from .machine import grows, nodes_now, read_nodes
from .oscar import parse_config, resources_of
from .oscar_cluster import ask_service
from .plan import Plan, plan_run
from .progress import Bar
from .running import LogSource, begin_again, open_log
from .schedule import Ending
from .settings import Settings
from .verdict import PUBLISH, judge
from .work_pool import WINDOW

Options = argparse.Namespace

# How much of Prefect's log is shown on stderr; `main` sets it, unless the user did.
CONSOLE_LEVEL = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"


def run(options: Options) -> int:
    given = _given(options)
    with _shown():
        state = cast(State[Any], algorithm_task(**given, return_state=True))
    return _end(state, as_json=options.json)


def _published(result: object, url: str) -> bool:
    """Is anything of the run in its store? Not of one that failed before its container had ended."""
    if isinstance(result, AlgorithmFailed):
        return result.log.startswith(url)
    return isinstance(result, Dataset) or (isinstance(result, OasisError) and result.stage == PUBLISH)


def batch(options: Options) -> int:
    given = _given(options)
    chosen = _batch_options(options)
    # What is wrong with the options is said before there is a run of them.
    BatchOptions(**chosen)
    given = {**given, **chosen, **({"fan_out": options.fan_out} if options.fan_out else {})}
    with _shown(), called_by(_oscar_words(options)):
        if options.resume:
            state = begin_again(options.resume, batch_flow, given, settings.current())
        else:
            state = cast(State[Any], batch_flow(**given, return_state=True))
    return _end(state, as_json=options.json, in_parts=True)


def plan_batch(options: Options) -> int:
    here, given = settings.current(), _given(options)
    chosen = BatchOptions(**_batch_options(options))
    plan = plan_run(
        documents.resolved(Algorithm, given["algorithm"]),
        documents.resolved(Dataset, given["input_dataset"]),
        output_name=given["output_name"],
        store=documents.load(DatasetStore, given["store"]) if given["store"] else documents.find(DatasetStore, "default"),
        parameters=given["parameters"],
        settings=here,
        run_id=str(uuid4()),
        attempt=1,
    )
    facts = _planned(plan, chosen, *_room(plan, chosen, options, here))
    if options.resume:
        facts["finished"] = _finished(open_log(options.resume, here))
    print(json.dumps(facts) if options.json else "\n".join(_told(facts)))
    return 0


def _room(plan: Plan, chosen: BatchOptions, options: Options, here: Settings) -> tuple[int, dict[str, Any]]:
    """How many containers the shards are made for, and what there is to say of how many run at once."""
    if options.fan_out == "work-pool":
        most = chosen.max_parallel or WINDOW
        limit = "max_parallel" if chosen.max_parallel else "the pool, and its workers"
        return most, {"nodes": [], "at_once": most, "limit": limit, "too_big": None}
    nodes = read_nodes(Path(options.capacity)) if options.capacity else nodes_now(here)
    more = grows(here) and not options.capacity
    at_once, found = places(plan, nodes, chosen, here.headroom, grows=more)
    why = "" if more else too_big(nodes, demand_of(plan), headroom=here.headroom)
    most = 1 if why else places_when_empty(plan, nodes, chosen, here.headroom, grows=more)
    fits = [
        {"name": node.name, "free": described(node, here.headroom), "fit": count}
        for node, count in zip(nodes, found.nodes, strict=True)
    ]
    limit = "max_parallel" if at_once < found.count else found.limit
    return most, {"nodes": fits, "at_once": at_once, "limit": limit, "too_big": why or None}


def _planned(plan: Plan, chosen: BatchOptions, most: int, room: Mapping[str, Any]) -> dict[str, Any]:
    """What a batch would do that began now."""
    with TemporaryDirectory() as folder, Bar() as bar:
        listing, _ = list_files(plan, chosen, Path(folder))
        bar.show("found", listing.file_count, None, listing.size_bytes, None)
    layout, bytes = cut(listing, chosen, most)
    files = [shard.files for shard in layout]
    return {
        "files": listing.file_count,
        "bytes": listing.size_bytes,
        "needs": str(demand_of(plan)),
        **room,
        "shards": len(layout),
        "files_per_shard": [min(files), max(files)],
        "bytes_per_shard": [min(bytes), max(bytes)],
    }


def _finished(source: LogSource) -> dict[str, int]:
    """What an earlier run of the batch has done."""
    rows = list(Ledger(source.kept).rows()) if source.kept else []
    done = [row.files[1] - row.files[0] for row in rows if row.ending is Ending.DONE]
    alone = sum(row.ending is not Ending.DONE and row.files[1] - row.files[0] == 1 for row in rows)
    return {"shards": len(done), "files": sum(done), "failed_files": alone}


def _told(facts: Mapping[str, Any]) -> Iterator[str]:
    """The same in words."""
    yield f"files      {facts['files']}, {human_bytes(facts['bytes'])}"
    yield f"needs      {facts['needs']} for each container"
    for node in facts["nodes"]:
        yield f"capacity   {node['free']}: {node['fit']} fit"
    yield f"at once    {facts['at_once']} now; the limit is {facts['limit']}"
    if facts["too_big"]:
        yield f"never      {facts['too_big']}"
    (few, many), (light, heavy) = facts["files_per_shard"], facts["bytes_per_shard"]
    yield f"shards     {facts['shards']}, of {few} to {many} files, {human_bytes(light)} to {human_bytes(heavy)}"
    if done := facts.get("finished"):
        yield f"finished   {counted(done['shards'], 'shard')}, {counted(done['files'], 'file')}; {done['failed_files']} failed alone"


def _given(options: Options) -> dict[str, Any]:
    """The parameters that all flows have. Documents stay names, and are known to exist."""
    if getattr(options, "oscar_config", None):
        return _given_by_oscar(options)
    if getattr(options, "service_cpus", None) or getattr(options, "service_memory", None):
        raise DescriptionError(
            "--service-cpus and --service-memory are about the service of an OSCAR-Batch configuration, and there is none. Give "
            "--oscar-config, or write `cpus` and `memory` into the Algorithm document."
        )
    if options.dataset is None:
        raise DescriptionError("There is no DATASET. Give the name of a Dataset document, or --oscar-config.")
    algorithm = documents.load(Algorithm, options.algorithm)
    documents.load(Dataset, options.dataset)
    if options.store:
        documents.load(DatasetStore, options.store)
    return {
        "algorithm": options.algorithm,
        "input_dataset": options.dataset,
        "output_name": options.output_name,
        "store": options.store,
        "parameters": from_text(algorithm.parameters, _pairs(options.parameter)) or None,
    }


def _given_by_oscar(options: Options) -> dict[str, Any]:
    """The parameters that a configuration of OSCAR-Batch stands for. What is secret in it goes into no document."""
    if options.dataset is not None:
        raise DescriptionError(
            "Both DATASET and --oscar-config are given, and each says where the files are. Give one of them."
        )
    try:
        config = parse_config(Path(options.oscar_config).read_bytes())
    except OSError as error:
        raise DescriptionError(
            f"{options.oscar_config} cannot be read: {error.strerror}. Give the path of a config.json."
        ) from None
    said = {"cpu": ("--service-cpus", options.service_cpus), "memory": ("--service-memory", options.service_memory)}
    resources = {name: _amount(*each) for name, each in said.items() if each[1] is not None}
    if len(resources) < len(said):
        resources = {**ask_service(config), **resources}
    algorithm = documents.load(Algorithm, options.algorithm)
    store = DatasetStore(
        url=config.dataset_url,
        endpoint_url=config.endpoint_url,
        access_key_id=config.access_key,
        secret_access_key=SecretStr(config.secret_key),
    )
    options.oscar_compat = True
    options.oscar_index = options.oscar_index or config.index
    return {
        "algorithm": algorithm.model_copy(update=resources_of(resources)),
        "input_dataset": Dataset(url=config.dataset_url, store=store),
        "output_name": options.output_name,
        "store": options.store,
        "parameters": from_text(algorithm.parameters, _pairs(options.parameter)) or None,
    }


def _amount(option: str, text: str) -> str:
    try:
        quantity(text)
    except DescriptionError as error:
        raise DescriptionError(f"{option}: {error}") from None
    return text


def _oscar_words(options: Options) -> list[str]:
    """What a command line says again to mean the same configuration of OSCAR-Batch; nothing where there is none."""
    if not options.oscar_config:
        return []
    service = [("--service-cpus", options.service_cpus), ("--service-memory", options.service_memory)]
    said = [word for name, value in service if value is not None for word in (name, value)]
    return [options.algorithm, "--oscar-config", str(Path(options.oscar_config).absolute()), *said]


def _batch_options(options: Options) -> dict[str, Any]:
    """Those of a batch that were given."""
    names = [field.name for field in fields(BatchOptions)]
    return {name: value for name in names if (value := getattr(options, name, None)) is not None}


@contextmanager
def _shown() -> Iterator[None]:
    """Show transfers on a terminal; among the lines of Prefect's log a bar has no place."""
    quiet = os.environ.get(CONSOLE_LEVEL) == "CRITICAL"
    with Bar(wanted=quiet) as bar, progress.heard_by(bar.show):
        yield


def _end(state: State[Any], *, as_json: bool, in_parts: bool = False) -> int:
    """Print what became of a run; return the command's exit code. What is done in parts is in the store from the beginning."""
    result = state.result(raise_on_failure=False)
    _print_run(state, result, as_json=as_json, in_parts=in_parts)
    if isinstance(result, Dataset):
        return 0
    return result.exit_code if isinstance(result, OasisError) else 3


def _pairs(written: list[str]) -> dict[str, str]:
    pairs = dict(pair.partition("=")[::2] for pair in written if "=" in pair)
    if bad := [pair for pair in written if "=" not in pair]:
        raise DescriptionError(f"The parameter {bad[0]!r} has no value. Write --parameter NAME=VALUE.")
    return pairs


def _print_run(state: State[Any], result: object, *, as_json: bool, in_parts: bool) -> None:
    run_id = str(state.state_details.flow_run_id)
    source = open_log(run_id, settings.current())
    tail = b"".join(source.tail(10)).decode(errors="replace").splitlines()
    facts = {
        "flow_run_id": run_id,
        "state": state.name,
        "status": "Succeeded" if state.is_completed() else "Failed",
        "message": state.message if not state.is_completed() else None,
        "verdict": judge(result).to_json() if isinstance(result, OasisError) else None,
        "dataset": result._block_document_name if isinstance(result, Dataset) else None,
        "url": source.url if source.url and (in_parts or _published(result, source.url)) else None,
        "ui_url": source.ui_url,
        "log_tail": tail,
    }
    if as_json:
        print(json.dumps(facts))
        return
    print(f"{facts['status']} ({facts['state']}): run {run_id}")
    if isinstance(result, Exception):
        print(f"oasis-flows: {result}", file=sys.stderr)
    if facts["dataset"]:
        found = cast(Dataset, result)
        print(f"dataset/{facts['dataset']}: {counted(found.file_count or 0, 'file')}, {human_bytes(found.size_bytes)}")
    print(f"in {facts['url']}" if facts["url"] else "nothing was published")
