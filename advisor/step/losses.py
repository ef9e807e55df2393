"""The loss without all logits at once: in pieces that are computed again in backward, or by Liger's fused kernel.

Both take the finished residual stream and the output matrix; :func:`advisor.step.layers.cross_entropy` is the loss
over all logits.
"""

from __future__ import annotations

from advisor.errors import SpecError
from advisor.specs.model import ModelSpec
from advisor.step.operators import cast, compute_copy, weight_gradient
from advisor.step.program import Matmul
from advisor.step.rows import OtherPieces, Piece, PowerOfTwo, Rows
from advisor.step.tape import Gradients, Product, Tape, Tensor, Weight
from advisor.step.weights import Weights

LOSS_TOKENS = 1024
"""Most tokens whose logits exist at once in the chunked loss, as ``launch/train.py`` computes it."""
INDEX_BYTES = 8


def chunked_loss(tape: Tape, hidden: Tensor, model: ModelSpec, weights: Weights) -> Tensor:
    """``chunk_loss`` of launch/train.py: each piece is a function under ``torch.utils.checkpoint``, not reentrant.

    Forward and backward each run two pieces here: one that stands for all but one, and the one that backward comes to
    last, when the other pieces' gradients are all there.
    """
    if model.logit_soft_cap:
        raise SpecError(f"{model.name} caps its logits, which --loss chunked does not; take --loss fused or full")
    matrix = weights.take(model.vocabulary_size, model.hidden_size)
    piece = Piece(tape.sequence_length, LOSS_TOKENS)
    gradients: list[Tensor] = []
    split = _split(tape, hidden, gradients)
    copy = compute_copy(tape, matrix)
    pieces = _Pieces(tape, hidden, model, matrix)
    pieces.logarithms(piece, [])
    sums = [tape.new(1, 4, scales=False), tape.new(1, 4, scales=False)]
    pieces.work(times=1)

    def last(tape: Tape, gradient: Tensor) -> Gradients:
        return pieces.gradients(piece, piece)

    def others(tape: Tape, gradient: Tensor) -> Gradients:
        for_hidden, for_matrix = pieces.gradients(piece, OtherPieces(piece))
        gradients.append(for_hidden)
        pieces.work(times=3 if matrix.needs_gradient else 2)
        return (for_matrix,)

    tape.attach(sums[0], [split, copy], last)
    tape.attach(sums[1], [copy if matrix.needs_gradient else None], others)
    tape.watched = sums[1].node
    count = tape.new(1, INDEX_BYTES, scales=False)
    loss = tape.new(1, 4, scales=False)

    def divided(tape: Tape, gradient: Tensor) -> Gradients:
        tape.work(count)
        return gradient, gradient

    return tape.attach(loss, list(sums), divided)


