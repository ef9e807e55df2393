"""What a traced step says of itself: phases, categories, and that nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from advisor.catalog.huggingface import model_from_config  # noqa: E402 - after torch is known to be there
from advisor.specs.job import Job  # noqa: E402
from advisor.specs.plan import Checkpointing, Plan, Strategy  # noqa: E402
from advisor.step.build import build  # noqa: E402
from advisor.step.program import peak_of  # noqa: E402
from advisor.validation.trace import trace_step  # noqa: E402

SMALL: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
JOB = Job(sequence_length=96, global_batch=32)


@pytest.mark.parametrize(
    ("strategy", "gpus", "checkpointing", "steps"),
    [
        (Strategy.DDP, 1, Checkpointing.FULL, 1),
        (Strategy.DDP, 4, Checkpointing.NONE, 2),
        (Strategy.FSDP, 4, Checkpointing.NONE, 1),
        (Strategy.FSDP, 4, Checkpointing.FULL, 2),
    ],
)
def test_the_peak_is_made_of_what_the_program_says(
    strategy: Strategy, gpus: int, checkpointing: Checkpointing, steps: int
) -> None:
    plan = Plan(strategy=strategy, gpus=gpus, micro_batch=2, accumulation_steps=steps, checkpointing=checkpointing)
    found = trace_step(SMALL, "causal", JOB, plan)
    predicted: dict[str, int] = {}
    for line in peak_of(build(model_from_config(SMALL, "small", ""), JOB, plan).device).ledger:
        predicted[line.category] = predicted.get(line.category, 0) + line.size_bytes
    ledger = dict(found.ledger)

    assert sum(ledger.values()) == found.peak_bytes
    for category in ("parameters", "optimizer", "gradients", "logits"):
        # The program counts the head's cast input among the logits.
        assert ledger.get(category, 0) == pytest.approx(predicted.get(category, 0), rel=0.02, abs=2048), category


def test_no_rank_and_no_patch_is_left_behind() -> None:
    from transformers import masking_utils

    packed, resize = masking_utils.find_packed_sequence_indices, torch.UntypedStorage.resize_
    trace_step(SMALL, "causal", JOB, Plan(strategy=Strategy.FSDP, gpus=4, micro_batch=1))

    assert not torch.distributed.is_initialized()
    assert masking_utils.find_packed_sequence_indices is packed
    assert torch.UntypedStorage.resize_ is resize


def test_the_loss_has_a_phase_of_its_own() -> None:
    found = trace_step(SMALL, "causal", JOB, Plan(strategy=Strategy.DDP, gpus=1, micro_batch=2))
    logits = 2 * JOB.sequence_length * SMALL["vocab_size"]

    # fp32 weights under autocast: logits in bf16 when the loss begins; upcast and logarithms in fp32 within it.
    assert found.loss_peak_bytes - found.forward_peak_bytes == pytest.approx(8 * logits, rel=0.05)
