"""Jobs in Kubernetes' words, held against its published schemas; and recorded ends of v1.32, each with what it means.

The schemas are those that the PyPI package kubernetes-validate ships. The outcomes were recorded on a real cluster.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings, strategies as st
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from oasis_flows.engines import kube_carry, pod as spec, pod_verdict as verdict
from oasis_flows.engines.quota import Passed
from oasis_flows.errors import (
    ContainerLost,
    DescriptionError,
    EngineError,
    Evicted,
    ImageDenied,
    ImageNotFound,
    NoCapacity,
    NoRoom,
    OasisError,
    Preempted,
    RegistryUnavailable,
    UnsupportedByEngine,
)
from oasis_flows.job import ContainerJob, Mount, Reason, RegistryLogin, Resources, Sandbox, StorageMount, Wrapper

HOME = Path("/home/of/oasis")
LEASE = HOME / "workspaces/r/lease"
PLACE = spec.Place(namespace="flows", claim="work", home=HOME)
JOB = ContainerJob(run_id="r", image="example.org/i@sha256:1", lease=LEASE, timeout_seconds=5, user="1000:1000")
OUTCOMES: dict[str, Any] = json.loads((Path(__file__).parents[1] / "fixtures/kubernetes/outcomes.json").read_text())


@cache
def schema(kind: str) -> jsonschema.Draft202012Validator:
    """What Kubernetes 1.32 publishes about a kind, with no field beyond it."""
    folder = files("kubernetes_validate") / "kubernetes-json-schema/v1.32.0-local-strict"
    definitions = DRAFT202012.create_resource(json.loads((folder / "_definitions.json").read_text()))
    registry = Registry().with_resource("/api/_definitions.json", definitions)
    return jsonschema.Draft202012Validator(json.loads((folder / f"{kind}.json").read_text()), registry=registry)


KINDS = {"Job": "job-batch-v1", "Secret": "secret-v1", "NetworkPolicy": "networkpolicy-networking-v1"}


def body(job: ContainerJob = JOB, image: spec.Pulled | None = None, place: spec.Place = PLACE) -> dict[str, Any]:
    """The Job's body, which the schemas take."""
    found = spec.job_body(job, place, image or spec.Pulled())
    row = {"metadata": {"name": "j", "uid": "u"}}
    made = [found, spec.secret_values(job, place, row), spec.pull_secret(job, place, image or spec.Pulled())]
    for each in filter(None, made):
        schema(KINDS[each["kind"]]).validate(json.loads(json.dumps(each)))
    return found


def pod_of(found: dict[str, Any]) -> dict[str, Any]:
    return dict(found["spec"]["template"]["spec"])


def container_of(found: dict[str, Any]) -> dict[str, Any]:
    return dict(pod_of(found)["containers"][0])


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
jobs = st.builds(
    ContainerJob,
    run_id=st.from_regex(r"[ -~]{1,90}", fullmatch=True),
    image=st.just("example.org/i:1"),
    lease=st.just(LEASE),
    attempt=st.integers(1, 99),
    entrypoint=st.none() | st.lists(words, min_size=1, max_size=3).map(tuple),
    command=st.none() | st.lists(words, min_size=1, max_size=3).map(tuple),
    environment=st.dictionaries(st.from_regex(r"[A-Z_]{1,8}", fullmatch=True), words, max_size=3),
    secret_environment=st.dictionaries(st.from_regex(r"s[a-z]{1,8}", fullmatch=True), words, max_size=3),
    user=st.sampled_from(["", "0:0", "1000", "1000:100"]),
    mounts=st.just((Mount(source=HOME / "workspaces/r/input", target="/work/input", read_only=True),)),
    storages=st.sampled_from([(), (StorageMount(source="data", target="/mnt/data", read_only=False),)]),
    resources=st.builds(
        Resources,
        cpus=st.floats(0.001, 64),
        memory_bytes=st.integers(1 << 20, 1 << 40),
        shm_bytes=st.none() | st.integers(1, 1 << 30),
        tmp_bytes=st.none() | st.integers(1, 1 << 30),
        gpus=st.integers(0, 8),
    ),
    sandbox=st.builds(
        Sandbox,
        network=st.booleans(),
        writable_root=st.booleans(),
        new_privileges=st.booleans(),
        capabilities=st.sampled_from([(), ("SYS_PTRACE",), ("CAP_SYS_ADMIN",)]),
    ),
    timeout_seconds=st.none() | st.floats(0.1, 1e6),
    stop_grace_seconds=st.floats(0, 100),
)


