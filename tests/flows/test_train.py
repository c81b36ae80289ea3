"""Visits, over a real engine, a real registry and a real server."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import docker.errors
import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect_docker.credentials import DockerRegistryCredentials

from oasis_flows import lineage, settings, visit_record
from oasis_flows.__main__ import main
from oasis_flows.blocks import Station
from oasis_flows.engines.docker import DockerEngine
from oasis_flows.engines.docker_layer import DRAFTS, _draft, _place
from oasis_flows.engines.docker_spec import LEASE, PACKAGE, PACKAGE_NAME, RUN_ID
from oasis_flows.errors import AlgorithmFailed, ChainBroken, ProtocolError, TrainFailed, TrainRefused, TrainStopped
from oasis_flows.flows.station import train_station
from oasis_flows.flows.train import train
from oasis_flows.reaper import reap, sweep
from oasis_flows.registry_index import RegistryIndex
from oasis_flows.running import begin_again
from oasis_flows.station_keys import signing_key, trusted
from tests.servers.engine import eventually
from tests.servers.prefect import PrefectServer
from tests.servers.registry import Registry
from tests.trains import ADD, MODEL, SUCCESS, ended, one, train_image, v1, zero

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


def error_of(state: State[Any]) -> Any:
    return state.result(raise_on_failure=False)


def containers(api: Any, here: Path) -> list[dict[str, Any]]:
    """The containers of this test's visits."""
    rows = api.containers(all=True, filters={"label": f"{PACKAGE}={PACKAGE_NAME}"})
    return [row for row in rows if row["Labels"].get(LEASE, "").startswith(f"{here}/")]


