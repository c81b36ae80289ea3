"""The command line: what it prints, what it ends with, and what it says to a catalogue that is wrong."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from prefect.blocks.system import Secret

from oasis_flows import catalogue
from oasis_flows.__main__ import main
from oasis_flows.blocks import Algorithm, Dataset, DockerImage
from oasis_flows.catalogue import InvalidDocument
from oasis_flows.errors import EngineError
from oasis_flows.machine import stand_in
from oasis_flows.testing import FakeEngine, host_path
from tests.servers.engine import eventually
from tests.servers.prefect import BIN, ROOT

IMAGE = "image_id: tool:1\n"
ALGORITHM = 'docker_image: "{{ prefect.blocks.docker-image.tool }}"\n'


@pytest.fixture
def written(tmp_path):
    """Writes the files of a catalogue; returns its folder."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / "blocks" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "blocks"

    return write


@pytest.fixture
def call(prefect_server, here, capsys, monkeypatch):
    """Calls the command line in this process; returns its exit code, stdout and stderr."""
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "ERROR")

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def letters(tmp_path):
    folder = tmp_path / "letters"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deep/ünï b.txt").write_text("bb")
    return folder


# Without a server


def test_help_answers_at_once_and_imports_no_prefect():
    def seconds():
        began = time.monotonic()
        done = subprocess.run([str(BIN / "oasis-flows"), "--help"], capture_output=True, text=True, check=True)
        assert "exit codes:" in done.stdout
        return time.monotonic() - began

    # The best of some: other tests keep the machine busy.
    assert min(seconds() for _ in range(5)) < 0.5
    listed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "oasis_flows", "--help"], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in listed.stderr.splitlines()}
    assert imported & {"prefect", "pydantic", "docker", "fsspec"} == set()


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])

    assert ended.value.code == 0
    assert capsys.readouterr().out == f"oasis-flows {version('oasis-flows')}, Prefect {version('prefect')}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["run", "one"], ["log", "x", "--head", "some"], ["log", "x", "--head", "1", "--tail", "1"]]
)
def test_a_command_that_is_none_ends_with_two_and_shows_how_it_is_used(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert ended.value.code == 2
    assert "usage: oasis-flows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "where", "advice"),
    [
        (
            {"algorithm/a.yaml": ALGORITHM + "comand: x\n", "docker-image/tool.yaml": IMAGE},
            "algorithm/a.yaml",
            "Did you mean command?",
        ),
        ({"docker-image/tool.yaml": IMAGE + "zzz: 1\n"}, "docker-image/tool.yaml", "The fields are image_id"),
        (
            {"algorithm/a.yaml": ALGORITHM + "cpus: many\n", "docker-image/tool.yaml": IMAGE},
            "algorithm/a.yaml",
            "cpus: Input should be a valid number",
        ),
        (
            {"algorithm/a.yaml": ALGORITHM + "memory: lots\n", "docker-image/tool.yaml": IMAGE},
            "algorithm/a.yaml",
            "such as 512MiB",
        ),
        (
            {"algorithm/a.yaml": ALGORITHM + "environment: {N: 1}\n", "docker-image/tool.yaml": IMAGE},
            "algorithm/a.yaml",
            'N: "1"',
        ),
        (
            {"algorithm/a.yaml": ALGORITHM},
            "algorithm/a.yaml",
            "there is no docker-image/tool.yaml in the catalogue. Add the file",
        ),
        (
            {"algorithm/a.yaml": "docker_image: tool\n"},
            "algorithm/a.yaml",
            'must be a reference: "{{ prefect.blocks.docker-image.NAME }}"',
        ),
        ({"algorithm/a.yaml": "docker_image: {image_id: tool}\n"}, "algorithm/a.yaml", "must be a reference"),
        ({"algorithm/a.yaml": "command: x\n"}, "algorithm/a.yaml", "docker_image: Field required"),
        (
            {"algorithm/a.yaml": 'docker_image: "{{ prefect.blocks.dataset.d }}"\n', "dataset/d.yaml": "url: /d\n"},
            "algorithm/a.yaml",
            "refers to a dataset, and must refer to a docker-image",
        ),
        ({"dataset/d.yaml": 'url: "{{ prefect.blocks.dataset.e }}"\n'}, "dataset/d.yaml", "Write the value itself"),
        (
            {
                "dataset/d.yaml": 'url: /d\nstore: "{{ prefect.blocks.dataset.e }}"\n',
                "dataset/e.yaml": 'url: /e\nstore: "{{ prefect.blocks.dataset.d }}"\n',
            },
            "dataset/d",
            "in a circle: ",
        ),
        ({"dataset/Bad Name.yaml": "url: /d\n"}, "Bad Name.yaml", "Rename the file to bad-name.yaml"),
        ({"dataset/d.yml": "url: /d\n"}, "dataset/d.yml", "Rename it to d.yaml"),
        ({"datasets/d.yaml": "url: /d\n"}, "datasets/d.yaml", "'datasets' is no block type. The folders are"),
        ({"dataset/d.yaml": "url: [unclosed\n"}, "dataset/d.yaml", "is not YAML"),
        ({"dataset/d.yaml": "url: /d\nurl: /e\n"}, "dataset/d.yaml", "the key 'url' comes twice"),
        ({"dataset/d.yaml": "just text\n"}, "dataset/d.yaml", "Write lines such as"),
        ({"dataset/d.yaml": ""}, "dataset/d.yaml", "Write lines such as"),
        ({"dataset/d.yaml": "url: photos\n"}, "dataset/d.yaml", "Write the whole path: "),
        (
            {"dataset-store/s.yaml": "url: s3://b/x\naccess_key_id: k\nsecret_access_key: hunter2\n"},
            "dataset-store/s.yaml",
            "Secrets are never written into a catalogue",
        ),
        (
            {"docker-image/tool.yaml": IMAGE + "registry_credentials: {username: u, password: hunter2}\n"},
            "docker-image/tool.yaml",
            "must be a reference",
        ),
        (
            {"docker-image/tool.yaml": IMAGE + "image_file: /x.tar\n"},
            "docker-image/tool.yaml",
            "Keep the one that the image comes from",
        ),
        (
            {
                "algorithm/a.yaml": ALGORITHM + 'environment: {T: "{{ prefect.blocks.secret.hush }}"}\n',
                "docker-image/tool.yaml": IMAGE,
            },
            "algorithm/a.yaml",
            "secret_environment",
        ),
    ],
)
def test_a_catalogue_that_is_wrong_is_told_with_file_and_advice(written, files, where, advice):
    with pytest.raises(InvalidDocument) as refused:
        catalogue.read(written(files))

    message = str(refused.value)
    assert where in message
    assert advice in message
    assert "hunter2" not in message
    assert len(message.splitlines()) == 2