@settings(deadline=None, max_examples=20)
@given(jobs, st.booleans())
def test_every_job_has_a_body_that_the_schemas_take(job, login):
    image = spec.Pulled(login=RegistryLogin(registry="example.org", username="u", password="p@ss") if login else None)
    found = body(job, image)
    container = container_of(found)

    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", found["metadata"]["name"])
    assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", found["metadata"]["labels"][spec.RUN])
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert pod_of(found)["automountServiceAccountToken"] is False
    assert all(secret not in json.dumps(found) for secret in ("p@ss",))
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == bool(job.resources.gpus)


def expanded(text: str, variables: dict[str, str]) -> str:
    """As kubelet does it: k8s.io/kubernetes/third_party/forked/golang/expansion."""

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        return variables.get(found[1], found[0]) if found[1] is not None else found[0]

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, text)


@settings(deadline=None)
@given(st.text("$()AB ", max_size=20))
def test_no_word_of_a_command_is_expanded(text):
    assert expanded(spec.escaped(text), {"A": "seen", "B": "seen", "AB": "seen"}) == text


def test_the_sandbox_is_closed():
    found = body()
    assert pod_of(found)["securityContext"] == {
        "seccompProfile": {"type": "RuntimeDefault"},
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "runAsNonRoot": True,
    }
    assert container_of(found)["securityContext"] == {
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert found["metadata"]["labels"][spec.NETWORK] == "none"
    assert spec.closes_the_network(spec.network_policy("n"))
    schema(KINDS["NetworkPolicy"]).validate(spec.network_policy("n"))


def test_a_policy_that_was_opened_closes_nothing():
    policy = spec.network_policy("n")
    policy["spec"]["egress"] = [{}]

    assert not spec.closes_the_network(policy)


def test_folders_are_those_of_the_claim_and_storages_claims_of_their_own():
    job = replace(
        JOB,
        mounts=(
            Mount(source=HOME / "workspaces/r/input", target="/work/input", read_only=True),
            Mount(source=HOME / "workspaces/r/output", target="/work/output", read_only=False),
        ),
        storages=(
            StorageMount(source="datasets", target="/mnt/datasets", read_only=True),
            StorageMount(source="/srv/scratch", target="/mnt/scratch", read_only=False),
        ),
    )
    found = body(job)
    mounts = {each["mountPath"]: each for each in container_of(found)["volumeMounts"]}
    volumes = {each["name"]: each for each in pod_of(found)["volumes"]}

    assert mounts["/work/input"] == {
        "name": "workspace",
        "mountPath": "/work/input",
        "subPath": "workspaces/r/input",
        "readOnly": True,
    }
    assert mounts["/work/output"]["readOnly"] is False
    assert volumes[mounts["/mnt/datasets"]["name"]]["persistentVolumeClaim"] == {"claimName": "datasets"}
    assert mounts["/mnt/datasets"]["readOnly"] is True
    assert volumes[mounts["/mnt/scratch"]["name"]]["hostPath"] == {"path": "/srv/scratch", "type": "Directory"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mounts": (Mount(source=Path("/elsewhere"), target="/x", read_only=True),)}, "not on the claim work"),
        ({"user": "nobody"}, "by number only"),
        ({"resources": Resources(gpus="all")}, "gpu_count: all"),
        ({"wrapper": Wrapper(argv=("/bin/sh",), ended=Path("/x"), linger_seconds=1)}, "Write `entrypoint`"),
    ],
)
def test_what_no_pod_can_be_is_refused(changes, said):
    with pytest.raises(UnsupportedByEngine, match=said):
        body(replace(JOB, **changes))


