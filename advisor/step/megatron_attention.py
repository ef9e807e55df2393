"""Attention between Megatron's two products: from the joint queries, keys and values to what the last one reads.

Queries, keys and values are views of one tensor (megatron-core 0.16.1, transformer/attention.py
``get_query_key_value_tensors``); where several heads share a key, the queries' view cannot be reshaped and is copied.
Hidden states lie token by token, FlashAttention's sequence by sequence.
"""

from __future__ import annotations

from typing import NamedTuple

from advisor.specs.model import Attention
from advisor.step.attention_kernels import flash_scratch, seen_share
from advisor.step.megatron_operators import Cut, Norm, normalise
from advisor.step.operators import copy
from advisor.step.program import Matmul
from advisor.step.tape import Gradients, Product, Tape, Tensor


class Kernel(NamedTuple):
    """How the attention itself runs."""

    fused: bool
    """FlashAttention through TransformerEngine; otherwise Megatron's own scores matrix."""
    recomputed: bool
    """Backward runs it again: ``--recompute-granularity selective`` (arXiv:2205.05198, section 5)."""


def attention(tape: Tape, joint: Tensor, spec: Attention, norms: tuple[Norm, ...], cut: Cut, kernel: Kernel) -> Tensor:
    """The heads of this rank over its local tokens of *joint*, which is given up here."""
    query, key, value = _split(tape, joint, spec)
    del joint
    if norms:
        query, key = (
            normalise(tape, each, norm, spec.head_dim) for each, norm in zip((query, key), norms, strict=True)
        )
    if spec.rotary_fraction:
        query, key = _rotate(tape, query), _rotate(tape, key)
    if not kernel.fused:
        return _unfused(tape, query, key, value, spec, cut, recomputed=kernel.recomputed)
    # Each in memory of its own, which rotated tensors of a single sequence are already.
    value = copy(tape, value)
    if not (tape.alone and spec.rotary_fraction):
        query, key = query if tape.alone and spec.key_value_heads < spec.heads else copy(tape, query), copy(tape, key)
    output = _fused(tape, query, key, value, spec, cut, recomputed=kernel.recomputed)
    return output if tape.alone else copy(tape, output)


def latent_attention(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, spec: Attention, cut: Cut, kernel: Kernel
) -> Tensor:
    """The same of queries, keys and values that lie apart already; FlashAttention's copies sequence by sequence."""
    if not kernel.fused:
        return _unfused(tape, query, key, value, spec, cut, recomputed=kernel.recomputed)
    if not tape.alone:
        query, key, value = (copy(tape, each) for each in (query, key, value))
    output = _fused(tape, query, key, value, spec, cut, recomputed=kernel.recomputed)
    return output if tape.alone else copy(tape, output)


def score_products(tape: Tape, spec: Attention, cut: Cut, share: float) -> tuple[Product, Product]:
    """The products q·kᵀ and p·v of local queries with the keys of the whole sequence."""
    local, whole = tape.sequence_length, tape.sequence_length * cut.context
    return (
        Product(Matmul(local, whole, spec.head_dim, spec.heads, "attention", share), "count"),
        Product(Matmul(local, spec.value_head_dim, whole, spec.heads, "attention", share), "count"),
    )


