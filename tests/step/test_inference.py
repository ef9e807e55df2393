"""Generating as a step program: what is cached, what each pass holds, beside transformers' own ``generate``."""

from __future__ import annotations

import csv
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.catalog.huggingface import model_from_config
from advisor.catalog.models import find_model
from advisor.catalog.profiles import profiles_folder
from advisor.cost.allocator import Settings
from advisor.cost.reserved import replayed
from advisor.errors import SpecError
from advisor.specs.inference import Inference, InferencePlan
from advisor.specs.model import ModelSpec
from advisor.step.inference import Generation, generation
from advisor.step.program import expand, fold, held_after, phase_peaks

ALONE = InferencePlan(gpus=1)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def model_of(config: dict[str, Any]) -> ModelSpec:
    return model_from_config(config, "made", "this test")


def known(name: str) -> ModelSpec:
    return find_model(name).model


def asked(**words: Any) -> Inference:
    return Inference(**({"batch": 2, "prompt": 60, "context": 64} | words))


def of(model: ModelSpec, **words: Any) -> Generation:
    return generation(model, asked(**words), ALONE)


# Bytes of one token: 2 tensors x heads x head dimension x 2 bytes in each layer; DeepSeek's one latent and one rotated
# key (arXiv:2405.04434, section 2.1.3).
@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("Llama-2-7b-hf", 32 * 2 * 32 * 128 * 2),
        ("Llama-3.1-8B", 32 * 2 * 8 * 128 * 2),
        ("falcon-7b", 32 * 2 * 1 * 64 * 2),
        ("DeepSeek-V3", 61 * (512 + 64) * 2),
    ],
)
def test_the_cache_holds_keys_and_values_of_every_token(name: str, bytes_per_token: int) -> None:
    found = of(known(name))

    assert found.cache_bytes == 2 * 64 * bytes_per_token
    assert found.prompt_cache_bytes == 2 * 60 * bytes_per_token


def test_a_windowed_layer_holds_the_prompt_at_first_and_then_its_window() -> None:
    """Mistral's window of 4,096 tokens: a view of the last 4,095 keeps the whole prompt until the next token."""
    mistral = known("Mistral-7B-v0.1")
    each = 32 * 2 * 8 * 128 * 2

    found = generation(mistral, Inference(prompt=8000, context=8001), ALONE)

    assert found.prompt_cache_bytes == 8000 * each
    assert found.cache_bytes == 4096 * each


def test_of_local_and_global_layers_only_the_global_ones_grow_beyond_the_window() -> None:
    gemma = known("gemma-3-1b-it")
    layers, each = 26, 2 * 1 * 256 * 2
    globals_ = layers // 6

    found = generation(gemma, Inference(prompt=3000, context=3001), ALONE)

    assert found.cache_bytes == (globals_ * 3001 + (layers - globals_) * 512) * each


def test_fp8_halves_the_cache() -> None:
    assert 2 * of(known("Qwen3-8B"), fp8_cache=True).cache_bytes == of(known("Qwen3-8B")).cache_bytes


def test_a_static_cache_has_room_for_the_context_from_the_first_pass_on() -> None:
    model = model_of(LLAMA)
    grown, static = (of(model, prompt=1000, context=1064, static_cache=static) for static in (False, True))

    assert static.prompt_cache_bytes == static.cache_bytes == grown.cache_bytes > grown.prompt_cache_bytes
    decode = [phase_peaks(each.program.device)["decode"][0] for each in (static, grown)]
    assert decode[0] < decode[1]


def test_a_static_cache_of_a_windowed_layer_is_its_window() -> None:
    found = generation(known("Mistral-7B-v0.1"), Inference(prompt=8000, context=8001, static_cache=True), ALONE)

    assert found.cache_bytes == 4096 * 32 * 2 * 8 * 128 * 2


@pytest.mark.parametrize(("name", "words"), [("gemma-2-2b", {}), ("DeepSeek-V3", {}), ("gpt2", {"attention": "eager"})])
def test_a_static_cache_that_is_read_otherwise_is_refused(name: str, words: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="leave the cache to grow"):
        of(known(name), static_cache=True, **words)