def test_the_program_around_which_a_wrapper_goes_is_the_images():
    wrapper = Wrapper(argv=("/bin/sh", "-c", "x"), ended=Path("/x"), linger_seconds=1)
    image = spec.Pulled(config={"Entrypoint": ["/run"], "Cmd": ["it"], "Volumes": {"/data": {}}})
    container = container_of(body(replace(JOB, wrapper=wrapper), image))

    assert (container["command"], container["args"]) == (["/bin/sh", "-c", "x"], ["/run", "it"])
    assert {"/data", "/tmp"} <= {each["mountPath"] for each in container["volumeMounts"]}


def test_one_claim_for_one_node_binds_the_job_to_it():
    terms = pod_of(body(place=replace(PLACE, node="n1")))["affinity"]["nodeAffinity"]

    assert "n1" in json.dumps(terms)


def test_nodes_that_failed_a_run_are_taken_where_no_other_will_do_and_never_rule_its_claim_out():
    affinity = pod_of(body(place=replace(PLACE, avoided=("n1", "n2"))))["affinity"]["nodeAffinity"]
    (wish,) = affinity.pop("preferredDuringSchedulingIgnoredDuringExecution")

    assert affinity == {}
    assert [(each["operator"], each["values"]) for each in wish["preference"]["matchFields"]] == [
        ("NotIn", ["n1"]),
        ("NotIn", ["n2"]),
    ]
    bound = pod_of(body(place=replace(PLACE, node="n1", avoided=("n1",))))["affinity"]["nodeAffinity"]
    assert list(bound) == ["requiredDuringSchedulingIgnoredDuringExecution"]


def test_secret_values_are_in_a_secret_only():
    job = replace(JOB, secret_environment={"KEY": "s3cret"})

    assert "s3cret" not in json.dumps(body(job))
    made = spec.secret_values(job, PLACE, {"metadata": {"name": "j", "uid": "u"}})
    assert made is not None
    assert made["metadata"]["ownerReferences"][0]["uid"] == "u"


CARRIED = replace(
    JOB,
    lease=Path("/laptop/workspaces/r/lease"),
    mounts=(
        Mount(source=Path("/data/letters"), target="/work/input", read_only=True),
        Mount(source=Path("/laptop/workspaces/r/output"), target="/work/output", read_only=False),
        Mount(source=Path("/laptop/workspaces/r/notes"), target="/run/oasis-flows", read_only=False),
    ),
    wrapper=Wrapper(argv=("/bin/sh",), ended=Path("/laptop/workspaces/r/notes/algorithm"), linger_seconds=5),
    entrypoint=("x",),
)
OUTSIDE = replace(PLACE, home=Path("/laptop"), carrier="example.org/flow-runner:1", host="laptop")


def test_a_carrier_is_closed_like_an_algorithm_and_goes_after_it():
    found = kube_carry.carrier_body(CARRIED, OUTSIDE)
    schema("job-batch-v1").validate(json.loads(json.dumps(found)))
    main = body(kube_carry.there(CARRIED), place=replace(OUTSIDE, home=kube_carry.HOME))

    assert container_of(found)["securityContext"] == container_of(main)["securityContext"]
    assert pod_of(found)["automountServiceAccountToken"] is False
    assert found["metadata"]["labels"][spec.NETWORK] == "none"
    assert found["metadata"]["labels"][spec.RUN] == main["metadata"]["labels"][spec.RUN]
    assert found["metadata"]["name"] != main["metadata"]["name"]
    assert found["spec"]["activeDeadlineSeconds"] > main["spec"]["activeDeadlineSeconds"] + PLACE.pending_seconds
    (claim,) = (each for each in container_of(found)["volumeMounts"] if each["name"] == "workspace")
    assert claim == {"name": "workspace", "mountPath": "/var/lib/oasis-flows", "readOnly": False}


