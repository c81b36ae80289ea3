"""Runs on the cluster that KUBECONFIG names, by other ways to it. Collected only where there is one: see `tests/conftest.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect_kubernetes.credentials import KubernetesClusterConfig, KubernetesCredentials

from oasis_flows.__main__ import main
from oasis_flows.blocks import Algorithm, Dataset, DockerImage
from oasis_flows.flows.algorithm_task import algorithm_task
from tests.servers.cluster import TestCluster

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


def test_a_document_that_is_not_there_is_named(
    documented: KubernetesCredentials, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("OASIS_FLOWS_KUBERNETES_CREDENTIALS", "no-such-document")
    main(["doctor"])
    assert "no-such-document" in capsys.readouterr().out
