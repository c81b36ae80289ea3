"""Prerequisites in real containers: every event and policy, what the algorithm notices of them, and how they fail."""

import json
import subprocess
import threading
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from prefect.blocks.system import Secret

from oasis_flows import catalogue, openpai
from oasis_flows.blocks import Algorithm, Dataset, DockerImage, Prerequisite
from oasis_flows.errors import AlgorithmFailed, DescriptionError, InvalidPrerequisite
from oasis_flows.flows.algorithm_task import algorithm_task
from tests.images import TinyImage, busybox_layer, docker_archive, layer
from tests.servers.engine import containers_of, eventually

SECRET = "corréct horse $(battery) 'staple'"
SAY = ["sh", "-c", 'echo algorithm; exit "$0"']


@pytest.fixture
def image(busybox):
    return DockerImage(image_id=busybox)


@pytest.fixture
def letters(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("a")
    return Dataset(url=str(tmp_path / "letters"))


class Ran:
    """A finished run."""

    def __init__(self, server, state):
        self.id = str(state.state_details.flow_run_id)
        self.run = server.api(f"/flow_runs/{self.id}")
        self.result = state.result(raise_on_failure=False)
        self.message = self.run["state"]["message"]
        self.folder = Path(self.run["labels"].get("oasis.output", "/nowhere"))

    @property
    def log(self):
        return (self.folder / "log.txt").read_text()

    @property
    def said(self):
        """What callbacks and algorithm said, without the wrapper's own words."""
        return [line for line in self.log.splitlines() if not line.startswith("oasis-flows: ")]

    @property
    def record(self):
        return json.loads((self.folder / "task.json").read_text())


@pytest.fixture
def ran(prefect_server, here, docker_api, letters):
    """Runs the flow on the machine's engine; no container may stay."""
    runs = []

    def run(algorithm, **options):
        done = Ran(prefect_server, algorithm_task(algorithm, letters, return_state=True, **options))
        runs.append(done)
        return done

    yield run
    assert [containers_of(docker_api, done.id) for done in runs if containers_of(docker_api, done.id)] == []


@pytest.fixture
def made(prefect_server):
    """Saves prerequisites under names of their own; returns the name of each."""

    def make(*callbacks, name="", **fields):
        document = f"{name or 'p'}-{uuid.uuid4().hex[:8]}"
        params = fields.pop("params", None) or {
            "callbacks": [{"event": event, "commands": list(commands)} for event, *commands in callbacks]
        }
        Prerequisite(name=name or document, plugin_params=params, **fields).save(document)
        return document

    return make


def all_events(name):
    return [(event, f"echo {name} {event}") for event in ("taskStarts", "taskSucceeds", "taskFails", "taskEnds")]


@pytest.mark.parametrize(("code", "happened"), [(0, "taskSucceeds"), (3, "taskFails")])
def test_callbacks_run_around_the_algorithm_those_at_its_end_in_reverse(ran, made, image, code, happened):
    names = [made(*all_events(name)) for name in ("one", "two")]
    done = ran(Algorithm(docker_image=image, command=[*SAY, str(code)], prerequisites=names))

    assert done.said == [
        "one taskStarts",
        "two taskStarts",
        "algorithm",
        f"two {happened}",
        f"one {happened}",
        "two taskEnds",
        "one taskEnds",
    ]
    assert done.record["exit"]["exit_code"] == code
    assert done.record["verdict"]["code"] == ("exit_nonzero" if code else "ok")
    assert [(each["event"], each["exit_code"]) for each in done.record["prerequisites"]["callbacks"]] == [
        ("taskStarts", 0),
        (happened, 0),
        ("taskEnds", 0),
    ] * 2


@pytest.mark.parametrize("ends", [True, False])
def test_a_failed_start_keeps_the_algorithm_from_starting_and_is_named(ran, made, image, ends):
    bad = made(("taskStarts", "echo first", "cd /nowhere", "echo not reached"), name="download")
    after = made(("taskStarts", "echo after"), *([("taskFails", "echo cleaned up")] if ends else []))
    done = ran(Algorithm(docker_image=image, command=[*SAY, "0"], prerequisites=[bad, after]))

    assert isinstance(done.result, AlgorithmFailed)
    assert done.message.startswith(
        "The algorithm algorithm did not start, because its prerequisite download failed: `cd /nowhere` (taskStarts) ended with exit code "
    )
    # BusyBox writes the shell's name and the message apart, and the engine carries stdout and stderr side by side:
    # the line of the one may come between the two halves of the other's.
    assert "first" in done.log
    assert "algorithm" not in done.log
    assert "after" not in done.log
    assert ("cleaned up" in done.log) == ends
    assert done.record["exit"]["reason"] == done.record["verdict"]["code"] == "prerequisite_failed"
    assert done.record["prerequisites"]["callbacks"][0]["command"] == "cd /nowhere"


def test_a_command_that_is_not_whole_is_named(ran, made, image):
    split = made(("taskStarts", "if true; then", "echo split", "fi"), name="split")
    whole = made(("taskStarts", "if true; then\n  echo whole\nfi"))
    done, well = (ran(Algorithm(docker_image=image, command=[*SAY, "0"], prerequisites=[name])) for name in (split, whole))

    assert "its prerequisite split failed: `if true; then` (taskStarts) ended with exit code 2" in done.message
    assert "split" not in done.said
    assert well.said == ["whole", "algorithm"]


def test_a_failure_that_is_ignored_is_logged_and_the_run_goes_on(ran, made, image):
    names = [
        made(("taskStarts", "exit 9"), ("taskEnds", "false"), failurePolicy="ignore", name="optional"),
        made(("taskStarts", "echo went on")),
    ]
    done = ran(Algorithm(docker_image=image, command=[*SAY, "0"], prerequisites=names))

    assert done.record["verdict"]["code"] == "ok"
    assert done.said == ["went on", "algorithm"]
    assert "oasis-flows: taskStarts of optional ended with exit code 9, which is ignored" in done.log
    assert [each["exit_code"] for each in done.record["prerequisites"]["callbacks"]] == [9, 1, 0]


@pytest.mark.parametrize("event", ["taskSucceeds", "taskEnds"])
def test_a_failed_end_fails_a_run_that_succeeded(ran, made, image, event):
    name = made((event, "echo uploading", "(exit 6)"), name="upload")
    done = ran(Algorithm(docker_image=image, command=[*SAY, "0"], prerequisites=[name]))

    assert done.message == (
        f"The algorithm algorithm succeeded, but its prerequisite upload failed: `(exit 6)` ({event}) ended with exit code 6."
    )
    assert done.record["exit"]["reason"] == "prerequisite_failed"
    assert not (done.folder / "manifest.jsonl").exists()


def test_a_failed_end_never_hides_the_algorithms_own_exit_code(ran, made, image):
    name = made(("taskFails", "exit 6"), ("taskEnds", "exit 7"))
    done = ran(Algorithm(docker_image=image, command=[*SAY, "42"], prerequisites=[name]))

    assert done.record["exit"]["exit_code"] == 42
    assert done.record["verdict"]["code"] == "exit_nonzero"
    assert "ended with exit code 42" in done.message
    assert "oasis-flows" not in done.message


def test_export_and_cd_leak_only_where_that_is_asked_for(ran, made, image):
    script = 'echo "$A|$B|$PWD"'
    private = made(("taskStarts", "export A=private", "cd /tmp", script))
    shared = made(("taskStarts", "export B='two\nlines'; mkdir /tmp/here; cd /tmp/here"), share_environment=True)
    done = ran(Algorithm(docker_image=image, command=["sh", "-c", script], prerequisites=[private, shared]))

    assert done.said == ["private||/tmp", "|two", "lines|/tmp/here"]


@pytest.mark.parametrize("ends", [True, False])
def test_a_secret_reaches_the_commands_and_neither_the_algorithm_nor_what_is_kept(ran, made, image, here, docker_api, ends):
    Secret(value=SECRET).save("hush-hush", overwrite=True)
    script = "printf %s {{ secret.hush-hush }} | sha256sum; echo \"it is {{ secret.hush-hush }}\" 'and {{ secret.hush-hush }}'"
    name = made(("taskStarts", script), *([("taskFails", script)] if ends else []))
    done = ran(Algorithm(docker_image=image, command=["sh", "-c", "env; exit 1"], prerequisites=[name]))
    digest = subprocess.run(["sha256sum"], input=SECRET.encode(), capture_output=True, check=True).stdout.decode().split()[0]

    assert done.said[:2] == [f"{digest}  -", "it is *** and ***"]
    assert done.said.count("it is *** and ***") == 1 + ends
    assert "OASIS_SECRET_" not in done.log
    assert done.record["prerequisites"]["items"][0]["secrets"] == ["hush-hush"]
    kept = {str(path): path.read_bytes() for root in (done.folder, here) for path in root.rglob("*") if path.is_file()}
    assert [name for name, content in kept.items() if SECRET.encode() in content or b"horse" in content] == []


TELL_WORDS = ["/bin/sh", "-c", 'for word in "$@"; do printf "%s\\0" "$word"; done > output/words', "sh"]


@given(
    st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40), max_size=5), st.booleans()
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_words_reach_the_algorithm_exactly(ran, image, made, words, ends):
    name = made(("taskStarts", "set -- other words"), *([("taskEnds", "true")] if ends else []))
    done = ran(Algorithm(docker_image=image, command=[*TELL_WORDS, *words], prerequisites=[name]))

    assert (done.folder / "data/words").read_bytes() == b"".join(word.encode() + b"\0" for word in words)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize(
    ("command", "reason", "code"),
    [
        (["no-such-program"], "command_not_found", 127),
        (["/opt/noexec"], "not_executable", 126),
        (["sh", "-c", "kill -9 $$"], "killed", 137),
    ],
)
def test_the_end_of_an_algorithm_is_told_as_without_prerequisites(ran, made, image, ends, command, reason, code):
    name = made(("taskStarts", "true"), *([("taskEnds", "true")] if ends else []))
    done = ran(Algorithm(docker_image=image, command=command, prerequisites=[name]))

    assert (done.record["exit"]["reason"], done.record["exit"]["exit_code"]) == (reason, code)


