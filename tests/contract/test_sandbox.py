"""What a hostile algorithm gets, from inside a real container that is closed as by default, as root and as a user.

Its tools are busybox's and one that traces. What they cannot do is not tried: bpf, keyctl, io_uring and faults of the kernel
itself. The engine's seccomp profile and the want of every capability stand before those; `test_nothing_is_held_back` sees both
in force.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import socketserver
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from oasis_flows import lease, store
from oasis_flows.blocks import Algorithm
from oasis_flows.engines import Engine, docker_spec, kube_run, pod
from oasis_flows.engines.docker import DockerEngine
from oasis_flows.engines.kubernetes import KubernetesEngine
from oasis_flows.engines.quota import count
from oasis_flows.errors import UnsafeName
from oasis_flows.job import ContainerExit, ContainerJob, ImageSource, Mount, Reason, Resources, Sandbox
from oasis_flows.store import Location
from oasis_flows.workspace import Workspace, open_workspace
from tests.contract.test_engine import Log
from tests.images import BUSYBOX, TinyImage, busybox_layer, docker_archive, layer
from tests.servers import cluster as clusters
from tests.servers.engine import eventually

MIB = 1 << 20
SMALL = Resources(memory_bytes=64 * MIB, pids=64, cpus=0.5, output_bytes=8 * MIB, output_files=2000, log_bytes=8 * MIB)

# Runs each attempt in a shell of its own. One that succeeds says IN.
PROBE = 'while [ $# -gt 0 ]; do echo "== $1"; sh -c "$2" 2>&1; shift 2; done'

NO_NETWORK = r"Network is unreachable"
REFUSED = r"Operation not permitted|permission denied|Permission denied"
READ_ONLY = r"Read-only file system|Permission denied"
NOT_THERE = r"No such file|nonexistent"

# busybox says "must be suid" unless it is root in effect, and asks for a password if it became so by the bit.
SETUID = "/work/input/busybox su nobody -c id"

HOSTS = "names of hosts"

# Name, script, and the words that show that it was tried and refused.
ATTEMPTS = [
    ("connect to the machine", "for a in $ADDRESSES; do nc -w 2 $a $PORT </dev/null && echo IN; done", NO_NETWORK),
    ("connect to the internet", "nc -w 2 192.0.2.1 443 </dev/null && echo IN", NO_NETWORK),
    ("cloud metadata", "nc -w 2 169.254.169.254 80 </dev/null && echo IN", NO_NETWORK),
    ("resolve a name", "nslookup example.org && echo IN", NO_NETWORK),
    ("resolve a name elsewhere", "nslookup example.org 192.0.2.53 && echo IN", NO_NETWORK),
    ("raw socket", "ping -c 1 -W 1 127.0.0.1 && echo IN", REFUSED),
    ("packet socket", "arping -c 1 -w 1 -I lo 127.0.0.1 && echo IN", REFUSED),
    ("route", "route add default gw 172.17.0.1 && echo IN", REFUSED),
    ("address", "ip addr add 172.17.0.99/16 dev lo && echo IN", REFUSED),
    ("interface", "ip link add probe type dummy && echo IN", REFUSED),
    ("tunnel", "tunctl -t probe && echo IN", NOT_THERE),
    ("mount", "mkdir /tmp/m; mount -t tmpfs x /tmp/m && echo IN", REFUSED),
    ("mount proc", "mkdir -p /tmp/m; mount -t proc x /tmp/m && echo IN", REFUSED),
    ("mount a disk", "mkdir -p /tmp/m; mount -t ext4 /dev/sda /tmp/m && echo IN; mount /dev/vda /tmp/m && echo IN", REFUSED),
    ("mount cgroups", "mkdir -p /tmp/m; mount -t cgroup -o memory x /tmp/m && echo IN", REFUSED),
    ("remount the root", "mount -o remount,rw / && echo IN", REFUSED),
    ("remount the input", "mount -o remount,rw,bind input && echo IN", REFUSED),
    ("unmount the input", "umount -l input && echo IN", REFUSED),
    ("unmount a mask", "umount -l /proc/keys && echo IN", REFUSED),
    ("pivot", "pivot_root / /tmp && echo IN", REFUSED),
    ("chroot", "chroot / true && echo IN", REFUSED),
    ("block device", "mknod /tmp/disk b 8 0 && echo IN; mknod output/disk b 8 0 && echo IN", REFUSED),
    ("character device", "mknod /tmp/mem c 1 1 && echo IN; mknod output/mem c 1 1 && echo IN", REFUSED),
    ("memory of the machine", "head -c 1 /dev/mem && echo IN; head -c 1 /dev/kmem && echo IN; [ -s /proc/kcore ] && echo IN", NOT_THERE),
    ("disks of the machine", "for d in sda vda nvme0n1 kmsg fuse kvm net/tun; do head -c 1 /dev/$d && echo IN; done", NOT_THERE),
    ("kernel module", "echo x > /tmp/x.ko; insmod /tmp/x.ko && echo IN", REFUSED),
    ("kernel setting", "cd /proc/sys/kernel; cat printk_ratelimit > printk_ratelimit && echo IN", READ_ONLY),
    ("core pattern", "cat /proc/sys/kernel/core_pattern > /proc/sys/kernel/core_pattern && echo IN", READ_ONLY),
    ("magic key", "echo h > /proc/sysrq-trigger && echo IN", f"{READ_ONLY}|{NOT_THERE}"),
    ("sysfs", "echo 65536 > /sys/class/net/lo/mtu && echo IN; echo 0 > /sys/kernel/profiling && echo IN", READ_ONLY),
    ("own limits", "cd /sys/fs/cgroup; for f in memory/memory.limit_in_bytes memory.max; do echo 999999999 > $f && echo IN; done", READ_ONLY),
    ("own cgroup", "mkdir /sys/fs/cgroup/memory/x && echo IN; mkdir /sys/fs/cgroup/x && echo IN", READ_ONLY),
    # date ends with 0 in any case; the time is the present one, should it be let.
    ("clock", "date -s @$(date +%s) 2>&1 | grep . ", r"can't set date: Operation not permitted"),
    ("host name", "hostname probe && echo IN", REFUSED),
    ("kernel log", "dmesg && echo IN", REFUSED),
    ("kernel log's size", "dmesg -n 7 && echo IN", REFUSED),
    ("priority", "renice -n -5 -p $$ && echo IN", REFUSED),
    ("real-time disk priority", "ionice -c 1 true && echo IN", REFUSED),
    ("spared by the kernel", "echo -1000 > /proc/self/oom_score_adj && echo IN", REFUSED),
    ("more open files", "ulimit -n 99999999 && echo IN", REFUSED),
    ("user namespace", "unshare -U true && echo IN", REFUSED),
    ("root in a user namespace", "unshare -Ur true && echo IN", REFUSED),
    ("other namespaces", "for n in m u i n p; do unshare -$n true && echo IN; done", REFUSED),
    ("namespaces of the first process", "for n in m u i n p; do nsenter -t 1 -$n true && echo IN; done", REFUSED),
    ("become somebody else", "su nobody -c id && echo IN", r"can't set groups|must be suid"),
    ("a setuid file of root", f"{SETUID} && echo IN", r"can't set groups|must be suid"),
    ("give a file away", "touch /tmp/own; chown 7:7 /tmp/own && echo IN", REFUSED),
    ("restart the machine", "reboot -f -n && echo IN; poweroff -f -n && echo IN", REFUSED),
    ("processes of the machine", "kill -0 $HOST_PID && echo IN; cat /proc/$HOST_PID/environ && echo IN", NOT_THERE),
    ("trace a process of the machine", "input/trace; echo errno $?", r"errno 3\b"),
    ("the first process's memory", "dd if=/proc/1/mem bs=1 count=1 && echo IN", r"Input/output error|Permission denied"),
    ("other runs", "ls /var/lib/docker && echo IN; ls /host && echo IN; ls $ELSEWHERE && echo IN; ls /var/lib/docker/volumes/$OTHER_RUN && echo IN", NOT_THERE),
    ("the machine's shadow", "cat /etc/shadow && echo IN; cat input/../../../../etc/shadow && echo IN", NOT_THERE),
    ("a link in the input", "cat input/link && echo IN; ls input/folder/ && echo IN; cat input/up && echo IN", NOT_THERE),
    ("write to the input", "touch input/x && echo IN; rm input/file && echo IN; echo x >> input/file && echo IN", READ_ONLY),
    ("open the input", "chmod 777 input && echo IN; mv input /tmp && echo IN", READ_ONLY),
    ("hard links into the output", "ln input/file output/h && echo IN; ln /etc/passwd output/h && echo IN", r"cross-device"),
    ("write to the image", "for d in / /bin /etc /work /sys; do touch $d/probe && echo IN; done", READ_ONLY),
    ("name servers", "echo x >> /etc/resolv.conf && echo IN", READ_ONLY),
    (HOSTS, "echo x >> /etc/hosts && echo IN", READ_ONLY),
    ("kernel tracing", "cat /sys/kernel/debug/tracing/trace && echo IN; cat /sys/kernel/tracing/trace && echo IN", NOT_THERE),
]  # fmt: skip


@dataclass(frozen=True)
class Probed:
    """What each script said, and what the container was told of the machine outside."""

    said: dict[str, str]
    nonce: str
    user: str
    engine: str


LOOKS = {
    "status": "grep -E '^(Cap...|NoNewPrivs|Seccomp):' /proc/self/status",
    "interfaces": "ls /sys/class/net",
    "mounts": "cut -d' ' -f5 /proc/self/mountinfo",
    "processes": "cat /proc/[0-9]*/comm",
    "environments": "cat /proc/[0-9]*/environ | tr '\\0' '\\n'",
    "sockets": "find / -type s 2>/dev/null; true",
    "found": 'find / -name "*$NAMED*" 2>/dev/null; true',
    "devices": "find /dev -type b -o -type c | sort",
    "masked": "cat /proc/keys /proc/timer_list | wc -c; ls -A /sys/firmware /proc/acpi /proc/scsi 2>/dev/null | grep -v :",
}


@pytest.fixture(scope="module")
def listener() -> Iterator[tuple[str, str]]:
    """A port that the machine listens on at all its addresses; the addresses in one string, and the port."""
    told = subprocess.run(["ip", "-4", "-o", "addr"], check=True, capture_output=True, text=True).stdout
    addresses = " ".join(found for found in re.findall(r"inet ([\d.]+)", told) if not found.startswith("127."))
    with socketserver.ThreadingTCPServer(("0.0.0.0", 0), socketserver.BaseRequestHandler) as server:  # noqa: S104
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield addresses, str(server.server_address[1])
        server.shutdown()


def tracer(path: Path, pid: int) -> None:
    """A program that attaches itself to a process as a debugger does, and ends with the errno."""
    # ptrace(PTRACE_ATTACH, pid, 0, 0), exit(-rax), in x86-64's machine code.
    code = bytes.fromhex("bf10000000be") + struct.pack("<i", pid) + bytes.fromhex("31d24d31d2b8650000000f05")
    code += bytes.fromhex("f7d889c7b83c0000000f05")
    base, size = 0x400000, 64 + 56 + len(code)
    kind = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, base + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    path.write_bytes(kind + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096) + code)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def other_run(docker_api: Any, busybox: str) -> Iterator[str]:
    """A container with a volume, in which lies a file with a name to look for; that name."""
    name = f"secret-volume-{uuid.uuid4().hex}"
    volume = docker_api.create_volume(name)["Name"]
    config = docker_api.create_host_config(binds=[f"{volume}:/data"], network_mode="none")
    script = f"echo {name} > /data/{name}; sleep 300"
    container = docker_api.create_container(busybox, ["sh", "-c", script], host_config=config, volumes=["/data"], name=name)
    docker_api.start(container)
    yield name
    docker_api.remove_container(container, force=True)
    docker_api.remove_volume(volume)


def setuid_busybox(folder: Path) -> None:
    """A program of root's in the folder that makes its caller root, where that is let."""
    shutil.copy(BUSYBOX, folder / "busybox")
    (folder / "busybox").chmod(0o6755)


