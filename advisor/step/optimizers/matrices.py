"""Optimizers that treat the matrices of the layers otherwise than all else, which they leave to AdamW.

They see whole matrices, and go through them one after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from advisor.step.optimizers.rule import Given, Piece, Rule
from advisor.step.optimizers.torch_native import AdamW
from advisor.step.program import Amount, Block, Matmul, Node, hold
from advisor.step.states import FP32_BYTES, MOMENTS

HALF_BYTES = 2


def split(given: Given) -> tuple[Given, Given]:
    """The matrices of the layers, and all else."""
    pieces = tuple(given.pieces())
    matrices = tuple(piece for piece in pieces if piece.is_hidden_matrix)
    others = tuple(piece for piece in pieces if not piece.is_hidden_matrix)
    return _of(matrices, given), _of(others, given)


def _of(pieces: tuple[Piece, ...], given: Given) -> Given:
    elements = sum(int(piece.elements) for piece in pieces)
    return replace(given, elements=elements, tensors=len(pieces), pieces=lambda: pieces)


class Muon(Rule):
    """torch's Muon for matrices (2.13, optim/_muon.py; Jordan et al., 2024), fused AdamW for the rest."""

    ITERATIONS = 5
    """``DEFAULT_NS_STEPS`` of the Newton-Schulz iteration, which runs in bf16."""
    WEIGHT_MOVES = 12
    """Tensors like the weights: momentum 3, the step from it 3, cast 2, decayed weights 2, weights less the step 2."""
    KERNELS = 9
    """Of one matrix, beside three products an iteration."""

    @property
    def name(self) -> str:
        return "Muon"

    @property
    def others(self) -> AdamW:
        return AdamW(replace(self.job, optimizer="adamw-fused"))

    def kept(self, given: Given) -> Sequence[Node]:
        matrices, others = split(given)
        return (
            hold("Muon momentum", "optimizer", matrices.elements * given.element_bytes),
            *self.others.kept(others),
        )

    def tensor_sizes(self, given: Given) -> Mapping[str, Callable[[], Iterable[int]]]:
        matrices, others = split(given)
        momentum = {"Muon momentum": lambda: [int(size) * given.element_bytes for size in matrices.sizes()]}
        return {**momentum, **self.others.tensor_sizes(others)}

    def temporaries(self, given: Given) -> Amount:
        """The step before it is made orthogonal stays to the end, in the weights' format.

        Beside it are the iterate, the one that it becomes, its Gram matrix and a polynomial of that; at first, the step
        of the matrix before.
        """
        most = before = 0
        for rows, columns in (piece.shape for piece in split(given)[0].pieces()):
            size, gram = rows * columns, min(rows, columns) ** 2
            iterating = HALF_BYTES * (2 * size + 2 * gram)
            most = max(most, given.element_bytes * size + max(HALF_BYTES * before, iterating))
            before = size
        return most

    def moving(self, given: Given) -> Sequence[Node]:
        matrices, others = split(given)
        shapes = Counter(tuple(sorted(piece.shape)) for piece in matrices.pieces())
        products = tuple(
            Matmul(short, n, k, count=self.ITERATIONS * times)
            for (short, long), times in shapes.items()
            for n, k in ((short, long), (short, short), (long, short))
        )
        count = int(matrices.tensors)
        moved = self.WEIGHT_MOVES * matrices.elements * given.element_bytes
        return (
            Block(
                "Muon update",
                "optimizer",
                matmuls=products,
                moved_bytes=moved + sum(product.operand_bytes for product in products),
                kernels=count * (self.KERNELS + 3 * self.ITERATIONS),
            ),
            *self.others.moving(others),
        )


