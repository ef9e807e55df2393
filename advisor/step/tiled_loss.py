"""TRL's loss, which computes log-probabilities from tiles of the logits and never holds all of them.

trl 1.16, kernels/chunked_logprob.py ``ChunkedLogProbFunction`` and trainer/utils.py ``add_fused_lm_head``, on CUDA with
torch 2.8 or newer. Forward keeps a few numbers per token; backward computes each tile again and sums both gradients in
fp32, for the whole output matrix and all tokens, before it casts them. FSDP has the matrix there, as the final norm is
of its group; under ZeRO-3, where the loss gathers it itself, it is counted as if its module ran. Left out: the index
tensors of CUDA's sorted ``index_put``.
"""

from __future__ import annotations

from dataclasses import dataclass

from advisor.specs.model import ModelSpec
from advisor.step.operators import weight_gradient
from advisor.step.program import Matmul
from advisor.step.rows import Beyond, UpTo
from advisor.step.tape import Gradients, Product, Tape, Tensor, Weight
from advisor.step.weights import Weights

TILE_TOKENS = 4096
"""``TOKEN_CHUNK_SIZE``."""
TILE_COLUMNS = 32768
"""``_CHUNKED_LOGPROB_CHUNK_SIZE`` of trainer/utils.py."""
INDEX_BYTES = 8
STATISTICS = 7
"""Running sums and maxima of each token, in fp32."""


def tiled_loss(tape: Tape, hidden: Tensor, model: ModelSpec, weights: Weights) -> Tensor:
    """The loss of the token that follows each but the last, and beside it the entropies and hits that are logged."""
    tokens = tape.sequence_length - 1
    head = _Head(tape, weights.take(model.vocabulary_size, model.hidden_size), model, tokens)
    scored = tape.new(tokens, 1)
    chosen = _chosen(tape, hidden, scored, tokens * model.hidden_size)
    targets = tape.new(tokens, INDEX_BYTES)
    probabilities = _spread(tape, head.log_probabilities(chosen, targets), scored, tokens)
    logged = tape.new(tokens, 4), tape.new(tokens, 1)
    loss = tape.new(1, 4, scales=False)
    tape.work(probabilities, probabilities, *logged, *logged, kernels=8)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        negated = tape.new(tokens, 4)
        tape.work(negated)
        return (negated,)

    tape.attach(loss, [probabilities], backward, saves="nothing")
    tape.watched = loss.node
    return loss


def _chosen(tape: Tape, hidden: Tensor, scored: Tensor, numel: int) -> Tensor:
    """A copy of the hidden states that are scored. Their gradient is laid into zeros, then those beside the last's."""
    whole_numel, element_bytes = hidden.numel, hidden.element_bytes
    chosen = tape.new(numel, element_bytes)
    tape.work(chosen, chosen)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        without_last = tape.new(numel, element_bytes)
        tape.work(scored, gradient, without_last, kernels=2)
        whole = tape.new(whole_numel, element_bytes)
        tape.work(without_last, whole, kernels=2)
        return (whole,)

    return tape.attach(chosen, [hidden], backward)


def _spread(tape: Tape, found: Tensor, scored: Tensor, tokens: int) -> Tensor:
    """``masked_scatter`` into zeros of all positions, which it copies."""
    zeros = tape.new(tokens, 4)
    output = tape.new(tokens, 4)
    tape.work(zeros, found, output, kernels=2)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        picked = tape.new(tokens, 4)
        tape.work(scored, gradient, picked)
        return (picked,)

    return tape.attach(output, [found], backward)


@dataclass(frozen=True, slots=True)
class _Head:
    """The product with the output matrix, tile by tile."""

    tape: Tape
    matrix: Weight
    model: ModelSpec
    tokens: int

    def log_probabilities(self, chosen: Tensor, targets: Tensor) -> Tensor:
        """Of the *targets*; their normalisers and the entropies are kept for backward beside what came in."""
        tape, tokens = self.tape, self.tokens
        statistics = [tape.new(tokens, 4) for _ in range(STATISTICS)]
        tile = self._tile()
        casts = self._casts(chosen, both=False)
        self._work(products=1, tile_passes=2)
        kept = tape.new(tokens, 4), tape.new(tokens, 4)
        found = tape.new(tokens, 4)
        del tile
        casts.clear()
        statistics.clear()

        def backward(tape: Tape, gradient: Tensor) -> Gradients:
            tape.work(targets, *kept, gradient)
            return self._gradients(chosen)

        return tape.attach(found, [chosen, self.matrix], backward)

    def _gradients(self, chosen: Tensor) -> Gradients:
        tape, half = self.tape, self.matrix.element_bytes != 4
        for_hidden = tape.like(chosen, 4)
        numel, parameter = self.matrix.parameter.numel, self.matrix.parameter
        for_matrix = tape.new(numel, 4, scales=False) if half else weight_gradient(tape, parameter, 4)
        tile = self._tile()
        casts = self._casts(chosen, both=True)
        # Each row of tiles reads and writes the sum for the matrix once more.
        self._work(products=3, tile_passes=5, matrix_bytes=8)
        narrowed = [tape.like(chosen)] if chosen.element_bytes != 4 else []
        whole = weight_gradient(tape, parameter, self.matrix.element_bytes) if half else for_matrix
        if half:
            tape.work(for_matrix, whole)
        del tile
        casts.clear()
        return (narrowed.pop() if narrowed else for_hidden), whole

    def _tile(self) -> Tensor:
        """Of one row of tiles, all of which use it one after another."""
        return self.tape.new(TILE_COLUMNS, self.tape.compute_bytes, scales=UpTo(self.tokens, TILE_TOKENS))

    def _casts(self, chosen: Tensor, both: bool) -> list[Tensor]:
        """Under autocast: a tile's tokens and its columns of the matrix; *both* where the columns before are there.

        Tokens that do not fill their tile are counted as if they did.
        """
        tape, wide = self.tape, self.tape.compute_bytes
        width, columns = self.model.hidden_size, self.model.vocabulary_size
        found = []
        if chosen.element_bytes != wide:
            found.append(tape.new(width, wide, scales=UpTo(self.tokens, TILE_TOKENS)))
        if self.matrix.element_bytes != wide:
            found.append(tape.new(min(columns, TILE_COLUMNS) * width, wide, scales=False))
            if both and columns > TILE_COLUMNS:
                found.append(tape.new(min(columns - TILE_COLUMNS, TILE_COLUMNS) * width, wide, scales=False))
            elif both:
                found.append(tape.new(columns * width, wide, scales=Beyond(self.tokens, TILE_TOKENS)))
        return found

    def _work(self, products: int, tile_passes: int, matrix_bytes: int = 0) -> None:
        """*products* over all tiles, each of which is read or written *tile_passes* times.

        A row of tiles reads the matrix for each product, *matrix_bytes* more of each element, and its cast copy.
        """
        tape, tokens, wide = self.tape, self.tokens, self.tape.compute_bytes
        vocabulary, width = self.model.vocabulary_size, self.model.hidden_size
        cast = self.matrix.element_bytes + wide if self.matrix.element_bytes != wide else 0
        matrix = vocabulary * width * (products * wide + matrix_bytes + cast) * tokens // TILE_TOKENS
        tape.work(
            matmuls=tuple(Product(Matmul(tokens, vocabulary, width), "m") for _ in range(products)),
            moved_bytes=tile_passes * tokens * vocabulary * wide + matrix,
            kernels=(products + 1) * -(-vocabulary // TILE_COLUMNS),
        )