USERS = ("0:0", "1234:5678")


@pytest.fixture(
    scope="module",
    params=[(engine, user) for engine in ("docker", *clusters.HERE) for user in USERS],
    ids=" ".join,
)
def probed(
    request: pytest.FixtureRequest,
    docker_engine: DockerEngine,
    busybox: str,
    listener: tuple[str, str],
    other_run: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Probed:
    """Everything tried once, in one container."""
    kind, user = request.param
    engine: Engine = docker_engine
    if kind == "kubernetes":
        cluster = request.getfixturevalue("cluster")
        engine, busybox = cluster.engine, cluster.image
    folder, nonce, log = tmp_path_factory.mktemp("probe"), uuid.uuid4().hex, Log()
    elsewhere = folder / f"secret-{nonce}"
    elsewhere.write_text(nonce)
    (folder / "output").mkdir()
    (folder / "output").chmod(0o777)
    (folder / "input").mkdir()
    (folder / "input" / "file").write_text("input")
    setuid_busybox(folder / "input")
    (folder / "input" / "link").symlink_to(elsewhere)
    (folder / "input" / "folder").symlink_to(folder)
    (folder / "input" / "up").symlink_to(f"../secret-{nonce}")
    words = [word for name, script, _ in ATTEMPTS for word in (name, script)]
    words += [word for name, script in LOOKS.items() for word in (f"look: {name}", script)]
    with (
        subprocess.Popen(["sleep", "60"], env={**os.environ, "SECRET_OF_THE_MACHINE": nonce}) as neighbour,
        lease.hold(folder / "lease"),
    ):
        tracer(folder / "input" / "trace", neighbour.pid)
        job = ContainerJob(
            run_id=f"test-{nonce}",
            image=busybox,
            lease=folder / "lease",
            entrypoint=("sh", "-c", PROBE, "sh"),
            command=tuple(words),
            environment={
                "ADDRESSES": listener[0],
                "PORT": listener[1],
                "HOST_PID": str(neighbour.pid),
                "ELSEWHERE": str(folder),
                "NAMED": "secret-",
                "OTHER_RUN": other_run,
            },
            mounts=(
                Mount(source=folder / "input", target="/work/input", read_only=True),
                Mount(source=folder / "output", target="/work/output", read_only=False),
            ),
            user=user,
            resources=SMALL,
            timeout_seconds=100,
        )
        ended = engine.run(job, log)
        neighbour.kill()
    assert ended.reason is Reason.OK
    _, *parts = re.split(r"^== (.*)\n", log.text("stdout").decode(errors="replace"), flags=re.MULTILINE)
    return Probed(dict(zip(parts[::2], parts[1::2], strict=True)), nonce, user, kind)


class TestNowhere:
    @pytest.mark.parametrize(("name", "words"), [(a[0], a[2]) for a in ATTEMPTS if a[2] != NO_NETWORK])
    def test_refused(self, probed: Probed, name: str, words: str) -> None:
        said = probed.said[name]
        if (probed.engine, probed.user, name) == ("kubernetes", "0:0", HOSTS):
            # Kubelet's file, in a folder of the pod, which root may write; it counts as the pod's storage.
            assert said == "IN\n"
            return
        assert re.search(words, said), said
        assert "IN" not in said.splitlines(), said

    @pytest.mark.parametrize("probed", [("docker", user) for user in USERS], indirect=True, ids=" ".join)
    @pytest.mark.parametrize(("name", "words"), [(a[0], a[2]) for a in ATTEMPTS if a[2] == NO_NETWORK])
    def test_no_network(self, probed: Probed, name: str, words: str) -> None:
        """Whether a cluster's network plugin acts on policies is no matter of the engine's."""
        said = probed.said[name]
        assert re.search(words, said), said
        assert "IN" not in said.splitlines(), said

    def test_with_a_network_the_machine_can_be_reached(
        self, docker_engine: DockerEngine, make_job: Callable[..., ContainerJob], listener: tuple[str, str]
    ) -> None:
        """So that "connect to the machine" is refused by the sandbox, and not because nobody listens."""
        script = ATTEMPTS[0][1]
        log = Log()
        given = {"ADDRESSES": listener[0], "PORT": listener[1]}
        docker_engine.run(make_job("sh", "-c", script, environment=given, sandbox=Sandbox(network=True)), log)
        assert b"IN\n" in log.text("stdout")

    def test_nothing_is_held_back(self, probed: Probed, docker_engine: DockerEngine) -> None:
        assert docker_engine.describe().system_calls_filtered
        nothing = "0" * 16
        sets = [word for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb") for word in (f"{name}:", nothing)]
        assert probed.said["look: status"].split() == [*sets, "NoNewPrivs:", "1", "Seccomp:", "2"]

    @pytest.mark.parametrize("probed", [("docker", user) for user in USERS], indirect=True, ids=" ".join)
    def test_there_is_only_the_loopback(self, probed: Probed) -> None:
        assert probed.said["look: interfaces"].split() == ["lo"]

    @pytest.mark.parametrize(("opened", "said"), [(False, b"must be suid"), (True, b"incorrect password")])
    def test_setuid_works_only_where_a_document_opens_it(
        self, docker_engine: DockerEngine, make_job: Callable[..., ContainerJob], tmp_path: Path, opened: bool, said: bytes
    ) -> None:
        (tmp_path / "input").mkdir()
        setuid_busybox(tmp_path / "input")
        log, mounts = Log(), (Mount(source=tmp_path / "input", target="/work/input", read_only=True),)
        sandbox = Sandbox(new_privileges=opened)
        docker_engine.run(make_job("sh", "-c", SETUID, mounts=mounts, user="1234:5678", sandbox=sandbox), log)
        assert said in log.text("stderr")

    def test_of_the_machine_nothing_is_mounted_but_its_two_folders(self, probed: Probed) -> None:
        mounted = {path for path in probed.said["look: mounts"].split() if not path.startswith(("/proc", "/sys", "/dev"))}
        engines = {"/etc/resolv.conf", "/etc/hostname", "/etc/hosts", "/sbin/docker-init", "/dev/init", pod.PROOF}
        assert mounted - engines == {"/", "/tmp", "/work/input", "/work/output"}

    def test_it_sees_its_own_processes_only(self, probed: Probed) -> None:
        assert set(probed.said["look: processes"].split()) <= {"docker-init", "pause", "sh", "cat"}
        assert "HOST_PID=" in probed.said["look: environments"]
        assert f"={probed.nonce}" not in probed.said["look: environments"]

    def test_no_file_of_the_machine_is_found_and_no_socket(self, probed: Probed) -> None:
        assert probed.said["look: sockets"] == ""
        assert probed.said["look: found"] == ""
        given = re.compile(f"(secret|test)-{probed.nonce}")
        assert not [name for name, said in probed.said.items() if probed.nonce in given.sub("", said)]

    def test_its_devices_are_harmless(self, probed: Probed) -> None:
        found = {path.removeprefix("/dev/") for path in probed.said["look: devices"].split()}
        assert found <= {"full", "null", "random", "tty", "urandom", "zero", "ptmx", "pts/ptmx", "console"}

    def test_what_the_kernel_tells_of_itself_is_masked(self, probed: Probed) -> None:
        assert probed.said["look: masked"].split() == ["0"]


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    """A disk of its own at a new folder, so that whatever goes wrong fills no other."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{options},mode=1777", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB and 20 000 files."""
    with mounted(tmp_path / "disk", "size=32m,nr_inodes=20000") as path:
        yield path


@dataclass(frozen=True)
class Under:
    """An engine under test: an image that it has, and how much longer than the machine's own it may take to run one, in seconds."""

    name: str
    engine: Engine
    image: str
    patience: float
    cluster: clusters.TestCluster | None = None

    @property
    def of_memory(self) -> tuple[Reason, ...]:
        """What a death by memory is called. A node that is busy learns of the exit first, one time in twenty or so."""
        return (Reason.OUT_OF_MEMORY, Reason.KILLED) if self.cluster else (Reason.OUT_OF_MEMORY,)

    def forget(self, docker_api: Any, image: str) -> None:
        """Remove an image that a test made, where it stays."""
        if self.cluster is None:
            docker_api.remove_image(image, force=True)


@pytest.fixture(params=["docker", *clusters.HERE])
def under(request: pytest.FixtureRequest, docker_engine: DockerEngine, busybox: str, tmp_path: Path) -> Iterator[Under]:
    """The machine's engine, and a cluster where there is one; also one that files are carried to, where a test asks for it."""
    if request.param == "docker":
        yield Under("docker", docker_engine, busybox, 0.0)
        return
    cluster: clusters.TestCluster = request.getfixturevalue("cluster")
    engine = clusters.carrying(cluster, tmp_path) if request.param == "carried" else cluster.engine
    yield Under(request.param, engine, cluster.image, 30.0, cluster)
    eventually(lambda: cluster.left() == [], 60)


@pytest.fixture
def hostile(under: Under, make_job: Callable[..., ContainerJob], disk: Path) -> Callable[..., tuple[ContainerExit, Log, float]]:
    """Runs a script whose output is on the small disk; also says how many seconds it took, beyond what its engine may take longer."""

    def run(script: str, **changes: Any) -> tuple[ContainerExit, Log, float]:
        log, began = Log(), time.monotonic()
        mounts = (Mount(source=disk, target="/work/output", read_only=False),)
        given = {"image": under.image, "mounts": mounts, "resources": SMALL, "timeout_seconds": 30, "user": "1234:5678"}
        ended = under.engine.run(make_job("sh", "-c", script, **{**given, **changes}), log)
        return ended, log, time.monotonic() - began - under.patience

    return run


def most_processes(cluster: clusters.TestCluster) -> int:
    """How many processes the cluster's nodes let a pod have, at most; -1: any number."""
    names = [node["metadata"]["name"] for node in cluster.api.call("GET", "/api/v1/nodes")["items"]]
    told = [cluster.api.call("GET", f"/api/v1/nodes/{name}/proxy/configz")["kubeletconfig"] for name in names]
    return max((int(each["podPidsLimit"]) for each in told), key=lambda most: (most < 0, most))


Hostile = Callable[..., tuple[ContainerExit, Log, float]]

AS_MUCH_AS_IT_LIKES = Resources(memory_bytes=64 * MIB, pids=64, cpus=0.5)


class TestBombs:
    def test_fork_bomb(self, under: Under, hostile: Hostile) -> None:
        if under.cluster:
            assert 0 < most_processes(under.cluster) <= 1024, "set podPidsLimit in the configuration of the node's kubelet"
        script = "bomb() { bomb | bomb & }; bomb; sleep 1; ls /proc | grep -c '^[0-9]'; echo survived"
        ended, log, _ = hostile(script, timeout_seconds=5)
        # Where a pod may have a thousand processes, these may need more memory than it has, before they are too many.
        if not under.cluster or ended.reason is not Reason.OUT_OF_MEMORY:
            assert ended.reason in (Reason.EXIT_NONZERO, Reason.TIMED_OUT, Reason.OK)
            assert b"fork" in b"".join(data for _, data in log.pieces)
        assert ended.in_force["pids"] == (None if under.cluster else 64)

    @pytest.mark.parametrize("where", ["its memory", "/tmp", "/dev/shm"])
    def test_memory_bomb(self, under: Under, hostile: Hostile, where: str) -> None:
        script = "tail /dev/zero" if where == "its memory" else f"cat /dev/zero > {where}/x"
        changes: dict[str, Any] = {"resources": Resources(memory_bytes=64 * MIB, pids=64, shm_bytes=256 * MIB)}
        ended, _, _ = hostile(script, **changes)
        assert ended.reason in under.of_memory

    @pytest.mark.parametrize(
        "script",
        [
            "while :; do head -c 100000 /dev/zero >> output/x; done",
            "cat /dev/zero > output/x; sleep 20",
            "cat /dev/zero > output/x",
            "mkdir -p output/a/b/c; cd output/a/b/c; i=0; while :; do head -c 100000 /dev/zero > $i; i=$((i+1)); done",
            "truncate -s 1099511627776 output/hole; sleep 20",
            "truncate -s 1099511627776 output/hole",
            "truncate -s 4M output/a; truncate -s 5M output/b; ln -s a output/c; exit 3",
        ],
    )
    def test_disk_bomb(self, hostile: Hostile, script: str) -> None:
        ended, _, seconds = hostile(script)
        assert (ended.reason, ended.limit_passed) == (Reason.OUTPUT_TOO_LARGE, 8 * MIB)
        assert seconds < 10

    @pytest.mark.parametrize(
        "script",
        [
            "cat /dev/zero > output/x; sleep 20",
            # A file without a name is in no folder.
            "exec 3> output/x; rm output/x; cat /dev/zero >&3; sleep 20",
        ],
    )
    def test_a_full_disk(self, hostile: Hostile, script: str) -> None:
        ended, _, seconds = hostile(script, resources=AS_MUCH_AS_IT_LIKES)
        assert (ended.reason, ended.limit_passed) == (Reason.DISK_FULL, 32 * MIB // 100)
        assert seconds < 10

    def test_a_disk_that_was_full_before_stops_nobody_who_does_not_write(self, hostile: Hostile, disk: Path) -> None:
        with (disk / "full").open("wb") as file, contextlib.suppress(OSError):
            file.write(bytes(33 * MIB))
        (disk / "output").mkdir(mode=0o777)
        mounts = (Mount(source=disk / "output", target="/work/output", read_only=False),)
        ended, _, _ = hostile("sleep 1", resources=AS_MUCH_AS_IT_LIKES, mounts=mounts)
        assert ended.reason is Reason.OK

    @pytest.mark.parametrize(
        "script",
        [
            "cd output; i=0; while :; do : > $i; i=$((i+1)); done",
            "cd output; i=0; while :; do ln -s x $i; i=$((i+1)); done",
            "cd output; : > a; seq 1 9999 | xargs -n 1 ln a",
            "cd output; while mkdir d && cd -P d; do :; done",
            "cd output; while :; do mkdir -p $(seq 1 200); cd -P 1; done",
            "cd output; seq 1 2001 | xargs touch",
        ],
    )
    def test_file_bomb(self, hostile: Hostile, script: str) -> None:
        ended, _, seconds = hostile(script)
        assert (ended.reason, ended.limit_passed) == (Reason.TOO_MANY_FILES, 2000)
        assert seconds < 20

    def test_log_flood(self, under: Under, hostile: Hostile) -> None:
        # Lines of 64 bytes: of each a cluster's node writes a time beside it.
        out, err = b"out" * 21 + b"\n", b"err" * 21 + b"\n"
        script = f"yes {out[:-1].decode()} & yes {err[:-1].decode()} >&2"
        ended, log, seconds = hostile(script, resources=SMALL)
        assert ended.reason is Reason.LOG_TOO_LARGE
        assert sum(len(data) for _, data in log.pieces) == 8 * MIB
        if under.cluster:
            assert set(log.text("stdout").splitlines(keepends=True)) <= {out, err}
        else:
            assert log.text("stdout") == (out * (MIB // 8))[: len(log.text("stdout"))]
        assert seconds < 15

    def test_a_volume_of_the_image_is_no_way_to_the_engines_disk(
        self, under: Under, docker_api: Any, make_job: Callable[..., ContainerJob], tmp_path: Path
    ) -> None:
        image = TinyImage(
            layers=(busybox_layer(), layer({"data/own": (0o644, b"the image's")})),
            config={"Env": ["PATH=/bin"], "Volumes": {"/data/": {}, "/work/output": {}, "/tmp": {}}},
        )
        reference = under.engine.prepare(ImageSource(image_file=str(docker_archive(tmp_path / "i.tar", image))))
        try:
            log, script = Log(), "grep -E ' /(data|tmp) ' /proc/mounts | cut -d' ' -f3; cat /dev/zero > /data/x"
            ended = under.engine.run(make_job("sh", "-c", script, image=reference, resources=SMALL), log)
        finally:
            under.forget(docker_api, reference)
        assert log.text("stdout").split() == [b"tmpfs", b"tmpfs"]
        assert ended.reason in under.of_memory
        assert ended.in_force.get("volumes", []) == []


class TestTakenUpAgain:
    def test_a_container_that_is_taken_up_again_is_held_to_its_limits(
        self, under: Under, make_job: Callable[..., ContainerJob], docker_api: Any, disk: Path
    ) -> None:
        script = "echo begun; while [ ! -e output/go ]; do sleep 0.1; done; truncate -s 1099511627776 output/hole; sleep 20"
        given = {
            "mounts": (Mount(source=disk, target="/work/output", read_only=False),),
            "resources": SMALL,
            "run_id": f"test-{uuid.uuid4().hex}",
            "image": under.image,
        }
        job = make_job("sh", "-c", script, **given)
        left = self.start(under, docker_api, job)
        assert under.engine.find(job)
        (disk / "go").touch()
        log = Log()
        ended = under.engine.run(make_job("sh", "-c", script, **given), log)
        assert left in (ended.in_force["container"], ended.in_force.get("pod"))
        assert ended.reason is Reason.OUTPUT_TOO_LARGE
        assert log.text("stdout") == b"begun\n"

    def start(self, under: Under, docker_api: Any, job: ContainerJob) -> str:
        """Leave the job's container as a process does that is killed; return its name."""
        if under.cluster is None:
            body = docker_spec.create_body(job, docker_api.info(), {})
            container = str(docker_api.create_container_from_config(body, docker_spec.container_name(job))["Id"])
            docker_api.start(container)
            return container
        assert isinstance(under.engine, KubernetesEngine)
        kube_run.create_job(under.engine._open(), job, pod.Pulled())
        found = under.cluster.objects
        eventually(lambda: found("pods", job.run_id), 30)
        return f"{under.cluster.namespace}/{found('pods', job.run_id)[0]['metadata']['name']}"


@pytest.fixture
def space(tmp_path: Path) -> Iterator[Workspace]:
    """A run's workspace with an output folder."""
    with open_workspace(tmp_path / "workspaces", "run") as opened:
        opened.fresh_output()
        opened.log.write_bytes(b"log\n")
        yield opened


def published(space: Workspace, folder: Path, *, commit: bool = False) -> tuple[set[bytes], list[str]]:
    """The names that are published of an output, and what was said of those that are not."""
    said: list[str] = []
    store.publish(
        space.output,
        Location(str(folder)),
        log=space.log,
        record=lambda _: b'{"oasis_flows": 1}',
        workspace=space.path,
        commit=commit,
        skipped=said.append,
    )
    data = folder / "data"
    return {os.fsencode(path.relative_to(data)) for path in data.rglob("*") if path.is_file()}, said


def octal(name: bytes) -> str:
    """A name as an argument of a shell's printf."""
    return "'" + "".join(f"\\{byte:03o}" for byte in name) + "'"


@pytest.mark.parametrize("under", ["docker", *clusters.HERE, *clusters.CARRIED], indirect=True)
class TestOutput:
    @pytest.fixture
    def wrote(self, under: Under, make_job: Callable[..., ContainerJob], space: Workspace) -> Callable[[str], Log]:
        """Runs a script, as root, whose output is the workspace's."""

        def run(script: str) -> Log:
            log = Log()
            mounts = (Mount(source=space.output, target="/work/output", read_only=False),)
            given = {"image": under.image, "mounts": mounts, "user": "0:0", "resources": SMALL, "working_dir": "/work/output"}
            ended = under.engine.run(make_job("sh", "-c", script, **given), log)
            assert ended.reason is Reason.OK, (ended, log.pieces)
            return log

        return run

    @pytest.mark.parametrize(
        "link",
        [
            "ln -s /etc/shadow x",
            "ln -s ../../../../../../../../../../etc/shadow x",
            "ln -s ../log.txt x",
            "ln -s ../../run/output/../log.txt x",
            "ln -s /proc/self/environ x",
            "ln -s $SECRET x",
            "ln -s a/../../log.txt x; mkdir a",
            "ln -s up/log.txt x; ln -s .. up",
            "ln -s /etc x",
        ],
    )
    def test_a_link_never_becomes_the_machines_file(
        self, wrote: Callable[[str], Log], space: Workspace, tmp_path: Path, link: str
    ) -> None:
        (tmp_path / "secret").write_text("of the machine")
        wrote(link.replace("$SECRET", str(tmp_path / "secret")) + "; echo good > good")
        with pytest.raises(UnsafeName):
            published(space, tmp_path / "whole", commit=True)
        names, said = published(space, tmp_path / "kept")
        assert names == {b"good"}
        assert any("'x' is a link" in sentence for sentence in said)

    def test_setuid_files_are_published_without(self, wrote: Callable[[str], Log], space: Workspace, tmp_path: Path) -> None:
        wrote("cp /bin/busybox su; chmod 6755 su; cp /bin/busybox sticky; chmod 1777 sticky")
        names, _ = published(space, tmp_path / "whole", commit=True)
        assert names == {b"su", b"sticky"}
        modes = {path.name: path.stat().st_mode & 0o7777 for path in (tmp_path / "whole/data").iterdir()}
        assert modes == {"su": 0o644, "sticky": 0o644}

    def test_strange_names_are_carried_or_left_out_and_all_deleted(
        self, wrote: Callable[[str], Log], space: Workspace, tmp_path: Path
    ) -> None:
        strange = [
            b"-rf",
            b"--help",
            b"...",
            b"..x",
            b" ",
            b"a\nb",
            b"\\..\\..\\x",
            b"%2e%2e",
            b"n" * 255,
            b"\x1b[2J",
            "é".encode(),
        ]
        script = "".join(f'printf x > "$(printf {octal(name)})"; ' for name in strange)
        wrote(script + "printf x > $(printf 'no-\\377\\376'); mkfifo pipe; mkdir -p empty/empty")
        names, said = published(space, tmp_path / "kept")
        assert names == set(strange)
        assert len(said) == 2
        assert space.remove()
        assert not space.path.exists()

    def test_folders_nested_beyond_every_path_are_left_out_and_deleted(
        self, wrote: Callable[[str], Log], space: Workspace, tmp_path: Path
    ) -> None:
        n = "n" * 200
        wrote(
            f"echo good > good; i=0; while [ $i -lt 100 ]; do mkdir {n} && cd -P {n} || exit 1; i=$((i+1)); done; echo x > deep"
        )
        names, said = published(space, tmp_path / "kept")
        assert names == {b"good"}
        assert len(said) == 1
        assert space.remove()
        assert not space.path.exists()


class TestWorkspace:
    def test_a_workspace_of_very_many_files_is_deleted(self, space: Workspace) -> None:
        for folder in range(20):
            (space.output / str(folder)).mkdir()
            for number in range(1000):
                (space.output / str(folder) / str(number)).touch()
        began = time.monotonic()
        assert space.remove()
        assert time.monotonic() - began < 20

    def test_of_ten_million_files_it_gets_a_little_more_than_the_first_and_all_are_deleted(
        self, docker_engine: DockerEngine, make_job: Callable[..., ContainerJob], tmp_path: Path
    ) -> None:
        """By the limit that a document has which names none. Second names of files cost less than new files."""
        script = "mkdir a; cd a; seq 1 10000 | xargs touch; for d in $(seq 1 999); do mkdir ../$d; ln * ../$d/; done"
        most = Algorithm.model_fields["max_output_files"].default
        resources = Resources(output_files=most, output_bytes=100 << 30)
        with mounted(tmp_path / "disk", "size=1m,nr_inodes=12m") as disk, open_workspace(disk, "run") as space:
            mounts = (Mount(source=space.fresh_output(), target="/work/output", read_only=False),)
            job = make_job("sh", "-c", script, mounts=mounts, resources=resources, working_dir="/work/output")
            ended = docker_engine.run(job, Log())
            assert (ended.reason, ended.limit_passed) == (Reason.TOO_MANY_FILES, 1_000_000)
            assert count([space.output], Resources()).files < 3_000_000
            assert space.remove()
            assert list(disk.iterdir()) == []

    def test_a_device_or_a_socket_in_the_output_is_refused(self, space: Workspace, tmp_path: Path) -> None:
        # No container can make a device; somebody with more rights might have.
        os.mknod(space.output / "null", 0o20666, os.makedev(1, 3))
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(space.output / "socket"))
        names, said = published(space, tmp_path / "kept")
        assert names == set()
        assert len(said) == 2
