"""The losses without all logits as predicted, beside the code that computes them on fake tensors."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from advisor.specs.job import Job, LossKernel, ParameterFormat
from advisor.specs.plan import Plan, Strategy
from advisor.validation.accuracy import Case, Comparison, compare

SCALARS = 64
"""Bytes of numbers that stand alone, of which autograd keeps a few more than the model tells."""


def compared(
    loss: LossKernel,
    sizes: tuple[str, int, int, bool],
    tokens: tuple[int, int],
    held: ParameterFormat,
    ranks: int,
) -> Comparison:
    family, vocabulary, width, tied = sizes
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        "tie_word_embeddings": tied,
    }
    job = Job(sequence_length=tokens[1], loss=loss, parameter_format=held)
    plan = Plan(strategy=Strategy.FSDP if ranks > 1 else Strategy.DDP, gpus=ranks, micro_batch=tokens[0])
    return compare(Case(family, config, job, plan))


# Family, vocabulary, width and whether both matrices are one; sequences and tokens of each; format; ranks. Two pieces
# and many, the last of them full or not; one kernel call and several; vocabularies that no piece divides.
@pytest.mark.parametrize("loss", ["chunked", "fused", "tiled"])
@pytest.mark.parametrize(
    ("sizes", "tokens", "held", "ranks"),
    [
        (("qwen2", 5003, 64, False), (1, 512), "bf16", 1),
        (("qwen2", 3001, 128, True), (3, 1024), "fp32", 1),
        (("llama", 8191, 32, False), (2, 700), "fp32", 4),
        (("llama", 2048, 64, True), (1, 2500), "bf16", 4),
        (("mistral", 4097, 96, True), (2, 1100), "fp32", 4),
        (("qwen3", 7001, 64, False), (4, 300), "fp32", 1),
    ],
)
def test_a_loss_in_pieces_takes_what_is_predicted(
    loss: LossKernel, sizes: tuple[str, int, int, bool], tokens: tuple[int, int], held: ParameterFormat, ranks: int
) -> None:
    found = compared(loss, sizes, tokens, held, ranks)

    for counter in ("peak", "peak in backward", "end of forward"):
        assert abs(found.difference_bytes(counter)) <= SCALARS, counter


# One row of tiles for a vocabulary of two, and two rows for one of a single tile.
@pytest.mark.parametrize(
    ("sizes", "tokens", "held"),
    [
        (("llama", 40001, 32, False), (2, 1500), "fp32"),
        (("mistral", 9001, 32, True), (3, 2732), "fp32"),
    ],
)
def test_trls_tiles_take_what_is_predicted(
    sizes: tuple[str, int, int, bool], tokens: tuple[int, int], held: ParameterFormat
) -> None:
    found = compared("tiled", sizes, tokens, held, ranks=1)

    for counter in ("peak", "peak in backward", "end of forward"):
        assert abs(found.difference_bytes(counter)) <= SCALARS, counter
