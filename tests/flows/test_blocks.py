"""The block types: Prefect's own standard, and every refusal that says what to write instead."""

import json

import pytest
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from prefect_docker.host import DockerHost
from pydantic import ValidationError

from oasis_flows import blocks
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage, Prerequisite

TYPES = [getattr(blocks, name) for name in blocks.__all__]
IMAGE = DockerImage(image_id="busybox:1")


@pytest.mark.parametrize("block", TYPES)
class TestPrefectsStandard(BlockStandardTestSuite):
    @pytest.fixture
    def block(self, block):
        return block

    def test_has_a_valid_image(self, block):
        """Prefect's test downloads the logo. What can be known offline: it is the one of prefect-docker's own blocks, so it
        is as valid as theirs. That the address answers is not shown here."""
        assert block._logo_url == DockerHost._logo_url


def refusal(block_type, **fields):
    with pytest.raises(ValidationError) as refused:
        block_type(**fields)
    return str(refused.value)


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({}, "Write image_id: NAME:TAG, or image_file"),
        ({"image_id": "a:1", "image_file": "/a.tar"}, "Keep the one"),
        ({"image_id": "https://ghcr.io/a"}, "without https"),
        ({"image_id": "a b"}, "registry/name:tag"),
        ({"image_file": "a.tar"}, "Write the whole path: /"),
    ],
)
def test_an_image_has_exactly_one_usable_source(fields, advice):
    assert advice in refusal(DockerImage, **fields)


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"memory": "lots"}, "such as 512MiB"),
        ({"memory": "1g"}, "such as 512MiB"),
        ({"memory": "-1GiB"}, "such as 512MiB"),
        ({"memory": "4KiB"}, "such as 512MiB or 8GiB"),
        ({"memory": "9999999TiB"}, "such as 512MiB or 8GiB"),
        ({"shm_size": "0"}, "such as 512MiB"),
        ({"cpus": 0}, "such as 0.5 or 4"),
        ({"cpus": -2}, "such as 0.5 or 4"),
        ({"cpus": float("nan")}, "such as 0.5 or 4"),
        ({"cpus": float("inf")}, "such as 0.5 or 4"),
        ({"gpu_count": 0}, "leave gpu: false"),
        ({"gpu_count": -1}, "or all"),
        ({"gpu_count": 1.5}, "or all"),
        ({"pids_limit": 0}, "such as 1024"),
        ({"max_output_files": 0}, "such as 1000000"),
        ({"max_output_size": "much"}, "such as 512MiB"),
        ({"max_log_size": 0}, "from 1KiB to 1024TiB"),
        ({"timeout_seconds": 0}, "such as 3600"),
        ({"timeout_seconds": -5}, "such as 3600"),
        ({"command": "echo 'half"}, "Close the quote"),
        ({"command": "x" * 100_001}, "Put long scripts into the image"),
        ({"entrypoint": ["a\0"]}, "NUL"),
        ({"environment": {"A B": "x"}}, "Use letters, digits and _"),
        ({"environment": {"A": 1}}, 'A: "1"'),
        ({"environment": {"A": True}}, 'A: "true"'),
        ({"environment": {"A": "\0"}}, "NUL"),
        ({"environment": {"OASIS_INPUT": "x"}}, "Choose another name"),
        ({"environment": {"OASIS_PARAMETER_x": "x"}}, "Choose another name"),
        ({"secret_environment": {"TOKEN": "s3cr3t!"}}, "never hold the secret itself"),
        ({"environment": {"A": "x"}, "secret_environment": {"A": "x"}}, "Keep one of them"),
        ({"user": "root; rm"}, "such as 1000:1000"),
        ({"working_dir": "/"}, "such as /work"),
        ({"working_dir": "work"}, "such as /work"),
        ({"working_dir": "/work/../etc"}, "such as /work"),
        ({"working_dir": "/proc/self"}, "belongs to the kernel"),
        ({"working_dir": "/sys"}, "belongs to the kernel"),
        ({"parameters": {"a b": 1}}, "Use letters, digits and _"),
        ({"parameters": {"a": [1]}}, "null if each run must give it"),
        ({"parameters": {"a": float("nan")}}, "Write a number"),
        ({"capabilities": ["ALL"]}, "such as SYS_PTRACE"),
    ],
)
def test_an_algorithm_that_makes_no_sense_is_refused_with_advice(fields, advice):
    assert advice in refusal(Algorithm, docker_image=IMAGE, **fields)


