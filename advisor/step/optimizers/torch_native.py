"""torch's AdamW and SGD, for tensors of any shape (torch 2.13, optim/adam.py and optim/sgd.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from advisor.step.optimizers.rule import Given, Rule
from advisor.step.program import Amount, Node, hold
from advisor.step.states import ADAM_MOVES, FP32_BYTES, MOMENTS, adam_step_counters, adam_temporaries

PLAIN_SGD_MOVES, MOMENTUM_SGD_MOVES = 3, 8
"""Tensors that ``_multi_tensor_sgd`` reads and writes: w - g; m scaled, m + g and w - m, one list after another."""


class AdamW(Rule):
    """Two moments in the format of the weights that it is given."""

    @property
    def name(self) -> str:
        return "Adam"

    def kept(self, given: Given) -> Sequence[Node]:
        return (
            hold(f"Adam moments{given.where}", "optimizer", MOMENTS * given.elements * given.element_bytes),
            hold("Adam step counters", "optimizer", adam_step_counters(self.job, given.tensors)),
        )

    def tensor_sizes(self, given: Given) -> Mapping[str, Callable[[], Iterable[int]]]:
        return {
            f"Adam moments{given.where}": lambda: [
                int(size) * given.element_bytes for size in given.sizes() if size for _ in range(MOMENTS)
            ],
            "Adam step counters": lambda: int(given.tensors) * [FP32_BYTES],
        }

    def temporaries(self, given: Given) -> Amount:
        return adam_temporaries(self.job, given.sizes, given.element_bytes)

    def moving(self, given: Given) -> Sequence[Node]:
        return (self.passes(given, ADAM_MOVES, kernels=1),)


class Sgd(Rule):
    """Works in place; with momentum, one more tensor in the format of the weights."""

    @property
    def name(self) -> str:
        return "SGD"

    @property
    def has_momentum(self) -> bool:
        return self.job.optimizer == "sgd-momentum"

    def kept(self, given: Given) -> Sequence[Node]:
        if not self.has_momentum:
            return ()
        return (hold(f"SGD momentum{given.where}", "optimizer", given.elements * given.element_bytes),)

    def tensor_sizes(self, given: Given) -> Mapping[str, Callable[[], Iterable[int]]]:
        if not self.has_momentum:
            return {}
        return {
            f"SGD momentum{given.where}": lambda: [int(size) * given.element_bytes for size in given.sizes() if size]
        }

    def temporaries(self, given: Given) -> Amount:
        return 0

    def moving(self, given: Given) -> Sequence[Node]:
        return (self.passes(given, MOMENTUM_SGD_MOVES if self.has_momentum else PLAIN_SGD_MOVES, kernels=1),)
