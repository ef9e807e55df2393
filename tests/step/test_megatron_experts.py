"""Experts, latent attention and exchanged heads in Megatron's programs: what the parts add up to, and the laws."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.catalog.models import find_model
from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.megatron import ContextExchange, MegatronSettings
from advisor.specs.model import Experts, ModelSpec, Parameter, Run
from advisor.specs.plan import Checkpointing, Plan, Strategy
from advisor.step.build import StepProgram, build
from advisor.step.megatron_recording import megatron_mode, source_of
from advisor.step.megatron_shard import Stage, is_of_expert, stage_of
from advisor.step.program import Collective, blocks, expand, fold, held_after
from step.test_megatron import left_by, sent

TOKENS = 128
JOB = Job(sequence_length=TOKENS, attention="flash")


def plan_of(**choices: Any) -> Plan:
    usual: dict[str, Any] = {"strategy": Strategy.MEGATRON, "gpus": 8, "micro_batch": 1}
    return Plan(**(usual | choices))


@cache
def small(name: str, **experts: int) -> ModelSpec:
    """Two layers of each kind of the model called *name*, with other counts of *experts* where given."""
    model = find_model(name).model
    runs = []
    for run in model.runs:
        (layer,) = run.layers
        if experts and isinstance(layer.feed_forward, Experts):
            layer = replace(layer, feed_forward=replace(layer.feed_forward, **experts))
        runs.append(Run((layer,), 2))
    return replace(model, runs=tuple(runs))


def expert_parameters(stage: Stage) -> tuple[Parameter, ...]:
    return tuple(parameter for parameter in stage.parameters if is_of_expert(parameter))


def kept_by_experts(model: ModelSpec, plan: Plan) -> float:
    """Bytes per token that the last layer of *model* keeps for backward on one rank."""
    layer = stage_of(model, JOB, plan, 0).chunks[0].runs[-1][0]
    mode = megatron_mode(JOB, plan)
    checkpointed = plan.checkpointing is not Checkpointing.NONE
    return left_by(source_of(plan).layer(layer, model.hidden_size, mode, checkpointed).forward) / TOKENS


# Each rank has all but the experts that are on others: together, all of a catalog model's weights, once.
@pytest.mark.parametrize("name", ["Mixtral-8x7B-v0.1", "Qwen3-30B-A3B-Base", "DeepSeek-V2-Lite", "DeepSeek-V3"])
@pytest.mark.parametrize("ranks", [1, 8])
def test_ranks_of_different_experts_have_the_model_between_them(name: str, ranks: int) -> None:
    model = find_model(name).model
    stage = stage_of(model, JOB, plan_of(expert_parallel=ranks), 0)
    own = sum(parameter.numel for parameter in expert_parameters(stage))
    whole = sum(parameter.numel for parameter in stage.parameters)
    padding = 2 * model.hidden_size * (-model.vocabulary_size % 128)

    assert whole - own + ranks * own == model.parameter_count + padding


def test_slices_of_experts_make_up_the_whole() -> None:
    model = small("Mixtral-8x7B-v0.1")
    cut = plan_of(tensor_parallel=2, sequence_parallel=True, expert_parallel=2, expert_tensor_parallel=2)
    parts = expert_parameters(stage_of(model, JOB, cut, 0))

    whole = expert_parameters(stage_of(model, JOB, plan_of(), 0))
    assert 4 * sum(each.numel for each in parts) == sum(each.numel for each in whole)


# megatron-core 0.16.1, distributed_data_parallel.py: experts that are spread have buffers of their own, over whose
# expert-data ranks the optimizer is cut; 8 GPUs are 4 of different experts by 2 of the same.
def test_states_of_experts_are_cut_over_the_ranks_that_have_them() -> None:
    model, plan = small("Mixtral-8x7B-v0.1"), plan_of(expert_parallel=4)
    stage = stage_of(model, JOB, plan, 0)
    experts = sum(parameter.numel for parameter in expert_parameters(stage))
    others = sum(parameter.numel for parameter in stage.parameters) - experts

    held = {each.label: each.size_bytes for each in held_after(build(model, JOB, plan).init)}

    assert held["weights"] == 2 * (experts + others)
    assert held["sums of gradients"] == 4 * (experts + others)
    assert held["fp32 weights, rank's share"] == pytest.approx(4 * (experts / 2 + others / 8), rel=1e-6)
    assert held["Adam moments, rank's share"] == pytest.approx(8 * (experts / 2 + others / 8), rel=1e-6)


# For each expert of a token: its row of the stream and of the two products' inputs and outputs, bf16 (2h + 6f); its
# score (2), where it stood (8) and its softmax in fp32 (4); and where its row went (4) when rows were sorted by the
# experts of a rank that has several, and when they were sorted back.
@pytest.mark.parametrize("ranks", [1, 8])
def test_each_chosen_expert_keeps_its_rows(ranks: int) -> None:
    one, two = (small("Mixtral-8x7B-v0.1", active=active) for active in (1, 2))
    plan, (layer, *_) = plan_of(expert_parallel=ranks), one.described_layers
    assert isinstance(layer.feed_forward, Experts)

    more = kept_by_experts(two, plan) - kept_by_experts(one, plan)

    sorted_twice = 2 * 4 * (ranks < 8)
    assert more == 2 * one.hidden_size + 6 * layer.feed_forward.width + 2 + 8 + 4 + sorted_twice


# Without fusion the scores and the choices are turned over (3 bytes for each expert), and the order is kept as an index
# for each row; with it as two numbers and a row for each of a token's experts (TransformerEngine, make_row_id_map).
def test_fused_permutation_keeps_a_map_in_place_of_copies() -> None:
    model = small("Mixtral-8x7B-v0.1")
    apart = MegatronSettings(fuses_permutation=False)

    fused, unfused = (
        kept_by_experts(model, plan_of(expert_parallel=8, megatron=own)) for own in (MegatronSettings(), apart)
    )

    assert unfused - fused == 3 * 8 + 8 * 2 - 4 * (2 * 8 + 1)


# What was computed again leaves where tokens went: scores and choices of 8 experts (3 bytes each) and the map.
def test_recomputed_layers_hold_the_routing_of_the_last_micro_batch() -> None:
    model, plan = (
        small("Mixtral-8x7B-v0.1"),
        plan_of(expert_parallel=8, checkpointing=Checkpointing.FULL, micro_batch=3),
    )

    held = {each.label: each.size_bytes for each in held_after(build(model, JOB, plan).init)}

    assert held["routing of the last micro-batch"] == 3 * TOKENS * 2 * (3 * 8 + 4 * (2 * 8 + 1))
    assert kept_by_experts(model, plan) == 2 * model.hidden_size


# Two experts a token: its row goes and comes back in either direction, its score goes with it. Payloads are what a rank
# holds.
def test_tokens_go_to_their_experts_and_back() -> None:
    model = small("Mixtral-8x7B-v0.1")
    row = TOKENS * 2 * 2

    found = sent(build(model, JOB, plan_of(expert_parallel=4, accumulation_steps=3)))

    assert found["expert", "all-to-all"] == 2 * 2 * 3 * row * (2 * model.hidden_size + 1)
    assert not any(group in ("expert-tensor", "expert-ranks") for group, _ in found)


def test_slices_gather_tokens_and_add_up_outputs() -> None:
    model = small("Mixtral-8x7B-v0.1")
    cut = plan_of(tensor_parallel=2, sequence_parallel=True, expert_parallel=4, expert_tensor_parallel=2)
    rows = 2 * TOKENS // 2 * 2 * 2

    found = sent(build(model, JOB, cut))

    scores = rows * (model.hidden_size + 1)
    assert found["expert-tensor", "all-gather"] == 2 * (scores + rows * model.hidden_size)
    assert found["expert-tensor", "reduce-scatter"] == 2 * (scores + rows * model.hidden_size)
    assert found["expert", "all-to-all"] == 2 * 2 * rows // 2 * (2 * model.hidden_size + 1)


def test_gathering_dispatchers_bring_every_token_to_every_rank() -> None:
    model = small("Mixtral-8x7B-v0.1")
    own = MegatronSettings(token_dispatcher="allgather", fuses_permutation=False)

    found = sent(build(model, JOB, plan_of(expert_parallel=4, megatron=own)))

    whole = 4 * TOKENS * 2
    assert found["expert-ranks", "all-gather"] == 2 * whole * (2 * model.hidden_size + 8 + 8 / 2)
    assert found["expert-ranks", "reduce-scatter"] == 2 * whole * (2 * model.hidden_size + 8)


# Experts' gradients are added up, and their weights gathered, over the two ranks that have them.
def test_experts_are_reduced_apart_from_the_rest() -> None:
    model, plan = small("Mixtral-8x7B-v0.1"), plan_of(expert_parallel=4)
    stage = stage_of(model, JOB, plan, 0)
    experts = sum(parameter.numel for parameter in expert_parameters(stage))
    others = sum(parameter.numel for parameter in stage.parameters) - experts

    found = sent(build(model, JOB, plan))

    assert found["expert-data", "reduce-scatter"] == 4 * experts
    assert found["expert-data", "all-gather"] == 2 * experts
    assert found["data", "reduce-scatter"] == pytest.approx(4 * others, rel=1e-6)


# DeepSeek-V2, arXiv:2405.04434, section 2.1: V2-Lite has 512 + 64 numbers of keys and values together, and queries and
# keys of 128 + 64 and values of 128 for each of 16 heads, which FlashAttention keeps.
def test_latent_attention_keeps_its_low_rank_rows_and_expanded_heads() -> None:
    model, plan = small("DeepSeek-V2-Lite"), plan_of()
    dense = stage_of(model, JOB, plan, 0).chunks[0].runs[0][0]
    mode, width, heads = megatron_mode(JOB, plan), model.hidden_size, 16

    kept = left_by(source_of(plan).layer(dense, width, mode, False).forward) / TOKENS

    attention = 2 * (512 + 64) + 2 * 512 + 4 + 2 * heads * (2 * (128 + 64) + 2 * 128) + 4 * heads
    feed_forward = 2 * width + 4 + 6 * 10944
    # The stream and its norm before, and the stream behind the attention, which comes back as the next layer's.
    assert kept == attention + feed_forward + 2 * width + 4 + 2 * width + 2 * width


@pytest.mark.parametrize(("exchange", "kind"), [("p2p", "send-receive"), ("a2a", "all-to-all")])
def test_context_ranks_send_keys_and_values_round_or_exchange_heads(exchange: Any, kind: Any) -> None:
    model = small("Llama-3.1-8B")
    plan = plan_of(context_parallel=4, megatron=MegatronSettings(context_exchange=exchange))
    local, queries, keys = TOKENS // 4, 4096, 1024

    found = sent(build(model, JOB, plan))

    ring = 3 * 3 * 2 * keys
    # Queries, keys, values and outputs; backwards outputs once more, and the gradients of all four.
    heads = (2 * queries + 2 * keys) + (3 * queries + 2 * keys)
    assert found["context", kind] == 2 * local * 2 * (ring if exchange == "p2p" else heads)


def test_exchanged_heads_keep_no_more_than_a_ring_while_they_compute() -> None:
    model = small("Llama-3.1-8B")
    exchanges: tuple[ContextExchange, ...] = ("p2p", "a2a")

    ring, exchanged = (
        fold(build(model, JOB, plan_of(context_parallel=4, megatron=MegatronSettings(context_exchange=each))).step)
        for each in exchanges
    )

    assert exchanged.peak_bytes <= ring.peak_bytes


@pytest.mark.parametrize(
    ("name", "choices", "reason"),
    [
        ("Mixtral-8x7B-v0.1", {"expert_parallel": 3, "gpus": 3}, "8 experts do not divide over expert_parallel 3"),
        ("Mixtral-8x7B-v0.1", {"tensor_parallel": 2}, "without sequence parallelism; give both"),
        (
            "Mixtral-8x7B-v0.1",
            {"tensor_parallel": 2, "sequence_parallel": True},
            "give expert_tensor_parallel 2, not 1",
        ),
        ("Llama-3.1-8B", {"expert_parallel": 2}, "no experts to spread over expert_parallel 2"),
        ("gpt-oss-20b", {}, "experts with biases or the activation clamped-swiglu"),
        ("DeepSeek-V3", {"pipeline_parallel": 2}, "61 layers do not divide over 2 stages"),
        (
            "Llama-3.1-8B",
            {
                "context_parallel": 2,
                "tensor_parallel": 8,
                "gpus": 16,
                "megatron": MegatronSettings(context_exchange="a2a"),
            },
            "8 key-value heads do not divide over tensor_parallel 8 x context_parallel 2 by a2a",
        ),
    ],
)
def test_what_megatron_cannot_spread_is_refused_with_the_arithmetic(name: str, choices: Any, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        build(find_model(name).model, JOB, plan_of(**choices))


@st.composite
def spreads(draw: st.DrawFn) -> Plan:
    stages, tensor = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    ranks = draw(st.sampled_from([2, 4] if tensor > 1 else [1, 2, 4]))
    slices = draw(st.sampled_from([1, 2])) if ranks > 1 else 1
    gathers = draw(st.booleans())
    return plan_of(
        gpus=stages * 8,
        micro_batch=draw(st.integers(1, 3)),
        accumulation_steps=draw(st.integers(1, 4)),
        checkpointing=draw(st.sampled_from(Checkpointing)),
        tensor_parallel=tensor,
        sequence_parallel=tensor > 1,
        pipeline_parallel=stages,
        expert_parallel=ranks,
        expert_tensor_parallel=slices,
        megatron=MegatronSettings(
            token_dispatcher="allgather" if gathers else "alltoall",
            fuses_permutation=not gathers and draw(st.booleans()),
            groups_experts=draw(st.booleans()),
            fuses_gradient_sums=draw(st.booleans()),
        ),
    )


MIXTURES = st.sampled_from(["Mixtral-8x7B-v0.1", "DeepSeek-V2-Lite", "Qwen3-30B-A3B-Base"])


def programs(name: str, plan: Plan) -> list[StepProgram]:
    ranks = int(plan.gpus) // plan.pipeline_parallel
    return [build(small(name), JOB, plan, number * ranks) for number in range(plan.pipeline_parallel)]


@settings(max_examples=15, deadline=None)
@given(MIXTURES, spreads())
def test_a_step_gives_back_what_it_took_and_two_readings_agree(name: str, plan: Plan) -> None:
    for program in programs(name, plan):
        extent = fold(program.step)

        assert extent.net_bytes == 0
        assert extent.peak_bytes == max(each.before_bytes + each.block.peak_bytes for each in expand(program.step))


@settings(max_examples=15, deadline=None)
@given(MIXTURES, spreads())
def test_more_ranks_of_different_experts_hold_less_and_compute_the_same(name: str, plan: Plan) -> None:
    further = replace(plan, expert_parallel=2 * plan.expert_parallel, gpus=2 * plan.gpus)

    few, many = (programs(name, each)[0] for each in (plan, further))

    def flop(program: StepProgram) -> float:
        return float(sum(each.flop * runs for _, block, runs in blocks(program.step) for each in block.matmuls))

    assert fold(many.init).net_bytes <= fold(few.init).net_bytes or plan.megatron.token_dispatcher == "allgather"
    assert flop(many) == pytest.approx(flop(few))


def test_every_transfer_of_experts_waits() -> None:
    program = build(small("Mixtral-8x7B-v0.1"), JOB, plan_of(expert_parallel=4))
    found = [
        each
        for _, block, _ in blocks(program.step)
        for each in block.transfers
        if isinstance(each, Collective) and each.what == "tokens of experts"
    ]

    assert found
    assert all(each.waits for each in found)
