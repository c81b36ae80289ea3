"""Runs on the cluster that KUBECONFIG names, by other ways to it. Collected only where there is one: see `tests/conftest.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import Scheduled
from prefect_kubernetes.credentials import KubernetesClusterConfig, KubernetesCredentials

from oasis_flows.__main__ import main
from oasis_flows.blocks import Algorithm, Dataset, DockerImage
from oasis_flows.flows.algorithm_task import algorithm_task
from tests.servers.cluster import TestCluster, carrier_of
from tests.servers.engine import eventually
from tests.servers.prefect import BIN, ROOT, PrefectServer

DOCUMENT = "cluster-of-tests"


@pytest.fixture
def documented(prefect_server: Any, cluster: TestCluster, here: Path, monkeypatch: pytest.MonkeyPatch) -> KubernetesCredentials:
    """The cluster's access is in a document, and nowhere else."""
    config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    # A document has to name its context: that which the file says is current is another cluster's.
    name = config["current-context"]
    config["clusters"].append({"name": "elsewhere", "cluster": {"server": "https://127.0.0.1:1"}})
    config["contexts"].append({"name": "elsewhere", "context": {"cluster": "elsewhere", "user": config["users"][0]["name"]}})
    config["current-context"] = "elsewhere"
    found = KubernetesCredentials(cluster_config=KubernetesClusterConfig(config=config, context_name=name))
    found.save(DOCUMENT, overwrite=True)
    for key, value in cluster.settings.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("OASIS_FLOWS_KUBERNETES_CREDENTIALS", DOCUMENT)
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("HOME", str(here))
    return found


def tokens(found: KubernetesCredentials) -> list[str]:
    assert found.cluster_config is not None
    return [user["user"]["token"] for user in found.cluster_config.config["users"] if "token" in user["user"]]


def test_a_run_by_a_credentials_document(
    documented: KubernetesCredentials, cluster: TestCluster, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("a")
    algorithm = Algorithm(docker_image=DockerImage(image_id=cluster.image), command=["sh", "-c", "cp input/a.txt output"])
    done = algorithm_task(algorithm, Dataset(url=str(tmp_path / "letters")))
    assert (Path(done.url) / "data" / "a.txt").read_text() == "a"
    kept = b"".join(path.read_bytes() for path in Path(done.url).rglob("*") if path.is_file())
    assert [token for token in tokens(documented) if token.encode() in kept] == []

    main(["doctor"])
    said = capsys.readouterr().out
    assert f"namespace {cluster.namespace}" in said
    assert [token for token in tokens(documented) if token in said] == []


@pytest.fixture
def carried(
    prefect_server: PrefectServer, cluster: TestCluster, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], tuple[subprocess.Popen[bytes], str]]]:
    """Starts `oasis-flows run` of a script, with a home that is not on the claim; returns the process and the run's id, once it has
    said something. Afterwards nothing is left in the cluster, nor on the claim.
    """
    changes = {**cluster.settings, "OASIS_FLOWS_HOME": str(here), "OASIS_FLOWS_KUBERNETES_CARRIER": carrier_of(cluster)}
    for key, value in changes.items():
        monkeypatch.setenv(key, value)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("a")
    Dataset(url=str(tmp_path / "letters")).save("letters", overwrite=True)
    processes: list[subprocess.Popen[bytes]] = []

    def begin(script: str) -> tuple[subprocess.Popen[bytes], str]:
        Algorithm(docker_image=DockerImage(image_id=cluster.image), command=["sh", "-c", script]).save(
            "carried", overwrite=True
        )
        command = [str(BIN / "oasis-flows"), "run", "carried", "letters"]
        env = {**prefect_server.env, "KUBECONFIG": os.environ["KUBECONFIG"], "PYTHONPATH": str(ROOT), **changes}
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        processes.append(process)
        eventually(lambda: [log for log in (here / "workspaces").glob("*/log.txt") if log.stat().st_size], 120)
        (log,) = (here / "workspaces").glob("*/log.txt")
        return process, log.parent.name

    yield begin
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)
    eventually(lambda: cluster.left() == [], 60)


def test_a_run_whose_files_are_carried_is_cancelled_like_any_other(
    prefect_server: PrefectServer, carried: Any, cluster: TestCluster, here: Path
) -> None:
    process, run_id = carried("cat input/a.txt > output/half; echo began; sleep 600")
    assert len(cluster.objects("jobs", run_id)) == 2
    assert [path.name for path in cluster.home.glob("carried/*")] == [run_id]
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0].decode()

    assert cluster.left() == [], said
    assert list((here / "workspaces").iterdir()) == []
    assert prefect_server.api(f"/flow_runs/{run_id}")["state_type"] in ("CRASHED", "CANCELLED")


def test_a_retry_of_a_killed_run_takes_up_its_job_and_its_files(
    prefect_server: PrefectServer, carried: Any, cluster: TestCluster, here: Path
) -> None:
    process, run_id = carried("echo began; sleep 15; cp input/a.txt output/whole; echo ended")
    made = {row["metadata"]["uid"] for row in cluster.objects("jobs", run_id)}
    process.kill()
    process.wait(10)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(uuid.UUID(run_id), Scheduled(name="AwaitingRetry"), force=True)
        flow_run = client.read_flow_run(uuid.UUID(run_id))
    result = run_flow(algorithm_task, flow_run=flow_run, parameters={"algorithm": "carried", "input_dataset": "letters"})
    assert isinstance(result, Dataset)
    record = json.loads((Path(result.url) / "task.json").read_text())

    assert len(made) == 2
    assert run_id in record["sandbox"]["in_force"]["pod"]
    assert (Path(result.url) / "log.txt").read_bytes() == b"began\nended\n"
    assert (Path(result.url) / "data" / "whole").read_bytes() == b"a"
    assert cluster.left() == []
    assert not (here / "workspaces" / run_id).exists()
    # The very Jobs: there were no others of this run.
    events = cluster.api.call("GET", cluster.core("events"))["items"]
    jobs = {
        each["involvedObject"]["uid"] for each in events if each["reason"] == "SuccessfulCreate" and run_id in each["message"]
    }
    assert jobs == made


def test_what_a_killed_run_left_in_the_cluster_is_reaped(carried: Any, cluster: TestCluster, capsys: Any) -> None:
    process, run_id = carried("echo began; sleep 600")
    process.kill()
    process.wait(10)

    assert main(["reap", "--json"]) == 0
    assert run_id not in json.loads(capsys.readouterr().out)["containers"]
    assert main(["reap", "--now", "--json"]) == 0
    assert run_id in json.loads(capsys.readouterr().out)["containers"]
    eventually(lambda: cluster.left() == [], 60)


def test_a_document_that_is_not_there_is_named(
    documented: KubernetesCredentials, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("OASIS_FLOWS_KUBERNETES_CREDENTIALS", "no-such-document")
    main(["doctor"])
    assert "no-such-document" in capsys.readouterr().out
