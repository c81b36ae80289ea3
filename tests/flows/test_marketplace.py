"""Where prerequisites are found: documents of a real server, folders, indexes and files, pinned or not."""

import hashlib
import http.server
import json
import re
import threading
import uuid

import pytest

from oasis_flows import documents, marketplace, settings
from oasis_flows.blocks import Algorithm, DockerImage, Prerequisite
from oasis_flows.errors import InvalidPrerequisite, MarketplaceUnavailable
from oasis_flows.flows.algorithm_task import algorithm_task
from oasis_flows.machine import stand_in
from oasis_flows.testing import FakeEngine
from tests.e2e.test_command_line import call  # noqa: F401  # a fixture
from tests.servers.prefect import free_port

TEXT = "name: tool\nplugin_params:\n  callbacks: [{event: taskStarts, commands: [get tool]}]\n"
PIN = f"#sha256={hashlib.sha256(TEXT.encode()).hexdigest()}"


@pytest.fixture
def shelf(tmp_path):
    """A folder with a few specifications."""
    files = {
        "tool.yaml": TEXT,
        "prerequisite/other_tool.json": json.dumps({"id": "4711", "require": ["x"]}),
        "deep/er/no.yaml": TEXT,
    }
    for name, text in {**files, "README.md": "# no"}.items():
        (tmp_path / "shelf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shelf" / name).write_text(text)
    return tmp_path / "shelf"


@pytest.fixture
def web(shelf):
    """The address of a web server over that folder."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(shelf))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.asked = asked
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def find(here, monkeypatch):
    """Finds by a machine's marketplaces."""

    def by(uri, *marketplaces):
        monkeypatch.setenv("OASIS_FLOWS_MARKETPLACES", " ".join(map(str, marketplaces)))
        return marketplace.finder(settings.current())(uri)

    return by


def test_a_name_is_a_document_however_it_is_spelled(find):
    name = f"a-b-{uuid.uuid4().hex[:8]}"
    Prerequisite(plugin_params={"callbacks": [{"event": "taskStarts", "commands": ["x"]}]}).save(name)
    found = [
        find(spelled)
        for spelled in (name, f"prerequisite/{name}", name.replace("-", "_"), f"marketplace://name/{name.upper()}")
    ]

    assert {each.source for each in found} == {f"prerequisite/{name}"}
    assert {each.item.name for each in found} == {name}
    assert find(f"{name}#sha256={found[0].sha256}") == found[0]
    number = Prerequisite.load(name)._block_document_id
    assert find(f"marketplace://prerequisites/itemId/{number}") == found[0]
    assert documents.name_of(Algorithm, number) is None


def test_a_folder_is_a_marketplace_and_the_first_that_has_a_name_counts(find, shelf, tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "TOOL.yml").write_text("network: true")
    (tmp_path / "first" / "more.yml").write_text("network: true")

    assert find("marketplace://name/tool", shelf).source == f"{shelf}/tool.yaml"
    assert find("marketplace://name/tool", tmp_path / "first", shelf).item.network
    assert find("marketplace://name/other-tool", tmp_path / "first", shelf).item.name == "other_tool"
    assert find("marketplace://prerequisites/itemId/4711", tmp_path / "first", shelf).source.endswith("other_tool.json")
    assert [entry.name for entry in marketplace.entries(str(shelf))] == ["other-tool", "tool"]


def test_a_bucket_may_be_a_marketplace(find):
    import fsspec

    with fsspec.open("memory://shelf/prerequisite/tool.yaml", "w") as file:
        file.write(TEXT)

    assert find("marketplace://name/tool", "memory://shelf").item.callbacks[0].commands == ("get tool",)


def test_an_index_on_the_web_is_a_marketplace(find, web, shelf):
    index = [
        {"id": "u1", "name": "by_url", "url": "tool.yaml"},
        {"id": "u2", "name": "by_text", "type": "data", "protocol": TEXT},
        {"id": "u3", "name": "by_fields", "network": True},
    ]
    (shelf / "index.json").write_text(json.dumps({"items": index}))
    address = f"{web.address}/index.json"

    assert find("marketplace://name/by-url", address).source == f"{web.address}/tool.yaml"
    assert find("marketplace://prerequisites/itemId/u2", address).item.name == "tool"
    assert find("marketplace://name/by_fields", address).item.network
    assert find("marketplace://name/by_fields", shelf / "index.json").item.network


