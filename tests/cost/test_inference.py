"""Generating, priced: how far batch and context go, how long passes take, and what is refused."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

import advisor
from advisor.cost.inference import InferenceEstimate
from advisor.errors import SpecError

GIB = 2**30


@lru_cache
def priced(model: str = "Llama-3.1-8B", **words: Any) -> InferenceEstimate:
    return advisor.estimate_inference(model, **({"gpu": "A100-80GB", "gpus": 1, "context": 2048} | words))


def test_a_model_in_half_precision_is_its_weights_and_its_cache() -> None:
    found = priced(batch=8)

    assert found.memory.states_bytes == pytest.approx(2 * 8_030_261_248, rel=1e-4)
    assert found.kv_cache_bytes == 8 * 2048 * 131_072
    assert found.verdict == "fits"
    lines = {line.category: line.size_bytes for line in found.memory.ledger}
    assert lines["kv cache"] >= found.kv_cache_bytes // 2
    assert sum(line.size_bytes for line in found.memory.ledger) == found.memory.peak_allocated_bytes


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    words: dict[str, Any] = {"gpu": "L4", "context": 4096, "weights": "nf4"}
    largest = priced("Qwen2.5-1.5B", **words).largest_batch

    assert priced("Qwen2.5-1.5B", batch=largest, **words).verdict == "fits"
    assert priced("Qwen2.5-1.5B", batch=largest + 1, **words).verdict != "fits"


def test_the_longest_context_fits_and_one_token_more_does_not() -> None:
    words: dict[str, Any] = {"gpu": "T4", "batch": 4}
    found = priced("Qwen2.5-7B", weights="nf4", **words)
    longest = found.longest_context

    assert found.context_bound is None
    for context, verdicts in ((longest, ["fits"]), (longest + 1, ["tight", "no"])):
        assert priced("Qwen2.5-7B", weights="nf4", **words | {"context": context}).verdict in verdicts


def test_a_model_s_positions_bound_its_context() -> None:
    found = priced("Qwen2.5-0.5B")

    assert found.longest_context == found.context_bound == 32_768
    with pytest.raises(SpecError, match="has positions for 32,768 tokens, got a context of 40,000; give --context 327"):
        priced("Qwen2.5-0.5B", context=40_000)


def test_where_weights_alone_are_too_much_there_is_no_batch_and_no_context() -> None:
    found = priced("Llama-3.1-70B", gpu="L4")

    assert (found.verdict, found.largest_batch, found.longest_context) == ("no", 0, 0)


def test_a_token_takes_at_least_what_its_weights_and_cache_take_to_be_read() -> None:
    found = priced(batch=1, context=8192)
    moved = found.memory.states_bytes + found.kv_cache_bytes

    assert found.decode.seconds > moved / found.cluster.gpu.memory_bandwidth_bytes_per_s
    assert found.decode.low_s < found.decode.seconds < found.decode.high_s


def test_more_sequences_make_more_tokens_and_longer_contexts_fewer() -> None:
    rates = [priced("Qwen2.5-0.5B", batch=batch).decode.tokens_per_s for batch in (1, 64)]
    steps = [priced("Qwen2.5-0.5B", context=context).decode.compute_s for context in (2048, 32_768)]

    assert rates == sorted(rates)
    assert steps == sorted(steps)


def test_a_call_is_its_prompt_and_every_token_after_it() -> None:
    found = priced("Qwen2.5-0.5B", context=2048, prompt=1024)
    least = found.prefill.seconds + 1024 * found.decode.seconds * 0.9

    assert found.new_tokens == 1024
    assert least < found.call_s <= found.prefill.seconds + 1024 * found.decode.seconds
    assert found.tokens_per_s == pytest.approx(1024 / found.call_s)


def test_gpus_share_one_copy_unless_copies_are_asked_for() -> None:
    alone, shared, copies = (priced("Qwen3-0.6B", **words) for words in ({}, {"gpus": 4}, {"gpus": 4, "tp": 1}))

    assert (shared.plan.tensor_parallel, shared.plan.copies) == (4, 1)
    assert (copies.plan.tensor_parallel, copies.plan.copies) == (1, 4)
    assert copies.memory.states_bytes == alone.memory.states_bytes > shared.memory.states_bytes
    assert copies.decode.tokens_per_s == pytest.approx(4 * alone.decode.tokens_per_s)
    assert copies.decode.communication_s == 0 < shared.decode.communication_s


def test_heads_held_by_several_gpus_are_said() -> None:
    (said,) = priced("Qwen2.5-1.5B", gpus=4).warnings

    assert said.startswith("each key-value head is held by 2 GPUs, as vLLM does")


def test_weights_in_fewer_bits_need_less_memory_and_move_less() -> None:
    found = [priced("Qwen2.5-0.5B", weights=weights, gpu="H100") for weights in ("bf16", "int8", "fp8", "nf4")]
    states = [each.memory.states_bytes for each in found]

    assert states[0] > states[1] == pytest.approx(states[2], rel=0.01)
    assert states[2] > states[3]
    assert found[3].decode.compute_s < found[2].decode.compute_s < found[0].decode.compute_s


def test_what_was_not_given_is_said_to_be_assumed() -> None:
    origins = {each.name: each.origin for each in priced(batch=2, weights="fp16").inputs}

    assert (origins["batch"], origins["weights"], origins["prompt"]) == ("given", "given", "assumed")
    assert not origins.keys() & {"seq_len", "global_batch", "optimizer", "param_dtype"}


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("Mistral-7B-v0.1", {"kv_cache": "fp8"}, "has layers with a window of 4096 tokens; leave --kv-cache out"),
        ("Llama-3.1-8B", {"kv_cache": "fp32"}, "the cache holds what products compute, bf16, or fp8; got fp32"),
        ("Llama-3.1-8B", {"weights": "fp8"}, "products in fp8 need compute capability 8.9, and A100-SXM4-80GB has 8.0"),
        ("Llama-3.1-8B", {"weights": "fp16", "precision": "bf16"}, "weights in fp16 are multiplied in fp16"),
        ("Llama-3.1-8B", {"gpus": 4, "tp": 3}, "copies of the model over 3 GPUs each do not divide 4 GPUs"),
        ("t5-small", {"context": 256}, "generating is modelled for causal models of the known families"),
    ],
)
def test_what_cannot_run_is_refused(model: str, words: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        priced(model, **words)


def test_an_unknown_word_is_named() -> None:
    with pytest.raises(TypeError, match="unknown words seq_len; known: gpu, gpus"):
        priced(seq_len=2048)
