"""One Job from its creation to its removal."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from .. import interruption, lease
from ..capacity import Demand, Vector, too_big
from ..errors import (
    ContainerLost,
    DescriptionError,
    EngineError,
    EngineUnavailable,
    NoCapacity,
    NoGpu,
    NoRoom,
    OasisError,
    UnsupportedByEngine,
)
from ..job import ContainerExit, ContainerJob, LogSink, Reason
from ..snapshots import kubernetes_nodes
from . import pod as spec, pod_verdict as verdict
from .docker_output import Delivery
from .docker_verdict import parse_time
from .kube_api import KubeApi, Refused
from .kube_log import LogFollower
from .kube_watch import PodWatch, Sight
from .quota import Outlook, Passed
from .shield import shielded

logger = logging.getLogger(__name__)
Json = Mapping[str, Any]
Tell = Callable[[str], None]

_SECONDS_TO_DIE = 60.0
_SECONDS_TO_CATCH_UP = 10.0
# How long a start may take before anybody asks why, and how often then.
_PATIENT_START, _ASK_AGAIN = 2.0, 1.0
_SECONDS_FOR_SECRETS = 10.0
# Whose pod is deleted at once still has this second: none would only forget it while it runs on.
_AT_ONCE = 1


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a Job's life needs of its surroundings. `tell` shows people why something waits. `grows`: nodes may still come."""

    api: KubeApi
    place: spec.Place
    watch: PodWatch
    tell: Tell
    version: str
    patience_seconds: float
    grows: bool

    @property
    def jobs(self) -> str:
        return f"/apis/batch/v1/namespaces/{self.place.namespace}/jobs"

    def core(self, kind: str) -> str:
        """The path of the namespace's objects of a kind."""
        return f"/api/v1/namespaces/{self.place.namespace}/{kind}"


def list_jobs(cluster: Cluster, run_id: str | None = None, *, with_parts: bool = False) -> list[Json]:
    """This package's Jobs; one run's, perhaps with those of its parts, or all."""
    exactly = "" if run_id is None or with_parts else f",{spec.RUN}={spec.run_label(run_id)}"
    found = cluster.api.call("GET", cluster.jobs, query={"labelSelector": spec.SELECTOR + exactly})
    return [job for job in found["items"] if run_id is None or _is_of(job, run_id, with_parts)]


def _is_of(job: Json, run_id: str, with_parts: bool) -> bool:
    found = run_id_of(job)
    return found == run_id or (with_parts and found.startswith(f"{run_id}."))


def is_carrier(job: Json) -> bool:
    """Does the Job carry files for another one? See `kube_carry`."""
    return spec.CARRIER in job["metadata"]["labels"]


def run_id_of(job: Json) -> str:
    """The id of the run that made the Job."""
    return str((job["metadata"].get("annotations") or {}).get(spec.RUN_ID, ""))


def find_job(cluster: Cluster, job: ContainerJob) -> Json | None:
    """The Job that an earlier call for this run left behind and that can still tell its end; others are removed."""
    found: Json | None = None
    for row in list_jobs(cluster, job.run_id):
        if is_carrier(row):
            continue
        same = (row["metadata"].get("annotations") or {}).get(spec.JOB) == spec.job_digest(job)
        if found is None and same and not row["metadata"].get("deletionTimestamp") and _can_tell(cluster, job, row):
            found = row
        else:
            remove_job(cluster, row)
    return found


def pod_of(cluster: Cluster, row: Json) -> Json | None:
    """The newest pod of a Job."""
    selector = f"batch.kubernetes.io/controller-uid={row['metadata']['uid']}"
    pods = cluster.api.call("GET", cluster.core("pods"), query={"labelSelector": selector})
    return verdict.newest(pods["items"])


def _can_tell(cluster: Cluster, job: ContainerJob, row: Json) -> bool:
    pod = pod_of(cluster, row)
    if pod is None or pod["metadata"].get("deletionTimestamp"):
        return False
    if not verdict.has_ended(pod):
        return True
    try:
        exit = verdict.container_exit(job, verdict.Seen(pod=pod, job=row))
    except OasisError:
        return False
    # Whatever the process that watched knew of a limit or a cancellation is gone with it.
    return exit.exit_code not in (137, 143) or exit.reason is Reason.OUT_OF_MEMORY


