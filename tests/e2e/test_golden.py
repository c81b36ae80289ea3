"""The main job with real containers and a real Prefect server: the cases of RD-OASIS, and what files and words can be."""

import hashlib
import json
import re
import threading
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from prefect.blocks.system import Secret

from oasis_flows import documents, store, tasks
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.errors import AlgorithmFailed, DescriptionError, StoreUnavailable, UnsafeName
from oasis_flows.flows.algorithm_task import algorithm_task
from oasis_flows.plan import location
from oasis_flows.running import open_log
from oasis_flows.settings import current
from tests.images import TinyImage, busybox_layer, docker_archive, oci_archive
from tests.servers.engine import eventually
from tests.servers.faultproxy import Faults, between
from tests.servers.prefect import HOME

SECRET = "correct horse battery staple"

# The words of a command, each ended by NUL, which no word can hold.
TELL_WORDS = ["/bin/sh", "-c", 'for word in "$@"; do printf "%s\\0" "$word"; done > output/words', "sh"]

NASTY = [
    "",
    " ",
    "two words",
    'a "quoted" word',
    "it's",
    "line\nbreak",
    "\ttab",
    "$HOME `id` $(id) ${x}",
    "{brace} {{twice}} {} {0}",
    "\\ back\\\\slash",
    "*?[a-z]",
    "; rm -rf / #",
    "-n",
    "--",
    "日本語 ñ 🚀",
    "é and é",
    "\x01\x7f",
]


@pytest.fixture
def image(ground):
    return DockerImage(image_id=ground.image)


@pytest.fixture
def letters(tmp_path):
    """A dataset with two files of the same base name."""
    for name, text in {"one/a.txt": "first", "two/a.txt": "second"}.items():
        (tmp_path / "letters" / name).parent.mkdir(parents=True)
        (tmp_path / "letters" / name).write_text(text)
    return Dataset(url=str(tmp_path / "letters"))


