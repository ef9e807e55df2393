"""What a strategy asks of an optimizer, and what it says of the tensors that the optimizer updates on one rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from advisor.specs.job import Job
from advisor.specs.model import ModelSpec, Parameter
from advisor.step.program import Amount, Block, Node, scratch, total

NO_MATRIX = "relative_attention_bias"
"""In the name of a table of T5's layers, which transformers builds as an embedding."""


class Piece(NamedTuple):
    """One tensor that the optimizer updates, or as much of it as the rank has."""

    elements: Amount
    shape: tuple[int, ...] = ()
    """Empty where it lies in, or is, a flat tensor."""
    is_hidden_matrix: bool = False
    """Whether it is a whole matrix of a layer, which neither embeds tokens nor makes logits."""


@dataclass(frozen=True, slots=True)
class Given:
    """The tensors that an optimizer updates on one rank. Weights and gradients have ``element_bytes`` per element."""

    elements: Amount
    """Of all of them."""
    tensors: Amount
    """How many hold any."""
    pieces: Callable[[], Iterable[Piece]]
    """In the order in which the optimizer is given them."""
    element_bytes: int
    where: str = ""
    """What a label says of them besides, such as ", rank's share"."""

    def sizes(self) -> Iterator[Amount]:
        """Elements of each."""
        return (piece.elements for piece in self.pieces())

    def sum_of(self, amount: Callable[[Piece], Amount]) -> Amount:
        """*amount* of all pieces together; those that are alike are asked once."""
        counts: dict[Piece, int] = {}
        single: list[Amount] = []
        for piece in self.pieces():
            if isinstance(piece.elements, int):
                counts[piece] = counts.get(piece, 0) + 1
            else:
                single.append(amount(piece))
        return total((*single, *(times * amount(piece) for piece, times in counts.items())))


def flat(elements: Amount, element_bytes: int, where: str = "", parts: Sequence[Amount] = ()) -> Given:
    """One flat tensor, as DeepSpeed's partitions are, or one for each of its *parts*."""
    pieces = tuple(Piece(part) for part in parts) or (Piece(elements),)
    filled = total(np.minimum(piece.elements, 1) for piece in pieces)
    return Given(elements, filled, lambda: pieces, element_bytes, where)


def whole(model: ModelSpec, parameters: Sequence[Parameter], element_bytes: int) -> Given:
    """*parameters* of *model* as they are."""
    outside = {each.name for each in (*model.embedding, *model.head)}

    def pieces() -> Iterator[Piece]:
        for each in parameters:
            hidden = len(each.shape) == 2 and each.name not in outside and NO_MATRIX not in each.name
            yield Piece(each.numel, each.shape, hidden)

    return Given(sum(each.numel for each in parameters), len(parameters), pieces, element_bytes)


@dataclass(frozen=True)
class Rule(ABC):
    """One optimizer."""

    job: Job

    @property
    @abstractmethod
    def name(self) -> str:
        """What labels call it."""

    @abstractmethod
    def kept(self, given: Given) -> Sequence[Node]:
        """What it holds on the device between steps."""

    @abstractmethod
    def temporaries(self, given: Given) -> Amount:
        """Bytes that its step takes meanwhile."""

    @abstractmethod
    def moving(self, given: Given) -> Sequence[Node]:
        """What its step moves and computes."""

    def update(self, given: Given) -> Sequence[Node]:
        """Its step."""
        return (scratch(f"{self.name} temporaries", self.temporaries(given)), *self.moving(given))

    def tensor_sizes(self, given: Given) -> Mapping[str, Callable[[], Iterable[int]]]:
        """Sizes of the tensors that :meth:`kept` holds under a label, for a single plan."""
        return {}

    def host(self, given: Given) -> Sequence[Node]:
        """What it holds in host memory."""
        return ()

    def passes(self, given: Given, tensors: Amount, kernels: int) -> Block:
        """An update that reads and writes, all together, *tensors* as large as the weights, in their format."""
        return Block(
            f"{self.name} update",
            "optimizer",
            moved_bytes=tensors * given.elements * given.element_bytes,
            kernels=kernels,
        )
