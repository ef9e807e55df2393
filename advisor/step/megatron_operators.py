"""Operators of megatron-core and TransformerEngine on one tensor-parallel rank, on tensors without contents.

What each saves and allocates follows megatron-core 0.16.1 and TransformerEngine's ``pytorch/module``. A rank has
*cut* its part of each product already; what it reads whole and others have in pieces, it gathers first. Products are
those of the tape's local tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from advisor.specs.megatron import ContextExchange, TokenDispatcher
from advisor.step.operators import scale_rows, unary, weight_gradient
from advisor.step.program import Matmul
from advisor.step.tape import Gradients, Product, Tape, Tensor, Weight


@dataclass(frozen=True, slots=True)
class ExpertCut:
    """How ranks share the experts of a layer, and how tokens get there."""

    ranks: int = 1
    """Ranks of different experts."""
    slices: int = 1
    """Ranks that have parts of the same."""
    dispatcher: TokenDispatcher = "alltoall"
    fuses_permutation: bool = True
    grouped: bool = True
    balances: bool = True


@dataclass(frozen=True, slots=True)
class Cut:
    """How the ranks of one copy of the model share its layers and sequences."""

    tensor: int = 1
    sequence: bool = False
    """Whether what is alike on all tensor-parallel ranks is cut along the sequence."""
    context: int = 1
    context_exchange: ContextExchange = "p2p"
    fuses_gradient_sums: bool = True
    experts: ExpertCut = ExpertCut()

    @property
    def stream_parts(self) -> int:
        """Ranks that hold the residual stream in pieces."""
        return self.tensor if self.sequence else 1


Norm = tuple[Weight, Weight | None]
"""A norm's weight, and its bias where it is a LayerNorm."""


def weights_gradient(tape: Tape, weight: Weight, cut: Cut) -> Tensor:
    """The gradient of a product's matrix; it takes no memory where the product adds it to its sum."""
    if not cut.fuses_gradient_sums:
        return weight_gradient(tape, weight.parameter, weight.element_bytes)
    nothing = tape.new(0, weight.element_bytes, scales=False, category="gradients", label="weight gradient")
    return Tensor(weight.parameter.numel, weight.element_bytes, False, nothing.storage)


def normalise(tape: Tape, x: Tensor, norm: Norm, width: int) -> Tensor:
    """A norm alone, in one kernel: saves its input and fp32 statistics, two for a LayerNorm, one for an RMSNorm."""
    output, statistics = tape.like(x), _statistics(tape, x, norm, width)
    tape.work(x, output, statistics)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        return _norm_gradients(tape, gradient, x, statistics, norm)

    return tape.attach(output, [x, *norm], backward, saves="outputs")


def norm_linear(tape: Tape, x: Tensor, norm: Norm, matrix: Weight, bias: Weight | None, cut: Cut) -> Tensor:
    """``LayerNormLinear``, cut by its outputs: saves its input, the norm's output and the norm's statistics.

    Where the sequence is cut, forward gathers the norm's output and backward gathers it again.
    """
    outside, width = matrix.parameter.shape
    normed, statistics = tape.like(x), _statistics(tape, x, norm, width)
    tape.work(x, normed, statistics)
    tokens = x.numel * cut.stream_parts // width
    whole = tape.new(tokens * width, x.element_bytes) if cut.sequence else normed
    output = tape.new(tokens * outside, x.element_bytes)
    products = (Product(Matmul(tokens, outside, width), "m"),)
    tape.work(whole, output, matmuls=products, fixed_moved_bytes=matrix.size_bytes)
    del whole

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        gathered = tape.new(tokens * width, normed.element_bytes) if cut.sequence else normed
        for_whole = tape.new(tokens * width, normed.element_bytes)
        inputs = (Product(Matmul(tokens, width, outside), "m"),)
        tape.work(gradient, for_whole, matmuls=inputs, fixed_moved_bytes=matrix.size_bytes)
        # Sums of it go out, the whole staying, while the matrix's gradient is computed.
        for_normed = tape.like(normed) if cut.sequence else for_whole
        for_matrix = weights_gradient(tape, matrix, cut)
        weights = (Product(Matmul(outside, width, tokens), "k"),)
        tape.work(gradient, gathered, for_matrix, matmuls=weights)
        del gathered, for_whole
        for_bias = weight_gradient(tape, bias.parameter, bias.element_bytes) if bias else None
        return *_norm_gradients(tape, for_normed, x, statistics, norm), for_matrix, for_bias

    return tape.attach(output, [x, *norm, matrix, bias], backward, saves="outputs")


