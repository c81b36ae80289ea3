"""What fits where: quantities, nodes, and the snapshots that nodes come from."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from oasis_flows.capacity import Demand, Node, Vector, byte_count, fit, millicpus, quantity, too_big
from oasis_flows.errors import DescriptionError
from oasis_flows.snapshots import docker_node, kubernetes_nodes, nodes_in

KUBERNETES = json.loads((Path(__file__).parents[1] / "fixtures/kubernetes/capacity.json").read_text())
GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500m", "0.5"),
        ("3Gi", 3 << 30),
        ("2G", 2 * 10**9),
        ("1e3", 1000),
        ("1E3", 1000),
        ("1E", 10**18),
        ("128974848", 128974848),
        ("0.5", "0.5"),
        (".5", "0.5"),
        ("1.", 1),
        ("100u", "0.0001"),
        ("7n", "0.000000007"),
        ("1500k", 1500000),
        ("12e6", 12 * 10**6),
        ("5e-1", "0.5"),
        ("2e+2", 200),
        (8, 8),
        (0.2, "0.2"),
    ],
)
def test_a_quantity_is_what_kubernetes_means_by_it(text, value):
    assert quantity(text) == Decimal(value)


@pytest.mark.parametrize(
    "text", ["", "Gi", "3 Gi", "3GiB", "1K", "-1", "1e", "1e3Gi", "1e-+3", "0x10", "1,5", "nan", "inf", None, True, [1], {}]
)
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(DescriptionError, match=r"is not a quantity\. Write"):
        quantity(text)


def test_parts_are_rounded_up():
    assert (millicpus("0.0001"), millicpus("1500u"), byte_count("100m")) == (1, 2, 1)


def node(cpus, gib, gpus=0, pods=100, used=(0, 0, 0, 0), name="n"):
    return Node(name=name, allocatable=Vector(round(cpus * 1000), gib * GIB, gpus, pods), requested=Vector(*used))


ONE = Demand(cpus=1, memory_bytes=GIB)


def test_ten_nodes_with_half_a_processor_free_hold_no_container_that_needs_one():
    nodes = [node(2, 64, used=(1100, 0, 0, 0))] * 10

    assert fit(nodes, ONE).count == 0
    assert fit(nodes, ONE).limit == "processors"
    assert fit(nodes, Demand(cpus=0.5, memory_bytes=GIB)).count == 10


def test_what_is_requested_counts_and_headroom_is_of_what_is_allocatable():
    assert fit([node(10, 100, used=(4000, 0, 0, 0))], ONE).count == 4
    assert fit([node(10, 100, used=(4000, 0, 0, 0))], ONE, headroom=1.0).count == 6
    assert fit([node(10, 100, used=(9000, 0, 0, 0))], ONE).count == 0


@pytest.mark.parametrize(
    ("machine", "demand", "count", "limit"),
    [
        (node(10, 2), ONE, 1, "memory"),
        (node(2, 100), ONE, 1, "processors"),
        (node(100, 100, gpus=3), Demand(cpus=1, memory_bytes=GIB, gpus=1), 3, "GPUs"),
        (node(100, 100, gpus=3, used=(0, 0, 2, 0)), Demand(cpus=1, memory_bytes=GIB, gpus=2), 0, "GPUs"),
        (node(100, 100, gpus=3), Demand(cpus=1, memory_bytes=GIB, gpus="all"), 1, "GPUs"),
        (node(100, 100, gpus=3, used=(0, 0, 1, 0)), Demand(cpus=1, memory_bytes=GIB, gpus="all"), 0, "GPUs"),
        (node(100, 100, pods=5, used=(0, 0, 0, 3)), ONE, 2, "places for containers"),
    ],
)
def test_each_dimension_can_be_the_limit(machine, demand, count, limit):
    found = fit([machine], demand)

    assert (found.count, found.limit) == (count, limit)


AMOUNT = st.tuples(st.integers(0, 64_000), st.integers(0, 256 * GIB), st.integers(0, 8), st.integers(0, 110))
NODES = st.lists(st.tuples(AMOUNT, AMOUNT), max_size=6)
DEMANDS = st.tuples(st.floats(0.01, 16), st.integers(1, 64 * GIB), st.one_of(st.integers(0, 4), st.just("all")))


@given(NODES, DEMANDS, st.floats(0.1, 1))
def test_what_fits_never_passes_any_dimension_of_any_node_and_one_more_would(nodes, demand, headroom):
    machines = [Node(name=str(i), allocatable=Vector(*a), requested=Vector(*r)) for i, (a, r) in enumerate(nodes)]
    wanted = Demand(cpus=demand[0], memory_bytes=demand[1], gpus=demand[2])
    found = fit(machines, wanted, headroom=headroom)

    for machine, count in zip(machines, found.nodes, strict=True):
        each = wanted.on(machine)
        if each is None:
            assert count == 0
            continue
        free = machine.free(headroom)
        assert all(count * want <= have for want, have in zip(each, free, strict=True))
        assert any((count + 1) * want > have for want, have in zip(each, free, strict=True))


def test_nothing_at_all_is_said_in_words():
    assert fit([], ONE).count == 0
    assert "there is no node at all" in too_big([], ONE)


def test_an_algorithm_bigger_than_any_node_is_told_from_one_that_has_to_wait():
    busy = node(2, 8, used=(2000, 0, 0, 0), name="busy")

    assert fit([busy], ONE).count == 0
    assert too_big([busy], ONE) == ""
    assert too_big([busy], Demand(cpus=2, memory_bytes=GIB)) == (
        "The algorithm needs 2 processors, 1.0 GiB, and no node has that, even empty (80% of processors and memory count): "
        "busy has 1.6 processors, 6.4 GiB free."
    )
    closed = Node(name="c", allocatable=Vector(9000, 9 * GIB, 0, 9), closed="a virtual node")
    assert "takes nothing (a virtual node)" in too_big([closed], ONE)


def test_a_node_that_is_closed_for_now_is_waited_for_if_it_is_large_enough():
    closed = Node(name="c", allocatable=Vector(9000, 9 * GIB, 0, 9), closed="not ready", for_now=True)

    assert fit([closed], ONE).count == 0
    assert too_big([closed], ONE) == ""
    assert fit([closed.emptied()], ONE).count == 7
    assert "c has 7.2 processors" in too_big([closed], Demand(cpus=8, memory_bytes=GIB))


# Snapshots


def test_kubernetes_counts_what_its_scheduler_counts():
    (found,) = nodes_in(KUBERNETES)
    free = found.free(1.0)

    assert (free.millicpus, free.memory_bytes, free.gpus) == (
        KUBERNETES["expected"]["cpu_millicores"],
        KUBERNETES["expected"]["memory_bytes"],
        KUBERNETES["expected"]["nvidia.com/gpu"],
    )
    # Nine pods are scheduled and have not finished.
    assert free.pods == 110 - 9


def tainted(key, effect="NoSchedule", **more):
    return {"spec": {"taints": [{"key": key, "effect": effect, **more}]}}


def changed_node(change):
    machine = KUBERNETES["items"][0]
    return {"items": [{**machine, **{key: {**machine[key], **value} for key, value in change.items()}}]}


@pytest.mark.parametrize(
    ("change", "why", "for_now"),
    [
        ({"spec": {"unschedulable": True}}, "cordoned", True),
        (tainted("node-role.kubernetes.io/control-plane"), "tainted", False),
        (tainted("node.kubernetes.io/disk-pressure"), "tainted", True),
        ({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}, "not ready", True),
    ],
)
def test_a_node_of_kubernetes_that_takes_no_pods_has_no_room(change, why, for_now):
    (found,) = nodes_in(changed_node(change))

    assert found.closed.startswith(why)
    assert fit([found], Demand(cpus=0.1, memory_bytes=1)).count == 0
    assert bool(too_big([found], Demand(cpus=0.1, memory_bytes=1))) is not for_now


WITH_GPU = Demand(cpus=0.1, memory_bytes=1, gpus=1)


def test_a_node_that_is_kept_for_gpus_has_room_for_these_alone():
    gpus = {"status": {"allocatable": {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "2", "pods": "110"}}}
    (found,) = nodes_in(changed_node({**tainted("nvidia.com/gpu", value="present"), **gpus}))

    assert fit([found], WITH_GPU).count == 2
    assert fit([found], ONE).count == 0
    assert "for containers with GPUs only" in too_big([found], ONE)


@pytest.mark.parametrize(
    ("toleration", "puts_up"),
    [
        ({"operator": "Exists"}, True),
        ({"key": "accelerator", "operator": "Exists"}, True),
        ({"key": "accelerator", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "accelerator", "operator": "Equal", "value": "a100", "effect": "NoSchedule"}, True),
        ({"key": "accelerator", "value": "h100"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Exists"}, False),
    ],
)
def test_tolerations_mean_what_kubernetes_means_by_them(toleration, puts_up):
    gpus = {"status": {"allocatable": {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "2", "pods": "110"}}}
    (found,) = kubernetes_nodes(changed_node({**tainted("accelerator", value="a100"), **gpus}), [toleration])

    assert fit([found], WITH_GPU).count == (2 if puts_up else 0)


@pytest.mark.parametrize(
    ("resource", "count"), [("nvidia.com/mig-1g.10gb", 7), ("nvidia.com/gpu", 1), ("amd.com/gpu", 0), (None, 1)]
)
def test_gpus_are_what_the_settings_call_so(resource, count):
    """A card that is cut into slices has names of its own for them."""
    amounts = {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "1", "nvidia.com/mig-1g.10gb": "7", "pods": "110"}
    (found,) = kubernetes_nodes(changed_node({"status": {"allocatable": amounts}}), gpu_resource=resource)

    assert found.allocatable.gpus == count


OLD_OSCAR = {
    "numberNodes": 2,
    "detail": [
        {
            "nodeName": "a",
            "cpuCapacity": "8000",
            "cpuUsage": "1000",
            "memoryCapacity": "32000000000",
            "memoryUsage": "8000000000",
        },
        {
            "nodeName": "b",
            "cpuCapacity": "4000",
            "cpuUsage": "500",
            "memoryCapacity": "16000000000",
            "memoryUsage": "4000000000",
        },
    ],
}


def present_oscar(**changes):
    row = {
        "name": "a",
        "cpu": {"capacity_cores": 8000, "usage_cores": 100, "request_cores": 6000},
        "memory": {"capacity_bytes": 32 * GIB, "usage_bytes": GIB, "request_bytes": 2 * GIB},
        "gpu": 1,
        "is_interlink": False,
        "status": "Ready",
    }
    return {"cluster": {"nodes_count": 1, "nodes": [row | changes]}, "oscar": {}, "minio": {}}


def test_oscars_old_status_is_read_node_by_node():
    """The seed's own formula gave 8 over both nodes, as if a container could lie across them."""
    assert fit(nodes_in(OLD_OSCAR), Demand(cpus=1, memory_bytes=3 * GIB)).nodes == (5, 2)