def test_a_default_keeps_its_type():
    written = {"a": 1, "b": 1.0, "c": True, "d": "1", "e": None}

    assert [type(v) for v in Algorithm(docker_image=IMAGE, parameters=written).parameters.values()] == [
        int,
        float,
        bool,
        str,
        type(None),
    ]


@pytest.mark.parametrize("block_type", [Dataset, DatasetStore])
@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("", "Write the whole path"),
        ("photos/2026", "Write the whole path: /"),
        ("s3://", "s3://bucket/folder"),
        ("s3://user:password@bucket/x", "DatasetStore document"),
        ("https://h/x?X-Amz-Signature=abc", "DatasetStore document"),
        ("file://data/x", "Write the whole path: file:///data/x"),
    ],
)
def test_a_folder_is_named_so_that_any_machine_understands_it(block_type, url, advice):
    assert advice in refusal(block_type, url=url)


@pytest.mark.parametrize("fields", [{"access_key_id": "a"}, {"secret_access_key": "b"}])
def test_keys_come_in_pairs(fields):
    assert "Give both" in refusal(DatasetStore, url="s3://b/x", **fields)


def test_the_address_of_a_server_is_one():
    assert "Write http://HOST:PORT" in refusal(DatasetStore, url="s3://b/x", endpoint_url="s3.example.org")


@pytest.mark.parametrize(
    ("url", "kept"), [("s3://b/x/", "s3://b/x"), ("/data/x/", "/data/x"), ("/", "/"), ("memory://", "memory://")]
)
def test_a_url_has_one_spelling(url, kept):
    assert Dataset(url=url).url == kept


def test_secrets_show_in_no_representation():
    store = DatasetStore(url="s3://b/x", access_key_id="key", secret_access_key="hunter2")

    assert "hunter2" not in repr(store) + str(store) + json.dumps(store.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("block_type", "fields"),
    [
        (DockerImage, {"image_file": "https://bob:hunter2@h/img.tar"}),
        (DatasetStore, {"url": "s3://b/x", "endpoint_url": "http://key:hunter2@h:1"}),
        (DatasetStore, {"url": "s3://b/x", "secret_access_key": "hunter2"}),
        (Dataset, {"url": "s3://b/x?sig=hunter2"}),
        (Algorithm, {"docker_image": IMAGE, "secret_environment": {"A": "hunter2!"}}),
    ],
)
def test_a_secret_in_the_wrong_place_is_refused_and_not_repeated(block_type, fields):
    assert "hunter2" not in refusal(block_type, **fields)


def test_the_fields_of_the_contract_are_there_and_new_ones_come_last():
    assert list(Algorithm.model_fields)[:18] == [
        "docker_image",
        "command",
        "entrypoint",
        "environment",
        "secret_environment",
        "gpu",
        "gpu_count",
        "cpus",
        "memory",
        "shm_size",
        "timeout_seconds",
        "network",
        "user",
        "working_dir",
        "parameters",
        "prerequisites",
        "writable_root",
        "new_privileges",
    ]
    assert list(DockerImage.model_fields) == ["image_id", "image_file", "registry_credentials"]
    assert list(Dataset.model_fields) == ["url", "store", "file_count", "size_bytes", "manifest_digest"]
    assert list(Prerequisite.model_fields)[:9] == [
        "name",
        "plugin",
        "plugin_params",
        "require",
        "template_variables",
        "requireStorages",
        "failurePolicy",
        "type",
        "description",
    ]
    assert list(DatasetStore.model_fields) == ["url", "endpoint_url", "access_key_id", "secret_access_key", "region"]


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"plugin": "ssh"}, "The plugins are cmd and pvc_storage"),
        ({"callbacks": [{"event": "taskStart", "commands": ["a"]}]}, "The events are taskStarts"),
        ({"plugin_params": {"callbacks": [{"event": "taskEnds", "commands": ["{{ x }}"]}]}}, "Add to template_variables"),
        ({"failurePolicy": "retry"}, "'fail' or 'ignore'"),
    ],
)
def test_a_prerequisite_that_makes_no_sense_is_refused_with_advice(fields, advice):
    assert advice in refusal(Prerequisite, **fields)


def test_what_an_algorithm_requires_is_a_list_of_names_and_variables():
    assert "Write its name" in refusal(Algorithm, docker_image=IMAGE, prerequisites=[{"uri": "x"}])
    assert "must be a list" in refusal(Algorithm, docker_image=IMAGE, prerequisites="x")
    assert "is set by oasis-flows itself" in refusal(Algorithm, docker_image=IMAGE, environment={"OASIS_SECRET_x": "y"})
    assert Algorithm(docker_image=IMAGE, prerequisites=None).prerequisites == []
