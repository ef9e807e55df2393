"""Kernels that torch.compile fuses: less is moved and launched, and nothing else changes."""

from __future__ import annotations

import pytest

from advisor.cost.compute import work
from advisor.specs.job import Job
from advisor.specs.model import Parameter
from advisor.specs.plan import Checkpointing, Plan, Strategy
from advisor.step.build import build
from advisor.step.fusing import fused
from advisor.step.laying import lay
from advisor.step.operators import add, linear, multiply_constant, square, unary
from advisor.step.program import Matmul, blocks, fold, phase_peaks, then
from advisor.step.tape import Tape, Weight
from step.catalog_models import model_of

ROWS, BYTES = 1000, 2
STREAM_BYTES = ROWS * BYTES


def tape() -> Tape:
    return Tape(compute_bytes=BYTES, autocast=False, sequence_length=1, grad_enabled=False)


def test_a_run_of_kernels_reads_its_inputs_and_writes_its_outputs_once() -> None:
    recorded = tape()
    x, y = (recorded.new(ROWS, BYTES) for _ in range(2))
    output = add(recorded, unary(recorded, multiply_constant(recorded, x), saves="output"), y)
    together = work(then(*lay(fused(recorded.events), 1)))

    assert work(then(*lay(recorded.events, 1))).moved_bytes == 7 * STREAM_BYTES
    assert (together.moved_bytes, together.kernels) == (3 * STREAM_BYTES, 1)
    assert output.size_bytes == STREAM_BYTES


def test_what_stays_is_written_though_it_is_used_at_once() -> None:
    recorded = tape()
    x = recorded.new(ROWS, BYTES)
    kept = square(recorded, x)
    output = square(recorded, kept)

    assert work(then(*lay(fused(recorded.events), 1))).moved_bytes == 3 * STREAM_BYTES
    assert kept.size_bytes == output.size_bytes


def test_products_stay_kernels_of_their_own_and_end_a_run() -> None:
    recorded = tape()
    weight = Weight(Parameter("weight", (10, 10)), BYTES, (10, 10))
    x = recorded.new(ROWS, BYTES)
    square(recorded, linear(recorded, square(recorded, square(recorded, x)), weight))
    eager, together = (work(then(*lay(events, 1))) for events in (recorded.events, fused(recorded.events)))

    assert (eager.kernels, together.kernels) == (4, 3)
    assert together.linear_flop == eager.linear_flop == Matmul(ROWS // 10, 10, 10).flop


@pytest.mark.parametrize("checkpointing", [Checkpointing.NONE, Checkpointing.SELECTIVE, Checkpointing.FULL])
@pytest.mark.parametrize("strategy", [Strategy.DDP, Strategy.FSDP, Strategy.ZERO2, Strategy.ZERO3])
def test_memory_and_products_of_a_step_are_those_of_eager_mode(
    strategy: Strategy, checkpointing: Checkpointing
) -> None:
    model = model_of("Qwen__Qwen2.5-1.5B")
    plan = Plan(strategy=strategy, gpus=2, micro_batch=2, checkpointing=checkpointing)
    eager, compiled = (build(model, Job(compile=compiles), plan).step for compiles in (False, True))
    done, less = work(eager), work(compiled)

    assert fold(compiled) == fold(eager)
    assert phase_peaks(compiled) == phase_peaks(eager)
    assert (less.linear_flop, less.attention_flop) == (done.linear_flop, done.attention_flop)
    assert less.kernels < 0.6 * done.kernels
    assert less.moved_bytes < 0.9 * done.moved_bytes
    assert all(block.moved_bytes >= 0 for _, block, _ in blocks(compiled))
