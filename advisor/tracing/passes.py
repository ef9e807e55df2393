"""What is written down of a forward and backward pass. Plain values, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from advisor.step.program import Category, FusedAttention

EMBEDDING, LOSS, HEAD = "embedding", "loss", "head"


class Stretch(NamedTuple):
    """A part of the model in one direction; layers go by their number."""

    part: str | int
    backward: bool


@dataclass(eq=False, slots=True)
class Taken:
    """Memory that the pass itself took."""

    size_bytes: int
    label: str
    category: Category
    owner: Stretch
    parameter: str | None = None
    """The weight whose gradient it is."""


@dataclass(frozen=True, slots=True)
class Shape:
    """*count* products (m x k)(k x n), as :class:`advisor.step.program.Matmul` has them."""

    m: int
    n: int
    k: int
    count: int
    kind: Literal["linear", "attention"]
    flop_share: float = 1.0
    element_bytes: int = 2
    fused: FusedAttention | None = None
    backward: bool = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operation that reads or writes memory."""

    name: str
    products: tuple[Shape, ...]
    moved_bytes: int


class Entry(NamedTuple):
    """One thing that happened."""

    kind: Literal["take", "give", "work", "gradient"]
    taken: Taken | None = None
    kernel: Kernel | None = None
    parameter: str | None = None
    size_bytes: int = 0


@dataclass
class Pass:
    """Everything that happened in one forward and backward pass, in order."""

    stretches: list[tuple[Stretch, list[Entry]]] = field(default_factory=list)

    def enter(self, part: str | int, backward: bool = False) -> None:
        self.stretches.append((Stretch(part, backward), []))

    def add(self, entry: Entry) -> None:
        self.stretches[-1][1].append(entry)
