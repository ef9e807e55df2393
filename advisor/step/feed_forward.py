"""Feed-forward blocks in the order of transformers' modelling code (5.23): dense, gated, and mixtures of experts."""

from __future__ import annotations

from advisor.specs.model import Experts, FeedForward
from advisor.step.key_value_cache import decodes
from advisor.step.operators import (
    add,
    add_constant,
    cast,
    compute_copy,
    copy,
    dropout,
    linear,
    multiply,
    multiply_constant,
    scale_rows,
    unary,
    view,
    weight_gradient,
)
from advisor.step.program import Matmul
from advisor.step.tape import Gradients, Product, Tape, Tensor, Weight
from advisor.step.weights import Weights


def activation(tape: Tape, x: Tensor, name: str) -> Tensor:
    """The activation functions of transformers' ``ACT2FN`` that the catalog's models use."""
    if name == "gelu_new":
        half = multiply_constant(tape, x)
        # Autocast runs the power in fp32, and what follows is promoted to it.
        inner = unary(tape, cast(tape, x, 4) if tape.autocast else x, saves="input", temporaries=2)
        # One name, because of each intermediate result the expression keeps no more than the next one needs.
        inner = multiply_constant(tape, inner)
        inner = add(tape, x, inner)
        inner = multiply_constant(tape, inner)
        inner = unary(tape, inner, saves="output")
        inner = add_constant(tape, inner)
        return multiply(tape, half, inner)
    if name == "bloom_gelu":
        # An expression in Python whose factors are there beside its result.
        factors = [tape.like(x) for _ in range(3)]
        tape.work(x, *factors, kernels=6)
        output = unary(tape, x, saves="input")
        del factors
        return output
    return unary(tape, x, saves="output" if name == "relu" else "input")


def feed_forward(tape: Tape, hidden: Tensor, spec: FeedForward, weights: Weights, hidden_size: int) -> Tensor:
    """A dense block: gated where the spec says so."""
    width = spec.width

    def into(columns: int) -> Tensor:
        return linear(tape, hidden, weights.take(columns, hidden_size), weights.bias(columns, spec.bias))

    if spec.fused_gate:
        fused = into(2 * width)
        half = fused.numel // 2
        inner = multiply(tape, view(tape, fused, half), activation(tape, view(tape, fused, half), spec.activation))
        del fused
    elif spec.gated:
        inner = multiply(tape, activation(tape, into(width), spec.activation), into(width))
    else:
        inner = activation(tape, into(width), spec.activation)
    inner = dropout(tape, inner, spec.dropout)
    last = weights.take(hidden_size, width)
    if spec.widened:
        inner = cast(tape, inner, last.element_bytes)
    return linear(tape, inner, last, weights.bias(hidden_size, spec.bias))


def mixture(tape: Tape, hidden: Tensor, spec: Experts, weights: Weights, hidden_size: int) -> Tensor:
    """A router and its experts, as ``grouped_mm`` runs them (transformers' default), plus a shared expert."""
    if spec.every_token:
        output = _every_expert(tape, hidden, spec, weights, hidden_size)
        assert spec.shared is not None
        return add(tape, output, feed_forward(tape, hidden, spec.shared, weights, hidden_size))
    if spec.shared and spec.shared_gate:
        # It goes first, so that backward comes to it last.
        shared = feed_forward(tape, hidden, spec.shared, weights, hidden_size)
        output = _routed(tape, hidden, spec, weights, hidden_size)
        gate = unary(tape, linear(tape, hidden, weights.take(1, hidden_size)), saves="output")
        return add(tape, output, scale_rows(tape, shared, gate))
    output = _routed(tape, hidden, spec, weights, hidden_size)
    return add(tape, output, feed_forward(tape, hidden, spec.shared, weights, hidden_size)) if spec.shared else output


def _routed(tape: Tape, hidden: Tensor, spec: Experts, weights: Weights, hidden_size: int) -> Tensor:
    routing = _route(tape, hidden, spec, weights, hidden_size)
    if decodes(tape):
        return _batched_experts(tape, hidden, routing, spec, weights, hidden_size)
    return _grouped_experts(tape, hidden, routing, spec, weights, hidden_size)