def test_all_problems_of_a_catalogue_are_told_at_once(written):
    with pytest.raises(InvalidDocument) as refused:
        catalogue.read(
            written({"dataset/a.yaml": "url: a\n", "dataset/b.yaml": "url: /b\nurk: 1\n", "dataset/c.yaml": "url: /fine\n"})
        )

    assert len(str(refused.value).splitlines()) == 3


def test_a_folder_without_a_catalogue_is_not_taken_for_a_correct_one(tmp_path):
    with pytest.raises(InvalidDocument, match="docker-image/"):
        catalogue.read(tmp_path / "nowhere")
    with pytest.raises(InvalidDocument, match="docker-image/"):
        catalogue.read(tmp_path)


def test_yaml_may_use_anchors_and_merges(written):
    text = ALGORITHM + "environment: &a {A: x}\nsecret_environment: {<<: {B: hush}}\n"
    documents = catalogue.read(written({"docker-image/tool.yaml": IMAGE, "algorithm/a.yaml": text}))

    assert documents[1].fields["secret_environment"] == {"B": "hush"}


def test_the_shipped_catalogue_is_correct_and_a_wrong_one_ends_with_two(written, tmp_path):
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    environment |= {name: value for name, value in os.environ.items() if name == "PYTHONPATH"}

    def check(folder):
        command = [str(BIN / "oasis-flows"), "check", str(folder)]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)

    right, wrong = check("blocks"), check(written({"dataset/d.yaml": "url: photos\n"}))

    assert (right.returncode, right.stdout) == (0, "7 documents, nothing to correct.\n")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("oasis-flows: The catalogue has problems.")
    assert "Traceback" not in wrong.stderr


