"""Replaying a program: as many bytes as fold says, and the same where what is known is not gone through again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step.catalog_models import shallow

from advisor.catalog.models import find_model
from advisor.cost.allocator import OutOfMemoryError, Settings
from advisor.cost.reserved import replayed
from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.plan import OWN_STRATEGIES, Checkpointing, Offload, Plan, Strategy, zero_settings
from advisor.step.build import StepProgram, build
from advisor.step.program import NOTHING, Node, fold, hold, phase, release, repeat, scratch, then

MIB = 2**20
FIXED = Settings()
EXPANDABLE = Settings(expandable_segments=True)


def program_of(step: Node, init: Node = NOTHING) -> StepProgram:
    return StepProgram(init=init, step=step, host=NOTHING, host_once=NOTHING)


def test_layers_tile_an_expandable_segment() -> None:
    """Twelve of 3 MiB and 20 on top: 56 MiB, three pages."""
    layer = then(scratch("sum", 2 * MIB), hold("saved", "activations", 3 * MIB))
    back = release("saved", "activations", 3 * MIB)
    step = then(repeat(layer, 12), scratch("logits", 20 * MIB), repeat(back, 12))

    found = replayed(program_of(step), EXPANDABLE)

    assert found.peak_allocated_bytes == 56 * MIB
    assert found.peak_reserved_bytes == 60 * MIB


def test_a_gap_that_is_too_small_is_reserved_beside() -> None:
    """The loss of causal models: 2, 4 and 4 parts, of which the last stays, then 4 and 4: 12 at a time, 14 reserved."""
    part = 100 * MIB
    step = then(
        hold("logits", "logits", 2 * part),
        hold("fp32 logits", "logits", 4 * part),
        hold("logarithms", "logits", 4 * part),
        release("logits", "logits", 2 * part),
        release("fp32 logits", "logits", 4 * part),
        hold("loss gradient", "logits", 4 * part),
        hold("logarithms' gradient", "logits", 4 * part),
        *(release(name, "logits", 4 * part) for name in ("logarithms", "loss gradient", "logarithms' gradient")),
    )

    found = replayed(program_of(step), EXPANDABLE)

    assert found.peak_allocated_bytes == 12 * part
    assert found.peak_reserved_bytes == 14 * part


def test_what_goes_back_in_part_stays_as_a_smaller_tensor() -> None:
    step = then(hold("buffer", "buffers", 30 * MIB), release("buffer", "buffers", 10 * MIB))
    found = replayed(program_of(then(step, release("buffer", "buffers", 20 * MIB))), EXPANDABLE)

    assert found.peak_allocated_bytes == 30 * MIB
    assert found.allocated_bytes == 0


def test_giving_back_what_was_never_taken_is_an_error() -> None:
    with pytest.raises(SpecError, match="gives back 3 bytes more of 'weights' than it took"):
        replayed(program_of(release("weights", "parameters", 3)), FIXED)


def test_a_device_that_cannot_hold_the_step_is_an_error_and_one_that_can_is_none() -> None:
    program = program_of(scratch("logits", 20 * MIB))

    with pytest.raises(OutOfMemoryError):
        replayed(program, replace(EXPANDABLE, capacity_bytes=18 * MIB))
    assert replayed(program, replace(EXPANDABLE, capacity_bytes=20 * MIB)) == replayed(program, EXPANDABLE)


sizes = st.one_of(st.integers(1, 8), st.integers(1, 6000), st.integers(1, 80_000)).map(lambda count: 512 * count)
"""Bytes that need no rounding, up to 40 MiB."""


@st.composite
def balanced(draw: st.DrawFn, depth: int = 3) -> Node:
    """A program that gives back what it takes: forward and backward over layers, and things that come and go."""
    kind = draw(st.sampled_from(["scratch", "around", "layers", "several"])) if depth else "scratch"
    if kind == "scratch":
        return scratch("passing", draw(sizes))
    within = draw(balanced(depth - 1))
    label = f"kept {depth}"
    size, times = draw(sizes), draw(st.integers(0, 6))
    if kind == "around":
        return then(hold(label, "buffers", size), within, release(label, "buffers", size))
    if kind == "layers":
        forward = repeat(then(scratch("passing", draw(sizes)), hold(label, "activations", size)), times)
        backward = repeat(then(within, release(label, "activations", size)), times)
        return then(forward, draw(balanced(depth - 1)), backward)
    return repeat(then(within, draw(balanced(depth - 1))), times)


@settings(deadline=None)
@given(balanced(), balanced(), st.booleans(), st.integers(1, 5))
def test_what_is_known_is_what_would_have_come_out(
    within: Node, around: Node, expandable: bool, micro_steps: int
) -> None:
    step = then(around, repeat(phase("micro-step", within), micro_steps))
    program = program_of(step, init=hold("weights", "parameters", 5 * MIB))
    setting = Settings(expandable_segments=expandable)
    found = replayed(program, setting)

    assert found == replayed(program, setting, whole=True)
    if expandable:
        assert found.peak_allocated_bytes == fold(program.device).peak_bytes


@settings(deadline=None)
@given(balanced(), st.booleans(), st.floats(0, 2))
def test_a_replay_is_given_up_only_where_more_is_reserved_than_may_be(
    within: Node, expandable: bool, share: float
) -> None:
    program = program_of(repeat(phase("micro-step", within), 3))
    setting = Settings(expandable_segments=expandable)
    reserved = replayed(program, setting)
    most_bytes = share * reserved.peak_reserved_bytes
    try:
        found = replayed(program, setting, most_bytes=most_bytes)
    except OutOfMemoryError:
        assert reserved.peak_reserved_bytes > most_bytes
    else:
        assert found == reserved
        assert reserved.peak_reserved_bytes <= most_bytes


VARIANTS = [(strategy, Offload.NONE) for strategy in OWN_STRATEGIES] + [
    (Strategy.ZERO2, Offload.OPTIMIZER),
    (Strategy.ZERO3, Offload.OPTIMIZER_AND_PARAMETERS),
]


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "gpt2", "t5-small"])
@pytest.mark.parametrize("setting", [FIXED, EXPANDABLE], ids=["fixed", "expandable"])
def test_what_is_known_of_real_programs_is_what_would_have_come_out(name: str, setting: Settings) -> None:
    model = shallow(find_model(name).model)
    for strategy, offload in VARIANTS:
        for checkpointing in Checkpointing:
            if strategy.is_fsdp and model.objective != "causal":
                continue
            plan = Plan(
                strategy=strategy,
                offload=offload,
                gpus=4,
                micro_batch=2,
                accumulation_steps=3,
                checkpointing=checkpointing,
                zero=zero_settings(strategy),
            )
            program = build(model, Job(sequence_length=256), plan)
            found = replayed(program, setting)

            assert found == replayed(program, setting, whole=True), plan.title
            peak_bytes = fold(program.device).peak_bytes
            assert peak_bytes <= found.peak_allocated_bytes <= found.peak_reserved_bytes, plan.title