def test_every_pass_holds_the_cache_twice_for_one_layer_only() -> None:
    """A new token's keys are laid behind a copy of the old ones, which go as the copy is there."""
    short, long = (of(model_of(LLAMA), context=64 + more, prompt=60 + more) for more in (0, 1000))
    held = 2 * 2 * 16 * 2 * 2  # two sequences, two heads of 16, keys and values, two bytes

    grown = phase_peaks(long.program.device)["decode"][0] - phase_peaks(short.program.device)["decode"][0]

    # Three layers hold theirs, and one of keys or values is there twice. Of other things only ids and the mask grow.
    ids = 4 * 8 * 2 * 1000
    assert grown == 3 * 1000 * held + 1000 * held // 2 + ids


def test_the_prompt_makes_logits_of_its_last_token_alone() -> None:
    found = of(model_of(LLAMA | {"vocab_size": 60_000}))
    ledger = {line.label: line.size_bytes for line in held_after(found.prefill)}

    # In fp32 for the choice; those in the format of the model went with what it returned.
    assert ledger["logits in fp32"] == 2 * 60_000 * 4
    assert "logits" not in ledger


CONFIGS = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 4),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "vocab_size": st.sampled_from([64, 512]),
    }
)


@given(
    CONFIGS,
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from(["sdpa", "eager"]),
    st.booleans(),
    st.sampled_from([None, 8, 16]),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_a_call_gives_back_all_that_it_took(
    config: dict[str, Any],
    batch: int,
    prompt: int,
    answer: int,
    attention: str,
    fp8: bool,
    window: int | None,
    static: bool,
) -> None:
    family = {"model_type": "mistral", "sliding_window": window} if window else {}
    found = of(
        model_of(LLAMA | config | family),
        batch=batch,
        prompt=prompt,
        context=prompt + answer,
        attention=attention,
        fp8_cache=fp8 and not window,
        static_cache=static and attention == "sdpa" and not (fp8 and not window),
    )
    states = fold(found.program.init).net_bytes

    replayed(found.program, Settings(expandable_segments=True))
    assert fold(found.program.step).net_bytes == 0
    highest = max(each.before_bytes + each.block.peak_bytes for each in expand(found.program.device))
    assert highest == fold(found.program.device).peak_bytes
    for name, (peak, left) in phase_peaks(found.program.device).items():
        assert peak >= left >= states, name


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "generation.py"))


def test_rows_of_generate_are_met(benchmark: dict[str, Any]) -> None:
    """What ``benchmarks/generation.py`` recorded: the cache to the byte, peaks within 1 per cent."""
    rows = list(benchmark["recorded"]())

    assert len(rows) >= 25
    for case, true in rows:
        said = benchmark["predicted"](case)
        assert (said.cache_bytes, said.prompt_cache_bytes) == (true.cache_bytes, true.prompt_cache_bytes), case.title
        assert said.weights_bytes == pytest.approx(true.weights_bytes, abs=512), case.title
        assert said.peak_bytes == pytest.approx(true.peak_bytes, rel=0.01), case.title


def test_every_row_is_there_once() -> None:
    with (profiles_folder() / "measured" / "generation.csv").open(newline="") as file:
        keys = [tuple(row.values())[:7] for row in csv.DictReader(file)]

    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", ["bert-base-uncased", "t5-small"])
def test_other_than_causal_models_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match="generating is modelled for causal models of the known families"):
        of(known(name))


def test_experts_get_copies_of_their_matrices_for_each_new_token() -> None:
    """Mixtral: two of eight experts for each of two tokens; up's copies stay until down's are there."""
    mixtral = known("Mixtral-8x7B-v0.1")
    copies = 2 * 2 * 3 * 14336 * 4096 * 2

    found = phase_peaks(of(mixtral).program.device)["decode"]

    assert found[0] - found[1] == pytest.approx(copies, rel=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"prompt": 64}, "an answer of at least one take a context of 65 or more, got 64"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"weights": "int3"}, "weights must be one of fp32, bf16, fp16, fp8, int8, nf4, fp4, got 'int3'"),
        ({"static_cache": True, "fp8_cache": True}, "leave one of static and fp8 out"),
        ({"double_quant": True}, "double quantization is of scales of nf4 and fp4, got weights in bf16"),
    ],
)
def test_what_contradicts_itself_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        asked(**words)


def test_copies_of_a_model_take_equal_numbers_of_gpus() -> None:
    assert replace(ALONE, gpus=8, tensor_parallel=2).copies == 4
    with pytest.raises(SpecError, match="copies of the model over 3 GPUs each do not divide 8 GPUs"):
        InferencePlan(gpus=8, tensor_parallel=3)
