"""Embedding, layers, head and loss, written as transformers' modelling code (5.23) runs them."""

from __future__ import annotations

from advisor.specs.job import AttentionKernel
from advisor.specs.model import Experts, Layer, ModelSpec, NormKind
from advisor.step.attention import attention
from advisor.step.feed_forward import activation, feed_forward, mixture
from advisor.step.operators import (
    add,
    cast,
    dropout,
    layer_norm,
    linear,
    multiply_constant,
    rms_norm,
    unary,
    weight_gradient,
)
from advisor.step.tape import Gradients, Tape, Tensor, Weight
from advisor.step.weights import Weights


def normalise(tape: Tape, hidden: Tensor, kind: NormKind, weights: Weights, width: int) -> Tensor:
    """A norm of *width* with its weight, and a bias where it is a LayerNorm."""
    outer, tape.scope = tape.scope, "norms"
    if kind == "layer":
        weight = weights.take(width)
        output = layer_norm(tape, hidden, weight, weights.bias(width), width)
    else:
        wide, narrow = kind == "rms-fp32-weight", kind == "rms-narrow"
        output = rms_norm(tape, hidden, weights.take(width), width, fp32_weight=wide, narrow=narrow)
    tape.scope = outer
    return output


def decoder_layer(
    tape: Tape,
    hidden: Tensor,
    layer: Layer,
    weights: Weights,
    hidden_size: int,
    kernel: AttentionKernel,
    memory: Tensor | None = None,
) -> Tensor:
    """One layer over the residual stream *hidden*; *memory* is the encoder's output for cross-attention."""
    output = _layer(tape, hidden, layer, weights, hidden_size, kernel, memory)
    tape.lasting.clear()
    return output


def _layer(
    tape: Tape,
    hidden: Tensor,
    layer: Layer,
    weights: Weights,
    hidden_size: int,
    kernel: AttentionKernel,
    memory: Tensor | None,
) -> Tensor:
    tape.keeps_copies = not layer.transposed_weights

    def norm(x: Tensor) -> Tensor:
        return normalise(tape, x, layer.norm, weights, hidden_size)

    def attend(x: Tensor) -> Tensor:
        tape.scope = "attention"
        output = attention(tape, x, layer.attention, layer.norm, weights, hidden_size, kernel)
        if layer.names_branches:
            tape.lasting.append(output)
        return output

    def cross(x: Tensor) -> Tensor:
        tape.scope = "cross-attention"
        assert layer.cross_attention is not None
        return attention(tape, x, layer.cross_attention, layer.norm, weights, hidden_size, kernel, memory)

    def transform(x: Tensor) -> Tensor:
        if isinstance(layer.feed_forward, Experts):
            tape.scope = "experts"
            return mixture(tape, x, layer.feed_forward, weights, hidden_size)
        tape.scope = "feed-forward"
        return feed_forward(tape, x, layer.feed_forward, weights, hidden_size)

    if layer.placement == "parallel":
        first = norm(hidden)
        second = first if layer.shared_norm else None  # which GPT-NeoX computes once it needs it
        if layer.names_branches:
            second = second or norm(hidden)
            tape.lasting += [first, second]
        attended = dropout(tape, attend(first), layer.dropout)
        del first
        second = second or norm(hidden)
        transformed = dropout(tape, transform(second), layer.dropout)
        del second
        tape.scope = "residual stream"
        return add(tape, add(tape, transformed, attended), hidden)

    branches = [attend, cross, transform] if layer.cross_attention else [attend, transform]
    for branch in branches:
        residual = hidden
        if layer.placement in ("pre", "sandwich"):
            hidden = norm(hidden)
        hidden = branch(hidden)
        if layer.placement in ("post-branch", "sandwich"):
            hidden = norm(hidden)
        hidden = dropout(tape, hidden, layer.dropout)
        tape.scope = "residual stream"
        hidden = add(tape, residual, hidden)
        if layer.placement == "post-sum":
            hidden = norm(hidden)
    return close_stack(tape, hidden, layer, weights, hidden_size) if layer.closes_stack else hidden


