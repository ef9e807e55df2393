"""Attention itself: which kernel a GPU runs, what it saves, and what its backward allocates.

Three kernels stand behind torch's ``scaled_dot_product_attention`` (torch 2.13, ATen/native/transformers/attention.cpp
and cuda/sdp_utils.cpp), besides the scores matrix that transformers computes itself (``eager``). cuDNN's kernel, which
torch prefers on Hopper and newer, keeps tensors of the same sizes as flash.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from advisor.specs.job import AttentionKernel
from advisor.specs.model import Attention
from advisor.step.key_value_cache import decodes, seen_tokens
from advisor.step.operators import (
    add_constant,
    cast,
    copy,
    dropout,
    multiply_constant,
    unary,
    view,
    weight_gradient,
)
from advisor.step.program import FusedAttention, Matmul
from advisor.step.tape import Gradients, Product, Tape, Tensor, Weight
from advisor.step.weights import Weights

Kernel = Literal["flash", "memory-efficient", "math"]

FLASH_LARGEST_HEAD = 256
FLASH_FINE_HEAD = 192
"""Head dimensions up to this are rounded up to whole columns, larger ones to the largest."""
FLASH_ROWS, FLASH_COLUMNS = 128, 32
"""Of the blocks in which flash's backward works."""
ROW_ALIGNMENT = 32
"""The memory-efficient kernel keeps its log-sum-exp for whole blocks of this many queries."""


def attend(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: Attention,
    weights: Weights,
    kernel: AttentionKernel,
    *,
    crosses: bool = False,
) -> Tensor:
    """Attention over tokens of this tape, or of the encoder where it *crosses*. The output lies token by token."""
    arrived_bytes = query.element_bytes
    eager = kernel == "eager" or spec.eager_only
    masked = kernel == "sdpa" and not eager and is_masked(tape, spec)
    grouped = spec.key_value_heads < spec.heads and not (spec.expanded_heads or spec.broadcast_heads)
    if grouped and kernel == "sdpa" and not eager and (masked or spec.head_dim != spec.value_head_dim):
        # transformers 5.23, integrations/sdpa_attention.py: no kernel takes a mask beside shared heads. Queries of one
        # token that share a key become rows of one head.
        if not decodes(tape):
            copies = spec.key_value_heads > 1
            key, value = (expand_heads(tape, each, spec, copies=copies) for each in (key, value))
        grouped = False
    query, key, value = (cast(tape, each, tape.compute_bytes) for each in (query, key, value))
    bias = _position_bias(tape, spec, weights, crosses=crosses) if spec.additive_bias and not spec.eager_only else None
    if eager:
        return _eager(tape, query, key, value, spec, weights, bias, arrived_bytes)
    if bias is None and masked:
        bias = tape.new(tape.sequence_length * seen_tokens(tape, spec), tape.compute_bytes)
        tape.work(bias)
    chosen = chosen_kernel(spec, tape.compute_bytes, kernel, masked=bias is not None, grouped=grouped)
    if chosen == "math":
        return _math(tape, query, key, value, spec, bias)
    fused: FusedAttention = "flash" if kernel == "flash" else "sdpa" if chosen == "flash" else "memory-efficient"
    output = _fused(tape, query, key, value, spec, bias, chosen, fused)
    # Flash lays its output out as its queries, which a concatenating rotation leaves head by head.
    return copy(tape, output) if chosen == "flash" and spec.rotates_by_head else output


def is_masked(tape: Tape, spec: Attention) -> bool:
    """Whether transformers builds a mask for torch's fused kernels: causal masks alone are a flag instead.

    transformers 5.23, masking_utils.py ``_ignore_causal_mask_sdpa``: a window as long as the sequence counts.
    """
    if tape.caching and tape.caching.capacity is not None and decodes(tape):
        return True
    return tape.padded or spec.always_masked or (spec.window is not None and spec.window <= seen_tokens(tape, spec))


def chosen_kernel(
    spec: Attention, compute_bytes: int, kernel: AttentionKernel, *, masked: bool, grouped: bool
) -> Kernel:
    """What runs on an Ampere or newer GPU (torch 2.13, cuda/sdp_utils.cpp ``select_sdp_backend``)."""
    if kernel == "flash":
        return "flash"
    half = compute_bytes == 2
    if spec.broadcast_heads:
        return "math"
    if half and not masked and spec.head_dim == spec.value_head_dim <= FLASH_LARGEST_HEAD:
        return "flash"
    aligned = not any(each % (8 if half else 4) for each in (spec.head_dim, spec.value_head_dim))
    return "memory-efficient" if aligned and not grouped else "math"


