"""A double of a Kubernetes API server, over HTTP: it plays recorded pods for the Jobs that are made, and cuts what is told to.

What it does not prove: that a real API server takes our bodies (`tests/unit/test_pod.py` holds them against its schemas), that a
scheduler, kubelet or runtime does what they say (sandbox, limits, mounts), how fast anything is, or what a kubelet's log does
while it is turned over. All that is for the contract suite on a real cluster, which `KUBECONFIG` names.

Answers have the shapes, fields and texts of the recordings of v1.32 in `tests/fixtures/kubernetes`.
"""

from __future__ import annotations

import copy
import json
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from oasis_flows.engines.kube_api import _verb
from oasis_flows.engines.pod import CARRIER
from tests.servers.kube_exec import exec_server, program, splice

OUTCOMES: dict[str, Any] = json.loads((Path(__file__).parents[1] / "fixtures/kubernetes/outcomes.json").read_text())
NODE = json.loads((Path(__file__).parents[1] / "fixtures/kubernetes/capacity.json").read_text())["items"][0]


@dataclass
class Script:
    """What becomes of each Job: states of its pod, one after the other, each after so many seconds; and its log.

    `log` are lines, written when the container runs. Without states no pod is ever made. `events` are about Job and pod.
    `work` is done before the first state, with where the claim's mounts are. A carrier has no script: it runs.
    """

    states: Sequence[tuple[float, dict[str, Any]]] = ()
    log: Sequence[bytes] = (b"begun\n",)
    events: Sequence[dict[str, Any]] = ()
    work: Callable[[dict[str, Path]], object] = lambda mounts: None


def status(name: str) -> dict[str, Any]:
    """The last state of a recorded pod."""
    found = OUTCOMES[name]
    pods = found.get("pods") or [found["watched"]]
    return dict(pods[0]["status"])


def running() -> dict[str, Any]:
    """The state of a pod whose container runs."""
    found = copy.deepcopy(status("54-delete-default-propagation"))
    found["containerStatuses"][0]["state"] = {"running": {"startedAt": _now()}}
    return found