def test_the_images_own_command_runs_in_the_environment_it_would_have(ran, made, docker_api, tmp_path, busybox):
    tag = f"oasis-test/own:{uuid.uuid4().hex[:8]}"
    own = {"Env": ["PATH=/bin", "A=it's"], "Entrypoint": ["env"], "Cmd": ["B=of its own", "env"]}
    with docker_archive(tmp_path / "own.tar", TinyImage(tags=(tag,), layers=(busybox_layer(),), config=own)).open(
        "rb"
    ) as archive:
        list(docker_api.load_image(archive))
    try:
        name = made(("taskStarts", "true"))
        bare = ran(Algorithm(docker_image=DockerImage(image_id=tag)))
        done = ran(Algorithm(docker_image=DockerImage(image_id=tag), prerequisites=[name]))
    finally:
        docker_api.remove_image(tag, force=True)

    def different(line):
        return not line.startswith(("HOSTNAME=", "OASIS_RUN_ID="))

    assert {"A=it's", "B=of its own"} < set(bare.said)
    assert sorted(filter(different, done.said)) == sorted(filter(different, bare.said))


def test_an_image_without_a_shell_is_refused_before_it_starts(ran, made, docker_api, tmp_path):
    tag = f"oasis-test/bare:{uuid.uuid4().hex[:8]}"
    bare = TinyImage(tags=(tag,), layers=(layer({"program": (0o755, b"#!/program\n")}),), config={"Cmd": ["/program"]})
    with docker_archive(tmp_path / "bare.tar", bare).open("rb") as archive:
        list(docker_api.load_image(archive))
    try:
        done = ran(Algorithm(docker_image=DockerImage(image_id=tag), prerequisites=[made(("taskStarts", "true"))]))
    finally:
        docker_api.remove_image(tag, force=True)

    assert isinstance(done.result, DescriptionError)
    assert "has no /bin/sh" in done.message
    assert "Take an image with a shell" in str(done.result)


