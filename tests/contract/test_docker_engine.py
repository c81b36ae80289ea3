"""What only a real container can show: the sandbox from inside, deaths of every kind, owners and engines that go away."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import docker
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from oasis_flows import doctor, lease, machine, settings as flow_settings
from oasis_flows.engines import docker_run, docker_spec, docker_usage
from oasis_flows.engines.docker import DockerEngine
from oasis_flows.errors import (
    ContainerLost,
    DescriptionError,
    EngineError,
    EngineUnavailable,
    ImageNotFound,
    NoGpu,
    UnsupportedByEngine,
)
from oasis_flows.job import ContainerExit, ContainerJob, ImageSource, Mount, Reason, Resources, Sandbox
from tests.contract.test_engine import Log
from tests.images import TinyImage, docker_archive
from tests.servers.engine import containers_of, eventually, private_engine

MIB = 1 << 20
Make = Callable[..., ContainerJob]


@pytest.fixture
def sh(docker_engine: DockerEngine, make_job: Make) -> Callable[..., tuple[ContainerExit, Log]]:
    """Run a shell script in a container."""

    def run(script: str, **changes: Any) -> tuple[ContainerExit, Log]:
        log = Log()
        return docker_engine.run(make_job("sh", "-c", script, **changes), log), log

    return run


Sh = Callable[..., tuple[ContainerExit, Log]]


class TestLog:
    def test_exact(self, sh: Sh) -> None:
        # 16 KiB is where engines split, and a two-byte letter lies across it; then NULs, no UTF-8, no last newline.
        script = (
            "head -c 16383 /dev/zero | tr '\\0' x; printf '\\303\\244\\n\\n\\n'; printf 'a\\0b\\377\\376\\n';"
            "head -c 5000000 /dev/zero | tr '\\0' y; printf '\\nend'; sleep 0.1; printf 'err\\0' >&2"
        )
        _, log = sh(script)
        expected = b"x" * 16383 + "ä\n\n\n".encode() + b"a\0b\xff\xfe\n" + b"y" * 5_000_000 + b"\nend"
        assert log.text("stdout") == expected
        assert log.text("stderr") == b"err\0"

    def test_20_mb(self, sh: Sh) -> None:
        began = time.monotonic()
        ended, log = sh("yes 0123456789abcdef | head -c 20000000")
        assert log.text("stdout") == (b"0123456789abcdef\n" * 1_200_000)[:20_000_000]
        assert ended.reason is Reason.OK
        assert time.monotonic() - began < 10


class TestSandbox:
    def test_from_inside(self, sh: Sh, tmp_path: Path) -> None:
        (tmp_path / "input").mkdir()
        script = """
            grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status
            touch /root-file 2>/dev/null && echo root writable
            touch input/x 2>/dev/null && echo input writable
            ls /sys/class/net; id -u; id -g; pwd
            printf '#!/bin/sh\\necho tmp runs\\n' > /tmp/x && chmod +x /tmp/x && /tmp/x
            stat -c %a /tmp; df -k /tmp | tail -1 | awk '{print $2}'; df -k /dev/shm | tail -1 | awk '{print $2}'
            mount -t tmpfs x /mnt 2>/dev/null && echo mounted
            cat /proc/1/comm
        """
        mounts = (Mount(source=tmp_path / "input", target="/work/input", read_only=True),)
        resources = Resources(memory_bytes=64 * MIB, tmp_bytes=8 * MIB, shm_bytes=16 * MIB, pids=50, cpus=0.5)
        ended, log = sh(script, mounts=mounts, resources=resources, user="1234:5678")
        lines = log.text("stdout").decode().split()
        nothing = "0" * 16
        status = ["CapBnd:", nothing, "NoNewPrivs:", "1", "Seccomp:", "2", "lo", "1234", "5678", "/work", "tmp", "runs", "1777"]
        assert lines == ["CapEff:", nothing, *status, "8192", "16384", "docker-init"]
        force = ended.in_force
        assert force["mounts"] == [{"source": str(tmp_path / "input"), "target": "/work/input", "read_only": True}]
        assert {k: force[k] for k in ("network", "read_only_root", "pids", "cpus", "user", "init")} == {
            "network": "none",
            "read_only_root": True,
            "pids": 50,
            "cpus": 0.5,
            "user": "1234:5678",
            "init": True,
        }
        assert force["memory_bytes"] == force["memory_and_swap_bytes"] == ended.memory_limit_bytes == 64 * MIB
        assert force["capabilities_dropped"] == ["ALL"]

    def test_loosened(self, sh: Sh) -> None:
        sandbox = Sandbox(network=True, writable_root=True, new_privileges=True, capabilities=("NET_RAW",))
        script = "grep -E '^(CapBnd|NoNewPrivs):' /proc/self/status; touch /x && echo written; ls /sys/class/net | wc -l"
        _, log = sh(script, sandbox=sandbox)
        bounding, privileges, *rest = log.text("stdout").decode().splitlines()
        assert int(bounding.split()[1], 16) == 1 << 13
        assert privileges.split() == ["NoNewPrivs:", "0"]
        assert rest[0] == "written"

    def test_pids_are_limited(self, sh: Sh) -> None:
        script = "i=0; while [ $i -lt 60 ]; do sleep 5 & i=$((i+1)); done"
        ended, log = sh(f"({script}); sleep 0.5; exit 1", resources=Resources(pids=20))
        assert b"fork" in log.text("stderr")
        assert ended.forks_refused > 0
        assert ended.reason is Reason.EXIT_NONZERO

    def test_environment_is_the_images_and_the_jobs(self, sh: Sh) -> None:
        given = {"A": "1", "SPACE": "a b", "QUOTES": "'\"$X`{}", "EMPTY": "", "FROM_IMAGE": "replaced", "UNICODE": "äß€"}
        _, log = sh("env -0", environment=given, secret_environment={"KEY": "s3cret"})
        seen = dict(item.split("=", 1) for item in log.text("stdout").decode().split("\0") if item)
        assert {k: v for k, v in seen.items() if k not in ("SHLVL", "PWD", "_")} == {
            **given,
            "KEY": "s3cret",
            "PATH": "/bin",
            "HOME": "/root",
            "HOSTNAME": seen["HOSTNAME"],
        }

    def test_a_path_with_colons_is_mounted(self, sh: Sh, tmp_path: Path) -> None:
        source = tmp_path / "a:b ä"
        source.mkdir()
        ended, _ = sh("echo x > output/y", mounts=(Mount(source=source, target="/work/output", read_only=False),))
        assert ended.reason is Reason.OK
        assert (source / "y").read_text() == "x\n"

    def test_secrets_are_in_no_label_and_no_message(self, docker_engine: DockerEngine, make_job: Make) -> None:
        job = make_job("true", secret_environment={"KEY": "s3cret"}, user="nosuchuser")
        with pytest.raises(DescriptionError) as caught:
            docker_engine.run(job, Log())
        assert "s3cret" not in str(caught.value) + repr(job) + repr(docker_spec.create_body(job, {}, {})["Labels"])


class TestDeaths:
    def test_out_of_memory(self, sh: Sh) -> None:
        ended, _ = sh("x=$(yes | head -c 60000000)", resources=Resources(memory_bytes=16 * MIB))
        assert (ended.reason, ended.exit_code) == (Reason.OUT_OF_MEMORY, 137)
        assert ended.memory_limit_bytes == 16 * MIB
        assert ended.memory_peak_bytes is not None
        assert ended.memory_peak_bytes >= 16 * MIB

    @pytest.mark.parametrize(("kills", "reason"), [((3, 4), Reason.OUT_OF_MEMORY), ((3, 3), Reason.KILLED)])
    def test_out_of_memory_that_only_the_kernel_tells(
        self, sh: Sh, monkeypatch: pytest.MonkeyPatch, kills: tuple[int, ...], reason: Reason
    ) -> None:
        counts = iter(kills)
        monkeypatch.setattr(docker_usage, "kills_for_memory", lambda: next(counts))
        monkeypatch.setattr(docker_usage, "find_cgroup", lambda *_: None)
        ended, _ = sh("kill -9 $$")
        assert (ended.reason, ended.exit_code) == (reason, 137)

    @pytest.mark.parametrize("code", [0, 3])
    def test_out_of_memory_in_a_child(self, sh: Sh, code: int) -> None:
        # The kernel may choose more than one process; these come before the shell that is to survive.
        # In a container's first moments containerd may not hear of it (see `UsageWatch.killed_unseen`).
        child = "sleep 0.3; (echo 1000 > /proc/self/oom_score_adj; x=$(yes | head -c 60000000))"
        ended, _ = sh(f"{child}; exit {code}", resources=Resources(memory_bytes=16 * MIB))
        assert (ended.reason, ended.exit_code) == (Reason.OUT_OF_MEMORY, code)

    def test_the_peak_is_the_kernels(self, sh: Sh) -> None:
        ended, _ = sh("x=$(yes | head -c 10000000); sleep 1", resources=Resources(memory_bytes=256 * MIB))
        assert ended.reason is Reason.OK
        assert ended.memory_peak_bytes is not None
        assert 8 * MIB < ended.memory_peak_bytes < 256 * MIB

    def test_sigterm_ignored(self, sh: Sh) -> None:
        began = time.monotonic()
        script = "trap '' TERM; echo begun; while :; do sleep 1; done"
        ended, log = sh(script, timeout_seconds=0.5, stop_grace_seconds=0.5)
        assert (ended.reason, ended.exit_code) == (Reason.TIMED_OUT, 137)
        assert log.text("stdout") == b"begun\n"
        assert time.monotonic() - began < 5

    def test_last_words_at_the_time_limit(self, sh: Sh) -> None:
        ended, log = sh("trap 'echo bye; exit 0' TERM; echo hi; while :; do sleep 0.1; done", timeout_seconds=0.5)
        assert (ended.reason, ended.exit_code) == (Reason.TIMED_OUT, 0)
        assert log.text("stdout") == b"hi\nbye\n"

    @pytest.mark.parametrize(
        ("command", "reason", "code"),
        [
            ("notacommand", Reason.COMMAND_NOT_FOUND, 127),
            ("/opt/noexec", Reason.NOT_EXECUTABLE, 126),
            ("/opt", Reason.NOT_EXECUTABLE, 126),
            ("/opt/elsewhere", Reason.EXEC_FORMAT, 127),
        ],
    )
    def test_a_command_that_cannot_start(
        self, docker_engine: DockerEngine, make_job: Make, command: str, reason: Reason, code: int
    ) -> None:
        log = Log()
        ended = docker_engine.run(make_job(command), log)
        assert (ended.reason, ended.exit_code) == (reason, code)
        assert ended.detail
        assert log.pieces

    def test_a_missing_command_inside_a_script_is_the_scripts_failure(self, sh: Sh) -> None:
        ended, log = sh("notacommand")
        assert (ended.reason, ended.exit_code) == (Reason.EXIT_NONZERO, 127)
        assert b"not found" in log.text("stderr")

    def test_a_signal_is_named(self, sh: Sh) -> None:
        ended, _ = sh("kill -SEGV $$")
        assert (ended.reason, ended.exit_code, ended.detail) == (Reason.EXIT_NONZERO, 139, "ended by SIGSEGV")

    def test_killed_from_outside(self, docker_engine: DockerEngine, make_job: Make, docker_api: Any) -> None:
        job = make_job("sleep", "20")
        killer = threading.Thread(target=lambda: (until_running(docker_api, job), docker_api.kill(name(job))))
        killer.start()
        assert docker_engine.run(job, Log()).reason is Reason.KILLED
        killer.join()

    def test_removed_from_outside(self, docker_engine: DockerEngine, make_job: Make, docker_api: Any) -> None:
        job = make_job("sleep", "20")
        remover = threading.Thread(
            target=lambda: (until_running(docker_api, job), docker_api.remove_container(name(job), force=True))
        )
        remover.start()
        # It is killed, and then removed: whoever looks in between sees how it ended.
        try:
            said: str = docker_engine.run(job, Log()).reason
        except ContainerLost as error:
            said = str(error)
        remover.join()
        assert said == Reason.KILLED or "vanished" in said


# Works for two seconds by the clock, whatever share of a processor it gets.
WORK = "i=0; end=$(($(date +%s) + 3)); while [ $(date +%s) -lt $end ]; do while [ $((i += 1)) -le 9999 ]; do :; done; i=0; done"
STEPS = "head -c 20000000 /dev/zero > /tmp/a; sleep 0.8; head -c 20000000 /dev/zero > /tmp/b; sleep 0.8; rm /tmp/a; sleep 0.8"


class TestUsage:
    def test_processors(self, sh: Sh) -> None:
        # The shell's own account of its time, in minutes and seconds: user and system, of itself and its children.
        ended, log = sh(f"{WORK}; times; sleep 0.5", resources=Resources(cpus=0.5))
        its_own = sum(int(m) * 60 + float(s) for m, s in re.findall(r"(\d+)m([\d.]+)s", log.text("stdout").decode()))
        assert ended.cpu_seconds == pytest.approx(its_own, rel=0.1, abs=0.1)
        assert ended.cpu_seconds / ended.usage[-1].seconds < 0.62
        times = [0.0, *(sample.seconds for sample in ended.usage)]
        drawn = sum(sample.cpus * (now - before) for sample, before, now in zip(ended.usage, times, times[1:], strict=False))
        assert drawn == pytest.approx(its_own, rel=0.15, abs=0.15)

    def test_memory(self, sh: Sh) -> None:
        ended, _ = sh(STEPS, resources=Resources(memory_bytes=256 * MIB))
        rounded = [round(sample.memory_bytes / 20e6) for sample in ended.usage]
        assert sorted(set(rounded)) in ([1, 2], [0, 1, 2])
        # The last may fall into the moment in which it ends.
        assert rounded[-1] < 2
        # Its end is told by the engine's clock, a sample by ours, which counts from when its start was heard of.
        assert abs(ended.seconds - ended.usage[-1].seconds) < 0.5

    def test_seen_by_the_engine_alone(self, make_job: Make, docker_api: Any, tmp_path: Path) -> None:
        # In another namespace of processes, as in a worker that runs in a container, no cgroup can be told to be the container's.
        job = make_job("sh", "-c", f"echo begun; {STEPS}; {STEPS}", own=False)
        command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", OWNER]
        done = subprocess.run([*command, *arguments(job, tmp_path / "log")], capture_output=True, check=True, timeout=30)
        ended = ContainerExit.from_json(json.loads(done.stdout))
        assert ended.reason is Reason.OK
        assert 3 <= len(ended.usage) <= ended.seconds + 1
        # The engine tells it once a second, which may be while the second file grows.
        assert max(sample.memory_bytes for sample in ended.usage) > 21e6
        assert ended.cpu_seconds is not None
        assert 0.01 < ended.cpu_seconds < 5
        assert not containers_of(docker_api, job.run_id)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"resources": Resources(cpus=10_000)}, UnsupportedByEngine),
            ({"user": "nosuchuser"}, DescriptionError),
            ({"sandbox": Sandbox(capabilities=("NOSUCH",))}, DescriptionError),
            ({"mounts": (Mount(source=Path("/nosuchfolder"), target="/x", read_only=True),)}, EngineError),
            ({"image": "sha256:" + "0" * 64}, ImageNotFound),
        ],
    )
    def test_refused(
        self, docker_engine: DockerEngine, make_job: Make, changes: dict[str, Any], error: type[Exception]
    ) -> None:
        log = Log()
        with pytest.raises(error) as caught:
            docker_engine.run(make_job("echo", "started", **changes), log)
        assert type(caught.value) is error
        assert not log.pieces

    @pytest.mark.parametrize(("gpus", "count"), [(2, 2), ("all", -1)])
    def test_gpus_are_asked_of_an_engine_that_has_none(
        self, docker_engine: DockerEngine, docker_api: Any, make_job: Make, gpus: int | Literal["all"], count: int
    ) -> None:
        job, log = make_job("echo", "started", resources=Resources(gpus=gpus)), Log()
        made = docker_run.create_container(docker_api, job, docker_api.info())
        assert isinstance(made, docker_run.Container)
        force: Any = made.in_force["gpus"]
        assert [(asked["Count"], asked["Capabilities"]) for asked in force] == [(count, [["gpu"]])]
        with pytest.raises(NoGpu, match=r"could not select device driver .* with capabilities: \[\[gpu\]\]"):
            docker_engine.run(job, log)
        assert not log.pieces
        assert containers_of(docker_api, job.run_id) == []

    def test_an_engine_that_cannot_limit(self, make_job: Make, tmp_path: Path) -> None:
        archive = docker_archive(tmp_path / "image.tar", TinyImage(tags=("t:1",)))
        with private_engine(without=("memory", "pids")) as private:
            private.load(archive)
            engine, log = DockerEngine(private.connect), Log()
            assert engine.describe().not_enforced == ("memory", "pids")
            with pytest.raises(UnsupportedByEngine, match=r"cannot limit memory and pids, .* cgroup_enable=memory"):
                engine.prepare(ImageSource(image_id="nobody.invalid/never/asked:1"))
            with pytest.raises(UnsupportedByEngine, match=r"cannot limit memory and pids, "):
                engine.run(make_job("echo", "started", image="t:1"), log)
            with machine.stand_in(engine):
                known, missing = itertools.islice(doctor.examine(flow_settings.current()), 2)
            assert (known.status, missing.check, missing.status) == ("ok", "engine", "missing")
            assert missing.found == "cannot limit memory and pids"
            with contextlib.closing(private.connect()) as client:
                assert not client.api.containers(all=True)
            assert not log.pieces
        assert Path("/sys/fs/cgroup/memory").is_mount()

    def test_no_engine(self, make_job: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
        with pytest.raises(EngineUnavailable, match=r"Start one"):
            DockerEngine().run(make_job("true"), Log())


class TestArguments:
    @settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40), min_size=20, max_size=60))
    def test_arrive_exactly(self, docker_engine: DockerEngine, make_job: Make, words: list[str]) -> None:
        words = ["{}", "a 'b\" $c", "line\nline", "", "-n", "\\", *words]
        log = Log()
        script = 'printf "%s\\0" "$@"'
        docker_engine.run(make_job(*words, entrypoint=("sh", "-c", script, "sh")), log)
        assert log.text("stdout") == b"".join(w.encode() + b"\0" for w in words)

    def test_image_commands_are_kept_or_replaced(
        self, docker_engine: DockerEngine, docker_api: Any, make_job: Make, tmp_path: Path
    ) -> None:
        image = TinyImage(config={"Env": ["PATH=/bin"], "Entrypoint": ["echo", "entry"], "Cmd": ["cmd"]})
        reference = docker_engine.prepare(ImageSource(image_file=str(docker_archive(tmp_path / "i.tar", image))))
        try:
            for command, entrypoint, said in (
                (None, None, b"entry cmd\n"),
                (("x",), None, b"entry x\n"),
                ((), None, b"entry\n"),
                (None, ("echo", "e"), b"e\n"),
            ):
                log = Log()
                docker_engine.run(make_job(image=reference, command=command, entrypoint=entrypoint), log)
                assert log.text("stdout") == said
        finally:
            docker_api.remove_image(reference, force=True)


def name(job: ContainerJob) -> str:
    return docker_spec.container_name(job)


def until_running(api: Any, job: ContainerJob) -> None:
    eventually(lambda: any(row["State"] == "running" for row in containers_of(api, job.run_id)))


OWNER = """
import json, signal, sys
from pathlib import Path
from oasis_flows import lease
from oasis_flows.engines.docker import DockerEngine
from oasis_flows.job import ContainerJob

