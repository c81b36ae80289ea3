"""What the Kubernetes engine costs beyond Kubernetes itself, on the cluster that KUBECONFIG names: `make bench-kubernetes`.

The cluster is one whose node is this machine: an algorithm notes the time of the machine's clock when it starts, and that is compared
with this process's. Beside a whole run is the very same pod, made by `kubectl create`. API calls are those that the engine made.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

from benchmarks.surroundings import ROOT, make_files, run
from benchmarks.table import Row, Series, difference, said
from oasis_flows import lease
from oasis_flows.blocks import Algorithm, Dataset, DatasetStore, DockerImage
from oasis_flows.engines import pod as spec
from oasis_flows.engines.kubernetes import KubernetesEngine
from oasis_flows.errors import ContainerLost
from oasis_flows.flows.algorithm_task import algorithm_task
from oasis_flows.job import ContainerJob, Mount, Resources
from tests.servers.cluster import TestCluster, carrier_of, open_cluster
from tests.servers.registry import running_registry

# The time since the machine's start, which is one clock for all that runs on it.
NOTE = ("sh", "-c", "cat /proc/uptime > output/started")
SMALL = Resources(cpus=0.01, memory_bytes=32 << 20)
USUAL = Resources(cpus=0.5, memory_bytes=64 << 20)

LOG_PEAK = """
import re, sys
from pathlib import Path
from oasis_flows import lease
from oasis_flows.engines import pod as spec
from oasis_flows.engines.kubernetes import KubernetesEngine
from oasis_flows.job import ContainerJob, Resources
namespace, claim, home, image, name, megabytes = sys.argv[1:]
path, got = Path(home) / "workspaces" / name / "lease", 0
path.parent.mkdir(parents=True)
def take(stream, data):
    global got
    got += len(data)
script = f"yes {'y' * 99} | head -c {megabytes}000000"
with lease.hold(path):
    job = ContainerJob(run_id=name, image=image, lease=path, command=("sh", "-c", script), resources=Resources(cpus=1.0))
    KubernetesEngine(spec.Place(namespace=namespace, claim=claim, home=Path(home))).run(job, take)
