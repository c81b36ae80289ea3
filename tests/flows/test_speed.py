"""What is done otherwise than Prefect would, for speed, comes to the same: its heartbeat, and the saving of a document."""

import json
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.context import SettingsContext, SyncClientContext
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from oasis_flows import backoff, heartbeat, saving
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.documents import document_flow
from oasis_flows.flows.algorithm_task import algorithm_task
from oasis_flows.machine import stand_in
from oasis_flows.testing import FakeEngine
from tests.servers.engine import eventually
from tests.servers.faultproxy import between
from tests.servers.prefect import BIN, ROOT, PrefectServer


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home, with Prefect's heartbeat as it is by default (`here` turns it off)."""
    monkeypatch.setenv("OASIS_FLOWS_HOME", str(tmp_path / "home"))
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "file").write_text("x")
    return tmp_path


def beats(server: PrefectServer, run_id: str) -> list[dict[str, object]]:
    wanted = {"event": {"name": [heartbeat.EVENT]}, "resource": {"id": [f"prefect.flow-run.{run_id}"]}}
    return list(server.api("/events/filter", {"filter": wanted})["events"])


def test_a_run_in_this_process_gives_the_sign_of_life_that_prefect_would(prefect_server: PrefectServer, shipped: Path):
    @flow
    def plain() -> None:
        pass

    theirs = plain(return_state=True).state_details.flow_run_id
    with stand_in(FakeEngine()):
        algorithm = Algorithm(docker_image=DockerImage(image_id="nothing:1"))
        ours = algorithm_task(algorithm, Dataset(url=str(shipped / "input")), return_state=True).state_details.flow_run_id

    eventually(lambda: beats(prefect_server, str(theirs)) and beats(prefect_server, str(ours)), 30)
    (wanted,), (found,) = beats(prefect_server, str(theirs)), beats(prefect_server, str(ours))
    assert found["event"] == wanted["event"]
    assert set(wanted["resource"]) - set(found["resource"]) <= {"prefect.version"}  # type: ignore[call-overload]
    roles = [{each["prefect.resource.role"] for each in event["related"]} for event in (wanted, found)]  # type: ignore[attr-defined]
    assert roles[0] <= roles[1]


def test_prefects_own_heartbeat_is_off_in_a_call_and_on_behind_it(prefect_server: PrefectServer):
    seen = []

    @document_flow(name="seen")
    def asks() -> None:
        seen.append(PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value())

    before = PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value()
    asks()
    asks()

    assert seen == [None, None]
    assert before is not None
    assert before == PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value()


def test_the_thread_of_a_heartbeat_wakes_up_when_the_run_ends(prefect_server: PrefectServer):
    @flow
    def short() -> float:
        with heartbeat.beating():
            time.sleep(0.01)
        return time.monotonic()

    with heartbeat.ours():
        ended = short()
        # Prefect's own thread sleeps whole seconds; in none of three calls does anybody wait that long.
        seconds = [time.monotonic() - ended, *(time.monotonic() - short() for _ in range(2))]

    assert min(seconds) < 0.6


def test_settings_without_the_heartbeat_are_the_same_in_all_else(prefect_server: PrefectServer):
    before = SettingsContext.get()
    with heartbeat.ours():
        within = SettingsContext.get()

    assert before is not None
    assert within is not None
    mine, theirs = within.settings.model_dump(), before.settings.model_dump()
    assert theirs["flows"].pop("heartbeat_frequency") is not None
    assert mine["flows"].pop("heartbeat_frequency") is None
    assert mine == theirs


def test_calls_in_a_thread_have_one_client_which_is_in_use_by_nobody_else(prefect_server: PrefectServer):
    seen = []

    @document_flow(name="client")
    def asks() -> None:
        seen.append(get_client(sync_client=True))

    asks()
    asks()
    elsewhere = threading.Thread(target=asks)
    elsewhere.start()
    elsewhere.join()
    with temporary_settings({PREFECT_API_URL: prefect_server.url.replace("127.0.0.1", "localhost") + "/api"}):
        asks()
    assert SyncClientContext.get() is None
    with SyncClientContext.get_or_create() as callers:
        asks()

    first, second, in_a_thread, with_another_address, within = seen
    assert first is second
    assert len({id(each) for each in (first, in_a_thread, with_another_address, within)}) == 4
    assert within is callers.client