class Terminated(BaseException):
    pass

def terminate(number, frame):
    raise Terminated

signal.signal(signal.SIGTERM, terminate)
run_id, image, path, script, out, grace = sys.argv[1:]
command = ("sh", "-c", script)
with lease.hold(Path(path)), open(out, "wb", buffering=0) as log:
    job = ContainerJob(run_id=run_id, image=image, lease=Path(path), command=command, stop_grace_seconds=float(grace))
    print(json.dumps(DockerEngine().run(job, lambda stream, data: log.write(data)).to_json()))
"""


def arguments(job: ContainerJob, out: Path) -> list[str]:
    """What `OWNER` wants to know."""
    assert job.command is not None
    return [job.run_id, job.image, str(job.lease), job.command[2], str(out), str(job.stop_grace_seconds)]


@contextlib.contextmanager
def owner(job: ContainerJob, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that runs the job; returns once its container has said something."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, *arguments(job, out)], start_new_session=True)
    try:
        eventually(lambda: out.exists() and out.stat().st_size)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


class TestOwners:
    def test_sigterm_leaves_nothing(self, make_job: Make, docker_api: Any, tmp_path: Path) -> None:
        job = make_job("sh", "-c", "trap 'echo bye; exit' TERM; echo hi; while :; do sleep 0.1; done", own=False)
        with owner(job, tmp_path / "log") as process:
            began = time.monotonic()
            process.terminate()
            process.wait(10)
            assert time.monotonic() - began < 5
        assert not containers_of(docker_api, job.run_id)
        assert (tmp_path / "log").read_bytes() == b"hi\nbye\n"

    def test_signals_during_the_cleanup_leave_nothing(self, make_job: Make, docker_api: Any, tmp_path: Path) -> None:
        script = "trap '' TERM; echo hi; while :; do sleep 1; done"
        job = make_job("sh", "-c", script, own=False, stop_grace_seconds=30)
        with owner(job, tmp_path / "log") as process:
            for _ in range(6):
                process.terminate()
                time.sleep(0.08)
            process.wait(10)
        assert not containers_of(docker_api, job.run_id)

    def test_after_sigkill_the_next_call_takes_it_up(
        self, docker_engine: DockerEngine, make_job: Make, docker_api: Any, tmp_path: Path
    ) -> None:
        script = "printf 'caf\\303'; sleep 0.1; printf '\\251\\377\\0\\n'; echo err >&2; sleep 2; printf end; exit 5"
        job = make_job("sh", "-c", script, own=False)
        with owner(job, tmp_path / "log") as process:
            process.kill()
            process.wait()
            (before,) = containers_of(docker_api, job.run_id)
            log, again = Log(), make_job("sh", "-c", script, run_id=job.run_id)
            assert docker_engine.find(again)
            ended = docker_engine.run(again, log)
        assert ended.in_force["container"] == before["Id"]
        assert (ended.reason, ended.exit_code) == (Reason.EXIT_NONZERO, 5)
        assert log.text("stdout") == b"caf\xc3\xa9\xff\0\nend"
        assert log.text("stderr") == b"err\n"

    def test_an_ended_container_still_tells(
        self, docker_engine: DockerEngine, make_job: Make, docker_api: Any, tmp_path: Path
    ) -> None:
        job = make_job("sh", "-c", "echo hi; sleep 0.5; exit 5", own=False)
        with owner(job, tmp_path / "log") as process:
            process.kill()
        eventually(lambda: containers_of(docker_api, job.run_id)[0]["State"] == "exited")
        log = Log()
        ended = docker_engine.run(make_job("sh", "-c", "echo hi; sleep 0.5; exit 5", run_id=job.run_id), log)
        assert (ended.exit_code, log.text("stdout")) == (5, b"hi\n")

    @pytest.mark.parametrize("ending", ["changed description", "killed meanwhile", "never started"])
    def test_what_cannot_be_taken_up_is_made_anew(
        self, docker_engine: DockerEngine, make_job: Make, docker_api: Any, ending: str
    ) -> None:
        job = make_job("sh", "-c", "echo new")
        old = make_job("sh", "-c", "sleep 60", run_id=job.run_id) if ending == "changed description" else job
        body = docker_spec.create_body(old, docker_api.info(), {})
        if ending == "killed meanwhile":
            body["Cmd"] = ["sleep", "60"]
        container = docker_api.create_container_from_config(body, name(job))["Id"]
        if ending != "never started":
            docker_api.start(container)
        if ending == "killed meanwhile":
            docker_api.kill(container)
        log = Log()
        assert not docker_engine.find(job)
        ended = docker_engine.run(job, log)
        assert ended.in_force["container"] != container
        assert log.text("stdout") == b"new\n"

    def test_reap(self, docker_engine: DockerEngine, make_job: Make, docker_api: Any, tmp_path: Path) -> None:
        dead, held = make_job("sleep", "60", own=False), make_job("sleep", "60")
        with lease.hold(dead.lease):
            pass
        for job in (dead, held):
            docker_api.start(docker_api.create_container_from_config(docker_spec.create_body(job, {}, {}), name(job)))
        assert not {dead.run_id, held.run_id} & set(docker_engine.reap(grace_seconds=60, below=tmp_path))
        reaped = docker_engine.reap(grace_seconds=0, below=tmp_path)
        assert dead.run_id in reaped
        assert held.run_id not in reaped
        assert containers_of(docker_api, held.run_id)
        assert docker_engine.reap(held.run_id) == (held.run_id,)
        assert not containers_of(docker_api, held.run_id)

    def test_reap_leaves_what_another_folder_s_run_left_for_as_long_as_that_run_said(
        self, docker_engine: DockerEngine, make_job: Make, docker_api: Any, tmp_path: Path
    ) -> None:
        waits = make_job("sleep", "60", own=False, retry_window_seconds=60)
        waited = make_job("sleep", "60", own=False, retry_window_seconds=0)
        for job in (waits, waited):
            with lease.hold(job.lease):
                pass
            docker_api.start(docker_api.create_container_from_config(docker_spec.create_body(job, {}, {}), name(job)))

        reaped = docker_engine.reap(grace_seconds=0, below=tmp_path / "other")

        assert (waits.run_id in reaped, waited.run_id in reaped) == (False, True)
        assert containers_of(docker_api, waits.run_id)
        assert docker_engine.reap(waits.run_id) == (waits.run_id,)

    @pytest.mark.parametrize("whose", ["ours", "another folder's", "another host's", "nobody said whose"])
    def test_reap_with_a_lease_that_is_gone(
        self, docker_engine: DockerEngine, make_job: Make, docker_api: Any, tmp_path: Path, whose: str
    ) -> None:
        job = make_job("sleep", "60", own=False, lease=tmp_path / "workspaces" / "run" / "lease")
        body = docker_spec.create_body(job, {}, {})
        if whose == "another host's":
            body["Labels"][docker_spec.HOST] = "elsewhere"
        if whose == "nobody said whose":
            del body["Labels"][docker_spec.HOST]
        docker_api.start(docker_api.create_container_from_config(body, name(job)))
        below = tmp_path / ("other" if whose == "another folder's" else "workspaces")

        assert job.run_id not in docker_engine.reap(grace_seconds=0)
        assert job.run_id not in docker_engine.reap(grace_seconds=60, below=below)
        assert (job.run_id in docker_engine.reap(grace_seconds=0, below=below)) is (whose == "ours")
        assert bool(containers_of(docker_api, job.run_id)) is (whose != "ours")
        docker_engine.reap(job.run_id)

    def test_reap_leaves_a_dead_run_of_another_host_alone(
        self, docker_engine: DockerEngine, make_job: Make, docker_api: Any
    ) -> None:
        job = make_job("sleep", "60", own=False)
        with lease.hold(job.lease):
            pass
        body = docker_spec.create_body(job, {}, {})
        body["Labels"][docker_spec.HOST] = "elsewhere"
        docker_api.start(docker_api.create_container_from_config(body, name(job)))

        assert job.run_id not in docker_engine.reap(grace_seconds=0)
        assert docker_engine.reap(job.run_id) == (job.run_id,)


class Cuttable:
    """A way to the engine that can be cut: a TCP port of loopback before its socket."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect("/var/run/docker.sock")
                self._pairs.append((near, far))
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Break every connection that is open now, at once and rudely."""
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    end.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def connect(self) -> Any:
        return docker.DockerClient(base_url=f"tcp://127.0.0.1:{self.port}", version="auto")


COUNT = "i=0; while [ $i -lt 60 ]; do echo line $i; echo err $i >&2; i=$((i+1)); sleep 0.05; done; printf end; exit 4"
COUNTED = b"".join(b"line %d\n" % i for i in range(60)) + b"end"
COUNTED_ERRORS = b"".join(b"err %d\n" % i for i in range(60))


class TestEngineGoesAway:
    def test_a_cut_connection_loses_and_repeats_nothing(self, make_job: Make) -> None:
        way, log = Cuttable(), Log()

        def cut() -> None:
            eventually(lambda: log.pieces, 30)
            for _ in range(3):
                time.sleep(0.6)
                way.cut()

        cutter = threading.Thread(target=cut)
        cutter.start()
        ended = DockerEngine(way.connect).run(make_job("sh", "-c", COUNT), log)
        cutter.join()
        assert (ended.reason, ended.exit_code, ended.log_lost) == (Reason.EXIT_NONZERO, 4, "")
        assert log.text("stdout") == COUNTED
        assert log.text("stderr") == COUNTED_ERRORS

    def test_an_end_that_a_busy_engine_sees_late_is_one(self, make_job: Make, tmp_path: Path) -> None:
        with private_engine() as private:
            private.load(docker_archive(tmp_path / "image.tar", TinyImage(tags=("t:1",))))
            assert private.process
            number, log = private.process.pid, Log()

            def pause() -> None:
                eventually(lambda: log.pieces, 30)
                os.kill(number, signal.SIGSTOP)
                try:
                    time.sleep(7)
                finally:
                    os.kill(number, signal.SIGCONT)

            pausing = threading.Thread(target=pause)
            pausing.start()
            job = make_job("sh", "-c", "echo began; sleep 2; exit 4", image="t:1")
            ended = DockerEngine(private.connect).run(job, log)
            pausing.join()
            assert (ended.reason, ended.exit_code) == (Reason.EXIT_NONZERO, 4)

    def test_engine_killed_and_started_again(self, make_job: Make, tmp_path: Path) -> None:
        with private_engine("--live-restore") as private:
            private.load(docker_archive(tmp_path / "image.tar", TinyImage(tags=("t:1",))))
            log = Log()
            restart = threading.Timer(1.2, lambda: (private.end(signal.SIGKILL), private.start()))
            restart.start()
            ended = DockerEngine(private.connect, patience_seconds=60).run(make_job("sh", "-c", COUNT, image="t:1"), log)
            restart.join()
            assert ended.exit_code == 4
            assert log.text("stdout") == COUNTED
            with contextlib.closing(private.connect()) as client:
                assert not client.api.containers(all=True)

    @pytest.mark.parametrize(("watched", "activated"), [(True, False), (True, True), (False, False)])
    def test_a_log_that_an_engine_may_have_lost_is_said_to_be_so(
        self, make_job: Make, tmp_path: Path, watched: bool, activated: bool
    ) -> None:
        """What an engine has read and not yet written down when it is killed is lost. The one that is started again stops what it finds; who
        does not mind SIGTERM may come to a good end before its grace is over.
        """
        with private_engine(activated=activated) as private:
            private.load(docker_archive(tmp_path / "image.tar", TinyImage(tags=("t:1",))))
            engine, log = DockerEngine(private.connect, patience_seconds=60), Log()
            job = make_job(
                "sh", "-c", "trap '' TERM; i=0; while [ $i -lt 50 ]; do echo line $i; i=$((i+1)); sleep 0.1; done", image="t:1"
            )
            if not watched:
                with contextlib.closing(private.connect()) as client:
                    body = docker_spec.create_body(job, client.api.info(), client.api.inspect_image("t:1"))
                    client.api.start(client.api.create_container_from_config(body, docker_spec.container_name(job))["Id"])
            restart = threading.Timer(1.2, lambda: (private.end(signal.SIGKILL), time.sleep(1), private.start()))
            restart.start()
            if not watched:
                restart.join()
            ended = engine.run(job, log)
            restart.join()
            assert ended.reason is Reason.OK
            assert log.text("stdout").endswith(b"line 49\n")
            assert "the engine may have been started anew" in ended.log_lost

    @pytest.mark.parametrize("activated", [False, True])
    @pytest.mark.parametrize("code", [0, 1])
    def test_an_end_that_the_engines_own_end_brought_is_no_verdict(
        self, make_job: Make, tmp_path: Path, code: int, activated: bool
    ) -> None:
        """Whether somebody watched it or not: a program may end well on the SIGTERM that a stopping engine sends to all."""
        with private_engine(activated=activated) as private:
            private.load(docker_archive(tmp_path / "image.tar", TinyImage(tags=("t:1",))))
            engine = DockerEngine(private.connect, patience_seconds=60)
            job = make_job("sh", "-c", f"trap 'exit {code}' TERM; while :; do sleep 0.1; done", image="t:1")
            restart = threading.Timer(1.5, lambda: (private.end(), private.start()))
            restart.start()
            with pytest.raises((EngineUnavailable, ContainerLost)):
                engine.run(job, Log())
            restart.join()

            with contextlib.closing(private.connect()) as client:
                body = docker_spec.create_body(job, client.api.info(), client.api.inspect_image("t:1"))
                made = client.api.create_container_from_config(body, "unattended")
                client.api.start(made["Id"])
                time.sleep(1)
            private.end()
            private.start()
            assert not engine.find(job)

    def test_engine_stopped(self, make_job: Make, tmp_path: Path) -> None:
        with private_engine() as private:
            private.load(docker_archive(tmp_path / "image.tar", TinyImage(tags=("t:1",))))
            stop = threading.Timer(1.0, private.end)
            stop.start()
            script = "trap 'exit 0' TERM; while :; do sleep 0.1; done"
            with pytest.raises((EngineUnavailable, ContainerLost)) as caught:
                DockerEngine(private.connect, patience_seconds=2).run(make_job("sh", "-c", script, image="t:1"), Log())
            stop.join()
            assert caught.value.transient


class TestParts:
    def test_the_parts_of_a_run_are_counted_apart_and_ended_together_politely(
        self, docker_engine: DockerEngine, docker_api: Any, make_job: Make
    ) -> None:
        whole, script = make_job("true").run_id, "trap 'echo ended; exit 0' TERM; echo began; while :; do sleep 0.1; done"
        limits = Resources(cpus=0.25, memory_bytes=32 * MIB)
        parts = [make_job("sh", "-c", script, run_id=f"{whole}.{name}", resources=limits) for name in ("0", "1.0")]
        logs = [Log() for _ in parts]

        def run(job: ContainerJob, log: Log) -> None:
            # It may be removed before its end could be asked for.
            with contextlib.suppress(ContainerLost):
                docker_engine.run(job, log)

        threads = [threading.Thread(target=run, args=(job, log)) for job, log in zip(parts, logs, strict=True)]
        for thread in threads:
            thread.start()
        eventually(lambda: all(log.text("stdout") == b"began\n" for log in logs), 60)

        ids = {row["Id"] for job in parts for row in containers_of(docker_api, job.run_id)}
        assert ids <= {found["Id"] for found in docker_run.inspect_running(docker_api, ())}
        assert not ids & {found["Id"] for found in docker_run.inspect_running(docker_api, [whole])}
        (machine,) = docker_engine.nodes()
        assert machine.requested.millicpus >= 500
        assert machine.allocatable.memory_bytes == docker_api.info()["MemTotal"]
        docker_engine.reap(whole, stop_seconds=20)
        for thread in threads:
            thread.join(30)
        assert [log.text("stdout") for log in logs] == [b"began\nended\n"] * 2
        assert not any(containers_of(docker_api, job.run_id) for job in parts)