def running(api: Any, here: Path) -> list[dict[str, Any]]:
    """The containers in which trains run their algorithms now."""
    return [row for row in containers(api, here) if "run_algorithm" in row["Command"] and row["State"] == "running"]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(docker_api: Any, here: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """No container, draft, workspace or image of a test's visits outlives it."""
    before = {name for row in docker_api.images() for name in row.get("RepoTags") or ()}
    yield
    assert list((here / "workspaces").glob("*")) == []
    assert [row["Names"] for row in containers(docker_api, here)] == []
    after = {name for row in docker_api.images() for name in row.get("RepoTags") or ()} - before
    assert [name for name in after if name.startswith(f"{DRAFTS}:") and name.endswith(_place(here / "workspaces"))] == []
    assert [name for name in after if "/trains/" in name] == []


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


@pytest.mark.parametrize("script", [zero(), v1(), one()], ids=["0.x", "V1", "1.0"])
def test_a_train_visits_and_travels_on(docker_api, image, station, here, registry: Registry, script):
    name = image(script)

    state = visit(name, station(registry=f"{registry.address}/trains"))

    assert state.is_completed(), state.message
    successor = state.result()
    assert successor.image.startswith(f"{registry.address}/trains/train_")
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
    labels = {key: text for key, text in seen["Config"]["Labels"].items() if key.startswith("io.oasis.train.")}
    assert labels["io.oasis.train.station"] == "1"
    assert labels["io.oasis.train.station-name"] == "hospital-a"
    assert labels["io.oasis.train.predecessor"].startswith("sha256:")
    assert datetime.fromisoformat(labels["io.oasis.train.time"]).tzinfo is not None
    record = json.loads((Path(successor.record) / "record.json").read_text())
    assert record["verdict"]["code"] == "ok"
    changes = [json.loads(line) for line in (Path(successor.record) / "difference.jsonl").read_text().splitlines()]
    assert [(change["path"], change["kind"]) for change in changes] == [(MODEL[1:], "changed")]
    (finding,) = visit_record.verify_folder(Path(successor.record), trusted(settings.current()))
    assert finding.station == "hospital-a"
    assert finding.link["difference"]["changed"] == 1


def test_a_login_is_used_and_not_written_down(docker_api, image, station, private_registry: Registry):
    login = private_registry.login
    assert login is not None
    place, name = f"{private_registry.address}/trains", image(v1())
    refused = visit(name, station(registry=place), api="V1")
    assert refused.is_failed()
    assert "Give registry_credentials in the Station document" in str(error_of(refused))
    credentials = DockerRegistryCredentials(username=login.username, password=login.password, registry_url=login.registry)
    credentials.save("trains", overwrite=True)

    given = station(registry=place, registry_credentials=credentials)
    first = visit(name, given, api="V1").result()
    second = visit(first.image, given, api="V1").result()

    assert second.image.startswith(f"{place}/")
    record = "".join(path.read_text() for path in Path(second.record).iterdir())
    assert login.password not in record
    findings = visit_record.verify_folder(Path(second.record), trusted(settings.current()))
    assert [finding.number for finding in findings] == [1, 2]
    assert findings[1].link["predecessor"]["image"] == first.image
    assert (Path(second.record) / "summary.txt").read_text() == "counted  to 2"


REBASE = '{"from": "%s", "nextTrainTags": ["next-tag"], "exportFiles": [{"absolutePhysicalPath": "%s"}]}'


def test_a_rebase_carries_exported_files_only(docker_api, image, station, here):
    base = image(one())
    run = f"{ADD}; echo patient > /leaked; {ended(rebase=REBASE % (base, MODEL))}"
    policy = {"demand_rebase": True, "max_size": "1KiB"}

    successor = visit(image(one(run)), station(policy=policy), api="1.0").result()

    try:
        archive = members(saved(docker_api, successor.image))
        assert successor.image.endswith(":next-tag")
        assert b"patient" not in b"".join(archive.values())
        seen = docker_api.inspect_image(successor.image)
        assert len(seen["RootFS"]["Layers"]) == 3
        (finding,) = visit_record.verify_folder(Path(successor.record), trusted(settings.current()))
        assert finding.link["successor"]["made_by"] == "rebase"
        assert finding.link["successor"]["base"] == docker_api.inspect_image(base)["Id"]
    finally:
        docker_api.remove_image(successor.image, force=True)


FORKS = "i=0; while [ $i -lt 30 ]; do sleep 300 & i=$((i+1)); done"
BAD = {
    "prints after the JSON": (f"{SUCCESS}; echo bye", ProtocolError, "Nothing may be printed behind it"),
    "no JSON": ("echo done", ProtocolError, "no JSON object at the end"),
    "two JSONs": (f"{SUCCESS}; echo '{{\"success\": false}}'", ProtocolError, "comes twice"),
    "exits 0 on failure": ('echo \'{"success": false, "message": "no data"}\'', TrainFailed, "says that it failed. .*no data"),
    "exits 3 on success": (f"{SUCCESS}; exit 3", TrainFailed, "succeeded, and ended with exit code 3"),
    "exits 4 without a word": ("exit 4", AlgorithmFailed, "ended with exit code 4"),
    "neither": (ended("application", reason="not converged"), TrainStopped, "neither succeeded nor failed. .*not converged"),
    "ignores SIGTERM": ("trap '' TERM; while :; do sleep 1; done", AlgorithmFailed, "time limit"),
    "a token in a file": (f"echo x$PHT_TOKEN > /opt/found; {SUCCESS}", TrainFailed, "secret PHT_TOKEN into /opt"),
    "a bad tag": ('echo \'{"success": true, "nextTrainTag": "Bad Tag"}\'', ProtocolError, "which is no tag"),
    "a link as response file": (f"ln -s /etc/passwd $OASIS_RESPONSE_FILE; {SUCCESS}", ProtocolError, "cannot be read"),
}


@pytest.mark.parametrize(("run", "kind", "why"), BAD.values(), ids=list(BAD))
def test_a_bad_train(image, station, here, monkeypatch, run, kind, why):
    monkeypatch.setenv("OASIS_FLOWS_STOP_GRACE", "1")
    limit = {"timeout_seconds": 5} if "trap" in run else {}

    state = visit(image(v1(run)), station(**limit), api="V1")

    assert state.is_failed()
    error = error_of(state)
    assert type(error) is kind, error
    assert re.search(why, str(error), re.DOTALL), error
    assert SECRET not in str(error)
    records = [path for path in (here / "trains").rglob("*") if path.is_file()]
    assert sorted(path.name for path in records) == ["log.txt", "record.json"]
    assert SECRET not in "".join(path.read_text() for path in records)


GOOD = {
    "prints 50 MB": f"yes '{{ }} 0123456789' | head -c 50000000; echo; {SUCCESS}",
    "forks": f"{FORKS}; {SUCCESS}",
    "a response file, and a spoof": f"{ADD}; echo '{{\"success\": true}}' > $OASIS_RESPONSE_FILE; echo '{{\"success\": false}}'",
}


@pytest.mark.parametrize("run", GOOD.values(), ids=list(GOOD))
def test_a_train_that_looks_bad(docker_api, image, station, run):
    state = visit(image(v1(run)), station(), api="V1")

    assert state.is_completed(), state.message
    docker_api.remove_image(state.result().image)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"environment": {}}, "PHT_URL is not set"),
        ({"environment": {"PHT_URL": "nowhere"}}, "PHT_URL is no URL"),
        ({"secret_environment": {}}, "one of PHT_TOKEN or PHT_DATA"),
        ({"policy": {"allowed_images": ["registry.example.org/*"]}}, "does not allow the image"),
        ({"policy": {"allowed_images": ["sha256:" + "0" * 64]}}, "does not allow the image"),
        ({"policy": {"require_signature": True}}, "comes without any record"),
        ({"policy": {"demand_rebase": True}}, "demands a rebase"),
        ({"policy": {"max_size": "1"}}, "would carry 2 B away"),
    ],
)
def test_a_refused_train(image, station, here, changes, why):
    state = visit(image(v1()), station(**changes), api="V1")

    assert state.is_failed()
    assert isinstance(error_of(state), TrainRefused)
    assert re.search(why, str(error_of(state))), error_of(state)
    ran = "demand_rebase" in str(changes) or "max_size" in str(changes)
    assert [path.name for path in (here / "trains").rglob("record.json")] == (["record.json"] if ran else [])


