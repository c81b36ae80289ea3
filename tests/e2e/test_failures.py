"""A real situation for each way to fail: the same code, sentence, evidence and advice in state, artifact, record and command."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prefect_docker.credentials import DockerRegistryCredentials

from oasis_flows import tasks
from oasis_flows.__main__ import main
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.verdict import Verdict
from tests.images import TinyImage, docker_archive
from tests.servers.engine import containers_of, eventually
from tests.servers.registry import free_port


@dataclass(frozen=True)
class Surroundings:
    """What a situation is made of. `folder` is the test's own."""

    folder: Path
    image: str
    request: pytest.FixtureRequest
    stack: ExitStack
    monkeypatch: pytest.MonkeyPatch

    def mount(self, name: str, *options: str) -> Path:
        """A file system of its own, until the test ends."""
        path = self.folder / name
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", path], check=True)
        self.stack.callback(subprocess.run, ["umount", "-l", path], check=True)
        return path


Make = Callable[[Surroundings], dict[str, Any]]


@dataclass(frozen=True)
class Situation:
    """A way to fail. `exit` is the command's exit code, `says` words of the sentence, `does` words of the advice."""

    code: str
    stage: str
    blame: str
    says: str
    does: str
    exit: int = 1
    script: str = "true"
    algorithm: dict[str, Any] = field(default_factory=dict)
    make: Make = lambda _: {}


def shell(code: str, blame: str, says: str, does: str, script: str, **algorithm: Any) -> Situation:
    """A container that fails."""
    return Situation(code, "run_container", blame, says, does, script=script, algorithm=algorithm)


def image(code: str, blame: str, says: str, does: str, exit: int, make: Make) -> Situation:
    """An image that cannot be had."""
    return Situation(code, "prepare_image", blame, says, does, exit, make=make)


def data(code: str, blame: str, says: str, does: str, exit: int, make: Make) -> Situation:
    """An input that cannot be read, or a store that cannot be written."""
    return Situation(code, "stage_input", blame, says, does, exit, make=make)


def not_in_the_registry(here: Surroundings) -> dict[str, Any]:
    registry = here.request.getfixturevalue("registry")
    return {"docker_image": DockerImage(image_id=f"{registry.address}/no-such-image:1")}


def wrong_password(here: Surroundings) -> dict[str, Any]:
    private, api = here.request.getfixturevalue("private_registry"), here.request.getfixturevalue("docker_api")
    reference = private.push(api, here.image, f"secret-{secrets.token_hex(4)}")
    login = DockerRegistryCredentials(username="tester", password="wrong", registry_url=private.address)
    return {"docker_image": DockerImage(image_id=reference, registry_credentials=login)}


def registry_away(here: Surroundings) -> dict[str, Any]:
    return {"docker_image": DockerImage(image_id=f"127.0.0.1:{free_port()}/x:1")}


def broken_archive(here: Surroundings) -> dict[str, Any]:
    whole = docker_archive(here.folder / "whole.tar", TinyImage())
    (here.folder / "cut.tar").write_bytes(whole.read_bytes()[:500_000])
    return {"docker_image": DockerImage(image_file=str(here.folder / "cut.tar"))}


def two_images(here: Surroundings) -> dict[str, Any]:
    both = TinyImage(tags=("one:1",)), TinyImage(tags=("two:1",), config={"Cmd": ["true"]})
    return {"docker_image": DockerImage(image_file=str(docker_archive(here.folder / "both.tar", *both)))}


def other_machine(here: Surroundings) -> dict[str, Any]:
    archive = docker_archive(here.folder / "arm.tar", TinyImage(architecture="arm64"))
    return {"docker_image": DockerImage(image_file=str(archive))}


def no_engine(here: Surroundings) -> dict[str, Any]:
    here.monkeypatch.setenv("DOCKER_HOST", f"unix://{here.folder}/no-engine.sock")
    return {}


def required(here: Surroundings, text: str) -> dict[str, Any]:
    """An algorithm that requires a prerequisite of this specification."""
    (here.folder / "required.yaml").write_text(text)
    return {"prerequisites": [f"file://{here.folder}/required.yaml"]}


def failing_prerequisite(here: Surroundings) -> dict[str, Any]:
    return required(here, "name: get\ncallbacks: [{event: taskStarts, commands: ['exit 4']}]")


def prerequisite_without_its_variable(here: Surroundings) -> dict[str, Any]:
    return required(here, "name: get\ntemplate_variables: [{name: dataPath}]")


def marketplace_away(here: Surroundings) -> dict[str, Any]:
    return {"prerequisites": [f"http://127.0.0.1:{free_port()}/x.yaml"]}


def no_input(here: Surroundings) -> dict[str, Any]:
    return {"dataset": Dataset(url=str(here.folder / "gone"))}


