"""ZeRO++: what goes over the network, what second copies take, and what DeepSpeed cannot quantise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from advisor.catalog.huggingface import model_from_config
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec, Parameter
from advisor.specs.plan import Checkpointing, Count, Plan, Strategy, ZeroSettings
from advisor.step.build import build
from advisor.step.program import Collective, blocks, fold, phase_peaks
from advisor.step.zero_plus import all_parts, exchange_bytes, refusal
from step.catalog_models import model_of

LLAMA = model_of("meta-llama__Llama-3.1-8B")
HALF = Job(sequence_length=128, precision="fp16")
MACHINE_GPUS = 8
ALL = ZeroSettings(hpz_partition=8, quantized_weights=True, quantized_gradients=True, machine_gpus=MACHINE_GPUS)
SMALL = model_from_config(
    {
        "model_type": "llama",
        "vocab_size": 3000,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small",
    "test",
)
# Of 500,000 parameters some are freed in forward, some in backward, and some stay whole.
WINDOW: dict[str, Any] = {
    "prefetch_bucket": 50_000,
    "max_live_parameters": 200_000,
    "max_reuse_distance": 100_000,
    "persistence_threshold": 1000,
}


def plan(zero: ZeroSettings, gpus: Count = 16, steps: Count = 1) -> Plan:
    strategy = Strategy.ZERO3_PLUS if zero.is_plus else Strategy.ZERO3
    return Plan(strategy=strategy, gpus=gpus, micro_batch=1, accumulation_steps=steps, zero=zero)


def over_network_bytes(model: ModelSpec, chosen: Plan) -> dict[str, float]:
    """What the GPUs of a machine together hand to messages that leave it, by purpose."""
    found: dict[str, float] = {}
    for _, block, times in blocks(build(model, HALF, chosen).step):
        for each in block.transfers:
            assert isinstance(each, Collective)
            if each.group in ("data", "machines"):
                together = chosen.zero.machine_gpus if each.group == "machines" else 1
                found[each.what] = found.get(each.what, 0) + float(times * each.payload_bytes * together)
    return found


# arXiv:2306.10209, table 1: of M bytes of half weights ZeRO-3 sends 3M between machines, and ZeRO++ 0.75M.
@pytest.mark.parametrize(
    ("zero", "share"),
    [
        (ZeroSettings(), 3),
        (ZeroSettings(quantized_weights=True), 2),
        (ZeroSettings(hpz_partition=8), 2),
        (replace(ALL, quantized_gradients=False), 1.5),
        (ALL, 0.75),
    ],
    ids=["ZeRO-3", "qwZ", "hpZ", "qwZ and hpZ", "ZeRO++"],
)
def test_between_machines_goes_what_the_paper_says(zero: ZeroSettings, share: float) -> None:
    sent = sum(over_network_bytes(LLAMA, plan(zero)).values())

    assert sent / (2 * LLAMA.parameter_count) == pytest.approx(share, rel=0.005)


def test_later_micro_steps_gather_from_second_copies_alone() -> None:
    one, four = (over_network_bytes(LLAMA, plan(ALL, steps=steps)) for steps in (1, 4))

    assert four["weights"] == one["weights"]
    assert four["gradients between machines"] == 4 * one["gradients between machines"]


def test_in_one_machine_gradients_are_not_quantised() -> None:
    sent = over_network_bytes(LLAMA, plan(ALL, gpus=MACHINE_GPUS))

    assert "gradients between machines" not in sent
    assert sent["gradients"] == pytest.approx(2 * LLAMA.parameter_count, rel=0.001)


def test_second_copies_take_two_bytes_of_a_parameter_over_the_ranks_of_a_copy() -> None:
    with_copies, without = (
        phase_peaks(build(LLAMA, HALF, plan(zero, gpus=MACHINE_GPUS)).device)
        for zero in (ZeroSettings(hpz_partition=MACHINE_GPUS), ZeroSettings())
    )

    assert with_copies["step"][0] - without["step"][0] == 2 * LLAMA.parameter_count / MACHINE_GPUS
    assert with_copies["step"][1] == without["step"][1]


@pytest.mark.parametrize("checkpointing", list(Checkpointing))
@pytest.mark.parametrize(
    "zero",
    [
        ZeroSettings(hpz_partition=2, **WINDOW),
        ZeroSettings(hpz_partition=4),
        ZeroSettings(quantized_weights=True, quantized_gradients=True, machine_gpus=2, **WINDOW),
        ZeroSettings(hpz_partition=2, quantized_weights=True, quantized_gradients=True, machine_gpus=2, **WINDOW),
    ],
    ids=lambda zero: zero.parts_title.strip(),
)
def test_plans_together_are_each_by_itself_and_give_back_what_they_take(
    zero: ZeroSettings, checkpointing: Checkpointing
) -> None:
    together = replace(
        plan(zero, np.array([4, 4, 4, 8, 16]), np.array([1, 2, 5, 1, 3])), checkpointing=checkpointing, micro_batch=2
    )
    found = build(SMALL, HALF, together)

    assert not np.any(fold(found.step).net_bytes)
    for index in range(5):
        alone = build(SMALL, HALF, together.at(index))
        assert fold(alone.step).net_bytes == 0
        assert fold(alone.device).peak_bytes == np.broadcast_to(fold(found.device).peak_bytes, 5)[index]


def test_one_gradient_s_exchange_holds_what_it_is_made_from() -> None:
    # Of 2^16 elements int4 takes 2^15 bytes, sent and received; an eighth of that twice; fp16 of the eighth; and two
    # sums of a sixteenth.
    matrix, bias = Parameter("weight", (1024, 64)), Parameter("bias", (1024,))

    held = 2 * 2**15 + 2 * 2**12 + 2**14
    assert exchange_bytes([matrix], 16, 8) == held + 2 * 2**13
    # The next finds its buffers and its result still there, and takes a new first one.
    assert exchange_bytes([matrix, matrix], 16, 8) == held + 2**13 + 2**15
    assert exchange_bytes([bias], 16, 8) == 0


def test_bf16_gradients_are_not_quantised() -> None:
    job = replace(HALF, precision="bf16")
    found = refusal(LLAMA, job, plan(ALL))

    assert found is not None
    assert "quantises gradients in bf16 as if they were fp16" in found
    assert refusal(LLAMA, HALF, plan(ALL)) is None
    assert not all_parts(ZeroSettings(), LLAMA, job, 16, 8).quantized_gradients
    assert all_parts(ZeroSettings(), LLAMA, HALF, 16, 8) == ALL


def test_shares_that_are_no_multiple_of_eight_are_not_quantised() -> None:
    # A norm of 4,096 elements over 1,024 ranks.
    found = refusal(LLAMA, HALF, plan(ALL, gpus=1024))

    assert found is not None
    assert "has 4,096 over 1024 GPUs: 4 each; switch zero_quantized_weights off" in found
    assert not all_parts(ZeroSettings(), LLAMA, HALF, 1024, 8).quantized_weights