def test_a_pinned_one_is_these_bytes_or_nothing_and_fetched_once(find, web, shelf):
    address = f"{web.address}/tool.yaml"
    assert find(address).sha256 == PIN.removeprefix("#sha256=")
    asked = len(web.asked)
    assert find(address + PIN).item.name == "tool"
    assert len(web.asked) == asked

    (shelf / "tool.yaml").write_text(TEXT.replace("get", "rm"))
    assert find(address + PIN).item.callbacks[0].commands == ("get tool",)
    assert find(address).item.callbacks[0].commands == ("rm tool",)
    with pytest.raises(InvalidPrerequisite, match="is not what it is pinned to: its SHA-256 is"):
        find(f"file://{shelf}/tool.yaml{PIN}")
    with pytest.raises(InvalidPrerequisite, match="Write #sha256= and 64 hexadecimal digits"):
        find(f"{address}#sha256=abc")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("marketplace://name/nothing", "no marketplace has marketplace://name/nothing. These were asked: "),
        ("marketplace://nothing", "is no item of a marketplace. Write marketplace://name/NAME"),
        ("ftp://host/x.yaml", "nothing here can read 'ftp://host/x.yaml'"),
        ("WEB/nothing.yaml", "there is nothing at WEB/nothing.yaml. Correct the address. It said: HTTP 404"),
        ("WEB/README.md", "it holds no fields"),
        ("WEB/broken.yaml", "it is neither YAML nor JSON: "),
        ("WEB/large.yaml", "has more than 1048576 bytes"),
        ("WEB/binary.yaml", "is no text in UTF-8"),
        ("file://SHELF/nothing.yaml", "cannot be read."),
        ("http://me:hunter2@127.0.0.1/x", "holds a password, and addresses are shown"),
    ],
)
def test_what_cannot_be_used_says_why(find, web, shelf, uri, said):
    (shelf / "README.md").write_text("# no")
    (shelf / "broken.yaml").write_text("a: [")
    (shelf / "large.yaml").write_text("a" * (1 << 20) + "bc")
    (shelf / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidPrerequisite) as refused:
        find(uri.replace("WEB", web.address).replace("SHELF", str(shelf)), shelf)

    assert said.replace("WEB", web.address) in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_server_that_is_away_is_told_with_the_chain_and_may_be_tried_again(here, tmp_path):
    address = f"http://127.0.0.1:{free_port()}/tool.yaml"
    name = f"outer-{uuid.uuid4().hex[:8]}"
    Prerequisite(require=[address]).save(name)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("a")
    engine = FakeEngine()
    with stand_in(engine):
        algorithm = Algorithm(docker_image=DockerImage(image_id="a:1"), prerequisites=[name])
        state = algorithm_task(algorithm, {"url": str(tmp_path / "in")}, return_state=True)
    error = state.result(raise_on_failure=False)

    assert isinstance(error, MarketplaceUnavailable)
    assert f"A prerequisite cannot be used (algorithm → {name} → {address}): {address} does not answer." in str(error)
    assert engine.jobs == []


def test_the_command_line_shows_what_can_be_had_and_what_it_comes_to(call, shelf, monkeypatch):  # noqa: F811
    name = f"p-{uuid.uuid4().hex[:8]}"
    monkeypatch.setenv("OASIS_FLOWS_MARKETPLACES", str(shelf))
    Prerequisite(
        require=["marketplace://name/tool"],
        plugin_params={"callbacks": [{"event": "taskEnds", "commands": ["echo {{ v | quote }}"]}]},
        template_variables=[{"name": "v"}],
        requireStorages=[{"name": "s"}],
        failurePolicy="ignore",
    ).save(name)
    wish = {"name": name, "template_variables": {"v": "a b"}}
    Algorithm(docker_image=DockerImage(image_id="a:1"), prerequisites=[wish, "marketplace://name/tool"]).save(name)

    listed, shown, pinned = call("marketplace", "ls"), call("prerequisites", "show", name), call("marketplace", "show", "tool")
    assert listed[1].splitlines() == [f"other-tool  {shelf}/prerequisite/other_tool.json", f"tool  {shelf}/tool.yaml"]
    assert shown[1].splitlines() == [
        name,
        f"  2. {name} (v='a b'), from prerequisite/{name}",
        f"    1. tool, from {shelf}/tool.yaml",
        "before the algorithm:",
        "  tool",
        "    get tool",
        "after it, at the end:",
        f"  {name}, whose failure is ignored",
        "    echo 'a b'",
        "storages:",
        "  s at /mnt/s, read-only",
    ]
    assert pinned[1].startswith(f"marketplace://name/tool{PIN}\nfrom {shelf}/tool.yaml\n\n{TEXT}")
    assert [row["name"] for row in map(json.loads, call("marketplace", "ls", "--json")[1].splitlines())] == [
        "other-tool",
        "tool",
    ]
    told = json.loads(call("prerequisites", "show", name, "--json")[1])
    assert next((each["name"], each["sha256"]) for each in told["items"]) == ("tool", PIN.removeprefix("#sha256="))
    code, _, said = call("marketplace", "show", "nothing")
    assert code == 2
    assert re.match("oasis-flows: no marketplace has", said)