def create_job(cluster: Cluster, job: ContainerJob, image: spec.Pulled) -> Json:
    """Make the Job, and the Secrets that it reads.

    Raises:
        DescriptionError, UnsupportedByEngine, NoRoom: the cluster does not take it.
    """
    body = spec.job_body(job, cluster.place, image)
    login = spec.pull_secret(job, cluster.place, image)
    try:
        if login:
            # A pull without it would be refused, and that is no error of which kubelet thinks better.
            create(cluster, cluster.core("secrets"), login)
        row = create(cluster, cluster.jobs, body)
    except BaseException:
        if login:
            _forget_login(cluster, login["metadata"]["name"])
        raise
    if values := spec.secret_values(job, cluster.place, row):
        # It belongs to the Job, and goes with it. A container waits until it is there.
        try:
            create(cluster, cluster.core("secrets"), values)
        except BaseException:
            remove_job(cluster, row)
            raise
    return row


def _forget_login(cluster: Cluster, name: str) -> None:
    """Delete the Secret of a Job that there is not: nothing else tells that it was made."""
    hurried = replace(cluster, patience_seconds=0.0)
    try:
        shielded(lambda: _delete(hurried, f"{cluster.core('secrets')}/{name}"))
    except OasisError as error:
        logger.warning("The Secret %s may be left behind: %s", name, error)


def create(cluster: Cluster, path: str, body: Json) -> Json:
    """Make an object of a name that is its own; one that is left over is removed first.

    Raises:
        DescriptionError, UnsupportedByEngine, NoRoom: the cluster does not take it.
    """
    name, kind = body["metadata"]["name"], body["kind"]
    until = time.monotonic() + 60.0
    while True:
        try:
            return shielded(lambda: cluster.api.call("POST", path, body, patience_seconds=cluster.patience_seconds))
        except Refused as error:
            if error.status == 409 and time.monotonic() < until:
                # It is being deleted; or an earlier attempt left it, or this very call made it and lost the answer.
                shielded(lambda: _delete(cluster, f"{path}/{name}", propagation="Background"))
                time.sleep(1.0)
                continue
            raise _creation_error(error, kind, name) from None


def _creation_error(error: Refused, kind: str, name: str) -> OasisError:
    said = f" The cluster said: {error.words}"
    if error.status == 403 and "exceeded quota" in error.words:
        return NoRoom(f"The namespace may have no more objects, and the {kind} {name} was not made. Try again later.{said}")
    if error.status in (400, 413, 422):
        return DescriptionError(f"The cluster refuses the description of {name}. Correct the Algorithm document.{said}")
    if error.status == 403 and "admission webhook" in error.words:
        return UnsupportedByEngine(f"The cluster's policy does not admit {name}. Ask who runs it.{said}")
    return error.translated(f"to make the {kind} {name}")


def list_orphans(cluster: Cluster, run_id: str | None = None) -> list[Json]:
    """Pods of this package whose Job was deleted without them; one run's with those of its parts, or all."""
    found = cluster.api.call("GET", cluster.core("pods"), query={"labelSelector": spec.SELECTOR})["items"]
    return [pod for pod in found if verdict.is_orphaned(pod) and (run_id is None or _is_of(pod, run_id, with_parts=True))]


def remove_pod(cluster: Cluster, pod: Json) -> None:
    """Delete a pod that has no Job."""
    _delete(cluster, f"{cluster.core('pods')}/{pod['metadata']['name']}")


def remove_job(cluster: Cluster, row: Json) -> None:
    """Delete a Job with its pod, and its Secrets; return when the Job is gone, and its pod is going."""
    name = row["metadata"]["name"]
    _delete(cluster, f"{cluster.jobs}/{name}", propagation="Background", uid=row["metadata"]["uid"])
    for secret in row["spec"]["template"]["spec"].get("imagePullSecrets") or ():
        _delete(cluster, f"{cluster.core('secrets')}/{secret['name']}")