def close_stack(tape: Tape, hidden: Tensor, layer: Layer, weights: Weights, hidden_size: int) -> Tensor:
    """The norm and dropout behind the encoder's last *layer*."""
    return dropout(tape, normalise(tape, hidden, layer.norm, weights, hidden_size), layer.dropout)


def embed(tape: Tape, model: ModelSpec, weights: Weights, *, needs_gradient: bool) -> Tensor:
    """Token embeddings, with positions, norm and dropout where the model has them.

    Those of frozen tables only get a gradient where that *needs_gradient*.
    """
    tape.scope = "embedding"
    tables = [weight for weight in weights.unclaimed if len(weight.parameter.shape) == 2]
    hidden = _lookup(tape, weights.take(*tables[0].parameter.shape))
    if model.embedding_scale:
        hidden = multiply_constant(tape, hidden)
    if needs_gradient and not hidden.needs_gradient:
        tape.require_gradient(hidden)
    for table in tables[1:]:
        hidden = add(tape, hidden, _lookup(tape, weights.take(*table.parameter.shape)))
    if model.embedding_norm:
        hidden = normalise(tape, hidden, model.embedding_norm, weights, hidden.numel // tape.sequence_length)
        tape.scope = "embedding"
    return dropout(tape, hidden, model.embedding_dropout)


def _lookup(tape: Tape, weight: Weight) -> Tensor:
    """Rows of an embedding matrix; its gradient is dense."""
    output = tape.new(tape.sequence_length * weight.parameter.shape[1], weight.element_bytes)
    tape.work(output, output)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        dense = weight_gradient(tape, weight.parameter, weight.element_bytes)
        tape.work(gradient, dense, kernels=2)
        return (dense,)

    return tape.attach(output, [weight], backward)


def finish(tape: Tape, stream: Tensor, model: ModelSpec, weights: Weights) -> Tensor:
    """The norm after the last layer, and dropout where the model has it there."""
    if not model.final_norm:
        return stream
    return dropout(tape, normalise(tape, stream, model.final_norm, weights, model.hidden_size), model.final_dropout)


def head(tape: Tape, hidden: Tensor, model: ModelSpec, weights: Weights) -> Tensor:
    """Logits of the finished stream *hidden*, in the format in which they leave the model."""
    width = model.hidden_size
    tape.scope = "head"
    if model.head_activation:
        dense = weights.take(width, width)
        hidden = activation(tape, linear(tape, hidden, dense, weights.bias(width)), model.head_activation)
        hidden = normalise(tape, hidden, "layer", weights, width)
    tape.scope = "logits"
    matrix = weights.take(model.vocabulary_size, width)
    logits = linear(tape, hidden, matrix, weights.bias(model.vocabulary_size, bool(weights.unclaimed)))
    tape.watched = logits.node
    if model.logit_soft_cap:
        logits = multiply_constant(tape, logits)
        logits = unary(tape, logits, saves="output")
        logits = multiply_constant(tape, logits)
    return logits


def cross_entropy(tape: Tape, logits: Tensor, model: ModelSpec) -> Tensor:
    """transformers' loss: causal models upcast all logits to fp32 first, others only under autocast."""
    if model.objective == "causal" or tape.autocast:
        logits = cast(tape, logits, 4)
    logarithms = unary(tape, logits, saves="output")
    loss = tape.new(1, 4, scales=False)
    tape.work(logarithms)
    numel, element_bytes = logarithms.numel, logarithms.element_bytes
    kept = Tensor(numel, element_bytes, True, logarithms.storage)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        spread = tape.new(numel, element_bytes)
        tape.work(kept, spread, kernels=2)
        return (spread,)

    return tape.attach(loss, [logarithms], backward)