def no_files(here: Surroundings) -> dict[str, Any]:
    (here.folder / "empty").mkdir()
    return {"dataset": Dataset(url=str(here.folder / "empty"))}


def s3_store(here: Surroundings, bucket: str, **changes: str) -> DatasetStore:
    server = here.request.getfixturevalue("s3")
    values = {"access_key_id": server.access_key, "secret_access_key": server.secret_key, **changes}
    return DatasetStore(url=f"s3://{bucket}/x", endpoint_url=server.endpoint, region="us-east-1", **values)


def wrong_keys(here: Surroundings) -> dict[str, Any]:
    return {"store": s3_store(here, "anything", secret_access_key="not the key")}


def no_bucket(here: Surroundings) -> dict[str, Any]:
    return {"store": s3_store(here, f"no-such-{secrets.token_hex(4)}")}


def store_away(here: Surroundings) -> dict[str, Any]:
    here.monkeypatch.setattr("oasis_flows.store.objects.GIVE_UP_SECONDS", 1.0, raising=False)
    return {
        "store": DatasetStore(
            url="s3://b/x", endpoint_url=f"http://127.0.0.1:{free_port()}", access_key_id="a", secret_access_key="b"
        )
    }


def full_store(here: Surroundings) -> dict[str, Any]:
    return {"store": DatasetStore(url=str(here.mount("store", "size=1m")))}


def read_only_store(here: Surroundings) -> dict[str, Any]:
    return {"store": DatasetStore(url=str(here.mount("store", "ro", "size=1m")))}


def small_disk(here: Surroundings) -> dict[str, Any]:
    here.monkeypatch.setenv("OASIS_FLOWS_HOME", str(here.mount("small", "size=8m")))
    return {"store": DatasetStore(url=str(here.folder / "elsewhere"))}


