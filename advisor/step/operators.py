"""Operators on tensors without contents: what each allocates, what its backward needs, and what that allocates.

Each follows torch 2.13's kernels and derivative formulas (``tools/autograd/derivatives.yaml``,
``torch/csrc/autograd/FunctionsManual.cpp``). An operator's backward is a closure; what it closes over stays alive
until it has run, which is how "saved for backward" is expressed here.
"""

from __future__ import annotations

from advisor.specs.model import SCALED, Parameter
from advisor.step.program import Matmul
from advisor.step.quantized import product_out_of_bits
from advisor.step.tape import Adapter, Gradients, Product, Tape, Tensor, Weight

DEQUANTIZED = "weight out of four bits"


def view(tape: Tape, x: Tensor, numel: int | None = None) -> Tensor:
    """A view of *x*, or of *numel* elements of it; its gradient is a view too unless it is a part."""
    output = Tensor(numel if numel is not None else x.numel, x.element_bytes, x.scales, x.storage)
    if numel is None or numel == x.numel:
        output.node = x.node
        return output
    whole, element_bytes, scales = x.numel, x.element_bytes, x.scales

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        full = tape.new(whole, element_bytes, scales=scales)
        tape.work(gradient, full, kernels=2)
        return (full,)

    return tape.attach(output, [x], backward, saves="nothing")


def cast(tape: Tape, x: Tensor, element_bytes: int) -> Tensor:
    """*x* in another format; itself where it already is."""
    if x.element_bytes == element_bytes:
        return x
    output = tape.like(x, element_bytes)
    tape.work(x, output)
    original = x.element_bytes

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        back = tape.like(gradient, original)
        tape.work(gradient, back)
        return (back,)

    return tape.attach(output, [x], backward, saves="nothing")


def copy(tape: Tape, x: Tensor) -> Tensor:
    """A contiguous copy; the gradient passes through as a view."""
    output = tape.like(x)
    tape.work(x, output)
    return tape.attach(output, [x], lambda tape, gradient: (gradient,), saves="nothing")


