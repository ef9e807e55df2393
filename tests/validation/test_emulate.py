"""One rank of several on real tensors: beside what real ranks hold, and beside the step program."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from advisor.catalog.profiles import profiles_folder
from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, Offload, Plan, Strategy, ZeroSettings
from advisor.validation.accuracy import Case, beside, counted

pytest.importorskip("torch")
pytest.importorskip("deepspeed")

from advisor.validation import emulate
from advisor.validation.emulate import trace_ranks
from advisor.validation.record import Record, read
from advisor.validation.trace import Trace

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
    Case("stage 3, sub-groups", CONFIG, JOB, replace(PLAN, strategy=Strategy.ZERO3, zero=SUB_GROUPS)),
    Case("stage 3, checkpointing", TIED, JOB, replace(PLAN, strategy=Strategy.ZERO3, checkpointing=Checkpointing.FULL)),
    Case(
        "second copies",
        CONFIG,
        JOB,
        replace(PLAN, strategy=Strategy.ZERO3_PLUS, zero=replace(WINDOW, hpz_partition=2), accumulation_steps=2),
    ),
    Case(
        "second copies, experts",
        MIXTURE,
        JOB,
        replace(
            PLAN,
            strategy=Strategy.ZERO3_PLUS,
            zero=replace(WINDOW, hpz_partition=4, max_reuse_distance=300_000),
            checkpointing=Checkpointing.FULL,
        ),
    ),
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
    Case("FSDP", CONFIG, JOB, replace(PLAN, strategy=Strategy.FSDP, accumulation_steps=2)),
    Case("DDP", TIED, JOB, replace(PLAN, strategy=Strategy.DDP, gpus=8)),
    Case("one GPU", TIED, JOB, replace(PLAN, strategy=Strategy.DDP, gpus=1)),
)

ALIKE_BYTES = 512
RECORDED = profiles_folder() / "measured" / "memory" / "real-runs.jsonl"


def recorded(truth: str, strategy: Strategy) -> Record:
    """The smallest real run of *strategy* that is recorded."""
    found = [each for each in read(RECORDED) if each.truth == truth and each.case.plan.strategy is strategy]
    return min(found, key=lambda record: record.true["peak"])


REAL = (
    recorded("Real ranks on gloo, DDP by torchrun", Strategy.DDP),
    recorded("Real ranks on gloo, FSDP by torchrun", Strategy.FSDP),
    recorded("Real ranks on gloo, DeepSpeed by accelerate", Strategy.ZERO2),
    recorded("Real ranks on gloo, DeepSpeed by deepspeed", Strategy.ZERO3),
)


@pytest.fixture(scope="module")
def traces() -> dict[tuple[Case, int], Trace]:
    """All that is emulated here, from one process."""
    asked = [(case, case.rank or 0) for case in CASES]
    for record in REAL:
        plan = record.case.plan
        # Only ZeRO-2's ranks differ, of which the fullest was recorded.
        asked += [(record.case, rank) for rank in range(int(plan.gpus) if plan.strategy is Strategy.ZERO2 else 1)]
    found = trace_ranks([(case.config, case.job, case.plan, rank) for case, rank in asked])
    return dict(zip(asked, found, strict=True))


def test_an_emulated_rank_holds_what_a_real_one_did(traces: dict[tuple[Case, int], Trace]) -> None:
    for record in REAL:
        alone = [trace for (case, _), trace in traces.items() if case is record.case]
        found = counted(max(alone, key=lambda trace: trace.peak_bytes))
        less = {counter: size_bytes - found[counter] for counter, size_bytes in record.true.items()}
        if record.case.plan.strategy is Strategy.ZERO3 or record.case.plan.strategy.is_fsdp:
            # gloo's reduce-scatter copied what it was given, which no GPU does.
            assert less.pop("peak in backward") >= -ALIKE_BYTES
            assert less.pop("peak") >= -ALIKE_BYTES
        assert max(map(abs, less.values())) <= ALIKE_BYTES, record.case.title


def test_a_device_that_is_too_small_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object) -> None:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(emulate, "emulate", run_out)
    asked = json.loads(emulate.request(CONFIG, JOB, PLAN, 0, "cuda"))

    assert json.loads(emulate.answer(asked)) == {"out_of_memory": "CUDA out of memory"}


def test_what_a_rank_holds_is_what_is_predicted(traces: dict[tuple[Case, int], Trace]) -> None:
    for case in CASES:
        traced = traces[case, case.rank or 0]
        found = beside(case.model, case.job, case.plan, traced, case.rank)

        assert found.predicted["between steps"] == found.true["between steps"], case.name
        for counter in ("peak in forward", "peak in backward", "peak in step"):
            assert found.error(counter) == pytest.approx(0, abs=0.001), (case.name, counter)
