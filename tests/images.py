"""Tiny images made on the spot, and archives of them, sound and broken: no registry is needed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import sysconfig
import tarfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BUSYBOX = Path("/usr/bin/busybox")
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"


@cache
def busybox_layer() -> bytes:
    """A layer with a whole shell; Debian's busybox-static needs nothing beside itself."""
    assert BUSYBOX.exists(), "install Debian's busybox-static"
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    files = {"bin/busybox": (0o755, BUSYBOX.read_bytes()), "etc/passwd": (0o644, PASSWD), "etc/group": (0o644, b"root:x:0:\n")}
    return layer(files, {f"bin/{a}": "busybox" for a in applets if a != "busybox"})


def layer(
    files: Mapping[str, tuple[int, bytes]],
    links: Mapping[str, str] | None = None,
    folders: Mapping[str, int] | None = None,
    copies: Mapping[str, Path] | None = None,
) -> bytes:
    """A layer with these files (mode and content), symbolic links, folders (mode), and copies of files with their times."""
    packed = io.BytesIO()

    def of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        return member

    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, path in (copies or {}).items():
            tar.add(path, name, recursive=False, filter=of_root)
        for name, mode in (folders or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, mode
            tar.addfile(member)
        for name, (mode, data) in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), mode
            tar.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return packed.getvalue()


ROOT = Path(__file__).parents[1]
LOADED = "print(*{line.split()[-1] for line in open('/proc/self/maps') if '.so' in line or 'bin/' in line}, sep='\\n')"


@cache
def module_image(module: str) -> TinyImage:
    """An image with this Python, and with all that a module of this package imports; nothing else of either is in it."""
    say = f"import runpy, site, sys, {module}; [print(each.__file__) for each in [*sys.modules.values()] if getattr(each, '__file__', None)]"
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-c", f"{say}; {LOADED}"]
    told = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    found = {Path(line).resolve() for line in told.splitlines()} | {Path(sys.executable).resolve()}
    links = _library_names(found) | {"bin/python": str(Path(sys.executable).resolve())}
    variables = ["PATH=/bin", f"PYTHONPATH={ROOT}", f"LD_LIBRARY_PATH={_libraries(found)}"]
    copies = {str(path).lstrip("/"): path for path in found}
    return TinyImage(layers=(busybox_layer(), layer({}, links, copies=copies)), config={"Env": variables})


def _library_names(found: Iterable[Path]) -> dict[str, str]:
    """Links by which libraries among these files are found: they are asked for by other names than those of their files."""
    shared = {path for path in found if ".so." in path.name}
    (loader,) = (path for path in shared if path.name.startswith("ld-linux"))
    names = (name for path in shared for name in path.parent.glob(f"{path.name.partition('.so')[0]}.so*"))
    links = {str(name).lstrip("/"): name.resolve().name for name in names if name.is_symlink()}
    return links | {f"lib64/{loader.name}": str(loader)}


def _libraries(found: Iterable[Path]) -> str:
    return ":".join(sorted({str(path.parent) for path in found if ".so" in path.name and "lib-dynload" not in str(path)}))


def flow_runner_image(*tags: str) -> TinyImage:
    """What `deployments/images/flow-runner/Dockerfile` makes, of this environment's own Python and packages: it takes no network."""
    venv, base = Path(sys.prefix).resolve(), Path(sys.executable).resolve()
    say = f"import ctypes, lzma, prefect_kubernetes, oasis_flows.__main__, obstore, s3fs, sqlalchemy.ext.asyncio, ssl, sqlite3; {LOADED}"
    told = subprocess.run([sys.executable, "-c", say], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    system = {path for line in told.splitlines() if not (path := Path(line).resolve()).is_relative_to(venv)}
    standard = Path(sysconfig.get_path("stdlib"))
    unused = {"site-packages", "test", "idlelib", f"config-{sys.version_info[0]}.{sys.version_info[1]}-x86_64-linux-gnu"}
    ours = {path for path in standard.rglob("*") if not unused & set(path.relative_to(standard).parts)}
    ours |= {
        Path(str(file.locate())).resolve() for each in _closure("oasis-flows", {"kubernetes"}) for file in each.files or ()
    }
    ours |= system | {base, venv / "pyvenv.cfg"}
    copies = {str(path).lstrip("/"): path for path in ours if path.is_file() and "__editable__" not in path.name}
    site = Path(sysconfig.get_path("purelib")).resolve()
    package = (path for path in (ROOT / "oasis_flows").rglob("*") if path.is_file())
    copies |= {str(site / path.relative_to(ROOT)).lstrip("/"): path for path in package}
    links = _library_names(system)
    links |= {str(path).lstrip("/"): str(base) for path in (venv / "bin").glob("python*") if path.is_symlink()}
    users = {"etc/passwd": (0o644, PASSWD + b"oasis:x:1000:1000::/tmp:/bin/sh\n")}
    variables = [f"PATH={venv}/bin:/bin", "HOME=/tmp", "PYTHONUNBUFFERED=1", f"LD_LIBRARY_PATH={_libraries(system)}"]
    config = {"Env": variables, "User": "1000:1000", "WorkingDir": "/tmp", "Cmd": ["oasis-flows", "doctor"]}
    return TinyImage(tags, (busybox_layer(), layer(users, links, {"tmp": 0o1777}, copies)), config)


def _closure(name: str, extras: set[str]) -> list[Distribution]:
    """A distribution that is installed here, and all that it requires."""
    found: dict[str, set[str]] = {}
    wanted = [(name, extras)]
    while wanted:
        name, extras = wanted.pop()
        known = found.setdefault(canonicalize_name(name), set())
        if known and extras | {""} <= known:
            continue
        known |= extras | {""}
        required = map(Requirement, _installed(name).requires or ())
        wanted += [
            (each.name, each.extras)
            for each in required
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in known)
        ]
    return [_installed(each) for each in found]


