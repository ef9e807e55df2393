"""Rings: what is sent, how long it takes, and which stretch decides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.cost.collectives import ROUNDS, collective_seconds, copy_seconds, ring, sent_bytes
from advisor.specs.plan import Group
from advisor.step.program import CollectiveKind

from .machines import cluster, link

KINDS = tuple(ROUNDS)
kinds = st.sampled_from(KINDS)
payloads = st.integers(0, 10**12)
rank_counts = st.sampled_from([2, 3, 8, 16, 64, 512])


# nccl-tests, doc/PERFORMANCE.md: bus bandwidth over algorithm bandwidth is 2(n-1)/n for an all-reduce, (n-1)/n for an
# all-gather and a reduce-scatter.
@pytest.mark.parametrize(("kind", "factor"), [("all-reduce", 1.75), ("all-gather", 0.875), ("reduce-scatter", 0.875)])
def test_eight_ranks_send_what_nccl_tests_counts(kind: CollectiveKind, factor: float) -> None:
    assert sent_bytes(kind, 1000, 8) == pytest.approx(1000 * factor)


# stas00/ml-engineering network/README.md 744d01e: 16 GiB all-reduced over 8 A100 at a bus bandwidth of 234.89 GB/s
# took 127,997 us.
def test_an_all_reduce_takes_what_its_bus_bandwidth_says() -> None:
    over = ring(cluster(8, fast=234.89), Group(8))

    assert collective_seconds("all-reduce", 2**34, 1, over) == pytest.approx(0.127997, rel=1e-3)


def test_a_broadcast_carries_the_whole_tensor_over_each_connection() -> None:
    over = ring(cluster(8, fast=100), Group(8))

    assert collective_seconds("broadcast", 100e9, 1, over) == pytest.approx(1.0)
    assert sent_bytes("broadcast", 1000, 8) == pytest.approx(875)


@given(kinds, payloads, st.integers(1, 1000))
def test_one_rank_sends_nothing_and_takes_no_time(kind: CollectiveKind, payload: int, messages: int) -> None:
    assert sent_bytes(kind, payload, 1) == 0
    assert collective_seconds(kind, payload, messages, ring(cluster(1, latency_s=1e-5), Group(1))) == 0


@given(kinds, payloads, rank_counts, st.floats(1, 1000), st.floats(1, 10))
def test_more_bandwidth_is_never_slower(
    kind: CollectiveKind, payload: int, ranks: int, bandwidth: float, times: float
) -> None:
    slow = ring(cluster(ranks, fast=bandwidth), Group(ranks))
    quick = ring(cluster(ranks, fast=bandwidth * times), Group(ranks))

    assert collective_seconds(kind, payload, 1, quick) <= collective_seconds(kind, payload, 1, slow)


@given(kinds, payloads, rank_counts)
def test_more_ranks_never_send_less(kind: CollectiveKind, payload: int, ranks: int) -> None:
    assert sent_bytes(kind, payload, ranks + 1) >= sent_bytes(kind, payload, ranks)


@given(kinds, payloads, rank_counts, st.integers(2, 100))
def test_splitting_a_payload_into_messages_costs_only_latency(
    kind: CollectiveKind, payload: int, ranks: int, messages: int
) -> None:
    over = ring(cluster(ranks, latency_s=2e-6), Group(ranks))
    steps = ROUNDS[kind] * (ranks - 1)

    whole, split = (collective_seconds(kind, payload, count, over) for count in (1, messages))

    assert split - whole == pytest.approx((messages - 1) * steps * 2e-6, rel=1e-6)


def test_a_neighbour_is_sent_to_in_one_step_however_many_there_are() -> None:
    over = [ring(cluster(ranks, fast=100, latency_s=2e-6), Group(ranks)) for ranks in (1, 2, 8)]

    assert [sent_bytes("send-receive", 1e9, each.ranks) for each in over] == [0, 1e9, 1e9]
    assert [collective_seconds("send-receive", 1e9, 3, each) for each in over] == pytest.approx([0, 0.010006, 0.010006])


def test_over_machines_every_gpu_brings_its_share_of_the_network() -> None:
    over = ring(cluster(16, nodes=2, fast=200, network=10), Group(16))

    assert over.bandwidth_bytes_per_s == pytest.approx(80e9)
    assert over.network_limits


# stas00/ml-engineering network/README.md 744d01e: 4 machines of 8 B200 with 50 GB/s of network per GPU reach a bus
# bandwidth of 381.8 GB/s at 16 GiB, against 682 GB/s in one machine.
def test_four_machines_of_b200_are_limited_by_their_network() -> None:
    over = ring(cluster(32, nodes=4, fast=682.2, network=50), Group(32))

    assert over.bandwidth_bytes_per_s == pytest.approx(381.8e9, rel=0.05)


def test_a_slow_link_limits_a_fast_network() -> None:
    over = ring(cluster(16, nodes=2, fast=20, network=10), Group(16))

    assert over.bandwidth_bytes_per_s == pytest.approx(20e9)
    assert not over.network_limits


def test_one_gpu_per_machine_uses_the_network_alone() -> None:
    over = ring(cluster(4, nodes=4, fast=1, network=10), Group(4))

    assert over.bandwidth_bytes_per_s == pytest.approx(10e9)


def test_steps_over_machines_have_the_networks_latency() -> None:
    several = cluster(16, nodes=2, latency_s=1e-6, network_latency_s=1e-5)

    assert ring(several, Group(16)).latency_s == 1e-5
    assert ring(several, Group(8)).latency_s == 1e-6


def test_many_rank_counts_are_priced_as_each_alone() -> None:
    machines = cluster(64, nodes=8, latency_s=1e-6, network_latency_s=1e-5)
    counts = np.array([1, 2, 8, 16, 64])
    together = collective_seconds("all-reduce", 1e9, 3, ring(machines, Group(counts)))

    alone = [float(collective_seconds("all-reduce", 1e9, 3, ring(machines, Group(int(count))))) for count in counts]

    assert np.asarray(together).tolist() == pytest.approx(alone)


def test_a_copy_takes_its_latency_and_its_bytes() -> None:
    assert copy_seconds(40e9, 2, link("host", 20, 1e-3)) == pytest.approx(2.002)
