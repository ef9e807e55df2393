"""PyTorch FSDP2 as accelerate 1.15 sets it up (torch 2.13, torch/distributed/fsdp/_fully_shard).

Each layer is a group; the embedding is one, and final norm and head another that stays whole once gathered. Where
the head is tied to the embedding, both are in that last group. Weights are held in the parameter format (accelerate
upcasts to fp32), gathered and reduced in the half format.
"""

from __future__ import annotations

import numpy as np

from advisor.specs.model import Parameter
from advisor.specs.plan import Strategy
from advisor.step.program import Amount, Block, Collective, hold, release, scratch
from advisor.step.scheme import MicroStep, Nodes, Part, Scheme
from advisor.step.states import ADAM_MOVES, MOMENTS, adam_temporaries, row_shards


class FullyShardedDataParallel(Scheme):
    """``reshard_after_forward`` true is full shard; false keeps gathered weights to backward (grad-op)."""

    @property
    def parameter_bytes(self) -> int:
        return self.job.compute_bytes

    @property
    def reshards(self) -> bool:
        return self.plan.strategy is Strategy.FSDP

    @property
    def tail(self) -> tuple[Parameter, ...]:
        """The group that stays whole: final norm and head, with the embedding where it is tied."""
        return self.model.embedding + self.model.head if self.model.tied_embeddings else self.model.head

    @property
    def shard(self) -> Amount:
        return row_shards(tuple(self.model.parameters()), self.plan.gpus)

    def _whole(self, parameters: tuple[Parameter, ...]) -> int:
        return sum(parameter.numel for parameter in parameters) * self.job.compute_bytes

    @property
    def layer_bytes(self) -> int:
        """Gathered bytes of the largest layer."""
        return max(self._whole(layer.parameters) for run in self.model.runs for layer in run.layers)

    def states(self) -> Nodes:
        shard, element_bytes = self.shard, self.job.parameter_bytes
        return (
            hold("weights, rank's share", "parameters", shard * element_bytes),
            hold("Adam moments, rank's share", "optimizer", MOMENTS * shard * element_bytes),
        )

    def begin_forward(self) -> Nodes:
        """The gather buffer of one group outlives it until the next group has been copied out."""
        return (hold("gather buffer", "buffers", self.layer_bytes),)

    def before_forward(self, part: Part) -> Nodes:
        size = self._whole(part.parameters)
        if part.kind == "embedding" and self.model.tied_embeddings:
            return (hold("gathered embedding and head", "parameters", self._whole(self.tail)), self._gather(size))
        if part.kind == "head":
            if self.model.tied_embeddings:
                return ()
            return (hold("gathered embedding and head", "parameters", size), self._gather(size))
        return (
            self._gather(size),
            scratch("gather buffer of the layer before", size, "buffers"),
            hold("gathered layer", "parameters", size),
        )

    def after_forward(self, part: Part) -> Nodes:
        if part.kind == "embedding" and self.model.tied_embeddings:
            return ()
        if part.kind == "layer" and not self.reshards:
            return ()
        return (release("gathered layer", "parameters", self._whole(part.parameters)),)

    def before_backward(self, part: Part, micro: MicroStep) -> Nodes:
        size = self._whole(part.parameters)
        if part.kind == "head" or (part.kind == "embedding" and self.model.tied_embeddings):
            return ()
        if part.kind == "layer" and not self.reshards:
            return ()
        return (self._gather(size), hold("gathered layer", "parameters", size))

    def gradient(self, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        return (Block("unsharded gradients", "gradients", size_bytes * micro.first, size_bytes, "gradients"),)

    def after_backward(self, part: Part, micro: MicroStep) -> Nodes:
        if part.kind == "head" and self.model.tied_embeddings:
            return ()
        tied_tail = part.kind == "embedding" and self.model.tied_embeddings
        parameters = self.tail if tied_tail else part.parameters
        stays = part.kind == "head" or tied_tail
        label = "gathered embedding and head" if stays else "gathered layer"
        done = release(label, "parameters", self._whole(parameters))
        # The buffer of the group before is freed for it, except before the first layer, when there is none.
        before = 0 if part.kind == "head" else self.layer_bytes
        return (*(self._reduce(parameters, before) if micro.last else ()), done)

    def _reduce(self, parameters: tuple[Parameter, ...], freed_bytes: int) -> Nodes:
        """Copy a group's gradients into one buffer, reduce-scatter it, and cast the share to the shards' format."""
        size = self._whole(parameters)
        extra = max(0, size - freed_bytes)
        share = row_shards(parameters, self.plan.gpus)
        reduce = Collective("gradients", "reduce-scatter", size, 1, waits=False)
        return (
            Block("reduce-scatter input", "buffers", 0, extra, "buffers", moved_bytes=3 * size, transfers=(reduce,)),
            release("unsharded gradients", "gradients", size),
            scratch("reduce-scatter output", share * self.job.compute_bytes, "buffers"),
            hold("gradients, rank's share", "gradients", share * self.job.parameter_bytes),
        )

    @property
    def turn_after(self) -> int | None:
        return 1

    def turn(self, micro: MicroStep) -> Nodes:
        """From the first layer on, the reduce-scatter input of one layer lives through the backward of the next."""
        return (hold("reduce-scatter input", "buffers", self.layer_bytes if micro.last else 0),)

    def end_backward(self, micro: MicroStep) -> Nodes:
        return (
            release("reduce-scatter input", "buffers", self.layer_bytes if micro.last else 0),
            release("gather buffer", "buffers", self.layer_bytes),
        )

    def update(self) -> Nodes:
        shard, element_bytes = self.shard, self.job.parameter_bytes
        largest = row_shards((self.model.largest_parameter,), self.plan.gpus)
        return (
            scratch("Adam temporaries", adam_temporaries(self.job, shard, largest, element_bytes)),
            Block("Adam update", "optimizer", moved_bytes=ADAM_MOVES * shard * element_bytes, kernels=1),
            release("gradients, rank's share", "gradients", shard * element_bytes),
        )

    def _gather(self, size_bytes: int) -> Block:
        gather = Collective("weights", "all-gather", size_bytes, 1, waits=False)
        cast = np.asarray(self.plan.gpus)
        share = size_bytes // np.maximum(cast, 1)
        return Block(
            "gather of weights", "buffers", 0, share, "buffers", moved_bytes=2 * size_bytes, transfers=(gather,)
        )