def _route(tape: Tape, hidden: Tensor, spec: Experts, weights: Weights, hidden_size: int) -> Tensor:
    """Scores of every expert, then the chosen ones' weights and their int64 indices."""
    matrix, bias = weights.take(spec.count, hidden_size), weights.bias(spec.count, spec.bias)
    if spec.router_in_fp32 and not tape.autocast:
        logits = _product_in_fp32(tape, cast(tape, hidden, 4), matrix)
    else:
        logits = linear(tape, hidden, matrix, bias)
    tokens = logits.numel // spec.count
    if spec.scoring == "softmax-of-topk":
        return unary(tape, _top(tape, logits, tokens * spec.active), saves="output")
    scores = unary(tape, logits, saves="output", element_bytes=4)
    chosen = _top(tape, scores, tokens * spec.active)
    return chosen if spec.router_in_fp32 else cast(tape, chosen, tape.compute_bytes)


def _product_in_fp32(tape: Tape, x: Tensor, weight: Weight) -> Tensor:
    """A product with a weight that is cast to fp32 for it; its gradient is cast back."""
    outside, inside = weight.shape
    rows = x.numel // inside
    wide = tape.new(weight.parameter.numel, 4, scales=False)
    output = tape.new(rows * outside, 4)
    tape.work(x, output, wide, matmuls=(Product(Matmul(rows, outside, inside, element_bytes=4), "m"),), kernels=2)
    kept = x if weight.needs_gradient else None

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        for_x = tape.new(rows * inside, 4)
        tape.work(gradient, for_x, wide, matmuls=(Product(Matmul(rows, inside, outside, element_bytes=4), "m"),))
        if kept is None:
            return for_x, None
        full = tape.new(weight.parameter.numel, 4, scales=False)
        tape.work(gradient, kept, full, matmuls=(Product(Matmul(outside, inside, rows, element_bytes=4), "k"),))
        if weight.element_bytes == 4:
            return for_x, full
        narrow = weight_gradient(tape, weight.parameter, weight.element_bytes)
        tape.work(full, narrow)
        return for_x, narrow

    return tape.attach(output, [x, weight], backward)


def _every_expert(tape: Tape, hidden: Tensor, spec: Experts, weights: Weights, hidden_size: int) -> Tensor:
    """Llama 4: the tokens repeated for every expert, scaled by their scores, through all experts, and summed."""
    logits = linear(tape, hidden, weights.take(spec.count, hidden_size))
    scores = cast(tape, unary(tape, cast(tape, logits, 4), saves="output"), tape.compute_bytes)
    tokens = hidden.numel // hidden_size
    rows = tokens * spec.count
    repeated = _repeat(tape, hidden, spec.count)
    routed = scale_rows(tape, repeated, scores)
    del repeated
    up = weights.take(spec.count, 2 * spec.width, hidden_size)
    fused = expert_product(tape, routed, up, hidden_size, 2 * spec.width)
    half = rows * spec.width
    inner = multiply(tape, view(tape, fused, half), activation(tape, view(tape, fused, half), spec.activation))
    del fused
    down = weights.take(spec.count, spec.width, hidden_size)
    output = _sum_rows(tape, expert_product(tape, inner, down, spec.width, hidden_size), spec.count)
    del routed
    return output


def expert_product(tape: Tape, x: Tensor, weight: Weight, inside: int, outside: int) -> Tensor:
    """A batch of products, one per expert over all tokens; unlike a grouped one it runs under autocast."""
    x = cast(tape, x, tape.compute_bytes)
    matrix = compute_copy(tape, weight)
    rows, compute_bytes = x.numel // inside, tape.compute_bytes
    output = tape.new(rows * outside, compute_bytes)
    forwards = (Product(Matmul(rows, outside, inside, element_bytes=compute_bytes), "m"),)
    tape.work(x, output, matmuls=forwards, fixed_moved_bytes=matrix.size_bytes)
    kept = x if weight.needs_gradient else None

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        for_matrix = weight_gradient(tape, weight.parameter, compute_bytes) if kept else None
        if kept and for_matrix:
            weights = (Product(Matmul(outside, inside, rows, element_bytes=compute_bytes), "k"),)
            tape.work(gradient, kept, for_matrix, matmuls=weights)
        for_x = tape.new(rows * inside, compute_bytes)
        backwards = (Product(Matmul(rows, inside, outside, element_bytes=compute_bytes), "m"),)
        tape.work(gradient, for_x, matmuls=backwards, fixed_moved_bytes=matrix.size_bytes)
        return for_x, for_matrix

    return tape.attach(output, [x, matrix], backward)


