"""Whole steps: balanced for every model and strategy, alike one by one and at once, and ordered as they must be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from advisor.catalog.legality import refusal_of_optimizer
from advisor.errors import SpecError
from advisor.specs.job import Job, Optimizer
from advisor.specs.model import ModelSpec, Parameter
from advisor.specs.plan import (
    OWN_STRATEGIES,
    Checkpointing,
    Count,
    Offload,
    Plan,
    Strategy,
    ZeroSettings,
    zero_settings,
)
from advisor.step.build import StepProgram, build
from advisor.step.program import Line, fold, held_after, peak_of, phase_peaks, then
from advisor.step.schemes import scheme_of
from advisor.step.states import row_shards
from step.catalog_models import ONE_OF_EACH, model_of

VARIANTS = [
    (strategy, offload)
    for strategy in OWN_STRATEGIES
    for offload in Offload
    if offload is Offload.NONE
    or strategy is Strategy.ZERO3
    or (strategy in (Strategy.ZERO1, Strategy.ZERO2) and offload is Offload.OPTIMIZER)
]
SHARDED = [variant for variant in VARIANTS if variant[0] not in (Strategy.DDP, Strategy.ZERO0)]
JOB = Job(sequence_length=512)
SHORT = Job(sequence_length=128)
QWEN = model_of("Qwen__Qwen2.5-1.5B")
TABLES = 4 * 128
"""Bytes of its inverse rotary frequencies, twice one for each two of a head's 128 dimensions."""
TELLING = ["Qwen__Qwen2.5-1.5B", "meta-llama__Llama-3.1-8B", "mistralai__Mixtral-8x7B-v0.1", "openai-community__gpt2"]
"""Tied and untied, dense and sparse, with and without biases."""

variants = st.sampled_from(VARIANTS)
checkpointings = st.sampled_from(list(Checkpointing))


def plan_of(
    variant: tuple[Strategy, Offload],
    gpus: Count = 8,
    micro_batch: Count = 1,
    accumulation_steps: Count = 1,
    checkpointing: Checkpointing = Checkpointing.NONE,
) -> Plan:
    return Plan(
        strategy=variant[0],
        gpus=gpus,
        micro_batch=micro_batch,
        accumulation_steps=accumulation_steps,
        checkpointing=checkpointing,
        offload=variant[1],
        zero=zero_settings(variant[0]),
    )


def peak_bytes(model: ModelSpec, job: Job, plan: Plan) -> Any:
    return np.asarray(fold(build(model, job, plan).device).peak_bytes)


def state_bytes(model: ModelSpec, job: Job, plan: Plan) -> Any:
    return np.asarray(fold(build(model, job, plan).init).net_bytes)


def every_plan() -> Iterator[Plan]:
    for variant in VARIANTS:
        for checkpointing in Checkpointing:
            yield plan_of(variant, 8, 2, 3, checkpointing)


@pytest.mark.parametrize("profile", ONE_OF_EACH)
def test_a_step_gives_back_what_it_takes(profile: str) -> None:
    gpus, steps = np.array([1, 2, 8, 8, 8]), np.array([1, 1, 1, 2, 4])
    for variant in VARIANTS:
        for checkpointing in Checkpointing:
            plan = plan_of(variant, gpus, 2, steps, checkpointing)

            assert not np.any(fold(build(model_of(profile), JOB, plan).step).net_bytes), plan.title


@pytest.mark.parametrize("profile", ONE_OF_EACH)
def test_the_ledger_is_whole_and_without_debts(profile: str) -> None:
    """At the peak, and between steps, where each name stands for what it stood for before the step."""
    for plan in every_plan():
        program = build(model_of(profile), JOB, plan)
        peak = peak_of(program.device)

        assert peak.size_bytes == fold(program.device).peak_bytes, plan.title
        assert sum(line.size_bytes for line in peak.ledger) == peak.size_bytes
        assert [line for line in peak.ledger if line.size_bytes < 0] == [], plan.title
        assert sorted(held_after(program.device)) == sorted(held_after(program.init)), plan.title


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_has_its_phases_in_order(variant: tuple[Strategy, Offload]) -> None:
    for steps in (1, 2, 5):
        phases = phase_peaks(build(QWEN, JOB, plan_of(variant, 8, 2, steps)).device)

        assert list(phases) == ["init", "forward", "loss", "backward", "step"]
        assert max(peak for peak, _ in phases.values()) == peak_bytes(QWEN, JOB, plan_of(variant, 8, 2, steps))