# With a server


def test_apply_creates_updates_and_leaves_alone_and_never_deletes(call, written):
    Secret(value="hunter2").save("applied-key", overwrite=True)
    files = {
        "docker-image/applied.yaml": "image_id: tool:1\n",
        "algorithm/applied.yaml": 'docker_image: "{{ prefect.blocks.docker-image.applied }}"\nparameters: {n: 1, t: null}\ncpus: 2\n',
        "dataset-store/applied.yaml": 'url: s3://b/x\naccess_key_id: k\nsecret_access_key: "{{ prefect.blocks.secret.applied-key }}"\n',
        "dataset/applied.yaml": 'url: s3://b/in\nstore: "{{ prefect.blocks.dataset-store.applied }}"\n',
    }
    folder = written(files)
    keys = {name.removesuffix(".yaml") for name in files}

    code, out, _ = call("apply", folder)
    assert code == 0
    assert {tuple(line.split()) for line in out.splitlines()} == {("created", key) for key in keys}
    order = [line.split()[1] for line in out.splitlines()]
    assert order.index("docker-image/applied") < order.index("algorithm/applied")
    assert order.index("dataset-store/applied") < order.index("dataset/applied")

    _, out, _ = call("apply", folder)
    assert {tuple(line.split()) for line in out.splitlines()} == {("unchanged", key) for key in keys}

    written({"algorithm/applied.yaml": files["algorithm/applied.yaml"] + "gpu: true\n"})
    (folder / "dataset/applied.yaml").unlink()
    _, out, _ = call("apply", folder)
    assert {tuple(line.split()) for line in out.splitlines()} == {
        ("updated", "algorithm/applied"),
        ("unchanged", "docker-image/applied"),
        ("unchanged", "dataset-store/applied"),
    }
    assert Algorithm.load("applied").gpu
    assert Dataset.load("applied").store.secret_access_key.get_secret_value() == "hunter2"


def test_apply_saves_nothing_when_a_secret_is_missing_on_the_server(call, written):
    files = {
        "docker-image/unsaved.yaml": "image_id: tool:1\n",
        "dataset-store/s.yaml": 'url: s3://b/x\naccess_key_id: k\nsecret_access_key: "{{ prefect.blocks.secret.nowhere }}"\n',
    }
    code, out, err = call("apply", written(files))

    assert (code, out) == (2, "")
    assert "dataset-store/s.yaml refers to the secret document 'nowhere'" in err
    assert "Make it first" in err
    with pytest.raises(ValueError, match="Unable to find"):
        DockerImage.load("unsaved")


def test_a_dataset_is_added_listed_and_got(call, letters, tmp_path):
    code, out, _ = call("dataset", "add", "cli-letters", letters, "--json")
    assert code == 0
    facts = json.loads(out)
    assert len(facts.pop("manifest_digest")) == 64
    assert facts == {"name": "cli-letters", "url": str(letters), "file_count": 2, "size_bytes": 3}

    code, out, _ = call("dataset", "ls", "cli-letters", "--json")
    assert [json.loads(line)["path"] for line in out.splitlines()] == ["a.txt", "deep/ünï b.txt"]
    assert "deep/ünï b.txt" in call("dataset", "ls", "cli-letters")[1]

    assert call("dataset", "get", "cli-letters", tmp_path / "got")[0] == 0
    assert (tmp_path / "got/deep/ünï b.txt").read_text() == "bb"
    code, _, err = call("dataset", "get", "cli-letters", tmp_path / "got")
    assert code == 2
    assert "Give a new or an empty one" in err


