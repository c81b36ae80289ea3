"""The prerequisites of the shipped catalogue, each in a container, with a web server of this machine in the place of the web."""

import hashlib
import io
import subprocess
import sys
import sysconfig
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from ipaddress import ip_network
from pathlib import Path

import pytest

from oasis_flows.blocks import Algorithm, DockerImage
from oasis_flows.errors import AlgorithmFailed, DescriptionError
from tests.flows.test_prerequisites import image, letters, ran
from tests.images import TinyImage, busybox_layer, docker_archive, layer
from tests.servers.prefect import ROOT

__all__ = ["image", "letters", "ran"]


def wish(name, **variables):
    return [{"name": f"file://{ROOT}/blocks/prerequisite/{name}.yaml", "template_variables": variables}]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def web(docker_api, tmp_path):
    """A folder, and the address at which containers of the engine's bridge find what is in it."""
    subnets = (ip_network(row["Subnet"]) for row in docker_api.inspect_network("bridge")["IPAM"]["Config"])
    # An engine tells the bridge's own address only where it made the bridge. It is the first of the subnet.
    (gateway,) = (str(subnet[1]) for subnet in subnets if subnet.version == 4)
    (tmp_path / "web").mkdir()
    server = ThreadingHTTPServer((gateway, 0), partial(Quiet, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "web", gateway, f"http://{gateway}:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def load(docker_api, tmp_path_factory):
    """Puts an image into the engine for the time of this module."""
    names = []

    def load(name, *layers, path="/bin"):
        made = TinyImage(tags=(name,), layers=(busybox_layer(), *layers), config={"Env": [f"PATH={path}"], "Cmd": ["sh"]})
        with docker_archive(tmp_path_factory.mktemp("image") / "image.tar", made).open("rb") as archive:
            list(docker_api.load_image(archive))
        names.append(name)
        return DockerImage(image_id=name)

    yield load
    for name in names:
        docker_api.remove_image(name, force=True)


def with_libraries(*programs):
    """Programs of this machine under their own names, with the libraries that they are linked to."""
    said = subprocess.run(["ldd", *programs], check=True, capture_output=True, text=True).stdout
    libraries = {word for line in said.splitlines() for word in line.split() if word[0] == "/" and word[-1] != ":"}
    return {path.lstrip("/"): (0o755, Path(path).read_bytes()) for path in {*map(str, programs), *libraries}}


def test_the_download_is_there_with_its_checksum_right(ran, image, web):
    folder, _, url = web
    (folder / "model.bin").write_bytes(b"weights")
    right, wrong = hashlib.sha256(b"weights").hexdigest(), "0" * 64

    def algorithm(sha256, **more):
        wanted = wish("download", url=f"{url}/model.bin", path="/tmp/models/a model.bin", sha256=sha256)
        script = ["sh", "-c", "cat '/tmp/models/a model.bin' > output/got"]
        return Algorithm(docker_image=image, command=script, prerequisites=wanted, **more)

    done, refused, closed = ran(algorithm(right, network=True)), ran(algorithm(wrong, network=True)), ran(algorithm(right))
    assert (done.folder / "data/got").read_bytes() == b"weights"
    assert isinstance(refused.result, AlgorithmFailed)
    assert "its prerequisite download failed: `printf '%s " in refused.message
    assert isinstance(closed.result, DescriptionError)
    assert "network" in closed.message


def test_home_and_its_caches_can_be_written_to(ran, image):
    script = ["sh", "-c", 'echo x > "$HOME/x" && mkdir "$MPLCONFIGDIR" && echo "$HOME $XDG_CACHE_HOME"']
    done = ran(Algorithm(docker_image=image, command=script, prerequisites=wish("home-in-tmp")))

    assert done.said == ["/tmp/home /tmp/home/.cache"]


def test_a_failed_container_stays_for_some_minutes_and_one_that_succeeds_does_not(ran, image):
    failed, well = (
        ran(
            Algorithm(
                docker_image=image, command=["sh", "-c", f"exit {code}"], prerequisites=wish("debug-hook", minutes="0.03")
            )
        )
        for code in (3, 0)
    )

    assert failed.said == ["The container stays for 0.03 minutes."]
    assert (failed.record["exit"]["exit_code"], failed.record["verdict"]["code"]) == (3, "exit_nonzero")
    assert failed.record["prerequisites"]["callbacks"][0]["seconds"] >= 1.5
    assert (well.said, well.record["verdict"]["code"]) == ([], "ok")


def python_layer():
    """This Python, with the pip of the virtual environment."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "idlelib", "lib2to3", "ensurepip", "site-packages", "dist-packages", "__pycache__", "turtledemo"}
    left_out |= {path.name for path in library.glob("config-*")}
    pip = Path(find_spec("pip").origin).parent
    files = {}
    for top, target in ((library, library), (pip, Path("/opt/pip/pip"))):
        for path in top.rglob("*"):
            if path.is_file() and not left_out & set(path.relative_to(top).parts[:-1]):
                files[str(target / path.relative_to(top)).lstrip("/")] = (0o644, path.read_bytes())
    program = Path(sys.executable).resolve()
    modules = [str(path) for path in (library / "lib-dynload").glob("*.so")]
    files |= with_libraries(str(program), *modules)
    return layer(files, {"bin/python3": str(program)})


def wheel():
    """A package of one module, as the Python Package Index has it."""
    facts = {
        "tiny_tool.py": "ANSWER = 42\n",
        "tiny_tool-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-tool\nVersion: 1.0\n",
        "tiny_tool-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, text in facts.items():
            file.writestr(name, text)
        file.writestr("tiny_tool-1.0.dist-info/RECORD", "".join(f"{name},,\n" for name in facts))
    return packed.getvalue()


def test_a_python_package_can_be_imported(ran, load, web):
    folder, gateway, url = web
    (folder / "simple/tiny-tool").mkdir(parents=True)
    (folder / "simple/tiny-tool/tiny_tool-1.0-py3-none-any.whl").write_bytes(wheel())
    (folder / "simple/tiny-tool/index.html").write_text('<a href="tiny_tool-1.0-py3-none-any.whl">tiny_tool-1.0</a>')
    algorithm = Algorithm(
        docker_image=load("oasis-test/python:shipped", python_layer()),
        command=["python3", "-c", "import tiny_tool; print(tiny_tool.ANSWER)"],
        environment={"PIP_INDEX_URL": f"{url}/simple", "PIP_TRUSTED_HOST": gateway, "PYTHONPATH": "/opt/pip"},
        network=True,
        prerequisites=wish("pip-package", package="tiny-tool==1.0"),
    )
    done = ran(algorithm)

    assert done.record["verdict"]["code"] == "ok", done.log
    assert done.said[-1] == "42"


DEBIAN = [
    "/usr/bin/apt-get",
    "/usr/bin/dpkg",
    "/usr/bin/dpkg-deb",
    "/usr/bin/dpkg-split",
    "/bin/tar",
    "/usr/sbin/start-stop-daemon",
]

FOLDERS = ["etc/apt/apt.conf.d", "etc/apt/preferences.d", "var/lib/apt/lists/partial", "var/cache/apt/archives/partial"]
FOLDERS += ["var/lib/dpkg/info", "var/lib/dpkg/updates", "var/log/apt"]


def test_a_package_of_debian_is_installed(ran, load, web, tmp_path):
    folder, _, url = web
    package = tmp_path / "tiny-tool"
    (package / "DEBIAN").mkdir(parents=True)
    (package / "usr/bin").mkdir(parents=True)
    control = "Package: tiny-tool\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@nowhere.invalid>\nDescription: a test\n"
    (package / "DEBIAN/control").write_text(control)
    (package / "usr/bin/tiny-tool").write_text("#!/bin/sh\necho 42\n")
    (package / "usr/bin/tiny-tool").chmod(0o755)
    archive = folder / "tiny-tool_1.0_all.deb"
    subprocess.run(["dpkg-deb", "--build", "-Zgzip", "--root-owner-group", package, archive], check=True, capture_output=True)
    facts = f"Filename: ./{archive.name}\nSize: {archive.stat().st_size}\nSHA256: {hashlib.sha256(archive.read_bytes()).hexdigest()}\n"
    (folder / "Packages").write_text(control + facts)
    methods = [f"/usr/lib/apt/methods/{name}" for name in ("http", "store", "copy", "file")]
    files = with_libraries(*DEBIAN, *methods) | {
        "sbin/ldconfig": (0o755, b"#!/bin/sh\n"),
        "etc/apt/apt.conf": (0o644, b'APT::Sandbox::User "root";\n'),
        "etc/apt/sources.list": (0o644, f"deb [trusted=yes] {url} ./\n".encode()),
        "var/lib/dpkg/status": (0o644, b""),
        **{str(path).lstrip("/"): (0o644, path.read_bytes()) for path in Path("/usr/share/dpkg").glob("*table")},
        **{f"{name}/.keep": (0o644, b"") for name in FOLDERS},
    }
    algorithm = Algorithm(
        docker_image=load("oasis-test/debian:shipped", layer(files), path="/usr/sbin:/usr/bin:/sbin:/bin"),
        command=["tiny-tool"],
        network=True,
        # As the document says.
        writable_root=True,
        user="0:0",
        capabilities=["CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"],
        prerequisites=wish("apt-package", package="tiny-tool"),
    )
    done = ran(algorithm)

    assert done.record["verdict"]["code"] == "ok", done.log
    assert done.said[-1] == "42"
