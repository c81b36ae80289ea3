"""Images on their way to a cluster: pinned by, and pushed to, a real registry, without any engine."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from oasis_flows.engines import kube_image
from oasis_flows.engines.kube_image import Repository
from oasis_flows.errors import DescriptionError, ImageDenied, ImageNotFound, InvalidImageFile, RegistryUnavailable
from oasis_flows.job import RegistryLogin
from tests.images import TinyImage, busybox_layer, docker_archive, layer, oci_archive
from tests.servers.registry import Registry

IMAGE = TinyImage(
    layers=(layer({"a": (0o644, b"a" * 100)}), layer({"b": (0o644, b"b")})), config={"Cmd": ["sh"], "Volumes": {"/v": {}}}
)


def repository(registry: Registry, path: str, login: RegistryLogin | None = None) -> Repository:
    return Repository.parse(f"http://{registry.address}/{path}", login or registry.login)


@pytest.mark.parametrize("write", [docker_archive, oci_archive])
@pytest.mark.parametrize("packed", [False, True])
def test_an_image_file_is_pushed_and_found_again_by_its_digest(registry, tmp_path, write, packed):
    place = repository(registry, f"push/{write.__name__.replace('_', '-')}-{packed}".lower())
    file = write(tmp_path / "image.tar", IMAGE, packed=packed)
    reference, config = kube_image.push(str(file), {}, place)

    assert config == IMAGE.config
    assert kube_image.pin(reference, None) == (reference, IMAGE.config)


def test_an_engine_pulls_what_was_pushed(registry, tmp_path, docker_api, docker_engine):
    from oasis_flows.job import ImageSource

    image = TinyImage(layers=(busybox_layer(), layer({"opt/unique": (0o644, os.urandom(16))})))
    reference, _ = kube_image.push(str(docker_archive(tmp_path / "image.tar", image)), {}, repository(registry, "pulled"))
    try:
        assert docker_engine.prepare(ImageSource(image_id=reference)) == reference
        assert docker_api.inspect_image(reference)["Id"] == image.id
    finally:
        docker_api.remove_image(reference, force=True)


def test_a_file_that_was_pushed_is_not_read_again(registry, tmp_path, monkeypatch):
    place = repository(registry, "again")
    file = docker_archive(tmp_path / "image.tar", IMAGE)
    first = kube_image.push(str(file), {}, place)

    def read(*_: object) -> None:
        raise AssertionError("it was read again")

    monkeypatch.setattr(kube_image, "read_archive", read)

    assert kube_image.push(str(file), {}, place) == first


def test_layers_that_are_there_are_left_out(registry, tmp_path, monkeypatch):
    place = repository(registry, "shared")
    kube_image.push(str(docker_archive(tmp_path / "one.tar", IMAGE)), {}, place)
    uploaded: list[int] = []
    really = kube_image._Registry.upload
    monkeypatch.setattr(
        kube_image._Registry, "upload", lambda self, pieces, size: uploaded.append(size) or really(self, pieces, size)
    )
    more = TinyImage(layers=(*IMAGE.layers, layer({"c": (0o644, b"c")})), config=IMAGE.config)
    kube_image.push(str(docker_archive(tmp_path / "two.tar", more)), {}, place)

    assert len(uploaded) == 2  # the new layer, and the configuration


def test_memory_does_not_grow_with_the_image(registry, tmp_path):
    large = TinyImage(layers=(layer({"zeros": (0o644, bytes(96 << 20))}),))
    file = docker_archive(tmp_path / "image.tar", large)
    del large
    tracemalloc.start()
    try:
        kube_image.push(str(file), {}, repository(registry, "large"))
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
    finally:
        tracemalloc.stop()


def test_a_login_is_shown_where_it_is_asked_for(private_registry, tmp_path):
    place = repository(private_registry, "private")
    reference, _ = kube_image.push(str(docker_archive(tmp_path / "image.tar", IMAGE)), {}, place)

    assert kube_image.pin(reference, private_registry.login)[0] == reference
    with pytest.raises(ImageDenied, match="without a login"):
        kube_image.pin(reference, None)
    wrong = RegistryLogin(registry=private_registry.address, username="tester", password="s3cret of nobody")
    with pytest.raises(ImageDenied) as caught:
        kube_image.pin(reference, wrong)
    assert "s3cret" not in str(caught.value)
    with pytest.raises(DescriptionError, match="were not sent"):
        kube_image.pin("example.org/a:1", private_registry.login)


def test_what_is_not_there_is_told(registry):
    with pytest.raises(ImageNotFound, match="There is no image"):
        kube_image.pin(f"{registry.address}/no/such:1", None)
    with pytest.raises(RegistryUnavailable):
        kube_image.pin("127.0.0.1:1/a:1", None)


def test_a_damaged_file_is_refused(registry, tmp_path):
    file = tmp_path / "image.tar"
    file.write_bytes(docker_archive(tmp_path / "whole.tar", IMAGE).read_bytes()[:1500])
    with pytest.raises(InvalidImageFile):
        kube_image.push(str(file), {}, repository(registry, "damaged"))


@pytest.mark.parametrize(
    ("reference", "host", "path", "version"),
    [
        ("busybox", "registry-1.docker.io", "library/busybox", "latest"),
        ("a/b:1", "registry-1.docker.io", "a/b", "1"),
        ("docker.io/a/b", "registry-1.docker.io", "a/b", "latest"),
        ("example.org/a/b/c:v1.2", "example.org", "a/b/c", "v1.2"),
        ("localhost/a", "localhost", "a", "latest"),
        ("example.org:5000/a@sha256:" + "0" * 64, "example.org:5000", "a", "sha256:" + "0" * 64),
        ("example.org/a:1@sha256:" + "0" * 64, "example.org", "a", "sha256:" + "0" * 64),
    ],
)
def test_names_are_read_as_engines_read_them(reference, host, path, version):
    found, said = kube_image.parse_reference(reference)

    assert (found.host, found.path, said) == (host, path, version)


@pytest.mark.parametrize("reference", ["UPPER", "a b", "", "example.org/", "a:b:c", "a@sha256:1"])
def test_what_is_no_name_is_refused(reference):
    with pytest.raises(ImageNotFound, match="is not an image's name"):
        kube_image.parse_reference(reference)


@pytest.mark.parametrize("text", ["algorithms", "example.org", "example.org/UPPER", "http://"])
def test_what_is_no_repository_is_refused(text):
    with pytest.raises(ImageNotFound, match="OASIS_FLOWS_KUBERNETES_REGISTRY"):
        Repository.parse(text)


def test_the_manifests_of_the_tests_are_as_published(registry, tmp_path: Path):
    reference, _ = kube_image.push(str(docker_archive(tmp_path / "image.tar", IMAGE)), {}, repository(registry, "shape"))
    _, manifest = kube_image._Registry(repository(registry, "shape"), None).manifest(reference.partition("@")[2])

    assert json.loads(json.dumps(manifest))["config"]["digest"] == IMAGE.id
    assert [each["mediaType"] for each in manifest["layers"]] == ["application/vnd.oci.image.layer.v1.tar"] * 2