class GaLore(Rule):
    """AdamW on gradients of matrices projected to a low rank (Zhao et al., arXiv:2403.03507; galore-torch 1.0).

    ``proj_type`` "std": a matrix with at least as many rows as columns is projected by its right singular vectors, any
    other by its left ones. Every 200 steps they are computed anew, and memory is that of such a step. In fp32 those
    that are kept are a view, so that all of them stay. Left out: what cuSOLVER takes, in memory and in time.
    """

    WEIGHT_MOVES, LOW_RANK_MOVES, OTHER_MOVES = 5, 17, 20
    """Tensors that the operators read and write.

    Like a projected matrix: the step scaled 2, the weights plus it 3. Like its projected gradient: moments scaled 2
    each and added to 3 each, a root 2, epsilon 2, the quotient 3. Like what is not projected: the same, and the weights
    plus the step 3.
    """
    KERNELS, MATRIX_KERNELS = 8, 11
    """Of a tensor, and of a matrix."""

    @property
    def name(self) -> str:
        return "GaLore"

    def _low(self, piece: Piece) -> tuple[int, int]:
        """Elements of the projected gradient, and of the vectors that project it."""
        short, long = sorted(piece.shape)
        rank = min(self.job.galore_rank, short)
        return rank * long, rank * short

    def _vectors_bytes(self, piece: Piece, given: Given) -> int:
        return (
            FP32_BYTES * min(piece.shape) ** 2
            if given.element_bytes == FP32_BYTES
            else HALF_BYTES * self._low(piece)[1]
        )

    def kept(self, given: Given) -> Sequence[Node]:
        matrices, others = split(given)
        low = matrices.sum_of(lambda piece: self._low(piece)[0])
        vectors = matrices.sum_of(lambda piece: self._vectors_bytes(piece, given))
        return (
            hold("GaLore moments", "optimizer", MOMENTS * (others.elements + low) * given.element_bytes),
            hold("GaLore singular vectors", "optimizer", vectors),
        )

    def tensor_sizes(self, given: Given) -> Mapping[str, Callable[[], Iterable[int]]]:
        matrices, others = split(given)

        def moments() -> list[int]:
            sizes = [*others.sizes(), *(self._low(piece)[0] for piece in matrices.pieces())]
            return [int(size) * given.element_bytes for size in sizes for _ in range(MOMENTS)]

        return {
            "GaLore moments": moments,
            "GaLore singular vectors": lambda: [self._vectors_bytes(piece, given) for piece in matrices.pieces()],
        }

    def temporaries(self, given: Given) -> Amount:
        """Root and quotient of the tensor before stay until its own take their place; a matrix's whole step is scaled
        into another."""
        size_bytes = given.element_bytes
        matrices, others = split(given)
        most: Amount = 0
        root = quotient = 0
        for piece in others.pieces():
            size = int(piece.elements)
            most = max(most, quotient + size + max(root, size))
            root = quotient = size
        found = size_bytes * most
        for piece in matrices.pieces():
            low = self._low(piece)[0]
            before = size_bytes * (root + quotient)
            updating = size_bytes * max(quotient + 3 * low, root + quotient + 2 * low, 3 * low + 2 * piece.elements)
            found = max(found, before + self._decomposing(piece, size_bytes), updating)
            root, quotient = low, int(piece.elements)
        return found

    def _decomposing(self, piece: Piece, element_bytes: int) -> int:
        """Bytes of both kinds of singular vectors, of the values, and of the product of those that are not kept with
        the values; of half formats the fp32 matrix besides, and a copy of what is kept."""
        short, long = sorted(piece.shape)
        low, vectors = self._low(piece)
        values = FP32_BYTES * min(self.job.galore_rank, short) ** 2
        found = FP32_BYTES * (short * long + short * short + short + low)
        if element_bytes == FP32_BYTES:
            return found + values
        return found + FP32_BYTES * short * long + max(values, HALF_BYTES * vectors)

    def moving(self, given: Given) -> Sequence[Node]:
        matrices, others = split(given)
        low = matrices.sum_of(lambda piece: self._low(piece)[0])
        rank, half = self.job.galore_rank, given.element_bytes
        shapes = Counter(tuple(sorted(piece.shape)) for piece in matrices.pieces())
        products = tuple(
            Matmul(long, n, k, count=times, element_bytes=half)
            for (short, long), times in shapes.items()
            for n, k in ((min(rank, short), short), (short, min(rank, short)))
        )
        tensors = self.WEIGHT_MOVES * matrices.elements + self.LOW_RANK_MOVES * low + self.OTHER_MOVES * others.elements
        return (
            Block(
                "GaLore update",
                "optimizer",
                matmuls=products,
                moved_bytes=tensors * half + sum(product.operand_bytes for product in products),
                kernels=self.MATRIX_KERNELS * int(matrices.tensors) + self.KERNELS * int(others.tensors),
            ),
        )
