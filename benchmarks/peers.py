"""Other orchestrators beside us: libraries, each in a virtual environment of its own, in a warm process that runs a container for each line.

Neither has its scheduler here, nor its web server, nor a database on another machine: it is what their own documentation calls a test run,
in one process, so they are measured at their quickest.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.surroundings import IMAGE, program

_LINES = """
import os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
def serve(once):
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        once()
        print("done", file=answers, flush=True)
"""

LABEL = "oasis-flows.benchmark"

DAGSTER = f"""{_LINES}
from dagster import DagsterInstance, asset, materialize
from dagster_docker import PipesDockerClient

@asset
def nothing(context, pipes: PipesDockerClient):
    options = dict(labels=["{LABEL}"], network_mode="none", read_only=True, cap_drop=["ALL"], mem_limit="1g", nano_cpus=10**9)
    return pipes.run(image="{IMAGE}", command=["true"], context=context, container_kwargs=options).get_materialize_result()

instance = DagsterInstance.get()
serve(lambda: materialize([nothing], resources={{"pipes": PipesDockerClient()}}, instance=instance, raise_on_error=True))
"""

AIRFLOW = f"""{_LINES}
from airflow.providers.docker.operators.docker import DockerOperator
from airflow.sdk import DAG

with DAG("nothing") as dag:
    DockerOperator(
        task_id="nothing", image="{IMAGE}", command="true", auto_remove="force", network_mode="none", mem_limit="1g", cpus=1,
        docker_url=os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"), mount_tmp_dir=False,
    )

def once():
    if str(dag.test().state) != "success":
        raise SystemExit("it failed")

if __name__ == "__main__":
    serve(once)
"""

PEERS = {"Dagster's docker pipes": ("dagster", DAGSTER), "Airflow's DockerOperator": ("airflow", AIRFLOW)}


@contextmanager
def warm(folder: Path) -> Iterator[dict[str, Callable[[], None]]]:
    """What runs a container by each peer that is installed, until the block ends."""
    with ExitStack() as stack:
        stack.callback(_remove_containers)
        yield {
            name: stack.enter_context(_process(folder / command, Path(found).parent / "python", text))
            for name, (command, text) in PEERS.items()
            if (found := program(command))
        }


def _remove_containers() -> None:
    """Dagster leaves each container that it ran."""
    left = subprocess.run(
        ["docker", "ps", "-aq", f"--filter=label={LABEL}"], capture_output=True, text=True, check=True
    ).stdout.split()
    if left:
        subprocess.run(["docker", "rm", *left], stdout=subprocess.DEVNULL, check=True)


@contextmanager
def _process(home: Path, python: Path, text: str) -> Iterator[Callable[[], None]]:
    (home / "dags").mkdir(parents=True)
    (home / "dags" / "peer.py").write_text(text)
    around = {**os.environ, "DAGSTER_HOME": str(home), "AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    with (home / "said").open("wb") as said:
        if "airflow" in text:
            for command in (["db", "migrate"], ["dags", "reserialize"]):
                subprocess.run([python.parent / "airflow", *command], env=around, stdout=said, stderr=said, check=True)
        process = subprocess.Popen(
            [python, home / "dags" / "peer.py"],
            env=around,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
    assert process.stdin is not None  # noqa: S101
    assert process.stdout is not None  # noqa: S101
    told, asked = process.stdout, process.stdin

    def answer(wanted: str) -> None:
        line = told.readline()
        if line.strip() != wanted:
            raise RuntimeError(f"{python} said {line!r}: {(home / 'said').read_text()[-2000:]}")

    def once() -> None:
        asked.write("\n")
        asked.flush()
        answer("done")

    try:
        answer("ready")
        yield once
    finally:
        asked.close()
        process.wait(60)
