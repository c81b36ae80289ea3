"""The reference library of the Train API, in Python, as a peer: trains that it makes visit a station, and travel on.

It is on no package index. Where it is installed from its source (`pip install git+https://github.com/PersonalHealthTrain/train-api-python`)
these tests run; where it is not, `tests/conftest.py` does not collect them, for CI takes no skipped test.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import State

from oasis_flows import settings, visit_record
from oasis_flows.__main__ import main
from oasis_flows.blocks import Station
from oasis_flows.errors import TrainFailed, TrainRefused
from oasis_flows.flows.train import train
from oasis_flows.station_keys import trusted
from tests.images import TinyImage, busybox_layer, docker_archive, layer

SCRIPT = "/opt/pht_train/algorithm/count.py"
COUNTING = """
from pht.entrypoint import cli_for_train
from pht.requirement import Require
from pht.requirement.environment_variable import url_by_name
from pht.train import SimpleDockerTrain

class Counting(SimpleDockerTrain):
    def __init__(self):
        super().__init__("count", "1.0", {base!r}, ["station.{number}"])
        self.url = url_by_name("PHT_URL")
        self.model = self.model_file("count")

    def requirements(self):
        return Require(self.url)

    def model_summary(self):
        return "counted to " + str(self.model.read_or_default(0))

    def run_algorithm(self, info, log):
        print("at station", info.station_id, "{{")
        {run}

cli_for_train(Counting())
"""
COUNT = "self.model.write(str(self.model.read_or_default(0) + 1))"


def python_layer() -> bytes:
    """This machine's Python, what it is linked with, and the reference library."""
    program, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    linked = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    files = {path: (0o755, Path(path).read_bytes()) for path in re.findall(r"(/\S+) \(0x", linked)}
    files |= {str(program): (0o755, program.read_bytes())}
    unneeded = {"test", "site-packages", "dist-packages", "__pycache__", "idlelib", "ensurepip", "tkinter", "lib2to3"}
    spec = find_spec("pht")
    assert spec is not None
    for root in (library, *map(Path, spec.submodule_search_locations or ())):
        place = "/opt/reference/pht" if root.name == "pht" else str(library)
        for path in root.rglob("*.py"):
            if not unneeded & set(path.relative_to(root).parts):
                files[f"{place}/{path.relative_to(root)}"] = (0o644, path.read_bytes())
    return layer({path[1:]: content for path, content in files.items()})


@pytest.fixture(scope="module")
def python() -> bytes:
    return python_layer()


@pytest.fixture
def counting(docker_api: Any, tmp_path: Path, python: bytes) -> Iterator[Callable[[str], str]]:
    """Makes a train with this in its algorithm, and the base that it names, which lacks nothing but that."""
    config = {
        "Env": ["PATH=/bin", "PYTHONPATH=/opt/reference", "PYTHONDONTWRITEBYTECODE=1"],
        "Entrypoint": [str(Path(sys.executable).resolve()), SCRIPT],
    }
    with ExitStack() as made:

        def load(name: str, *layers: bytes) -> None:
            image = TinyImage(tags=(name,), layers=(busybox_layer(), python, *layers), config=config)
            with docker_archive(tmp_path / "image.tar", image).open("rb") as file:
                list(docker_api.load_image(file))
            made.callback(docker_api.remove_image, name, force=True)

        def make(run: str) -> str:
            base, name = (f"oasis-test/{kind}_{uuid.uuid4().hex[:12]}:1" for kind in ("base", "train"))
            script = COUNTING.format(base=base, number=uuid.uuid4().int % 10**6, run=run)
            load(base, layer({"opt/unique": (0o644, base.encode())}))
            load(name, layer({SCRIPT[1:]: (0o644, script.encode()), "opt/pht_train/model/.keep": (0o644, b"")}))
            return name

        yield make


@pytest.fixture
def visit(prefect_server: object, here: Path) -> Callable[..., State[Any]]:
    def make(image: str, **environment: str) -> State[Any]:
        station = Station(station_id=7, environment=environment, memory="256MiB", policy={"demand_rebase": True})
        station.save("hospital-a", overwrite=True)
        return train(image, station, return_state=True)  # type: ignore[return-value]

    return make


URL = {"PHT_URL": "https://data.example.org/fhir"}


def test_its_train_visits_twice(docker_api, counting, visit, capsys):
    first = visit(counting(COUNT), **URL)
    assert first.is_completed(), first.message
    # The second takes the name of the first, as the library asks for one name only.
    before = docker_api.inspect_image(first.result().image)["Id"]
    second = visit(first.result().image, **URL)
    assert second.is_completed(), second.message
    image, folder = second.result().image, Path(second.result().record)
    try:
        assert main(["train", "describe", image]) == 0
        told = capsys.readouterr().out
        assert "Train API 1.0, 2 visits so far\nrequires  PHT_URL: URL" in told
        assert "summary   counted to 2" in told
        assert "at station 7 {\n" in (folder / "log.txt").read_text()
        assert (folder / "summary.txt").read_text() == "counted to 2"
        findings = visit_record.verify_folder(folder, trusted(settings.current()))
        assert [finding.link["successor"]["made_by"] for finding in findings] == ["rebase", "rebase"]
    finally:
        docker_api.remove_image(image, force=True)
        docker_api.remove_image(before)


def test_it_ends_with_0_on_failure_and_that_is_no_success(counting, visit):
    state = visit(counting('raise ValueError("no data")'), **URL)
    assert isinstance(state.result(raise_on_failure=False), TrainFailed)
    assert "no data" in str(state.result(raise_on_failure=False))


def test_it_does_not_enforce_its_requirements_and_the_station_does(counting, visit):
    state = visit(counting(COUNT))
    assert isinstance(state.result(raise_on_failure=False), TrainRefused)
    assert "PHT_URL is not set" in str(state.message)