def test_what_is_carried_lies_in_the_runs_own_folder_and_its_lease_does_not():
    proof = kube_carry.HOME / "carried/r/lease"
    found = body(kube_carry.there(CARRIED), place=replace(OUTSIDE, home=kube_carry.HOME, proof=proof))
    mounts = {each["mountPath"]: each.get("subPath") for each in container_of(found)["volumeMounts"]}

    assert mounts["/work/input"] == "carried/r/in/0"
    assert mounts["/work/output"] == "carried/r/out/1"
    assert mounts[spec.PROOF] == "carried/r/lease"
    assert kube_carry.order_of(CARRIED).ended == "2/algorithm"
    # A reaper in the cluster, of this version or an older one, sees no lease of its own in it.
    assert spec.CLAIM not in found["metadata"]["annotations"]
    assert found["metadata"]["annotations"][spec.LEASE] == "/laptop/workspaces/r/lease"


@settings(deadline=None, max_examples=20)
@given(jobs)
def test_every_job_can_have_a_carrier(job):
    found = kube_carry.carrier_body(job, OUTSIDE)
    schema("job-batch-v1").validate(json.loads(json.dumps(found)))

    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", found["metadata"]["name"])
    order = json.loads(container_of(found)["args"][1].replace("$$", "$"))
    assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", order["folder"])


def seen_pod(job: ContainerJob = JOB, **changes: Any) -> dict[str, Any]:
    """The pod that a cluster makes of the job when it changes nothing else."""
    found = body(job)
    template = found["spec"]["template"]
    template["metadata"] |= {"namespace": "flows", "name": "p"}
    template["spec"]["containers"][0] |= changes
    return {"metadata": template["metadata"], "spec": template["spec"], "status": {}}


def test_what_is_in_force_is_read_from_the_pod():
    force = spec.in_force(seen_pod(), "v1.32")

    assert spec.looser_than_asked(JOB, PLACE, force) == ()
    assert force["read_only_root"] is True
    assert force["init"] is True


@pytest.mark.parametrize(
    ("changes", "looser"),
    [
        ({"resources": {}}, ("cpu", "memory", "ephemeral-storage")),
        (
            {"securityContext": {"privileged": True, "capabilities": {"add": ["NET_ADMIN"]}}},
            ("privileged", "capabilities", "no-new-privileges", "read-only root"),
        ),
    ],
)
def test_a_pod_that_was_made_looser_is_found_out(changes, looser):
    assert spec.looser_than_asked(JOB, PLACE, spec.in_force(seen_pod(**changes), "v1.32")) == looser


def evidence(name: str) -> tuple[dict[str, Any] | None, verdict.Seen]:
    found = OUTCOMES[name]
    pod = verdict.newest(found.get("pods", ()))
    last = found.get("watched")
    gone = pod is None or (last is not None and last["event"] == "DELETED")
    pod = last if gone else pod
    log = found.get("log", "").encode()
    seen = verdict.Seen(
        pod=pod,
        job=found.get("job"),
        events=found["events"],
        gone=gone and pod is not None,
        log_head=log,
        log_bytes=found.get("log_bytes", 0),
    )
    return pod, seen


