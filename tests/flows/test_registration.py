"""How the block types get to a server, and what a document holds there."""

import importlib.metadata
import sqlite3
from pathlib import Path

import pytest
from prefect_docker.host import DockerHost

from oasis_flows import machine, settings
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.errors import DescriptionError
from tests.servers.prefect import PrefectServer

SLUGS = {"algorithm", "dataset", "dataset-store", "docker-image", "prerequisite", "station"}


def test_prefects_own_command_registers_the_types(prefect_server: PrefectServer):
    prefect_server.run("prefect", "block", "register", "-m", "oasis_flows.blocks")
    known = {block_type["slug"] for block_type in prefect_server.api("/block_types/filter", {})}

    assert known >= SLUGS


def test_prefect_finds_the_types_by_the_entry_point():
    (entry,) = importlib.metadata.entry_points(group="prefect.collections", name="oasis_flows")
    blocks = entry.load()

    assert {getattr(blocks, name).get_block_type_slug() for name in blocks.__all__} == SLUGS


def test_a_secret_is_nowhere_in_clear_on_the_server(prefect_server: PrefectServer):
    secret = "hunter2-never-in-clear"
    DatasetStore(url="s3://bucket/x", access_key_id="key", secret_access_key=secret).save("guarded", overwrite=True)
    store = DatasetStore.load("guarded")
    Dataset(url="s3://bucket/y", store=store).save("guarded", overwrite=True)

    assert store.secret_access_key.get_secret_value() == secret
    told = prefect_server.api("/block_documents/filter", {"include_secrets": False})
    assert secret not in str(told)
    home = Path(prefect_server.env["PREFECT_HOME"])
    files = [path for path in home.rglob("*") if path.is_file()]
    (database,) = [path for path in files if path.suffix == ".db"]
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        assert connection.execute("select count(*) from block_document where name = 'guarded'").fetchone()[0] == 2
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_a_document_survives_what_it_refers_to_being_edited(prefect_server: PrefectServer):
    DockerImage(image_id="a:1").save("edited", overwrite=True)
    Algorithm(docker_image=DockerImage.load("edited")).save("edited", overwrite=True)
    DockerImage(image_id="a:2").save("edited", overwrite=True)

    assert Algorithm.load("edited").docker_image.image_id == "a:2"


def test_a_docker_host_document_says_where_the_engine_is(prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch):
    DockerHost(base_url="unix:///var/run/docker.sock").save("the-engine", overwrite=True)
    monkeypatch.setenv("OASIS_FLOWS_DOCKER_HOST", "the-engine")

    assert "cpus" in machine.open_engine(settings.current()).describe().name


@pytest.mark.parametrize(
    ("variable", "value", "advice"),
    [
        ("OASIS_FLOWS_DOCKER_HOST", "no-such", "Make it in the Prefect UI"),
        ("OASIS_FLOWS_ENGINE", "nonsense", "Set OASIS_FLOWS_ENGINE to docker"),
    ],
)
def test_a_setting_that_leads_nowhere_is_refused(prefect_server, monkeypatch, variable, value, advice):
    monkeypatch.setenv(variable, value)

    with pytest.raises(DescriptionError, match=advice):
        machine.open_engine(settings.current())