NOTHING_OF_IT = "Correct `command` or `entrypoint`"
EAT = "echo 1000 > /proc/self/oom_score_adj; x=$(yes | head -c 60000000)"
SITUATIONS = {
    "non-zero exit": shell("exit_nonzero", "algorithm", "ended with exit code 7 after", "in its own log", "echo bad >&2; exit 7"),
    "command not found": Situation("command_not_found", "run_container", "description", "its command is not in the image", NOTHING_OF_IT, algorithm={"command": ["notacommand"]}),
    "not executable": Situation("not_executable", "run_container", "description", "is not executable", "chmod +x", algorithm={"command": ["/opt/noexec"]}),
    "wrong architecture of the program": Situation("exec_format", "run_container", "description", "not made for this machine", "Build the image for", algorithm={"command": ["/opt/elsewhere"]}),
    "wrong architecture of the image": image("image_invalid", "description", "arm64", "another worker", 2, other_machine),
    "killed": shell("killed", "platform", "was killed by SIGKILL", "run it again", "kill -9 $$"),
    "segfault": shell("segfault", "algorithm", "crashed with a segmentation fault", "error in its program", "kill -SEGV $$"),
    "abort": shell("aborted", "algorithm", "aborted itself", "last words", "kill -ABRT $$"),
    "out of memory": shell("out_of_memory", "description", "was killed for memory", "Raise `memory`", EAT, memory="16MiB"),
    "out of memory in a child": shell("out_of_memory", "description", "exit code 3", "Raise `memory`", f"({EAT}); exit 3", memory="16MiB"),
    "timeout": shell("timed_out", "description", "its time limit of 1 s", "Raise `timeout_seconds`", "sleep 60", timeout_seconds=1),
    "SIGTERM ignored": shell("timed_out", "description", "its time limit of 1 s", "Raise `timeout_seconds`", "trap '' TERM; while :; do sleep 1; done", timeout_seconds=1),
    "disk full in output": Situation("disk_full", "run_container", "platform", "No space left on device", "Free space", 3, script="head -c 20000000 /dev/zero > output/x", make=small_disk),
    "tmp full": shell("tmp_full", "description", "no room left", "Raise `tmp_size`", "cat /dev/zero > /tmp/x", tmp_size="1MiB"),
    "read-only root": shell("read_only", "policy", "only below output and /tmp", "`writable_root: true`", "touch /x"),
    "read-only input": shell("read_only", "policy", "only below output and /tmp", "its input is never writable", "touch input/x"),
    "no network": shell("no_network", "policy", "it wanted the network", "`network: true`", "wget -O /tmp/x http://example.org/"),
    "pids limit": shell("pids_limit", "policy", "more processes or threads", "Raise `pids_limit`", "i=0; while [ $i -lt 60 ]; do sleep 5 & i=$((i+1)); done", pids_limit=20),
    "module missing": shell("module_missing", "algorithm", "lacks a module", "Install it in the image", "echo \"ModuleNotFoundError: No module named 'x'\" >&2; exit 1"),
    "output no dataset can hold": Situation("unsafe_name", "publish_output", "algorithm", "is a link", "", 2, "ln -s /etc/passwd output/x"),
    "output too large": shell("output_too_large", "policy", "output", "`max_output_size`", "head -c 3000000 /dev/zero > output/x; sleep 30", max_output_size="1MiB"),
    "too many files": shell("too_many_files", "policy", "more than 20 files and folders", "`max_output_files`", "i=0; while [ $i -lt 50 ]; do : > output/$i; i=$((i+1)); done; sleep 30", max_output_files=20),
    "log too large": shell("log_too_large", "policy", "log", "`max_log_size`", "yes | head -c 3000000; sleep 30", max_log_size="1MiB"),
    "image not found": image("image_not_found", "description", "There is no image", "Check its spelling", 2, not_in_the_registry),
    "registry refuses credentials": image("image_denied", "description", "refuses these credentials", "the password", 3, wrong_password),
    "registry unreachable": image("registry_unavailable", "platform", "did not answer", "Check its name", 3, registry_away),
    "broken archive": image("image_invalid", "description", "cut", "Copy it again", 2, broken_archive),
    "archive with two images": image("image_invalid", "description", "holds 2 images", "Save one", 2, two_images),
    "no GPU": Situation("no_gpu", "plan", "platform", "needs a GPU", "gpu: false", 3, algorithm={"gpu": True}),
    "unknown parameter": Situation("invalid_description", "plan", "description", "`n`", "", 2, algorithm={"parameters": {"n": None}}),
    "prerequisite failed": Situation("prerequisite_failed", "run_container", "description", "its prerequisite get failed: `exit 4` (taskStarts) ended with exit code 4", "Correct the prerequisite", make=failing_prerequisite),
    "prerequisite without its variable": Situation("invalid_prerequisite", "plan", "description", "→ get): it asks for the template variable dataPath", "template_variables: {dataPath: VALUE}", 2, make=prerequisite_without_its_variable),
    "marketplace does not answer": Situation("marketplace_unavailable", "plan", "platform", "x.yaml does not answer", "Check the address", 3, make=marketplace_away),
    "engine not running": image("engine_unavailable", "platform", "did not answer", "Start one", 3, no_engine),
    "input missing": data("dataset_not_found", "data", "There is no folder", "Check the address", 2, no_input),
    "input empty": data("invalid_dataset", "data", "holds no files", "Put files there", 2, no_files),
    "S3 credentials wrong": data("store_denied", "platform", "does not let us write", "secret_access_key", 3, wrong_keys),
    "bucket missing": data("invalid_dataset", "data", "does not exist", "Create it first", 2, no_bucket),
    "store does not answer": data("store_unavailable", "platform", "did not answer", "endpoint_url", 3, store_away),
    "store read-only": data("store_denied", "platform", "does not let us write", "its owner and mode", 3, read_only_store),
    "store full": Situation("disk_full", "publish_output", "platform", "no room left", "Free some space", 3, "head -c 3000000 /dev/zero > output/x", make=full_store),
}  # fmt: skip


@pytest.fixture
def surroundings(
    tmp_path: Path, busybox: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Surroundings]:
    for each in (tasks.stage_input, tasks.prepare_image, tasks.run_container, tasks.publish_output):
        monkeypatch.setattr(each, "retry_delay_seconds", [0.0] * each.retries)
        monkeypatch.setattr(each, "retry_jitter_factor", None)
    monkeypatch.setenv("OASIS_FLOWS_STOP_GRACE", "1")
    with ExitStack() as stack:
        yield Surroundings(tmp_path, busybox, request, stack, monkeypatch)