def column_linear(tape: Tape, x: Tensor, matrix: Weight, cut: Cut) -> Tensor:
    """``Linear`` cut by its outputs: saves this rank's piece of its input, which backward gathers again."""
    outside, width = matrix.parameter.shape
    element_bytes, tokens = x.element_bytes, x.numel * cut.stream_parts // width
    whole = tape.new(tokens * width, element_bytes) if cut.sequence else x
    output = tape.new(tokens * outside, element_bytes)
    products = (Product(Matmul(tokens, outside, width), "m"),)
    tape.work(whole, output, matmuls=products, fixed_moved_bytes=matrix.size_bytes)
    del whole

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        gathered = tape.new(tokens * width, element_bytes) if cut.sequence else x
        for_whole = tape.new(tokens * width, element_bytes)
        inputs = (Product(Matmul(tokens, width, outside), "m"),)
        tape.work(gradient, for_whole, matmuls=inputs, fixed_moved_bytes=matrix.size_bytes)
        for_x = tape.like(x) if cut.sequence else for_whole
        for_matrix = weights_gradient(tape, matrix, cut)
        weights = (Product(Matmul(outside, width, tokens), "k"),)
        tape.work(gradient, gathered, for_matrix, matmuls=weights)
        return for_x, for_matrix

    return tape.attach(output, [x, matrix], backward)


def linear(tape: Tape, x: Tensor, matrix: Weight, cut: Cut) -> Tensor:
    """``Linear`` over whole rows of *x*, or one product for each of a group of matrices over its own rows."""
    return row_linear(tape, x, matrix, Cut(fuses_gradient_sums=cut.fuses_gradient_sums))


def row_linear(tape: Tape, x: Tensor, matrix: Weight, cut: Cut) -> Tensor:
    """``Linear`` cut by its inputs: saves its input. Its partial sums are added up over the ranks, in place unless the
    sequence is cut; its bias is added later."""
    *_, outside, inside = matrix.parameter.shape
    tokens, element_bytes = x.numel // inside, x.element_bytes
    output = tape.new(tokens * outside, element_bytes)
    products = (Product(Matmul(tokens, outside, inside), "m"),)
    tape.work(x, output, matmuls=products, fixed_moved_bytes=matrix.size_bytes)
    if cut.sequence:
        output = tape.new(tokens * outside // cut.tensor, element_bytes)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        gathered = tape.new(tokens * outside, element_bytes) if cut.sequence else gradient
        for_x = tape.like(x)
        inputs = (Product(Matmul(tokens, inside, outside), "m"),)
        tape.work(gathered, for_x, matmuls=inputs, fixed_moved_bytes=matrix.size_bytes)
        for_matrix = weights_gradient(tape, matrix, cut)
        weights = (Product(Matmul(outside, inside, tokens), "k"),)
        tape.work(gathered, x, for_matrix, matmuls=weights)
        return for_x, for_matrix

    return tape.attach(output, [x, matrix], backward)


def bias_dropout_add(tape: Tape, x: Tensor, bias: Weight | None, residual: Tensor, probability: float) -> Tensor:
    """One fused kernel (fusions/fused_bias_dropout.py), of which dropout keeps a byte per element."""
    output = tape.like(residual)
    mask = tape.like(residual, 1) if probability else None
    tape.work(x, residual, output, *([mask] if mask else []))

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        for_x = tape.like(gradient) if mask else gradient
        tape.work(gradient, for_x, *([mask] if mask else []))
        for_bias = weight_gradient(tape, bias.parameter, bias.element_bytes) if bias else None
        return for_x, for_bias, gradient

    return tape.attach(output, [x, bias, residual], backward, saves="outputs")


def activate(tape: Tape, x: Tensor, bias: Weight | None, *, gated: bool) -> Tensor:
    """The activation with its bias in one kernel that saves its input (fusions/fused_bias_gelu.py and
    fused_bias_swiglu.py). Where *gated*, half of *x* is multiplied by the other half's."""
    output = tape.new(x.numel // (2 if gated else 1), x.element_bytes)
    tape.work(x, output)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        for_x = tape.like(x)
        tape.work(gradient, x, for_x)
        for_bias = weight_gradient(tape, bias.parameter, bias.element_bytes) if bias else None
        return for_x, for_bias

    return tape.attach(output, [x, bias], backward)


def weighted_activation(tape: Tape, x: Tensor, scale: Tensor, *, gated: bool) -> Tensor:
    """The activation times a number for each row. One kernel where *gated*, which saves its inputs
    (fusions/fused_bias_swiglu.py ``WeightedSwiGLUFunction``); else two."""
    if not gated:
        return scale_rows(tape, unary(tape, x, saves="input"), scale)
    output = tape.new(x.numel // 2, x.element_bytes)
    tape.work(x, scale, output)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        for_x, for_scale = tape.like(x), tape.like(scale)
        tape.work(gradient, x, scale, for_x, for_scale)
        return for_x, for_scale

    return tape.attach(output, [x, scale], backward)


def _statistics(tape: Tape, x: Tensor, norm: Norm, width: int) -> Tensor:
    return tape.new((2 if norm[1] else 1) * x.numel // width, 4)


def _norm_gradients(tape: Tape, gradient: Tensor, x: Tensor, statistics: Tensor, norm: Norm) -> Gradients:
    for_x = tape.like(x)
    weight, bias = norm
    for_weight = weight_gradient(tape, weight.parameter, weight.element_bytes)
    for_bias = weight_gradient(tape, bias.parameter, bias.element_bytes) if bias else None
    tape.work(gradient, x, statistics, for_x, kernels=2)
    return for_x, for_weight, for_bias