def test_one_that_needs_the_network_is_refused_at_once(ran, made, image):
    done = ran(Algorithm(docker_image=image, prerequisites=[made(("taskStarts", "wget x"), network=True, name="get")]))

    assert isinstance(done.result, InvalidPrerequisite)
    assert done.message == (
        "A prerequisite cannot be used (algorithm → get): it needs the network, which the algorithm does not have."
    )
    assert "Set network: true" in str(done.result)


# Signals

STUBBORN = "trap 'echo caught; exit 5' TERM; touch output/ready; while :; do sleep 0.1; done"


def test_a_time_limit_ends_the_algorithm_and_runs_what_comes_after_a_failure(ran, made, image):
    name = made(("taskSucceeds", "echo wrong"), ("taskFails", "echo failed"), ("taskEnds", "echo ended"))
    done = ran(Algorithm(docker_image=image, command=["sh", "-c", STUBBORN], timeout_seconds=5, prerequisites=[name]))

    assert done.said == ["caught", "failed", "ended"]
    assert done.record["exit"]["reason"] == "timed_out"
    assert done.run["state_name"] == "TimedOut"


def test_a_time_limit_while_a_start_callback_runs_ends_it(ran, made, image):
    began = time.monotonic()
    name = made(("taskStarts", "sleep 60"), ("taskEnds", "echo ended"))
    done = ran(Algorithm(docker_image=image, command=[*SAY, "0"], timeout_seconds=1, prerequisites=[name]))

    assert done.record["exit"]["reason"] == "timed_out"
    assert "ended\n" in done.log
    assert time.monotonic() - began < 50


