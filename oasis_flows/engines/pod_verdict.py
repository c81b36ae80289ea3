"""From what a cluster says of a pod, its Job and their events to why it waits, or how it ended: pure.

A Job never says why it failed, a pod does; where the pod is gone before anybody looked, only what a watch saw last tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from ..capacity import quantity
from ..errors import (
    ContainerLost,
    DescriptionError,
    EngineError,
    Evicted,
    ImageNotFound,
    NoCapacity,
    NoRoom,
    OasisError,
    Preempted,
    RegistryUnavailable,
    UnsupportedByEngine,
)
from ..job import ContainerExit, ContainerJob, Reason
from . import pod as spec
from .docker_errors import pull_error
from .docker_verdict import parse_time, signal_name
from .quota import Passed

Json = Mapping[str, Any]

_ENDED_PHASES = ("Succeeded", "Failed")
_EXEC_FAILED = re.compile(rb"exec /[^\n]*: (exec format error|no such file or directory|permission denied)\n?", re.IGNORECASE)
_QUOTA = re.compile(r"exceeded quota: \S+, requested: (?P<requested>\S+), used: \S+, limited: (?P<limited>\S+)")
_MISSING = re.compile(r'(secret|configmap) "[^"]*" not found|could\S+ find key|hostPath type check failed')
# What kubelet evicts a pod for that has more than it asked for, in kubelet's words; not for the node's own want.
_OWN_EXCESS = re.compile(r"exceeds the (total )?limit|exceeded its local ephemeral storage limit", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Why a pod has not started. `for_room`: the scheduler found no node.

    `error` is given where waiting is of no use; `at_last` is what it is when nobody waits any longer, where that is no want of room.
    """

    words: str
    error: OasisError | None = None
    at_last: OasisError | None = None
    for_room: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was seen of one pod to its end. `pod` is its last state; `gone`: it is in the cluster no more.

    `stopped` and `passed` say that this package ended it: at its time limit, or because it passed a limit. `log_head` is
    how its log began, `log_bytes` how long it was, and `log_lost` is as in `ContainerExit`.
    """

    pod: Json | None
    job: Json | None = None
    events: Sequence[Json] = ()
    gone: bool = False
    in_force: Json = field(default_factory=dict)
    stopped: bool = False
    passed: Passed | None = None
    log_head: bytes = b""
    log_bytes: int = 0
    log_lost: str = ""


def newest(pods: Iterable[Json]) -> Json | None:
    """The pod made last."""
    return max(pods, key=lambda each: (each["metadata"]["creationTimestamp"], each["metadata"]["name"]), default=None)


def state_of(pod: Json) -> Json:
    """The state of the algorithm's container: `waiting`, `running` or `terminated`, as the cluster has it; empty before.

    Of a pod whose initial container failed, that one's: its own never begins.
    """
    status = pod["status"]
    own = next((each for each in status.get("containerStatuses") or () if each["name"] == spec.CONTAINER), None)
    state: Json = (own or {}).get("state") or {}
    if status.get("phase") == "Failed" and "terminated" not in state:
        for each in status.get("initContainerStatuses") or ():
            ended = (each.get("state") or {}).get("terminated")
            if ended and ended["exitCode"] and each.get("name") != spec.CONTAINER:
                return {"terminated": ended}
    return state


def is_running(pod: Json) -> bool:
    """Has the container started, and not ended yet?"""
    return "running" in state_of(pod)


def has_ended(pod: Json) -> bool:
    """Can nothing more come of the pod? That of a sidecar which is still there is no matter."""
    return "terminated" in state_of(pod) or pod["status"].get("phase") in _ENDED_PHASES


def has_started(pod: Json) -> bool:
    """Did the container run at all?"""
    state = state_of(pod)
    return "running" in state or (state.get("terminated") or {}).get("startedAt") is not None


def is_unheard(pod: Json) -> bool:
    """Does its node say nothing any more? Then the cluster takes back that the pod is ready, and leaves what the node said last.

    What is not ready by itself, such as a sidecar, says so in a reason and in another condition.
    """
    told = {each["type"]: each for each in pod["status"].get("conditions") or ()}
    ready, containers = told.get("Ready"), told.get("ContainersReady")
    return (
        ready is not None
        and containers is not None
        and (ready["status"], containers["status"]) == ("False", "True")
        and not ready.get("reason")
    )


def is_orphaned(pod: Json) -> bool:
    """Has its Job been deleted without it?"""
    return not pod["metadata"].get("ownerReferences")


def reason_to_wait(image: str, pod: Json | None, job: Json | None, events: Sequence[Json], *, login: bool = False) -> Wait:
    """Why the container has not started yet."""
    if pod is None:
        return _no_pod(job, events)
    for condition in pod["status"].get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _unscheduled(condition)
    statuses = [
        *(pod["status"].get("initContainerStatuses") or ()),
        *(pod["status"].get("containerStatuses") or ()),
    ]
    waiting = [each["state"]["waiting"] for each in statuses if "waiting" in (each.get("state") or {})]
    for each in waiting:
        if found := _held_up(image, each, login=login):
            return found
    mounts = [event for event in events if event["reason"] in ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")]
    if mounts:
        words = _text(mounts[-1])
        error = None
        if _MISSING.search(words):
            error = EngineError(
                f"What a pod has to mount is not there, and it cannot start. Make it. The cluster said: {words}"
            )
        return Wait(words=words, error=error)
    return Wait(words="its container is being created")


def _text(event: Json) -> str:
    return " ".join(str(event.get("message") or event["reason"]).split())


def _no_pod(job: Json | None, events: Sequence[Json]) -> Wait:
    for condition in ((job or {}).get("status") or {}).get("conditions") or ():
        if condition["type"] == "Suspended" and condition["status"] == "True":
            return Wait(words="its Job is suspended")
    refused = [event for event in events if event["reason"] == "FailedCreate"]
    if not refused:
        return Wait(words="its pod is being made")
    words = _text(refused[-1])
    said = f" The cluster said: {words}"
    error: OasisError | None = None
    if quota := _QUOTA.search(words):
        if _more_than(quota["requested"], quota["limited"]):
            error = NoCapacity(
                f"The algorithm asks for more than its namespace may ever have. Ask for less, or raise the quota.{said}"
            )
    elif re.search(r"(maximum|minimum) \S+ usage per|must be (less|greater) than", words):
        error = NoCapacity(f"The algorithm asks for what its namespace allows to nobody. Ask for other amounts.{said}")
    elif "violates PodSecurity" in words:
        error = UnsupportedByEngine(
            f"The namespace's Pod Security does not admit what the algorithm asks for. Close its sandbox again, or run it elsewhere.{said}"
        )
    elif re.search(r"failed quota|must specify|RuntimeClass", words):
        error = UnsupportedByEngine(
            f"The namespace does not admit the pod. See deployments/kubernetes for what it needs.{said}"
        )
    elif "is forbidden" in words and "service account" not in words:
        # That of a new namespace comes by itself.
        error = UnsupportedByEngine(f"The cluster does not admit the pod. Ask who runs it.{said}")
    return Wait(words=words, error=error)


def _more_than(requested: str, limited: str) -> bool:
    """Is any of `a=1,b=2` more than the same name has in the other?"""
    hard = dict(pair.split("=", 1) for pair in limited.split(",") if "=" in pair)
    asked = dict(pair.split("=", 1) for pair in requested.split(",") if "=" in pair)
    try:
        return any(name in hard and quantity(amount) > quantity(hard[name]) for name, amount in asked.items())
    except ValueError:
        return False


def _unscheduled(condition: Json) -> Wait:
    words = " ".join(str(condition.get("message") or condition.get("reason") or "not scheduled").split())
    if re.search(r'persistentvolumeclaim "[^"]*" (not found|is being deleted)', words):
        error = EngineError(
            f"The claim that the algorithm needs is not there. Make it, or correct OASIS_FLOWS_KUBERNETES_CLAIM or "
            f"OASIS_FLOWS_STORAGES. The cluster said: {words}"
        )
        return Wait(words=words, error=error)
    return Wait(words=words, for_room=condition.get("reason") == "Unschedulable")


def _held_up(image: str, waiting: Json, *, login: bool) -> Wait | None:
    reason, words = waiting.get("reason") or "", " ".join(str(waiting.get("message") or "").split())
    if reason in ("ContainerCreating", "PodInitializing", ""):
        return None
    said = f" The cluster said: {reason}: {words}"
    error: OasisError | None = None
    at_last: OasisError | None = None
    if reason == "ErrImageNeverPull":
        error = ImageNotFound(
            f"There is no image {image} on the node, and it may not be pulled. Put it there, or into a registry.{said}"
        )
    elif reason == "InvalidImageName":
        error = ImageNotFound(f"{image!r} is not an image's name. Write it as registry/name:tag, in lower case.{said}")
    elif reason in ("ErrImagePull", "ImagePullBackOff", "RegistryUnavailable"):
        found = pull_error(image, words, with_login=login)
        if type(found) is not UnsupportedByEngine and re.search(r"code = NotFound|: not found$", words):
            found = ImageNotFound(
                f"There is no image {image}. Check its spelling; a private one needs registry_credentials.{said}"
            )
        # Only of what no further try changes is it worth to stop: everything else kubelet tries again by itself.
        if isinstance(found, RegistryUnavailable):
            at_last = found
        elif type(found) is not EngineError:
            error = found
    elif reason == "CreateContainerConfigError" and (
        _MISSING.search(words) or "runAsNonRoot" in words or "run as root" in words
    ):
        error = DescriptionError(f"The container cannot be made as described. Correct what is named.{said}")
    return Wait(words=f"{reason}: {words}" if words else reason, error=error, at_last=at_last)


def container_exit(job: ContainerJob, seen: Seen) -> ContainerExit:
    """How a container ended.

    Memory comes first: with a killed child even an exit code of 0 says nothing about the output.

    Raises:
        Evicted, Preempted, ContainerLost, NoRoom: somebody else ended it, or it never began; the verdict is unknown.
        EngineError: it could not be started.
    """
    ended = (state_of(seen.pod).get("terminated") or {}) if seen.pod else {}
    killed_for_memory = ended.get("reason") == "OOMKilled"
    if not (killed_for_memory or seen.stopped or seen.passed):
        _refuse_others_end(job, seen, ended)
    reason, detail = _reason(seen, ended)
    limit = job.resources.memory_bytes
    return ContainerExit(
        reason=reason,
        exit_code=None if not ended or ended.get("reason") == "ContainerStatusUnknown" else _exit_code(reason, ended),
        started_at=parse_time(ended.get("startedAt") or ""),
        finished_at=parse_time(ended.get("finishedAt") or ""),
        memory_limit_bytes=limit,
        memory_peak_bytes=limit if killed_for_memory else None,
        timeout_seconds=job.timeout_seconds,
        limit_passed=seen.passed.limit if seen.passed and reason is seen.passed.reason else None,
        in_force=seen.in_force,
        log_lost=seen.log_lost,
        detail=detail,
    )


def _exit_code(reason: Reason, ended: Json) -> int:
    # The runtime says 128 of all that it could not start.
    return {Reason.COMMAND_NOT_FOUND: 127, Reason.NOT_EXECUTABLE: 126, Reason.EXEC_FORMAT: 126}.get(
        reason, int(ended["exitCode"])
    )


def _reason(seen: Seen, ended: Json) -> tuple[Reason, str]:
    code, words = int(ended.get("exitCode", -1)), " ".join(str(ended.get("message") or "").split())
    status = seen.pod["status"] if seen.pod else {}
    if ended.get("reason") == "OOMKilled":
        return Reason.OUT_OF_MEMORY, "" if code == 137 else "a process inside was killed for memory"
    if seen.stopped:
        return Reason.TIMED_OUT, ""
    if seen.passed:
        return seen.passed.reason, ""
    if status.get("reason") == "Evicted":
        return Reason.EVICTED, str(status.get("message") or "")
    if status.get("reason") == "DeadlineExceeded" or _deadline_passed(seen.job):
        return Reason.TIMED_OUT, "stopped by the cluster"
    if ended.get("reason") in ("StartError", "ContainerCannotRun"):
        return _start_failure(words), words
    if (
        (failed := _EXEC_FAILED.fullmatch(seen.log_head))
        and len(seen.log_head) == seen.log_bytes
        and code in (1, 126, 127, 255)
    ):
        said = seen.log_head.decode("utf-8", "replace").strip()
        return _start_failure(failed[1].decode()), said
    if code == 0:
        return Reason.OK, ""
    if code == 137:
        return Reason.KILLED, _killing(seen.events)
    return Reason.EXIT_NONZERO, signal_name(code)


def _killing(events: Sequence[Json]) -> str:
    return next((_text(event) for event in reversed(events) if event["reason"] in ("Unhealthy", "Killing")), "")


def _start_failure(words: str) -> Reason:
    """Which of the ways not to start a command the runtime's words are.

    Raises:
        EngineError: none.
    """
    if spec.PROOF in words:
        raise EngineError(
            "The folder of the workspaces is not on the claim that pods mount, so the algorithm would have had no input. It was "
            "not started. Set OASIS_FLOWS_HOME to where this process has the claim mounted, and OASIS_FLOWS_KUBERNETES_CLAIM "
            f"to its name; or, where it cannot be mounted, OASIS_FLOWS_KUBERNETES_CARRIER. The cluster said: {words}"
        )
    if re.search(r"exec format error", words, re.IGNORECASE):
        return Reason.EXEC_FORMAT
    if re.search(r"permission denied|is a directory", words, re.IGNORECASE):
        return Reason.NOT_EXECUTABLE
    if re.search(r"executable file not found|no such file or directory", words, re.IGNORECASE):
        return Reason.COMMAND_NOT_FOUND
    raise EngineError(f"The node could not start the container. Look at its container runtime. The cluster said: {words}")


def _deadline_passed(job: Json | None) -> bool:
    conditions = ((job or {}).get("status") or {}).get("conditions") or ()
    return any(c["type"] in ("Failed", "FailureTarget") and c.get("reason") == "DeadlineExceeded" for c in conditions)


def _refuse_others_end(job: ContainerJob, seen: Seen, ended: Json) -> None:
    """Return if the container ended by itself, or by a limit that is its own.

    Raises:
        Evicted, Preempted, ContainerLost, NoRoom: see `container_exit`.
    """
    name = f"The container of run {job.run_id}"
    if seen.pod is None:
        if _deadline_passed(seen.job):
            raise NoRoom(f"{name} found no place within its Job's deadline. {_waited(seen.events)}".strip())
        raise ContainerLost(f"{name} vanished before it was seen. Somebody deleted its Job; run it again.")
    status, words = seen.pod["status"], " ".join(str(seen.pod["status"].get("message") or "").split())
    reason, said = status.get("reason") or "", f" The cluster said: {words}" if words else ""
    if reason == "Evicted" and not _OWN_EXCESS.search(words):
        raise Evicted(f"{name} was evicted, because its node ran short. Run it again.{said}")
    if reason.startswith("OutOf") or reason in (
        "UnexpectedAdmissionError",
        "NodeAffinity",
        "NodePorts",
        "TopologyAffinityError",
    ):
        raise NoRoom(f"{name} was turned away by its node ({reason}), where others were first. Run it again.{said}")
    if reason in ("NodeShutdown", "Terminated", "Shutdown"):
        raise Evicted(f"{name} was ended, because its node shuts down. Run it again.{said}")
    for condition in status.get("conditions") or ():
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            why = condition.get("reason") or ""
            told = f" The cluster said: {why}: {' '.join(str(condition.get('message') or '').split())}"
            if why == "PreemptionByScheduler":
                raise Preempted(f"{name} was preempted by a more important pod. Run it again.{told}")
            if why in ("DeletionByPodGC", "DeletionByNodeLifecycle"):
                raise ContainerLost(f"The node of run {job.run_id} is gone. Run it again.{told}")
            raise Evicted(f"{name} was evicted from its node. Run it again.{told}")
    deleted = seen.pod["metadata"].get("deletionTimestamp")
    if _deadline_passed(seen.job):
        if not has_started(seen.pod):
            raise NoRoom(f"{name} found no place within its Job's deadline. {_waited(seen.events)}".strip())
        return
    if any(event["reason"] in ("NodeNotReady", "TaintManagerEviction") for event in seen.events) and deleted:
        raise ContainerLost(f"The node of run {job.run_id} does not answer. Run it again.")
    if (deleted and not _ended_before(seen.pod, ended)) or (not ended and (seen.gone or is_orphaned(seen.pod))):
        raise ContainerLost(f"{name} vanished while it ran. Somebody deleted its Job or its pod; run it again.")
    if ended.get("reason") == "ContainerStatusUnknown" and reason != "Evicted":
        raise ContainerLost(f"The node of run {job.run_id} lost sight of its container. Run it again.")
    if not ended and reason not in ("Evicted", "DeadlineExceeded"):
        raise ContainerLost(f"{name} ended, and nobody can say how. Run it again.{said}")


def _waited(events: Sequence[Json]) -> str:
    told = [event for event in events if event["reason"] in ("FailedScheduling", "FailedCreate", "Failed", "FailedMount")]
    return f"It waited. The cluster said: {_text(told[-1])}" if told else ""


def _ended_before(pod: Json, ended: Json) -> bool:
    """Did the container end by itself, and its pod was deleted only then?

    The time of a deletion is when the grace is over. Kubernetes' times are whole seconds.
    """
    finished = parse_time(ended.get("finishedAt") or "")
    over = parse_time(pod["metadata"]["deletionTimestamp"])
    if finished is None or over is None:
        return False
    return finished < over - timedelta(seconds=int(pod["metadata"].get("deletionGracePeriodSeconds") or 0))
