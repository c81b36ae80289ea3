"""Signals to a run in the terminal whose algorithm runs on a cluster: on the API double, with the claim mounted, and with files carried.

On a real one, where there is one, they are in `test_cancel`.
"""

import json
import os
import signal
import subprocess
from contextlib import suppress

import pytest

from oasis_flows.blocks import Algorithm, Dataset, DockerImage
from tests.servers.engine import eventually
from tests.servers.kube import Script, double_of_a_cluster, running
from tests.servers.prefect import BIN, ROOT


@pytest.fixture(params=["mounted", "carried"])
def far(request, prefect_server, here, tmp_path):
    """A double whose pods run until they are deleted; and the variables of a run there."""
    claim = tmp_path / "claim"
    claim.mkdir()
    with double_of_a_cluster(claim if request.param == "carried" else None) as (double, address):
        double.script = Script(states=((0.0, running()),))
        config = {
            "current-context": "x",
            "clusters": [{"name": "c", "cluster": {"server": address}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "flows"}}],
        }
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        changes = {
            "KUBECONFIG": str(tmp_path / "kubeconfig"),
            "OASIS_FLOWS_ENGINE": "kubernetes",
            "OASIS_FLOWS_HOME": str(here),
            "OASIS_FLOWS_KUBERNETES_CLAIM": "work",
        }
        if request.param == "carried":
            changes["OASIS_FLOWS_KUBERNETES_CARRIER"] = "127.0.0.1:1/runner@sha256:" + "1" * 64
        yield double, claim, changes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(prefect_server, here, far, tmp_path, number, code):
    double, claim, changes = far
    (here / "letters").mkdir(parents=True)
    (here / "letters" / "a.txt").write_text("a")
    Dataset(url=str(here / "letters")).save("letters", overwrite=True)
    image = DockerImage(image_id="127.0.0.1:1/busybox@sha256:" + "0" * 64)
    Algorithm(docker_image=image, command=["sh", "-c", "sleep 600"]).save("sleeper", overwrite=True)
    process = subprocess.Popen(
        [str(BIN / "oasis-flows"), "run", "sleeper", "letters"],
        env=prefect_server.env | changes,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        eventually(lambda: any("begun" in str(lines) for lines in [*double.logs.values()]) or process.poll() is not None, 120)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0].decode()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    assert process.returncode in (code, -number), said
    assert "Traceback" not in said
    assert (double.jobs, double.pods) == ({}, {})
    assert list(claim.glob("carried/*")) == []
    assert list((here / "workspaces").iterdir()) == []
    ours = {"name": {"any_": ["sleeper on letters"]}}
    (run,) = prefect_server.api("/flow_runs/filter", {"flow_runs": ours, "sort": "START_TIME_DESC", "limit": 1})
    assert run["state_type"] in ("CRASHED", "CANCELLED"), run["state"]["message"]
