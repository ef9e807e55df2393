"""The step program held against real DeepSpeed, one rank of several at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, Offload, Plan, Strategy, ZeroSettings
from advisor.validation.accuracy import Case, beside
from advisor.validation.deepspeed_rank import trace_ranks

pytest.importorskip("deepspeed")

CONFIG = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TIED = CONFIG | {"tie_word_embeddings": True}
PLAN = Plan(strategy=Strategy.ZERO2, gpus=4, micro_batch=2, zero=ZeroSettings(reduce_bucket=100_000))
JOB = Job(sequence_length=32, global_batch=8)
FP32_GRADIENTS = ZeroSettings(reduce_bucket=100_000, gradient_format="fp32")
# Weights are gathered and freed by and by, 50,000 elements ahead.
WINDOW = ZeroSettings(
    reduce_bucket=100_000,
    prefetch_bucket=50_000,
    max_live_parameters=300_000,
    max_reuse_distance=0,
    persistence_threshold=1000,
    overlap_communication=True,
)

SUB_GROUPS = replace(WINDOW, sub_group=300_000)
MIXTURE = CONFIG | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
ON_HOST: dict[str, Any] = {"offload": Offload.OPTIMIZER}

CASES = (
    Case("stage 0", CONFIG, JOB, replace(PLAN, strategy=Strategy.ZERO0, accumulation_steps=2)),
    Case("stage 1", TIED, JOB, replace(PLAN, strategy=Strategy.ZERO1, accumulation_steps=2), rank=3),
    Case("stage 2", CONFIG, JOB, replace(PLAN, accumulation_steps=2, checkpointing=Checkpointing.FULL), rank=1),
    Case("stage 2, pure bf16", TIED, replace(JOB, parameter_format="bf16"), PLAN, rank=0),
    Case("stage 1, fp32 gradients", CONFIG, JOB, replace(PLAN, strategy=Strategy.ZERO1, zero=FP32_GRADIENTS)),
    Case("stage 3", CONFIG, JOB, replace(PLAN, strategy=Strategy.ZERO3, zero=WINDOW)),
    Case("stage 3, experts", MIXTURE, JOB, replace(PLAN, strategy=Strategy.ZERO3, zero=WINDOW, accumulation_steps=2)),
    Case("stage 3, checkpointing", TIED, JOB, replace(PLAN, strategy=Strategy.ZERO3, checkpointing=Checkpointing.FULL)),
    Case("stage 1, offload", TIED, JOB, replace(PLAN, strategy=Strategy.ZERO1, accumulation_steps=2, **ON_HOST), 2),
    Case("stage 2, offload", CONFIG, JOB, replace(PLAN, accumulation_steps=2, **ON_HOST), rank=3),
    Case(
        "stage 3, everything offloaded",
        CONFIG,
        JOB,
        replace(
            PLAN,
            strategy=Strategy.ZERO3,
            zero=WINDOW,
            checkpointing=Checkpointing.FULL,
            offload=Offload.OPTIMIZER_AND_PARAMETERS,
        ),
    ),
    Case(
        "stage 3, optimizer on NVMe",
        CONFIG,
        JOB,
        replace(PLAN, strategy=Strategy.ZERO3, accumulation_steps=2, zero=SUB_GROUPS, offload_to="nvme", **ON_HOST),
    ),
    Case("stage 2, fp32 gradients", CONFIG, JOB, replace(PLAN, accumulation_steps=2, zero=FP32_GRADIENTS), rank=2),
)


def test_what_a_rank_holds_is_what_deepspeed_holds() -> None:
    traces = trace_ranks([(case.config, case.job, case.plan, case.rank or 0) for case in CASES])
    for case, traced in zip(CASES, traces, strict=True):
        found = beside(case.model, case.job, case.plan, traced, case.rank)

        assert found.predicted["between steps"] == found.true["between steps"], case.name
        for counter in ("peak in forward", "peak in backward", "peak in step"):
            assert found.error(counter) == pytest.approx(0, abs=0.001), (case.name, counter)
