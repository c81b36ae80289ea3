"""The Kubernetes engine on a cluster that has more: a node that can be lost, GPUs, which are soon all in use, and policies in force.

Collected only where `LOSE_NODE` names a node of the cluster that `KUBECONFIG` names, and a program that cuts it off when it is called with
`lose` and brings it back when it is called with `back`: `LOSE_NODE="two /path/to/program"`. The node is cordoned. Another one has at least two
GPUs, or a device plugin that says so; and the network plugin acts on policies. What that does not prove: GPUs that compute, and other plugins.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oasis_flows.blocks import Algorithm, Dataset, DockerImage
from oasis_flows.engines import pod as spec
from oasis_flows.errors import ContainerLost, NoGpu
from oasis_flows.flows.algorithm_task import algorithm_task
from oasis_flows.job import Reason, Resources, Sandbox
from tests.contract.test_engine import Log
from tests.contract.test_kubernetes_cluster import FOREVER, MakeJob, Ran, another, engine, job
from tests.contract.test_sandbox import listener
from tests.e2e.test_kubernetes_worker import Installed, installed
from tests.servers.cluster import TestCluster
from tests.servers.engine import eventually
from tests.servers.prefect import PrefectServer

__all__ = ["engine", "installed", "job", "listener"]

NODE, PROGRAM = os.environ["LOSE_NODE"].split()


def cordon(cluster: TestCluster, node: str, *, closed: bool) -> None:
    found = cluster.api.call("GET", f"/api/v1/nodes/{node}")
    found["spec"]["unschedulable"] = closed
    # Without it, it is no matter what kubelet has told meanwhile.
    del found["metadata"]["resourceVersion"]
    cluster.api.call("PUT", f"/api/v1/nodes/{node}", found)


@pytest.fixture
def losable(cluster: TestCluster) -> Iterator[Callable[[], object]]:
    """Only the node that can be lost takes pods; what is returned loses it, and then the others take them. It comes back at the end."""
    others = [each.name for each in cluster.engine.nodes() if each.name != NODE]

    def lose() -> None:
        subprocess.run([PROGRAM, "lose"], check=True, stdin=subprocess.DEVNULL)
        for name in others:
            cordon(cluster, name, closed=False)

    try:
        cordon(cluster, NODE, closed=False)
        for name in others:
            cordon(cluster, name, closed=True)
        yield lose
    finally:
        cordon(cluster, NODE, closed=True)
        for name in others:
            cordon(cluster, name, closed=False)
        subprocess.run([PROGRAM, "back"], check=True, stdin=subprocess.DEVNULL)


def on(cluster: TestCluster, run_id: str) -> set[Any]:
    return {row["spec"].get("nodeName") for row in cluster.objects("pods", run_id)}


def test_a_run_whose_node_is_lost_ends_says_so_and_is_done_elsewhere(
    cluster: TestCluster, job: MakeJob, losable: Callable[[], object]
) -> None:
    told: list[str] = []
    engine = another(cluster, told)
    ran = Ran(engine, job(FOREVER))
    ran.until_begun()
    assert on(cluster, ran.job.run_id) == {NODE}
    began = time.monotonic()
    losable()
    eventually(lambda: ran.ended_at, 300)
    with pytest.raises(ContainerLost, match=f"The node {NODE} does not answer") as lost:
        ran.result()
    print(f"given up after {ran.ended_at - began:.0f} s; told: {told}; {lost.value}")
    assert lost.value.transient
    assert any("no longer answers" in line for line in told)

    again = Ran(engine, job("echo begun; sleep 2", run_id=ran.job.run_id, attempt=2))
    again.until_begun()
    assert NODE not in {row["spec"].get("nodeName") for row in cluster.objects("pods", ran.job.run_id) if _is_new(row)}
    assert again.result().reason is Reason.OK


def _is_new(row: dict[str, Any]) -> bool:
    return "deletionTimestamp" not in row["metadata"]


def test_the_flow_of_such_a_run_goes_on_and_its_output_is_the_second_containers_alone(
    prefect_server: PrefectServer,
    cluster: TestCluster,
    losable: Callable[[], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first container goes on writing all the while: nobody can tell it to stop."""
    for name, value in cluster.settings.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("a")
    ends = time.time() + 240
    script = f"while [ $(date +%s) -lt {ends:.0f} ]; do echo $(hostname) | tee -a output/$(hostname); sleep 0.5; done"
    algorithm = Algorithm(docker_image=DockerImage(image_id=cluster.image), command=["sh", "-c", script])
    before = {row["metadata"]["uid"] for row in cluster.api.call("GET", cluster.core("pods"))["items"]}

    def lost_when_it_runs() -> None:
        def first() -> list[dict[str, Any]]:
            rows = cluster.api.call("GET", cluster.core("pods"))["items"]
            return [row for row in rows if row["metadata"]["uid"] not in before and row["status"]["phase"] == "Running"]

        eventually(first, 60)
        names.append(first()[0]["metadata"]["name"])
        losable()

    names: list[str] = []
    losing = threading.Thread(target=lost_when_it_runs)
    losing.start()
    done = algorithm_task(algorithm, Dataset(url=str(tmp_path / "letters")))
    losing.join()

    (found,) = (Path(done.url) / "data").iterdir()
    assert found.name != names[0]
    assert (Path(done.url) / "log.txt").read_bytes() == found.read_bytes()


