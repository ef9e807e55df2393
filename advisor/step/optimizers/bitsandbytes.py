"""bitsandbytes' AdamW and Lion, moments in fp32 or in eight bits, paged or not (0.50.2, optim/optimizer.py).

Eight-bit moments have a scale for every block of 256 and codes that stand for the values of a table (Dettmers et al.,
arXiv:2110.02861). The kernels work in place. Left out: that the GPU is waited for after every tensor (``sync_gpu``).

Paged moments lie in CUDA's managed memory, outside of torch's allocator. The driver moves them to the host where the
GPU has no room for them, and ``prefetch_state`` asks for them back: here they count on the host, and go there and
back in every step, which is what they take at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from advisor.step.optimizers.rule import Given, Piece, Rule
from advisor.step.program import Amount, Block, Copy, Node, hold, total
from advisor.step.states import FP32_BYTES

BLOCK = 256
"""Elements that share a scale (``init_state``)."""
SMALLEST_IN_EIGHT_BITS = 4096
"""Elements of the smallest tensor whose moments are held in eight bits (``min_8bit_size``)."""
SMALLEST_PAGED = 100_000
"""Elements of the smallest tensor whose moments are paged (``get_state_buffer``)."""
MAP_BYTES = 256 * FP32_BYTES
"""Of the table of values that a moment's codes stand for, one for all tensors."""
TABLES = "tables of 8-bit values"
WEIGHT_MOVES = 3
"""Tensors like the weights that the kernel reads and writes beside the moments: weights, gradient; weights."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What ``--optimizer`` says of it."""

    name: str
    moments: int
    in_eight_bits: bool = False


SETTINGS = {
    "adamw-8bit": Setting("Adam", 2, in_eight_bits=True),
    "adamw-paged": Setting("Adam", 2),
    "adamw-8bit-paged": Setting("Adam", 2, in_eight_bits=True),
    "lion": Setting("Lion", 1),
    "lion-8bit": Setting("Lion", 1, in_eight_bits=True),
}


class Blockwise(Rule):
    """One or two moments of every tensor, whatever format the weights have."""

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.job.optimizer]

    @property
    def name(self) -> str:
        return self.setting.name

    def kept(self, given: Given) -> Sequence[Node]:
        kept = [hold(label, "optimizer", given.sum_of(amount)) for label, amount in self._held(given).items()]
        if self.setting.in_eight_bits:
            tables = np.minimum(given.sum_of(self._in_eight_bits), 1)
            kept.append(hold(TABLES, "optimizer", self.setting.moments * MAP_BYTES * tables))
        return kept

    def host(self, given: Given) -> Sequence[Node]:
        if not self.job.pages_moments:
            return ()
        return (hold(f"paged {self.name} moments{given.where}", "optimizer", given.sum_of(self._paged)),)

    def tensor_sizes(self, given: Given) -> Mapping[str, Callable[[], Iterable[int]]]:
        def sizes(amount: Callable[[Piece], Amount]) -> Callable[[], Iterable[int]]:
            moments = self.setting.moments
            return lambda: [
                int(size) // moments for piece in given.pieces() if (size := amount(piece)) for _ in range(moments)
            ]

        maps = {TABLES: lambda: self.setting.moments * [MAP_BYTES]} if self.setting.in_eight_bits else {}
        return {label: sizes(amount) for label, amount in self._held(given).items()} | maps

    def temporaries(self, given: Given) -> Amount:
        return 0

    def moving(self, given: Given) -> Sequence[Node]:
        paged = given.sum_of(self._paged) if self.job.pages_moments else 0
        held = paged + sum((given.sum_of(amount) for amount in self._held(given).values()), 0)
        update = Block(
            f"{self.name} update",
            "optimizer",
            moved_bytes=WEIGHT_MOVES * given.elements * given.element_bytes + 2 * held,
            kernels=sum(1 for _ in given.pieces()),
        )
        if not self.job.pages_moments:
            return (update,)
        what = "paged moments"
        there = Copy(what, "host-to-device", paged, waits=True)
        back = Copy(what, "device-to-host", paged, waits=True)
        return Block(what, "optimizer", transfers=(there,)), update, Block(what, "optimizer", transfers=(back,))

    def _held(self, given: Given) -> dict[str, Callable[[Piece], Amount]]:
        """What of one tensor lies on the device, by label."""
        held: dict[str, Callable[[Piece], Amount]] = {f"{self.name} moments{given.where}": self._in_fp32}
        if self.setting.in_eight_bits:
            held[f"8-bit {self.name} moments{given.where}"] = self._codes
            held[f"scales of 8-bit moments{given.where}"] = self._scales
        return held

    def _in_eight_bits(self, piece: Piece) -> Amount:
        """1 where the moments are in eight bits, else 0."""
        return 1 * (piece.elements >= SMALLEST_IN_EIGHT_BITS) * self.setting.in_eight_bits

    def _is_paged(self, piece: Piece) -> Amount:
        return 1 * (piece.elements >= SMALLEST_PAGED) * self.job.pages_moments

    def _bytes(self, piece: Piece) -> tuple[Amount, Amount]:
        """Of the moments in fp32, and of the codes of those in eight bits, wherever they lie."""
        eight = self._in_eight_bits(piece)
        moments = self.setting.moments * piece.elements
        return FP32_BYTES * moments * (1 - eight), moments * eight

    def _in_fp32(self, piece: Piece) -> Amount:
        return self._bytes(piece)[0] * (1 - self._is_paged(piece))

    def _codes(self, piece: Piece) -> Amount:
        return self._bytes(piece)[1] * (1 - self._is_paged(piece))

    def _scales(self, piece: Piece) -> Amount:
        return self.setting.moments * -(-piece.elements // BLOCK) * FP32_BYTES * self._in_eight_bits(piece)

    def _paged(self, piece: Piece) -> Amount:
        return total(self._bytes(piece)) * self._is_paged(piece)