(peak,) = re.findall(r"^VmHWM:\\s+(\\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
print(got, int(peak) / 1024)
"""

CARRIED = """
import re, sys
from pathlib import Path
from oasis_flows import lease
from oasis_flows.engines import pod as spec
from oasis_flows.engines.kubernetes import KubernetesEngine
from oasis_flows.job import ContainerJob, Mount, Resources
namespace, claim, home, image, carrier, source = sys.argv[1:]
folder = Path(home) / "workspaces" / Path(source).name
place = spec.Place(namespace=namespace, claim=claim, home=Path(home), carrier=carrier)
mounts = (Mount(source=Path(source), target="/work/input", read_only=True),
          Mount(source=folder / "output", target="/work/output", read_only=False))
with lease.hold(folder / "lease"):
    (folder / "output").mkdir()
    job = ContainerJob(run_id=folder.name, image=image, lease=folder / "lease", command=("sh", "-c", "cp -a input/. output"),
                       mounts=mounts, resources=Resources(cpus=1.0), user="0:0")
    KubernetesEngine(place, tell=print).run(job, lambda *_: None)
(peak,) = re.findall(r"^VmHWM:\\s+(\\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
print("peak", int(peak) / 1024)
"""


def rows(folder: Path, *, quick: bool) -> Iterator[Row]:
    """A row for each mark."""
    home = folder / "home"
    for each in (home, folder / "registry"):
        each.mkdir()
    with running_registry(folder / "registry") as registry, open_cluster(registry, home) as cluster:
        with patch.dict(os.environ, cluster.settings):
            yield _start(cluster, folder, quick=quick)
        yield from _many(cluster, 10 if quick else 50)
        yield _log(cluster, 20 if quick else 200)
        yield _deletion(cluster, 2 if quick else 5)
        yield from _carried(cluster, folder, 50 if quick else 500)


def _job(cluster: TestCluster, name: str, *command: str, resources: Resources = SMALL) -> ContainerJob:
    """A job whose lease is there, and nobody's."""
    path = cluster.home / "workspaces" / name / "lease"
    (path.parent / "output").mkdir(parents=True)
    path.touch()
    return ContainerJob(
        run_id=name,
        image=cluster.image,
        lease=path,
        command=command,
        resources=resources,
        mounts=(Mount(source=path.parent / "output", target="/work/output", read_only=False),),
        stop_grace_seconds=10,
        timeout_seconds=600,
    )


def _engine(cluster: TestCluster, tell: Callable[[str], None] = lambda _: None) -> KubernetesEngine:
    return KubernetesEngine(spec.Place(namespace=cluster.namespace, claim=cluster.claim, home=cluster.home), tell=tell)


def _start(cluster: TestCluster, folder: Path, *, quick: bool) -> Row:
    algorithm = Algorithm(docker_image=DockerImage(image_id=cluster.image), command=list(NOTE), cpus=0.5, memory="64MiB")
    dataset = Dataset(url=str(make_files(cluster.home / "in", 1, 1)))
    target = DatasetStore(url=str(folder / "out"))
    ours, theirs = Series(), Series()
    for turn in range(4 if quick else 11):
        began = _uptime()
        done = algorithm_task(algorithm, dataset, store=target)
        mine = _noted(Path(done.url) / "data" / "started") - began
        bare = _bare(cluster, folder, f"bare-{turn}")
        if turn:
            ours.seconds.append(mine)
            theirs.seconds.append(bare)
    extra = difference(ours, theirs)
    return Row(
        what="Kubernetes: flow called → algorithm started, warm process",
        ours=str(ours),
        beside="`kubectl create` of the same Job",
        theirs=str(theirs),
        figure=f"{said(extra) if extra >= 0 else '-' + said(-extra)} more",
        mark="≤ 1 s more",
        reached=extra <= 1.0,
    )


def _bare(cluster: TestCluster, folder: Path, name: str) -> float:
    job = _job(cluster, name, *NOTE, resources=USUAL)
    place = spec.Place(namespace=cluster.namespace, claim=cluster.claim, home=cluster.home)
    body = spec.job_body(job, place, spec.Pulled())
    (folder / "job.json").write_text(json.dumps(body))
    began = _uptime()
    run("kubectl", "create", "-f", folder / "job.json")
    started = job.lease.parent / "output" / "started"
    until = time.monotonic() + 120
    while not (started.exists() and started.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    run("kubectl", "delete", "-n", cluster.namespace, "job", body["metadata"]["name"])
    return _noted(started) - began


def _uptime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _noted(path: Path) -> float:
    return float(path.read_text().split()[0])


def _many(cluster: TestCluster, count: int) -> Iterator[Row]:
    """So many Jobs at once, followed by this process; the server says how many watches of one namespace's pods it serves."""
    engine, most, over = _engine(cluster), 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(0.5):
            most = max(most, _watches())

    def one(number: int) -> None:
        job = _job(cluster, f"many-{number}", "sh", "-c", "echo begun; sleep 3")
        with lease.hold(job.lease):
            engine.find(job)
            engine.run(job, lambda _, __: None)

    before = _watches()
    looking = threading.Thread(target=look)
    looking.start()
    began = time.monotonic()
    try:
        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(one, number) for number in range(count)]:
                done.result()
    finally:
        over.set()
        looking.join()
    seconds = time.monotonic() - began
    calls = engine.calls
    beyond = sum(number for kind, number in calls.items() if kind != "watch pods") / count
    yield Row(
        what=f"Kubernetes: {count} Jobs at once, followed by one process",
        ours=f"{said(seconds)}; {', '.join(f'{number} × {kind}' for kind, number in sorted(calls.items()))}",
        figure=f"{beyond:.1f} API calls per Job beyond the watch",
        mark="≤ 5",
        reached=beyond <= 5,
    )
    yield Row(
        what="· watches of the namespace's pods that the API server served for them",
        ours=f"{most - before} at most",
        figure=f"{most - before} per namespace",
        mark="≤ 1",
        reached=most - before <= 1,
    )


def _watches() -> int:
    """Watches of pods of one namespace, of whomever, that the API server serves now; kubelet's and the controllers' are of all."""
    done = subprocess.run(["kubectl", "get", "--raw", "/metrics"], capture_output=True, text=True, check=True)
    wanted = r'^apiserver_longrunning_requests\{.*resource="pods",scope="namespace".*verb="WATCH".*\} (\d+)$'
    return sum(int(found) for found in re.findall(wanted, done.stdout, re.MULTILINE))


def _log(cluster: TestCluster, megabytes: int) -> Row:
    """The peak of a process that follows a log of so many MB, beside that of one that follows a short one."""
    peaks, arrived = [], 0
    for size in (1, megabytes):
        given = [cluster.namespace, cluster.claim, str(cluster.home), cluster.image, f"log-{size}", str(size)]
        command = [sys.executable, "-W", "ignore", "-c", LOG_PEAK, *given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        got, peak = done.stdout.split()
        arrived = int(got)
        peaks.append(float(peak))
    return Row(
        what=f"Kubernetes: memory of a process that follows {megabytes} MB of log, written as fast as it goes",
        ours=f"{peaks[1]:.0f} MiB at most; {arrived / 1e6:.0f} MB arrived",
        beside="1 MB of log",
        theirs=f"{peaks[0]:.0f} MiB",
        figure=f"{peaks[1] - peaks[0]:+.0f} MiB",
        mark="≤ 64 MiB more",
        reached=peaks[1] - peaks[0] <= 64,
    )


def _carried(cluster: TestCluster, folder: Path, megabytes: int) -> Iterator[Row]:
    """Files carried to a claim that is not mounted, and back, by a process of its own each: a few large ones, and many small ones."""
    small = _carry(cluster, folder, make_files(folder / "one", 1, 1000))
    large = _carry(cluster, folder, make_files(folder / "large", 5, megabytes * 200_000))
    many = _carry(cluster, folder, make_files(folder / "many", 5000, 1000))
    for way, seconds in (("to the claim", 0), ("from the claim", 1)):
        yield Row(
            what=f"Kubernetes: {megabytes} MB carried {way}; 5000 files of 1 kB",
            ours=f"{said(large[seconds])}; {said(many[seconds])}",
            figure=f"{megabytes / large[seconds]:.0f} MB/s; {5000 / many[seconds]:.0f} files/s",
        )
    yield Row(
        what=f"· memory of the process that carried {megabytes} MB",
        ours=f"{large[2]:.0f} MiB at most",
        beside="1 kB",
        theirs=f"{small[2]:.0f} MiB",
        figure=f"{large[2] - small[2]:+.0f} MiB",
        mark="≤ 16 MiB more",
        reached=large[2] - small[2] <= 16,
    )


def _carry(cluster: TestCluster, folder: Path, source: Path) -> tuple[float, float, float]:
    """Seconds there, seconds back, and the most MiB of memory."""
    given = [cluster.namespace, cluster.claim, str(folder / "laptop"), cluster.image, carrier_of(cluster), str(source)]
    command = [sys.executable, "-W", "ignore", "-c", CARRIED, *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    there, back = (float(each) for each in re.findall(r"^Carried .* the claim in ([\d.]+) s\.$", done.stdout, re.MULTILINE))
    return there, back, float(done.stdout.split()[-1])


def _deletion(cluster: TestCluster, times: int) -> Row:
    """From a deletion of the Job by somebody to the word of it; the container takes all of its grace."""
    found = []
    for turn in range(times):
        begun, told = threading.Event(), list[float]()

        def hear(line: str, told: list[float] = told) -> None:
            if "being deleted" in line:
                told.append(time.monotonic())

        engine, job = _engine(cluster, hear), _job(cluster, f"deleted-{turn}", "sh", "-c", "trap '' TERM; echo begun; sleep 60")

        def follow(engine: KubernetesEngine = engine, job: ContainerJob = job, begun: threading.Event = begun) -> None:
            try:
                engine.run(job, lambda _, __: begun.set())
            except ContainerLost:
                return
            raise RuntimeError("a deleted Job was not noticed")

        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(follow)
            begun.wait(120)
            path = f"/apis/batch/v1/namespaces/{cluster.namespace}/jobs/{spec.job_name(job)}"
            cluster.api.call("DELETE", path, {"propagationPolicy": "Background"})
            deleted = time.monotonic()
            following.result()
        found.append(told[0] - deleted)
    return Row(
        what="Kubernetes: a Job that somebody deleted → told",
        ours=f"{said(max(0.0, statistics.median(found)))} (at most {said(max(0.0, *found))})",
        figure=f"{said(max(0.0, *found))} at most",
        mark="≤ 2 s",
        reached=max(found) <= 2.0,
    )
