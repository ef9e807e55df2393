"""The step program of traced recordings: against formulas where there are any, else against a traced step."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from advisor.catalog.huggingface import model_from_config
from advisor.cost.compute import work
from advisor.errors import ConfigError
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import OWN_STRATEGIES, Checkpointing, Plan, Strategy
from advisor.step.build import StepProgram, build
from advisor.step.program import fold, phase_peaks
from advisor.step.recording import mode_of
from advisor.tracing.real_model import described
from advisor.tracing.source import TracedSource, traced_model
from advisor.validation.accuracy import without_dropout
from advisor.validation.trace import trace_described

PEAK_ERROR = 0.005
FLOP_ERROR = 0.01
LENGTH = 128

WIDE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KNOWN: dict[str, dict[str, Any]] = {
    "qwen2": WIDE | {"tie_word_embeddings": True},
    "gpt2": {"vocab_size": 1024, "n_embd": 128, "n_layer": 4, "n_head": 8, "n_positions": 512},
    "qwen3_moe": WIDE | {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
UNKNOWN: dict[str, dict[str, Any]] = {
    "stablelm": WIDE | {"num_key_value_heads": 8},
    "gptj": {"vocab_size": 1024, "n_embd": 128, "n_layer": 4, "n_head": 8, "rotary_dim": 8, "n_positions": 512},
}


def source_of(family: str) -> TracedSource:
    return TracedSource(described({"model_type": family} | (KNOWN | UNKNOWN)[family]))


def job_of(parameter_format: Any, batch: int = 4) -> Job:
    return Job(sequence_length=LENGTH, global_batch=batch, parameter_format=parameter_format)


def one_gpu(micro_batch: int, checkpointing: Checkpointing = Checkpointing.NONE) -> Plan:
    return Plan(strategy=Strategy.DDP, gpus=1, micro_batch=micro_batch, checkpointing=checkpointing)


@cache
def traced(family: str) -> ModelSpec:
    return traced_model(source_of(family), mode_of(job_of("bf16"), 2), family, "a test")


def from_traces(family: str, job: Job, plan: Plan) -> StepProgram:
    return build(traced(family), job, plan, source=source_of(family))


NONE, FULL = Checkpointing.NONE, Checkpointing.FULL


@pytest.mark.parametrize(
    ("family", "checkpointing"), [("qwen2", NONE), ("qwen2", FULL), ("gpt2", FULL), ("qwen3_moe", NONE)]
)
def test_traced_recordings_say_what_formulas_say(family: str, checkpointing: Checkpointing) -> None:
    job, plan = job_of("bf16"), one_gpu(4, checkpointing)
    by_formulas = build(
        without_dropout(model_from_config({"model_type": family} | KNOWN[family], family, "")), job, plan
    )
    by_traces = from_traces(family, job, plan)

    assert fold(by_traces.device).peak_bytes == pytest.approx(fold(by_formulas.device).peak_bytes, rel=PEAK_ERROR)
    assert fold(by_traces.init).net_bytes == fold(by_formulas.init).net_bytes
    assert work(by_traces.step).whole_flop == pytest.approx(work(by_formulas.step).whole_flop, rel=FLOP_ERROR)


def test_weights_under_autocast_are_traced_too() -> None:
    job, plan = job_of("fp32"), one_gpu(4, Checkpointing.FULL)
    model = model_from_config({"model_type": "qwen2"} | KNOWN["qwen2"], "qwen2", "")

    assert fold(from_traces("qwen2", job, plan).device).peak_bytes == pytest.approx(
        fold(build(model, job, plan).device).peak_bytes, rel=PEAK_ERROR
    )


@pytest.mark.parametrize(("family", "checkpointing"), [("stablelm", FULL), ("gptj", NONE)])
def test_of_an_unknown_family_the_program_is_the_traced_step(family: str, checkpointing: Checkpointing) -> None:
    """Recorded with two and three sequences, held against a step with five."""
    job, plan = job_of("bf16", 5), one_gpu(5, checkpointing)
    phases = phase_peaks(from_traces(family, job, plan).device)
    found = trace_described(source_of(family).description, job, plan)

    assert phases["init"][1] == found.states_bytes
    assert phases["loss"][1] == pytest.approx(found.after_forward_bytes, rel=PEAK_ERROR)
    assert max(most for most, _ in phases.values()) == pytest.approx(found.peak_bytes, rel=PEAK_ERROR)


def test_a_step_leaves_what_it_found() -> None:
    for strategy in OWN_STRATEGIES:
        for each in (NONE, FULL):
            plan = Plan(
                strategy=strategy, gpus=4, micro_batch=np.array([1, 2]), accumulation_steps=2, checkpointing=each
            )
            step = from_traces("qwen2", job_of("fp32", 16), plan).step

            assert not np.any(fold(step).net_bytes), (strategy, each)


def test_a_model_that_transformers_does_not_build_says_why() -> None:
    source = TracedSource(described({"model_type": "qwen2"} | WIDE | {"num_attention_heads": 0}))

    with pytest.raises(ConfigError, match=r"^transformers \S+ cannot build or run qwen2: "):
        traced_model(source, mode_of(job_of("bf16"), 2), "broken", "a test")


def test_code_from_a_repository_is_run_only_where_it_is_trusted() -> None:
    config = {"model_type": "nobodys", "auto_map": {"AutoConfig": "configuration.Mine"}}

    with pytest.raises(ConfigError, match=r"its code would come from somebody/model; .* --trust-remote-code to run it"):
        traced_model(TracedSource(described(config, "somebody/model")), mode_of(job_of("bf16"), 2), "mine", "")


@pytest.mark.parametrize("fields", [{"model_type": "t5"}, {"model_type": "bert", "architectures": ["BertForMaskedLM"]}])
def test_only_causal_models_are_traced_for_their_layers(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no causal language model"):
        traced_model(TracedSource(described(fields)), mode_of(job_of("bf16"), 2), "other", "a test")


def test_a_family_that_nobody_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no family nobodys"):
        traced_model(TracedSource(described({"model_type": "nobodys"})), mode_of(job_of("bf16"), 2), "mine", "")