class TestGpus:
    ONE = Resources(cpus=0.1, memory_bytes=64 << 20, gpus=1)

    def test_all_are_in_use_at_once_and_the_next_run_waits_and_says_for_what(self, cluster: TestCluster, job: MakeJob) -> None:
        told: list[str] = []
        most = max(node.allocatable.gpus for node in cluster.engine.nodes())
        assert most >= 2
        first = [Ran(cluster.engine, job("echo begun; sleep 8", resources=self.ONE)) for _ in range(most)]
        for each in first:
            each.until_begun()
        node = next(node for node in cluster.engine.nodes() if node.allocatable.gpus == most)
        assert node.requested.gpus == most
        second = Ran(another(cluster, told), job("echo begun", resources=self.ONE))
        assert [each.result().reason for each in [second, *first]] == [Reason.OK] * (most + 1)
        assert any("Insufficient nvidia.com/gpu" in line for line in told)

    def test_more_than_any_node_has_is_refused_at_once(self, engine: Any, cluster: TestCluster, job: MakeJob) -> None:
        most = max(node.allocatable.gpus for node in cluster.engine.nodes())
        began = time.monotonic()
        with pytest.raises(NoGpu, match=f"No node of the cluster has {most + 1} nvidia.com/gpu"):
            engine.run(job("true", resources=replace(self.ONE, gpus=most + 1)), Log())
        assert time.monotonic() - began < 20


class TestNetwork:
    # Some plugins learn of a pod only when it runs.
    PROBE = "sleep 4; for a in $ADDRESSES; do nc -w 2 $a $PORT </dev/null && echo IN; done; echo tried"

    @pytest.mark.parametrize("network", [False, True])
    def test_an_algorithm_reaches_the_machine_only_if_its_document_opens_the_network(
        self, engine: Any, job: MakeJob, listener: tuple[str, str], network: bool
    ) -> None:
        log = Log()
        given = {"ADDRESSES": listener[0], "PORT": listener[1]}
        engine.run(job(self.PROBE, environment=given, sandbox=Sandbox(network=network)), log)
        said = log.text("stdout").splitlines()
        # A cluster mixes both streams, and what nc says of a refusal may come behind it.
        assert b"tried" in said
        assert (b"IN" in said) is network


def test_a_flow_run_whose_own_node_is_lost_has_crashed_and_goes_on_elsewhere_when_that_is_back(
    installed: Installed, losable: Callable[[], object]
) -> None:
    """On the lost node flow run and container go on, and reach nobody. Once the cluster gives their pods up, Prefect's worker says Crashed;
    when the node is back it ends them, as a drain would, and Prefect's process on it has its run scheduled again.
    """
    run_id = installed.begin("in-pod-lasts")
    first, flow = installed.algorithm_pod(run_id), installed.flow_pod(run_id)
    assert first["spec"]["nodeName"] == flow["spec"]["nodeName"] == NODE
    losable()
    began = time.monotonic()
    run = installed.server.wait_for(run_id, "CRASHED", seconds=300)
    print(f"Crashed after {time.monotonic() - began:.0f} s: {run['state']['message']}")
    assert not installed.here(run["labels"]["oasis.output"]).exists()

    subprocess.run([PROGRAM, "back"], check=True, stdin=subprocess.DEVNULL)
    eventually(lambda: first["metadata"]["name"] not in installed.left(run_id), 120)
    again = installed.algorithm_pod(run_id)
    assert again["metadata"]["annotations"][spec.ATTEMPT] == "2"
    installed.server.run("prefect", "flow-run", "cancel", run_id)
    installed.server.wait_for(run_id, "CANCELLED", seconds=120)
    eventually(lambda: installed.left(run_id) == [], 60)
    eventually(lambda: not (installed.folders["oasis-flows-workspace"] / "workspaces" / run_id).exists(), 60)