class Ran:
    """A finished run."""

    def __init__(self, server, home, state):
        self.id = str(state.state_details.flow_run_id)
        self.run = server.api(f"/flow_runs/{self.id}")
        self.result = state.result(raise_on_failure=False)
        self.message = self.run["state"]["message"]
        self.workspace = home / "workspaces" / self.id
        self.url = self.run["labels"].get("oasis.output")
        self.folder = Path(self.url or "/nowhere")

    @property
    def log(self):
        return (self.folder / "log.txt").read_bytes()

    @property
    def record(self):
        return json.loads((self.folder / "task.json").read_text())

    @property
    def files(self):
        data = self.folder / "data"
        return {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*") if path.is_file()}


@pytest.fixture
def ran(prefect_server, ground, letters):
    """Runs the flow on an engine; whatever happens, no container and no workspace may stay."""
    runs = []

    def run(algorithm, dataset=None, **options):
        done = Ran(prefect_server, ground.home, algorithm_task(algorithm, dataset or letters, return_state=True, **options))
        runs.append(done)
        return done

    yield run
    assert [ground.seen(done.id) for done in runs if ground.seen(done.id)] == []


ECHO = '/bin/sh -c "echo DATA > output/hello.txt && echo HI"'


def test_a_command_leaves_exactly_its_file_and_its_line(ran, image):
    done = ran(Algorithm(docker_image=image, command=ECHO))

    assert done.run["state_type"] == "COMPLETED"
    assert done.log == b"HI\n"
    assert done.files == {"hello.txt": b"DATA\n"}
    assert (done.folder / "manifest.jsonl").exists()
    assert not done.workspace.exists()


@pytest.mark.parametrize(("write", "options"), [(docker_archive, {}), (oci_archive, {"packed": True})])
def test_an_image_file_does_the_same_as_an_image_of_a_registry(ran, ground, docker_api, tmp_path, write, options):
    # An image of its own, which the engine does not know yet.
    tiny = TinyImage(config={"Env": ["PATH=/bin", f"WRITTEN_BY={write.__name__}-{tmp_path}"]}, layers=(busybox_layer(),))
    archive = write(tmp_path / "image.tar", tiny, **options)
    done = ran(Algorithm(docker_image=DockerImage(image_file=str(archive)), command=ECHO))
    if ground.name == "docker":
        docker_api.remove_image(done.record["image"], force=True)

    assert done.log == b"HI\n"
    assert done.files == {"hello.txt": b"DATA\n"}
    # A cluster's nodes pull it by digest.
    assert re.fullmatch("sha256:.*" if ground.name == "docker" else ".*/algorithms@sha256:.*", done.record["image"])


@pytest.mark.parametrize(
    ("command", "sentence", "advice"),
    [
        ("notacommand", "could not start, because its command is not in the image.", "Correct `command` or `entrypoint`"),
        (["sh", "-c", "exit 1"], "ended with exit code 1 after ", "It wrote nothing to its log."),
        (["sh", "-c", "echo alas >&2; exit 1"], "ended with exit code 1 after ", "Its last lines: alas"),
    ],
)
def test_a_command_that_fails_is_explained_and_makes_no_dataset(ran, image, command, sentence, advice):
    done = ran(Algorithm(docker_image=image, command=command))

    assert isinstance(done.result, AlgorithmFailed)
    assert done.run["state_type"] == "FAILED"
    assert sentence in done.message
    assert advice in str(done.result)
    assert {path.name for path in done.folder.iterdir()} == {"log.txt", "task.json"}
    assert done.record["verdict"]["sentence"] == done.message
    assert documents.find(Dataset, done.record["output"]["name"]) is None
    assert not done.workspace.exists()


def test_outputs_keep_their_relative_names_and_empty_files_and_strange_names_arrive(ran, image):
    names = [
        "test.txt",
        "foo/bar.txt",
        "foo/bar2.txt",
        "foo/bar/baz.txt",
        "a b/ünï 日本.txt",
        "🚀",
        "-n",
        "back\\slash",
        "x" * 255,
    ]
    script = 'set -e; for name in "$@"; do mkdir -p "output/$(dirname -- "$name")"; printf "%s\\n" "$name" > "output/$name"; done; : > output/empty'
    done = ran(Algorithm(docker_image=image, entrypoint=["sh", "-c", script, "sh"], command=names))

    assert done.files == {name: f"{name}\n".encode() for name in names} | {"empty": b""}
    assert {entry.path for entry in store.scan(location(done.result))} == {*names, "empty"}


def test_input_files_of_the_same_base_name_both_arrive_and_cannot_be_changed(ran, image, letters):
    refused = "{ echo x > input/one/a.txt || rm input/two/a.txt; } 2> output/refused || true"
    script = f"cat input/one/a.txt input/two/a.txt; cat $OASIS_INPUT/one/a.txt; {refused}"
    done = ran(Algorithm(docker_image=image, command=["sh", "-c", script]))

    assert done.log == b"firstsecondfirst"
    assert done.files["refused"].count(b"Read-only file system") == 2
    assert (Path(letters.url) / "one/a.txt").read_text() == "first"
    assert (Path(letters.url) / "two/a.txt").exists()


def test_the_same_task_run_twice_gives_two_datasets(ran, image):
    # A name is of one place only, and grounds have places of their own.
    name = f"twice-{uuid.uuid4().hex[:8]}"
    first, second = (ran(Algorithm(docker_image=image, command=ECHO), output_name=name) for _ in range(2))

    assert first.url != second.url
    assert first.files == second.files
    assert (first.folder / "manifest.jsonl").read_bytes() == (second.folder / "manifest.jsonl").read_bytes()
    assert Dataset.load(name).url == second.url


def test_every_word_of_a_command_reaches_the_container_exactly(ran, image):
    done = ran(Algorithm(docker_image=image, entrypoint=TELL_WORDS, command=NASTY))

    assert done.files["words"].decode().split("\0")[:-1] == NASTY


# Whatever a Unicode text can hold, but for NUL, which no word can, and half characters, which no UTF-8 can.
WORDS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30), max_size=40)


@settings(max_examples=3, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=WORDS)
def test_any_words_reach_the_container_exactly_also_through_parameters(ran, image, words):
    declared = {f"p{number}": None for number in range(len(words))}
    placeholders = [f"{{p{number}}}" for number in range(len(words))]
    given = {f"p{number}": word for number, word in enumerate(words)}
    done = ran(
        Algorithm(docker_image=image, entrypoint=TELL_WORDS, command=[*words, *placeholders], parameters=declared),
        parameters=given,
    )

    expected = [*(word.replace("{{", "{").replace("}}", "}") if "{{p" in word else word for word in words), *words]
    assert done.files["words"].decode().split("\0")[:-1] == expected