def test_a_refused_train_that_was_fetched_goes_again(docker_api, image, station, here, registry: Registry):
    sent = registry.push(docker_api, image(v1()), f"refused/train_{uuid.uuid4().hex[:8]}")
    place = f"{registry.address}/refused"

    for given in (station(registry=place, environment={}), station(registry=place, policy={"max_size": "1"})):
        state = visit(sent, given, api="V1")

        assert isinstance(error_of(state), TrainRefused)
        assert docker_api.images(name=sent.rpartition(":")[0]) == []
        repository = sent.rpartition(":")[0]
        assert list(RegistryIndex(place, None).tags(repository)) == ["1"]


def test_a_train_is_allowed_by_its_digest(docker_api, image, station):
    name = image(v1())
    digest = docker_api.inspect_image(name)["Id"]

    state = visit(name, station(policy={"allowed_images": [digest]}), api="V1")

    assert state.is_completed(), state.message
    docker_api.remove_image(state.result().image)


def test_the_station_s_folder_is_mounted_and_nothing_of_it_travels(docker_api, image, station, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "patients").write_text("patient\n")
    run = f"cat /srv/data/patients; touch /srv/data/x 2>/dev/null && echo written; {SUCCESS}"
    given = station(
        environment={"PHT_URL": URL, "PHT_DATA": "/srv/data"},
        secret_environment={},
        mounts=[{"target": "/srv/data", "host_path": str(tmp_path / "data")}],
        policy={"forbid_network": True},
    )

    successor = visit(image(v1(run)), given, api="V1").result()

    try:
        assert (Path(successor.record) / "log.txt").read_text().startswith(f"reads from {URL}\npatient\n{{")
        names = [name for name in members(saved(docker_api, successor.image)) if "srv" in name]
        changes = (Path(successor.record) / "difference.jsonl").read_text().splitlines()
        assert names == []
        assert [json.loads(line)["path"] for line in changes] == [MODEL[1:]]
        (finding,) = visit_record.verify_folder(Path(successor.record), trusted(settings.current()))
        assert str(tmp_path) not in json.dumps(dict(finding.link))
        assert finding.link["sandbox"]["network"] == "none"
    finally:
        docker_api.remove_image(successor.image)


