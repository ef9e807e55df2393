"""GPUs, links and clusters: what they refuse."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.errors import SpecError
from advisor.specs.hardware import Cluster, Gpu, Link, Topology

GPU = Gpu(
    name="plain",
    memory_bytes=80 * 2**30,
    memory_bandwidth_bytes_per_s=2e12,
    peak_flop_per_s={"fp16": 1e14},
    link="wire",
    host_link="wire",
    architecture="plain",
    compute_capability="7.5",
    source="made up",
)
LINK = Link(
    name="wire",
    kind="wire",
    bandwidth_bytes_per_s=1e9,
    peak_bytes_per_s=1e9,
    latency_s=0.0,
    assumed=True,
    source="made up",
)
CLUSTER = Cluster(
    gpu=GPU,
    gpus=8,
    nodes=2,
    link=LINK,
    host_link=LINK,
    network=LINK,
    host_memory_bytes=2**40,
    cpu_memory_bandwidth_bytes_per_s=1e11,
)


@pytest.mark.parametrize(
    "facts", [{"memory_bytes": 0}, {"memory_bandwidth_bytes_per_s": -1.0}, {"peak_flop_per_s": {}}]
)
def test_a_gpu_without_memory_or_rates_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="GPU 'plain' needs memory, bandwidth and at least one peak rate"):
        replace(GPU, **facts)


@pytest.mark.parametrize("facts", [{"bandwidth_bytes_per_s": 0.0}, {"latency_s": -1e-9}, {"launch_s": -1e-9}])
def test_a_link_that_cannot_carry_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="link 'wire' needs a positive bandwidth and a latency of at least 0"):
        replace(LINK, **facts)


def test_a_gpu_has_bf16_where_it_has_a_rate_for_it() -> None:
    assert not GPU.has_bf16
    assert replace(GPU, peak_flop_per_s={"bf16": 1e14}).has_bf16


@pytest.mark.parametrize("facts", [{"gpus": 0}, {"nodes": 0}, {"gpus": -4}, {"nodes": -1}])
def test_a_cluster_without_gpus_or_machines_is_refused(facts: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="at least one GPU and one machine"):
        replace(CLUSTER, **facts)


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_gpus_divide_over_machines_or_a_count_that_does_is_suggested(gpus: int, nodes: int) -> None:
    if gpus % nodes == 0:
        assert replace(CLUSTER, gpus=gpus, nodes=nodes).gpus_per_node * nodes == gpus
        return

    with pytest.raises(SpecError, match=f"^{gpus} GPUs do not divide over {nodes} machines") as refusal:
        replace(CLUSTER, gpus=gpus, nodes=nodes)

    suggested = re.search(r"such as (\d+)$", str(refusal.value))
    assert suggested
    assert int(suggested[1]) > gpus
    assert replace(CLUSTER, gpus=int(suggested[1]), nodes=nodes).nodes == nodes


@pytest.mark.parametrize(
    ("islands", "message"),
    [
        (((0, 1), (3,)), r"islands \[0, 1\] \[3\]: GPU 2 is in none of them; every GPU has to be in one"),
        (((0, 1), (1, 2)), r"GPU 1 is in 2 of them"),
        (((0, 1), ()), r"each needs GPUs, numbered from 0"),
        (((-1, 0),), r"each needs GPUs, numbered from 0"),
        ((), r"each needs GPUs, numbered from 0"),
    ],
)
def test_islands_that_do_not_cover_a_machine_are_refused(islands: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Topology(islands=islands, between=LINK)


@pytest.mark.parametrize(
    ("members", "stride", "gpus", "touched"),
    [(2, 1, 8, 1), (4, 1, 8, 2), (8, 1, 8, 4), (2, 2, 8, 2), (2, 4, 8, 2), (4, 2, 8, 4), (2, 1, 2, 1), (1, 1, 8, 1)],
)
def test_a_group_lies_in_as_many_islands_as_its_members_are_in(
    members: int, stride: int, gpus: int, touched: int
) -> None:
    pairs = Topology(islands=((0, 1), (2, 3), (4, 5), (6, 7)), between=LINK)

    assert pairs.touched(members, stride, gpus) == touched


def test_unequal_islands_count_at_the_worst_group() -> None:
    assert Topology(islands=((0, 1, 2), (3,)), between=LINK).touched(2, 1, 4) == 2


def test_a_cluster_uses_no_more_gpus_than_its_islands_hold() -> None:
    pairs = Topology(islands=((0, 1), (2, 3)), between=LINK)

    assert replace(CLUSTER, gpus=4, nodes=2, topology=pairs).gpus_per_node == 2
    with pytest.raises(
        SpecError, match=r"16 GPUs in 2 machines are 8 in each, but the islands \[0, 1\] \[2, 3\] hold 4"
    ):
        replace(CLUSTER, gpus=16, topology=pairs)
