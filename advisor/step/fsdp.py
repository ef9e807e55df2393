"""PyTorch FSDP2 as accelerate 1.15 sets it up (torch 2.13, torch/distributed/fsdp/_fully_shard).

Each layer is a group; the embedding is one, and final norm and head another that stays whole once gathered. Where
the head is tied to the embedding, both are in that last group. Weights are held in the parameter format (accelerate
upcasts to fp32), gathered and reduced in the half format.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from advisor.specs.model import Parameter
from advisor.specs.plan import Strategy
from advisor.step.program import Amount, Block, Collective, hold, release, scratch
from advisor.step.scheme import MicroStep, Nodes, Part, Scheme
from advisor.step.states import ADAM_MOVES, MOMENTS, adam_step_counters, adam_temporaries, row_shards


class FullyShardedDataParallel(Scheme):
    """``reshard_after_forward`` true is full shard; false keeps gathered weights to backward (grad-op)."""

    @property
    def parameter_bytes(self) -> int:
        return self.job.compute_bytes

    @property
    def reshards(self) -> bool:
        return self.plan.strategy is Strategy.FSDP

    @cached_property
    def tail(self) -> tuple[Parameter, ...]:
        """The group that stays whole: final norm and head, with the embedding where it is tied."""
        return self.model.embedding + self.model.head if self.model.tied_embeddings else self.model.head

    @cached_property
    def shard(self) -> Amount:
        return row_shards(tuple(self.model.parameters()), self.plan.gpus)

    def _whole(self, parameters: tuple[Parameter, ...]) -> int:
        return sum(parameter.numel for parameter in parameters) * self.job.compute_bytes

    @cached_property
    def layer_bytes(self) -> int:
        """Gathered bytes of the largest layer."""
        return max(self._whole(layer.parameters) for run in self.model.runs for layer in run.layers)

    def states(self) -> Nodes:
        shard, element_bytes = self.shard, self.job.parameter_bytes
        return (
            hold("weights, rank's share", "parameters", shard * element_bytes),
            hold("Adam moments, rank's share", "optimizer", MOMENTS * shard * element_bytes),
            hold("Adam step counters", "optimizer", adam_step_counters(self.job, self.model.tensor_count)),
        )

    def before_forward(self, part: Part) -> Nodes:
        size = self._whole(part.parameters)
        if part.kind == "embedding":
            first = self._first_group_bytes
            return (
                self._gather(first),
                hold("gather buffer", "buffers", first),
                hold(self._label(part), "parameters", first),
            )
        if part.kind == "head":
            if self.model.tied_embeddings:
                return ()
            # Its gather buffer takes the place of the last layer's and stays to the end of forward.
            return (
                hold("gather buffer", "buffers", size - self.layer_bytes),
                self._gather(size),
                Block(self._label(part), "parameters", size, size + self.layer_bytes, "buffers"),
            )
        return (
            self._gather(size),
            scratch("gather buffer of the layer before", size, "buffers"),
            hold(self._label(part), "parameters", size),
        )

    def after_forward(self, part: Part) -> Nodes:
        size = self._whole(part.parameters)
        resharded = self.reshards and not (part.kind == "embedding" and self.model.tied_embeddings)
        done = (release(self._label(part), "parameters", size),) if resharded else ()
        if part.kind != "embedding":
            return done
        # A group's gather buffer outlives it until the next group has been copied out of its own.
        layer = self.layer_bytes
        return (
            *done,
            scratch("first gathered layer and its buffer", 2 * layer, "buffers"),
            release("gather buffer", "buffers", self._first_group_bytes - layer),
        )

    def _label(self, part: Part) -> str:
        if part.kind == "head" or (part.kind == "embedding" and self.model.tied_embeddings):
            return "gathered head" if part.kind == "head" else "gathered embedding and head"
        return f"gathered {part.kind}"

    @cached_property
    def _first_group_bytes(self) -> int:
        """Gathered bytes of the group that the embedding is in."""
        return self._whole(self.tail if self.model.tied_embeddings else self.model.embedding)

    def end_forward(self) -> Nodes:
        kept = self.layer_bytes if self.model.tied_embeddings else self._whole(self.tail)
        return (release("gather buffer", "buffers", kept),)

    def before_backward(self, part: Part, micro: MicroStep) -> Nodes:
        if not self.reshards or part.kind == "head":
            return ()
        size = self._whole(part.parameters)
        if part.kind == "layer":
            return (self._gather(size), hold(self._label(part), "parameters", size))
        last = release("gather buffer", "buffers", self.layer_bytes)
        if self.model.tied_embeddings:
            return (last,)
        return (self._gather(size), last, Block("gathered embedding", "parameters", size, 2 * size, "buffers"))

    def first_gradient(self, micro: MicroStep) -> Nodes:
        """From the head on, the next group's gather is under way."""
        return (hold("gather buffer", "buffers", self.layer_bytes if self.reshards else 0),)

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        return (Block("unsharded gradients", "gradients", size_bytes * micro.first, size_bytes, "gradients"),)

    def after_backward(self, part: Part, micro: MicroStep) -> Nodes:
        if part.kind == "head" and self.model.tied_embeddings:
            return ()
        tied_tail = part.kind == "embedding" and self.model.tied_embeddings
        parameters = self.tail if tied_tail else part.parameters
        done = release(self._label(part), "parameters", self._whole(parameters))
        reduced = self._reduce(part, parameters) if micro.last else ()
        return (done, *reduced, *(self._first_reduced(micro) if part.number in self.layers_apart else ()))

    def _reduce(self, part: Part, parameters: tuple[Parameter, ...]) -> Nodes:
        """Copy a group's gradients into one buffer, reduce-scatter it, and cast the share to the shards' format.

        The buffer lives until the next group's takes its place; the head's is the first.
        """
        size = self._whole(parameters)
        share = row_shards(parameters, self.plan.gpus)
        kept, extra = (size, size) if part.kind == "head" else (0, max(0, size - self.layer_bytes))
        reduce = Collective("gradients", "reduce-scatter", size, 1, waits=False)
        return (
            Block("reduce-scatter input", "buffers", kept, extra, "buffers", moved_bytes=3 * size, transfers=(reduce,)),
            _with_output("gradients, rank's share", share * self.job.parameter_bytes, share * self.job.compute_bytes),
            release("unsharded gradients", "gradients", size),
        )

    @cached_property
    def layers_apart(self) -> frozenset[int]:
        """The last layer, whose backward is the first."""
        return frozenset({len(self.model.layers) - 1})

    def _first_reduced(self, micro: MicroStep) -> Nodes:
        """After the first layer its reduce-scatter input lives on, through the backward of the layer that follows."""
        if not micro.last:
            return ()
        layer = self.layer_bytes
        if self.model.tied_embeddings:
            # Its gradients were there beside it while they were copied in.
            return (Block("reduce-scatter input", "buffers", layer, 2 * layer, "buffers"),)
        return (release("reduce-scatter input", "buffers", self._whole(self.tail) - layer),)

    def end_backward(self, micro: MicroStep) -> Nodes:
        return (release("reduce-scatter input", "buffers", self.layer_bytes if micro.last else 0),)

    def update(self) -> Nodes:
        shard, element_bytes = self.shard, self.job.parameter_bytes
        largest = row_shards((self.model.largest_parameter,), self.plan.gpus)
        return (
            scratch("Adam temporaries", adam_temporaries(self.job, shard, largest, element_bytes)),
            Block("Adam update", "optimizer", moved_bytes=ADAM_MOVES * shard * element_bytes, kernels=1),
            release("gradients, rank's share", "gradients", shard * element_bytes),
        )

    def host_once(self) -> Nodes:
        """``cpu_ram_efficient_loading``: rank 0 alone reads the weights and sends them to the others."""
        size = self.model.parameter_count * self.job.parameter_bytes
        return (scratch("weights while loading", size, "parameters"),)

    def _gather(self, size_bytes: int) -> Block:
        gather = Collective("weights", "all-gather", size_bytes, 1, waits=False)
        cast = np.asarray(self.plan.gpus)
        share = size_bytes // np.maximum(cast, 1)
        return Block(
            "gather of weights", "buffers", 0, share, "buffers", moved_bytes=2 * size_bytes, transfers=(gather,)
        )


def _with_output(label: str, share_bytes: Amount, output_bytes: Amount) -> Block:
    """The reduced share in the shards' format, while the reduce-scatter's output in the half format is still there."""
    return Block(label, "gradients", share_bytes, share_bytes + output_bytes, "buffers")
