"""The Kubernetes engine: one Job for each container, on a cluster that has its own scheduler."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from typing import Any

from .. import lease
from ..capacity import Node
from ..errors import EngineError, ImageDenied, ImageNotFound, OasisError, RegistryUnavailable, UnsupportedByEngine
from ..job import ContainerExit, ContainerJob, ImageSource, LogSink, Reason, counted
from ..snapshots import kubernetes_nodes
from . import Description, kube_image, kube_run, pod as spec
from .docker_verdict import parse_time
from .kube_access import Access, find_access
from .kube_api import KubeApi, Refused
from .kube_carry import GRACE_SECONDS, Carriage, find as find_carrier
from .kube_exec import NO_RIGHT
from .kube_watch import PodWatch
from .quota import Outlook, Watch
from .shield import shielded

__all__ = ["KubernetesEngine"]

logger = logging.getLogger(__name__)

# The owner renews its lease once a second. Where the claim's file system keeps locks on one node only, that is all that others see.
_LEAST_GRACE_SECONDS = 15.0
_SECONDS_TO_GO = 10.0
_SECONDS_ABSENT = 30.0
_REVIEWS = "authorization.k8s.io/v1"


class KubernetesEngine:
    """Implements `Engine` with Jobs. To be made once for a process: all that it runs share one watch.

    Args:
        place: where the Jobs run; see `pod.Place`. Its namespace may be empty: then it is that of the access.
        access: finds the API server; `kube_access.find_access` by default.
        images: the repository that image files are pushed to, such as `registry.example.org/algorithms`; its login.
        tell: shows people a line while something waits.
        patience_seconds: how long a run waits for an API server that went away meanwhile.
        grows: the cluster makes nodes when they are needed, so none is too large for it.
    """

    def __init__(
        self,
        place: spec.Place,
        access: Callable[[], Access] = find_access,
        *,
        images: kube_image.Repository | None = None,
        tell: kube_run.Tell = logger.info,
        patience_seconds: float = 600.0,
        grows: bool = False,
    ) -> None:
        self._place, self._find_access, self._images, self._tell = place, access, images, tell
        self._patience, self._grows = patience_seconds, grows
        self._lock, self._closing = threading.Lock(), threading.Lock()
        self._cluster: kube_run.Cluster | None = None
        self._pulled: dict[str, spec.Pulled] = {}
        self._absent: dict[str, float] = {}
        self._failed_on: dict[str, tuple[str, ...]] = {}
        self._closed = False

    @property
    def calls(self) -> Mapping[str, int]:
        """How many requests were made of the API server, by what RBAC calls them, such as `create jobs`."""
        return {} if self._cluster is None else dict(self._cluster.api.calls)

    def prepare(self, image: ImageSource) -> str:
        """Pin the image by the digest that its registry has, or push the image file there unless it is there already.

        A registry that this process cannot reach may be one that the nodes can: then the name is taken as it is, which is
        told. What the nodes have or can pull is found out when the pod starts.

        Raises:
            ImageNotFound, InvalidImageFile, DescriptionError: the description is wrong.
            UnsupportedByEngine: it is an image file, and no registry is named to push it to.
            ImageDenied, RegistryUnavailable, EngineUnavailable: the surroundings are.
        """
        if image.image_file is not None:
            if self._images is None:
                raise UnsupportedByEngine(
                    "An image file has to be pushed to a registry that the cluster pulls from, and none is named. "
                    "Set OASIS_FLOWS_KUBERNETES_REGISTRY, such as registry.example.org/algorithms."
                )
            reference, config = kube_image.push(image.image_file, dict(image.storage_options), self._images)
            self._pulled[reference] = spec.Pulled(config=config, login=self._images.login)
            return reference
        assert image.image_id is not None  # noqa: S101 - ImageSource takes care of it
        try:
            reference, config = kube_image.pin(image.image_id, image.login)
        except (RegistryUnavailable, ImageNotFound, ImageDenied) as error:
            # A registry that this process cannot reach may be one that the nodes can; and a node may have what none has.
            if not isinstance(error, RegistryUnavailable) and not self._is_on_a_node(image.image_id):
                raise
            self._tell(
                f"{image.image_id} is taken by its name, and not by its digest, which its registry does not tell. {error}"
            )
            reference, config = image.image_id, None
        self._pulled[reference] = spec.Pulled(config=config, login=image.login)
        return reference

    def run(self, job: ContainerJob, log: LogSink) -> ContainerExit:
        """Run the job to its end and remove its Job; see the seam's promises.

        A Job of the same `run_id` that an earlier process left is taken up; `log` then gets its output from the beginning, as
        far as its node has it, which is the newest 10 MiB.

        Raises:
            UnsupportedByEngine, NoGpu, NoCapacity, ImageNotFound, ImageDenied, DescriptionError: it could not start.
            NoRoom: it found no place in time.
            EngineUnavailable, ContainerLost, Evicted, Preempted: the verdict is unknown.
        """
        with self._translated(f"to run {spec.job_name(job)}"):
            cluster = self._open()
            with cluster.watch.following():
                fresh = self._was_absent(job)
                if not cluster.place.carrier:
                    return self._run(cluster, job, log, Watch(job), fresh=fresh)
                return self._run_carried(cluster, job, log, fresh=fresh)

    def _run_carried(self, cluster: kube_run.Cluster, job: ContainerJob, log: LogSink, *, fresh: bool) -> ContainerExit:
        carriage = Carriage(cluster, job)
        try:
            carriage.begin(fresh=fresh)
            exit = self._run(carriage.cluster, carriage.job, log, carriage, fresh=fresh)
            if exit.reason.keeps_output:
                carriage.at_end()
            return exit
        finally:
            carriage.leaving = True
            self._remove(cluster, job, carriage.row, GRACE_SECONDS)

    def _run(
        self, cluster: kube_run.Cluster, job: ContainerJob, log: LogSink, outlook: Outlook, *, fresh: bool
    ) -> ContainerExit:
        image = self._pulled.get(job.image, spec.Pulled())
        row: Mapping[str, Any] | None = None
        try:
            row = found = None if fresh else kube_run.find_job(cluster, job)
            if row is None:
                self._close_network(cluster, job)
                place = replace(cluster.place, avoided=self._failed_on.get(job.run_id, ()))
                row = kube_run.create_job(replace(cluster, place=place), job, image)
            login = image.login is not None
            exit = kube_run.Supervision(cluster, job, row, log, outlook, fresh=found is None, login=login).run()
            if exit.reason is Reason.KILLED:
                self._note_failure(cluster, job, row)
            return exit
        except OasisError as error:
            if error.transient and row is not None:
                self._note_failure(cluster, job, row)
            raise
        finally:
            self._remove(cluster, job, row, job.stop_grace_seconds)

    def _note_failure(self, cluster: kube_run.Cluster, job: ContainerJob, row: Mapping[str, Any]) -> None:
        """Have the run's next try begin on another node than this one, if there is one."""
        pod = cluster.watch.sight(row["metadata"]["uid"]).pod
        if pod is not None and (node := pod["spec"].get("nodeName")):
            before = self._failed_on.get(job.run_id, ())
            self._failed_on[job.run_id] = tuple(dict.fromkeys((*before, node)))

    def _is_on_a_node(self, reference: str) -> bool:
        """Does any node say that it has the image, under this very name?"""
        wanted = kube_image.whole_name(reference)
        try:
            nodes = self._open().api.call("GET", "/api/v1/nodes")["items"]
        except (Refused, EngineError):
            return False
        names = {name for node in nodes for image in node["status"].get("images") or () for name in image.get("names") or ()}
        return wanted in names

    def find(self, job: ContainerJob) -> bool:
        """Is there a Job to re-attach to; see `Engine.find`."""
        with self._translated(f"to look for {spec.job_name(job)}"):
            cluster = self._open()
            if cluster.place.carrier:
                found = find_carrier(cluster, job) is not None
            else:
                found = kube_run.find_job(cluster, job) is not None
        if not found:
            self._absent[spec.job_name(job)] = time.monotonic()
        return found

    def _was_absent(self, job: ContainerJob) -> bool:
        """Has `find` just told that there is none? A Job's name is its run's, so nobody else has made one since."""
        return time.monotonic() - self._absent.pop(spec.job_name(job), float("-inf")) < _SECONDS_ABSENT

    def describe(self) -> Description:
        """What the cluster says about itself, and where its jobs have their files."""
        with self._translated("to tell about itself"):
            cluster = self._open()
            claim = self._claim_words(cluster)
            try:
                nodes = self._nodes(cluster, ())
                size = f"{counted(len(nodes), 'node')}, {sum(node.allocatable.millicpus for node in nodes) / 1000:g} cpus"
                gpus: int | None = sum(node.allocatable.gpus for node in nodes)
            except EngineError as error:
                # Whether it has GPUs is then for its scheduler to say.
                size, gpus = f"nodes cannot be read: {error}", None
        resource = cluster.place.gpu_resource
        gpu = f"{gpus} {resource}" if gpus else "on nodes that are not there yet" if self._grows else None
        return Description(
            name=f"Kubernetes {cluster.version}, namespace {cluster.place.namespace}, {size}; {claim}",
            gpu=f"{resource}, of which nobody here may know how many there are" if gpus is None else gpu,
        )

    def nodes(self, *, without: Collection[str] = ()) -> tuple[Node, ...]:
        """The cluster's nodes, less what pods request; see `Engine.nodes`."""
        with self._translated("to show its nodes"):
            return self._nodes(self._open(), without)

    def _nodes(self, cluster: kube_run.Cluster, without: Collection[str]) -> tuple[Node, ...]:
        try:
            nodes = cluster.api.call("GET", "/api/v1/nodes")["items"]
            pods = cluster.api.call("GET", "/api/v1/pods")["items"]
        except Refused as error:
            raise error.translated("to show its nodes and pods") from error
        others = [pod for pod in pods if not any(_is_of(pod, run_id) for run_id in without)]
        return kubernetes_nodes({"items": [*nodes, *others]}, self._place.gpu_tolerations, self._place.gpu_resource)

    def reap(
        self,
        run_id: str | None = None,
        *,
        grace_seconds: float = 60.0,
        below: Path | None = None,
        stop_seconds: float = 0.0,
        drafts: bool = True,  # noqa: ARG002 - a cluster makes no images
    ) -> tuple[str, ...]:
        """Remove Jobs that nobody owns; see `Engine.reap`. One of another claim is left alone: its lease cannot be seen here.

        The lease of a Job's owner lies on the claim, so any process that has the claim mounted may be the one that reaps. At
        least 15 s of silence are waited for, whatever `grace_seconds` says. Where files are carried it lies on the owner's machine, and
        nobody else's process reaps them; a carrier deletes its files itself, a moment later.
        """
        with self._translated("to let Jobs be removed"):
            cluster, gone = self._open(), []
            rows = kube_run.list_jobs(cluster, run_id, with_parts=True)
            if run_id is not None and stop_seconds and rows:
                self._stop_together(cluster, rows, stop_seconds)
            for row in rows:
                with nullcontext(True) if run_id is not None else self._ownerless(cluster, row, grace_seconds, below) as free:
                    if free:
                        kube_run.remove_job(cluster, row)
                        gone.append(kube_run.run_id_of(row))
            for pod in kube_run.list_orphans(cluster, run_id):
                with nullcontext(True) if run_id is not None else self._ownerless(cluster, pod, grace_seconds, below) as free:
                    if free:
                        kube_run.remove_pod(cluster, pod)
                        gone.append(kube_run.run_id_of(pod))
            return tuple(dict.fromkeys(gone))

    def _stop_together(self, cluster: kube_run.Cluster, rows: list[Any], seconds: float) -> None:
        with cluster.watch.following():
            for row in rows:
                kube_run.remove_job(cluster, row)
            time.sleep(0.5)
            kube_run.wait_until_gone(cluster, (row["metadata"]["uid"] for row in rows), seconds)

    @contextmanager
    def _ownerless(self, cluster: kube_run.Cluster, row: Mapping[str, Any], grace: float, below: Path | None) -> Iterator[bool]:
        """Is it certain that nobody owns the Job? While the block lasts its lease, where there is one, stays locked."""
        told = row["metadata"].get("annotations") or {}
        path = cluster.place.home / str(told.get(spec.LEASE) or "")
        ours = below is not None and path.is_relative_to(below)
        carried = told.get(spec.HOST) == gethostname()
        on_claim = not cluster.place.carrier and told.get(spec.CLAIM) == cluster.place.claim
        if carried and not ours:
            grace = max(grace, float(told.get(spec.RETRY_WINDOW) or 0))
        grace = grace if carried else max(grace, _LEAST_GRACE_SECONDS)
        if not told.get(spec.LEASE) or not (carried or on_claim) or ".." in path.parts:
            yield False
        elif lease.missing(path):
            made = parse_time(row["metadata"]["creationTimestamp"])
            age = (datetime.now(UTC) - made).total_seconds() if made else 0.0
            # Nobody's is also what lies on a claim that is not mounted here; of a process outside of the cluster, nobody knows.
            visible = carried or self._is_in_cluster
            yield visible and ours and below is not None and below.is_dir() and age >= grace
        else:
            with lease.taken(path, grace) as free:
                yield free

    @property
    def _is_in_cluster(self) -> bool:
        return bool(self._place.node or self._place.owner)

    def _open(self) -> kube_run.Cluster:
        with self._lock:
            if self._cluster is None:
                access = self._find_access()
                api = KubeApi(access)
                place = self._placed(api)
                watch = PodWatch(api, place.namespace)
                self._cluster = kube_run.Cluster(
                    api=api,
                    place=place,
                    watch=watch,
                    tell=self._tell,
                    version=api.version(),
                    patience_seconds=self._patience,
                    grows=self._grows,
                )
            return self._cluster

    def _placed(self, api: KubeApi) -> spec.Place:
        """The place, with what only the cluster and the access know of it.

        Raises:
            UnsupportedByEngine: the claim lets one pod alone mount it.
        """
        namespace = self._place.namespace or api.access.namespace
        place = replace(self._place, namespace=namespace)
        if place.owner is not None and namespace != api.access.namespace:
            # What owns something has to be in its namespace.
            place = replace(place, owner=None)
        if not place.node and not place.carrier:
            return place
        try:
            claim = api.call("GET", f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{place.claim}")
        except Refused as error:
            logger.debug("The claim %s cannot be looked at: %s", place.claim, error)
            return replace(place, one_node=True)
        modes = claim["spec"].get("accessModes") or ()
        if "ReadWriteMany" in modes:
            return replace(place, node="")
        if list(modes) == ["ReadWriteOncePod"]:
            raise UnsupportedByEngine(
                f"The claim {place.claim} lets one pod alone mount it, and the flow and its algorithm are two. Make it ReadWriteOnce or "
                "ReadWriteMany."
            )
        return replace(place, one_node=True)

    def _close_network(self, cluster: kube_run.Cluster, job: ContainerJob) -> None:
        """See to it that the namespace has the policy that closes the network of pods that ask for none.

        Raises:
            UnsupportedByEngine: it has none, and this process may not make it.
        """
        if job.sandbox.network:
            return
        with self._closing:
            if not self._closed:
                self._look_at_policy(cluster)
                self._closed = True

    def _look_at_policy(self, cluster: kube_run.Cluster) -> None:
        path = f"/apis/networking.k8s.io/v1/namespaces/{cluster.place.namespace}/networkpolicies"
        try:
            try:
                policy = cluster.api.call("GET", f"{path}/{spec.POLICY}")
            except Refused as error:
                if error.status != 404:
                    raise
                policy = _create(cluster.api, path, spec.network_policy(cluster.place.namespace))
        except Refused as error:
            raise UnsupportedByEngine(
                f"Nothing closes the network of algorithms in the namespace {cluster.place.namespace}, so none is started. Apply "
                f"deployments/kubernetes, or write `network: true`. The cluster said: {error.words}"
            ) from error
        if not spec.closes_the_network(policy):
            raise UnsupportedByEngine(
                f"The NetworkPolicy {spec.POLICY} of the namespace {cluster.place.namespace} no longer closes the network of algorithms. "
                "Apply deployments/kubernetes again, or write `network: true`."
            )

    def _claim_words(self, cluster: kube_run.Cluster) -> str:
        """Where the workspace is, and how this process and pods both get at it."""
        place = cluster.place
        path = f"{cluster.core('persistentvolumeclaims')}/{place.claim}"
        try:
            claim = cluster.api.call("GET", path)
        except Refused as error:
            if error.status != 404:
                return f"the claim {place.claim} cannot be looked at ({error.words})"
            raise EngineError(
                f"The namespace {place.namespace} has no claim {place.claim}, where pods would have their files. Apply "
                "deployments/kubernetes, or set OASIS_FLOWS_KUBERNETES_CLAIM."
            ) from error
        modes = claim["spec"].get("accessModes") or []
        phase = claim["status"].get("phase", "unknown")
        said = f"claim {place.claim} ({', '.join(modes)}, {phase})"
        if place.carrier:
            self._check_exec(cluster)
            where = "beside their carrier" if place.one_node else "on any node"
            return f"{said}, not mounted here: files are carried by Jobs of the image {place.carrier}; algorithms run {where}"
        where = f"beside this process on {place.node}" if place.node else "on any node"
        # A process outside of the cluster cannot know; each Job proves it.
        known = "" if self._is_in_cluster else "taken to be "
        return f"{said}, {known}mounted here at {place.home}; algorithms run {where}"

    def _check_exec(self, cluster: kube_run.Cluster) -> None:
        """Return if this process may start the programs that files are carried by.

        Raises:
            EngineError: it may not.
        """
        asked = {"namespace": cluster.place.namespace, "verb": "get", "resource": "pods", "subresource": "exec"}
        body = {"apiVersion": _REVIEWS, "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": asked}}
        try:
            found = cluster.api.call("POST", f"/apis/{_REVIEWS}/selfsubjectaccessreviews", body)
        except Refused as error:
            logger.debug("Rights cannot be asked for: %s", error)
            return
        if not found["status"].get("allowed"):
            raise EngineError(NO_RIGHT)

    def _remove(
        self, cluster: kube_run.Cluster, job: ContainerJob, row: Mapping[str, Any] | None, grace_seconds: float
    ) -> None:
        """Remove what is left of a run; when the cluster is away, its lease says later that nobody owns it."""

        def remove() -> None:
            rows = [row] if row is not None else kube_run.list_jobs(cluster, job.run_id)
            for each in rows:
                kube_run.remove_job(cluster, each)
            uids = [each["metadata"]["uid"] for each in rows]
            kube_run.wait_until_gone(cluster, uids, _SECONDS_TO_GO + grace_seconds)
            for each in rows:
                cluster.watch.forget(each["metadata"]["uid"])

        try:
            with self._translated("to let a Job be removed"):
                shielded(remove)
        except OasisError as error:
            logger.warning("The Job of run %s may be left behind, for the reaper to remove: %s", job.run_id, error)

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Refused as error:
            raise error.translated(doing) from error


def _create(api: KubeApi, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return api.call("POST", path, body)
    except Refused as error:
        if error.status == 409:
            return api.call("GET", f"{path}/{body['metadata']['name']}")
        raise


def _is_of(pod: Mapping[str, Any], run_id: str) -> bool:
    told = str((pod["metadata"].get("annotations") or {}).get(spec.RUN_ID, ""))
    return bool(re.fullmatch(re.escape(run_id) + r"(\..*)?", told))
