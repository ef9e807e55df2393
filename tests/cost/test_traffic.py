"""Traffic is read off the program: every transfer once per run, by purpose and kind."""

from __future__ import annotations

import numpy as np
import pytest

from advisor.cost.traffic import Flow, Ways, flows
from advisor.specs.plan import Plan, Strategy
from advisor.step.program import Block, Collective, Copy, Node, phase, repeat, then

from .machines import cluster

GATHER = Block("gather", "buffers", transfers=(Collective("weights", "all-gather", 8e9, 1, waits=False),))
REDUCE = Block("reduce", "buffers", transfers=(Collective("gradients", "all-reduce", 8e9, 2, waits=True),))
FETCH = Block("fetch", "buffers", transfers=(Copy("weights", "host-to-device", 1e9, waits=False),))


def traffic(program: Node, ranks: int = 8) -> tuple[Flow, ...]:
    plan = Plan(strategy=Strategy.DDP, gpus=ranks, micro_batch=1)
    return flows(program, Ways(cluster(8, fast=200), plan))


def by_purpose(program: Node, ranks: int = 8) -> dict[tuple[str, str], Flow]:
    return {(flow.what, flow.kind): flow for flow in traffic(program, ranks)}


def test_repeats_multiply_bytes_and_time() -> None:
    once, often = (by_purpose(repeat(GATHER, times))["weights", "all-gather"] for times in (1, 12))

    assert once.sent_bytes == pytest.approx(7e9)
    assert once.seconds == pytest.approx(7 / 200)
    assert often.sent_bytes == pytest.approx(12 * once.sent_bytes)
    assert often.seconds == pytest.approx(12 * once.seconds)


def test_each_purpose_and_kind_has_its_own_line() -> None:
    found = by_purpose(then(phase("forward", GATHER, FETCH), phase("backward", GATHER, REDUCE)))

    assert {key: flow.sent_bytes for key, flow in found.items()} == {
        ("weights", "all-gather"): pytest.approx(14e9),
        ("weights", "host-to-device"): pytest.approx(1e9),
        ("gradients", "all-reduce"): pytest.approx(14e9),
    }


def test_what_happens_before_training_is_not_traffic_of_a_step() -> None:
    assert traffic(phase("init", GATHER)) == ()


def test_one_rank_copies_but_sends_nothing() -> None:
    found = by_purpose(then(GATHER, REDUCE, FETCH), ranks=1)

    assert found["weights", "all-gather"].sent_bytes == 0
    assert found["gradients", "all-reduce"].seconds == 0
    assert found["weights", "host-to-device"].seconds == pytest.approx(0.05)


def test_many_plans_are_read_as_each_alone() -> None:
    sizes, times = np.array([1e9, 2e9, 5e9]), np.array([0, 3, 1])

    def program(size: object, count: object) -> Node:
        sent = Collective("gradients", "all-reduce", size, 1, waits=True)  # type: ignore[arg-type]
        return phase("backward", repeat(Block("reduce", "buffers", transfers=(sent,)), count))  # type: ignore[arg-type]

    (together,) = traffic(program(sizes, times))

    for index, (size, count) in enumerate(zip(sizes.tolist(), times.tolist(), strict=True)):
        (alone,) = traffic(program(size, count))
        assert np.asarray(together.sent_bytes)[index] == pytest.approx(alone.sent_bytes)
        assert np.asarray(together.seconds)[index] == pytest.approx(alone.seconds)