def test_a_kept_client_bears_that_its_connections_are_gone(prefect_server: PrefectServer):
    @document_flow(name="again")
    def again() -> int:
        return 1

    with between(prefect_server.port) as proxy, temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{proxy.port}/api"}):
        assert again() == 1
        assert proxy.drop()
        assert again() == 1


def test_a_document_that_is_made_like_another_is_what_prefect_would_save(prefect_server: PrefectServer):
    DatasetStore(url="s3://bucket/x", access_key_id="key", secret_access_key="hush").save("like", overwrite=True)
    names = [f"like-{uuid.uuid4().hex}" for _ in range(3)]
    described = {"url": "s3://bucket/x/1", "file_count": 3, "size_bytes": 5, "manifest_digest": "0" * 64}
    datasets = [Dataset(store=DatasetStore.load("like"), **described) for _ in names]
    datasets[0].save(names[0])
    for dataset, name in zip(datasets[1:], names[1:], strict=True):
        saving.save(dataset, name)

    with get_client(sync_client=True) as client:
        first, *others = [client.read_block_document_by_name(name, "dataset", include_secrets=True) for name in names]
    for other, dataset in zip(others, datasets[1:], strict=True):
        left_out = {"id", "created", "updated", "name"}
        assert other.model_dump(exclude=left_out) == first.model_dump(exclude=left_out)
        assert (dataset._block_document_id, dataset._block_document_name) == (other.id, other.name)
        assert Dataset.load(str(other.name)).store.secret_access_key.get_secret_value() == "hush"


def test_a_document_that_is_there_is_replaced(prefect_server: PrefectServer):
    name = f"twice-{uuid.uuid4().hex}"
    for count in (1, 2, 3):
        saving.save(Dataset(url=f"/somewhere/{count}", file_count=count), name)

    assert (Dataset.load(name).url, Dataset.load(name).file_count) == ("/somewhere/3", 3)


def test_a_store_without_a_document_is_saved_within(prefect_server: PrefectServer):
    for count in (1, 2):
        name = f"inline-{uuid.uuid4().hex}"
        saving.save(Dataset(url="s3://bucket/x", store=DatasetStore(url="s3://bucket"), file_count=count), name)

        assert Dataset.load(name).store.url == "s3://bucket"


def test_a_server_that_forgot_the_type_is_told_anew(prefect_server: PrefectServer):
    first, second = (f"anew-{uuid.uuid4().hex}" for _ in range(2))
    saving.save(Dataset(url="/somewhere/1"), first)
    for where in saving._kinds:
        saving._kinds[where] = saving._Kind(type=uuid.uuid4(), schema=uuid.uuid4())

    saving.save(Dataset(url="/somewhere/2"), second)

    assert Dataset.load(second).url == "/somewhere/2"


