"""Optimizers beside their own code: what is kept to the byte, what a step takes closely."""

from __future__ import annotations

from typing import Any

import pytest

from advisor.specs.job import Job
from advisor.specs.plan import FsdpSettings, Plan, Strategy
from advisor.validation.accuracy import Case, compare

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore")

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
}


@pytest.mark.parametrize(
    ("optimizer", "strategy", "weights"),
    [
        ("adamw-8bit", Strategy.DDP, "bf16"),
        ("adamw-8bit-paged", Strategy.DDP, "fp32"),
        ("lion-8bit", Strategy.FSDP, "fp32"),
        ("adafactor", Strategy.DDP, "bf16"),
        ("muon", Strategy.DDP, "fp32"),
        ("galore", Strategy.DDP, "bf16"),
    ],
)
def test_an_update_is_predicted_to_the_byte(optimizer: Any, strategy: Strategy, weights: Any) -> None:
    if optimizer == "galore":
        pytest.importorskip("galore_torch")
    job = Job(sequence_length=32, optimizer=optimizer, parameter_format=weights)
    gpus = 4 if strategy is Strategy.FSDP else 1
    plan = Plan(strategy=strategy, gpus=gpus, micro_batch=1, fsdp=FsdpSettings(version=1))

    found = compare(Case("a small model", QWEN2, job, plan))

    assert (found.difference_bytes("between steps"), found.difference_bytes("peak in step")) == (0, 0)
    assert abs(found.error("peak")) < 0.001
