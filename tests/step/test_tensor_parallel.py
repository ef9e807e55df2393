"""A rank's part of a model that transformers cuts."""

from __future__ import annotations

import pytest

from advisor.catalog.models import find_model
from advisor.errors import SpecError
from advisor.specs.inference import Inference, InferencePlan
from advisor.step.inference import generation
from advisor.step.program import blocks, fold
from advisor.step.tensor_parallel import rank_part, replicated_heads

CALL = Inference(batch=2, prompt=1000, context=1001)


def test_ranks_hold_all_of_a_model_and_its_norms_and_embedding_each() -> None:
    model = find_model("Llama-3.1-8B").model
    whole = model.embedding_count + sum(each.numel for each in model.parameters() if len(each.shape) == 1)

    parts = [rank_part(model, ranks).parameter_count for ranks in (1, 2, 4, 8)]

    for ranks, part in zip((1, 2, 4, 8), parts, strict=True):
        assert part * ranks == model.parameter_count + (ranks - 1) * whole


def test_a_rank_caches_its_heads_and_at_least_one() -> None:
    model = find_model("Llama-3.1-8B").model
    cached = {
        ranks: generation(model, CALL, InferencePlan(gpus=ranks, tensor_parallel=ranks)).cache_bytes
        for ranks in (1, 4, 8, 16)
    }

    assert cached[1] == 4 * cached[4] == 8 * cached[8] == 8 * cached[16]
    assert [replicated_heads(model, ranks) for ranks in (1, 8, 16)] == [1, 1, 2]


def test_experts_are_cut_by_their_width() -> None:
    model = find_model("Mixtral-8x7B-v0.1").model
    shapes = {each.name: each.shape for each in rank_part(model, 4).layers[0].parameters}

    assert shapes["mlp.experts.gate_up_proj"] == (8, 2 * 14336 // 4, 4096)
    assert shapes["mlp.experts.down_proj"] == (8, 4096, 14336 // 4)


def test_ranks_add_up_the_stream_twice_a_layer_and_gather_logits() -> None:
    model = find_model("Llama-3.1-8B").model
    found = generation(model, CALL, InferencePlan(gpus=4, tensor_parallel=4))
    sent = {
        each.what: (each.kind, each.payload_bytes, each.messages)
        for _, block, _ in blocks(found.prefill)
        for each in block.transfers
    }

    assert sent == {
        "sums of a layer": ("all-reduce", 2 * 2 * 1000 * 4096 * 2, 2),
        "logits": ("all-gather", 2 * 128256 * 2, 1),
    }


def test_one_rank_sends_nothing_and_more_hold_less() -> None:
    model = find_model("Qwen3-8B").model
    alone = generation(model, CALL, InferencePlan(gpus=1))
    four = generation(model, CALL, InferencePlan(gpus=4, tensor_parallel=4))

    assert not any(block.transfers for _, block, _ in blocks(alone.program.step))
    assert fold(four.program.device).peak_bytes < fold(alone.program.device).peak_bytes / 2


@pytest.mark.parametrize(
    ("name", "ranks", "message"),
    [
        ("gpt2", 2, "its family is gpt2"),
        ("Llama-3.1-8B", 3, "32 attention heads do not divide over 3"),
        ("Qwen2.5-0.5B", 7, "2 key-value heads and 7 GPUs do not divide"),
    ],
)
def test_what_does_not_divide_is_refused(name: str, ranks: int, message: str) -> None:
    with pytest.raises(SpecError, match=f"over {ranks} GPUs cannot cut {name}: .*{message}"):
        rank_part(find_model(name).model, ranks)
