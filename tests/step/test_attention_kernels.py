"""Which attention kernel runs, and what a mask costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest

from advisor.specs.job import AttentionKernel
from advisor.specs.model import Attention, LatentAttention, ModelSpec
from advisor.step.attention_kernels import Kernel, chosen_kernel
from advisor.step.masks import shared_by
from advisor.step.program import FusedAttention, Matmul
from advisor.step.recording import Mode, record_layer
from advisor.step.tape import Event
from step.catalog_models import model_of

LENGTH = 256
GROUPED = Attention(heads=8, key_value_heads=2, head_dim=64)
WHOLE = replace(GROUPED, key_value_heads=8)
LATENT = replace(
    WHOLE,
    head_dim=192,
    latent=LatentAttention(
        query_rank=None, key_value_rank=64, rotary_head_dim=64, plain_head_dim=128, value_head_dim=128
    ),
)


# torch 2.13, ATen/native/transformers/cuda/sdp_utils.cpp: flash takes half formats without a mask and with one head
# dimension up to 256; the memory-efficient kernel takes masks, fp32 and two head dimensions, but no shared heads.
@pytest.mark.parametrize(
    ("spec", "compute_bytes", "masked", "grouped", "kernel"),
    [
        (GROUPED, 2, False, True, "flash"),
        (WHOLE, 2, True, False, "memory-efficient"),
        (WHOLE, 4, False, False, "memory-efficient"),
        (GROUPED, 4, False, True, "math"),
        (LATENT, 2, False, False, "memory-efficient"),
        (replace(WHOLE, head_dim=512), 2, False, False, "memory-efficient"),
        (replace(WHOLE, head_dim=20), 2, True, False, "math"),
        (replace(GROUPED, key_value_heads=1, broadcast_heads=True), 2, False, False, "math"),
    ],
)
def test_the_kernel_is_chosen_as_torch_chooses_it(
    spec: Attention, compute_bytes: int, masked: bool, grouped: bool, kernel: Kernel
) -> None:
    assert chosen_kernel(spec, compute_bytes, "sdpa", masked=masked, grouped=grouped) == kernel


def test_who_asks_for_flash_gets_flash() -> None:
    assert chosen_kernel(LATENT, 2, "flash", masked=False, grouped=False) == "flash"


def saved_bytes(events: Iterable[Event]) -> int:
    signs = {"take": 1, "give": -1}
    return sum(signs.get(event.kind, 0) * event.size_bytes for event in events)


def layer_saves(model: ModelSpec, **settings: Any) -> int:
    mode = Mode(2, 2, LENGTH, "sdpa", **settings)
    return saved_bytes(record_layer(model.layers[0], model.hidden_size, mode, False).forward)


# transformers 5.23, integrations/sdpa_attention.py: with a mask no kernel takes shared heads, so keys and values are
# repeated for every query head; each layer makes a floating mask of its own from the boolean one.
def test_padding_repeats_the_heads_and_gives_every_layer_a_mask() -> None:
    model = model_of("Qwen__Qwen2.5-1.5B")
    spec = model.layers[0].attention
    repeated = 2 * 2 * LENGTH * (spec.query_width - spec.key_value_width)
    mask = 2 * LENGTH**2

    assert layer_saves(model, padded=True) - layer_saves(model) == repeated + mask


@pytest.mark.parametrize(("length", "masked"), [(4095, False), (4096, True), (8192, True)])
def test_a_window_needs_a_mask_once_the_sequence_fills_it(length: int, masked: bool) -> None:
    model = model_of("mistralai__Mistral-7B-v0.1")
    assert model.layers[0].attention.window == 4096

    shared = shared_by(model.layers, Mode(2, 2, length, "sdpa"), 2, False)

    assert shared.made_bytes == (length**2 if masked else 0)
    assert shared.kept_bytes == 0


def test_masks_are_made_for_each_kind_of_layer_and_outlive_forward_under_checkpointing() -> None:
    layers = model_of("google__gemma-3-1b-it").layers
    mode = Mode(2, 2, 1024, "eager")

    whole, windowed = 2 * 3 * 1024**2, 2 * 3 * 1024**2
    assert shared_by(layers, mode, 3, False).made_bytes == whole + windowed
    assert shared_by(layers, mode, 3, True).kept_bytes == whole + windowed


def scratch(model: ModelSpec, mode: Mode) -> int:
    """Most bytes of kernels' scratch for a sequence in a layer's backward."""
    signs = {"take": 1, "give": -1}
    events = record_layer(model.layers[0], model.hidden_size, mode, False).backward  # type: ignore[arg-type]
    return max(
        accumulate(signs.get(event.kind, 0) * event.size_bytes * (event.category == "workspace") for event in events)
    )


# Fp32 sums of queries (4ad) and a number per row (4a), for tokens in whole blocks of 128; 2ad for each of keys and
# values where heads share them. Head dimensions grow to a multiple of 32, or beyond 192 to 256.
@pytest.mark.parametrize(
    ("profile", "tokens", "rows", "width", "shared"),
    [
        ("Qwen2.5-0.5B", 256, 256, 64, True),
        ("Llama-3.1-8B", 1000, 1024, 128, True),
        ("Llama-2-7b-hf", 100, 128, 128, False),
        ("Phi-3-mini-4k-instruct", 128, 128, 96, False),
    ],
)
def test_flash_s_backward_takes_its_scratch(profile: str, tokens: int, rows: int, width: int, shared: bool) -> None:
    model = model_of(profile)
    attention = model.layers[0].attention  # type: ignore[union-attr]
    taken = 4 * rows * attention.heads * (width + 1) + 4 * shared * tokens * attention.heads * attention.head_dim

    for kernel in ("sdpa", "flash"):
        assert scratch(model, Mode(2, 2, tokens, kernel)) == taken  # type: ignore[arg-type]
    assert scratch(model, Mode(2, 2, tokens, "eager")) == 0


def score_products(model: ModelSpec, mode: Mode) -> tuple[list[Matmul], list[Matmul]]:
    """Products of scores and outputs in a layer's forward and backward."""
    recording = record_layer(model.layers[0], model.hidden_size, mode, False)
    both = []
    for events in (recording.forward, recording.backward):
        matmuls = [product.matmul for event in events for product in event.work.products]
        both.append([matmul for matmul in matmuls if matmul.kind == "attention"])
    return both[0], both[1]