def _split(tape: Tape, joint: Tensor, spec: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Views of *joint*. Backward comes to the queries last, and lays the gradients of all three side by side."""
    tokens, numel, element_bytes = tape.sequence_length, joint.numel, joint.element_bytes
    arrived: list[Tensor] = []

    def wait(tape: Tape, gradient: Tensor) -> Gradients:
        arrived.append(gradient)
        return ()

    def join(tape: Tape, gradient: Tensor) -> Gradients:
        whole = tape.new(numel, element_bytes)
        tape.work(gradient, *arrived, whole)
        arrived.clear()
        return (whole,)

    query, key, value = (
        Tensor(tokens * width, element_bytes, True, joint.storage)
        for width in (spec.query_width, spec.key_value_width, spec.key_value_width)
    )
    if spec.key_value_heads < spec.heads:
        query = tape.like(query)
        tape.work(query, query)
    tape.attach(query, [joint], join, saves="nothing")
    for each in (key, value):
        tape.attach(each, [], wait, saves="nothing")
    return query, key, value


def _rotate(tape: Tape, x: Tensor) -> Tensor:
    """Rotary positions in one kernel, which saves nothing (fusions/fused_rope)."""
    output = tape.like(x)
    tape.work(x, output)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        for_x = tape.like(gradient)
        tape.work(gradient, for_x)
        return (for_x,)

    return tape.attach(output, [x], backward, saves="nothing")


def _fused(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, spec: Attention, cut: Cut, *, recomputed: bool
) -> Tensor:
    """A kernel that saves its inputs, its output and an fp32 log-sum-exp per head and token (TransformerEngine,
    attention/dot_product_attention/backends.py ``FlashAttention``).

    With context parallelism keys and values go round a ring. Every rank's arrive in a tensor of their own, those that
    came last are saved, and the output of every step is there until all are combined (TransformerEngine,
    attention/dot_product_attention/context_parallel.py ``AttnFuncWithCPAndKVP2P``; the last rank sees most).
    """
    if cut.context > 1 and cut.context_exchange == "a2a":
        return _by_heads(tape, query, key, value, spec, cut, recomputed=recomputed)
    scores, outputs = score_products(tape, spec, cut, seen_share(tape.sequence_length * cut.context, spec))
    wide = query.numel // spec.head_dim * spec.value_head_dim

    def run(tape: Tape) -> tuple[Tensor, Tensor, Tensor | None]:
        travelled = tape.new(key.numel + value.numel, key.element_bytes) if cut.context > 1 else None
        others = [tape.like(travelled) for _ in range(cut.context - 1)] if travelled else []
        steps = [tape.new(wide, query.element_bytes) for _ in range(cut.context)] if travelled else []
        output = tape.new(wide, query.element_bytes)
        log_sum_exp = tape.new(tape.sequence_length * spec.heads, 4)
        tape.work(query, key, value, output, *others, *steps, matmuls=(scores, outputs))
        return output, log_sum_exp, travelled

    output, log_sum_exp, travelled = run(tape)
    saved = [] if recomputed else [Tensor(output.numel, output.element_bytes, True, output.storage), log_sum_exp]
    if travelled and not recomputed:
        key, value = (
            Tensor(each.numel, each.element_bytes, True, travelled.storage, each.node) for each in (key, value)
        )
    del log_sum_exp, travelled

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        held = list(run(tape)) if recomputed else [*saved]
        saved.clear()
        gradients = tape.like(query), tape.like(key), tape.like(value)
        # The ring again, with the gradients of keys and values behind them.
        ring = [tape.new(2 * (key.numel + value.numel), key.element_bytes) for _ in range(2 * (cut.context > 1))]
        scratch = flash_scratch(tape, spec, tape.sequence_length, expanded=key.numel < query.numel)
        touched = (query, key, value, gradient, *(each for each in held if each), *gradients, *ring)
        tape.work(*touched, matmuls=(scores, scores, scores, outputs, outputs), kernels=3)
        del scratch, ring, held
        return gradients

    return tape.attach(output, [query, key, value], backward)


def _by_heads(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, spec: Attention, cut: Cut, *, recomputed: bool
) -> Tensor:
    """The kernel over whole sequences of a share of the heads, which ranks exchange before and after it.

    Each tensor is packed, sent, and unpacked in memory of its own; kept are queries, keys and values as they came, and
    the output as it went back, which comes once more in backward (TransformerEngine, context_parallel.py
    ``AttnFuncWithCPAndQKVOA2A`` and ``flash_attn_a2a_communicate``).
    """
    whole, share = tape.sequence_length * cut.context, seen_share(tape.sequence_length * cut.context, spec)
    scores = Product(Matmul(whole, whole, spec.head_dim, spec.heads // cut.context, "attention", share), "count")
    outputs = Product(Matmul(whole, spec.value_head_dim, whole, spec.heads // cut.context, "attention", share), "count")
    sizes, element_bytes = (query.numel, key.numel, value.numel), query.element_bytes
    wide = query.numel // spec.head_dim * spec.value_head_dim

    def exchanged(tape: Tape, *parts: Tensor) -> list[Tensor]:
        packed = [tape.like(each) for each in parts]
        came = [tape.like(each) for each in parts]
        tape.work(*parts, *packed, *came, *came, kernels=2 * len(parts))
        return came

    def run(tape: Tape, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        came = exchanged(tape, *inputs)
        own = tape.new(wide, element_bytes)
        log_sum_exp = tape.new(tape.sequence_length * spec.heads, 4)
        tape.work(*came, own, matmuls=(scores, outputs))
        (output,) = exchanged(tape, own)
        return output, [*came, log_sum_exp]

    output, saved = run(tape, query, key, value)
    if recomputed:
        saved = [query, key, value]
    else:
        saved.append(Tensor(output.numel, output.element_bytes, True, output.storage))

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        held = [*saved]
        if recomputed:
            again, held = run(tape, *saved)
            held.append(again)
            del again
        saved.clear()
        back = exchanged(tape, held.pop(), gradient)
        gradients = [tape.new(size, element_bytes) for size in sizes]
        scratch = flash_scratch(tape, spec, tape.sequence_length, expanded=sizes[1] < sizes[0])
        tape.work(*held, *back, *gradients, matmuls=(scores, scores, scores, outputs, outputs), kernels=3)
        del scratch, held, back
        return tuple(exchanged(tape, *gradients))

    return tape.attach(output, [query, key, value], backward)


def _unfused(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, spec: Attention, cut: Cut, *, recomputed: bool
) -> Tensor:
    """The scores matrix of every head (transformer/dot_product_attention.py): saves probabilities, dropout's mask, and
    what dropout left. Keys and values are copied out where several heads share them."""
    scores, outputs = score_products(tape, spec, cut, 1.0)
    area, attended = spec.heads * tape.sequence_length**2, query.numel // spec.head_dim * spec.value_head_dim
    grouped = spec.key_value_heads < spec.heads

    def run(tape: Tape) -> tuple[Tensor, list[Tensor]]:
        query, key, value = inputs
        copies = [tape.like(query) for _ in range(2)] if grouped else []
        raw = tape.new(area, query.element_bytes)
        tape.work(query, *(copies or [key]), raw, matmuls=(scores,))
        probabilities = tape.like(raw)
        tape.work(raw, probabilities)
        del raw
        kept = [probabilities]
        if spec.dropout:
            kept += [tape.like(probabilities, 1), tape.like(probabilities)]
            tape.work(probabilities, *kept[1:])
        product = tape.new(attended, query.element_bytes)
        tape.work(kept[-1], *(copies or [value]), product, matmuls=(outputs,))
        output = tape.like(product)
        tape.work(product, output)
        return output, [*kept, *copies]

    inputs = [query, key, value]
    output, saved = run(tape)
    wide, narrow, plain = query.numel, key.numel, value.numel
    if recomputed:
        saved.clear()
    elif grouped:
        # The products have the copies.
        inputs[1:] = []

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        held = run(tape)[1] if recomputed else [*saved]
        saved.clear()
        for_dropped = tape.new(area, gradient.element_bytes)
        for_value = tape.new(wide if grouped else plain, gradient.element_bytes)
        tape.work(gradient, *held, for_dropped, for_value, matmuls=(outputs, outputs), kernels=2)
        for_scores = tape.like(for_dropped) if spec.dropout else for_dropped
        tape.work(for_dropped, *held[:2], for_scores, kernels=2)
        del for_dropped
        for_query, for_key = (tape.new(each, gradient.element_bytes) for each in (wide, wide if grouped else narrow))
        tape.work(for_scores, *inputs, for_query, for_key, matmuls=(scores, scores), kernels=2)
        del for_scores, held
        if grouped:
            for_key, for_value = (tape.new(narrow, gradient.element_bytes) for _ in range(2))
            tape.work(for_query, for_key, for_value)
        inputs.clear()
        return for_query, for_key, for_value

    return tape.attach(output, [query, key, value], backward)