@pytest.mark.parametrize(
    ("arguments", "code", "advice"),
    [
        (["dataset", "ls", "no-such"], 2, "There is no dataset document 'no-such'"),
        (["dataset", "add", "x", "EMPTY"], 2, "Put the files there first"),
        (["dataset", "add", "x", "EMPTY/none"], 2, "Check the address"),
        (["dataset", "add", "Bad Name", "LETTERS"], 2, "dashes"),
        (["dataset", "add", "x", "s3://"], 2, "s3://bucket/folder"),
        (["dataset", "add", "x", "LETTERS", "--store", "no-such"], 2, "no dataset-store document"),
        (["run", "no-such", "x"], 2, "There is no algorithm document 'no-such'"),
        (["log", "no-such"], 2, "There is no run 'no-such'. `prefect flow-run ls` lists them."),
        (["apply", "EMPTY/none"], 2, "There is no folder"),
    ],
)
def test_what_is_wrong_as_written_ends_with_two_and_advice(call, letters, tmp_path, arguments, code, advice):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "LETTERS": str(letters)}
    given = [argument.replace("EMPTY", places["EMPTY"]).replace("LETTERS", places["LETTERS"]) for argument in arguments]
    ended, _, err = call(*given)

    assert advice in err
    assert ended == code
    assert "Traceback" not in err


@pytest.fixture
def described(prefect_server, letters):
    """An algorithm and a dataset that the server knows."""
    Algorithm(docker_image=DockerImage(image_id="tool:1"), parameters={"n": 1, "flag": False, "word": "x"}).save(
        "cli-tool", overwrite=True
    )
    Dataset(url=str(letters)).save("cli-letters", overwrite=True)
    return ("run", "cli-tool", "cli-letters")


def test_a_run_prints_where_everything_is_and_ends_with_zero(call, described):
    def write(job, log):
        (host_path(job, "/work/output") / "out").write_text(json.dumps(dict(job.environment)))
        log("stdout", b"one\ntwo\n")
        return 0

    with stand_in(FakeEngine(write)):
        code, out, _ = call(*described, "-p", "n=5", "-p", "flag=TRUE", "-p", "word=a=b", "--output-name", "cli-out", "--json")
    facts = json.loads(out)

    assert code == 0
    assert (facts["status"], facts["state"], facts["dataset"], facts["log_tail"]) == (
        "Succeeded",
        "Completed",
        "cli-out",
        ["one", "two"],
    )
    environment = json.loads((Path(facts["url"]) / "data/out").read_text())
    assert [environment[f"OASIS_PARAMETER_{name}"] for name in ("n", "flag", "word")] == ["5", "true", "a=b"]


def test_a_failed_algorithm_ends_with_one_a_wrong_parameter_with_two_and_a_failed_engine_with_three(call, described):
    def refuse(job, log):
        raise EngineError("The engine refuses. Mend it.")

    def fail(job, log):
        log("stderr", b"alas\n")
        return 4

    with stand_in(FakeEngine(fail)):
        code, out, err = call(*described)
    assert code == 1
    assert "Failed" in out
    assert (Path(out.splitlines()[-1].removeprefix("in ")) / "log.txt").read_bytes() == b"alas\n"
    assert "ended with exit code 4" in err
    assert "alas" in err

    with stand_in(engine := FakeEngine(fail)):
        code, out, err = call(*described, "-p", "n=many", "--json")
    assert (code, engine.jobs) == (2, [])
    assert "must be a whole number" in json.loads(out)["message"]
    code, _, err = call(*described, "-p", "n")
    assert code == 2
    assert "Write --parameter NAME=VALUE" in err

    with stand_in(FakeEngine(refuse)):
        code, out, err = call(*described)
    assert code == 3
    assert "Mend it" in err
    assert out.splitlines()[-1] == "nothing was published"
    with stand_in(FakeEngine(refuse)):
        assert json.loads(call(*described, "--json")[1])["url"] is None


def test_a_failed_algorithm_ends_with_one_also_when_its_output_could_not_be_kept(call, described, here):
    def fail(job, log):
        # The store of those who name none becomes a file while the algorithm runs.
        store = here / "datasets"
        store.rename(here / "datasets-gone")
        store.write_text("no folder")
        return 1

    with stand_in(FakeEngine(fail)):
        code, out, err = call(*described)

    assert "ended with exit code 1" in err
    assert code == 1
    assert out.splitlines()[-1] == "nothing was published"