def test_a_string_is_split_as_a_shell_would_and_a_parameter_is_never_split_again(ran, image):
    done = ran(
        Algorithm(
            docker_image=image,
            entrypoint=TELL_WORDS,
            command="""plain 'single quoted' "double $HOME" back\\ slash {value} --x={value}""",
            parameters={"value": None},
        ),
        parameters={"value": "a b; 'c' \"d\" $(touch output/injected)"},
    )

    value = "a b; 'c' \"d\" $(touch output/injected)"
    words = ["plain", "single quoted", "double $HOME", "back slash", value, f"--x={value}"]
    assert done.files == {"words": "".join(f"{word}\0" for word in words).encode()}


def test_a_parameter_in_a_shell_script_injects_no_word(ran, image):
    script = """printf '%s|' {value} "{value}" '{value}' "$(echo {value})" > output/words"""
    value = "x; touch output/injected; $(touch output/injected) `touch output/injected` ' \" *"
    done = ran(
        Algorithm(docker_image=image, command=["sh", "-c", script], parameters={"value": "none"}), parameters={"value": value}
    )

    assert done.files == {"words": f"{value}|".encode() * 4}


def test_the_environment_is_the_images_and_the_documents_exactly(ran, ground, image):
    values = {
        "PLAIN": "a=b",
        "QUOTES": "\"'`$x",
        "LINES": "one\ntwo",
        "EMPTY": "",
        "UNICODE": "日本 🚀",
        "BRACES": "{n} {{n}} {m}",
    }
    done = ran(
        Algorithm(docker_image=image, command="cp /proc/self/environ output/environ", environment=values, parameters={"n": 7})
    )
    got = dict(line.split("=", 1) for line in done.files["environ"].decode().split("\0") if line)

    assert got.pop("HOSTNAME")
    assert got.pop("HOME")
    if ground.name == "kubernetes":
        # Kubelet adds the API server's address, and nobody can leave it out.
        got = {name: value for name, value in got.items() if not name.startswith("KUBERNETES_")}
    assert got == values | {
        "BRACES": "7 {n} {m}",
        "PATH": "/bin",
        "FROM_IMAGE": "yes",
        "OASIS_INPUT": "/work/input",
        "OASIS_OUTPUT": "/work/output",
        "OASIS_RUN_ID": done.id,
        "OASIS_GPU_COUNT": "0",
        "OASIS_PARAMETER_n": "7",
    }


def test_an_image_without_entrypoint_or_command_given_runs_its_own(ran, ground, docker_api, tmp_path):
    tiny = TinyImage(
        config={"Env": ["PATH=/bin"], "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo from the image > output/own"]}
    )
    archive = docker_archive(tmp_path / "own.tar", tiny)
    own = DockerImage(image_file=str(archive))
    alone = ran(Algorithm(docker_image=own))
    other = ran(Algorithm(docker_image=own, command=["echo from the document > output/own"]))
    if ground.name == "docker":
        docker_api.remove_image(tiny.id, force=True)

    assert alone.files == {"own": b"from the image\n"}
    assert other.files == {"own": b"from the document\n"}