@st.composite
def counts_side_by_side(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    count = st.integers(1, 12)
    return draw(st.lists(st.tuples(st.integers(1, 70), count, count), min_size=1, max_size=5))


def readings(program: StepProgram) -> dict[str, Any]:
    parts = ("init", "step", "device", "host", "host_once")
    extents = {part: fold(getattr(program, part)) for part in parts}
    return {f"{part} {name}": value for part in parts for name, value in extents[part]._asdict().items()}


@settings(deadline=None)
@given(
    counts_side_by_side(),
    variants,
    checkpointings,
    st.sampled_from(get_args(Optimizer)),
    st.sampled_from([*TELLING, "google-t5__t5-small"]),
)
def test_many_plans_at_once_are_each_alone(
    counts: list[tuple[int, int, int]],
    variant: tuple[Strategy, Offload],
    checkpointing: Checkpointing,
    optimizer: Any,
    profile: str,
) -> None:
    gpus, batches, steps = (np.array(column) for column in zip(*counts, strict=True))
    job = replace(SHORT, optimizer=optimizer)
    together = plan_of(variant, gpus, batches, steps, checkpointing)
    assume(refusal_of_optimizer(job, *variant, together.fsdp.version) is None)
    many = readings(build(model_of(profile), job, together))

    for index in range(len(counts)):
        alone = readings(build(model_of(profile), job, together.at(index)))
        picked = {name: np.broadcast_to(value, len(counts))[index] for name, value in many.items()}
        assert picked == alone


@pytest.mark.parametrize("profile", ONE_OF_EACH)
def test_more_ranks_never_need_more_each_but_for_padding(profile: str) -> None:
    gpus = 2 ** np.arange(11)
    for variant in SHARDED:
        # Stages 1 and 2 pad one flat buffer to twice the ranks; stage 3 pads every tensor that it keeps whole, and
        # every gradient in a bucket's copy. FSDP2 pads every tensor to rows for each rank: weights, the buffers that
        # they come in, gradients, and the buffers that those go in.
        model, flat = model_of(profile), variant[0] in (Strategy.ZERO1, Strategy.ZERO2)
        padding = 2 * gpus * JOB.compute_bytes if flat else 0 * gpus
        if variant[0] is Strategy.ZERO3:
            padding = 2 * model.tensor_count * gpus * JOB.compute_bytes
        if variant[0].is_fsdp:
            rows = np.asarray(row_shards(tuple(model.parameters()), gpus))
            padding = 4 * (gpus * rows - model.parameter_count) * JOB.compute_bytes
        # A bucket of gradients is copied once it holds those of several ranks.
        copy = flat * JOB.compute_bytes * max(500_000_000, model_of(profile).largest_parameter.numel)
        for checkpointing in Checkpointing:
            program = build(model_of(profile), JOB, plan_of(variant, gpus, 1, 2, checkpointing))
            assert (np.diff(fold(program.init).net_bytes) <= padding[1:]).all(), (variant, checkpointing)
            assert (np.diff(fold(program.device).peak_bytes) <= padding[1:] + copy).all(), (variant, checkpointing)


@settings(deadline=None)
@given(variants, checkpointings, st.sampled_from(TELLING), st.lists(st.integers(1, 64), min_size=2), st.integers(1, 4))
def test_a_larger_micro_batch_never_needs_less(
    variant: tuple[Strategy, Offload],
    checkpointing: Checkpointing,
    profile: str,
    batches: list[int],
    steps: int,
) -> None:
    plan = plan_of(variant, 8, np.array(sorted(batches)), steps, checkpointing)

    assert (np.diff(peak_bytes(model_of(profile), SHORT, plan)) >= 0).all()


@settings(deadline=None)
@given(variants, checkpointings, st.sampled_from(TELLING), st.integers(1, 2048), st.integers(1, 2048))
def test_a_longer_sequence_never_needs_less(
    variant: tuple[Strategy, Offload], checkpointing: Checkpointing, profile: str, one: int, other: int
) -> None:
    plan = plan_of(variant, checkpointing=checkpointing)
    short, long = (
        peak_bytes(model_of(profile), replace(JOB, sequence_length=length), plan) for length in sorted((one, other))
    )

    assert short <= long


@settings(deadline=None)
@given(variants, checkpointings, st.sampled_from(TELLING), st.integers(1, 6), st.integers(1, 6))
def test_accumulating_never_needs_less(
    variant: tuple[Strategy, Offload], checkpointing: Checkpointing, profile: str, one: int, other: int
) -> None:
    plan = plan_of(variant, 8, 2, np.array(sorted((one, other))), checkpointing)
    fewer, more = np.broadcast_to(peak_bytes(model_of(profile), SHORT, plan), 2)

    assert fewer <= more


@pytest.mark.parametrize("profile", ONE_OF_EACH)
def test_recomputing_never_leaves_more_behind_forward(profile: str) -> None:
    batches = np.array([1, 2, 8])
    for variant in VARIANTS:
        kept, recomputed = (
            np.asarray(
                phase_peaks(build(model_of(profile), JOB, plan_of(variant, 8, batches, 1, each)).device)["loss"][1]
            )
            for each in (Checkpointing.NONE, Checkpointing.FULL)
        )

        assert (recomputed < kept).all(), variant


def states_by_category(model: ModelSpec, job: Job, plan: Plan) -> dict[str, int]:
    """What the strategy holds between steps, without laying out a step."""
    found: dict[str, int] = {}
    for line in held_after(then(*scheme_of(model, job, plan).states())):
        found[line.category] = found.get(line.category, 0) + line.size_bytes
    return found


# Rajbhandari et al., arXiv:1910.02054, figure 1: what is cut, each stage cuts too. Stage 3's bucket, which DeepSpeed
# keeps between steps and the other stages do not, is left out; DDP keeps buckets of its own.
@pytest.mark.parametrize("gpus", [2, 3, 8, 64])
@pytest.mark.parametrize("profile", ONE_OF_EACH)
def test_each_stage_holds_no_more_than_the_one_before(profile: str, gpus: int) -> None:
    held: dict[Strategy, int] = {}
    for strategy in (Strategy.DDP, Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3):
        lines = states_by_category(model_of(profile), JOB, plan_of((strategy, Offload.NONE), gpus))
        held[strategy] = sum(lines.values()) - (lines["buffers"] if strategy is Strategy.ZERO3 else 0)
    # At stage 3 every tensor is padded for itself, and small ones are kept whole beside their share.
    extra = 16 * sum(1 for _ in model_of(profile).parameters()) + 2 * small_elements(model_of(profile))

    # Stage 3 keeps the gradients' share between steps: 16Ψ/N against 2Ψ + 12Ψ/N, which on two ranks is the same.
    assert held[Strategy.ZERO3] <= held[Strategy.ZERO2] + extra
    assert held[Strategy.ZERO2] <= held[Strategy.ZERO1] <= held[Strategy.DDP]


def small_elements(model: ModelSpec, gpus: int = 1) -> int:
    """Elements of the tensors that stage 3 keeps whole, each padded to the ranks."""
    threshold = ZeroSettings().persistence_threshold
    return sum(padded(each.numel, gpus) for each in model.parameters() if each.numel <= threshold)


def step_counters(model: ModelSpec) -> int:
    """A fused Adam counts the steps of each tensor in an fp32 number on the GPU."""
    return 4 * sum(1 for _ in model.parameters())


def padded(count: int, to: int) -> int:
    return -(-count // to) * to


def sub_group_count(shares: Sequence[int], reaches: int = 10**9) -> int:
    """Sub-groups that tensors make one after another, each closed by the one with which it has *reaches* elements."""
    count = held = 0
    for share in shares:
        count += held == 0
        held = 0 if held + share >= reaches else held + share
    return count


BUCKET_BYTES = 2 * 500_000_000


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_starts_from_the_states_of_its_strategy(variant: tuple[Strategy, Offload]) -> None:
    scheme = sum(states_by_category(QWEN, JOB, plan_of(variant)).values())

    assert scheme + TABLES == state_bytes(QWEN, JOB, plan_of(variant))


@pytest.mark.parametrize("gpus", [1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("profile", TELLING)
class TestStatesBetweenSteps:
    """The 2 + 2 + 12 rule, to the byte, with each framework's padding."""

    def test_zero_1_and_2_keep_weights_whole_and_cut_the_rest(self, profile: str, gpus: int) -> None:
        model = model_of(profile)
        flat = padded(model.parameter_count, 2 * gpus)
        for strategy in (Strategy.ZERO1, Strategy.ZERO2):
            held = states_by_category(model, JOB, plan_of((strategy, Offload.NONE), gpus))

            # Adam's step count and the last gradient norm are fp32 scalars.
            assert held == {"parameters": 2 * flat, "optimizer": 12 * flat // gpus + 4, "buffers": 4}

    def test_zero_3_cuts_all_of_it_and_keeps_a_bucket_and_small_weights(self, profile: str, gpus: int) -> None:
        model = model_of(profile)
        shares = [padded(each.numel, gpus) // gpus for each in model.parameters()]
        shard = sum(shares)
        held = states_by_category(model, JOB, plan_of((Strategy.ZERO3, Offload.NONE), gpus))

        assert held == {
            "parameters": 2 * (shard + small_elements(model, gpus)),
            "gradients": 2 * shard,
            # Adam's step count of each sub-group; beside the bucket, a gradient norm in fp64 and a flag.
            "optimizer": 12 * shard + 4 * sub_group_count(shares),
            "buffers": BUCKET_BYTES + 9,
        }

    def test_fsdp_cuts_fp32_weights_and_moments_by_rows(self, profile: str, gpus: int) -> None:
        model = model_of(profile)
        shard = sum(padded(each.shape[0], gpus) // gpus * (each.numel // each.shape[0]) for each in model.parameters())
        for strategy in (Strategy.FSDP, Strategy.FSDP_GRAD_OP):
            held = states_by_category(model, JOB, plan_of((strategy, Offload.NONE), gpus))

            assert held == {"parameters": 4 * shard, "optimizer": 8 * shard + step_counters(model)}

    def test_ddp_keeps_fp32_weights_moments_and_its_buckets(self, profile: str, gpus: int) -> None:
        count = model_of(profile).parameter_count
        held = states_by_category(model_of(profile), JOB, plan_of((Strategy.DDP, Offload.NONE), gpus))

        assert held.pop("buffers", 0) == (4 * count if gpus > 1 else 0)
        assert held == {"parameters": 4 * count, "optimizer": 8 * count + step_counters(model_of(profile))}

    def test_an_optimizer_on_the_host_leaves_the_weights(self, profile: str, gpus: int) -> None:
        model = model_of(profile)
        flat = padded(model.parameter_count, 2 * gpus)
        held = states_by_category(model, JOB, plan_of((Strategy.ZERO2, Offload.OPTIMIZER), gpus))

        assert held == {"parameters": 2 * flat, "buffers": 2 * model.largest_parameter.numel}

    def test_parameters_on_the_host_leave_a_bucket_and_small_weights(self, profile: str, gpus: int) -> None:
        model = model_of(profile)
        held = states_by_category(model, JOB, plan_of((Strategy.ZERO3, Offload.OPTIMIZER_AND_PARAMETERS), gpus))

        overflow_flag = 1
        assert held == {"parameters": 2 * small_elements(model, gpus), "buffers": BUCKET_BYTES + overflow_flag}


# Weights, gradients and optimizer states in bf16: 2 + 2 + 4, and 2 more for DeepSpeed's own copy of the weights.
@pytest.mark.parametrize(
    ("strategy", "bytes_per_parameter"), [(Strategy.DDP, 8), (Strategy.FSDP, 6 / 8), (Strategy.ZERO2, 2 + 6 / 8)]
)
def test_in_pure_bf16_states_are_narrow(strategy: Strategy, bytes_per_parameter: float) -> None:
    job = replace(JOB, parameter_format="bf16")

    held = state_bytes(QWEN, job, plan_of((strategy, Offload.NONE)))

    assert held / QWEN.parameter_count == pytest.approx(bytes_per_parameter, rel=1e-5)


# Every stage clones its share of the weights. Stage 3 has a branch to do without, which compares a torch.device with
# its name and so is never taken (deepspeed 0.19.8, stage3.py _create_fp32_partitions).
@pytest.mark.parametrize(
    ("strategy", "per_parameter"), [(Strategy.ZERO1, 4 + 12 / 8), (Strategy.ZERO3, (4 + 4 + 4 + 8) / 8)]
)
def test_in_fp32_too_the_optimizer_has_its_own_copy_of_the_weights(strategy: Strategy, per_parameter: float) -> None:
    job = replace(JOB, precision="fp32")
    held = states_by_category(QWEN, job, plan_of((strategy, Offload.NONE)))
    kept = sum(size for category, size in held.items() if category != "buffers")
    small = 4 * small_elements(QWEN) if strategy is Strategy.ZERO3 else 0

    assert (kept - small) / QWEN.parameter_count == pytest.approx(per_parameter, rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp16_takes_what_bf16_takes(variant: tuple[Strategy, Offload]) -> None:
    bf16, fp16 = (peak_bytes(QWEN, replace(JOB, precision=each), plan_of(variant)) for each in ("bf16", "fp16"))

    assert bf16 == fp16


# 4 + 4 bytes pinned and rounded up, 8 for the moments, 2 pinned for staging: 18 bytes per parameter of the share.
@pytest.mark.parametrize("strategy", [Strategy.ZERO2, Strategy.ZERO3])
def test_the_host_holds_at_least_18_bytes_of_the_share(strategy: Strategy) -> None:
    gpus = np.array([1, 2, 8, 64])
    program = build(QWEN, JOB, plan_of((strategy, Offload.OPTIMIZER), gpus))
    share = QWEN.parameter_count / gpus
    largest = 2 * QWEN.largest_parameter.numel if strategy is Strategy.ZERO2 else 0

    held = np.asarray(fold(program.host).peak_bytes) - largest

    assert (18 * share <= held).all()
    assert (held <= (2 * 10 + 8) * share * 1.001).all()


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if not variant[1].optimizer])
def test_without_offload_nothing_stays_on_the_host(variant: tuple[Strategy, Offload]) -> None:
    program = build(QWEN, JOB, plan_of(variant))

    assert fold(program.host).net_bytes == fold(program.host_once).net_bytes == 0


@pytest.mark.parametrize("profile", ONE_OF_EACH)
def test_offloading_more_never_needs_more_of_the_device(profile: str) -> None:
    model = model_of(profile)
    kept, optimizer, both = (
        peak_bytes(model, JOB, plan_of((Strategy.ZERO3, offload), np.array([1, 8, 64]), 2)) for offload in Offload
    )

    assert (both <= optimizer).all()
    assert (optimizer <= kept).all()


def test_no_gradient_is_left_out_of_the_peak_of_ddp() -> None:
    """Whole gradients are there when the optimizer steps, whatever the activations were before."""
    plan = plan_of((Strategy.DDP, Offload.NONE), 1)
    phases = phase_peaks(build(QWEN, Job(sequence_length=1), plan).device)

    # Adam updates in place: 4 bytes of gradients beside 12 of states.
    assert phases["step"][0] == 16 * QWEN.parameter_count + TABLES + step_counters(QWEN)
    assert phases["step"][1] == phases["init"][1] == 12 * QWEN.parameter_count + TABLES + step_counters(QWEN)


@pytest.mark.parametrize(("optimizer", "bytes_beside"), [("adamw-fused", 0), ("adamw-foreach", 4)])
def test_the_optimizer_s_own_tensors_are_at_the_peak_of_the_step(optimizer: Any, bytes_beside: int) -> None:
    job = Job(sequence_length=1, optimizer=optimizer)
    phases = phase_peaks(build(QWEN, job, plan_of((Strategy.DDP, Offload.NONE), 1)).device)

    # Only a fused update counts its steps on the GPU.
    small = TABLES + step_counters(QWEN) if optimizer == "adamw-fused" else TABLES
    assert phases["step"][0] == (16 + bytes_beside) * QWEN.parameter_count + small


def test_fsdp_that_keeps_weights_gathered_holds_them_all_at_the_turn() -> None:
    """From the end of forward to backward: 2 bytes per parameter of the layers more than a full shard."""
    ends = {
        strategy: phase_peaks(build(QWEN, JOB, plan_of((strategy, Offload.NONE))).device)["loss"][1]
        for strategy in (Strategy.FSDP, Strategy.FSDP_GRAD_OP)
    }
    in_layers = sum(layer.parameter_count for layer in QWEN.layers)

    assert ends[Strategy.FSDP_GRAD_OP] - ends[Strategy.FSDP] == 2 * in_layers


def test_a_decoder_that_starts_within_a_run_is_refused() -> None:
    model = replace(model_of("google-t5__t5-small"), decoder_start=3)

    with pytest.raises(SpecError, match="decoder_start 3 is not where a run of layers starts"):
        build(model, SHORT, plan_of((Strategy.DDP, Offload.NONE)))


def test_a_model_whose_code_does_not_know_a_parameter_is_refused() -> None:
    model = replace(QWEN, head=(*QWEN.head, Parameter("stray", (3, 5))))

    with pytest.raises(SpecError, match="stray"):
        build(model, SHORT, plan_of((Strategy.DDP, Offload.NONE)))


def test_the_largest_line_of_a_small_batch_is_the_weights_or_the_optimizer() -> None:
    peak = peak_of(build(QWEN, Job(sequence_length=1), plan_of((Strategy.DDP, Offload.NONE), 1)).device)

    largest: Line = max(peak.ledger, key=lambda line: line.size_bytes)
    assert (largest.category, largest.size_bytes) == ("optimizer", 8 * QWEN.parameter_count)