def _installed(name: str) -> Distribution:
    """A distribution as it is installed. Where a checkout was built, it has metadata of its own, which Python finds first there."""
    return next(iter(Distribution.discover(name=name, path=[sysconfig.get_path("purelib")])))


@dataclass(frozen=True)
class TinyImage:
    """An image as values; `layers` are plain tar archives."""

    tags: tuple[str, ...] = ()
    layers: tuple[bytes, ...] = field(default_factory=lambda: (busybox_layer(),))
    config: Mapping[str, object] = field(default_factory=lambda: {"Env": ["PATH=/bin", "FROM_IMAGE=yes"], "Cmd": ["sh"]})
    architecture: str = "amd64"
    os: str = "linux"

    @property
    def config_bytes(self) -> bytes:
        diff_ids = [sha256(data) for data in self.layers]
        return json.dumps(
            {
                "architecture": self.architecture,
                "os": self.os,
                "config": self.config,
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
                "history": [{"created_by": "tests"} for _ in diff_ids],
            }
        ).encode()

    @property
    def id(self) -> str:
        return sha256(self.config_bytes)


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def write_tar(path: Path, members: Mapping[str, bytes], *, packed: bool = False) -> Path:
    """A tar archive with these members, in this order."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    path.write_bytes(gzip.compress(data.getvalue(), 1) if packed else data.getvalue())
    return path


def docker_members(*images: TinyImage) -> dict[str, bytes]:
    """What `docker save` writes, the manifest last, as it does."""
    members, manifest = {}, []
    for image in images:
        names = []
        for data in image.layers:
            names.append(f"{sha256(data)[7:]}/layer.tar")
            members[names[-1]] = data
        config = f"{image.id[7:]}.json"
        members[config] = image.config_bytes
        manifest.append({"Config": config, "RepoTags": list(image.tags) or None, "Layers": names})
    return {**members, "manifest.json": json.dumps(manifest).encode()}


def docker_archive(path: Path, *images: TinyImage, packed: bool = False) -> Path:
    """An archive as `docker save` writes it."""
    return write_tar(path, docker_members(*images), packed=packed)


def oci_archive(path: Path, *images: TinyImage, packed: bool = False, media: str = "tar+gzip", attested: bool = False) -> Path:
    """An archive in the layout of the OCI, its layers compressed; `attested` adds what BuildKit keeps beside an image."""
    blobs: dict[str, bytes] = {}

    def keep(data: bytes, kind: str, **more: Any) -> dict[str, Any]:
        digest = sha256(data)
        blobs["blobs/" + digest.replace(":", "/")] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": digest, "size": len(data), **more}

    manifests = []
    for image in images:
        described = {
            "schemaVersion": 2,
            "config": keep(image.config_bytes, "config.v1+json"),
            "layers": [keep(gzip.compress(data, 1, mtime=0), f"layer.v1.{media}") for data in image.layers],
        }
        platform = {"architecture": image.architecture, "os": image.os}
        manifests.append(keep(json.dumps(described).encode(), "manifest.v1+json", platform=platform))
    if attested:
        note = {"vnd.docker.reference.type": "attestation-manifest"}
        manifests.append(keep(b'{"layers": []}', "manifest.v1+json", annotations=note))
    head = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps({"manifests": manifests}).encode()}
    return write_tar(path, {**head, **blobs}, packed=packed)


@pytest.fixture(scope="session")
def busybox(docker_api: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of an image with a shell in the machine's engine."""
    with shell_image(docker_api, tmp_path_factory.mktemp("image")) as name:
        yield name


@contextmanager
def shell_image(api: Any, folder: Path) -> Iterator[str]:
    """The name of an image with a shell in an engine, for the time of the block; nobody else has it."""
    name = f"oasis-test/busybox:{uuid.uuid4().hex[:12]}"
    strange = {
        "opt/noexec": (0o644, b"#!/bin/sh\n"),
        "opt/elsewhere": (0o755, b"\x7fELF\x02\x01\x01\0garbage of another architecture\n"),
        "opt/unique": (0o644, name.encode()),
    }
    image = TinyImage(tags=(name,), layers=(busybox_layer(), layer(strange)))
    with docker_archive(folder / "busybox.tar", image).open("rb") as archive:
        list(api.load_image(archive))
    yield name
    api.remove_image(name, force=True)
