"""Attention blocks in the order of transformers' modelling code (5.23): projections, rotation, kernel, output."""

from __future__ import annotations

from dataclasses import dataclass

from advisor.errors import SpecError
from advisor.specs.job import AttentionKernel
from advisor.specs.model import Attention, NormKind, Parameter
from advisor.step.operators import (
    add,
    cast,
    concatenate,
    copy,
    dropout,
    linear,
    multiply_constant,
    rms_norm,
    unary,
    view,
    weight_gradient,
)
from advisor.step.program import Matmul
from advisor.step.tape import Gradients, Product, Tape, Tensor, Weight


@dataclass(eq=False)
class Weights:
    """The parameters of one module, claimed one by one as its code uses them."""

    unclaimed: list[Weight]

    def take(self, *shape: int) -> Weight:
        """The first unclaimed parameter of *shape*, or of its transpose (GPT-2's Conv1D)."""
        for index, weight in enumerate(self.unclaimed):
            if weight.parameter.shape in (shape, shape[:-2] + shape[:-3:-1]):
                weight.shape = shape
                return self.unclaimed.pop(index)
        left = ", ".join(f"{weight.parameter.name} {weight.parameter.shape}" for weight in self.unclaimed)
        raise SpecError(f"no parameter of shape {shape} is left among: {left or 'none'}")

    def bias(self, width: int, present: bool) -> Weight | None:
        return self.take(width) if present else None


def weights_of(parameters: tuple[Parameter, ...], element_bytes: int) -> Weights:
    return Weights([Weight(parameter, element_bytes) for parameter in parameters])


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
    if spec.latent:
        query, key, value = _latent_projections(tape, hidden, spec, weights, hidden_size)
    else:
        query, key, value = _projections(tape, hidden, memory or hidden, spec, weights, hidden_size)
        query, key = _normalise_heads(tape, query, key, spec, norm, weights)
        if spec.rotary_fraction:
            query, key = (
                rotate(tape, query, spec.rotary_fraction),
                rotate(tape, key, spec.rotary_fraction),
            )
    output = attend(tape, query, key, value, spec, weights, kernel)
    if spec.fused_projection and spec.rotary_fraction:
        # Their concatenated queries lie head by head, and so does the kernel's output; it is copied token by token.
        output = copy(tape, output)
    projection = weights.take(hidden_size, spec.heads * spec.value_head_dim)
    return linear(tape, output, projection, weights.bias(hidden_size, spec.output_bias))


