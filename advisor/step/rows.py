"""How many of a micro-batch's tokens there are rows for, where code works through them some at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from advisor.step.program import Amount


class Rows(Protocol):
    """A number of rows that depends on the micro-batch, not in proportion to it. Equal ones compare equal."""

    def __hash__(self) -> int: ...

    def of(self, batch: Amount) -> Amount:
        """The rows in a micro-batch of *batch* sequences."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One of two or more equal pieces, of *most* rows at most."""

    tokens: int
    """Of one sequence."""
    most: int

    def of(self, batch: Amount) -> Amount:
        return np.minimum(self.most, -(-self.tokens * batch // 2))


@dataclass(frozen=True, slots=True)
class OtherPieces:
    """All pieces but one."""

    piece: Piece

    def of(self, batch: Amount) -> Amount:
        return self.piece.tokens * batch - self.piece.of(batch)


@dataclass(frozen=True, slots=True)
class UpTo:
    """All tokens, but *most* rows at most."""

    tokens: int
    """Of one sequence."""
    most: int

    def of(self, batch: Amount) -> Amount:
        return np.minimum(self.most, self.tokens * batch)


@dataclass(frozen=True, slots=True)
class Beyond:
    """One where there are more tokens than *most*, else none."""

    tokens: int
    """Of one sequence."""
    most: int

    def of(self, batch: Amount) -> Amount:
        return np.asarray(self.tokens * batch > self.most).astype(np.int64)


@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """The power of two that is no less than one of *pieces* equal pieces, or all tokens where they are fewer."""

    tokens: int
    """Of one sequence."""
    pieces: int

    def of(self, batch: Amount) -> Amount:
        tokens = self.tokens * np.asarray(batch)
        # frexp's exponent is the number of binary digits.
        digits = np.frexp(-(-tokens // self.pieces) - 1)[1]
        rows: Amount = np.minimum(tokens, 2 ** digits.astype(np.int64))
        return rows