@contextmanager
def refusing(times: int) -> Iterator[str]:
    """A server that answers 503 so many times, and 200 from then on; its address."""
    left = [times]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            left[0] -= 1
            self.send_response(503 if left[0] >= 0 else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *said: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_was_busy_for_a_moment_is_asked_again_soon():
    with refusing(7) as url, SyncPrefectClient(url) as client:
        backoff.shorten(client)
        backoff.shorten(client)
        began = time.monotonic()
        answer = client.hello()

    # Prefect's client alone would have slept for two seconds, four, and so on, and have given up at the sixth.
    assert time.monotonic() - began < 6
    assert answer.status_code == 200


def test_a_server_that_stays_busy_is_waited_for_as_prefect_does(monkeypatch: pytest.MonkeyPatch):
    """Its own pauses come behind the short ones, which it does not count; where it counts them, its patience is gone in two seconds."""
    slept: list[float] = []
    monkeypatch.setattr("prefect.client.base.time", SimpleNamespace(**vars(time) | {"sleep": slept.append}))
    with refusing(100) as url, SyncPrefectClient(url) as client:
        backoff.shorten(client)
        with pytest.raises(httpx.HTTPStatusError):
            client.hello()

    short, its_own = slept[:7], slept[7:]
    assert 3 < sum(short) < 5
    assert len(its_own) == PREFECT_CLIENT_MAX_RETRIES.value() + 1
    assert all(0.6 * 2**count < seconds < 1.5 * 2**count for count, seconds in enumerate(its_own, 1))


def test_a_server_that_is_to_be_asked_once_is_asked_once():
    """As the reaper does, which uses the client of its run."""
    with refusing(1) as url, SyncPrefectClient(url) as client:
        backoff.shorten(client)
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), pytest.raises(httpx.HTTPStatusError):
            client.hello()

        assert client.hello().status_code == 200


def test_a_run_asks_again_soon(prefect_server: PrefectServer, shipped: Path, monkeypatch: pytest.MonkeyPatch):
    clients = []
    monkeypatch.setattr(backoff, "shorten", lambda client: clients.append(client))
    with stand_in(FakeEngine()):
        algorithm_task(Algorithm(docker_image=DockerImage(image_id="nothing:1")), Dataset(url=str(shipped / "input")))

    assert isinstance(clients[0], SyncPrefectClient)


def test_a_step_costs_no_request_of_its_own(prefect_server: PrefectServer):
    """Prefect makes task runs by events; where that changes, performance.md is wrong."""
    asked = []

    @task(cache_policy=NO_CACHE)
    def nothing() -> None:
        pass

    @flow
    def steps() -> None:
        with get_client(sync_client=True) as client:
            client._client.event_hooks["request"].append(lambda request: asked.append(request.url.path))
            for _ in range(3):
                nothing()
            client._client.event_hooks["request"].clear()

    steps()

    assert not asked


def test_the_shipped_pool_starts_one_interpreter_the_workers_own():
    template = json.loads((ROOT / "deployments" / "work-pools" / "gpu-process.json").read_text())

    assert template["variables"]["properties"]["command"]["default"].endswith(" -m prefect.engine'")


_LOADED = """
import runpy, sys
try:
    runpy.run_module("prefect.engine", run_name="__main__")
finally:
    print(sorted({name.partition(".")[0] for name in sys.modules} & {"prefect_kubernetes", "kubernetes_asyncio", "cryptography"}))
"""


@pytest.mark.parametrize("by", ["name", "id"])
def test_a_workers_run_loads_no_block_types_but_its_own(
    deployed: PrefectServer, here: Path, tmp_path: Path, busybox: str, by: str
):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("x")
    Algorithm(docker_image=DockerImage(image_id=busybox), command="true").save("lean", overwrite=True)
    Dataset(url=str(tmp_path / "in")).save("lean", overwrite=True)

    def reference(slug: str) -> dict[str, object]:
        document = deployed.api(f"/block_types/slug/{slug}/block_documents/name/lean")
        return {"$ref": {"block_document_slug": f"{slug}/lean"} if by == "name" else {"block_document_id": document["id"]}}

    deployment = deployed.api("/deployments/name/algorithm-task/algorithm-task")["id"]
    given = {"algorithm": reference("algorithm"), "input_dataset": reference("dataset")}
    run_id = deployed.api(f"/deployments/{deployment}/create_flow_run", {"parameters": given, "state": {"type": "PENDING"}})[
        "id"
    ]
    env = deployed.env | {"PREFECT__FLOW_RUN_ID": run_id, "OASIS_FLOWS_HOME": str(here)}
    done = subprocess.run([BIN / "python", "-c", _LOADED], env=env, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
    assert deployed.api(f"/flow_runs/{run_id}")["state_type"] == "COMPLETED"
