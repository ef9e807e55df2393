"""The step's schedule: what hides, what stands out, and what the rates say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog.models import find_model
from advisor.cost.results import StepTime
from advisor.cost.schedule import StepTimes, step_time
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.plan import OWN_STRATEGIES, Checkpointing, Count, Offload, Plan, Strategy
from advisor.step.build import build
from advisor.step.program import Block, Collective, Copy, Matmul, Node, phase, repeat, then

from .machines import CALIBRATION, cluster

JOB = Job(sequence_length=1024, global_batch=8)
PLAN = Plan(strategy=Strategy.FSDP, gpus=8, micro_batch=1)
ONE_SECOND = Block("linear", "activations", matmuls=(Matmul(8000, 8000, 1_562_500),))
"""2·10^14 FLOPs at 200 TFLOP/s."""
MODEL = find_model("Qwen2.5-0.5B").model

seconds = st.floats(0, 100)


def sends(what: str, takes_s: float, *, waits: bool) -> Block:
    """An all-gather over 8 ranks at 200 GB/s."""
    payload = takes_s * 200e9 * 8 / 7
    return Block(what, "buffers", transfers=(Collective(what, "all-gather", payload, 1, waits),))


def timed(program: Node, plan: Plan = PLAN, machines: Cluster | None = None) -> StepTime:
    return step_time(program, JOB, plan, machines or cluster(8), CALIBRATION).at(0)


def test_what_later_work_waits_for_stands_out_in_full() -> None:
    found = timed(phase("forward", ONE_SECOND, sends("weights", 0.5, waits=True)))

    assert found.exposed_communication_s == pytest.approx(0.5)
    assert found.step_s == pytest.approx(1.5)


# arXiv:2104.04473, section 2.2: (p - 1) / (v·m) of the time that a stage works.
@pytest.mark.parametrize(("stages", "virtual", "share"), [(1, 1, 0), (4, 1, 3 / 8), (4, 2, 3 / 16)])
def test_a_pipeline_waits_while_it_fills_and_drains(stages: int, virtual: int, share: float) -> None:
    plan = Plan(
        strategy=Strategy.MEGATRON,
        gpus=8,
        micro_batch=1,
        accumulation_steps=8,
        pipeline_parallel=stages,
        virtual_stages=virtual,
    )

    found = timed(phase("forward", ONE_SECOND, sends("weights", 0.5, waits=True)), plan)

    works_s = found.compute_s + found.exposed_communication_s
    assert found.bubble_s == pytest.approx(share * works_s)
    assert found.step_s == pytest.approx((1 + share) * works_s)


@pytest.mark.parametrize(("stages", "tensor"), [(1, 2), (2, 1), (4, 2)])
def test_model_flop_are_the_same_however_the_model_is_cut(stages: int, tensor: int) -> None:
    def model_flop(plan: Plan) -> float:
        program = build(MODEL, JOB, plan)
        found = step_time(program.pace, JOB, plan, cluster(8), CALIBRATION, program.slowest_excess)
        return float(found.model_flop)

    whole = Plan(strategy=Strategy.MEGATRON, gpus=8, micro_batch=1, accumulation_steps=2)
    cut = replace(whole, pipeline_parallel=stages, tensor_parallel=tensor, accumulation_steps=2 * stages * tensor)

    assert model_flop(cut) == pytest.approx(model_flop(whole), rel=1e-3)


def test_what_nothing_waits_for_hides_behind_the_compute_after_it_by_the_overlap_share() -> None:
    found = timed(phase("backward", sends("gradients", 0.5, waits=False), ONE_SECOND))

    assert found.exposed_communication_s == pytest.approx(0.5 - 0.8 * 0.5)


def test_what_is_longer_than_the_compute_after_it_stands_out() -> None:
    found = timed(phase("backward", sends("gradients", 3, waits=False), ONE_SECOND))

    assert found.exposed_communication_s == pytest.approx(3 - 0.8 * 1)


def test_what_comes_when_a_phase_ends_stands_out() -> None:
    found = timed(then(phase("backward", ONE_SECOND, sends("gradients", 0.5, waits=False)), phase("step", ONE_SECOND)))

    assert found.exposed_communication_s == pytest.approx(0.5)


def test_a_last_micro_step_hides_no_more_than_its_own_compute() -> None:
    reduce = sends("gradients", 2, waits=False)
    found = timed(then(repeat(phase("backward", ONE_SECOND), 3), phase("backward", reduce, ONE_SECOND)))

    assert found.compute_s == pytest.approx(4)
    assert found.exposed_communication_s == pytest.approx(2 - 0.8 * 1)


@given(seconds, seconds, st.floats(0.001, 50))
def test_hiding_never_makes_a_step_shorter_than_its_compute(waited: float, hidden: float, compute: float) -> None:
    work = repeat(ONE_SECOND, compute)
    found = timed(
        phase("backward", sends("weights", waited, waits=True), sends("gradients", hidden, waits=False), work)
    )

    assert found.step_s >= found.compute_s
    assert found.step_s <= (found.compute_s + waited + hidden) * (1 + 1e-9)


@given(st.sampled_from(OWN_STRATEGIES), st.floats(1, 100), st.floats(1, 100))
def test_more_bandwidth_is_never_slower(strategy: Strategy, link_times: float, network_times: float) -> None:
    plan = Plan(strategy=strategy, gpus=16, micro_batch=2)
    program = build(MODEL, JOB, plan).step
    slow, quick = cluster(16, 2, 50, 5), cluster(16, 2, 50 * link_times, 5 * network_times)

    assert timed(program, plan, quick).step_s <= timed(program, plan, slow).step_s * (1 + 1e-12)


@pytest.mark.parametrize("strategy", OWN_STRATEGIES)
def test_one_gpu_sends_nothing_and_waits_for_nothing(strategy: Strategy) -> None:
    plan = Plan(strategy=strategy, gpus=1, micro_batch=2)
    found = step_time(build(MODEL, JOB, plan).step, JOB, plan, cluster(1), CALIBRATION)

    assert found.traffic_at(0) == ()
    assert found.at(0).exposed_communication_s == 0


def test_the_update_on_the_gpu_is_bound_by_bandwidth() -> None:
    found = timed(phase("step", Block("Adam", "optimizer", moved_bytes=2e12, kernels=1)))

    assert found.optimizer_s == pytest.approx(2)
    assert found.compute_s == 0


def test_ranks_of_one_machine_share_its_host_memory() -> None:
    program = phase("step", Block("Adam", "optimizer", host_updated_parameters=1e9))

    def optimizer_s(gpus: int, nodes: int) -> float:
        return timed(program, replace(PLAN, gpus=gpus), cluster(gpus, nodes)).optimizer_s

    assert optimizer_s(1, 1) == pytest.approx(30 / 120)
    assert optimizer_s(8, 1) == pytest.approx(8 * 30 / 120)
    assert optimizer_s(8, 8) == pytest.approx(30 / 120)


def test_copies_to_the_host_are_lines_of_their_own_link() -> None:
    copy = Block("copy", "buffers", transfers=(Copy("gradients", "device-to-host", 10e9, waits=True),))
    (line,) = step_time(phase("backward", copy), JOB, PLAN, cluster(8), CALIBRATION).traffic_at(0)

    assert (line.what, line.collective, line.link) == ("gradients", "device-to-host", "host")
    assert (line.bytes_per_step, line.seconds, line.exposed_seconds) == (10**10, 0.5, 0.5)


@pytest.mark.parametrize(("gpus", "nodes", "name"), [(8, 1, "fast"), (16, 2, "network")])
def test_traffic_names_the_stretch_that_limits_it(gpus: int, nodes: int, name: str) -> None:
    program = phase("forward", sends("weights", 1, waits=True))
    (line,) = step_time(program, JOB, replace(PLAN, gpus=gpus), cluster(gpus, nodes), CALIBRATION).traffic_at(0)

    assert line.link == name


@pytest.mark.parametrize("offload", [Offload.NONE, Offload.OPTIMIZER, Offload.OPTIMIZER_AND_PARAMETERS])
def test_exposed_parts_of_the_traffic_add_up(offload: Offload) -> None:
    plan = Plan(strategy=Strategy.ZERO3, gpus=8, micro_batch=1, accumulation_steps=3, offload=offload)
    found = step_time(build(MODEL, JOB, plan).step, JOB, plan, cluster(8, fast=5), CALIBRATION)

    assert sum(line.exposed_seconds for line in found.traffic_at(0)) == pytest.approx(
        found.at(0).exposed_communication_s
    )
    assert all(line.exposed_seconds <= line.seconds * (1 + 1e-9) for line in found.traffic_at(0))


def test_the_range_and_the_rates_follow_from_the_step() -> None:
    found = timed(phase("forward", ONE_SECOND, sends("weights", 1, waits=True)))

    assert found.low_s == pytest.approx(1.8)
    assert found.high_s == pytest.approx(2.4)
    assert found.tokens_per_s == pytest.approx(8 * 1024 / 2)
    assert found.tokens_per_s_per_gpu == pytest.approx(1024 / 2)
    assert found.flop_per_s_per_gpu == pytest.approx(3 * 2e14 / 2)
    assert found.mfu == pytest.approx(3 * 2e14 / 2 / 400e12)


def palm_flop_per_token(parameters: int, layers: int, width: int, length: int) -> float:
    """Chowdhery et al., arXiv:2204.02311, appendix B: 6N + 12·L·H·Q·T."""
    return 6 * parameters + 12 * layers * width * length


@pytest.mark.parametrize("checkpointing", list(Checkpointing))
@pytest.mark.parametrize(("name", "layers", "width"), [("Qwen2.5-0.5B", 24, 896), ("Llama-3.1-8B", 32, 4096)])
def test_model_flop_are_those_of_the_palm_paper_whatever_is_recomputed(
    checkpointing: Checkpointing, name: str, layers: int, width: int
) -> None:
    model = find_model(name).model
    plan = Plan(strategy=Strategy.ZERO3, gpus=8, micro_batch=2, accumulation_steps=3, checkpointing=checkpointing)
    found = step_time(build(model, JOB, plan).step, JOB, plan, cluster(8), CALIBRATION)
    lookups = 0 if model.tied_embeddings else model.embedding_count
    in_products = model.parameter_count - lookups
    tokens = 3 * 2 * JOB.sequence_length

    # Norm weights and biases are in N but in no product: below 0.1 % of these models.
    assert np.asarray(found.model_flop) / tokens == pytest.approx(
        palm_flop_per_token(in_products, layers, width, JOB.sequence_length), rel=1e-3
    )


def test_recomputing_takes_time_and_lowers_the_mfu() -> None:
    plan = Plan(strategy=Strategy.FSDP, gpus=8, micro_batch=4)
    full = replace(plan, checkpointing=Checkpointing.FULL)
    once, again = (timed(build(MODEL, JOB, each).step, each) for each in (plan, full))

    # Forward is a third of the work, and all of it but the head runs again.
    assert 1.1 < again.compute_s / once.compute_s < 4 / 3
    assert again.mfu < once.mfu


@pytest.mark.parametrize("offload", [Offload.NONE, Offload.OPTIMIZER])
@pytest.mark.parametrize("strategy", [Strategy.DDP, Strategy.FSDP, Strategy.ZERO2, Strategy.ZERO3])
def test_many_plans_are_timed_as_each_alone(strategy: Strategy, offload: Offload) -> None:
    if offload.optimizer and not strategy.zero_stage:
        offload = Offload.NONE
    batches, steps = np.array([1, 2, 4, 8]), np.array([8, 4, 2, 1])

    def times(micro_batch: Count, accumulation_steps: Count) -> StepTimes:
        plan = Plan(
            strategy=strategy,
            gpus=8,
            micro_batch=micro_batch,
            accumulation_steps=accumulation_steps,
            offload=offload,
        )
        return step_time(build(MODEL, JOB, plan).step, JOB, plan, cluster(8), CALIBRATION)

    together = times(batches, steps)

    for index, (batch, count) in enumerate(zip(batches.tolist(), steps.tolist(), strict=True)):
        alone = times(batch, count)
        for name in StepTime.__slots__:
            assert getattr(together.at(index), name) == pytest.approx(getattr(alone.at(0), name)), name
        assert [line.bytes_per_step for line in together.traffic_at(index)] == [
            line.bytes_per_step for line in alone.traffic_at(0)
        ]
