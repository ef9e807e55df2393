"""transformers' way through flash-attn, with torch's operator in its place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from advisor.errors import ConfigError, SpecError
from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, Plan, Strategy
from advisor.tracing import gpu_operators
from advisor.validation.trace import trace_step

JOB = Job(sequence_length=192, attention="flash")
PLAN = Plan(strategy=Strategy.DDP, gpus=1, micro_batch=2)


def config(family: str, **fields: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {"model_type": family, "vocab_size": 512, **sizes, **fields}


# Shared heads; a fused projection and its rotation by head; no rotation; another head dimension for values.
@pytest.mark.parametrize(
    "described",
    [
        config("llama", num_key_value_heads=2),
        config("phi3", num_key_value_heads=4, pad_token_id=0),
        config("gpt2", n_embd=64, n_head=4, n_layer=2),
        config("falcon", num_kv_heads=1, new_decoder_architecture=False),
    ],
    ids=lambda each: each["model_type"],
)
def test_flash_attn_holds_what_torch_s_own_flash_kernel_holds(described: dict[str, Any]) -> None:
    job = replace(JOB, parameter_format="bf16")
    flash, fused = (trace_step(described, "causal", each, PLAN) for each in (job, replace(job, attention="sdpa")))

    if described["model_type"] != "falcon":  # which repeats its one key for torch's kernel
        assert flash == fused
    assert flash.after_forward_bytes <= fused.after_forward_bytes


def test_flash_attn_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from advisor.tracing import flash_attention

    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return gpu_operators.flash(*arguments)

    monkeypatch.setattr(flash_attention, "flash", counted)
    plan = replace(PLAN, checkpointing=Checkpointing.FULL)
    trace_step(config("llama", num_key_value_heads=2), "causal", JOB, plan)

    # Two layers, forward and again in backward, in each of two steps.
    assert len(calls) == 8


def test_a_family_without_it_is_refused() -> None:
    t5 = {"model_type": "t5", "vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}

    with pytest.raises(ConfigError, match="T5ForConditionalGeneration has no flash attention"):
        trace_step(t5, "seq2seq", JOB, PLAN)


def test_padding_that_only_a_batch_tells_is_refused() -> None:
    with pytest.raises(SpecError, match="drop --padded"):
        trace_step(config("llama", num_key_value_heads=2), "causal", replace(JOB, padded=True), PLAN)


def test_transformers_is_left_as_it_was() -> None:
    from transformers import modeling_flash_attention_utils, modeling_utils

    before = modeling_utils.lazy_import_flash_attention, modeling_flash_attention_utils._is_packed_sequence
    trace_step(config("llama", num_key_value_heads=2), "causal", JOB, PLAN)

    assert (modeling_utils.lazy_import_flash_attention, modeling_flash_attention_utils._is_packed_sequence) == before