def add(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    output = tape.new(max(x.numel, y.numel), max(x.element_bytes, y.element_bytes))
    tape.work(x, y, output)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        return gradient, gradient

    return tape.attach(output, [x, y], backward, saves="nothing")


def multiply(tape: Tape, x: Tensor, y: Tensor) -> Tensor:
    """Element-wise product of two tensors of one shape."""
    output = tape.new(x.numel, max(x.element_bytes, y.element_bytes))
    tape.work(x, y, output)
    # Each factor is kept for the gradient of the other.
    others = y if x.needs_gradient else None, x if y.needs_gradient else None

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        found = [tape.like(gradient) if other else None for other in others]
        touched = [each for each in (*others, *found) if each]
        products = len(touched) // 2
        tape.work(*touched, *products * (gradient,), kernels=products)
        return tuple(found)

    return tape.attach(output, [x, y], backward)


def scale_rows(tape: Tape, x: Tensor, scale: Tensor, element_bytes: int | None = None) -> Tensor:
    """*x* times one number per row. Backward forms the full product for the row's gradient before it sums."""
    output = tape.like(x, element_bytes or max(x.element_bytes, scale.element_bytes))
    tape.work(x, scale, output)
    passes, rows, kept = x.needs_gradient, scale.numel, x if scale.needs_gradient else None
    factor = scale if passes else None

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        for_x = tape.like(gradient) if factor else None
        if for_x:
            tape.work(gradient, for_x)
        if kept is None:
            return for_x, None
        full = tape.like(gradient)
        tape.work(gradient, kept, full)
        for_scale = tape.new(rows, gradient.element_bytes)
        tape.work(full, for_scale)
        del full
        return for_x, for_scale

    return tape.attach(output, [x, scale], backward)


def multiply_constant(tape: Tape, x: Tensor, element_bytes: int | None = None) -> Tensor:
    """*x* times a tensor or number that needs no gradient, so *x* itself is not saved."""
    output = tape.like(x, element_bytes)
    tape.work(x, output)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        scaled = tape.like(gradient)
        tape.work(gradient, scaled)
        return (scaled,)

    return tape.attach(output, [x], backward, saves="nothing")


def add_constant(tape: Tape, x: Tensor, element_bytes: int = 0) -> Tensor:
    """*x* plus something of *element_bytes* that needs no gradient, such as a mask; the wider format wins."""
    output = tape.like(x, max(x.element_bytes, element_bytes))
    tape.work(x, output)
    return tape.attach(output, [x], lambda tape, gradient: (gradient,), saves="nothing")


def multiply_weight(tape: Tape, x: Tensor, weight: Weight, element_bytes: int) -> Tensor:
    """*x* times a weight per column."""
    output = tape.like(x, element_bytes)
    tape.work(x, output)
    kept, passes = x if weight.needs_gradient else None, x.needs_gradient

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        for_weight = tape.like(gradient) if kept else None
        if kept and for_weight:
            tape.work(gradient, kept, for_weight)
        for_x = tape.like(gradient) if passes else None
        if for_x:
            tape.work(gradient, for_x)
        if for_weight is None:
            return None, for_x
        summed = weight_gradient(tape, weight.parameter, weight.element_bytes)
        tape.work(for_weight, summed)
        del for_weight
        return summed, for_x

    return tape.attach(output, [weight, x], backward)


def weight_gradient(tape: Tape, parameter: Parameter, element_bytes: int) -> Tensor:
    return tape.new(parameter.numel, element_bytes, scales=False, category="gradients", label="weight gradient")


def unary(tape: Tape, x: Tensor, *, saves: str, temporaries: int = 0, element_bytes: int | None = None) -> Tensor:
    """A function of each element that saves its ``input`` or its ``output``.

    *temporaries* counts tensors of *x*'s size that its backward holds beside gradient and result.
    """
    output = tape.like(x, element_bytes)
    tape.work(x, output)
    kept = x if saves == "input" else Tensor(output.numel, output.element_bytes, output.scales, output.storage)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        extra = [tape.like(gradient) for _ in range(temporaries)]
        result = tape.like(gradient, kept.element_bytes)
        tape.work(gradient, kept, result, *extra, kernels=1 + temporaries)
        return (result,)

    return tape.attach(output, [x], backward, saves="inputs" if saves == "input" else "outputs")


def square(tape: Tape, x: Tensor) -> Tensor:
    """``x.pow(2)``: backward forms x.pow(1), twice that, then the product with the gradient, and keeps all to its end.

    torch/csrc/autograd/FunctionsManual.cpp ``pow_backward`` is one expression, whose temporaries C++ keeps so long.
    """
    output = tape.like(x)
    tape.work(x, output)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        power = tape.like(x)
        doubled = tape.like(x)
        result = tape.like(x)
        tape.work(x, power, power, doubled, gradient, doubled, result, kernels=3)
        return (result,)

    return tape.attach(output, [x], backward)


def row_mean(tape: Tape, x: Tensor, width: int) -> Tensor:
    """Mean over the last *width* elements; backward spreads the gradient over a full tensor."""
    output = tape.new(x.numel // width, x.element_bytes)
    tape.work(x, output)
    numel = x.numel

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        spread = tape.new(numel, gradient.element_bytes)
        tape.work(gradient, spread)
        return (spread,)

    return tape.attach(output, [x], backward, saves="nothing")


def concatenate(tape: Tape, *parts: Tensor) -> Tensor:
    """Parts side by side; their gradients are views of the whole's."""
    output = tape.new(sum(part.numel for part in parts), parts[0].element_bytes)
    tape.work(*parts, output)
    sizes = [part.numel for part in parts]

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        return tuple(Tensor(size, gradient.element_bytes, True, gradient.storage) for size in sizes)

    return tape.attach(output, list(parts), backward, saves="nothing")


def dropout(tape: Tape, x: Tensor, probability: float) -> Tensor:
    """Fused dropout keeps one byte per element."""
    if not probability or tape.caching:
        return x
    output = tape.like(x)
    mask = tape.like(x, 1)
    tape.work(x, output, mask)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        result = tape.like(gradient)
        tape.work(gradient, mask, result)
        return (result,)

    return tape.attach(output, [x], backward, saves="outputs")


def compute_copy(tape: Tape, weight: Weight) -> Tensor | Weight:
    """The weight as products read it: under autocast a copy in the compute format, usually made once a forward."""
    if weight.element_bytes == tape.compute_bytes:
        return weight
    if weight.cast is None:
        copy = tape.new(
            weight.parameter.numel, tape.compute_bytes, scales=False, category="buffers", label="autocast weight copies"
        )
        tape.work(fixed_moved_bytes=weight.parameter.numel * (weight.element_bytes + tape.compute_bytes))
        original = weight.element_bytes

        def backward(tape: Tape, gradient: Tensor) -> Gradients:
            full = weight_gradient(tape, weight.parameter, original)
            tape.work(gradient, full)
            return (full,)

        attached = tape.attach(copy, [weight], backward, saves="nothing")
        if not tape.keeps_copies or not weight.needs_gradient:
            return attached  # autocast keeps copies of what is trained alone (ATen/autocast_mode.cpp cached_cast)
        weight.cast = attached
    return weight.cast


def linear(tape: Tape, x: Tensor, weight: Weight, bias: Weight | None = None) -> Tensor:
    """A matrix product with a weight of two dimensions, and with the adapter beside it."""
    output = _product(tape, x, weight, bias)
    if weight.adapter is None:
        return output
    if weight.adapter.magnitude:
        return _decomposed(tape, x, output, weight, weight.adapter, weight.adapter.magnitude, biased=bias is not None)
    return _adapted(tape, x, output, weight.adapter, quantized=weight.parameter.held == "four bits")


def _adapted(tape: Tape, x: Tensor, output: Tensor, adapter: Adapter, *, quantized: bool) -> Tensor:
    """*output* plus the adapter's product (peft 0.21.2, tuners/lora/layer.py and bnb.py).

    Its input is brought to the adapter's format first; beside four bits autocast does that, and *output* is copied.
    """
    if quantized:
        output = copy(tape, output)
    else:
        x = cast(tape, x, adapter.inner.element_bytes)
    low = _product(tape, dropout(tape, x, adapter.dropout), adapter.inner)
    more = multiply_constant(tape, _product(tape, low, adapter.outer))
    del low
    return cast(tape, add(tape, output, more), output.element_bytes)


def _decomposed(
    tape: Tape, x: Tensor, output: Tensor, weight: Weight, adapter: Adapter, magnitude: Weight, *, biased: bool
) -> Tensor:
    """*output* with what DoRA adds to it (peft 0.21.2, tuners/lora/dora.py ``DoraLinearLayer.forward``).

    Left out: tensors of a number for each output, and what bringing the first of *magnitude* out of a weight takes.
    """
    x = cast(tape, x, adapter.inner.element_bytes)
    whole = _sum_of_weights(tape, weight, adapter, x.element_bytes)
    more = _product(tape, _product(tape, x, adapter.inner), adapter.outer)
    base = add_constant(tape, output) if biased else output
    wide = max(output.element_bytes, magnitude.element_bytes)
    scaled = multiply_weight(tape, base, magnitude, wide)
    del base
    more = multiply_weight(tape, more, magnitude, wide)
    more = multiply_constant(tape, more)
    added = add(tape, scaled, more)
    del scaled, more, whole
    return cast(tape, add(tape, output, added), output.element_bytes)


def _sum_of_weights(tape: Tape, weight: Weight, adapter: Adapter, element_bytes: int) -> list[Tensor]:
    """What lives until *output* is there of the norm of a weight and its adapter together.

    The adapter's product is formed by sending the unit matrix through it (``get_lora_weight``), whose graph no
    gradient ever comes back through.
    """
    outside, inside = weight.shape
    rank, compute_bytes = adapter.inner.shape[0], tape.compute_bytes

    def fixed(numel: int, element_bytes: int) -> Tensor:
        return tape.new(numel, element_bytes, scales=False, category="temporaries", label="weight norm of DoRA")

    unit = fixed(inside * inside, adapter.inner.element_bytes)
    read = unit if unit.element_bytes == compute_bytes else fixed(inside * inside, compute_bytes)
    first, second = compute_copy(tape, adapter.inner), compute_copy(tape, adapter.outer)
    low = fixed(inside * rank, compute_bytes)
    inwards = Product(Matmul(inside, rank, inside, element_bytes=compute_bytes), None)
    tape.work(unit, read, low, matmuls=(inwards,), fixed_moved_bytes=first.size_bytes, kernels=3)
    kept = [read, low] if tape.grad_enabled else []
    del read
    product = fixed(inside * outside, compute_bytes)
    outwards = Product(Matmul(inside, outside, rank, element_bytes=compute_bytes), None)
    tape.work(low, product, matmuls=(outwards,), fixed_moved_bytes=second.size_bytes)
    del low, unit, first, second
    if product.element_bytes != element_bytes:
        product = fixed(inside * outside, element_bytes)
    kept.append(product)
    if weight.element_bytes != element_bytes:
        kept.append(fixed(inside * outside, element_bytes))
    scaled = fixed(inside * outside, element_bytes)
    added = fixed(inside * outside, element_bytes)
    tape.work(product, scaled, scaled, added, added, fixed_moved_bytes=weight.size_bytes, kernels=4)
    return kept


def _quantized_product(tape: Tape, x: Tensor, weight: Weight) -> Tensor:
    """bitsandbytes 0.50.2, nn/modules.py ``Linear4bit`` and autograd/_functions.py ``MatMul4Bit``.

    Each product makes the weight anew in the compute format, for itself alone. What backward needs is the weight in
    four bits, which no saved tensor stands for. Its scales are brought to fp32 first. Left out: the kernel that needs
    no such copy, for few tokens.
    """
    outside, inside = weight.shape
    arrived_bytes = x.element_bytes
    x = cast(tape, x, tape.compute_bytes)
    tokens, numel, passes = x.numel // inside, weight.parameter.numel, x.needs_gradient
    weight.is_passed = tape.grad_enabled and passes
    stored_bytes = weight.parameter.held_bytes(tape.stream_bytes, tape.compute_bytes)

    def dequantized(tape: Tape) -> tuple[Tensor, Tensor]:
        scales = tape.new(-(-numel // SCALED), 4, scales=False, category="temporaries", label=DEQUANTIZED)
        found = tape.new(numel, tape.compute_bytes, scales=False, category="temporaries", label=DEQUANTIZED)
        tape.work(found, scales, scales, fixed_moved_bytes=stored_bytes, kernels=3)
        return found, scales

    matrix, fp32_scales = dequantized(tape)
    output = tape.new(tokens * outside, tape.compute_bytes)
    tape.work(x, output, matrix, matmuls=(Product(Matmul(tokens, outside, inside), "m"),))
    del matrix, fp32_scales

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        if not passes:
            return (None,)
        matrix = dequantized(tape)[0]
        for_x = tape.new(tokens * inside, gradient.element_bytes)
        tape.work(gradient, for_x, matrix, matmuls=(Product(Matmul(tokens, inside, outside), "m"),))
        return (for_x,)

    return cast(tape, tape.attach(output, [x], backward, saves="nothing"), arrived_bytes)


def _product(tape: Tape, x: Tensor, weight: Weight, bias: Weight | None = None) -> Tensor:
    """Saves its input where the weight needs a gradient, or *tape* says so, and the weight where the input does."""
    if tape.caching and weight.parameter.held not in ("as model", "products"):
        return product_out_of_bits(tape, x, weight)  # which adds the bias, too
    if weight.parameter.held == "four bits":
        return _quantized_product(tape, x, weight)
    outside, inside = weight.shape
    x = cast(tape, x, tape.compute_bytes)
    matrix = compute_copy(tape, weight)
    offset = compute_copy(tape, bias) if bias else None
    tokens, compute_bytes = x.numel // inside, tape.compute_bytes
    output, fresh = tape.keep(tokens * outside, compute_bytes)
    if fresh:
        products = (Product(Matmul(tokens, outside, inside, element_bytes=compute_bytes), "m"),)
        tape.work(x, output, matmuls=products, fixed_moved_bytes=matrix.size_bytes)

    kept = x if weight.needs_gradient or tape.keeps_inputs else None
    passing = matrix if x.needs_gradient else None

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        for_offset = weight_gradient(tape, bias.parameter, compute_bytes) if bias and bias.needs_gradient else None
        if for_offset:
            tape.work(gradient, for_offset)
        for_x = tape.new(tokens * inside, compute_bytes) if passing else None
        if passing and for_x:
            backwards = (Product(Matmul(tokens, inside, outside, element_bytes=compute_bytes), "m"),)
            tape.work(gradient, for_x, matmuls=backwards, fixed_moved_bytes=passing.size_bytes)
        for_matrix = weight_gradient(tape, weight.parameter, compute_bytes) if weight.needs_gradient else None
        if kept and for_matrix:
            weights = (Product(Matmul(outside, inside, tokens, element_bytes=compute_bytes), "k"),)
            tape.work(gradient, kept, for_matrix, matmuls=weights)
        return for_x, for_matrix, for_offset

    return tape.attach(output, [x, matrix, offset], backward)


def layer_norm(tape: Tape, x: Tensor, weight: Weight | None, bias: Weight | None, width: int) -> Tensor:
    """torch's fused LayerNorm: saves its input and two fp32 numbers per row. Autocast runs it in fp32."""
    if tape.autocast:
        x = cast(tape, x, 4)
    output = tape.like(x)
    statistics = tape.new(2 * (x.numel // width), 4)
    tape.work(x, output, statistics)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        result = tape.like(x)
        for_weight, for_bias = (
            weight_gradient(tape, each.parameter, each.element_bytes) if each and each.needs_gradient else None
            for each in (weight, bias)
        )
        tape.work(gradient, x, statistics, result, kernels=2)
        return result, for_weight, for_bias

    return tape.attach(output, [x, weight, bias], backward, saves="outputs")


def rms_norm(
    tape: Tape, x: Tensor, weight: Weight | None, width: int, *, fp32_weight: bool, narrow: bool = False
) -> Tensor:
    """RMSNorm as transformers writes it: in fp32, then cast back before (Llama) or after (Gemma) the weight.

    Where *narrow*, the variance alone is computed from an fp32 copy (T5).
    """
    original = x.element_bytes
    hidden = cast(tape, x, 4)
    variance = row_mean(tape, square(tape, hidden), width)
    hidden = scale_rows(tape, x if narrow else hidden, unary(tape, variance, saves="output"))
    if weight is None:
        return cast(tape, hidden, original)
    if fp32_weight:
        return cast(tape, multiply_weight(tape, hidden, weight, 4), original)
    return multiply_weight(tape, cast(tape, hidden, original), weight, max(original, weight.element_bytes))