ENDED = {
    "01-success": (Reason.OK, 0),
    "02-exit-3": (Reason.EXIT_NONZERO, 3),
    "03-exit-3-termination-message": (Reason.EXIT_NONZERO, 3),
    "04-exit-3-fallback-to-logs": (Reason.EXIT_NONZERO, 3),
    "05-command-not-found": (Reason.COMMAND_NOT_FOUND, 127),
    "06-command-not-found-in-path": (Reason.COMMAND_NOT_FOUND, 127),
    "07-shell-command-not-found": (Reason.EXIT_NONZERO, 127),
    "08-exec-format-error": (Reason.EXEC_FORMAT, 126),
    "09-not-executable": (Reason.NOT_EXECUTABLE, 126),
    "10-bad-interpreter": (Reason.COMMAND_NOT_FOUND, 127),
    "11-sigkill-self": (Reason.KILLED, 137),
    "12-exit-137-child-sigkill": (Reason.KILLED, 137),
    "13-sigsegv-pid1": (Reason.EXIT_NONZERO, 139),
    "14-sigterm-143": (Reason.EXIT_NONZERO, 143),
    "15-oom-main": (Reason.OUT_OF_MEMORY, 137),
    "16-oom-child-exit-3": (Reason.OUT_OF_MEMORY, 3),
    "17-oom-child-exit-0": (Reason.OUT_OF_MEMORY, 0),
    "18-sigkill-from-host": (Reason.KILLED, 137),
    "19-oom-child-metrics": (Reason.OUT_OF_MEMORY, 3),
    "40-job-deadline": (Reason.TIMED_OUT, 0),
    "41-pod-deadline": (Reason.TIMED_OUT, 0),
    "43-job-deadline-sigterm-ignored": (Reason.TIMED_OUT, 137),
    "60-evicted-emptydir-sizelimit": (Reason.EVICTED, 137),
    "61-evicted-ephemeral-storage": (Reason.EVICTED, None),
    "62-evicted-log-size": (Reason.EVICTED, 137),
    "68-limitrange-defaults": (Reason.OK, 0),
    "77-read-only-rootfs": (Reason.EXIT_NONZERO, 1),
    "80-init-fails": (Reason.EXIT_NONZERO, 4),
    "81-init-oom": (Reason.OUT_OF_MEMORY, 137),
    "82-init-command-not-found": (Reason.COMMAND_NOT_FOUND, 127),
    "83-native-sidecar": (Reason.OK, 0),
    "84-native-sidecar-ignores-term": (Reason.EXIT_NONZERO, 3),
    "85-plain-second-container": (Reason.EXIT_NONZERO, 3),
    "86-pod-failure-policy-failjob": (Reason.EXIT_NONZERO, 42),
    "87-backofflimit-1": (Reason.EXIT_NONZERO, 3),
    "88-ttl-deleted-before-read": (Reason.OK, 0),
    "90-stdin-kill-by-liveness": (Reason.KILLED, 137),
    "91-dollar-expansion": (Reason.OK, 0),
    "92-unused-secret-volume-missing": (Reason.OK, 0),
    "93-evicted-while-followed": (Reason.EVICTED, 9),
    "94-node-out-of-memory": (Reason.KILLED, 137),
    "97-log-rotation-20MB": (Reason.OK, 0),
    "98-log-burst-60MB": (Reason.OK, 0),
    "99-log-bytes": (Reason.OK, 0),
}
UNKNOWN = {
    "26-out-of-cpu-node-name": NoRoom,
    "42-job-deadline-while-pending": NoRoom,
    "46-taint-noexecute": Evicted,
    "47-node-lost": ContainerLost,
    "50-delete-running-background": ContainerLost,
    "51-delete-running-foreground": ContainerLost,
    "52-delete-sigterm-ignored": ContainerLost,
    "53-delete-pid1-no-handler": ContainerLost,
    "54-delete-default-propagation": ContainerLost,
    "55-pod-deleted-by-someone": ContainerLost,
    "56-pod-force-deleted": ContainerLost,
    "57-delete-image-pull-backoff": ContainerLost,
    "58-delete-while-following": ContainerLost,
    "63-eviction-api": Evicted,
    "64-preempted": Preempted,
}
HOPELESS = {
    "30-image-never": ImageNotFound,
    "33-image-not-found": ImageNotFound,
    "34-image-unauthorized": ImageDenied,
    "35-invalid-image-name": ImageNotFound,
    "65-resourcequota-exceeded": NoCapacity,
    "66-resourcequota-missing-requests": UnsupportedByEngine,
    "67-limitrange-max": NoCapacity,
    "69-pod-security-restricted": UnsupportedByEngine,
    "70-pvc-not-found": EngineError,
    "72-env-secret-missing": DescriptionError,
    "73-env-configmap-key-missing": DescriptionError,
    "74-secret-volume-missing": EngineError,
    "75-hostpath-missing": EngineError,
    "76-run-as-non-root": DescriptionError,
    "79-runtimeclass-missing": UnsupportedByEngine,
}
WAITING = {
    "20-unschedulable-cpu": "Insufficient cpu",
    "21-unschedulable-memory": "Insufficient memory",
    "22-unschedulable-gpu-none": "Insufficient nvidia.com/gpu",
    "23-unschedulable-cpu-and-gpu": "Insufficient cpu",
    "24-unschedulable-node-selector": "node affinity/selector",
    "25-unschedulable-node-affinity": "node affinity/selector",
    "27-scheduling-gate": "scheduling gates",
    "28-gpu-wait": "Insufficient nvidia.com/gpu",
    "29-gpu-more-than-exist": "Insufficient nvidia.com/gpu",
    "31-image-pull-refused": "connection refused",
    "32-image-pull-dns": "no such host",
    "36-image-init-pull-fails": "connection refused",
    "37-image-pull-err-first": "connection refused",
    "44-unschedulable-taint": "untolerated taint",
    "45-unschedulable-cordoned": "unschedulable",
    "71-pvc-unbound": "unbound",
    "78-service-account-missing": "service account",
    "89-job-suspended": "suspended",
}
# Two runs of one name: what became of which is the follower's to tell, by the Jobs' uids.
APART = {"59-same-name-again"}