def test_the_sandbox_is_closed_and_what_was_in_force_is_recorded(ran, ground, image):
    script = "id -u; touch /root-file; ls /var/run/docker.sock; ip link | grep -c '^[0-9]'; touch /tmp/free && echo tmp; pwd; env | grep -ci aws"
    done = ran(Algorithm(docker_image=image, command=["sh", "-c", script + "; true"], memory="64MiB", cpus=0.5))
    force = done.record["sandbox"]["in_force"]

    assert b"Read-only file system" in done.log
    assert b"docker.sock: No such file" in done.log
    # What came on stderr may stand anywhere between.
    assert [line for line in done.log.split(b"\n") if b": " not in line][-4:] == [b"tmp", b"/work", b"0", b""]
    limits = (
        {"cpu": "500m", "memory": str(64 << 20)} if ground.name == "kubernetes" else {"memory_bytes": 64 << 20, "cpus": 0.5}
    )
    assert limits.items() <= (force["limits"] if ground.name == "kubernetes" else force).items()
    assert (force["network"], force["read_only_root"]) == ("none", True)
    assert force["capabilities_dropped"] == ["ALL"]
    assert done.record["sandbox"]["loosened"] == []


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("ln -s /etc/passwd output/bad", "'bad' is a link to the absolute path"),
        ("ln -s ../../secret output/bad", "'bad' is a link to '../../secret', outside"),
        ("mkfifo output/bad", "'bad' is a fifo"),
    ],
)
def test_an_output_that_cannot_be_carried_is_refused_and_everything_else_kept(ran, image, script, words):
    done = ran(Algorithm(docker_image=image, command=["sh", "-c", f"echo fine > output/good; {script}; echo done"]))

    assert isinstance(done.result, UnsafeName)
    assert words in done.message
    assert done.files == {"good": b"fine\n"}
    assert done.log == b"done\n"
    assert {path.name for path in done.folder.iterdir()} == {"data", "log.txt", "task.json"}
    assert documents.find(Dataset, done.record["output"]["name"]) is None


