"""The configuration of OSCAR-Batch, and what its programs are told."""

import copy
import json

import pytest

from oasis_flows.errors import DescriptionError
from oasis_flows.manifest import Entry
from oasis_flows.oscar import index_lines, parse_config, range_of, resources_of
from oasis_flows.sharding import by_count

# As the documentation of OSCAR-Batch has it, with secrets that are none.
CONFIG = {
    "MinIO": {"url": "minio.crazy-kowalevski5.im.grycap.net", "access_key": "minio", "secret_key": "s3cret-of-minio"},
    "bucket": {"name": "fish-detector", "folder_prefix": "input/"},
    "output": {"file": "index.txt"},
    "oscar_cluster": {
        "url": "crazy-kowalevski5.im.grycap.net",
        "auth_basic": {"username": "oscar", "password": "p4ssword-of-oscar"},
        "auth_token": {"token": ""},
    },
    "service": {"name": "fish-detector"},
}


def changed(path, value=None, *, drop=False):
    config = copy.deepcopy(CONFIG)
    *folders, last = path.split(".")
    place = config
    for folder in folders:
        place = place[folder]
    if drop:
        del place[last]
    else:
        place[last] = value
    return json.dumps(config)


def test_a_configuration_is_taken_as_it_is():
    config = parse_config(json.dumps(CONFIG))

    assert config.dataset_url == "s3://fish-detector/input"
    assert config.endpoint_url == "https://minio.crazy-kowalevski5.im.grycap.net"
    assert config.cluster_url == "https://crazy-kowalevski5.im.grycap.net"
    assert (config.access_key, config.secret_key, config.index) == ("minio", "s3cret-of-minio", "index.txt")
    assert "s3cret" not in repr(config)
    assert "p4ssword" not in repr(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "`MinIO.url` is missing; `MinIO.access_key` is missing"),
        (changed("MinIO", drop=True), "`MinIO.secret_key` is missing"),
        (changed("bucket.name", drop=True), "`bucket.name` is missing"),
        (changed("bucket", "fish"), "`bucket.name` is missing"),
        (changed("MinIO.secret_key", 7), "`MinIO.secret_key` is a number and must be text"),
        (changed("output.file", {"a": 1}), "`output.file` is an object and must be text"),
        (changed("service.name", ""), "`service.name` is empty"),
        (changed("oscar_cluster.url", ["x"]), "`oscar_cluster.url` is a list and must be text"),
    ],
)
def test_what_is_missing_or_of_the_wrong_type_is_named_and_no_secret_is(text, words):
    with pytest.raises(DescriptionError) as refused:
        parse_config(text)

    assert words in str(refused.value)
    assert "s3cret" not in str(refused.value)


def test_no_cluster_and_no_prefix_are_allowed():
    config = parse_config(changed("oscar_cluster", drop=True))

    assert config.cluster_url == ""
    assert parse_config(changed("bucket.folder_prefix", "")).dataset_url == "s3://fish-detector"


def test_the_resources_of_a_service_are_those_of_an_algorithm():
    assert resources_of({"cpu": "1.0", "memory": "3Gi"}) == {"cpus": 1.0, "memory": str(3 << 30)}
    assert resources_of({"cpu": "500m", "memory": "256Mi", "image": "x"})["cpus"] == 0.5
    with pytest.raises(DescriptionError, match="--service-cpus"):
        resources_of({"cpu": "1"})


def test_ranges_count_from_one_and_have_both_ends_and_each_line_is_in_one():
    """The seed's rule: a program takes lines[start - 1 : end]."""
    lines = [line.rstrip("\n") for line in index_lines(Entry(f"{number}.jpg", 1) for number in range(10))]
    taken = []
    for shard in by_count(10, 3):
        told = json.loads(range_of(shard))
        taken += lines[told["start"] - 1 : told["end"]]

    assert taken == lines == [f"input/{number}.jpg" for number in range(10)]
