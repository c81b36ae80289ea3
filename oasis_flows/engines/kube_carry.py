"""Files on their way to the claim and back, for a process that has it not mounted: by a carrier, a Job of the flow-runner image.

The carrier is a container like any other, in the same sandbox, with the claim mounted; `carrier` is its program. It owns the run's folder
there, and the algorithm's Job belongs to it: deleting the carrier, by whomever, deletes all of them.
"""

from __future__ import annotations

import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import asdict, replace
from functools import partial
from socket import gethostname
from typing import Any, Self

from ..errors import ContainerLost, EngineError, EngineUnavailable, StoreFull
from ..job import ContainerJob, Mount, Reason, Resources, Stream, counted, human_bytes
from ..workspace import delete, room_for
from . import kube_run, pod as spec, pod_verdict as verdict
from .carrier import FULL, GOING, HOME, Order
from .kube_api import Refused
from .kube_exec import Exited, Program, started
from .kube_run import Cluster, Json
from .parcel import Contents, Damaged, pack, unpack
from .quota import Passed, Watch

# To delete a million files.
GRACE_SECONDS = 120
_RESOURCES = Resources(cpus=1.0, memory_bytes=256 << 20)
_REQUESTED = {"cpu": "50m", "memory": str(64 << 20)}
# The group of the pool's flow runs, to which a claim belongs.
_GROUP = 1000
# How long transfers may take, and a job without a time limit: the cluster itself removes a carrier that everybody has forgotten.
_SPARE_SECONDS, _LONGEST_SECONDS = 86_400, 30 * 86_400
_TELL_SECONDS = 10.0
# It may have to wait for the carrier of an earlier attempt, a hundred seconds at most, and to delete a million files.
_SILENCE_SECONDS = 300.0
_GONE = "The carrier of the run's files is gone, and they with it. Run it again."


def order_of(job: ContainerJob) -> Order:
    """What is to be carried for a job."""
    written = {mount.source: str(number) for number, mount in enumerate(job.mounts) if not mount.read_only}
    ended = ""
    if job.wrapper is not None:
        source = next(source for source in written if job.wrapper.ended.is_relative_to(source))
        ended = f"{written[source]}/{job.wrapper.ended.relative_to(source)}"
    return Order(
        folder=spec.run_label(job.run_id),
        job=spec.job_digest(job),
        written=tuple(written.values()),
        ended=ended,
        output_bytes=job.resources.output_bytes,
        output_files=job.resources.output_files,
    )


def there(job: ContainerJob) -> ContainerJob:
    """The job as its pod sees it: with its files on the claim."""
    folder = order_of(job).path(HOME)
    mounts = (
        replace(mount, source=folder / ("in" if mount.read_only else "out") / str(number))
        for number, mount in enumerate(job.mounts)
    )
    return replace(job, mounts=tuple(mounts))


def carrier_job(job: ContainerJob, place: spec.Place) -> ContainerJob:
    """The container that carries for a job: as the job's user, who can read all that it writes."""
    return ContainerJob(
        run_id=job.run_id,
        attempt=job.attempt,
        image=place.carrier,
        lease=job.lease,
        entrypoint=("python", "-m", "oasis_flows.engines.carrier"),
        command=("hold", order_of(job).dumped()),
        mounts=(Mount(source=HOME, target=str(HOME), read_only=False),),
        working_dir="/tmp",  # noqa: S108
        user=job.user,
        resources=_RESOURCES,
        stop_grace_seconds=GRACE_SECONDS,
        retry_window_seconds=job.retry_window_seconds,
    )


def carrier_body(job: ContainerJob, place: spec.Place) -> dict[str, Any]:
    """The carrier's Job. It outlives the job's own deadline, and is removed at its own if everybody has forgotten it."""
    carrier = carrier_job(job, place)
    body = spec.job_body(carrier, _served(place), spec.Pulled())
    body["metadata"]["name"] = "carry-" + spec.job_name(job).removeprefix("oasis-")
    body["metadata"]["labels"][spec.CARRIER] = "true"
    pod = body["spec"]["template"]["spec"]
    pod["securityContext"] |= {"fsGroup": _GROUP, "fsGroupChangePolicy": "OnRootMismatch"}
    pod["containers"][0]["resources"]["requests"] |= _REQUESTED
    if job.resources.gpus and place.one_node:
        # The algorithm has to run on the same node.
        pod |= {"nodeSelector": dict(place.gpu_node_selector), "tolerations": [dict(each) for each in place.gpu_tolerations]}
    main = spec.job_body(there(job), _served(place), spec.Pulled(config={"Entrypoint": ["?"]}))
    longest = main["spec"].get("activeDeadlineSeconds", _LONGEST_SECONDS)
    body["spec"]["activeDeadlineSeconds"] = longest + round(place.pending_seconds) + _SPARE_SECONDS
    return body


def _served(place: spec.Place) -> spec.Place:
    """Where carriers, and what they carry for, run."""
    return replace(place, home=HOME, host=gethostname(), owner=None)


