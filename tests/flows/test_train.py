"""Visits, over a real engine, a real registry and a real server."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.system import Secret
from prefect.client.schemas.objects import State

from oasis_flows import settings, visit_record
from oasis_flows.blocks import Station
from oasis_flows.engines.docker_layer import DRAFTS
from oasis_flows.engines.docker_spec import PACKAGE, PACKAGE_NAME
from oasis_flows.errors import AlgorithmFailed, ChainBroken, ProtocolError, TrainFailed, TrainRefused, TrainStopped
from oasis_flows.flows.train import train
from oasis_flows.station_keys import trusted
from tests.servers.registry import Registry
from tests.trains import ADD, MODEL, SUCCESS, ended, one, train_image, v1

SECRET = "s3cret-of-the-station"
URL = "https://data.example.org/fhir-of-this-station"


@pytest.fixture
def image(docker_api: Any, tmp_path: Path) -> Iterator[Callable[..., str]]:
    with ExitStack() as made:
        yield lambda script, name="": made.enter_context(train_image(docker_api, tmp_path, script, name))


@pytest.fixture
def station(prefect_server: object, here: Path) -> Callable[..., Station]:
    Secret(value=SECRET).save("station-token", overwrite=True)

    def make(name: str = "hospital-a", **changes: Any) -> Station:
        given: dict[str, Any] = {
            "station_id": 1,
            "environment": {"PHT_URL": URL},
            "secret_environment": {"PHT_TOKEN": "station-token"},
            "memory": "128MiB",
        } | changes
        made = Station(**given)
        made.save(name, overwrite=True)
        return made

    return make


def visit(image: str, station: Station | str, **changes: Any) -> State[Any]:
    return train(image, station, return_state=True, **changes)  # type: ignore[return-value]


def left_behind(api: Any, here: Path) -> list[str]:
    """Containers, drafts and workspaces of visits."""
    containers = [row["Names"][0] for row in api.containers(all=True, filters={"label": f"{PACKAGE}={PACKAGE_NAME}"})]
    spaces = [path.name for path in (here / "workspaces").glob("*")]
    return spaces + [name for name in containers if any(space in name for space in spaces)]


def saved(api: Any, reference: str) -> bytes:
    return b"".join(api.get_image(reference))


def members(archive: bytes) -> dict[str, bytes]:
    """Every file in a saved image, and every file in its layers."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            body = tar.extractfile(member) if member.isreg() else None
            found[member.name] = body.read() if body else b""
    return found


@pytest.mark.parametrize("script", [v1(), one()], ids=["V1", "1.0"])
def test_a_train_visits_and_travels_on(docker_api, image, station, here, registry: Registry, script):
    name = image(script)

    state = visit(name, station(registry=f"{registry.address}/trains"))

    assert state.is_completed(), state.message
    successor = state.result()
    assert successor.image.startswith(f"{registry.address}/trains/train_")
    assert left_behind(docker_api, here) == []
    docker_api.pull(successor.image)
    try:
        archive = members(saved(docker_api, successor.image))
        seen = docker_api.inspect_image(successor.image)
    finally:
        docker_api.remove_image(successor.image)
    everything = b"".join(archive.values())
    assert SECRET.encode() not in everything
    assert URL.encode() not in everything
    assert seen["Config"]["Env"] == ["PATH=/bin", "FROM_IMAGE=yes"]
    assert seen["Config"]["Labels"]["io.oasis.train.station"] == "1"
    record = json.loads((Path(successor.record) / "record.json").read_text())
    assert record["verdict"]["code"] == "ok"
    changes = [json.loads(line) for line in (Path(successor.record) / "difference.jsonl").read_text().splitlines()]
    assert [(change["path"], change["kind"]) for change in changes] == [(MODEL[1:], "changed")]
    (finding,) = visit_record.verify_folder(Path(successor.record), trusted(settings.current()))
    assert finding.station == "hospital-a"
    assert finding.link["difference"]["changed"] == 1
