"""transformers' Adafactor as its Trainer builds it: no first moment, no scaling by the weights (5.23, optimization.py).

Of a tensor with several dimensions it keeps the mean squares of rows and columns, of a flat one a second moment of
every element (Shazeer and Stern, arXiv:1804.04235). It computes in fp32, so that half-format weights and gradients are
copied, and one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod

import numpy as np

from advisor.step.optimizers.rule import Given, Piece, Rule
from advisor.step.program import Amount, Block, Node, hold, total
from advisor.step.states import FP32_BYTES

FACTORED_MOVES, FLAT_MOVES = 21, 25
"""Tensors of fp32 that the operators of one tensor's step read and write.

The gradient squared 2, a constant added 2, the result times the gradient 3, its norm 1, clipped 2, times the rate 2,
negated 2; the weights plus it 3, their norm 1. Beside these, factored: two means 2, the product of both factors 1;
flat: the moment scaled 2 and added to 3, its root 2.
"""
CAST_BYTES = 3 * (FP32_BYTES + 2)
"""Per element of a half format: the gradient and the weights to fp32, the weights back."""
KERNELS = 24
"""Of one tensor's step."""


class Adafactor(Rule):
    """One number of fp32 for every row and column, or for every element."""

    @property
    def name(self) -> str:
        return "Adafactor"

    def kept(self, given: Given) -> Sequence[Node]:
        return (
            hold(f"Adafactor mean squares{given.where}", "optimizer", given.sum_of(_mean_squares)),
            # state["RMS"], a scalar of each tensor.
            hold("Adafactor norms of weights", "optimizer", FP32_BYTES * given.tensors),
        )

    def tensor_sizes(self, given: Given) -> Mapping[str, Callable[[], Iterable[int]]]:
        return {
            f"Adafactor mean squares{given.where}": lambda: [
                FP32_BYTES * int(part) for piece in given.pieces() for part in _parts(piece) if part
            ],
            "Adafactor norms of weights": lambda: int(given.tensors) * [FP32_BYTES],
        }

    def temporaries(self, given: Given) -> Amount:
        """While a tensor is squared, the last one's update is still there; then its own two, and the factors.

        Of half formats the copies of gradient and weights come on top.
        """
        copies = given.element_bytes != FP32_BYTES
        most: Amount = 0
        before: Amount = 0
        for piece in given.pieces():
            size = piece.elements
            held = 2 * copies * size
            factors = total(_parts(piece)) if len(piece.shape) > 1 else 0
            # The last one's copy of the weights goes when this one's weights are looked at, after its gradient is cast.
            casting = copies * (2 * before + size)
            most = np.maximum(most, np.maximum(casting, held + np.maximum(before, factors) + 2 * size))
            before = size
        return FP32_BYTES * most

    def moving(self, given: Given) -> Sequence[Node]:
        moved = given.sum_of(lambda piece: piece.elements * (FACTORED_MOVES if len(piece.shape) > 1 else FLAT_MOVES))
        casts = CAST_BYTES * given.elements * (given.element_bytes != FP32_BYTES)
        kernels = KERNELS * sum(1 for _ in given.pieces())
        return (Block("Adafactor update", "optimizer", moved_bytes=FP32_BYTES * moved + casts, kernels=kernels),)


def _parts(piece: Piece) -> tuple[Amount, ...]:
    """Elements of each tensor that is kept of the squares of *piece*: of rows and columns, or of all."""
    if len(piece.shape) < 2:
        return (piece.elements,)
    return prod(piece.shape[:-1]), prod(piece.shape[:-2]) * piece.shape[-1]


def _mean_squares(piece: Piece) -> Amount:
    return FP32_BYTES * total(_parts(piece))
