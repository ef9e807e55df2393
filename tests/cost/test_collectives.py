"""Collectives: what is sent, how long it takes, and which stretch decides."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog.clusters import find_cluster
from advisor.catalog.links import find_link
from advisor.cost.collectives import ROUNDS, Path, collective_seconds, copy_seconds, path, sent_bytes
from advisor.specs.hardware import Cluster, InSwitch, Link, Topology
from advisor.specs.plan import Group
from advisor.step.program import CollectiveKind

from .machines import cluster, link

KINDS: tuple[CollectiveKind, ...] = get_args(CollectiveKind)
kinds = st.sampled_from(KINDS)
rings = st.sampled_from(tuple(ROUNDS))
payloads = st.integers(0, 10**12)
rank_counts = st.sampled_from([2, 3, 8, 16, 64, 512])
NETWORKS = ("ib-ndr", "efa", "efa-p6", "tcpxo", "roce-100", "10gbe")
LINKS = ("nvlink3", "nvlink4", "nvlink5", "xgmi-mi300", "pcie4", "pcie4-no-p2p")
catalog = st.builds(
    lambda link, network, nodes: real(link, network, 8 * nodes, nodes),
    st.sampled_from(LINKS),
    st.sampled_from(NETWORKS),
    st.sampled_from([1, 2, 3, 8, 64]),
)


def real(inside: str, network: str, gpus: int, nodes: int) -> Cluster:
    """GPUs that links of the catalog join."""
    return replace(
        cluster(gpus, nodes), link=find_link(inside), network=find_link(network, gpus_per_node=gpus // nodes)
    )


def seconds(kind: CollectiveKind, payload_bytes: float, over: Path, messages: int = 1) -> float:
    return float(collective_seconds(kind, payload_bytes, messages, over))


def of_all(machines: Cluster) -> Path:
    return path(machines, Group(machines.gpus))


# nccl-tests, doc/PERFORMANCE.md: bus bandwidth over algorithm bandwidth is 2(n-1)/n for an all-reduce, (n-1)/n for an
# all-gather, a reduce-scatter and an all-to-all, and 1 for a send and receive.
@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        ("all-reduce", 1.75),
        ("all-gather", 0.875),
        ("reduce-scatter", 0.875),
        ("all-to-all", 0.875),
        ("send-receive", 1),
    ],
)
def test_eight_ranks_send_what_nccl_tests_counts(kind: CollectiveKind, factor: float) -> None:
    assert sent_bytes(kind, 1000, 8) == pytest.approx(1000 * factor)


# stas00/ml-engineering network/README.md 744d01e: 16 GiB all-reduced over 8 A100 at a bus bandwidth of 234.89 GB/s
# took 127,997 us.
def test_an_all_reduce_takes_what_its_bus_bandwidth_says() -> None:
    assert seconds("all-reduce", 2**34, of_all(cluster(8, fast=234.89))) == pytest.approx(0.127997, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "expected_s"),
    [("broadcast", 1.0), ("all-to-all", 0.875), ("send-receive", 1.0), ("all-gather", 0.875), ("all-reduce", 1.75)],
)
def test_a_large_message_takes_its_bytes_over_the_bandwidth(kind: CollectiveKind, expected_s: float) -> None:
    assert seconds(kind, 100e9, of_all(cluster(8, fast=100))) == pytest.approx(expected_s)


def test_a_broadcast_sends_from_all_ranks_but_the_last() -> None:
    assert sent_bytes("broadcast", 1000, 8) == pytest.approx(875)


@given(kinds, payloads, st.integers(1, 1000), catalog)
def test_one_rank_sends_nothing_and_takes_no_time(
    kind: CollectiveKind, payload: int, messages: int, machines: Cluster
) -> None:
    assert sent_bytes(kind, payload, 1) == 0
    assert seconds(kind, payload, path(machines, Group(1)), messages) == 0


@given(kinds, payloads, st.integers(0, 10**9), catalog)
def test_more_bytes_never_take_less_time(kind: CollectiveKind, payload: int, more: int, machines: Cluster) -> None:
    over = of_all(machines)

    assert seconds(kind, payload, over) <= seconds(kind, payload + more, over)


@given(kinds, payloads, catalog, st.sampled_from(["link", "network"]), st.floats(1, 10))
def test_more_bandwidth_is_never_slower(
    kind: CollectiveKind, payload: int, machines: Cluster, which: str, times: float
) -> None:
    slow: Link = getattr(machines, which)
    quicker = replace(slow, bandwidth_bytes_per_s=slow.bandwidth_bytes_per_s * times)

    assert seconds(kind, payload, of_all(replace(machines, **{which: quicker}))) <= seconds(
        kind, payload, of_all(machines)
    )


@given(kinds, payloads, catalog, st.integers(2, 100))
def test_more_messages_for_the_same_bytes_are_never_faster(
    kind: CollectiveKind, payload: int, machines: Cluster, messages: int
) -> None:
    over = of_all(machines)

    assert seconds(kind, payload, over) <= seconds(kind, payload, over, messages)


@given(rings, payloads, rank_counts, st.integers(2, 100))
def test_splitting_a_payload_of_one_protocol_costs_only_latency(
    kind: CollectiveKind, payload: int, ranks: int, messages: int
) -> None:
    over = of_all(cluster(ranks, latency_s=2e-6))
    steps = ROUNDS[kind] * (ranks - 1)

    whole, split = (seconds(kind, payload, over, count) for count in (1, messages))

    assert split - whole == pytest.approx((messages - 1) * steps * 2e-6, rel=1e-6)


@given(kinds, payloads, rank_counts)
def test_more_ranks_never_send_less(kind: CollectiveKind, payload: int, ranks: int) -> None:
    assert sent_bytes(kind, payload, ranks + 1) >= sent_bytes(kind, payload, ranks)


@given(payloads, st.sampled_from(LINKS), st.sampled_from([2, 4, 8]))
def test_an_all_reduce_in_a_machine_takes_at_least_a_reduce_scatter(payload: int, inside: str, gpus: int) -> None:
    over = of_all(real(inside, "ib-ndr", gpus, 1))

    assert seconds("all-reduce", payload, over) >= seconds("reduce-scatter", payload, over)


@given(st.sampled_from(["all-gather", "reduce-scatter", "broadcast"]), payloads, st.sampled_from([2, 4, 8]))
def test_machines_joined_as_well_as_their_gpus_are_one_machine(kind: CollectiveKind, payload: int, nodes: int) -> None:
    flat = cluster(16, fast=80, latency_s=3e-6)
    several = cluster(16, nodes, fast=80, network=80 * nodes / 16, latency_s=3e-6, network_latency_s=3e-6)

    assert seconds(kind, payload, of_all(several)) == pytest.approx(seconds(kind, payload, of_all(flat)))


def test_a_neighbour_is_sent_to_in_one_step_however_many_there_are() -> None:
    over = [path(cluster(ranks, fast=100, latency_s=2e-6), Group(ranks)) for ranks in (1, 2, 8)]

    assert [sent_bytes("send-receive", 1e9, each.ranks) for each in over] == [0, 1e9, 1e9]
    assert [collective_seconds("send-receive", 1e9, 3, each) for each in over] == pytest.approx([0, 0.010006, 0.010006])


def test_over_machines_every_gpu_brings_its_share_of_the_network() -> None:
    over = of_all(cluster(16, nodes=2, fast=200, network=10))

    assert seconds("all-gather", 80e9, over) == pytest.approx(15 / 16)
    assert over.slowest(0) == "network"


def test_a_slow_link_limits_a_fast_network() -> None:
    over = of_all(cluster(16, nodes=2, fast=20, network=10))

    assert seconds("all-gather", 20e9, over) == pytest.approx(15 / 16)
    assert over.slowest(0) == "fast"


def test_one_gpu_per_machine_uses_the_network_alone() -> None:
    assert seconds("all-gather", 10e9, of_all(cluster(4, nodes=4, fast=1, network=10))) == pytest.approx(3 / 4)


# Eight groups of one GPU per machine share the cards that one group of all GPUs has to itself.
def test_groups_that_talk_at_the_same_time_share_a_machine_s_network() -> None:
    machines = cluster(32, nodes=4, fast=1000, network=10)
    across, whole = path(machines, Group(4, stride=8)), path(machines, Group(32))

    assert seconds("all-gather", 10e9, across) == pytest.approx(3 / 4)
    assert seconds("all-gather", 80e9, whole) == pytest.approx(31 / 32)


# A tree over two machines sends half of the tensor up and half down: a ring sends it nearly twice.
def test_two_machines_send_less_by_trees() -> None:
    over = of_all(cluster(16, nodes=2, fast=1e6, network=10))

    assert seconds("all-reduce", 80e9, over) == pytest.approx(1 / 0.92, rel=1e-3)
    assert seconds("reduce-scatter", 80e9, over) == pytest.approx(15 / 16)


def test_trees_over_many_machines_take_steps_as_their_depth() -> None:
    machines = cluster(64, nodes=64, network=10, network_latency_s=1e-5)

    assert seconds("all-reduce", 0, of_all(machines)) == pytest.approx(2 * 6 * 2 * 1e-5)
    assert seconds("all-gather", 0, of_all(machines)) == pytest.approx(63 * 1e-5)


# Without in-switch reduction 8 H200 reach 367.6 GB/s, with it 482.3; all-gathers never use it (stas00/ml-engineering
# network/README.md 744d01e).
@pytest.mark.parametrize(("gpus", "faster"), [(4, False), (5, True), (8, True)])
def test_the_switch_reduces_for_five_gpus_and_more(gpus: int, faster: bool) -> None:
    with_it = real("nvlink4", "ib-ndr", gpus, 1)
    without = replace(with_it, link=replace(with_it.link, in_switch=None))

    assert (seconds("all-reduce", 2**34, of_all(with_it)) < seconds("all-reduce", 2**34, of_all(without))) is faster
    assert seconds("all-gather", 2**34, of_all(with_it)) == seconds("all-gather", 2**34, of_all(without))


def test_a_switch_carries_a_tensor_out_and_a_share_of_it_back() -> None:
    plain = cluster(8, fast=1)
    over = of_all(replace(plain, link=replace(plain.link, in_switch=InSwitch(100e9, 1e-3, 2))))

    assert seconds("all-reduce", 100e9, over) == pytest.approx(1.125 + 1e-3)


# stas00/ml-engineering network/README.md 744d01e: 2 MI300X reach 47.7 GB/s, 8 of them 312.9.
def test_few_gpus_of_a_mesh_use_few_of_its_links() -> None:
    of_two, of_eight = (of_all(real("xgmi-mi300", "ib-ndr", gpus, 1)) for gpus in (2, 8))
    size = 2**32

    assert size / seconds("all-reduce", size, of_two) == pytest.approx(47.7e9, rel=0.08)
    assert 1.75 * size / seconds("all-reduce", size, of_eight) == pytest.approx(312.9e9, rel=0.02)


PAIRS = Topology(islands=((0, 1), (2, 3)), between=link("slow", 10))


@pytest.mark.parametrize(
    ("group", "way", "expected_s"),
    [
        (Group(2), "fast", 1 / 40),
        (Group(4), "slow", 3 / 4),
        (Group(2, stride=2), "slow", 1 / 2),
    ],
)
def test_a_group_within_a_bridged_pair_stays_off_the_bus(group: Group, way: str, expected_s: float) -> None:
    over = path(replace(cluster(4, fast=200), topology=PAIRS), group)

    assert over.slowest(0) == way
    assert seconds("all-gather", 10e9, over) == pytest.approx(expected_s)


def test_an_all_to_all_sends_over_each_stretch_what_its_ranks_are_behind() -> None:
    machines = replace(cluster(8, nodes=2, fast=200, network=1), topology=PAIRS)

    # Of 8 parts one stays, one goes to the pair's other, two over the bus and four over the network.
    assert seconds("all-to-all", 8e9, of_all(machines)) == pytest.approx(4.0)
    assert seconds("all-to-all", 8e9, of_all(replace(machines, network=link("network", 100)))) == pytest.approx(0.2)


def test_islands_make_a_machine_at_most_as_fast_as_one_without() -> None:
    pairs = find_cluster("4x3090-nvlink-pairs")
    joined = replace(cluster(4), link=pairs.link)
    split = replace(joined, topology=pairs.topology)

    assert all(seconds(kind, 2**28, of_all(split)) > seconds(kind, 2**28, of_all(joined)) for kind in KINDS)


def test_without_peer_to_peer_pci_express_is_slower() -> None:
    with_it, without = (of_all(real(name, "10gbe", 8, 1)) for name in ("pcie4", "pcie4-no-p2p"))

    assert all(seconds(kind, 2**28, without) > seconds(kind, 2**28, with_it) for kind in KINDS)


# Ultra-Scale Playbook (profiles/rates/collectives.csv): the time of 256 MiB grows with the steps of the ring.
def test_all_gathers_over_many_machines_take_a_time_for_every_step() -> None:
    of_two, of_many = (seconds("all-gather", 2**28, of_all(real("nvlink4", "efa", 8 * n, n))) for n in (2, 32))

    assert of_many > 5 * of_two


@given(kinds, st.sampled_from(LINKS), st.sampled_from(NETWORKS))
def test_many_groups_and_sizes_are_priced_as_each_alone(kind: CollectiveKind, inside: str, network: str) -> None:
    machines = replace(real(inside, network, 64, 8), topology=in_pairs(PAIRS, 8))
    sizes, strides = np.array([1, 2, 8, 16, 64, 2]), np.array([1, 2, 1, 4, 1, 8])
    payloads_bytes, messages = np.array([1e3, 1e6, 1e9, 1e7, 1e8, 1e5]), np.array([1, 4, 1, 100, 3, 0])

    together = collective_seconds(kind, payloads_bytes, messages, path(machines, Group(sizes, strides)))

    alone = [
        seconds(kind, payload, path(machines, Group(int(size), int(stride))), int(count))
        for size, stride, payload, count in zip(sizes, strides, payloads_bytes, messages, strict=True)
    ]
    assert np.asarray(together).tolist() == pytest.approx(alone)


def in_pairs(topology: Topology, gpus: int) -> Topology:
    """*topology* with pairs in a machine of so many *gpus*."""
    return replace(topology, islands=tuple((gpu, gpu + 1) for gpu in range(0, gpus, 2)))


def test_groups_of_one_size_are_priced_for_many_strides() -> None:
    over = path(cluster(64, nodes=8, fast=200, network=10), Group(2, stride=np.array([1, 8])))

    assert np.asarray(collective_seconds("all-gather", 20e9, 1, over)).tolist() == pytest.approx([0.05, 1.0])


def test_one_group_is_priced_for_many_sizes() -> None:
    over = of_all(real("nvlink4", "ib-ndr", 16, 2))
    sizes = np.array([2**10, 2**20, 2**30])

    together = np.asarray(collective_seconds("all-reduce", sizes, 1, over))

    assert together.tolist() == pytest.approx([seconds("all-reduce", size, over) for size in sizes.tolist()])


def test_a_copy_takes_its_latency_and_its_bytes() -> None:
    assert copy_seconds(40e9, 2, link("host", 20, 1e-3)) == pytest.approx(2.002)