def _delete(
    cluster: Cluster, path: str, *, propagation: str | None = None, uid: str | None = None, grace: int | None = None
) -> None:
    options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions"}
    options |= {"propagationPolicy": propagation} if propagation else {}
    options |= {"preconditions": {"uid": uid}} if uid else {}
    options |= {"gracePeriodSeconds": grace} if grace is not None else {}
    try:
        cluster.api.call("DELETE", path, options, patience_seconds=cluster.patience_seconds)
    except Refused as error:
        # 404: somebody was faster; 409: one of that name that is not ours.
        if error.status not in (404, 409):
            raise error.translated(f"to delete {path.rpartition('/')[2]}") from error


class Supervision:
    """Watches one Job: says why it waits, feeds the log, renews the lease, keeps the time, and says how it ended."""

    def __init__(
        self, cluster: Cluster, job: ContainerJob, row: Json, log: LogSink, outlook: Outlook, *, fresh: bool, login: bool
    ) -> None:
        self._cluster, self._job, self._row, self._fresh, self._login = cluster, job, row, fresh, login
        self._outlook = outlook
        self._uid, self._name = row["metadata"]["uid"], row["metadata"]["name"]
        self._delivery = Delivery(log, job.resources.log_bytes)
        self._follower: LogFollower | None = None
        self._passed: Passed | None = None
        self._stopped = self._lingers = self._deleting = False
        self._gone_by, self._unheard = math.inf, False
        self._in_force: Json = {}
        self._began, self._started_at = time.monotonic(), 0.0
        self._asked, self._told, self._renewed, self._looked_for_room = 0.0, "", 0.0, False
        self._deadlines: list[tuple[float, int | None]] = []

    def run(self) -> ContainerExit:
        """Stay with the Job to its end. Whatever is raised, its pod is being stopped."""
        try:
            with self._outlook:
                sight = self._until_ended()
            return self._verdict(sight)
        finally:
            if self._follower is not None and not self._is_over():
                self._stop()

    def _until_ended(self) -> Sight:
        version = -1
        while True:
            version = self._cluster.watch.wait(version, 0.25)
            interruption.check()
            self._renew_lease()
            self._check_way()
            sight = self._cluster.watch.sight(self._uid)
            pod = sight.pod
            if pod is not None and (verdict.has_started(pod) or verdict.has_ended(pod)):
                self._note_start(pod)
            if self._ended(sight):
                return sight
            self._note_deletion(sight)
            self._note_silence(sight)
            if pod is None or not verdict.is_running(pod):
                self._explain(sight)
            if self._follower is not None and self._follower.failed.is_set():
                return sight
            if self._note_passed(self._outlook.passed):
                self._stop_at_once()
            wrapper = self._job.wrapper
            if wrapper is not None and self._outlook.program_ended:
                self._linger(wrapper.linger_seconds)
            self._keep_time(sight)

    @staticmethod
    def _ended(sight: Sight) -> bool:
        return sight.gone or (sight.pod is not None and (verdict.has_ended(sight.pod) or verdict.is_orphaned(sight.pod)))

    def _note_deletion(self, sight: Sight) -> None:
        """Say at once that somebody else ends it: its container may take all of its grace.

        Raises:
            ContainerLost: nobody has seen it end for long after that. The cluster shows the pods of a lost node as they last were for as long
                as there is the node.
        """
        if sight.pod is None or self._deleting or not sight.pod["metadata"].get("deletionTimestamp"):
            return
        now, name = time.monotonic(), sight.pod["metadata"]["name"]
        grace = sight.pod["metadata"].get("deletionGracePeriodSeconds") or 0
        if self._gone_by == math.inf:
            self._gone_by = now + grace + _SECONDS_TO_DIE
            self._cluster.tell(
                f"The pod {name} is being deleted, by somebody else or by the cluster; its container has {grace} s to end."
            )
        elif self._cluster.watch.away_since is not None:
            self._gone_by = max(self._gone_by, now + _SECONDS_TO_CATCH_UP)
        elif now > self._gone_by:
            why = (
                f"The node {sight.pod['spec'].get('nodeName')} does not answer"
                if verdict.is_unheard(sight.pod)
                else f"The pod {name} does not die, perhaps because a process in it hangs in the kernel"
            )
            raise ContainerLost(
                f"{why}: it is to be gone for {_SECONDS_TO_DIE:.0f} s beyond its grace, and nobody has seen its end. Run it again."
            )

    def _note_silence(self, sight: Sight) -> None:
        """Say that the node says nothing any more, and that it does again: the cluster waits for minutes before it gives it up."""
        pod = sight.pod
        if pod is not None and self._gone_by == math.inf and verdict.is_unheard(pod) is not self._unheard:
            self._unheard = not self._unheard
            node = pod["spec"].get("nodeName")
            self._cluster.tell(
                f"The node {node} no longer answers, so nothing is known of the algorithm. The cluster waits for it, by default five minutes."
                if self._unheard
                else f"The node {node} answers again."
            )

    def _is_over(self) -> bool:
        """Does nothing of it run any more? A pod whose Job was deleted without it does."""
        sight = self._cluster.watch.sight(self._uid)
        return sight.gone or (sight.pod is not None and verdict.has_ended(sight.pod))

    def _renew_lease(self) -> None:
        if time.monotonic() - self._renewed >= 1.0:
            self._renewed = time.monotonic()
            with contextlib.suppress(FileNotFoundError):
                lease.renew(self._job.lease)

    def _check_way(self) -> None:
        watch = self._cluster.watch
        if isinstance(watch.failure, Refused):
            raise watch.failure.translated("to let this process watch pods") from watch.failure
        if watch.failure is not None:
            raise watch.failure
        if watch.away_since is not None and time.monotonic() - watch.away_since > self._cluster.patience_seconds:
            raise EngineUnavailable(
                f"The cluster at {self._cluster.api.access.server} has not answered for {self._cluster.patience_seconds:.0f} s "
                f"while {self._name} ran. Look at its API server; the run can be retried."
            )

    def _note_start(self, pod: Json) -> None:
        """The container has started: follow its log, and let its time run."""
        if self._follower is not None:
            return
        if self._told:
            self._cluster.tell(f"The pod {pod['metadata']['name']} has started on {pod['spec'].get('nodeName')}.")
        force = spec.in_force(pod, self._cluster.version)
        looser = spec.looser_than_asked(self._job, self._cluster.place, force)
        if looser:
            raise UnsupportedByEngine(
                f"The cluster made {self._name} looser than asked: {', '.join(looser)}. It was stopped. Ask who runs the cluster "
                "what changes its pods."
            )
        self._in_force = force
        now, passed = time.monotonic(), 0.0
        state = verdict.state_of(pod)
        if not self._fresh and (began := parse_time((state.get("running") or {}).get("startedAt") or "")):
            passed = max(0.0, (datetime.now(UTC) - began).total_seconds())
        self._started_at = now - passed
        if self._job.timeout_seconds is not None:
            self._deadlines = self._stops(self._started_at + self._job.timeout_seconds, self._grace)
        path = f"{self._cluster.core('pods')}/{pod['metadata']['name']}/log"
        self._follower = LogFollower(self._cluster.api, path, spec.CONTAINER, self._delivery, self._cluster.patience_seconds)
        self._follower.start()

    @property
    def _grace(self) -> int:
        return max(_AT_ONCE, math.ceil(self._job.stop_grace_seconds))

    @staticmethod
    def _stops(when: float, grace: int) -> list[tuple[float, int | None]]:
        """When to delete the pod, with which grace; and when to give up."""
        return [(when, grace), (when + grace + 20, _AT_ONCE), (when + grace + _SECONDS_TO_DIE, None)]

    def _stop_at_once(self) -> None:
        self._deadlines = self._stops(time.monotonic(), _AT_ONCE)

    def _linger(self, seconds: float) -> None:
        if not (self._lingers or self._deleting):
            self._lingers = True
            self._deadlines = self._stops(time.monotonic() + seconds, self._grace)

    def _note_passed(self, output: Passed | None) -> bool:
        limit, first = self._job.resources.log_bytes, self._passed is None
        if first and self._delivery.overflowed and limit is not None:
            self._passed = Passed(Reason.LOG_TOO_LARGE, limit)
        self._passed = self._passed or output
        return first and self._passed is not None

    def _keep_time(self, sight: Sight) -> None:
        while self._deadlines and time.monotonic() >= self._deadlines[0][0]:
            _, grace = self._deadlines.pop(0)
            if grace is None:
                raise EngineError(
                    f"The pod of {self._name} does not die. Its node is away, or a process in it hangs in the kernel; look at its node."
                )
            if self._passed is None and not self._lingers:
                self._stopped = True
            self._delete_pod(sight, grace)

    def _delete_pod(self, sight: Sight, grace: int) -> None:
        self._deleting = True
        if sight.pod is not None:
            try:
                _delete(self._cluster, f"{self._cluster.core('pods')}/{sight.pod['metadata']['name']}", grace=grace)
            except EngineError as error:
                logger.debug("The pod of %s could not be deleted: %s", self._name, error)

    def _explain(self, sight: Sight) -> None:
        """Say why it waits, where that takes longer than usual; end what waits in vain."""
        now = time.monotonic()
        waited = now - self._began
        pending = self._cluster.place.pending_seconds
        image = self._job.image
        wait = verdict.reason_to_wait(image, sight.pod, self._row, (), login=self._login)
        plain = wait.error is None and not wait.for_room and ":" not in wait.words
        if (plain and waited > _PATIENT_START) or waited > pending:
            if now - self._asked < _ASK_AGAIN:
                return
            self._asked = now
            row = self._look_at_job() if sight.pod is None else self._row
            uids = (self._uid, *([sight.pod["metadata"]["uid"]] if sight.pod else []))
            wait = verdict.reason_to_wait(image, sight.pod, row, self._cluster.watch.events_about(*uids), login=self._login)
        # Its Secret is made a moment after the Job.
        if wait.error is not None and not (
            waited < _SECONDS_FOR_SECRETS and wait.words.startswith("CreateContainerConfigError: secret")
        ):
            raise wait.error
        if wait.for_room and not self._looked_for_room:
            self._looked_for_room = True
            self._refuse_hopeless(wait.words)
        if (wait.for_room or ":" in wait.words or waited > 10) and wait.words != self._told:
            self._told = wait.words
            self._cluster.tell(f"The algorithm waits for its start: {wait.words}")
        if waited > pending:
            raise wait.at_last or NoRoom(
                f"The cluster did not start the algorithm within {pending:g} s. Try again later, or raise OASIS_FLOWS_KUBERNETES_PENDING. "
                f"It said: {wait.words}"
            )

    def _look_at_job(self) -> Json:
        """The Job as it is."""
        try:
            found = self._cluster.watch.job(self._uid, self._began)
        except Refused as error:
            raise error.translated(f"to show {self._name}") from error
        except EngineUnavailable:
            return self._row
        if found is None:
            raise ContainerLost(f"The Job {self._name} vanished before it began. Somebody deleted it; run it again.")
        return found

    def _refuse_hopeless(self, words: str) -> None:
        """Return if there is a node, or may be one, that could take the pod if nothing else ran there.

        Raises:
            NoGpu, NoCapacity: there is none.
        """
        if self._cluster.grows:
            return
        try:
            listing = self._cluster.api.call("GET", "/api/v1/nodes", patience_seconds=0)
        except (Refused, EngineUnavailable) as error:
            logger.debug("Nodes cannot be read: %s", error)
            return
        place, resources = self._cluster.place, self._job.resources
        nodes = kubernetes_nodes(listing, place.gpu_tolerations, place.gpu_resource)
        gpus = resources.gpus if isinstance(resources.gpus, int) else 0
        demand = Demand(cpus=resources.cpus, memory_bytes=resources.memory_bytes, gpus=gpus)
        if not nodes:
            return
        if gpus and max(node.allocatable.gpus for node in nodes) < gpus:
            raise NoGpu(
                f"No node of the cluster has {gpus} {place.gpu_resource}. Install the device plugin, or ask for fewer. "
                f"The cluster said: {words}"
            )
        open_nodes = [_opened(node) for node in nodes]
        if why := too_big(open_nodes, demand, headroom=1.0):
            raise NoCapacity(
                f"No node of the cluster is large enough for the algorithm. Ask for less: {why} The cluster said: {words}"
            )

    def _stop(self) -> None:
        """SIGTERM, and time to react; the log of that time still reaches the sink."""
        follower = self._follower
        assert follower is not None  # noqa: S101 - who calls has looked
        try:
            shielded(lambda: self._delete_pod(self._cluster.watch.sight(self._uid), self._grace))
            until, version = time.monotonic() + self._grace + 5, -1
            while time.monotonic() < until and not self._is_over():
                version = self._cluster.watch.wait(version, 0.25)
                self._renew_lease()
            follower.ended(2.0)
        finally:
            follower.cut()

    def _verdict(self, sight: Sight) -> ContainerExit:
        follower = self._follower
        if sight.pod is not None and verdict.is_orphaned(sight.pod) and not self._is_over():
            raise ContainerLost(
                f"Somebody deleted the Job {self._name} without its pod, which was stopped. Run it again, and delete Jobs with their pods "
                "(propagationPolicy Background)."
            )
        if follower is not None:
            if self._delivery.overflowed:
                follower.cut()
            if follower.failure is None:
                follower.ended(self._log_patience(sight))
            if follower.failure is not None:
                raise follower.failure
        if not self._stopped:
            self._note_passed(self._outlook.at_end())
        pod = sight.pod
        row, events = self._row, list[Json]()
        if self._is_unclear(sight):
            with contextlib.suppress(Refused, EngineUnavailable):
                row = self._cluster.api.call("GET", f"{self._cluster.jobs}/{self._name}")
            uids = (self._uid, *([pod["metadata"]["uid"]] if pod else []))
            events = self._cluster.watch.read_events({"limit": "1000"})
            events = [event for event in events if event["involvedObject"].get("uid") in uids]
        seen = verdict.Seen(
            pod=pod,
            job=row,
            events=events,
            gone=sight.gone,
            in_force=self._in_force,
            stopped=self._stopped,
            passed=self._passed,
            log_head=follower.head if follower else b"",
            log_bytes=self._delivery.bytes["stdout"],
            # Of what is longer than its limit nobody wants the rest.
            log_lost=follower.lost if follower and not self._delivery.overflowed else "",
        )
        exit = verdict.container_exit(self._job, seen)
        if exit.reason is Reason.KILLED and self._deleting:
            raise ContainerLost(f"The container of run {self._job.run_id} was stopped. Run it again.")
        return exit

    def _log_patience(self, sight: Sight) -> float:
        gone = sight.gone or (sight.pod is not None and sight.pod["status"].get("reason") == "Evicted")
        return 2.0 if gone else 30.0

    def _is_unclear(self, sight: Sight) -> bool:
        """Is more needed than the pod's last state to tell why it ended?"""
        if self._stopped or self._passed:
            return False
        pod = sight.pod
        if pod is None or sight.gone or pod["metadata"].get("deletionTimestamp") or pod["status"].get("reason"):
            return True
        ended = verdict.state_of(pod).get("terminated") or {}
        return not ended or (ended["exitCode"] == 137 and ended.get("reason") != "OOMKilled")


def _opened(node: Any) -> Any:
    return replace(node, closed="", requested=Vector())


def wait_until_gone(cluster: Cluster, uids: Iterable[str], seconds: float) -> None:
    """Return when the pods of these Jobs are gone from the cluster, or after so many seconds."""
    until, version = time.monotonic() + seconds, -1
    left = set(uids)
    while left and time.monotonic() < until:
        left = {uid for uid in left if (sight := cluster.watch.sight(uid)).pod is not None and not sight.gone}
        if left:
            version = cluster.watch.wait(version, 0.25)