def _position_bias(tape: Tape, spec: Attention, weights: Weights, *, crosses: bool) -> Tensor:
    """T5's learned relative positions as an additive mask of heads x length x length, shared by the micro-batch.

    The first layer of a stack looks them up in its table; the others get them handed on, each making its own mask,
    which is one for each sequence where padding differs. Cross-attention has a mask of zeros that all layers share
    unless there is padding (``masks.py`` has what is shared).
    """
    table = next((each for each in weights.unclaimed if each.parameter.shape[1:] == (spec.heads,)), None)
    scores = spec.heads * tape.sequence_length**2
    stream_bytes = 4 if tape.autocast else tape.compute_bytes
    if crosses and tape.padded:
        return tape.new(scores, tape.compute_bytes)
    if crosses:
        return Tensor(scores, tape.compute_bytes, False, tape.new(0, 1, scales=False).storage)
    buckets = tape.new(tape.sequence_length**2, 8, scales=False) if table else None
    owner = weights.take(*table.parameter.shape) if table else None
    mask = tape.new(scores, stream_bytes, scales=tape.padded)
    tape.work(mask, kernels=2)
    allowed = tape.new(tape.sequence_length**2, 1, scales=False) if spec.causal and not tape.padded else None

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        tape.work(gradient, *(each for each in (buckets, allowed) if each), kernels=2)
        if owner is None:
            return (None,)
        return (weight_gradient(tape, owner.parameter, owner.element_bytes),)

    return cast(tape, tape.attach(mask, [owner], backward, saves="outputs"), tape.compute_bytes)


def seen_share(length: int, spec: Attention) -> float:
    """Share of the scores matrix of *length* tokens that a kernel which skips masked blocks computes."""
    if not spec.causal:
        return 1.0
    if spec.window is None or spec.window >= length:
        return 0.5
    return spec.window / length * (1 - spec.window / (2 * length))


def _scores(tape: Tape, spec: Attention, element_bytes: int) -> Matmul:
    """The scores matrix of every head. Of one new token, heads that share a key are rows of one product."""
    rows, seen, heads = tape.sequence_length, seen_tokens(tape, spec), spec.heads
    if decodes(tape) and not (spec.latent or spec.eager_only):
        rows, heads = spec.heads // spec.key_value_heads, spec.key_value_heads
    return Matmul(rows, seen, seen, heads, "attention", element_bytes=element_bytes)


def _score_products(spec: Attention, whole: Matmul) -> tuple[Product, Product]:
    """The products scores = q·kᵀ and output = p·v of every head, where *whole* says all but their sizes."""
    return (
        Product(replace(whole, k=spec.head_dim), "count"),
        Product(replace(whole, n=spec.value_head_dim), "count"),
    )


