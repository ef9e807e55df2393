"""transformers' ``generate`` on fake tensors."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from advisor.catalog.huggingface import model_from_config
from advisor.specs.inference import Inference, InferencePlan
from advisor.specs.model import ModelSpec
from advisor.step.inference import generation
from advisor.step.program import fold, phase_peaks
from advisor.validation.generated import Generated, trace_generation

CONFIG = {
    "model_type": "mistral",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 64,
}


def model_of(config: dict[str, object]) -> ModelSpec:
    return model_from_config(config, "made", "this test")


def test_a_windowed_model_generates_as_predicted() -> None:
    """Past its window: the prompt's cache goes with the first new token."""
    call = Inference(batch=3, prompt=96, context=104)

    true = trace_generation(CONFIG, call)
    said = generation(model_of(CONFIG), call, InferencePlan(gpus=1))
    peaks = phase_peaks(said.program.device_without_scratch)

    assert (said.prompt_cache_bytes, said.cache_bytes) == (true.prompt_cache_bytes, true.cache_bytes)
    assert (true.prompt_cache_bytes, true.cache_bytes) == (3 * 96 * 256, 3 * 64 * 256)
    assert fold(said.program.init).net_bytes == true.weights_bytes
    assert peaks["prefill"][0] == pytest.approx(true.prefill_peak_bytes, rel=0.01)
    assert peaks["decode"][0] == pytest.approx(true.decode_peak_bytes, rel=0.01)


def test_a_rank_s_part_generates_as_a_model_of_its_size() -> None:
    """A rank of two of a model is a model with half the heads and half the width, but for the gathered logits."""
    whole = CONFIG | {"sliding_window": None, "tie_word_embeddings": True}
    half = whole | {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 80}
    call = Inference(batch=3, prompt=96, context=104)

    true: Generated = trace_generation(half, call)
    said = generation(model_of(whole), call, InferencePlan(gpus=2, tensor_parallel=2))

    assert said.cache_bytes == true.cache_bytes
    assert fold(said.program.init).net_bytes == true.weights_bytes
    peak = max(phase_peaks(said.program.device_without_scratch)[phase][0] for phase in ("prefill", "decode"))
    assert peak == pytest.approx(true.peak_bytes, rel=0.01)
