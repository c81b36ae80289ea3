"""Images from real registries and from files, sound and broken, into a real engine."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import tarfile
import threading
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from oasis_flows.engines import docker_image
from oasis_flows.engines.docker import DockerEngine
from oasis_flows.errors import (
    DescriptionError,
    EngineError,
    ImageDenied,
    ImageNotFound,
    InvalidImageFile,
    RegistryUnavailable,
    UnsupportedByEngine,
)
from oasis_flows.job import ContainerJob, ImageSource, Reason, RegistryLogin
from tests.contract.test_engine import Log
from tests.images import TinyImage, busybox_layer, docker_archive, docker_members, layer, oci_archive, write_tar
from tests.servers.registry import Registry, free_port


@pytest.fixture
def image(docker_api: Any) -> Iterator[TinyImage]:
    """An image that no engine has had yet; it is removed at the end."""
    made = TinyImage(layers=(busybox_layer(), layer({"opt/unique": (0o644, uuid.uuid4().bytes)})))
    yield made
    remove(docker_api, made.id)


def remove(api: Any, reference: str) -> None:
    """Remove an image if it is there, all of its names with it."""
    if docker_image._inspect(api, reference):
        api.remove_image(reference, force=True)


def loads(api: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every load from now on."""
    seen: list[str] = []
    really = docker_image._load

    def load(*arguments: Any) -> str:
        seen.append("load")
        return really(*arguments)

    monkeypatch.setattr(docker_image, "_load", load)
    return seen


def runs(engine: DockerEngine, make_job: Callable[..., ContainerJob], reference: str) -> bool:
    log = Log()
    ended = engine.run(make_job("echo", "hi", image=reference), log)
    return ended.reason is Reason.OK and log.text("stdout") == b"hi\n"


class TestRegistry:
    def test_pulled_by_digest_and_run(
        self,
        docker_engine: DockerEngine,
        docker_api: Any,
        registry: Registry,
        busybox: str,
        make_job: Callable[..., ContainerJob],
    ) -> None:
        name = registry.push(docker_api, busybox, "team/tool")
        first = docker_engine.prepare(ImageSource(image_id=name))
        assert first.startswith(f"{registry.address}/team/tool@sha256:")
        assert docker_engine.prepare(ImageSource(image_id=first)) == first
        assert runs(docker_engine, make_job, first)
        docker_api.remove_image(name)

    def test_login(self, docker_engine: DockerEngine, docker_api: Any, private_registry: Registry, busybox: str) -> None:
        name = private_registry.push(docker_api, busybox, "tool")
        login = private_registry.login
        assert login is not None
        with pytest.raises(ImageDenied, match=r"Give registry_credentials"):
            docker_engine.prepare(ImageSource(image_id=name))
        wrong = RegistryLogin(registry=login.registry, username="tester", password="wr0ng")
        with pytest.raises(ImageDenied, match=r"Correct the user name") as caught:
            docker_engine.prepare(ImageSource(image_id=name, login=wrong))
        assert "wr0ng" not in repr(caught.value) + repr(wrong)
        assert docker_engine.prepare(ImageSource(image_id=name, login=login)).startswith(
            f"{private_registry.address}/tool@sha256:"
        )
        docker_api.remove_image(name)

    def test_a_password_goes_to_its_own_registry_only(self, docker_engine: DockerEngine, registry: Registry) -> None:
        login = RegistryLogin(registry="https://elsewhere.invalid", username="me", password="s3cret")
        with pytest.raises(DescriptionError, match=r"they were not sent") as caught:
            docker_engine.prepare(ImageSource(image_id=f"{registry.address}/tool:1", login=login))
        assert "s3cret" not in str(caught.value)

    def test_missing(self, docker_engine: DockerEngine, registry: Registry) -> None:
        with pytest.raises(ImageNotFound, match=r"There is no image"):
            docker_engine.prepare(ImageSource(image_id=f"{registry.address}/nosuch:1"))

    @pytest.mark.parametrize("name", ["Upper/Case", "a b", "-x", "a::b", "sha256:" + "0" * 64, "x@sha256:12"])
    def test_bad_names(self, docker_engine: DockerEngine, name: str) -> None:
        with pytest.raises(ImageNotFound):
            docker_engine.prepare(ImageSource(image_id=name))

    def test_unreachable(self, docker_engine: DockerEngine) -> None:
        with pytest.raises(RegistryUnavailable) as caught:
            docker_engine.prepare(ImageSource(image_id=f"127.0.0.1:{free_port()}/tool:1"))
        assert caught.value.transient

    def test_cut_off(self, docker_engine: DockerEngine) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def hang_up() -> None:
                for _ in range(20):
                    listener.accept()[0].close()

            threading.Thread(target=hang_up, daemon=True).start()
            with pytest.raises(RegistryUnavailable):
                docker_engine.prepare(ImageSource(image_id=f"127.0.0.1:{listener.getsockname()[1]}/tool:1"))

    def test_local_name_and_id(self, docker_engine: DockerEngine, docker_api: Any, busybox: str) -> None:
        image_id = docker_api.inspect_image(busybox)["Id"]
        assert docker_engine.prepare(ImageSource(image_id=busybox)) == image_id
        assert docker_engine.prepare(ImageSource(image_id=image_id)) == image_id

    def test_another_architecture(self, docker_engine: DockerEngine, docker_api: Any, tmp_path: Path) -> None:
        name = f"oasis-test/arm:{uuid.uuid4().hex[:8]}"
        with docker_archive(tmp_path / "arm.tar", TinyImage(tags=(name,), architecture="arm64")).open("rb") as file:
            list(docker_api.load_image(file))
        with pytest.raises(UnsupportedByEngine, match=r"made for linux/arm64, and the engine runs linux/amd64"):
            docker_engine.prepare(ImageSource(image_id=name))
        docker_api.remove_image(name)


