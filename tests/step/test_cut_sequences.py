"""Sequences cut over ranks: what each computes, holds and sends, and what the frameworks do not take.

Bytes of the frameworks' own code are in ``profiles/measured/memory/cut-sequences.jsonl``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.cost.compute import work
from advisor.specs.job import Job
from advisor.specs.model import Attention
from advisor.specs.plan import Checkpointing, FsdpSettings, Plan, Strategy
from advisor.step.build import build
from advisor.step.cut_legality import refusal
from advisor.step.program import Collective, blocks, fold, phase_peaks
from advisor.step.ulysses import local_heads
from step.catalog_models import model_of

LLAMA = model_of("meta-llama__Llama-3.1-8B")  # 32 layers, 32 heads of 128, 8 for keys and values
LENGTH = 8192
LONG = Job(sequence_length=LENGTH, global_batch=8)


def plan(ranks: int = 1, exchange: str = "heads", micro_batch: int = 2, **words: Any) -> Plan:
    """One way to cut sequences over *ranks* of 8."""
    words = {"gpus": 8, "micro_batch": micro_batch, **words}
    if exchange == "heads":
        return Plan(strategy=Strategy.ZERO3, ulysses_parallel=ranks, **words)
    fsdp = FsdpSettings(context_exchange=exchange)  # type: ignore[arg-type]
    return Plan(strategy=Strategy.FSDP, context_parallel=ranks, fsdp=fsdp, **words)


def sent_bytes(chosen: Plan) -> Counter[str]:
    """Payloads of one step by purpose."""
    found: Counter[str] = Counter()
    for _, block, times in blocks(build(LLAMA, LONG, chosen).step):
        for each in block.transfers:
            if isinstance(each, Collective):
                found[each.what] += int(times * each.payload_bytes)
    return found


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.sampled_from(["heads", "allgather", "alltoall"]), st.sampled_from([1, 2]))
def test_ranks_share_a_sequence_s_arithmetic_evenly(ranks: int, exchange: str, micro_batch: int) -> None:
    whole, part = (build(LLAMA, LONG, plan(each, exchange, micro_batch)).step for each in (1, ranks))

    assert work(part).linear_flop * ranks == pytest.approx(work(whole).linear_flop, rel=1e-9)
    assert work(part).attention_flop * ranks == pytest.approx(work(whole).attention_flop, rel=1e-9)


def test_ulysses_exchanges_queries_keys_values_and_output() -> None:
    found = sent_bytes(plan(4))
    tokens, layers = 2 * LENGTH // 4, 32
    query, key = (2 * tokens * width for width in (4096, 1024))

    assert found["heads for tokens"] == found["gradients, heads for tokens"] == layers * (query + 2 * key)
    assert found["tokens for heads"] == found["gradients, tokens for heads"] == layers * query
    assert found["positions"] == layers * 2 * LENGTH * 8


def test_key_value_heads_fewer_than_ranks_are_repeated() -> None:
    spec = Attention(heads=32, key_value_heads=8, head_dim=128)

    assert [(each.heads, each.key_value_heads) for each in (local_heads(spec, 4), local_heads(spec, 16))] == [
        (8, 2),
        (2, 1),
    ]
    few, many = (sent_bytes(plan(each, gpus=16))["heads for tokens"] for each in (8, 16))
    # 16 ranks take two copies of each of 8 heads: with twice the ranks each token costs 40 and then 48 widths of 128.
    assert many / few == pytest.approx(0.5 * 64 / 48)


def test_fp32_is_what_deepspeed_sums_gradients_of_cut_sequences_in() -> None:
    whole, part = sent_bytes(plan()), sent_bytes(plan(4))
    states = [phase_peaks(build(LLAMA, LONG, each).device_without_scratch)["init"][1] for each in (plan(), plan(4))]

    assert part["gradients"] == 2 * whole["gradients"]
    assert states[1] - states[0] == 2 * plan().zero.reduce_bucket  # stage 3's bucket has that format too


@pytest.mark.parametrize(("exchange", "forward"), [("allgather", 4), ("alltoall", 3)])
def test_a_ring_gets_keys_and_values_at_once_or_by_and_by(exchange: str, forward: int) -> None:
    found = sent_bytes(plan(4, exchange))
    each = 2 * 2 * (2 * LENGTH // 4) * 1024  # keys and values in bf16

    # Gathered whole, or sent on three times; backward does it again, and four times sends gradients in fp32.
    assert found["keys and values"] == 2 * 32 * forward * each
    assert found["gradients of keys and values"] == 32 * 4 * 2 * each


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(["heads", "allgather", "alltoall"]), st.sampled_from(list(Checkpointing)))
def test_a_sequence_as_many_times_as_long_over_as_many_ranks_keeps_as_much(
    exchange: str, checkpointing: Checkpointing
) -> None:
    kept = []
    for ranks in (2, 4):
        job = replace(LONG, sequence_length=ranks * 1024)
        program = build(LLAMA, job, plan(ranks, exchange, checkpointing=checkpointing))
        phases = phase_peaks(program.device_without_scratch)
        kept.append(phases["loss"][1] - phases["init"][1])

    assert kept[0] == kept[1]


def test_a_million_tokens_of_an_8b_model_are_for_8_gpus_of_141_gb_and_not_for_one_each() -> None:
    job = Job(sequence_length=2**20, global_batch=1, loss="chunked")
    one, eight = (
        fold(build(LLAMA, job, plan(ranks, micro_batch=1, checkpointing=Checkpointing.FULL)).device).peak_bytes
        for ranks in (1, 8)
    )

    assert eight < 141e9 < 3 * 141e9 < one


@pytest.mark.parametrize(
    ("model", "words", "chosen", "said"),
    [
        ("meta-llama__Llama-3.1-8B", {}, plan(1), None),
        ("meta-llama__Llama-3.1-8B", {}, plan(8), None),
        ("meta-llama__Llama-3.1-8B", {}, plan(8, "alltoall"), None),
        ("Qwen__Qwen2.5-7B", {}, plan(8), "28 attention heads do not divide over 8 ranks"),
        ("Qwen__Qwen2.5-7B", {}, plan(8, "alltoall"), None),
        ("meta-llama__Llama-3.1-8B", {"sequence_length": 8196}, plan(8), "8196 tokens do not divide into the 8 pieces"),
        ("meta-llama__Llama-3.1-8B", {"sequence_length": 8200}, plan(8, "alltoall"), "into the 16 pieces"),
        ("meta-llama__Llama-3.1-8B", {"padded": True}, plan(2), "would see padding"),
        ("meta-llama__Llama-3.1-8B", {"attention": "flash"}, plan(2), None),
        ("meta-llama__Llama-3.1-8B", {"attention": "flash"}, plan(2, "alltoall"), "take --attention sdpa"),
        ("meta-llama__Llama-3.1-8B", {"attention": "eager"}, plan(2), "Ulysses takes no mask"),
        ("meta-llama__Llama-3.1-8B", {"trainer": "trl"}, plan(2), "for its own trainer alone, not for trl"),
        ("meta-llama__Llama-3.1-8B", {"precision": "fp32"}, plan(2, "alltoall"), "takes no fp32"),
        ("meta-llama__Llama-3.1-8B", {"method": "lora"}, plan(2), "--method lora with cut sequences"),
        ("google__gemma-3-4b-it", {}, plan(2), "has a window of 1024 tokens"),
        ("openai-community__gpt2", {}, plan(2), "Ulysses reads num_key_value_heads"),
        ("openai-community__gpt2", {}, plan(2, "alltoall"), None),
        ("mistralai__Mixtral-8x7B-v0.1", {}, plan(2), "Ulysses reads head_dim"),
        ("deepseek-ai__DeepSeek-V2-Lite", {}, plan(2), "latent or repeated heads"),
        ("google-bert__bert-base-uncased", {}, plan(2), "is no causal model"),
    ],
)
def test_what_the_frameworks_do_not_take_is_refused_with_the_reason(
    model: str, words: dict[str, Any], chosen: Plan, said: str | None
) -> None:
    found = refusal(model_of(model), replace(LONG, **words), chosen)

    assert found == said if said is None else said in (found or "")