def test_oscars_present_status_counts_requests_not_use():
    assert fit(nodes_in(present_oscar()), ONE).count == 0
    assert fit(nodes_in(present_oscar()), Demand(cpus=0.2, memory_bytes=GIB)).count == 2
    assert fit(nodes_in(present_oscar(is_interlink=True)), Demand(cpus=0.2, memory_bytes=GIB)).count == 0
    assert fit(nodes_in(present_oscar(status="NotReady")), Demand(cpus=0.2, memory_bytes=GIB)).count == 0


def test_a_static_table_is_read_with_units():
    table = {
        "nodes": [{"name": "big", "cpus": "15500m", "memory": "64Gi", "gpus": 2}, {"name": "small", "cpus": 2, "memory": "4G"}]
    }
    big, small = nodes_in(table)

    assert big.allocatable[:3] == (15500, 64 * GIB, 2)
    assert small.allocatable[:3] == (2000, 4 * 10**9, 0)


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"nodes": 3},
        {"nodes": ["a"]},
        {"nodes": [{"name": "a", "cpus": "many", "memory": 1}]},
        {"clusters": {}},
        {"cluster": {"metrics": {}}},
        {"detail": [{"nodeName": "a"}]},
        {"items": [{"spec": {}}]},
    ],
)
def test_a_snapshot_of_unknown_shape_is_refused_with_those_that_are_known(content):
    with pytest.raises(DescriptionError, match=r"snapshot of the capacity|is not a quantity"):
        nodes_in(content)


def container(cpus=0, memory=0, quota=0, gpus=0):
    wanted = [{"Count": gpus, "Capabilities": [["gpu"]]}] if gpus else None
    host = {"NanoCpus": round(cpus * 1e9), "Memory": memory, "CpuQuota": quota, "CpuPeriod": 50_000 if quota else 0}
    return {"HostConfig": host | {"DeviceRequests": wanted}}


def test_a_docker_host_has_what_the_limits_of_its_running_containers_leave():
    info = {"Name": "host", "NCPU": 8, "MemTotal": 16 * GIB}
    running = [container(1.5, GIB), container(quota=25_000), container(), container(0.5, 2 * GIB, gpus=1)]
    found = docker_node(info, running, gpus=2)

    assert found.allocatable[:3] == (8000, 16 * GIB, 2)
    assert found.requested == (2500, 3 * GIB, 1, 4)
    assert docker_node(info, [container(gpus=-1)], gpus=2).requested.gpus == 2
