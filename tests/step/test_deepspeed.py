"""DeepSpeed's stages: what their ranks hold, and which of them holds most."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from advisor.catalog.huggingface import model_from_config
from advisor.errors import SpecError
from advisor.specs.job import Job, Precision
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Checkpointing, GradientFormat, Plan, Strategy, ZeroSettings
from advisor.step.build import build
from advisor.step.program import fold, held_after, phase_peaks

SMALL = {
    "model_type": "llama",
    "vocab_size": 3000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
JOB = Job(sequence_length=16)


def small_model(**fields: Any) -> ModelSpec:
    return model_from_config(SMALL | fields, "small", "test")


def plan_of(strategy: Strategy, gpus: Any = 4, steps: Any = 1, **zero: Any) -> Plan:
    return Plan(strategy=strategy, gpus=gpus, micro_batch=1, accumulation_steps=steps, zero=ZeroSettings(**zero))


def by_category(model: ModelSpec, plan: Plan, rank: int | None = None) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in held_after(build(model, JOB, plan, rank).init):
        found[line.category] = found.get(line.category, 0) + line.size_bytes
    return found


@pytest.mark.parametrize("strategy", [Strategy.ZERO1, Strategy.ZERO2])
@pytest.mark.parametrize("bucket", [500_000_000, 150_000, 20_000])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gpus", [2, 5, 8])
def test_the_fullest_rank_holds_as_much_as_any(
    strategy: Strategy, bucket: int, steps: int, tied: bool, gpus: int
) -> None:
    model, plan = small_model(tie_word_embeddings=tied), plan_of(strategy, gpus, steps, reduce_bucket=bucket)
    fullest = build(model, JOB, plan)
    peaks = [fold(build(model, JOB, plan, rank).device).peak_bytes for rank in range(gpus)]

    assert fold(fullest.device).peak_bytes == max(peaks)
    assert peaks[int(fullest.rank)] == max(peaks)


@pytest.mark.parametrize("strategy", [Strategy.ZERO1, Strategy.ZERO2])
def test_the_fullest_ranks_of_many_plans_are_those_of_each(strategy: Strategy) -> None:
    gpus = np.array([1, 2, 4, 4, 16])
    together = build(small_model(), JOB, plan_of(strategy, gpus, np.array([1, 1, 1, 2, 3]), reduce_bucket=150_000))
    for index, count in enumerate(gpus):
        steps = (1, 1, 1, 2, 3)[index]
        alone = build(small_model(), JOB, plan_of(strategy, int(count), steps, reduce_bucket=150_000))

        assert together.rank[index] == alone.rank  # type: ignore[index]
        assert np.broadcast_to(fold(together.device).peak_bytes, 5)[index] == fold(alone.device).peak_bytes


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_is_not_there_is_refused(rank: int) -> None:
    with pytest.raises(SpecError, match=f"rank must be 0 to 3 of 4 GPUs, got {rank}"):
        build(small_model(), JOB, plan_of(Strategy.ZERO2), rank)


# 2 for weights, 4 for their fp32 copy, 8 for the moments, on every rank.
def test_stage_0_keeps_14_bytes_a_parameter() -> None:
    model = small_model()
    held = by_category(model, plan_of(Strategy.ZERO0))

    assert held["parameters"] == 2 * model.parameter_count
    assert held["optimizer"] == 12 * model.parameter_count + 4 * model.tensor_count


# Gradients of 2 and of 4 bytes stand side by side while the optimizer steps: 14 + 6.
def test_stage_0_casts_every_gradient_at_once() -> None:
    model = small_model()
    phases = phase_peaks(build(model, JOB, plan_of(Strategy.ZERO0)).device)

    assert phases["step"][0] - phases["init"][1] == 6 * model.parameter_count


def padded(model: ModelSpec, gpus: int) -> int:
    return -(-model.parameter_count // (2 * gpus)) * 2 * gpus


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_fp32_gradients_of_stage_1_cover_the_whole_model(gpus: int) -> None:
    model = small_model()
    flat = padded(model, gpus)
    held = by_category(model, plan_of(Strategy.ZERO1, gpus, gradient_format="fp32"))

    assert (held["parameters"], held["gradients"], held["optimizer"]) == (2 * flat, 4 * flat, 12 * flat // gpus + 4)


@pytest.mark.parametrize("rank", range(4))
def test_fp32_gradients_of_stage_2_are_exactly_a_share_from_micro_step_to_micro_step(rank: int) -> None:
    model = small_model()
    once, twice = (
        phase_peaks(build(model, JOB, plan_of(Strategy.ZERO2, 4, steps, gradient_format="fp32"), rank).device)
        for steps in (1, 2)
    )

    assert twice["loss"][1] - once["loss"][1] == 4 * padded(model, 4) // 4


@pytest.mark.parametrize(
    ("strategy", "precision", "gradients"),
    [(Strategy.ZERO0, "bf16", "fp32"), (Strategy.ZERO1, "fp16", "fp32"), (Strategy.ZERO2, "bf16", "fp16")],
)
def test_gradient_formats_without_a_model_are_refused(
    strategy: Strategy, precision: Precision, gradients: GradientFormat
) -> None:
    plan = plan_of(strategy, gradient_format=gradients)
    with pytest.raises(SpecError, match=f"in {precision} with gradients in {gradients} is not modelled"):
        build(small_model(), Job(precision=precision), plan)


def test_saying_the_model_s_own_format_changes_nothing() -> None:
    said, unsaid = (
        fold(build(small_model(), JOB, plan_of(Strategy.ZERO2, gradient_format=each)).device).peak_bytes
        for each in ("bf16", None)
    )

    assert said == unsaid


# In pure bf16 a gradient that is one piece is the optimizer's own: it is neither copied nor cast.
def test_a_flat_gradient_of_one_piece_is_not_copied() -> None:
    model = small_model(vocab_size=30_000, tie_word_embeddings=True)
    job = Job(sequence_length=1, parameter_format="bf16")
    phases = phase_peaks(build(model, job, plan_of(Strategy.ZERO2, 8, reduce_bucket=1000), 0).device)
    norm_bytes = 8 * padded(model, 8) // 8

    assert phases["step"][0] == phases["backward"][1] + norm_bytes


def test_every_case_leaves_nothing_behind() -> None:
    for strategy in (Strategy.ZERO0, Strategy.ZERO1, Strategy.ZERO2):
        for gradients in (None, "fp32") if strategy is not Strategy.ZERO0 else (None,):
            for checkpointing in Checkpointing:
                plan = Plan(
                    strategy=strategy,
                    gpus=np.array([2, 8, 64]),
                    micro_batch=1,
                    accumulation_steps=np.array([1, 2, 3]),
                    checkpointing=checkpointing,
                    zero=ZeroSettings(reduce_bucket=20_000, gradient_format=gradients),  # type: ignore[arg-type]
                )

                assert not np.any(fold(build(small_model(), JOB, plan).step).net_bytes)