def test_what_was_tampered_with_is_named(docker_api, image, station, tmp_path, capsys):
    given = station()
    successor = visit(image(v1()), given, api="V1").result()
    archive, folder = tmp_path / "train.tar", Path(successor.record)
    archive.write_bytes(saved(docker_api, successor.image))
    try:
        assert main(["train", "verify", successor.image]) == 0
    finally:
        docker_api.remove_image(successor.image)
    assert main(["train", "verify", str(archive)]) == 0
    assert main(["train", "verify", str(folder)]) == 0
    assert "The record of 1 visit holds" in capsys.readouterr().out

    def after(path: Path, old: bytes, new: bytes) -> str:
        whole = path.read_bytes()
        assert old in whole
        # A saved image may have its configuration a second time, for engines of old.
        path.write_bytes(whole.replace(old, new) if path == archive else whole.replace(old, new, 1))
        try:
            assert main(["train", "verify", str(path if path == archive else folder)]) == 1
        finally:
            path.write_bytes(whole)
        return capsys.readouterr().err

    assert "summary.txt is not the model's summary" in after(folder / "summary.txt", b"counted", b"Counted")
    assert "difference.jsonl is not the difference" in after(folder / "difference.jsonl", b"changed", b"removed")
    assert "The configuration of the image is not the one" in after(folder / "image.json", b"FROM_IMAGE=yes", b"FROM_IMAGE=no!")
    first = json.loads((folder / "image.json").read_text())["layers"][0].encode()
    assert "Layer 1 of the image is not the one" in after(folder / "image.json", first, first[:-1] + b"x")
    envelope = json.loads((folder / "chain.json").read_text())[0]
    payload, signature = envelope["payload"].encode(), envelope["signatures"][0]["sig"].encode()
    flipped = payload[:40] + (b"A" if payload[40:41] != b"A" else b"B") + payload[41:]
    assert "signature of link 1 does not fit" in after(folder / "chain.json", payload, flipped)
    assert "signature of link 1 does not fit" in after(folder / "chain.json", signature, b"AAAA" + signature[4:])
    assert "Layer 3 of" in after(archive, b"1\n" + bytes(510), b"9\n" + bytes(510))
    for old, new in (
        (b"FROM_IMAGE=yes", b"FROM_IMAGE=no!"),
        (b'"Entrypoint": ["/train"]', b'"Entrypoint": ["/brain"]'),
        (b'"io.oasis.train.station": "1"', b'"io.oasis.train.station": "2"'),
        (b'"created_by": "tests"', b'"created_by": "xxxxx"'),
        (b'"architecture": "amd64"', b'"architecture": "arm64"'),
    ):
        assert "The configuration of the image is not the one" in after(archive, old, new)
    for key in (folder.parents[3] / "keys").glob("*.pem"):
        assert key.stat().st_mode & 0o777 == 0o600
        key.unlink()
    assert main(["train", "verify", str(folder)]) == 1
    assert "a key that is not one of station 'hospital-a'" in capsys.readouterr().err
    assert lineage.read((folder / "chain.json").read_text())[0].link["visit"] == 1


def test_a_train_whose_record_was_tampered_with_is_not_let_in(docker_api, image, station):
    given = station(policy={"require_signature": True})
    first = visit(image(v1()), station("hospital-b", station_id=2), api="V1").result()
    try:
        second = visit(first.image, given, api="V1")
        assert second.is_completed(), second.message
        docker_api.remove_image(second.result().image)
        changed = docker_api.create_container(first.image, ["x"], labels={"oasis-test": "1"})
        forged = f"{first.image}-forged"
        docker_api.commit(changed["Id"], *forged.rsplit(":", 1))
        docker_api.remove_container(changed["Id"])
        third = visit(forged, given, api="V1")
        docker_api.remove_image(forged)
        assert isinstance(error_of(third), ChainBroken)
        assert "The configuration of the image is not the one" in str(error_of(third))
    finally:
        docker_api.remove_image(first.image, force=True)