def test_the_algorithm_may_end_well_when_it_is_told_to(ran, made, image):
    name = made(("taskSucceeds", "echo well"))
    script = STUBBORN.replace("exit 5", "exit 0")
    done = ran(Algorithm(docker_image=image, command=["sh", "-c", script], timeout_seconds=5, prerequisites=[name]))

    assert done.said == ["caught", "well"]
    assert done.record["exit"]["reason"] == "timed_out"


# Holding for debugging


def hold(ran, algorithm):
    """Run it in a thread of its own; the thread, and what it will leave."""
    left = []
    thread = threading.Thread(target=lambda: left.append(ran(algorithm)))
    thread.start()
    return thread, left


def running(api, image):
    return [row["Id"] for row in api.containers(filters={"ancestor": image.image_id})]


def inside(api, container, *command):
    """What a command prints in a container, as `docker exec` does it."""
    return api.exec_start(api.exec_create(container, list(command))["Id"]).decode()


def test_a_failed_container_is_held_and_can_be_looked_into(ran, made, image, docker_api):
    hook = made(
        ("taskFails", "echo holding; sleep {{ minutes }}m"), template_variables=[{"name": "minutes"}], name="debug-hook"
    )
    wish = [{"name": hook, "template_variables": {"minutes": 0.1}}]
    script = "echo half > /tmp/half; exit 3"
    thread, left = hold(ran, Algorithm(docker_image=image, command=["sh", "-c", script], timeout_seconds=5, prerequisites=wish))
    eventually(lambda: running(docker_api, image), 60)
    (container,) = running(docker_api, image)
    eventually(lambda: "sleep 0.1m" in inside(docker_api, container, "ps"), 30)

    assert inside(docker_api, container, "cat", "/tmp/half") == "half\n"
    thread.join()
    (done,) = left
    assert (done.record["exit"]["reason"], done.record["exit"]["exit_code"]) == ("exit_nonzero", 3)
    assert f"To look inside: docker exec -it {container[:12]} sh" in done.log
    (held,) = done.record["prerequisites"]["callbacks"]
    assert 5.5 <= held["seconds"] <= 30
    assert held["exit_code"] == 0