def _repeat(tape: Tape, x: Tensor, times: int) -> Tensor:
    output = tape.new(x.numel * times, x.element_bytes)
    tape.work(x, output)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        summed = tape.new(gradient.numel // times, gradient.element_bytes)
        tape.work(gradient, summed)
        return (summed,)

    return tape.attach(output, [x], backward, saves="nothing")


def _sum_rows(tape: Tape, x: Tensor, groups: int) -> Tensor:
    """The sum over *groups*; its gradient is an expanded view that the product before it copies."""
    output = tape.new(x.numel // groups, x.element_bytes)
    tape.work(x, output)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        spread = tape.new(gradient.numel * groups, gradient.element_bytes)
        tape.work(gradient, spread)
        return (spread,)

    return tape.attach(output, [x], backward, saves="nothing")


def _top(tape: Tape, scores: Tensor, chosen: int) -> Tensor:
    """``topk``: the largest scores of each row; saves where they stood."""
    output = tape.new(chosen, scores.element_bytes)
    indices = tape.new(chosen, 8)
    tape.work(scores, output, indices)
    numel, element_bytes = scores.numel, scores.element_bytes

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        spread = tape.new(numel, element_bytes)
        tape.work(gradient, indices, spread, kernels=2)
        return (spread,)

    return tape.attach(output, [scores], backward)


def _grouped_experts(
    tape: Tape, hidden: Tensor, routing: Tensor, spec: Experts, weights: Weights, hidden_size: int
) -> Tensor:
    """Tokens sorted by expert, two grouped products, weighted, put back in order and summed."""
    tokens = hidden.numel // hidden_size
    pairs = tokens * spec.active
    # The permutation, the tokens it takes, its inverse; and which expert each pair goes to, where experts have biases.
    order = tape.new((3 + spec.bias) * pairs, 8)
    tape.work(order, kernels=6)
    selected = _gather(tape, hidden, order, pairs, hidden_size)
    up = weights.take(spec.count, 2 * spec.width, hidden_size)
    up_bias = weights.take(spec.count, 2 * spec.width) if spec.bias else None
    # Each pair's row of the bias stays until the next product's rows are there.
    rows = tape.new(pairs * 2 * spec.width, up_bias.element_bytes) if up_bias else None
    fused = grouped_product(tape, selected, up, up_bias, hidden_size, 2 * spec.width)
    half = fused.numel // 2
    gate, entrance = view(tape, fused, half), view(tape, fused, half)
    del fused
    if spec.activation == "clamped-swiglu":
        inner = _clamped_swiglu(tape, gate, entrance)
    else:
        inner = multiply(tape, activation(tape, gate, spec.activation), entrance)
    del gate, entrance
    down = weights.take(spec.count, spec.width, hidden_size)
    down_bias = weights.take(spec.count, hidden_size) if spec.bias else None
    rows = tape.new(pairs * hidden_size, down_bias.element_bytes) if down_bias else None
    inner = grouped_product(tape, inner, down, down_bias, spec.width, hidden_size)
    weighted = copy(tape, scale_rows(tape, inner, routing))
    output = tape.new(tokens * hidden_size, weighted.element_bytes)
    tape.work(weighted, output, *([rows] if rows else []))
    # What the function's variables name is there until it returns.
    del rows, selected, inner

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        # The sum's gradient is an expanded view; the inverse permutation then writes it out for every pair.
        spread = tape.new(pairs * hidden_size, gradient.element_bytes)
        tape.work(gradient, order, spread, kernels=2)
        return (spread,)

    return cast(tape, tape.attach(output, [weighted], backward), hidden.element_bytes)


def _batched_experts(
    tape: Tape, hidden: Tensor, routing: Tensor, spec: Experts, weights: Weights, hidden_size: int
) -> Tensor:
    """Each token with copies of the matrices of its experts, as ``generate`` runs them after the prompt.

    transformers 5.23, generation/utils.py ``_optimize_model_for_decode`` and integrations/moe.py
    ``batched_mm_experts_forward``. The matrices of the first product stay until those of the second are there.
    """
    pairs = hidden.numel // hidden_size * spec.active
    selected = tape.new(pairs * hidden_size, hidden.element_bytes)
    tape.work(hidden, selected)
    up = _chosen(tape, weights.take(spec.count, 2 * spec.width, hidden_size), pairs)
    up_bias = _chosen(tape, weights.take(spec.count, 2 * spec.width), pairs) if spec.bias else None
    fused = _batched_product(tape, selected, up, up_bias, pairs, hidden_size, 2 * spec.width)
    half = fused.numel // 2
    gate, entrance = view(tape, fused, half), view(tape, fused, half)
    del fused
    if spec.activation == "clamped-swiglu":
        inner = _clamped_swiglu(tape, gate, entrance)
    else:
        inner = multiply(tape, activation(tape, gate, spec.activation), entrance)
    del gate, entrance
    down = _chosen(tape, weights.take(spec.count, spec.width, hidden_size), pairs)
    del up
    down_bias = _chosen(tape, weights.take(spec.count, hidden_size), pairs) if spec.bias else None
    del up_bias
    inner = _batched_product(tape, inner, down, down_bias, pairs, spec.width, hidden_size)
    weighted = scale_rows(tape, inner, routing)
    output = tape.new(hidden.numel, weighted.element_bytes)
    tape.work(weighted, output)
    del selected, down, down_bias, inner
    return cast(tape, output, hidden.element_bytes)


def _chosen(tape: Tape, weight: Weight, pairs: int) -> Tensor:
    """A copy of the part of *weight* that belongs to the expert of each pair of token and expert."""
    output = tape.new(pairs * (weight.parameter.numel // weight.parameter.shape[0]), weight.element_bytes)
    tape.work(output, output)
    return output


def _batched_product(
    tape: Tape, x: Tensor, matrices: Tensor, bias: Tensor | None, pairs: int, inside: int, outside: int
) -> Tensor:
    output = tape.new(pairs * outside, x.element_bytes)
    product = Product(Matmul(1, outside, inside, pairs, element_bytes=x.element_bytes), "count")
    tape.work(x, matrices, output, matmuls=(product,))
    if bias:
        tape.work(bias, output, output)
    return output


def _clamped_swiglu(tape: Tape, gate: Tensor, entrance: Tensor) -> Tensor:
    """gpt-oss: (clamp(up) + 1) · clamp(gate) · sigmoid(α · clamp(gate))."""
    gate = unary(tape, gate, saves="input", temporaries=1)
    entrance = unary(tape, entrance, saves="input", temporaries=1)
    sigmoid = unary(tape, multiply_constant(tape, gate), saves="output")
    gated = multiply(tape, gate, sigmoid)
    return multiply(tape, add_constant(tape, entrance), gated)


def _gather(tape: Tape, hidden: Tensor, order: Tensor, rows: int, width: int) -> Tensor:
    """Rows of *hidden* by index; backward adds them back into zeros."""
    output = tape.new(rows * width, hidden.element_bytes)
    tape.work(output, output)
    numel = hidden.numel

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        summed = tape.new(numel, gradient.element_bytes)
        tape.work(gradient, order, summed, kernels=2)
        return (summed,)

    return tape.attach(output, [hidden], backward)


def grouped_product(tape: Tape, x: Tensor, weight: Weight, bias: Weight | None, inside: int, outside: int) -> Tensor:
    """One product per expert over its own rows; not run under autocast, so it stays in the weight's format."""
    x = cast(tape, x, weight.element_bytes)
    rows = x.numel // inside
    output = tape.new(rows * outside, x.element_bytes)
    weight_bytes = weight.parameter.numel * weight.element_bytes
    element_bytes = x.element_bytes
    forwards = (Product(Matmul(rows, outside, inside, element_bytes=element_bytes), "m"),)
    tape.work(x, output, matmuls=forwards, fixed_moved_bytes=weight_bytes)
    kept = x if weight.needs_gradient else None

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        for_x = tape.new(rows * inside, element_bytes)
        backwards = (Product(Matmul(rows, inside, outside, element_bytes=element_bytes), "m"),)
        tape.work(gradient, for_x, matmuls=backwards, fixed_moved_bytes=weight_bytes)
        if kept is None:
            return for_x, None, None
        for_weight = weight_gradient(tape, weight.parameter, weight.element_bytes)
        weights = (Product(Matmul(outside, inside, rows, element_bytes=element_bytes), "k"),)
        tape.work(gradient, kept, for_weight, matmuls=weights)
        for_bias = weight_gradient(tape, bias.parameter, bias.element_bytes) if bias else None
        return for_x, for_weight, for_bias

    return tape.attach(output, [x, weight, bias], backward)