@pytest.fixture
def shown(call, described):
    """Runs an algorithm that logs this, and returns what `oasis-flows log` shows of it."""

    def show(text, *several):
        def write(job, log):
            log("stdout", text.encode())
            return 0

        with stand_in(FakeEngine(write)):
            run_id = json.loads(call(*described, "--json")[1])["flow_run_id"]
        return [call("log", run_id, *options)[:2] for options in several]

    return show


def test_a_log_is_shown_whole_or_its_first_or_last_lines(shown):
    text = "first\n\nthird\nlast without end"
    options = (
        [],
        ["--follow"],
        ["--head", "2"],
        ["--tail", "2"],
        ["--head", "0"],
        ["--tail", "0"],
        ["--head", "9"],
        ["--tail", "9"],
    )

    assert shown(text, *options) == [
        (0, part) for part in (text, text, "first\n\n", "third\nlast without end", "", "", text, text)
    ]


def test_a_progress_bar_that_is_drawn_anew_is_one_line(shown):
    bar = "10%\r50%\r100%\n"

    assert shown(f"first\n{bar}third\n", ["--head", "2"], ["--tail", "2"]) == [(0, f"first\n{bar}"), (0, f"{bar}third\n")]


def test_a_log_is_followed_while_it_grows_and_until_the_run_ends(prefect_server, letters, busybox, tmp_path):
    script = "echo waiting; until [ -e input/go ]; do sleep 0.1; done; echo gone"
    Algorithm(docker_image=DockerImage(image_id=busybox), command=["sh", "-c", script], timeout_seconds=120).save(
        "cli-waits", overwrite=True
    )
    Dataset(url=str(letters)).save("cli-letters", overwrite=True)
    home = tmp_path / "home"
    env = prefect_server.env | {"OASIS_FLOWS_HOME": str(home)}

    @contextlib.contextmanager
    def started(*arguments):
        command = [str(BIN / "oasis-flows"), *arguments]
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)

    with started("run", "cli-waits", "cli-letters", "--json") as run:
        eventually(lambda: list((home / "workspaces").glob("*/log.txt")), 90)
        run_id = next((home / "workspaces").iterdir()).name
        with started("log", run_id, "--follow") as log:
            assert log.stdout.readline() == b"waiting\n"
            assert run.poll() is None
            (letters / "go").touch()
            assert log.stdout.readline() == b"gone\n"
            assert log.stdout.read() == b""
            assert log.wait(30) == 0
        facts = json.loads(run.stdout.read())
        assert run.wait(60) == 0

    assert facts["log_tail"] == ["waiting", "gone"]


def test_reap_and_doctor_say_what_they_found_in_json_and_end_with_three_where_no_engine_is(
    call, docker_api, monkeypatch, tmp_path
):
    code, out, _ = call("reap", "--json")
    assert code == 0
    assert set(json.loads(out)) == {"containers", "workspaces", "runs", "caches"}

    code, out, _ = call("doctor", "--json")
    findings = {finding["check"]: finding for finding in map(json.loads, out.splitlines())}
    assert code == 0
    assert set(findings) >= {"engine", "gpu", "workspace", "server", "documents", "pool", "store"}
    assert findings["engine"]["status"] == findings["server"]["status"] == findings["store"]["status"] == "ok"

    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    code, _, err = call("reap")
    assert code == 3
    assert "DOCKER_HOST" in err
    code, out, _ = call("doctor", "--json")
    assert code == 3
    assert json.loads(out.splitlines()[0])["status"] == "missing"
    assert "apt-get install docker.io" in json.loads(out.splitlines()[0])["remedy"]


def test_a_server_that_is_away_ends_with_three_and_says_which_setting_to_look_at(prefect_server, tmp_path):
    away = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": "0", "OASIS_FLOWS_HOME": str(tmp_path)}
    done = prefect_server.run("oasis-flows", "apply", "blocks", check=False, **away)

    assert done.returncode == 3
    assert "PREFECT_API_URL" in done.stderr
    assert "Traceback" not in done.stderr