def test_a_hold_is_bounded_by_the_machine(ran, made, image, monkeypatch):
    monkeypatch.setenv("OASIS_FLOWS_MAX_HOLD", "2")
    hook = made(("taskFails", "sleep 10m"), ("taskEnds", "echo ended"))
    began = time.monotonic()
    done = ran(Algorithm(docker_image=image, command=["sh", "-c", "exit 3"], timeout_seconds=60, prerequisites=[hook]))

    assert time.monotonic() - began < 120
    assert "ended\n" in done.log
    assert (done.record["exit"]["reason"], done.record["exit"]["exit_code"]) == ("exit_nonzero", 3)
    held = done.record["prerequisites"]["callbacks"][0]
    assert 1.5 <= held["seconds"] <= 30
    assert held["exit_code"] == 143


def test_a_hold_that_was_killed_hides_nothing_either(ran, made, image, monkeypatch):
    monkeypatch.setenv("OASIS_FLOWS_MAX_HOLD", "1")
    monkeypatch.setenv("OASIS_FLOWS_STOP_GRACE", "1")
    hook = made(("taskFails", "trap '' TERM; while :; do sleep 1; done"))
    done = ran(Algorithm(docker_image=image, command=["sh", "-c", "exit 3"], prerequisites=[hook]))

    assert (done.record["exit"]["reason"], done.record["exit"]["exit_code"]) == ("exit_nonzero", 3)
    assert done.record["prerequisites"]["callbacks"][0]["exit_code"] is None


# Storages


def test_storages_are_mounted_as_the_machine_says_and_the_record_names_them(
    ran, made, image, docker_api, tmp_path, monkeypatch
):
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "data").write_text("from the folder")
    volume = docker_api.create_volume(f"oasis-test-{uuid.uuid4().hex[:8]}")["Name"]
    table = {"docker": {"a": {"path": str(tmp_path / "stored")}, "b": {"volume": volume}}}
    monkeypatch.setenv("OASIS_FLOWS_STORAGES", json.dumps(table))
    names = [
        made(plugin="pvc_storage", params={"name": "a", "mountPath": "/mnt/a"}),
        made(("taskStarts", "echo kept > /mnt/b/file"), requireStorages=[{"name": "b", "readOnly": False}]),
    ]
    script = "cat /mnt/a/data; echo; cat /mnt/b/file; { echo x > /mnt/a/data; } 2>/dev/null || true"
    try:
        done = ran(Algorithm(docker_image=image, command=["sh", "-c", script], prerequisites=names))
    finally:
        docker_api.remove_volume(volume)

    assert done.said[:2] == ["from the folder", "kept"]
    assert (tmp_path / "stored" / "data").read_text() == "from the folder"
    assert done.record["sandbox"]["loosened"] == ["storage a at /mnt/a", "storage b at /mnt/b, writable"]
    assert done.record["prerequisites"]["storages"] == [
        {"name": "a", "mountPath": "/mnt/a", "readOnly": True, "source": str(tmp_path / "stored")},
        {"name": "b", "mountPath": "/mnt/b", "readOnly": False, "source": volume},
    ]
    assert {"source": str(tmp_path / "stored"), "target": "/mnt/a", "read_only": True} in done.record["sandbox"]["in_force"][
        "mounts"
    ]


def test_a_storage_that_is_not_mapped_or_not_there_is_refused(ran, made, image, docker_api, monkeypatch):
    name = made(plugin="pvc_storage", params={"name": "a"})
    unmapped = ran(Algorithm(docker_image=image, command=["true"], prerequisites=[name]))
    volume = f"oasis-test-{uuid.uuid4().hex}"
    monkeypatch.setenv("OASIS_FLOWS_STORAGES", json.dumps({"docker": {"a": {"volume": volume}}}))
    missing = ran(Algorithm(docker_image=image, command=["true"], prerequisites=[name]))

    assert "Add a row to the setting OASIS_FLOWS_STORAGES" in str(unmapped.result)
    assert f"The engine has no volume '{volume}'" in missing.message
    assert volume not in json.dumps(docker_api.volumes())


# What is kept