@pytest.mark.parametrize("code", [0, 3])
def test_a_secret_reaches_the_container_and_nothing_that_is_kept(ran, ground, image, prefect_server, docker_api, code):
    Secret(value=SECRET).save("golden-hush", overwrite=True)
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    script = (
        'echo "got $TOKEN"; echo "$TOKEN" >&2; sleep 1; echo fine > output/file;'
        f'printf %s "$TOKEN" | sha256sum | grep -q {digest} && exit {code}'
    )
    before, told = {path.name for path in (ground.home / "workspaces").glob("*")}, []

    def look() -> bool:
        """Keep what the engine tells of the run's container; a run's workspace bears its id."""
        new = {path.name for path in (ground.home / "workspaces").glob("*")} - before
        told.extend(text for text in map(ground.seen, new) if text)
        return bool(told)

    looking = threading.Thread(target=lambda: eventually(look, 60))
    looking.start()
    done = ran(Algorithm(docker_image=image, command=["sh", "-c", script], secret_environment={"TOKEN": "golden-hush"}))
    looking.join()
    artifacts = prefect_server.api("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [done.id]}}})
    logs = prefect_server.api("/logs/filter", {"logs": {"flow_run_id": {"any_": [done.id]}}})

    assert done.record["exit"]["exit_code"] == code
    assert sorted(done.log.splitlines()) == [b"***", b"got ***"]
    assert done.record["secret_environment"] == {"TOKEN": "golden-hush"}
    assert done.id in told[0]
    kept = [path for root in (done.folder, ground.home, HOME) for path in root.rglob("*") if path.is_file()]
    assert {path.name for path in kept} >= {"log.txt", "task.json", "prefect.db"}
    everything = {
        **{str(path): path.read_bytes() for path in kept},
        "server": json.dumps([artifacts, logs, done.run]).encode(),
        "exception": repr(done.result).encode(),
        "engine": "".join(told).encode(),
    }
    if ground.name == "docker":
        everything["image"] = json.dumps([docker_api.history(ground.image), docker_api.inspect_image(ground.image)]).encode()
    assert [name for name, content in everything.items() if SECRET.encode() in content] == []


def test_a_word_as_long_as_the_kernel_takes_arrives(ran, image):
    given = {"text": "x" * 130_000}
    done = ran(
        Algorithm(docker_image=image, command=["sh", "-c", "echo ${#1}", "sh", "{text}"], parameters={"text": None}),
        parameters=given,
    )

    assert done.log == b"130000\n"


@pytest.mark.parametrize(
    ("command", "value"),
    [("true", "x" * 200_000), (["echo", "\u65e5" * 45_000], "x")],
    ids=["a parameter", "a word of three-byte characters"],
)
def test_a_word_that_no_kernel_takes_is_the_descriptions_fault_and_not_the_algorithms(ran, image, command, value):
    done = ran(Algorithm(docker_image=image, command=command, parameters={"text": None}), parameters={"text": value})

    assert isinstance(done.result, DescriptionError), str(done.result)[:500]


@pytest.fixture
def bucket(s3):
    """A store in a new bucket, saved with its credentials, and a dataset in it."""
    name = s3.new_bucket()
    options = s3.options
    bucket = DatasetStore(
        url=f"s3://{name}/results",
        endpoint_url=options["endpoint_url"],
        access_key_id=options["access_key_id"],
        secret_access_key=options["secret_access_key"],
        region=options["region"],
    )
    bucket.save(f"store-{name}")
    client = s3.store(name)
    for key, data in {"in/a.txt": b"first", "in/deep/a.txt": b"second", "in/empty": b"", "in/ünï 日本.txt": b"third"}.items():
        client.put(key, data)
    Dataset(url=f"s3://{name}/in", store=bucket).save(f"input-{name}")
    return name


COPY = "cp -r input/. output; find input -type f | wc -l"


def objects(s3, bucket):
    return {row["path"]: row["size"] for page in s3.store(bucket).list() for row in page}


def test_a_dataset_goes_from_s3_through_a_container_to_s3(ran, s3, image, bucket, tmp_path):
    reference = {"$ref": {"block_document_slug": f"dataset-store/store-{bucket}"}}
    given = {"$ref": {"block_document_slug": f"dataset/input-{bucket}"}}
    done = ran(
        Algorithm(docker_image=image, command=["sh", "-c", COPY]), given, store=reference, output_name=f"copied-{bucket}"
    )
    root = f"results/copied-{bucket}/{done.id}"
    found = {name: size for name, size in objects(s3, bucket).items() if not name.startswith("in/")}

    assert done.run["state_type"] == "COMPLETED"
    assert done.url == f"s3://{bucket}/{root}"
    assert set(found) == {
        f"{root}/{name}"
        for name in (
            "data/a.txt",
            "data/deep/a.txt",
            "data/empty",
            "data/ünï 日本.txt",
            "log.txt",
            "task.json",
            "manifest.jsonl",
        )
    }
    assert not done.workspace.exists()

    document = Dataset.load(f"copied-{bucket}")
    assert (document.url, document.file_count, document.size_bytes) == (done.url, 4, 16)
    summary = store.fetch_to(location(document), tmp_path / "got")
    assert summary.digest == document.manifest_digest
    assert (tmp_path / "got/ünï 日本.txt").read_bytes() == b"third"
    assert b"".join(open_log(done.id, current()).read()) == b"4\n"
    record = bytes(s3.store(bucket).get(f"{root}/task.json").bytes())
    assert s3.secret_key.encode() not in record
    assert json.loads(record)["input"]["file_count"] == 4


def test_the_log_of_a_run_with_a_store_given_as_a_block_can_be_read(ran, image, bucket):
    done = ran(Algorithm(docker_image=image, command="echo HI"), store=DatasetStore.load(f"store-{bucket}"))

    assert done.run["state_type"] == "COMPLETED"
    assert b"".join(open_log(done.id, current()).read()) == b"HI\n"


def test_a_failed_algorithm_leaves_its_log_and_output_on_s3_and_no_manifest(ran, s3, image, bucket):
    given = {"$ref": {"block_document_slug": f"dataset-store/store-{bucket}"}}
    done = ran(Algorithm(docker_image=image, command=["sh", "-c", "echo part > output/part; echo alas; exit 2"]), store=given)
    kept = {name.rpartition("/")[2] for name in objects(s3, bucket) if not name.startswith("in/")}

    assert kept == {"part", "log.txt", "task.json"}
    assert b"".join(open_log(done.id, current()).read()) == b"alas\n"


def test_a_store_that_does_not_answer_is_refused_before_any_container(ran, s3, image, bucket, monkeypatch):
    monkeypatch.setattr(tasks.stage_input, "retry_delay_seconds", [0.0] * tasks.stage_input.retries)
    with between(int(s3.endpoint.rpartition(":")[2])) as proxy:
        proxy.set(Faults(refuse=True))
        away = DatasetStore.load(f"store-{bucket}").model_copy(update={"endpoint_url": f"http://127.0.0.1:{proxy.port}"})
        done = ran(Algorithm(docker_image=image, command="true"), store=away)

    assert isinstance(done.result, StoreUnavailable)
    assert "did not answer" in done.message
    assert not done.workspace.exists()
