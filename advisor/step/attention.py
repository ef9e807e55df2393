"""Attention blocks in the order of transformers' modelling code (5.23): projections, rotation, kernel, output."""

from __future__ import annotations

from advisor.specs.cuts import WHOLE
from advisor.specs.job import AttentionKernel
from advisor.specs.model import Attention, NormKind
from advisor.step.attention_kernels import attend, expand_heads
from advisor.step.key_value_cache import cache, seen_tokens
from advisor.step.operators import add, concatenate, copy, linear, multiply_constant, rms_norm, view
from advisor.step.ring_attention import attend_in_ring
from advisor.step.tape import Tape, Tensor
from advisor.step.ulysses import attend_by_heads
from advisor.step.weights import Weights


def attention(
    tape: Tape,
    hidden: Tensor,
    spec: Attention,
    norm: NormKind,
    weights: Weights,
    hidden_size: int,
    kernel: AttentionKernel,
    memory: Tensor | None = None,
) -> Tensor:
    """Self-attention over *hidden*, or cross-attention to *memory*."""
    joint = None
    if spec.latent:
        query, key, value = _latent_projections(tape, hidden, spec, weights, hidden_size)
    else:
        query, key, value, joint = _projections(tape, hidden, memory or hidden, spec, weights, hidden_size)
        query, key = _normalise_heads(tape, query, key, spec, norm, weights)
        if spec.rotary_fraction:
            query, key = (
                rotate(tape, query, spec.rotary_fraction),
                rotate(tape, key, spec.rotary_fraction),
            )
        if memory is None:
            key, value = cache(tape, key, value, spec)
    if tape.cut == WHOLE:
        output = attend(tape, query, key, value, spec, weights, kernel, crosses=memory is not None)
    elif tape.cut.exchange != "heads":
        output = attend_in_ring(tape, query, key, value, spec)
    else:
        output = attend_by_heads(tape, query, key, value, spec, weights, kernel)
    del query, key, value
    projection = weights.take(hidden_size, spec.heads * spec.value_head_dim)
    output = linear(tape, output, projection, weights.bias(hidden_size, spec.output_bias))
    del joint
    return output


def _projections(
    tape: Tape, hidden: Tensor, source: Tensor, spec: Attention, weights: Weights, hidden_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys and values, and the product that they are views of, which the code has a name for, if they are."""
    wide, narrow = spec.query_width, spec.key_value_width
    if spec.fused_projection:
        fused_width = wide + 2 * narrow
        fused = linear(tape, hidden, weights.take(fused_width, hidden_size), weights.bias(fused_width, spec.bias))
        tokens = fused.numel // fused_width
        query, key, value = (view(tape, fused, tokens * width) for width in (wide, narrow, narrow))
        if spec.expanded_heads:
            query = copy(tape, query)
            key, value = (expand_heads(tape, copy(tape, each), spec) for each in (key, value))
            return query, key, value, fused
        if spec.broadcast_heads:
            return query, copy(tape, key), copy(tape, value), fused
        return query, key, value, fused
    query = linear(tape, hidden, weights.take(wide, hidden_size), weights.bias(wide, spec.bias))
    key = linear(tape, source, weights.take(narrow, hidden_size), weights.bias(narrow, spec.bias))
    value = linear(tape, source, weights.take(narrow, hidden_size), weights.bias(narrow, spec.bias))
    return query, key, value, None


def _latent_projections(
    tape: Tape, hidden: Tensor, spec: Attention, weights: Weights, hidden_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek's low-rank queries, keys and values; the rotated part of the key is one head shared by all."""
    latent = spec.latent
    assert latent is not None
    head_dim = latent.plain_head_dim + latent.rotary_head_dim
    if latent.query_rank is None:
        query = linear(tape, hidden, weights.take(spec.heads * head_dim, hidden_size))
    else:
        low = linear(tape, hidden, weights.take(latent.query_rank, hidden_size))
        low = rms_norm(tape, low, weights.take(latent.query_rank), latent.query_rank, fp32_weight=False)
        query = linear(tape, low, weights.take(spec.heads * head_dim, latent.query_rank))
        del low
    tokens = query.numel // (spec.heads * head_dim)
    compressed_width = latent.key_value_rank + latent.rotary_head_dim
    compressed = linear(tape, hidden, weights.take(compressed_width, hidden_size))
    plain = view(tape, compressed, tokens * latent.key_value_rank)
    plain = rms_norm(tape, plain, weights.take(latent.key_value_rank), latent.key_value_rank, fp32_weight=False)
    rotated_key = rotate(tape, view(tape, compressed, tokens * latent.rotary_head_dim), 1.0)
    rotated = rotate(tape, view(tape, query, tokens * spec.heads * latent.rotary_head_dim), 1.0)
    # What keys and values are expanded from is cached, and all of it expanded in every pass.
    plain, rotated_key = cache(tape, plain, rotated_key, spec)
    query = concatenate(tape, view(tape, query, tokens * spec.heads * latent.plain_head_dim), rotated)
    del rotated
    seen = seen_tokens(tape, spec)
    expanded_width = spec.heads * (latent.plain_head_dim + latent.value_head_dim)
    expanded = linear(tape, plain, weights.take(expanded_width, latent.key_value_rank))
    value = view(tape, expanded, seen * spec.heads * latent.value_head_dim)
    spread = Tensor(rotated_key.numel * spec.heads, rotated_key.element_bytes, True, rotated_key.storage)
    key = concatenate(tape, view(tape, expanded, seen * spec.heads * latent.plain_head_dim), spread)
    return query, key, value


def _normalise_heads(
    tape: Tape, query: Tensor, key: Tensor, spec: Attention, norm: NormKind, weights: Weights
) -> tuple[Tensor, Tensor]:
    """Norms on queries and keys: one weight per head dimension, or one over the whole width, or none."""
    if spec.query_key_norm == "none":
        return query, key
    if spec.query_key_norm == "unweighted":
        return (
            rms_norm(tape, query, None, spec.head_dim, fp32_weight=False),
            rms_norm(tape, key, None, spec.head_dim, fp32_weight=False),
        )
    full = spec.query_key_norm == "full-width"
    widths = (spec.query_width, spec.key_value_width) if full else (spec.head_dim, spec.head_dim)
    fp32_weight = norm == "rms-fp32-weight"
    return (
        rms_norm(tape, query, weights.take(widths[0]), widths[0], fp32_weight=fp32_weight),
        rms_norm(tape, key, weights.take(widths[1]), widths[1], fp32_weight=fp32_weight),
    )


def rotate(tape: Tape, x: Tensor, fraction: float) -> Tensor:
    """Rotary embedding: x·cos + rotate_half(x)·sin on the first *fraction* of each head."""
    whole = x.numel
    turned = int(whole * fraction)
    passed = view(tape, x, whole - turned) if turned < whole else None
    x = view(tape, x, turned)
    # Cosines and sines have the stream's format, which under autocast promotes the products.
    wide = tape.stream_bytes
    straight = multiply_constant(tape, x, wide)
    half = concatenate(tape, multiply_constant(tape, view(tape, x, turned // 2)), view(tape, x, turned // 2))
    half = multiply_constant(tape, half, wide)
    turned_x = add(tape, straight, half)
    return concatenate(tape, turned_x, passed) if passed else turned_x
