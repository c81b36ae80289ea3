"""One watch of a namespace's pods for all Jobs that a process follows; one look at its events and Jobs for all that wait."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import EngineUnavailable
from .kube_api import KubeApi, Refused
from .pod import SELECTOR
from .pod_verdict import newest
from .shield import shielded

logger = logging.getLogger(__name__)
Json = Mapping[str, Any]

_UID = "batch.kubernetes.io/controller-uid"
# The server ends a watch then, and it goes on where it was; without any word of it for much longer the way is blocked.
_WATCH_SECONDS = 240
_EVENTS_SECONDS, _JOBS_SECONDS = 2.0, 1.0
_LINE_LIMIT = 64 << 20


@dataclass(frozen=True, slots=True)
class Sight:
    """The last that was seen of a Job's newest pod; `gone` when it is in the cluster no more, `None` when none was seen."""

    pod: Json | None
    gone: bool


class PodWatch:
    """Follows the pods of this package in one namespace, as long as anybody is interested; see `following`.

    `away_since` is the monotonic time since when the server has not answered, or `None`.
    """

    def __init__(self, api: KubeApi, namespace: str) -> None:
        self._api, self._namespace = api, namespace
        self._path = f"/api/v1/namespaces/{namespace}/pods"
        self._changed = threading.Condition()
        self._pods: dict[str, dict[str, Json]] = {}
        self._gone: dict[str, set[str]] = {}
        self._version, self._interested = 0, 0
        # Stands for the thread that watches now: one that finds another here is out of date.
        self._turn: object | None = None
        self._response: Any = None
        self._events: tuple[float, Sequence[Json]] = (float("-inf"), ())
        self._jobs: tuple[float, Mapping[str, Json]] = (float("-inf"), {})
        self._asking = threading.Lock()
        self.away_since: float | None = None
        self.failure: Exception | None = None

    @contextmanager
    def following(self) -> Iterator[None]:
        """Watch until the block ends. To be entered before a Job is made, so that nothing of its pod is missed."""
        try:
            shielded(self._join)
            yield
        finally:
            with self._changed:
                self._interested -= 1
                if not self._interested:
                    self._turn = None
                    self._hang_up()
                    self._pods, self._gone = {}, {}

    def _join(self) -> None:
        with self._changed:
            self._interested += 1
            if self._turn is None:
                self.failure, self.away_since, self._turn = None, None, object()
                name = f"oasis-watch-{self._namespace}"
                threading.Thread(target=self._work, args=(self._turn,), name=name, daemon=True).start()

    def sight(self, uid: str) -> Sight:
        """What is known of the pod of the Job with this uid."""
        with self._changed:
            pods = self._pods.get(uid, {})
            pod = newest(pods.values())
            gone = pod is not None and pod["metadata"]["uid"] in self._gone.get(uid, ())
            return Sight(pod, gone)

    def wait(self, version: int, seconds: float) -> int:
        """Return once anything has changed since `version`, or after so many seconds; the version by then."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, seconds)
            return self._version

    def forget(self, uid: str) -> None:
        """Nobody asks for this Job any more."""
        with self._changed:
            self._pods.pop(uid, None)
            self._gone.pop(uid, None)

    def events_about(self, *uids: str) -> list[Json]:
        """The warnings about these objects, oldest first; not older than two seconds, whoever asked for them."""
        with self._asking:
            asked, events = self._events
            if time.monotonic() - asked >= _EVENTS_SECONDS:
                events = self.read_events({"fieldSelector": "type=Warning", "limit": "500"})
                self._events = (time.monotonic(), events)
        return [event for event in events if event["involvedObject"].get("uid") in uids]

    def job(self, uid: str, made: float) -> Json | None:
        """A Job made before the monotonic time `made`, as it was at most a second ago, whoever asked then; `None` when it was gone.

        Raises:
            Refused: Jobs may not be listed.
            EngineUnavailable: the server does not answer.
        """
        with self._asking:
            asked, jobs = self._jobs
            if asked < max(made, time.monotonic() - _JOBS_SECONDS):
                path, began = f"/apis/batch/v1/namespaces/{self._namespace}/jobs", time.monotonic()
                found = self._api.call("GET", path, query={"labelSelector": SELECTOR}, patience_seconds=0)
                jobs = {job["metadata"]["uid"]: job for job in found["items"]}
                self._jobs = (began, jobs)
        return jobs.get(uid)

    def read_events(self, query: Mapping[str, str]) -> list[Json]:
        """Events of the namespace, oldest first; none where they may not be read, or nobody answers."""
        try:
            found = self._api.call("GET", f"/api/v1/namespaces/{self._namespace}/events", query=query, patience_seconds=0)
        except (Refused, EngineUnavailable) as error:
            logger.debug("Events of %s cannot be read: %s", self._namespace, error)
            return []
        return sorted(found["items"], key=_time_of)

    def _work(self, turn: object) -> None:
        version, pause = "", 1.0
        while self._turn is turn:
            try:
                version = version or self._list()
                version = self._follow(turn, version)
                self.away_since, pause = None, 1.0
            except Refused as error:
                if error.status in (401, 403, 404):
                    self._fail(turn, error)
                    return
                version = ""
                time.sleep(pause)
            except (EngineUnavailable, OSError, ValueError) as error:
                if self._turn is not turn:
                    return
                self.away_since = self.away_since or time.monotonic()
                logger.debug("The watch of %s broke: %s", self._namespace, error)
                time.sleep(pause)
                pause = min(pause * 2, 5.0)
            except Exception as error:  # noqa: BLE001 - who waits has to hear of it
                self._fail(turn, error)
                return

    def _fail(self, turn: object, error: Exception) -> None:
        with self._changed:
            if self._turn is turn:
                self._turn, self.failure = None, error
                self._version += 1
                self._changed.notify_all()

    def _list(self) -> str:
        """Take all pods as they are; of those that are there no more, note that. Return where a watch goes on."""
        found = self._api.call("GET", self._path, query={"labelSelector": SELECTOR}, patience_seconds=0)
        self.away_since = None
        there = set()
        with self._changed:
            for pod in found["items"]:
                there.add(pod["metadata"]["uid"])
                self._put(pod)
            for uid, pods in self._pods.items():
                missing = {pod["metadata"]["uid"] for pod in pods.values()} - there
                self._gone.setdefault(uid, set()).update(missing)
            self._version += 1
            self._changed.notify_all()
        return str(found["metadata"]["resourceVersion"])

    def _follow(self, turn: object, version: str) -> str:
        """Take changes until the server ends the watch; return where the next one goes on, empty where anew."""
        import urllib3

        query = {
            "watch": "true",
            "labelSelector": SELECTOR,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        with self._api.stream(self._path, query) as response:
            self._response = response
            self.away_since = None
            try:
                for line in _lines(response):
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        # 410: what was since then is forgotten there.
                        return ""
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        self._take(turn, event)
            except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
                if self._turn is turn:
                    raise EngineUnavailable(f"The watch of {self._namespace} broke. The cause: {error}") from error
            finally:
                if self._response is response:
                    self._response = None
        return version

    def _take(self, turn: object, event: Json) -> None:
        with self._changed:
            if self._turn is not turn:
                return
            pod = event["object"]
            self._put(pod)
            if event["type"] == "DELETED":
                self._gone.setdefault(_job_of(pod), set()).add(pod["metadata"]["uid"])
            self._version += 1
            self._changed.notify_all()

    def _put(self, pod: Json) -> None:
        self._pods.setdefault(_job_of(pod), {})[pod["metadata"]["uid"]] = pod

    def _hang_up(self) -> None:
        """End the watch's connection, which waits in a thread of its own."""
        response = self._response
        if response is not None:
            with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
                response.shutdown()


def _job_of(pod: Json) -> str:
    return str((pod["metadata"].get("labels") or {}).get(_UID, ""))


def _time_of(event: Json) -> str:
    # The scheduler's events have one of these, kubelet's and the controllers' the others.
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")


def _lines(response: Any) -> Iterator[bytes]:
    rest = b""
    while True:
        data = response.read1(1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _LINE_LIMIT:
            raise ValueError("an object of more than 64 MiB")
        yield from (line for line in lines if line)