def fused_loss(tape: Tape, hidden: Tensor, model: ModelSpec, weights: Weights) -> Tensor:
    """Liger-Kernel 0.8.5, ops/fused_linear_cross_entropy.py, on CUDA 8.0 or newer with torch 2.8 or newer.

    Forward computes both gradients, some tokens at a time: as many as take no more logits than there are elements in
    *hidden*, rounded up to a power of two. They stay, in the formats of *hidden* and of the matrix, until backward
    scales them. Under autocast the matrix is cast twice: for every piece, as its transpose is no weight that autocast
    knows, and once for good. A soft cap on the logits is computed inside the kernel.
    """
    matrix = weights.take(model.vocabulary_size, model.hidden_size)
    vocabulary, width, wide = model.vocabulary_size, model.hidden_size, tape.compute_bytes
    tokens = tape.sequence_length
    pieces = -(-vocabulary // width)
    rows = PowerOfTwo(tokens, pieces)
    casts = hidden.element_bytes != wide or matrix.element_bytes != wide
    labels = tape.new(tokens + 1, INDEX_BYTES), tape.new(tokens, INDEX_BYTES)
    for_hidden = tape.like(hidden)
    trained = matrix.needs_gradient
    for_matrix = weight_gradient(tape, matrix.parameter, matrix.element_bytes) if trained else None
    losses, counted = tape.new(tokens, 4), tape.new(tokens, 1)
    if casts:
        compute_copy(tape, matrix)
    operands = [
        tape.new(numel, wide, scales=scales)
        for numel, element_bytes, scales in (
            (width, hidden.element_bytes, rows),
            (width * vocabulary, matrix.element_bytes, False),
        )
        if element_bytes != wide
    ]
    logits = tape.new(vocabulary, wide, scales=rows)
    operands.clear()
    if casts:
        operands.append(tape.new(width, wide, scales=rows))
    products = (Product(Matmul(tokens, vocabulary, width, element_bytes=wide), "m"),) * (3 if trained else 2)
    matrix_moved = pieces * matrix.parameter.numel * (2 * wide + 2 * matrix.element_bytes)
    moved = 5 * tokens * vocabulary * wide
    tape.work(
        hidden, for_hidden, matmuls=products, moved_bytes=moved, fixed_moved_bytes=matrix_moved, kernels=4 * pieces
    )
    operands.clear()
    del logits
    loss = tape.new(1, 4, scales=False)
    del losses, counted, labels

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        scaled = [each for each in (for_hidden, for_matrix) if each]
        tape.work(*scaled, *scaled, kernels=len(scaled))
        return for_hidden, for_matrix

    tape.attach(loss, [hidden, matrix], backward, saves="outputs")
    tape.watched = loss.node
    return loss


def _split(tape: Tape, hidden: Tensor, gradients: list[Tensor]) -> Tensor:
    """*hidden* in pieces that are views of it; their gradients are laid side by side once all are there."""
    numel, element_bytes = hidden.numel, hidden.element_bytes

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        whole = tape.new(numel, element_bytes)
        tape.work(whole, whole)
        gradients.clear()
        return (whole,)

    views = Tensor(numel, element_bytes, True, hidden.storage)
    return tape.attach(views, [hidden], backward, saves="nothing")


class _Pieces:
    """What a piece does to memory, forwards and backwards, and what all of them compute for one sequence."""

    def __init__(self, tape: Tape, hidden: Tensor, model: ModelSpec, matrix: Weight) -> None:
        self.tape, self.matrix = tape, matrix
        self.width, self.vocabulary = model.hidden_size, model.vocabulary_size
        self.hidden = Tensor(hidden.numel, hidden.element_bytes, True, hidden.storage)
        """Kept until backward: what the pieces are computed again from."""

    def logarithms(self, rows: Rows, saved: list[Tensor]) -> Tensor:
        """The softmax's logarithms in fp32. *saved* takes what autocast casts and backward needs."""
        tape, wide = self.tape, self.tape.compute_bytes
        if self.hidden.element_bytes != wide:
            saved.append(tape.new(self.width, wide, scales=rows))
        logits = tape.new(self.vocabulary, wide, scales=rows)
        if not tape.backward_running:
            saved.clear()
        if wide != 4:
            logits = tape.new(self.vocabulary, 4, scales=rows)
        logarithms = tape.new(self.vocabulary, 4, scales=rows)
        del logits
        return logarithms

    def gradients(self, rows: Rows, counted: Rows) -> tuple[Tensor, Tensor | None]:
        """The piece again, and the gradients of *counted* tokens' hidden states and of the matrix if it is trained."""
        tape, wide = self.tape, self.tape.compute_bytes
        saved: list[Tensor] = []
        if self.matrix.element_bytes != wide:
            saved.append(tape.new(self.width * self.vocabulary, wide, scales=False))
        logarithms = self.logarithms(rows, saved)
        spread = tape.new(self.vocabulary, 4, scales=rows)
        for_logits = tape.new(self.vocabulary, 4, scales=rows)
        del logarithms, spread
        if wide != 4:
            for_logits = tape.new(self.vocabulary, wide, scales=rows)
        for_hidden = tape.new(self.width, wide, scales=counted)
        trained = self.matrix.needs_gradient
        for_matrix = weight_gradient(tape, self.matrix.parameter, wide) if trained else None
        saved.clear()
        del for_logits
        return cast(tape, for_hidden, self.hidden.element_bytes), for_matrix

    def work(self, times: int) -> None:
        """*times* the product of all pieces, each of which reads or writes the whole matrix or its gradient."""
        tape, tokens = self.tape, self.tape.sequence_length
        product = Product(Matmul(tokens, self.vocabulary, self.width, element_bytes=tape.compute_bytes), "m")
        # Logits in the compute format and in fp32, their softmax and its gradient.
        moved = 16 * tokens * self.vocabulary + self.hidden.size_bytes
        matrix = tokens * self.width * self.vocabulary * tape.compute_bytes // LOSS_TOKENS
        tape.work(matmuls=(product,) * times, moved_bytes=times * (moved + matrix), kernels=4 * times)
