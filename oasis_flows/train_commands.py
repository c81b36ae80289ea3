"""The commands about trains."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast
from uuid import uuid4

from prefect.client.schemas.objects import State

from . import documents, lineage, settings, visit_record
from .asking import Train, check_inside, describe, summarise
from .blocks import Station
from .engines.image_archive import read_archive, read_layers
from .errors import ChainBroken, DescriptionError, OasisError, ProtocolError
from .fetched import drop
from .flows.train import Successor, train
from .flows.train_route import train_route as route_flow
from .job import counted, human_bytes
from .lineage import Content
from .machine import image_engine
from .protocol import Description
from .running import begin_again
from .settings import Settings
from .station_keys import signing_key, trusted
from .visit import Visit, plan_visit
from .visiting import check, prepare, results_json
from .workspace import Workspace, open_workspace

Options = argparse.Namespace


def train_describe(options: Options) -> int:
    here = settings.current()
    with _arrived(options, Station(station_id=1), here) as (visit, arrived, workspace):
        found = describe(visit, arrived, workspace, here)
        summary = found.summary
        if summary is None:
            with suppress(ProtocolError):
                summary = summarise(visit, found.generation, arrived.image, workspace, here)
    if options.json:
        print(json.dumps(_described(found, summary, arrived)))
        return 0
    print(f"Train API {found.generation}, {counted(len(arrived.chain), 'visit')} so far")
    for requirement in found.demand.requirements:
        choices = f" ({', '.join(requirement.choices)})" if requirement.choices else ""
        print(f"requires  {requirement.name}: {requirement.target}{choices}  {requirement.description}".rstrip())
    for clause in found.demand.formula:
        print(f"needs     {found.demand.in_words(clause)}")
    print(f"summary   {summary if summary is not None else 'it gives none'}")
    for warning in found.demand.warnings:
        print(warning, file=sys.stderr)
    return 0


def _described(found: Description, summary: str | None, arrived: Train) -> dict[str, Any]:
    return {
        "image": arrived.image,
        "api": found.generation,
        "visits": len(arrived.chain),
        "requirements": [asdict(requirement) for requirement in found.demand.requirements],
        "needs": [found.demand.in_words(clause) for clause in found.demand.formula],
        "summary": summary,
        "unknown": dict(found.unknown),
        "warnings": list(found.demand.warnings),
    }


def train_check(options: Options) -> int:
    here, station = settings.current(), documents.load(Station, options.station)
    with _arrived(options, station, here) as (visit, arrived, workspace):
        found = describe(visit, arrived, workspace, here)
        results, missing = check(visit, found)
        inside, said = ((), ()) if missing else check_inside(visit, arrived, found, workspace, here)
    facts = {
        "station": results_json(results, reasons=True),
        "train": results_json(inside, reasons=True),
        "missing": [*missing, *said],
    }
    if options.json:
        print(json.dumps(facts))
        return 2 if missing or said else 0
    for who, rows in (("station", results), ("train", inside)):
        for row in rows:
            print(f"{'met' if row.met else 'not met':8} {row.name}, says the {who}{'' if row.met else f': {row.reason}'}")
    if missing or said:
        where = f"Set it in the Station document {options.station}."
        print(f"The station would refuse the train: {'; '.join((*missing, *said))}. {where}")
        return 2
    print("All that the train requires is met.")
    return 0


def train_run(options: Options) -> int:
    documents.load(Station, options.station)
    state = train(
        options.image,
        options.station,
        api=options.api,
        track_info=options.track_info,
        user_data=options.user_data,
        return_state=True,
    )
    return _end(cast(State[Any], state), as_json=options.json)


def train_route(options: Options) -> int:
    for name in options.stations:
        documents.load(Station, name)
    given = {
        "image": options.image,
        "stations": options.stations,
        "api": options.api,
        "track_info": options.track_info,
        "user_data": options.user_data,
    }
    if options.resume:
        state = begin_again(options.resume, route_flow, given, settings.current())
    else:
        state = cast(State[Any], route_flow(**given, return_state=True))
    return _end(state, as_json=options.json)


def train_verify(options: Options) -> int:
    here, path = settings.current(), Path(options.what)
    keys = trusted(here)
    if path.is_dir():
        findings = visit_record.verify_folder(path, keys)
    elif path.is_file():
        findings = visit_record.verify_image(_content_of(path), keys)
    else:
        content = image_engine(here).content(options.what)
        if content is None:
            raise DescriptionError(
                f"There is neither a file, nor a folder, nor an image of this engine called {options.what!r}. Pull the image first: a record "
                "is checked offline."
            )
        findings = visit_record.verify_image(content, keys)
    if options.json:
        print(json.dumps(visit_record.envelope_rows(findings)))
        return 0
    for finding in findings:
        left = finding.link["difference"]
        print(
            f"holds     visit {finding.number}, at {finding.station}, {finding.link['finished_at']}: {human_bytes(left['bytes'])} left"
        )
    print(f"The record of {counted(len(findings), 'visit')} holds, and the train is what it says.")
    return 0


def train_key(options: Options) -> int:
    station = documents.load(Station, options.station)
    print(lineage.public_key(signing_key(options.station, station.signing_key, settings.current())))
    return 0


def _content_of(archive: Path) -> Content:
    """What is in an archive, its layers by their own bytes."""
    label = f"The image file {archive}"
    with archive.open("rb") as file:
        found = read_archive(file, label)
        config = json.loads(found.config_bytes)
        digests = {name: _sha256(body) for name, body in read_layers(file, found, label)}
    layers = tuple(f"sha256:{digests[name]}" for name in found.layers)
    promised = tuple(config["rootfs"]["diff_ids"])
    for number, (is_now, was) in enumerate(zip(layers, promised, strict=True), 1):
        if is_now != was:
            raise ChainBroken(f"Layer {number} of {archive} is not the one that its image names. Its bytes were changed.")
    return Content(
        config=config.get("config") or {},
        layers=layers,
        platform=f"{config.get('os')}/{config.get('architecture')}",
        history=lineage.steps(config.get("history") or (), "created_by", "comment"),
    )


def _sha256(body: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while data := body.read(1 << 20):
        digest.update(data)
    return digest.hexdigest()


@contextmanager
def _arrived(options: Options, station: Station, here: Settings) -> Iterator[tuple[Visit, Train, Workspace]]:
    """A train that is only asked, and a workspace for that. Nothing of either stays."""
    run_id = f"ask-{uuid4()}"
    visit = plan_visit(
        options.image,
        station,
        generation=options.api,
        track_info=None,
        user_data=None,
        settings=here,
        run_id=run_id,
        attempt=1,
    )
    with open_workspace(here.workspaces, run_id) as workspace:
        try:
            arrived = prepare(visit, workspace, here, name=visit.image)
            try:
                yield visit, arrived, workspace
            finally:
                for name in arrived.fetched:
                    drop(image_engine(here), name, workspace)
        finally:
            workspace.remove()


def _end(state: State[Any], *, as_json: bool) -> int:
    result = state.result(raise_on_failure=False)
    facts = {
        "flow_run_id": str(state.state_details.flow_run_id),
        "state": state.name,
        "status": "Succeeded" if state.is_completed() else "Failed",
        "message": None if state.is_completed() else state.message,
        "image": result.image if isinstance(result, Successor) else result if isinstance(result, str) else None,
        "record": result.record if isinstance(result, Successor) else None,
    }
    if as_json:
        print(json.dumps(facts))
    else:
        print(f"{facts['status']} ({facts['state']}): run {facts['flow_run_id']}")
        if not state.is_completed():
            print(f"oasis-flows: {result if isinstance(result, Exception) else state.message}", file=sys.stderr)
        if facts["image"]:
            print(f"the train: {facts['image']}")
        if facts["record"]:
            print(f"the record: {facts['record']}")
    if state.is_completed():
        return 0
    return result.exit_code if isinstance(result, OasisError) else 1
