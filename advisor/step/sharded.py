"""What PyTorch's two fully sharded data parallelisms have in common as accelerate 1.15 sets them up.

Weights are held in the parameter format, cut over the ranks, and gathered and reduced in the half format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property

from advisor.specs.plan import Strategy
from advisor.step.optimizers.rule import Given, Piece
from advisor.step.program import Amount, Block, Collective, hold, release, scratch
from advisor.step.scheme import SCALES, MicroStep, Nodes, Scheme


class Sharded(Scheme, ABC):
    """What the two share."""

    @property
    def parameter_bytes(self) -> int:
        return self.job.compute_bytes

    @property
    def trained_bytes(self) -> int:
        return self.job.compute_bytes

    @property
    def built_bytes(self) -> int:
        """Beside four bits the rest of a model is left in the half format: it is gathered in that anyway."""
        return self.job.compute_bytes if self.job.method == "qlora" else self.job.model_bytes

    @property
    def reshards(self) -> bool:
        """Whether gathered weights are freed after forward."""
        return self.plan.strategy is not Strategy.FSDP_GRAD_OP

    @property
    def casts(self) -> bool:
        """Whether weights are cast before they are gathered, and reduced gradients back."""
        return self.job.compute_bytes != self.job.parameter_bytes

    @property
    @abstractmethod
    def shard(self) -> Amount:
        """Elements of the weights on one rank."""

    @property
    def frozen_shard(self) -> Amount:
        """Those of them that stay as they are."""
        return 0

    @property
    def updated(self) -> Amount:
        """Those of them that the optimizer updates."""
        return self.shard - self.frozen_shard

    @property
    def tensors(self) -> Amount:
        """How many the optimizer sees on this rank."""
        return len(self.model.trained)

    @abstractmethod
    def sizes(self) -> Iterator[Amount]:
        """Elements of each of them, in their order."""

    def held_sizes(self) -> Iterable[Amount]:
        """Bytes of each tensor that the weights on this rank are held in."""
        return (size * self.job.parameter_bytes for size in self.sizes())

    @property
    def tensor_sizes(self) -> Mapping[str, Callable[[], Iterable[int]]]:
        return {
            "weights, rank's share": lambda: [int(size) for size in self.held_sizes() if size],
            **self.optimizer.tensor_sizes(self.given),
        }

    @cached_property
    def given(self) -> Given:
        """What the optimizer updates on this rank."""
        return Given(
            self.updated, self.tensors, lambda: map(Piece, self.sizes()), self.job.parameter_bytes, ", rank's share"
        )

    def reduces(self, micro: MicroStep) -> bool:
        """Whether gradients are reduced in *micro*."""
        return micro.last or self.plan.fsdp.syncs_each_micro_batch

    @property
    def held_bytes(self) -> Amount:
        """Of the weights on this rank: accelerate brings those that are trained to fp32 (``fsdp2_prepare_model``)."""
        trained = (self.shard - self.frozen_shard) * self.job.parameter_bytes
        return trained + self.frozen_shard * self.built_bytes

    def states(self) -> Nodes:
        return (
            hold("weights, rank's share", "parameters", self.held_bytes),
            hold(SCALES, "parameters", self.model.scale_bytes),
            *self.optimizer.kept(self.given),
        )

    def reduced(self, share: Amount, whole_bytes: Amount, micro: MicroStep) -> Block:
        """Gradients of *whole_bytes* become this rank's *share* of elements, in the format of the weights.

        A later micro-batch adds its share to the one that is there.
        """
        kept, output = share * self.job.parameter_bytes, share * self.job.compute_bytes * self.casts
        first = micro.first if self.plan.fsdp.syncs_each_micro_batch else 1
        send = Collective("gradients", "reduce-scatter", whole_bytes, 1, waits=False, group="shard")
        return Block(
            "gradients, rank's share",
            "gradients",
            kept * first,
            kept + output,
            "buffers",
            moved_bytes=3 * whole_bytes,
            transfers=(send,),
        )

    def update(self) -> Nodes:
        share, element_bytes = self.shard - self.frozen_shard, self.job.parameter_bytes
        return (
            *self.optimizer.update(self.given),
            release("gradients, rank's share", "gradients", share * element_bytes),
        )

    def host(self) -> Nodes:
        """Weights in four bits are made in host memory, whole on every rank, and cut from there layer by layer.

        torch 2.13, _fully_shard/_fsdp_init.py ``_move_states_to_device``.
        """
        whole = self.uncut_bytes + self.model.scale_bytes
        return (*self.optimizer.host(self.given), scratch("weights while loading", whole, "parameters"))

    def host_once(self) -> Nodes:
        """``cpu_ram_efficient_loading``: rank 0 alone reads the weights and sends them to the others."""
        if self.job.method == "qlora":
            return ()
        size = self.model.parameter_count * self.job.model_bytes
        return (scratch("weights while loading", size, "parameters"),)