def test_describe_and_check(image, station, here, capsys):
    name = image(one())
    station()
    assert main(["train", "describe", name, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["api"], described["summary"], described["needs"]) == ("1.0", "counted to 0", ["PHT_URL"])
    assert main(["train", "check", name, "--station", "hospital-a"]) == 0
    assert "All that the train requires is met" in capsys.readouterr().out
    station("hospital-b", environment={})
    assert main(["train", "check", name, "--station", "hospital-b"]) == 2
    assert "PHT_URL is not set" in capsys.readouterr().out
    assert [path.read_text() for path in (here / "trains" / "generations").iterdir()] == ["1.0"]
    assert main(["train", "describe", image("#!/bin/sh\necho no such module >&2\nexit 1\n")]) == 1
    said = capsys.readouterr().err
    assert "speaks no Train API that is known" in said
    assert "It ended with exit code 1: no such module" in said


def test_a_key_in_a_secret_block(docker_api, image, station):
    given = station(signing_key="hospital-key")
    assert main(["train", "key", "hospital-a"]) == 0
    successor = visit(image(v1()), given, api="V1").result()
    docker_api.remove_image(successor.image)

    assert not settings.current().keys.exists()
    key = lineage.public_key(signing_key("hospital-a", "hospital-key", settings.current()))
    assert len(visit_record.verify_folder(Path(successor.record), {"hospital-a": [key]})) == 1


def waiting(server: PrefectServer, name: str) -> list[dict[str, Any]]:
    """The visits of this train that wait for an answer."""
    wanted = {"name": {"like_": name.rpartition("/")[2]}, "state": {"type": {"any_": ["PAUSED"]}}}
    return list(server.api("/flow_runs/filter", {"flow_runs": wanted}))


def answer(server: PrefectServer, name: str, agree: bool) -> str:
    """Answer the form of the visit of this train, once it is asked; return what the form says."""
    eventually(lambda: waiting(server, name), 180)
    (run,) = waiting(server, name)
    keyset = run["state"]["state_details"]["run_input_keyset"]
    eventually(
        lambda: (
            keyset["description"] in str(server.api(f"/flow_runs/{run['id']}/input/filter", {"prefix": "paused", "limit": 9}))
        ),
        60,
    )
    form = server.api(f"/flow_runs/{run['id']}/input/{keyset['schema']}")
    assert set(form["properties"]) == {"agree", "comment"}
    described = str(server.api(f"/flow_runs/{run['id']}/input/{keyset['description']}"))
    server.api(f"/flow_runs/{run['id']}/resume", {"run_input": {"agree": agree, "comment": "because"}})
    return described


@pytest.mark.parametrize("agree", [True, False])
def test_somebody_is_asked_before_anything_leaves(prefect_server, image, station, registry: Registry, agree):
    given = station(registry=f"{registry.address}/trains", policy={"hold_for_approval": True, "approval_seconds": 200})
    name = image(v1())
    with ThreadPoolExecutor(1) as somebody:
        said = somebody.submit(answer, prefect_server, name, agree)
        state = visit(name, given, api="V1")

    assert f"`/{MODEL[1:]}` | changed | 2 B" in said.result()
    if agree:
        record = json.loads((Path(state.result().record) / "record.json").read_text())
        assert record["approval"] == {"agree": True, "comment": "because"}
    else:
        assert isinstance(error_of(state), TrainRefused)
        assert "did not agree that the train" in str(error_of(state))
        assert "because" in str(error_of(state))


def test_a_retry_asks_anew_whatever_was_answered_before(prefect_server, image, station, registry: Registry):
    given = station(registry=f"{registry.address}/trains", policy={"hold_for_approval": True, "approval_seconds": 200})
    name = image(v1())
    with ThreadPoolExecutor(1) as somebody:
        somebody.submit(answer, prefect_server, name, False)
        state = visit(name, given, api="V1")
        assert isinstance(error_of(state), TrainRefused)
        run_id = str(state.state_details.flow_run_id)
        said = somebody.submit(answer, prefect_server, name, True)
        again = begin_again(run_id, train, {"image": name, "station": given, "api": "V1"}, settings.current())

    assert f"`/{MODEL[1:]}` | changed | 2 B" in said.result()
    assert again.is_completed(), again.message


@pytest.mark.parametrize("question", ["list_requirements", "run_algorithm"])
def test_an_answer_that_an_engine_lost_is_asked_for_again(docker_api, image, station, here, monkeypatch, question):
    really, lost = DockerEngine.run_to, []

    def run_to(engine, job, log, at_end):
        if question not in (job.command or ()) or lost:
            return really(engine, job, log, at_end)
        lost.append(question)

        def without(ended):
            return replace(ended, log_lost="the engine was started anew")

        return without(really(engine, job, lambda *_: None, lambda ended, files: at_end(without(ended), files)))

    monkeypatch.setattr(DockerEngine, "run_to", run_to)
    state = visit(image(v1()), station())

    assert lost
    assert state.is_completed(), state.message
    docker_api.remove_image(state.result().image)
    record = json.loads((Path(state.result().record) / "record.json").read_text())
    assert (record["verdict"]["code"], record["exit"]["log_lost"]) == ("ok", "")
    # Whoever gets no answer to the first question tries other generations.
    assert [path.read_text() for path in (here / "trains/generations").iterdir()] == ["V1"]


@pytest.fixture
def killed(prefect_server, docker_api, image, station, here, tmp_path) -> Iterator[Callable[[], tuple[str, str, str, Path]]]:
    """Begins a visit in a process and kills that while the train runs; it runs until its gate is open.

    Returns the run's id, its train, the container, and the gate.
    """
    (tmp_path / "gate").mkdir()
    gate = tmp_path / "gate" / "open"
    begun = []

    def begin() -> tuple[str, str, str, Path]:
        station(mounts=[{"target": "/gate", "host_path": str(gate.parent)}])
        name = image(v1(f"echo began; while [ ! -e /gate/open ]; do sleep 0.1; done; {SUCCESS}"))
        command = [sys.executable, "-m", "oasis_flows", "train", "run", name, "--station", "hospital-a", "--api", "V1"]
        env = prefect_server.env | {"OASIS_FLOWS_HOME": str(here), "OASIS_FLOWS_RETRY_WINDOW": "900"}
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        eventually(lambda: running(docker_api, here), 180)
        process.kill()
        process.wait(60)
        (row,) = running(docker_api, here)
        begun.append(row["Id"])
        return row["Labels"][RUN_ID], name, row["Id"], gate

    yield begin
    for container in begun:
        with suppress(docker.errors.NotFound):
            docker_api.remove_container(container, force=True)


@pytest.mark.parametrize("ended", [False, True], ids=["while it runs", "when it has ended"])
def test_a_retry_takes_up_the_train_that_a_dead_process_left(docker_api, here, killed, monkeypatch, ended):
    monkeypatch.setenv("OASIS_FLOWS_RETRY_WINDOW", "900")
    run_id, name, container, gate = killed()
    if ended:
        gate.touch()
        eventually(lambda: docker_api.inspect_container(container)["State"]["Status"] == "exited", 60)
    with ThreadPoolExecutor(1) as somebody:
        log = here / "workspaces" / run_id / "log.txt"
        before = log.stat().st_mtime_ns
        # The train goes on once its log is written anew.
        somebody.submit(lambda: eventually(lambda: log.stat().st_mtime_ns != before, 120)).add_done_callback(
            lambda _: gate.touch()
        )
        given = {"image": name, "station": "hospital-a", "api": "V1"}
        state = begin_again(run_id, train, given, settings.current())

    assert state.is_completed(), state.message
    folder = Path(state.result().record)
    docker_api.remove_image(state.result().image)
    record = json.loads((folder / "record.json").read_text())
    assert record["exit"]["in_force"]["container"] == container
    assert (folder / "log.txt").read_text().count("began") == 1
    assert (folder / "summary.txt").read_text() == "counted  to 1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_visit_whose_process_is_ended_leaves_nothing(prefect_server, docker_api, image, station, here, number):
    station()
    command = [
        sys.executable,
        "-m",
        "oasis_flows",
        "train",
        "run",
        image(v1("sleep 600")),
        "--station",
        "hospital-a",
        "--api",
        "V1",
    ]

    process = subprocess.Popen(command, env=prefect_server.env | {"OASIS_FLOWS_HOME": str(here)}, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: running(docker_api, here), 120)
    finally:
        process.send_signal(number)
        process.wait(60)
    eventually(
        lambda: (
            reap(settings.current(), now=True)
            and not containers(docker_api, here)
            and not list((here / "workspaces").iterdir())
        ),
        60,
    )


def test_a_visit_that_dies_while_it_waits_for_an_answer_does_not_wait_for_ever(prefect_server, image, station, here):
    station(policy={"hold_for_approval": True})
    name = image(v1())
    command = [sys.executable, "-m", "oasis_flows", "train", "run", name, "--station", "hospital-a", "--api", "V1"]
    process = subprocess.Popen(command, env=prefect_server.env | {"OASIS_FLOWS_HOME": str(here)}, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: waiting(prefect_server, name), 180)
    finally:
        process.kill()
        process.wait(60)
    run_id = waiting(prefect_server, name)[0]["id"]

    eventually(lambda: reap(settings.current(), now=True) and not list((here / "workspaces").iterdir()), 60)

    run = prefect_server.api(f"/flow_runs/{run_id}")
    assert run["state_type"] == "CRASHED"
    assert run["state"]["message"].startswith("The process that ran it is gone")


def test_a_draft_whose_run_is_dead_is_reaped(prefect_server, docker_api, busybox, here, tmp_path):
    drafts = [_draft(folder / "a-run" / "lease") for folder in (here / "workspaces", tmp_path / "another" / "workspaces")]
    for draft in drafts:
        docker_api.tag(busybox, *draft.rsplit(":", 1))

    def there():
        names = {name for row in docker_api.images(name=DRAFTS) for name in row.get("RepoTags") or ()}
        return [draft in names for draft in drafts]

    try:
        sweep(settings.current(), drafts=False)
        assert there() == [True, True]
        reap(settings.current(), now=True)
        assert there() == [False, True]
    finally:
        docker_api.remove_image(drafts[1])


def test_the_station_s_loop_claims_each_train_once(prefect_server, docker_api, image, station, private_registry: Registry):
    login = private_registry.login
    assert login is not None
    with get_client(sync_client=True) as client:
        client.create_deployment(client.create_flow(train), name="looping")
    credentials = DockerRegistryCredentials(username=login.username, password=login.password, registry_url=login.registry)
    credentials.save("loop", overwrite=True)
    place, number = f"{private_registry.address}/{uuid.uuid4().hex[:6]}", 1000 + uuid.uuid4().int % 10**6
    given = station("looping", station_id=number, work_pool="looping", registry=place, registry_credentials=credentials)
    for name, tag in (("train_a", f"x-station.{number}"), ("train_b", f"station.{number}1"), ("else", f"station.{number}")):
        private_registry.push(docker_api, image(v1()), f"{place.partition('/')[2]}/{name}", tag)

    (found,) = train_station(given)
    assert train_station(given) == [found]

    assert found.startswith(f"{place}/train_a@sha256:")
    wanted = {"flow_runs": {"tags": {"all_": [f"station-loop:{number}"]}}}
    (run,) = prefect_server.api("/flow_runs/filter", wanted)
    assert run["parameters"] == {"image": found, "station": {"$ref": {"block_document_slug": "station/looping"}}}


def test_a_receiver_who_has_only_the_image_and_a_public_key(prefect_server, docker_api, image, station, tmp_path, capsys):
    given = station()
    assert main(["train", "key", "hospital-a"]) == 0
    key, archive = capsys.readouterr().out.strip(), tmp_path / "train.tar"
    successor = visit(image(v1()), given, api="V1").result()
    archive.write_bytes(saved(docker_api, successor.image))
    docker_api.remove_image(successor.image)

    def verify(trusted: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """On another machine, which has neither engine nor server nor this one's home."""
        ours = ("PREFECT_", "OASIS_", "DOCKER_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {
            "HOME": str(tmp_path / "elsewhere"),
            "OASIS_FLOWS_TRUSTED_STATIONS": json.dumps(trusted),
            "PREFECT_API_URL": "http://127.0.0.1:9/api",
        }
        command = [sys.executable, "-m", "oasis_flows", "train", "verify", str(archive)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    known, unknown = verify({"hospital-a": key}), verify({"hospital-b": key})

    assert known.returncode == 0, known.stderr
    assert known.stdout.startswith("holds     visit 1, at hospital-a, ")
    assert known.stdout.endswith("The record of 1 visit holds, and the train is what it says.\n")
    assert unknown.returncode == 1
    assert "a key that is not one of station 'hospital-a'" in unknown.stderr


def test_commands_let_a_train_visit(docker_api, image, station, registry: Registry, capsys):
    station(registry=f"{registry.address}/trains", policy={"max_size": "1KiB"})
    name = image(v1())

    assert main(["train", "run", name, "--station", "hospital-a"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Succeeded \(Completed\): run [0-9a-f-]{36}", first)
    assert re.fullmatch(rf"the train: {re.escape(registry.address)}/trains/train_[0-9a-f]+@sha256:[0-9a-f]{{64}}", second)
    assert (Path(third.removeprefix("the record: ")) / "chain.json").exists()

    pulled = second.removeprefix("the train: ")
    assert main(["train", "run", pulled, "--station", "hospital-a", "--api", "V1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["status"], facts["message"]) == ("Completed", "Succeeded", None)
    assert main(["train", "verify", facts["record"]]) == 0
    assert "The record of 2 visits holds" in capsys.readouterr().out

    assert main(["train", "run", image(v1("exit 4")), "--station", "hospital-a", "--api", "V1"]) == 1
    said = capsys.readouterr()
    assert re.fullmatch(r"Failed \(Failed\): run [0-9a-f-]{36}\n", said.out)
    assert "ended with exit code 4" in said.err
    assert main(["train", "run", name, "--station", "nowhere"]) == 2
    assert "There is no station document 'nowhere'" in capsys.readouterr().err