def _projections(
    tape: Tape, hidden: Tensor, source: Tensor, spec: Attention, weights: Weights, hidden_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    wide, narrow = spec.query_width, spec.key_value_width
    if spec.fused_projection:
        fused_width = wide + 2 * narrow
        fused = linear(tape, hidden, weights.take(fused_width, hidden_size), weights.bias(fused_width, spec.bias))
        tokens = fused.numel // fused_width
        return (
            view(tape, fused, tokens * wide),
            view(tape, fused, tokens * narrow),
            view(tape, fused, tokens * narrow),
        )
    query = linear(tape, hidden, weights.take(wide, hidden_size), weights.bias(wide, spec.bias))
    key = linear(tape, source, weights.take(narrow, hidden_size), weights.bias(narrow, spec.bias))
    value = linear(tape, source, weights.take(narrow, hidden_size), weights.bias(narrow, spec.bias))
    return query, key, value


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
    query = concatenate(tape, view(tape, query, tokens * spec.heads * latent.plain_head_dim), rotated)
    del rotated
    expanded_width = spec.heads * (latent.plain_head_dim + latent.value_head_dim)
    expanded = linear(tape, plain, weights.take(expanded_width, latent.key_value_rank))
    value = view(tape, expanded, tokens * spec.heads * latent.value_head_dim)
    spread = Tensor(rotated_key.numel * spec.heads, rotated_key.element_bytes, True, rotated_key.storage)
    key = concatenate(tape, view(tape, expanded, tokens * spec.heads * latent.plain_head_dim), spread)
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
    # Under autocast cosines and sines stay in fp32, which promotes the products.
    wide = 4 if tape.autocast else x.element_bytes
    straight = multiply_constant(tape, x, wide)
    half = concatenate(tape, multiply_constant(tape, view(tape, x, turned // 2)), view(tape, x, turned // 2))
    half = multiply_constant(tape, half, wide)
    turned_x = add(tape, straight, half)
    return concatenate(tape, turned_x, passed) if passed else turned_x


def attend(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: Attention,
    weights: Weights,
    kernel: AttentionKernel,
) -> Tensor:
    """The attention itself, by a fused kernel or by the scores matrix."""
    query, key, value = (cast(tape, each, tape.compute_bytes) for each in (query, key, value))
    bias = _position_bias(tape, spec, weights) if spec.additive_bias and not spec.eager_only else None
    if kernel == "eager" or spec.eager_only or spec.broadcast_heads:
        return _eager(tape, query, key, value, spec, weights, bias)
    return _fused(tape, query, key, value, spec, bias)


def _position_bias(tape: Tape, spec: Attention, weights: Weights) -> Tensor:
    """Learned relative positions as an additive mask of heads x length x length, shared by the micro-batch.

    The first layer of a stack looks them up in its table; the others get them handed on, each making its own mask.
    """
    table = next((each for each in weights.unclaimed if each.parameter.shape[1:] == (spec.heads,)), None)
    mask = tape.new(spec.heads * tape.sequence_length**2, tape.compute_bytes, scales=False)
    tape.work(mask, kernels=2)
    if table is None:
        return mask
    owner = weights.take(*table.parameter.shape)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        return (weight_gradient(tape, owner.parameter, owner.element_bytes),)

    return tape.attach(mask, [owner], backward, saves="nothing")


def seen_share(tape: Tape, spec: Attention) -> float:
    """Share of the scores matrix that a kernel which skips masked blocks computes."""
    length = tape.sequence_length
    if not spec.causal:
        return 1.0
    if spec.window is None or spec.window >= length:
        return 0.5
    return spec.window / length * (1 - spec.window / (2 * length))


def _score_products(tape: Tape, spec: Attention, share: float) -> tuple[Product, Product]:
    """The products scores = q·kᵀ and output = p·v of every head."""
    length = tape.sequence_length
    return (
        Product(Matmul(length, length, spec.head_dim, spec.heads, "attention", share), "count"),
        Product(Matmul(length, spec.value_head_dim, length, spec.heads, "attention", share), "count"),
    )


def _fused(tape: Tape, query: Tensor, key: Tensor, value: Tensor, spec: Attention, bias: Tensor | None) -> Tensor:
    """Flash or memory-efficient kernel: saves inputs, output and an fp32 log-sum-exp per head and token.

    Backward recomputes the scores: five products for the forward's two.
    """
    output = tape.new(tape.sequence_length * spec.heads * spec.value_head_dim, tape.compute_bytes)
    log_sum_exp = tape.new(tape.sequence_length * spec.heads, 4)
    share = seen_share(tape, spec)
    tape.work(query, key, value, output, matmuls=_score_products(tape, spec, share))
    kept = Tensor(output.numel, output.element_bytes, True, output.storage)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        gradients = tape.like(query), tape.like(key), tape.like(value)
        for_bias = tape.like(bias) if bias else None
        touched = (query, key, value, kept, log_sum_exp, gradient, *gradients)
        scores, outputs = _score_products(tape, spec, share)
        tape.work(*touched, matmuls=(scores, scores, scores, outputs, outputs), kernels=3)
        return *gradients, for_bias

    return tape.attach(output, [query, key, value, bias], backward)


def _eager(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: Attention,
    weights: Weights,
    bias: Tensor | None,
) -> Tensor:
    """The scores matrix, masked, softmaxed in fp32 and multiplied with the values.

    torch's own fallback, for heads that are broadcast, first casts its inputs to fp32.
    """
    if spec.broadcast_heads:
        return _in_fp32(tape, query, key, value, spec)
    if spec.key_value_heads < spec.heads:
        key, value = expand_heads(tape, key, spec), expand_heads(tape, value, spec)
    scores = matrix_product(tape, query, key, spec, scores=True)
    scores = multiply_constant(tape, scores)
    if spec.soft_cap:
        scores = multiply_constant(tape, scores)
        scores = unary(tape, scores, saves="output")
        scores = multiply_constant(tape, scores)
    scores = _add_bias(tape, scores, bias) if bias else add_constant(tape, scores)
    if spec.sinks:
        scores = _with_sinks(tape, scores, weights.take(spec.heads))
        # Without the sink's column the probabilities are a strided view, which the product copies.
        probabilities = copy(tape, unary(tape, scores, saves="output"))
    else:
        probabilities = unary(tape, scores, saves="output", element_bytes=4)
    probabilities = cast(tape, probabilities, tape.compute_bytes)
    probabilities = dropout(tape, probabilities, spec.dropout)
    output = matrix_product(tape, probabilities, value, spec, scores=False)
    return copy(tape, output)


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


def _with_sinks(tape: Tape, scores: Tensor, sinks: Weight) -> Tensor:
    """Scores with one learned column per head, less the largest of each row."""
    output = tape.like(scores)
    tape.work(scores, output, kernels=2)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        return gradient, weight_gradient(tape, sinks.parameter, sinks.element_bytes)

    return tape.attach(output, [scores, sinks], backward, saves="nothing")


def _in_fp32(tape: Tape, query: Tensor, key: Tensor, value: Tensor, spec: Attention) -> Tensor:
    """torch's ``_scaled_dot_product_attention_math``: scaled queries and keys, scores and values in fp32."""
    query = multiply_constant(tape, cast(tape, query, 4))
    key = multiply_constant(tape, cast(tape, key, 4))
    scores = add_constant(tape, matrix_product(tape, query, key, spec, scores=True))
    probabilities = unary(tape, scores, saves="output")
    del scores
    return cast(tape, matrix_product(tape, probabilities, cast(tape, value, 4), spec, scores=False), tape.compute_bytes)


def expand_heads(tape: Tape, x: Tensor, spec: Attention) -> Tensor:
    """Keys or values repeated for every query head."""
    groups = spec.heads // spec.key_value_heads
    output = tape.new(x.numel * groups, x.element_bytes)
    tape.work(x, output)
    numel = x.numel

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        summed = tape.new(numel, gradient.element_bytes)
        tape.work(gradient, summed)
        return (summed,)

    return tape.attach(output, [x], backward, saves="nothing")


def add_constant(tape: Tape, x: Tensor) -> Tensor:
    """*x* plus something that needs no gradient, such as a mask."""
    output = tape.like(x)
    tape.work(x, output)
    return tape.attach(output, [x], lambda tape, gradient: (gradient,), saves="nothing")


def matrix_product(tape: Tape, left: Tensor, right: Tensor, spec: Attention, *, scores: bool) -> Tensor:
    """A batch of products per head that saves both sides: q·kᵀ where *scores*, else p·v."""
    length = tape.sequence_length
    product = _score_products(tape, spec, 1.0)[0 if scores else 1]
    output = tape.new(spec.heads * length * (length if scores else spec.value_head_dim), left.element_bytes)
    tape.work(left, right, output, matmuls=(product,))

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        for_left, for_right = tape.like(left), tape.like(right)
        tape.work(gradient, left, right, for_left, for_right, matmuls=(product, product), kernels=2)
        return for_left, for_right

    return tape.attach(output, [left, right], backward)
