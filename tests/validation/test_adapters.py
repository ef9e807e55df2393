"""Predicted memory of adapters beside transformers' and peft's own code, traced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, FsdpSettings, Plan, Strategy
from advisor.validation.accuracy import Case, compare

for package in ("torch", "transformers", "accelerate", "peft"):
    pytest.importorskip(package)

INT64_BYTES = 8
CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def case(strategy: Strategy, gpus: int, checkpointing: Checkpointing, **said: Any) -> Case:
    job = Job(**{"method": "lora", "sequence_length": 256, "global_batch": 2 * gpus, "lora_rank": 4, **said})
    fsdp = FsdpSettings(shard_ranks=2 if strategy is Strategy.HSDP else None)
    plan = Plan(strategy=strategy, gpus=gpus, micro_batch=2, checkpointing=checkpointing, fsdp=fsdp)
    return Case("llama", CONFIG, job, plan)


CASES = [
    case(Strategy.DDP, 1, Checkpointing.NONE),
    case(Strategy.DDP, 1, Checkpointing.NONE, lora_targets=("gate_proj",), parameter_format="bf16"),
    case(Strategy.DDP, 1, Checkpointing.FULL, lora_targets=("all-linear",)),
    case(Strategy.DDP, 4, Checkpointing.FULL, lora_targets=("o_proj", "down_proj"), loss="chunked"),
    case(Strategy.FSDP, 4, Checkpointing.NONE, lora_targets=("all-linear",)),
    case(Strategy.FSDP_GRAD_OP, 2, Checkpointing.FULL),
    case(Strategy.HSDP, 4, Checkpointing.NONE, lora_targets=("all-linear",)),
    case(Strategy.DDP, 4, Checkpointing.FULL, method="dora", lora_targets=("all-linear",)),
    case(Strategy.FSDP, 4, Checkpointing.FULL, method="dora", parameter_format="bf16"),
]


@pytest.mark.parametrize("each", CASES, ids=lambda each: each.title)
def test_a_step_with_adapters_holds_what_is_predicted(each: Case) -> None:
    found = compare(each)

    # torch writes the ranks of one of a mesh's dimensions down, in int64, where they are counted here.
    written = INT64_BYTES * int(each.plan.shard_ranks) if each.plan.strategy is Strategy.HSDP else 0
    assert found.difference_bytes("between steps") == -written
    # A few index tensors of 256 tokens come and go at other moments.
    assert abs(found.difference_bytes("end of forward")) < 4096
    # DoRA keeps numbers for each output besides, which a model of this size shows.
    assert abs(found.error("peak")) < (0.003 if each.job.method == "dora" else 0.001)


def test_dropout_before_adapters_is_traced_where_it_is_asked_for() -> None:
    dry = case(Strategy.DDP, 1, Checkpointing.NONE, lora_dropout=0.1)
    wet = compare(dry, dropout=True)

    # A byte an element of a mask for each of two adapters in a layer, but for the first: its input needs no gradient.
    tokens = 2 * 256
    without = compare(replace(dry, job=replace(dry.job, lora_dropout=0.0)), dropout=True)
    assert wet.true["saved for backward"] - without.true["saved for backward"] == 4 * tokens * 128
    assert wet.difference_bytes("saved for backward") == without.difference_bytes("saved for backward")