class TestFile:
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("write", [docker_archive, oci_archive])
    def test_loaded_and_run(
        self,
        docker_engine: DockerEngine,
        make_job: Callable[..., ContainerJob],
        image: TinyImage,
        tmp_path: Path,
        write: Callable[..., Path],
        packed: bool,
    ) -> None:
        # The name says nothing about what is in it.
        path = write(tmp_path / "image.bin", image, packed=packed)
        reference = docker_engine.prepare(ImageSource(image_file=str(path)))
        assert reference == image.id
        assert runs(docker_engine, make_job, reference)

    def test_attestations_are_no_images(self, docker_engine: DockerEngine, image: TinyImage, tmp_path: Path) -> None:
        path = oci_archive(tmp_path / "i.tar", image, attested=True)
        assert docker_engine.prepare(ImageSource(image_file=str(path))) == image.id

    def test_what_the_engine_saves(
        self, docker_engine: DockerEngine, docker_api: Any, image: TinyImage, tmp_path: Path
    ) -> None:
        docker_engine.prepare(ImageSource(image_file=str(docker_archive(tmp_path / "a.tar", image))))
        with (tmp_path / "saved.tar").open("wb") as file:
            for data in docker_api.get_image(image.id):
                file.write(data)
        remove(docker_api, image.id)
        assert docker_engine.prepare(ImageSource(image_file=str(tmp_path / "saved.tar"))) == image.id

    def test_not_loaded_twice_and_again_after_removal(
        self, docker_engine: DockerEngine, docker_api: Any, image: TinyImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = loads(docker_api, monkeypatch)
        path = docker_archive(tmp_path / "i.tar", image)
        copy = docker_archive(tmp_path / "copy.tar", image, packed=True)
        for file in (path, path, copy):
            assert docker_engine.prepare(ImageSource(image_file=str(file))) == image.id
        assert seen == ["load"]
        docker_api.remove_image(image.id, force=True)
        assert docker_engine.prepare(ImageSource(image_file=str(path))) == image.id
        assert seen == ["load", "load"]

    def test_a_changed_file_is_loaded(
        self, docker_engine: DockerEngine, docker_api: Any, image: TinyImage, tmp_path: Path
    ) -> None:
        path = docker_archive(tmp_path / "i.tar", image)
        docker_engine.prepare(ImageSource(image_file=str(path)))
        other = TinyImage(layers=(busybox_layer(), layer({"opt/unique": (0o644, uuid.uuid4().bytes)})))
        docker_archive(path, other)
        assert docker_engine.prepare(ImageSource(image_file=str(path))) == other.id
        remove(docker_api, other.id)

    def test_nobodys_tag_moves(
        self, docker_engine: DockerEngine, docker_api: Any, busybox: str, image: TinyImage, tmp_path: Path
    ) -> None:
        before = docker_api.inspect_image(busybox)["Id"]
        hostile = TinyImage(tags=(busybox,), layers=image.layers)
        assert docker_engine.prepare(ImageSource(image_file=str(docker_archive(tmp_path / "i.tar", hostile)))) == image.id
        assert docker_api.inspect_image(busybox)["Id"] == before

    def test_from_a_url_in_constant_memory(
        self, docker_engine: DockerEngine, docker_api: Any, make_job: Callable[..., ContainerJob], tmp_path: Path
    ) -> None:
        big = TinyImage(layers=(busybox_layer(), layer({"opt/big": (0o644, os.urandom(1 << 20) * 48)})))
        data = docker_archive(tmp_path / "i.tar", big).read_bytes()
        with fsspec.open("memory://images/big.tar", "wb") as file:
            file.write(data)
        del data, file
        tracemalloc.start()
        try:
            reference = docker_engine.prepare(ImageSource(image_file="memory://images/big.tar"))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 16 << 20
        assert runs(docker_engine, make_job, reference)
        remove(docker_api, reference)

    def test_names_in_it_are_no_paths(self, docker_engine: DockerEngine, image: TinyImage, tmp_path: Path) -> None:
        members = docker_members(image)
        manifest = json.loads(members.pop("manifest.json"))
        first, *others = manifest[0]["Layers"]
        members["../../../../tmp/oasis-escaped/layer.tar"] = members.pop(first)
        manifest[0]["Layers"] = ["../../../../tmp/oasis-escaped/layer.tar", *others]
        path = write_tar(tmp_path / "i.tar", {**members, "manifest.json": json.dumps(manifest).encode()})
        assert docker_engine.prepare(ImageSource(image_file=str(path))) == image.id
        assert not Path("/tmp/oasis-escaped").exists()


def broken(tmp_path: Path, kind: str) -> Path:
    """An archive that is not one usable image."""
    path, image = tmp_path / "image.tar", TinyImage(tags=("a:1",))
    other = TinyImage(tags=("b:1",), config={})
    whole = docker_archive(tmp_path / "whole", image).read_bytes()
    packed = gzip.compress(whole, 1)
    members = docker_members(image)
    # A layer that the engine has already is not read again.
    unique = TinyImage(layers=(layer({"unique": (0o644, uuid.uuid4().bytes)}),))
    contents: dict[str, Callable[[], Any]] = {
        "two images": lambda: docker_archive(path, image, other),
        "two in OCI": lambda: oci_archive(path, image, other),
        "no image": lambda: docker_archive(path),
        "wrong architecture": lambda: docker_archive(path, TinyImage(architecture="arm64")),
        "wrong system": lambda: docker_archive(path, TinyImage(os="windows")),
        "zstd layers": lambda: oci_archive(path, image, media="tar+zstd"),
        "container's files": lambda: path.write_bytes(busybox_layer()),
        "some tar": lambda: write_tar(path, {"data.csv": b"1,2"}),
        "no tar": lambda: path.write_bytes(b"hello " * 1000),
        "zip": lambda: path.write_bytes(b"PK\x03\x04" + bytes(3000)),
        "web page": lambda: path.write_bytes(b"<!DOCTYPE html><html>" + b" " * 3000),
        "xz": lambda: path.write_bytes(b"\xfd7zXZ\x00" + bytes(3000)),
        "empty": lambda: path.write_bytes(b""),
        "cut short": lambda: path.write_bytes(whole[: len(whole) // 2]),
        "cut short, packed": lambda: path.write_bytes(packed[: len(packed) // 2]),
        "damaged, packed": lambda: path.write_bytes(packed[:-8] + b"\0\0\0\0" + packed[-4:]),
        "no layer": lambda: write_tar(path, {k: v for k, v in members.items() if not k.endswith("layer.tar")}),
        "no config": lambda: write_tar(
            path, {k: v for k, v in members.items() if not k.endswith(".json") or k == "manifest.json"}
        ),
        "bad manifest": lambda: write_tar(path, {**members, "manifest.json": b'[{"Config": 3}]'}),
        "manifest of nulls": lambda: write_tar(path, {**members, "manifest.json": b"null"}),
        "no JSON": lambda: write_tar(path, {**members, "manifest.json": b"{"}),
        "wrong layer": lambda: write_tar(
            path, {k: layer({}) if k.endswith("layer.tar") else v for k, v in docker_members(unique).items()}
        ),
        "folder": path.mkdir,
        "nothing there": lambda: None,
    }
    contents[kind]()
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("two images", r"holds 2 images: a:1, b:1\. Save one"),
        ("two in OCI", r"holds 2 images: linux/amd64 .*, linux/amd64"),
        ("no image", r"holds 0 images: none"),
        ("wrong architecture", r"is made for linux/arm64, and the engine runs linux/amd64"),
        ("wrong system", r"is made for windows/amd64"),
        ("zstd layers", r"zstd.*Save it with gzip"),
        ("container's files", r"`docker export`.*docker save"),
        ("some tar", r"a tar archive, but not of an image"),
        ("no tar", r"is not a tar archive\."),
        ("zip", r"is not a tar archive: it is a zip archive"),
        ("web page", r"is the URL right"),
        ("xz", r"compressed with xz; use gzip"),
        ("empty", r"is empty"),
        ("cut short", r"is cut short"),
        ("cut short, packed", r"is cut short"),
        ("damaged, packed", r"is damaged"),
        ("no layer", r"layer .* is missing"),
        ("no config", r"its .*\.json is missing"),
        ("bad manifest", r"malformed"),
        ("manifest of nulls", r"malformed"),
        ("no JSON", r"no JSON"),
        ("wrong layer", r"refused by the engine"),
        ("folder", r"is a folder"),
        ("nothing there", r"does not exist"),
    ],
)
def test_no_usable_image(docker_engine: DockerEngine, tmp_path: Path, kind: str, said: str) -> None:
    path = broken(tmp_path, kind)
    with pytest.raises(InvalidImageFile, match=said) as caught:
        docker_engine.prepare(ImageSource(image_file=str(path)))
    assert str(path) in str(caught.value)


def test_an_unknown_protocol(docker_engine: DockerEngine) -> None:
    with pytest.raises(InvalidImageFile, match=r"nothing here can read"):
        docker_engine.prepare(ImageSource(image_file="nosuch://x/y.tar"))


def test_links_between_layers_as_old_engines_save_them(docker_engine: DockerEngine, image: TinyImage, tmp_path: Path) -> None:
    members = docker_members(image)
    manifest = json.loads(members["manifest.json"])
    real = manifest[0]["Layers"][0]
    manifest[0]["Layers"][0] = "linked/layer.tar"
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        link = tarfile.TarInfo("linked/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, f"../{real}"
        tar.addfile(link)
        for name, content in {**members, "manifest.json": json.dumps(manifest).encode()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "i.tar").write_bytes(data.getvalue())
    assert docker_engine.prepare(ImageSource(image_file=str(tmp_path / "i.tar"))) == image.id


def test_an_image_that_went_away(docker_engine: DockerEngine, make_job: Callable[..., ContainerJob], image: TinyImage) -> None:
    with pytest.raises((ImageNotFound, EngineError), match=r"no longer in the engine"):
        docker_engine.run(make_job("true", image=image.id), Log())