def ended(name: str = "01-success") -> dict[str, Any]:
    """A recorded end, now."""
    found = copy.deepcopy(status(name))
    for each in found.get("containerStatuses") or ():
        if "terminated" in each["state"]:
            each["state"]["terminated"] |= {"startedAt": _now(), "finishedAt": _now()}
    return found


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclass
class Double:
    """The state of the cluster, and what was asked of it. `calls` are verbs as RBAC names them."""

    script: Script = field(default_factory=Script)
    calls: list[str] = field(default_factory=list)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, list[tuple[float, bytes]]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    version: int = 100
    forgets_before: int = 0
    away: bool = False
    watches: int = 0
    most_watches: int = 0
    epoch: int = 0
    seconds_to_die: float = 0.05
    # After so many bytes a log's connection is cut, once for each number.
    cut_log_after: list[int] = field(default_factory=list)
    # The same of connections to a program; and where the claim is, and what runs of carriers.
    cut_exec_after: list[int] = field(default_factory=list)
    claim: Path | None = None
    may_exec: bool = True
    # A kind of which no more may be made.
    refuses: str = ""
    exec_port: int = 0
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def emit(self, kind: str, pod: dict[str, Any]) -> None:
        """Tell a change of a pod to all watches."""
        with self.changed:
            self.version += 1
            pod["metadata"]["resourceVersion"] = str(self.version)
            self.history.append({"version": self.version, "type": kind, "object": copy.deepcopy(pod)})
            self.changed.notify_all()

    def cut(self) -> None:
        """Break every connection that is open."""
        with self.changed:
            self.epoch += 1
            self.changed.notify_all()

    def make_job(self, body: dict[str, Any]) -> dict[str, Any]:
        job = copy.deepcopy(body)
        job["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": _now(), "resourceVersion": "1"}
        job["status"] = {}
        self.jobs[job["metadata"]["name"]] = job
        threading.Thread(target=self._play, args=(job, copy.copy(self.script)), daemon=True).start()
        return job

    def _carry(self, pod: dict[str, Any], name: str) -> None:
        """Run a carrier, to its end."""
        assert self.claim is not None
        container = pod["spec"]["containers"][0]
        process = program([*container["command"], *container["args"]], self.claim, stderr=subprocess.STDOUT)
        self.processes[name] = process
        pod["status"] = running()
        self.emit("MODIFIED", pod)
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                with self.changed:
                    self.logs[name].append((time.time(), line))
                    self.changed.notify_all()
        process.wait()
        if name in self.pods and "deletionTimestamp" not in pod["metadata"]:
            pod["status"] = ended("02-exit-3")
            self.emit("MODIFIED", pod)

    def _mounts(self, pod: dict[str, Any]) -> dict[str, Path]:
        mounts = pod["spec"]["containers"][0]["volumeMounts"]
        return {each["mountPath"]: self.claim / each.get("subPath", "") for each in mounts} if self.claim else {}

    def _play(self, job: dict[str, Any], script: Script) -> None:
        if not script.states:
            return
        template, uid = job["spec"]["template"], job["metadata"]["uid"]
        name = job["metadata"]["name"] + "-abcde"
        labels = {**template["metadata"]["labels"], "batch.kubernetes.io/controller-uid": uid}
        metadata = {"name": name, "namespace": "flows", "uid": str(uuid.uuid4()), "creationTimestamp": _now(), "labels": labels}
        metadata |= {"annotations": template["metadata"]["annotations"], "ownerReferences": [{"kind": "Job", "uid": uid}]}
        pod = {
            "metadata": metadata,
            "spec": {**copy.deepcopy(template["spec"]), "nodeName": "k8s-node"},
            "status": {"phase": "Pending"},
        }
        self.pods[name], self.logs[name] = pod, []
        self.emit("ADDED", pod)
        if CARRIER in labels:
            self._carry(pod, name)
            return
        script.work(self._mounts(pod))
        for after, state in script.states:
            time.sleep(after)
            if name not in self.pods:
                return
            pod["status"] = state
            self.emit("MODIFIED", pod)
            if "running" in json.dumps(state.get("containerStatuses", ())):
                with self.changed:
                    self.logs[name] += [(time.time() + number * 1e-6, line) for number, line in enumerate(script.log)]
                    self.changed.notify_all()

    def delete_pod(self, name: str, code: int = 143) -> None:
        """As the cluster does: told, ended, gone."""
        pod = self.pods.get(name)
        if pod is None:
            return
        pod["metadata"] |= {"deletionTimestamp": _now(), "deletionGracePeriodSeconds": 1}
        self.emit("MODIFIED", pod)

        def die() -> None:
            if process := self.processes.get(name):
                process.terminate()
                process.wait()
            time.sleep(self.seconds_to_die)
            for each in pod["status"].get("containerStatuses") or ():
                if "running" in each["state"]:
                    times = {"startedAt": each["state"]["running"]["startedAt"], "finishedAt": _now()}
                    each["state"] = {"terminated": {"exitCode": code, "reason": "Error", **times}}
            pod["status"]["phase"] = "Failed"
            self.emit("MODIFIED", pod)
            self.pods.pop(name, None)
            self.emit("DELETED", pod)

        threading.Thread(target=die, daemon=True).start()

    def delete_job(self, name: str, policy: str | None) -> None:
        """As the cluster does; without a policy the pod stays, and is nobody's."""
        job = self.jobs.pop(name)
        for key, each in list(self.others.items()):
            if any(owner["uid"] == job["metadata"]["uid"] for owner in each.get("metadata", {}).get("ownerReferences", ())):
                del self.others[key]
        for each in [
            p
            for p in self.pods.values()
            if p["metadata"]["labels"].get("batch.kubernetes.io/controller-uid") == job["metadata"]["uid"]
        ]:
            if policy in ("Background", "Foreground"):
                self.delete_pod(each["metadata"]["name"])
            else:
                del each["metadata"]["ownerReferences"]
                self.emit("MODIFIED", each)

    def has_ended(self, name: str) -> bool:
        pod = self.pods.get(name)
        return pod is None or "terminated" in json.dumps(pod["status"].get("containerStatuses", ()))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    double: Double

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, code: int, reason: str, message: str) -> None:
        self._answer(code, {"kind": "Status", "status": "Failure", "reason": reason, "message": message, "code": code})

    def _route(self) -> None:
        double, parts = self.double, urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        if double.away:
            self.close_connection = True
            return
        double.calls.append(_verb(self.command, parts.path, query))
        if parts.path.endswith("/exec") and not double.may_exec:
            self._refuse(403, "Forbidden", 'cannot get resource "pods/exec"')
            return
        if parts.path.endswith("/exec"):
            head = f"{self.requestline}\r\n{self.headers}".replace("\r\n", "\n").replace("\n", "\r\n").encode()
            self.close_connection = True
            splice(self.connection, head, double.exec_port)
            return
        names = parts.path.strip("/").split("/")
        kind = names[names.index("namespaces") + 2] if "namespaces" in names else names[-1]
        last = names[names.index(kind) + 1 :]
        getattr(self, f"_{self.command.lower()}_{kind}", self._unknown)(last, query, body)

    do_GET = do_POST = do_DELETE = _route  # noqa: N815 - so the base class finds them

    def _unknown(self, *_: Any) -> None:
        self._refuse(404, "NotFound", f"the server could not find the requested resource: {self.path}")

    def _get_version(self, *_: Any) -> None:
        self._answer(200, {"gitVersion": "v1.32.13"})

    def _get_nodes(self, *_: Any) -> None:
        self._answer(200, {"items": [NODE]})

    def _get_events(self, *_: Any) -> None:
        uids = [job["metadata"]["uid"] for job in self.double.jobs.values()]
        uids += [pod["metadata"]["uid"] for pod in self.double.pods.values()]
        told = [
            {**event, "metadata": {"creationTimestamp": _now()}, "involvedObject": {"uid": uid}}
            for event in self.double.script.events
            for uid in uids
        ]
        self._answer(200, {"items": told})

    def _get_jobs(self, last: list[str], query: dict[str, str], _: Any) -> None:
        if last:
            job = self.double.jobs.get(last[0])
            if job is None:
                self._refuse(404, "NotFound", f'jobs.batch "{last[0]}" not found')
            else:
                self._answer(200, job)
            return
        self._answer(200, {"items": [job for job in self.double.jobs.values() if _matches(job, query)]})

    def _post_jobs(self, _: Any, __: Any, body: dict[str, Any]) -> None:
        if self.double.refuses == "jobs":
            self._refuse(403, "Forbidden", "exceeded quota: q, requested: count/jobs.batch=1, used: 5, limited: 5")
        elif body["metadata"]["name"] in self.double.jobs:
            self._refuse(409, "AlreadyExists", f'jobs.batch "{body["metadata"]["name"]}" already exists')
        else:
            self._answer(201, self.double.make_job(body))

    def _delete_jobs(self, last: list[str], _: Any, body: dict[str, Any]) -> None:
        if last[0] not in self.double.jobs:
            self._refuse(404, "NotFound", f'jobs.batch "{last[0]}" not found')
            return
        self.double.delete_job(last[0], body.get("propagationPolicy"))
        self._answer(200, {"kind": "Status"})

    def _post_selfsubjectaccessreviews(self, _: Any, __: Any, body: dict[str, Any]) -> None:
        self._answer(201, {**body, "status": {"allowed": self.double.may_exec}})

    def _get_networkpolicies(self, last: list[str], *_: Any) -> None:
        self._get_other("networkpolicies", last)

    def _post_networkpolicies(self, _: Any, __: Any, body: dict[str, Any]) -> None:
        self.double.others["networkpolicies/" + body["metadata"]["name"]] = body
        self._answer(201, body)

    def _get_persistentvolumeclaims(self, last: list[str], *_: Any) -> None:
        self._get_other("persistentvolumeclaims", last)

    def _get_other(self, kind: str, last: list[str]) -> None:
        found = self.double.others.get(f"{kind}/{last[0]}")
        if found is None:
            self._refuse(404, "NotFound", f'{kind} "{last[0]}" not found')
        else:
            self._answer(200, found)

    def _post_secrets(self, _: Any, __: Any, body: dict[str, Any]) -> None:
        self.double.others["secrets/" + body["metadata"]["name"]] = body
        self._answer(201, body)

    def _delete_secrets(self, last: list[str], *_: Any) -> None:
        self.double.others.pop(f"secrets/{last[0]}", None)
        self._answer(200, {"kind": "Status"})

    def _delete_pods(self, last: list[str], *_: Any) -> None:
        self.double.delete_pod(last[0])
        self._answer(200, {"kind": "Status"})

    def _get_pods(self, last: list[str], query: dict[str, str], _: Any) -> None:
        if len(last) == 2:
            self._log(last[0], query)
        elif query.get("watch"):
            self._watch(int(query["resourceVersion"]))
        else:
            pods = [pod for pod in self.double.pods.values() if _matches(pod, query)]
            self._answer(200, {"metadata": {"resourceVersion": str(self.double.version)}, "items": pods})

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _watch(self, version: int) -> None:
        double, epoch = self.double, self.double.epoch
        self._begin()
        if version < double.forgets_before:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version", "metadata": {}}
            self._chunk(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
            self._chunk(b"")
            return
        with double.changed:
            double.watches += 1
            double.most_watches = max(double.most_watches, double.watches)
        try:
            while True:
                with double.changed:
                    double.changed.wait_for(
                        lambda seen=version: double.epoch != epoch or any(e["version"] > seen for e in double.history), 0.5
                    )
                    if double.epoch != epoch:
                        self.close_connection = True
                        return
                    new = [event for event in double.history if event["version"] > version]
                for event in new:
                    version = event["version"]
                    self._chunk(json.dumps({"type": event["type"], "object": event["object"]}).encode() + b"\n")
                if not new:
                    bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(version)}}}
                    self._chunk(json.dumps(bookmark).encode() + b"\n")
        finally:
            with double.changed:
                double.watches -= 1

    def _log(self, name: str, query: dict[str, str]) -> None:
        double, epoch = self.double, self.double.epoch
        if name not in double.logs:
            self._refuse(404, "NotFound", f'pods "{name}" not found')
            return
        self._begin()
        since, sent, at = query.get("sinceTime", ""), 0, 0
        cut = double.cut_log_after.pop(0) if double.cut_log_after else None
        while True:
            with double.changed:
                double.changed.wait_for(
                    lambda seen=at: double.epoch != epoch or len(double.logs[name]) > seen or double.has_ended(name), 0.1
                )
                lines, over = double.logs[name][at:], double.has_ended(name)
            if double.epoch != epoch:
                self.close_connection = True
                return
            for moment, line in lines:
                stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f"{moment % 1:.9f}"[1:] + "Z"
                # Kubelet ignores the fraction of the second.
                if stamp[:19] + "Z" >= since:
                    data = stamp.encode() + b" " + line
                    if cut is not None and sent + len(data) > cut:
                        self._chunk(data[: max(1, cut - sent)])
                        self.close_connection = True
                        return
                    sent += len(data)
                    self._chunk(data)
            at += len(lines)
            if over and not lines:
                self._chunk(b"")
                return


def _matches(thing: dict[str, Any], query: dict[str, str]) -> bool:
    wanted = dict(pair.split("=", 1) for pair in query.get("labelSelector", "").split(",") if pair)
    return wanted.items() <= thing["metadata"].get("labels", {}).items()


@contextmanager
def double_of_a_cluster(claim: Path | None = None) -> Iterator[tuple[Double, str]]:
    """A double, and its address, for the time of the block; with a folder for a claim, carriers run there."""
    with ExitStack() as stack:
        double = Double(claim=claim)
        if claim is not None:
            double.exec_port = stack.enter_context(exec_server(claim, double.cut_exec_after))
        yield double, stack.enter_context(_served(double))
        for process in double.processes.values():
            process.kill()
            process.wait()


@contextmanager
def _served(double: Double) -> Iterator[str]:
    handler = type("Handler", (_Handler,), {"double": double})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        double.cut()
        server.shutdown()
        server.server_close()