def find(cluster: Cluster, job: ContainerJob) -> Json | None:
    """The carrier that an earlier call for this job left, if it still runs, and the job's own Job can be taken up, too.

    What else is left of the run is removed: a carrier alone may have the half of an output.
    """
    digest = spec.job_digest(carrier_job(job, cluster.place))
    rows = kube_run.list_jobs(cluster, job.run_id)
    found = next((row for row in rows if kube_run.is_carrier(row) and _is_carrying(cluster, row, digest)), None)
    if found is not None and kube_run.find_job(cluster, there(job)) is not None:
        return found
    for row in rows:
        kube_run.remove_job(cluster, row)
    return None


def _is_carrying(cluster: Cluster, row: Json, digest: str) -> bool:
    if row["metadata"]["annotations"].get(spec.JOB) != digest or row["metadata"].get("deletionTimestamp"):
        return False
    pod = kube_run.pod_of(cluster, row)
    return pod is not None and not pod["metadata"].get("deletionTimestamp") and not verdict.has_ended(pod)


class Carriage:
    """One job's files on the claim, from `begin` until its carrier, `row`, is deleted. It is the `Outlook` of its job, too: what a
    carrier sees there, it says.

    `job` is the job as its pod sees it, and `cluster` where that runs.
    """

    def __init__(self, cluster: Cluster, job: ContainerJob) -> None:
        self._home, self._here = cluster, job
        self.cluster, self.job = cluster, there(job)
        self.row: Json | None = None
        self.leaving = self.program_ended = self._fetched = False
        self._changed = threading.Event()
        self._ready = False
        self._failure: BaseException | None = None
        self._passed: Passed | None = None
        self._heard = b""
        self._words: tuple[str, ...] = ()

    def begin(self, *, fresh: bool) -> None:
        """Have a carrier, and all that the job reads on the claim. Unless it is `fresh`, an earlier attempt may have seen to both.

        Raises:
            StoreFull: the claim has no room for it.
            EngineError, and what `KubernetesEngine.run` raises: there can be no carrier, or it could not do its work.
        """
        found = None if fresh else find(self._home, self._here)
        self.row = found or kube_run.create(self._home, self._home.jobs, carrier_body(self._here, self._home.place))
        threading.Thread(target=partial(copy_context().run, self._follow, fresh=found is None), daemon=True).start()
        self._until_ready(self.row["metadata"]["uid"])
        pod = self._home.watch.sight(self.row["metadata"]["uid"]).pod
        assert pod is not None  # noqa: S101 - it has spoken
        self._pod = f"{self._home.core('pods')}/{pod['metadata']['name']}"
        owner = {"apiVersion": "batch/v1", "kind": "Job", **{key: self.row["metadata"][key] for key in ("name", "uid")}}
        place = replace(_served(self._home.place), owner=owner, proof=order_of(self._here).path(HOME) / "lease")
        if place.one_node:
            place = replace(place, node=pod["spec"]["nodeName"])
        self.cluster = replace(self._home, place=place)
        self._patiently(self._send_input)

    def _until_ready(self, uid: str) -> None:
        """Return once the carrier has said that it is ready. It says so in its log, and a node may lose that."""
        silent_since: float | None = None
        while not self._ready:
            self._changed.wait(1.0)
            self._check()
            pod = self._home.watch.sight(uid).pod
            if self._home.watch.away_since is not None:
                silent_since = None
            elif pod is not None and pod["status"].get("phase") == "Running":
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > _SILENCE_SECONDS:
                    raise ContainerLost(
                        f"The carrier of files to the claim runs, and said nothing in {_SILENCE_SECONDS:.0f} s: its node may have lost its "
                        "log. Run it again."
                    )

    def _follow(self, *, fresh: bool) -> None:
        """See the carrier to its end, which should be ours."""
        assert self.row is not None  # noqa: S101 - made by who calls
        job = carrier_job(self._here, self._home.place)
        watch = Watch(replace(job, mounts=()))
        cluster = replace(self._home, tell=self._tell, place=_served(self._home.place))
        try:
            with cluster.watch.following():
                exit = kube_run.Supervision(cluster, job, self.row, self._hear, watch, fresh=fresh, login=False).run()
            said = " ".join(self._words) or exit.reason
            self._failure = EngineError(
                f"The carrier of files to the claim ended by itself. Is {job.image} an image of flow runs, of this version? It said: {said}"
            )
        except Refused as error:
            self._failure = error.translated("to have files carried to the claim")
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._failure = error
        self._changed.set()

    def _tell(self, line: str) -> None:
        if not self.leaving:
            self._home.tell(line.replace("The algorithm waits", "The carrier of its files waits"))

    def _hear(self, stream: Stream, data: bytes) -> None:  # noqa: ARG002 - as a LogSink is called
        *lines, self._heard = (self._heard + data).split(b"\n")
        for line in lines:
            try:
                said = json.loads(line)
            except ValueError:
                self._words = (*self._words, line.decode(errors="replace"))[-5:]
                continue
            self._ready = self._ready or "ready" in said
            self.program_ended = self.program_ended or "ended" in said
            if "passed" in said:
                self._passed = _passed(said["passed"])
        self._changed.set()

    def _check(self) -> None:
        self._changed.clear()
        failure = self._failure
        if isinstance(failure, ContainerLost):
            raise type(failure)(f"{_GONE} {failure}") from failure
        if failure is not None:
            raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The carrier goes on."""

    @property
    def passed(self) -> Passed | None:
        """The limit of its output that the job has passed, if any."""
        if self._failure is not None:
            self._check()
        return self._passed

    def at_end(self) -> Passed | None:
        """Bring home what the job has written, now that nobody writes any more, unless it is too much; that limit."""
        if not self._fetched and self._passed is None:
            self._patiently(self._fetch)
            self._fetched = True
        return self._passed

    def _send_input(self) -> None:
        began = time.monotonic()
        sources = {str(number): mount.source for number, mount in enumerate(self._here.mounts) if mount.read_only}
        with self._program("receive") as (program, lines):
            if json.loads(lines.readline())["there"]:
                return
            try:
                sent = pack(_Told(program.write, self._home.tell, "Carried {} to the claim."), sources)
            except OSError as error:
                raise EngineError(
                    f"A file of the input cannot be read. Mend it, and run it again. The cause: {error}"
                ) from error
            arrived = json.loads(lines.readline())
        if arrived != asdict(sent):
            raise EngineUnavailable(f"What arrived on the claim is not what was sent: {arrived}, and not {asdict(sent)}.")
        self._home.tell(_said(sent, "to the claim", began))

    def _fetch(self) -> None:
        began = time.monotonic()
        new = self._here.lease.parent / f"arriving-{spec.job_name(self._here)}"
        delete(new)
        try:
            with room_for(new), self._program("send") as (_, lines):
                new.mkdir()
                self._passed = _passed(json.loads(lines.readline())["passed"])
                if self._passed is not None:
                    return
                told = _Told(lambda _: None, self._home.tell, "Carried {} from the claim.")
                found = unpack(lambda count: told(lines.read(count)), new, self._here.resources)
                if not json.loads(lines.readline())["whole"]:
                    raise EngineUnavailable("The output was deleted while it was carried.")
                for number in order_of(self._here).written:
                    target = self._here.mounts[int(number)].source
                    delete(target)
                    shutil.move(new / number, target)
            self._home.tell(_said(found, "from the claim", began))
        finally:
            delete(new)

    @contextmanager
    def _program(self, action: str) -> Iterator[tuple[Program, io.BufferedReader]]:
        """The carrier's program for an action: to write to, and to read from."""
        command = ("python", "-m", "oasis_flows.engines.carrier", action, order_of(self._here).dumped())
        cluster = self._home
        try:
            with started(cluster.api, self._pod, spec.CONTAINER, command, cluster.patience_seconds) as program:
                yield program, io.BufferedReader(program, 1 << 18)
        except Exited as error:
            if error.code == FULL:
                raise StoreFull(
                    f"The claim {cluster.place.claim} is full. Make room there. Its carrier said: {error.words}"
                ) from error
            if error.code == GOING:
                raise EngineUnavailable(f"The files of the run are gone. Their carrier said: {error.words}") from error
            raise EngineError(f"The carrier of files to the claim failed. It said: {error.words}") from error
        except (Damaged, ValueError) as error:
            raise EngineUnavailable(f"Files came from the claim, and not whole. The cause: {error}") from error

    def _patiently(self, action: Callable[[], None]) -> None:
        """Do what takes a connection, again from its beginning when that breaks."""
        until: float | None = None
        while True:
            self._check()
            try:
                action()
            except (EngineError, Refused) as error:
                if self._is_going() or (isinstance(error, Refused) and error.status == 404):
                    raise ContainerLost(f"{_GONE} {error}") from error
                until = until or time.monotonic() + self._home.patience_seconds
                if not isinstance(error, EngineUnavailable) or time.monotonic() > until:
                    raise
                time.sleep(1.0)
            else:
                return

    def _is_going(self) -> bool:
        """Is the carrier gone, or being deleted?"""
        assert self.row is not None  # noqa: S101 - something was done with it
        sight = self._home.watch.sight(self.row["metadata"]["uid"])
        return sight.gone or (sight.pod is not None and "deletionTimestamp" in sight.pod["metadata"])


class _Told:
    """Bytes on their way, which people are told of again and again."""

    def __init__(self, way: Callable[[bytes], object], tell: Callable[[str], None], words: str) -> None:
        self._way, self._tell, self._words = way, tell, words
        self._bytes, self._last = 0, time.monotonic()

    def __call__(self, data: bytes) -> bytes:
        self._way(data)
        self._bytes += len(data)
        if time.monotonic() - self._last >= _TELL_SECONDS:
            self._last = time.monotonic()
            self._tell(self._words.format(human_bytes(self._bytes)))
        return data


def _said(contents: Contents, way: str, began: float) -> str:
    seconds = time.monotonic() - began
    return f"Carried {counted(contents.files, 'file')}, {human_bytes(contents.bytes)}, {way} in {seconds:.1f} s."


def _passed(said: Any) -> Passed | None:
    return Passed(Reason(said[0]), int(said[1])) if said else None