@contextmanager
def documents(situation: Situation, here: Surroundings) -> Iterator[tuple[str, str, list[str]]]:
    """Names of the documents of a situation, and more options of the command."""
    made = situation.make(here)
    name = f"failure-{secrets.token_hex(4)}"
    (here.folder / "letters").mkdir()
    (here.folder / "letters" / "a.txt").write_text("a")
    made.get("dataset", Dataset(url=str(here.folder / "letters"))).save(name)
    described = {"docker_image": DockerImage(image_id=here.image), "command": ["sh", "-c", situation.script]}
    Algorithm(
        **described | situation.algorithm | {k: v for k, v in made.items() if k in ("docker_image", "prerequisites")}
    ).save(name)
    options = []
    if store := made.get("store"):
        store.save(name)
        options = ["--store", name]
    yield name, name, options


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_every_failure_explains_itself_everywhere_the_same(
    prefect_server: Any, here: Path, docker_api: Any, surroundings: Surroundings, capsys: Any, situation: Situation
) -> None:
    with documents(situation, surroundings) as (algorithm, dataset, options):
        exit = main(["run", algorithm, dataset, "--json", *options])
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
    run = prefect_server.api(f"/flow_runs/{told['flow_run_id']}")
    found = prefect_server.api("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    (page,) = [artifact["data"] for artifact in found if artifact["key"] == "oasis-run"]
    verdict = told["verdict"]

    # What it is.
    assert (verdict["code"], verdict["stage"], verdict["blame"]) == (situation.code, situation.stage, situation.blame), told
    assert situation.says in verdict["sentence"]
    assert situation.does in verdict["advice"]
    assert verdict["evidence"]
    assert set(verdict) == set(Verdict.__dataclass_fields__)
    # The same everywhere: command, state, page, tag, and the record where a container ran.
    assert exit == situation.exit
    assert run["state"]["message"] == told["message"] == verdict["sentence"]
    assert run["state_type"] == "FAILED"
    assert f"failed:{situation.code}" in run["tags"]
    for part in (verdict["sentence"].rstrip("."), verdict["advice"], f"`{situation.code}`", situation.stage):
        assert part in page.replace("\\", "")
    assert [line for line in verdict["evidence"] if line not in page] == []
    if situation.stage == "run_container" and situation.exit == 1:
        assert json.loads((Path(told["url"]) / "task.json").read_text())["verdict"] == verdict
        assert not (Path(told["url"]) / "manifest.jsonl").exists()
    # Nothing stays.
    assert containers_of(docker_api, run["id"]) == []
    assert dataset_document(prefect_server, told) is None
    # What is nowhere else stays in its workspace, for a retry.
    kept = {run["id"]} if situation.code == "disk_full" and situation.stage == "publish_output" else set()
    assert {path.name for path in (here / "workspaces").glob("*")} == kept


def dataset_document(server: Any, told: dict[str, Any]) -> Any:
    """The Dataset document of a failed run's output: there must be none."""
    wanted = {"block_documents": {"is_anonymous": {"eq_": False}}, "limit": 200}
    documents = server.api("/block_documents/filter", wanted)
    return next((d for d in documents if told["url"] and d["data"].get("url") == told["url"]), None)


def test_an_automation_can_match_the_code(prefect_server: Any, here: Path, surroundings: Surroundings, capsys: Any) -> None:
    with documents(SITUATIONS["read-only root"], surroundings) as (algorithm, dataset, _):
        main(["run", algorithm, dataset, "--json"])
    run_id = json.loads(capsys.readouterr().out.splitlines()[-1])["flow_run_id"]

    def events() -> Any:
        wanted = {"event": {"name": ["oasis-flows.run.failed"]}, "resource": {"labels": {"oasis.code": ["read_only"]}}}
        return [
            event
            for event in prefect_server.api("/events/filter", {"filter": wanted, "limit": 50})["events"]
            if event["resource"]["prefect.resource.id"] == f"prefect.flow-run.{run_id}"
        ]

    eventually(events, 30)
    (event,) = events()
    assert {k: event["resource"][f"oasis.{k}"] for k in ("stage", "blame", "transient")} == {
        "stage": "run_container",
        "blame": "policy",
        "transient": "false",
    }
    assert event["payload"]["advice"].startswith("Let it write there")


def test_memory_that_does_not_suffice_is_raised_once_and_said(
    prefect_server: Any, here: Path, docker_api: Any, surroundings: Surroundings, capsys: Any
) -> None:
    hungry = "x=$(yes | head -c 20000000); echo x > output/x; echo enough"
    for most, code in (("256MiB", "ok"), ("17MiB", "out_of_memory")):
        situation = shell(code, "", "", "", hungry, memory="16MiB", memory_max=most)
        with documents(situation, surroundings) as (algorithm, dataset, _):
            exit = main(["run", algorithm, dataset, "--json"])
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        record = json.loads((Path(told["url"]) / "task.json").read_text())

        assert exit == (0 if code == "ok" else 1)
        assert record["verdict"]["code"] == code
        assert record["first_try"]["reason"] == "out_of_memory"
        assert record["first_try"]["memory_limit_bytes"] == 16 << 20
        assert record["exit"]["memory_limit_bytes"] == int(most.removesuffix("MiB")) << 20
        assert "run again, once" in record["verdict"]["action"]
        assert ("would do" in record["verdict"]["action"]) == (code == "ok")
        # Of the first try only its end is kept. The shell may live to tell of its child's death.
        said = (Path(told["url"]) / "log.txt").read_bytes()
        assert said == b"enough\n" if code == "ok" else said in (b"", b"Killed\n")
        for path in surroundings.folder.glob("letters/*"):
            path.unlink()
        (surroundings.folder / "letters").rmdir()
