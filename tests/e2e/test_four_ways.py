"""The main job by a command, a schedule and a Python call; the fourth way, the UI, has a file of its own."""

import json
import time
from pathlib import Path

import pytest

REFERENCES = {
    "algorithm": {"$ref": {"block_document_slug": "algorithm/co2-report"}},
    "input_dataset": {"$ref": {"block_document_slug": "dataset/co2-weekly"}},
}

CALL = """
from oasis_flows import Algorithm, Dataset, DockerImage, algorithm_task

image = DockerImage(image_id="oasis-flows/co2-report:1")
algorithm = Algorithm(docker_image=image, command="co2-report --threshold {threshold}", parameters={"threshold": 1.0})
dataset = algorithm_task(algorithm, Dataset(url=SAMPLE), parameters={"threshold": 2.0})
print(dataset.url)
"""


def assert_published(run, server):
    """The run's output is there, whole, and nothing else is left."""
    output = Path(run["labels"]["oasis.output"])

    assert {path.name for path in output.iterdir()} == {"data", "log.txt", "task.json", "manifest.jsonl"}
    assert len((output / "manifest.jsonl").read_text().splitlines()) == 47
    assert json.loads((output / "task.json").read_text())["status"] == "Succeeded"
    assert b"44 files, 2284 weeks" in (output / "log.txt").read_bytes()
    assert not (server.home / "workspaces" / run["id"]).exists()


RECURRING = """
pull: []
deployments:
  - name: hourly
    entrypoint: oasis_flows.flows.algorithm_task.algorithm_task
    work_pool: {{name: gpu-process}}
    # On the deployment, not on the schedule: Prefect forgets a schedule's own parameters when it is paused and resumed.
    parameters: {parameters}
    schedules:
      - {{interval: 3600, anchor_date: "{anchor}"}}
"""


@pytest.fixture(scope="module", autouse=True)
def hourly(deployed, worker, tmp_path_factory):
    """A deployment whose time comes while the other ways are gone; returns its id."""
    soon = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - 3600 + 20))
    file = tmp_path_factory.mktemp("schedule") / "hourly.yaml"
    file.write_text(RECURRING.format(parameters=json.dumps(REFERENCES), anchor=soon))
    deployed.run("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file))
    yield deployed.api("/deployments/name/algorithm-task/hourly")["id"]
    deployed.run("prefect", "deployment", "delete", "algorithm-task/hourly")


def test_by_a_command(deployed, worker):
    parameters = [text for name, value in REFERENCES.items() for text in ("-p", f"{name}={json.dumps(value)}")]
    deployed.run("prefect", "deployment", "run", "algorithm-task/algorithm-task", *parameters, "--watch")
    wanted = {"deployments": {"name": {"any_": ["algorithm-task"]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}
    run = deployed.api("/flow_runs/filter", wanted)[0]

    assert_published(deployed.wait_for(run["id"], "COMPLETED"), deployed)
    assert run["name"] == "co2-report on co2-weekly"
    assert set(run["tags"]) >= {"oasis-flows", "algorithm:co2-report", "dataset:co2-weekly"}


def test_by_a_python_call_without_any_server(deployed, tmp_path):
    script = tmp_path / "call.py"
    script.write_text(CALL.replace("SAMPLE", repr(str(Path("examples/co2-weekly").absolute()))))
    alone = {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_API_URL": "",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "OASIS_FLOWS_HOME": str(tmp_path / "home"),
    }
    output = Path(deployed.run("python", str(script), **alone).stdout.splitlines()[-1])

    assert (output / "manifest.jsonl").exists()
    assert json.loads((output / "task.json").read_text())["parameters"] == {"threshold": 2.0}
    assert list((tmp_path / "home" / "workspaces").iterdir()) == []


def test_by_the_command_line(deployed):
    done = deployed.run(
        "oasis-flows", "run", "co2-report", "co2-weekly", "-p", "threshold=2", "--output-name", "by-hand", "--json"
    )
    facts = json.loads(done.stdout.splitlines()[-1])

    assert facts["status"] == "Succeeded"
    assert facts["dataset"] == "by-hand"
    assert facts["log_tail"][-1].startswith("wrote summary.csv")
    assert_published(deployed.api(f"/flow_runs/{facts['flow_run_id']}"), deployed)


def test_by_a_schedule(deployed, hourly):
    wanted = {"deployments": {"id": {"any_": [hourly]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 1}
    deadline = time.monotonic() + 60
    while not (runs := deployed.api("/flow_runs/filter", wanted)):
        assert time.monotonic() < deadline, "the schedule made no run"
        time.sleep(0.5)
    run = deployed.wait_for(runs[0]["id"], "COMPLETED")

    assert run["auto_scheduled"]
    assert_published(run, deployed)