def _fused(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: Attention,
    bias: Tensor | None,
    kernel: Kernel,
    fused: FusedAttention,
) -> Tensor:
    """Flash or memory-efficient kernel: saves inputs, output and an fp32 log-sum-exp per head and token.

    Backward recomputes the scores: five products for the forward's two. A learned bias gets a gradient per sequence,
    summed over the micro-batch afterwards.
    """
    length = tape.sequence_length
    output, fresh = tape.keep(length * spec.heads * spec.value_head_dim, tape.compute_bytes)
    rows = length if kernel == "flash" else -(-length // ROW_ALIGNMENT) * ROW_ALIGNMENT
    needs_rows = kernel == "flash" or tape.grad_enabled or tape.kept is not None
    log_sum_exp, _ = tape.keep(rows * spec.heads * needs_rows, 4)
    # A kernel that gets a mask computes what the mask hides.
    skips = (kernel == "flash" or bias is None) and not decodes(tape)
    share = seen_share(tape.sequence_length, spec) if skips else 1.0
    whole = replace(_scores(tape, spec, tape.compute_bytes), flop_share=share, fused=fused, splits_keys=decodes(tape))
    if fresh:
        tape.work(query, key, value, output, matmuls=_score_products(spec, whole))
    kept = Tensor(output.numel, output.element_bytes, True, output.storage)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        gradients = tape.like(query), tape.like(key), tape.like(value)
        expanded = key.numel < query.numel
        scratch = flash_scratch(tape, spec, length, expanded=expanded) if kernel == "flash" else None
        each_bias = tape.new(bias.numel, bias.element_bytes) if bias and bias.node else None
        touched = (query, key, value, kept, log_sum_exp, gradient, *gradients)
        scores, outputs = _score_products(spec, replace(whole, backward=True))
        tape.work(*touched, matmuls=(scores, scores, scores, outputs, outputs), kernels=3)
        del scratch
        if each_bias is None:
            return *gradients, None
        if bias is not None and bias.scales:
            return *gradients, each_bias
        for_bias = tape.new(each_bias.numel, each_bias.element_bytes, scales=False)
        tape.work(each_bias, for_bias)
        return *gradients, for_bias

    return tape.attach(output, [query, key, value, bias], backward)


def flash_scratch(tape: Tape, spec: Attention, length: int, *, expanded: bool) -> list[Tensor]:
    """What flash's backward over *length* tokens takes besides and gives back, on a GPU alone.

    Fp32 sums of the queries' gradients and one number for each of their rows, both rounded up to whole blocks; where
    heads share keys and values, a gradient of these for every head. flash_attn 2.8, csrc/flash_attn/flash_api.cpp
    ``mha_bwd``, and torch 2.13's copy of it. Left out: the sums of every split that determinism would ask for.
    """
    rows = -(-length // FLASH_ROWS) * FLASH_ROWS
    width = (
        -(-spec.head_dim // FLASH_COLUMNS) * FLASH_COLUMNS if spec.head_dim <= FLASH_FINE_HEAD else FLASH_LARGEST_HEAD
    )
    sizes = [(rows * spec.heads * width, 4), (rows * spec.heads, 4)]
    if expanded:
        each_head = length * spec.heads
        sizes += [(each_head * dimension, tape.compute_bytes) for dimension in (spec.head_dim, spec.value_head_dim)]
    return [tape.new(*size, category="workspace", label="flash attention's scratch") for size in sizes]


def _math(tape: Tape, query: Tensor, key: Tensor, value: Tensor, spec: Attention, bias: Tensor | None) -> Tensor:
    """torch's ``_scaled_dot_product_attention_math``: scaled queries and keys, scores and values in fp32.

    It returns the probabilities too, in the inputs' format; nobody keeps them. Products of strided heads copy them.
    """
    original = query.element_bytes
    query, key, value = (cast(tape, each, 4) for each in (query, key, value))
    query = multiply_constant(tape, query)
    if bias is None and not decodes(tape):
        bias = tape.new(tape.sequence_length**2, 4, scales=False)
        tape.work(bias, kernels=2)
    if not spec.broadcast_heads and spec.key_value_heads < spec.heads:
        key, value = expand_heads(tape, key, spec), expand_heads(tape, value, spec)
    key = multiply_constant(tape, key)

    def expanded(x: Tensor) -> Tensor:
        return expand_heads(tape, x, spec, copies=not tape.alone) if spec.broadcast_heads else x

    scores = matrix_product(tape, copy(tape, query), expanded(key), spec, scores=True)
    if bias:
        tape.work(scores, bias, scores)
    probabilities = unary(tape, scores, saves="output")
    del scores, bias
    probabilities = dropout(tape, probabilities, spec.dropout)
    returned = cast(tape, probabilities, original)
    output = cast(tape, matrix_product(tape, probabilities, expanded(value), spec, scores=False), original)
    del returned
    return copy(tape, output)


def _eager(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: Attention,
    weights: Weights,
    bias: Tensor | None,
    arrived_bytes: int,
) -> Tensor:
    """The scores matrix, masked, softmaxed in fp32 and multiplied with the values, by transformers' own code.

    *arrived_bytes*: bytes per element of the queries before the product's own cast.
    """
    if spec.key_value_heads < spec.heads and not spec.expanded_heads:
        key, value = expand_heads(tape, key, spec), expand_heads(tape, value, spec)
    strided = spec.fused_projection and not tape.caching
    if (strided or spec.latent) and not tape.alone:
        # Products copy heads that are strided views, except those of a single sequence.
        value = copy(tape, value)
    if spec.fused_projection and not tape.alone and not spec.rotary_fraction:
        query, key = copy(tape, query), copy(tape, key) if strided else key
    scores = matrix_product(tape, query, key, spec, scores=True)
    held = [scores] if spec.holds_scores else []
    scores = multiply_constant(tape, scores) if not spec.holds_scores else scores
    if spec.soft_cap:
        scores = multiply_constant(tape, scores)
        scores = unary(tape, scores, saves="output")
        scores = multiply_constant(tape, scores)
    scores = _add_bias(tape, scores, bias) if bias else add_constant(tape, scores, tape.stream_bytes)
    held += [scores] if spec.holds_scores else []
    if spec.sinks:
        scores = _with_sinks(tape, scores, weights.take(spec.heads), spec)
        whole = unary(tape, scores, saves="output")
        # Without the sink's column: a strided view, which the product reads as it is.
        seen = view(tape, whole, whole.numel - tape.sequence_length * spec.heads)
        probabilities = cast(tape, seen, value.element_bytes)
        del whole, seen
    else:
        wide = scores if spec.narrow_softmax and not tape.autocast else cast(tape, scores, 4)
        probabilities = unary(tape, wide, saves="output")
        del wide
        # Before the scores are dropped, in the format that the queries came in: fp32 after rotation under autocast.
        probabilities = cast(tape, probabilities, arrived_bytes)
    del scores
    probabilities = cast(tape, probabilities, tape.compute_bytes)
    probabilities = dropout(tape, probabilities, spec.dropout)
    tape.lasting.append(probabilities)
    output = copy(tape, matrix_product(tape, probabilities, value, spec, scores=False))
    held.clear()
    return output


def _add_bias(tape: Tape, scores: Tensor, bias: Tensor) -> Tensor:
    """Scores plus a position bias that the whole micro-batch shares."""
    output = tape.like(scores)
    tape.work(scores, bias, output)
    numel, element_bytes = bias.numel, bias.element_bytes

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        summed = tape.new(numel, element_bytes, scales=False)
        tape.work(gradient, summed)
        return gradient, summed

    return tape.attach(output, [scores, bias], backward, saves="nothing")


def _with_sinks(tape: Tape, scores: Tensor, sinks: Weight, spec: Attention) -> Tensor:
    """Scores with one learned column per head, less the largest of each row, whose place is saved."""
    rows = tape.sequence_length * spec.heads
    element_bytes = max(scores.element_bytes, sinks.element_bytes)
    joined = tape.new(scores.numel + rows, element_bytes)
    places = tape.new(rows, 8)
    tape.work(scores, joined, places, kernels=2)
    output = tape.like(joined)
    tape.work(joined, output)
    numel, narrow = scores.numel, scores.element_bytes

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        # The largest's gradient is a tensor of zeros but for one place in each row.
        spread = tape.like(gradient)
        tape.work(gradient, places, spread, kernels=3)
        del spread
        for_scores = Tensor(numel, gradient.element_bytes, True, gradient.storage)
        for_sinks = weight_gradient(tape, sinks.parameter, sinks.element_bytes) if sinks.needs_gradient else None
        return cast(tape, for_scores, narrow), for_sinks

    return tape.attach(output, [scores, sinks], backward, saves="outputs")


def expand_heads(tape: Tape, x: Tensor, spec: Attention, *, copies: bool = True) -> Tensor:
    """Keys or values repeated for every query head. One head can be repeated without a copy."""
    groups = spec.heads // spec.key_value_heads
    numel, wide = x.numel, x.numel * groups
    output = tape.new(wide, x.element_bytes) if copies else Tensor(wide, x.element_bytes, x.scales, x.storage)
    if copies:
        tape.work(x, output)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        summed = tape.new(numel, gradient.element_bytes)
        tape.work(gradient, summed)
        return (summed,)

    return tape.attach(output, [x], backward, saves="nothing")


def matrix_product(tape: Tape, left: Tensor, right: Tensor, spec: Attention, *, scores: bool) -> Tensor:
    """A batch of products per head that saves both sides: q·kᵀ where *scores*, else p·v."""
    length, seen = tape.sequence_length, seen_tokens(tape, spec)
    product = _score_products(spec, _scores(tape, spec, left.element_bytes))[0 if scores else 1]
    output = tape.new(spec.heads * length * (seen if scores else spec.value_head_dim), left.element_bytes)
    tape.work(left, right, output, matmuls=(product,))
    sides = (left.numel, left.element_bytes), (right.numel, right.element_bytes)
    # Each side is kept for the gradient of the other.
    others = right if left.needs_gradient else None, left if right.needs_gradient else None

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        found = [tape.new(*side) if other else None for side, other in zip(sides, others, strict=True)]
        touched = [each for each in (*others, *found) if each]
        products = len(touched) // 2
        tape.work(gradient, *touched, matmuls=products * (product,), kernels=products)
        return tuple(found)

    return tape.attach(output, [left, right], backward)