def test_what_is_kept_is_prepared_once_by_two_runs_at_once_and_then_mounted(ran, made, image, here):
    tool = made(("taskStarts", "echo tool > /tmp/tool"))
    name = made(
        params={
            "cache": True,
            "path": "/dataset/{{ v }}",
            "callbacks": [
                {
                    "event": "taskStarts",
                    "commands": ["sleep 2", "cat /tmp/tool /proc/sys/kernel/random/uuid > /dataset/{{ v }}/made"],
                }
            ],
        },
        template_variables=["v"],
        require=[tool],
    )
    script = "cat /dataset/*/made; { echo x > /dataset/x/made; } 2>/dev/null || echo closed"

    def wish(value):
        return [{"name": name, "template_variables": {"v": value}}]

    algorithm = Algorithm(docker_image=image, command=["sh", "-c", script], prerequisites=wish("x"))
    threads = [hold(ran, algorithm) for _ in range(2)]
    for thread, _ in threads:
        thread.join()
    (one,), (two,) = (left for _, left in threads)
    third = ran(algorithm)
    other = ran(Algorithm(docker_image=image, command=["sh", "-c", "cat /dataset/y/made"], prerequisites=wish("y")))

    assert [done.record["verdict"]["code"] for done in (one, two, third, other)] == ["ok"] * 4
    assert one.said[0] == two.said[0] == third.said[0] == other.said[0] == "tool"
    assert len({done.said[1] for done in (one, two, third)}) == 1
    assert other.said[1] != third.said[1]
    assert "closed" in third.log
    assert len([path for path in (here / "caches").iterdir() if path.is_dir()]) == 2


def test_what_could_not_be_prepared_fails_the_run_and_is_not_kept(ran, made, image, here):
    callbacks = [{"event": "taskStarts", "commands": ["echo half > /dataset/half", "exit 5"]}]
    name = made(params={"cache": True, "path": "/dataset", "callbacks": callbacks}, name="fetch")
    done = ran(Algorithm(docker_image=image, command=[*SAY, "0"], prerequisites=[name]))

    assert done.message == (
        "The algorithm algorithm did not start, because its prerequisite fetch failed: `exit 5` (taskStarts) ended with exit code 5."
    )
    assert [path for path in (here / "caches").iterdir() if path.is_dir()] == []


# From OpenPAI


def test_a_job_of_openpai_runs_once_it_is_imported(ran, image, tmp_path, monkeypatch):
    (tmp_path / "market").mkdir()
    specification = (
        "- name: dataset\n  plugin: cmd\n  template_variables:\n    - name: dataPath\n  plugin_params:\n    callbacks:\n"
        "      - event: taskStarts\n        commands:\n          - mkdir -p {{ dataPath }}\n          - echo data > {{ dataPath }}/file\n"
    )
    (tmp_path / "market" / "dataset.yaml").write_text(specification)
    monkeypatch.setenv("OASIS_FLOWS_MARKETPLACES", str(tmp_path / "market"))
    alias = {
        "name": "dataset",
        "require": [{"name": "marketplace://name/dataset", "template_variables": {"dataPath": "/tmp/d"}}],
    }
    job = {
        "name": f"job_{uuid.uuid4().hex[:8]}",
        "parameters": {"word": "hello"},
        "prerequisites": [{"name": "image", "type": "dockerimage", "uri": image.image_id}],
        "taskRoles": {
            "taskrole": {
                "instances": 1,
                "prerequisites": ["dataset"],
                "dockerImage": "image",
                "resourcePerInstance": {"cpu": 1, "memoryMB": 64, "gpu": 0},
                "commands": ["export WORD=<% $parameters.word %>", "cat /tmp/d/file; echo $WORD"],
            }
        },
        "extras": {"reference_prerequisites": [alias]},
    }
    made = openpai.documents_of(job, "job")
    (name,) = [key.partition("/")[2] for key in made.documents if key.startswith("algorithm/")]
    list(catalogue.write(made.documents, tmp_path / "blocks"))
    list(catalogue.apply(catalogue.read(tmp_path / "blocks")))
    done = ran(name)

    assert done.said == ["data", "hello"]
    assert done.record["prerequisites"]["items"][0]["source"] == f"{tmp_path}/market/dataset.yaml"
    assert len(done.record["prerequisites"]["items"][0]["sha256"]) == 64