def test_every_recorded_outcome_has_its_place():
    assert set(OUTCOMES) == {*ENDED, *UNKNOWN, *HOPELESS, *WAITING, *APART}


@pytest.mark.parametrize("name", ENDED)
def test_how_it_ended_is_told(name):
    pod, seen = evidence(name)
    assert pod is not None
    assert verdict.has_ended(pod) or seen.gone
    found = verdict.container_exit(JOB, seen)

    assert (found.reason, found.exit_code) == ENDED[name]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_end_that_somebody_else_made_is_an_error_that_says_so(name):
    with pytest.raises(OasisError) as caught:
        verdict.container_exit(JOB, evidence(name)[1])

    assert type(caught.value) is UNKNOWN[name]
    assert caught.value.transient


@pytest.mark.parametrize("name", [*HOPELESS, *WAITING])
def test_what_waits_says_why_and_what_waits_in_vain_fails(name):
    found = OUTCOMES[name]
    pod = next((p for p in found.get("pods", ()) if not verdict.has_ended(p) and not verdict.is_running(p)), None)
    wait = verdict.reason_to_wait("image", pod, found.get("job"), found["events"])

    if name in HOPELESS:
        assert type(wait.error) is HOPELESS[name], wait
        assert " said: " in str(wait.error)
    else:
        assert wait.error is None
        assert WAITING[name] in wait.words
        # Nobody waits for a registry for ever, and then it was no want of room.
        assert type(wait.at_last) is (RegistryUnavailable if "image" in name else type(None))


def test_our_own_ends_have_our_own_reasons():
    _, seen = evidence("52-delete-sigterm-ignored")

    assert verdict.container_exit(JOB, replace(seen, stopped=True)).reason is Reason.TIMED_OUT
    passed = verdict.container_exit(JOB, replace(seen, passed=Passed(Reason.LOG_TOO_LARGE, 7)))
    assert (passed.reason, passed.limit_passed) == (Reason.LOG_TOO_LARGE, 7)


def test_memory_comes_before_a_time_limit():
    _, seen = evidence("16-oom-child-exit-3")

    assert verdict.container_exit(JOB, replace(seen, stopped=True)).reason is Reason.OUT_OF_MEMORY


def test_a_claim_that_is_not_the_one_mounted_here_is_told():
    pod, seen = evidence("05-command-not-found")
    assert pod is not None
    words = f'error mounting "x" to rootfs at "{spec.PROOF}/lease": not a directory: Are you trying to mount a directory onto a file'
    told = json.loads(json.dumps(pod))
    told["status"]["containerStatuses"][0]["state"]["terminated"]["message"] = words
    with pytest.raises(EngineError, match="not on the claim"):
        verdict.container_exit(JOB, replace(seen, pod=told))
