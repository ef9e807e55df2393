"""A third reading of the step program: its tensors one by one, in the order in which they come and go.

Blocks say how many bytes they take and leave; what was recorded says of which tensors. :func:`moves` writes both as a
flat list of moves in which only repeats and phases still stand by themselves. For single plans, not arrays. A model
that was traced names no tensors: of those under one label, the newest goes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from advisor.step.build import StepProgram
from advisor.step.program import Block, Node, Sequence
from advisor.step.recording import UNNUMBERED

COMPUTE_STREAM = "compute"
WITHIN_BLOCK = -9
"""Number of a tensor that a block takes and gives back itself."""

Name = int | str
"""Of a tensor: its number where it was recorded, or the label that it goes by. Several may have the same."""


class Move(NamedTuple):
    """What happens to a tensor.

    ``take`` makes one of ``size_bytes``. ``give`` frees the newest of that name but for ``newer`` of them; ``keep``
    gives it the name ``to`` instead, which is how backward hands a gradient to the strategy. ``give bytes`` frees the
    newest ones until ``size_bytes`` are free; of the last, what is too much stays as a smaller tensor.
    """

    kind: Literal["take", "give", "keep", "give bytes"]
    name: Name
    size_bytes: int
    stream: str = COMPUTE_STREAM
    newer: int = 0
    to: Name = ""


class Rounds(NamedTuple):
    """*body*, *times* times in a row."""

    body: tuple[Moves, ...]
    times: int
    """1 for a phase."""


Moves = Move | Rounds


def moves(program: StepProgram, node: Node) -> tuple[Moves, ...]:
    """The moves of *node*, a part of *program*. What stands at several places is the same object at each."""
    return _Reader(program).read(node)


class _Reader:
    """Reads a program; what stands at several places is read once."""

    def __init__(self, program: StepProgram) -> None:
        self.program = program
        self.known: dict[int, list[Moves]] = {}

    def read(self, node: Node) -> tuple[Moves, ...]:
        return tuple(self._read(node))

    def _read(self, node: Node) -> list[Moves]:
        if id(node) not in self.known:
            self.known[id(node)] = self._moves(node)
        return self.known[id(node)]

    def _moves(self, node: Node) -> list[Moves]:
        if isinstance(node, Block):
            return list(self._block(node))
        if not isinstance(node, Sequence):
            times = int(node.times)
            return [Rounds(self.read(node.body), times)] if times > 1 else times * self._read(node.body)
        found: list[Moves] = []
        for step in node.steps:
            _append(found, self._read(step))
        return found if node.phase is None else [Rounds(tuple(found), 1)]

    def _block(self, block: Block) -> Iterable[Move]:
        stream = self.program.streams.get(block.label, COMPUTE_STREAM)
        if not block.events:
            return self._of_bytes(block.label, int(block.net_bytes), int(block.peak_bytes), stream)
        return self._recorded(block, stream)

    def _recorded(self, block: Block, stream: str) -> Iterable[Move]:
        times = int(block.sequences)
        for event in block.events:
            size_bytes = times * event.size_bytes
            numbered = event.storage != UNNUMBERED
            name = event.storage if numbered else block.label
            if not size_bytes:
                continue
            if event.kind == "take":
                yield Move("take", name, size_bytes, stream)
            else:
                yield Move("give" if numbered else "give bytes", name, size_bytes, stream, event.newer)

    def _of_bytes(self, label: str, net: int, peak: int, stream: str) -> Iterable[Move]:
        """What is needed only for a while comes before what stays."""
        passing = peak - max(net, 0)
        if passing > 0:
            yield Move("take", WITHIN_BLOCK, passing, stream)
        if net > 0:
            sizes = tuple(self.program.tensor_sizes[label]()) if label in self.program.tensor_sizes else (net,)
            for size in sizes if sum(sizes) == net else (net,):
                yield Move("take", label, size, stream)
        if passing > 0:
            yield Move("give", WITHIN_BLOCK, passing, stream)
        if net < 0:
            yield Move("give bytes", label, -net, stream)


def _append(found: list[Moves], more: list[Moves]) -> None:
    """Go on with *more*; what that takes first, in the size just given, is the same tensor under another name.

    Where that goes right away, it needs no other name.
    """
    last, first = found[-1] if found else None, more[0] if more else None
    if (
        not isinstance(last, Move)
        or last.kind != "give"
        or not isinstance(first, Move)
        or first.kind != "take"
        or last.size_bytes != first.size_bytes
    ):
        found += more
    elif more[1:2] == [first._replace(kind="give")]:
        found += more[2:]
    else:
        found[-1] = last._replace(kind="keep", to=first.name)
        found += more[1:]