@pytest.mark.parametrize(
    ("attention", "padded", "fused"),
    [("sdpa", False, "sdpa"), ("flash", False, "flash"), ("sdpa", True, "memory-efficient")],
)
def test_products_of_attention_say_their_kernel_and_direction(
    attention: AttentionKernel, padded: bool, fused: FusedAttention
) -> None:
    forward, backward = score_products(model_of("Qwen__Qwen2.5-1.5B"), Mode(2, 2, LENGTH, attention, padded=padded))

    assert [(each.fused, each.backward) for each in forward] == [(fused, False)] * 2
    assert [(each.fused, each.backward) for each in backward] == [(fused, True)] * 5
    assert {each.element_bytes for each in (*forward, *backward)} == {2}


def test_a_fused_kernel_reads_and_writes_queries_keys_values_and_outputs_but_no_scores() -> None:
    model = model_of("Qwen__Qwen2.5-1.5B")
    spec = model.layers[0].attention
    forward, _ = score_products(model, Mode(2, 2, LENGTH, "sdpa"))

    assert sum(each.operand_bytes for each in forward) == 4 * 2 * LENGTH * spec.heads * spec.head_dim


def test_the_scores_matrix_is_a_product_by_itself_and_moves_the_scores() -> None:
    model = model_of("Qwen__Qwen2.5-1.5B")
    spec = model.layers[0].attention
    forward, _ = score_products(model, Mode(2, 2, LENGTH, "eager"))

    assert [each.fused for each in forward] == [None, None]
    assert forward[0].operand_bytes == 2 * spec.heads * (2 * LENGTH * spec.head_dim + LENGTH**2)


def test_products_of_torch_s_own_scores_matrix_are_in_fp32() -> None:
    model = model_of("Qwen__Qwen2.5-1.5B")
    forward, _ = score_products(model, Mode(4, 4, LENGTH, "sdpa"))

    assert [(each.fused, each.element_bytes) for each in forward] == [(None, 4), (None, 4)]
