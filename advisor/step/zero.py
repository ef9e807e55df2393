"""DeepSpeed ZeRO stages 1 to 3 without offload (deepspeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py).

A bf16 or fp16 model keeps half-format weights; its fp32 copy and Adam's moments are cut over the ranks. With
parameters in fp32 and no half format, there is no second copy of the weights.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from advisor.specs.model import Parameter
from advisor.specs.plan import Checkpointing
from advisor.step.program import Amount, Block, Collective, hold, release, scratch
from advisor.step.scheme import MicroStep, Nodes, Part, Scheme
from advisor.step.states import (
    ADAM_MOVES,
    FP32_BYTES,
    MOMENTS,
    NORM_COPIES,
    Owned,
    adam_temporaries,
    flat_shard,
    owned_gradients,
    tensor_shards,
)

NORM_BYTES = 8
"""The gradient norm is taken in fp64, a tensor at a time (zero/utils.py ``get_norm_dtype``)."""


class Zero(Scheme):
    """What the stages share."""

    @property
    def parameter_bytes(self) -> int:
        return self.job.compute_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes per element of moments and of the gradients that the optimizer reads: fp32, or all in pure bf16."""
        return self.job.parameter_bytes

    @property
    def master_bytes(self) -> int:
        """Bytes per element of the optimizer's own copy of the weights; none where the weights are fp32 themselves."""
        return 0 if self.job.compute_bytes == FP32_BYTES else self.state_bytes

    @property
    def bucket_bytes(self) -> int:
        return self.plan.zero.reduce_bucket * self.job.compute_bytes

    @property
    def filled_bucket_bytes(self) -> int:
        """What a bucket holds when it is reduced: never more than the model."""
        return min(self.bucket_bytes, self.model.parameter_count * self.job.compute_bytes)

    @cached_property
    def filling_layer(self) -> int | None:
        """The layer whose gradients first fill a bucket in backward; None where none does."""
        left = self.plan.zero.reduce_bucket - self.model.head_count
        sizes = [layer.parameter_count for layer in self.model.layers]
        for number in range(len(sizes) - 1, -1, -1):
            left -= sizes[number]
            if left <= 0:
                return number
        return None

    @cached_property
    def layers_apart(self) -> frozenset[int]:
        return frozenset() if self.filling_layer is None else frozenset({self.filling_layer})

    def after_backward(self, part: Part, micro: MicroStep) -> Nodes:
        return self.flush(micro) if part.number in self.layers_apart else ()

    def flush(self, micro: MicroStep) -> Nodes:
        """The first full bucket is reduced."""
        return ()

    def gather_updated(self) -> Block:
        payload = self.model.parameter_count * self.job.compute_bytes
        gather = Collective("updated weights", "all-gather", payload, 1, waits=True)
        return Block("all-gather of weights", "temporaries", transfers=(gather,))

    def adam(self, elements: Amount, label: str = "Adam update") -> Block:
        return Block(label, "optimizer", moved_bytes=ADAM_MOVES * self.state_bytes * elements, kernels=1)


class ZeroOneTwo(Zero):
    """Stages 1 and 2: one flat buffer of weights on every rank, its optimizer states cut over the ranks."""

    @cached_property
    def shard(self) -> Amount:
        return flat_shard(self.model.parameter_count, self.plan.gpus)

    @property
    def keeps_gradients(self) -> bool:
        """Stage 1 keeps every gradient to the last micro-step; stage 2 only those that touch its partition."""
        return self.plan.strategy.zero_stage == 1

    @property
    def buckets(self) -> int:
        return 2 if self.plan.zero.overlap_communication else 1

    @cached_property
    def owned(self) -> Owned:
        return owned_gradients(self.model, self.plan.gpus)

    @property
    def owned_bytes(self) -> Amount:
        """Gradients that the worst rank keeps for its partition once backward is done."""
        return self.owned.worst * self.job.compute_bytes

    @property
    def early_owned_bytes(self) -> Amount:
        """Those kept before the embedding's gradient comes: an envelope over the ranks, the last being first."""
        return np.minimum(self.owned.worst, self.owned.last) * self.job.compute_bytes

    def states(self) -> Nodes:
        shard, whole = self.shard, self.shard * self.plan.gpus
        return (
            # Flattened into one buffer while the model's own tensors are still there.
            Block("weights", "parameters", whole * self.job.compute_bytes, 2 * whole * self.job.compute_bytes),
            hold("master weights, rank's share", "optimizer", shard * self.master_bytes),
            scratch("first zero gradient", shard * self.state_bytes),
            hold("Adam moments, rank's share", "optimizer", MOMENTS * shard * self.state_bytes),
        )

    def first_gradient(self, micro: MicroStep) -> Nodes:
        opens = micro.first if self.keeps_gradients else 1
        return (hold("gradient buckets", "buffers", self.buckets * self.bucket_bytes * opens),)

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        if self.keeps_gradients:
            return (Block("gradients", "gradients", size_bytes * micro.first, size_bytes, "gradients"),)
        if parameter != self.model.embedding[0] or not self._bypasses(parameter):
            return (scratch("gradients", size_bytes, "gradients"),)
        # Too large for the bucket, it stays beside it while that is reduced and the rank's own are copied out.
        rest = self.owned_bytes - self.early_owned_bytes
        return (scratch("gradients", size_bytes + self.filled_bucket_bytes + rest, "gradients"),)

    def _bypasses(self, parameter: Parameter) -> bool:
        return parameter.numel > self.plan.zero.reduce_bucket

    def flush(self, micro: MicroStep) -> Nodes:
        if self.keeps_gradients:
            return ()
        return (
            scratch("flat copy of a bucket", self.filled_bucket_bytes),
            hold("gradients of the rank's partition", "gradients", self.early_owned_bytes),
        )

    def end_backward(self, micro: MicroStep) -> Nodes:
        if self.keeps_gradients:
            return self._reduce_kept() if micro.last else ()
        owned = self.owned_bytes
        rest = owned - self.early_owned_bytes if self.filling_layer is not None else owned
        again = 1 - micro.first
        return (
            scratch("flat copy of a bucket", self.filled_bucket_bytes),
            hold("gradients of the rank's partition", "gradients", rest),
            self._reduce(),
            release("gradient buckets", "buffers", self.buckets * self.bucket_bytes),
            # A later micro-step adds its own copy to the one that stays.
            release("gradients of the rank's partition", "gradients", owned * again),
        )

    def _reduce(self) -> Block:
        # reduce_scatter with use_multi_rank_bucket_allreduce (both defaults) sends an all-reduce per bucket.
        payload = self.model.parameter_count * self.job.compute_bytes
        messages = -(-self.model.parameter_count // self.plan.zero.reduce_bucket)
        waits = not self.plan.zero.overlap_communication
        reduce = Collective("gradients", "all-reduce", payload, messages, waits)
        return Block("gradient all-reduce", "temporaries", moved_bytes=4 * payload, transfers=(reduce,))

    def _reduce_kept(self) -> Nodes:
        """Stage 1 moves each gradient into the bucket, which frees it, and copies its own out again."""
        whole = self.model.parameter_count * self.job.compute_bytes
        # Reduction starts with the first tensor registered, the embedding.
        moved = 0 if self._bypasses(self.model.embedding[0]) else min(self.bucket_bytes, whole)
        return (
            release("gradients", "gradients", moved),
            scratch("flat copy of a bucket", self.filled_bucket_bytes),
            hold("gradients of the rank's partition", "gradients", self.owned_bytes),
            self._reduce(),
            release("gradients", "gradients", whole - moved),
            release("gradient buckets", "buffers", self.buckets * self.bucket_bytes),
        )

    def update(self) -> Nodes:
        shard, owned, half = self.shard, self.owned_bytes, self.job.compute_bytes
        beside = (self.owned.worst_with_norm - self.owned.worst) * NORM_BYTES // NORM_COPIES
        return (
            scratch("gradient norm in fp64", beside),
            hold("flat gradient, rank's share", "temporaries", half * shard),
            hold("optimizer's gradient, rank's share", "gradients", self.state_bytes * shard),
            release("flat gradient, rank's share", "temporaries", half * shard),
            release("gradients of the rank's partition", "gradients", owned),
            scratch("Adam temporaries", adam_temporaries(self.job, shard, shard, self.state_bytes)),
            self.adam(shard),
            release("optimizer's gradient, rank's share", "gradients", self.state_bytes * shard),
            self.gather_updated(),
        )


class ZeroThree(Zero):
    """Stage 3: weights too are cut, tensor by tensor, and gathered for use."""

    @cached_property
    def shard(self) -> Amount:
        return tensor_shards(tuple(self.model.parameters()), self.plan.gpus)

    @cached_property
    def persistent(self) -> int:
        """Elements of the small tensors that every rank keeps whole."""
        threshold = self.plan.zero.persistence_threshold
        return sum(each.numel for each in self.model.parameters() if each.numel <= threshold)

    @cached_property
    def gathered(self) -> int:
        """Elements that are whole at once. Prefetch runs ahead until max_live; release spares what is reused soon.

        partitioned_param_coordinator.py. An envelope: the window is taken as full from the first gather to the last.
        """
        zero, count = self.plan.zero, self.model.parameter_count - self.persistent
        window = zero.max_live_parameters + self.model.largest_parameter.numel
        turn = 6 if self.plan.checkpointing is Checkpointing.FULL else 2
        return min(count, max(window, zero.max_reuse_distance // turn))

    @cached_property
    def gathers(self) -> int:
        """Gathers of the whole model in a micro-step: one where it stays whole from forward to backward."""
        return 1 if self.gathered >= self.model.parameter_count - self.persistent else 2

    def states(self) -> Nodes:
        shard, half = self.shard, self.job.compute_bytes
        return (
            hold("weights, rank's share", "parameters", shard * half),
            hold("small weights kept whole", "parameters", self.persistent * half),
            hold("gradients, rank's share", "gradients", shard * half),
            hold("gradient bucket", "buffers", self.bucket_bytes),
            hold("master weights, rank's share", "optimizer", shard * self.master_bytes),
            scratch("first zero gradient", shard * self.state_bytes),
            hold("Adam moments, rank's share", "optimizer", MOMENTS * shard * self.state_bytes),
        )

    def begin_forward(self) -> Nodes:
        gathered = self.gathered * self.job.compute_bytes
        whole = self.gathers == 1
        return (
            Block("gathered weights", "parameters", gathered, gathered + self.coalesced_bytes, "buffers"),
            hold("coalesced gather", "buffers", 0 if whole else self.coalesced_bytes),
        )

    @property
    def coalesced_bytes(self) -> int:
        """Several tensors fetched together arrive in one flat buffer, from which each is copied."""
        count = self.model.parameter_count - self.persistent
        return min(self.plan.zero.prefetch_bucket, count) * self.job.compute_bytes

    def before_forward(self, part: Part) -> Nodes:
        return (self._gather(part),)

    def before_backward(self, part: Part, micro: MicroStep) -> Nodes:
        return (self._gather(part),) if self.gathers == 2 else ()

    def _gather(self, part: Part) -> Block:
        payload = part.numel * self.job.compute_bytes
        messages = max(1, part.numel // self.plan.zero.prefetch_bucket)
        gather = Collective("weights", "all-gather", payload, messages, waits=False)
        return Block("gather of weights", "temporaries", moved_bytes=payload, transfers=(gather,))

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        return (scratch("gradients", size_bytes, "gradients"),)

    def after_backward(self, part: Part, micro: MicroStep) -> Nodes:
        payload = part.numel * self.job.compute_bytes
        reduce = Collective("gradients", "reduce-scatter", payload, 1, waits=False)
        scattered = Block("gradient reduce-scatter", "temporaries", moved_bytes=4 * payload, transfers=(reduce,))
        return (scattered, *super().after_backward(part, micro))

    def flush(self, micro: MicroStep) -> Nodes:
        return (scratch("flat copy of a bucket", self.filled_bucket_bytes),)

    def end_backward(self, micro: MicroStep) -> Nodes:
        return (
            scratch("flat copy of a bucket", self.filled_bucket_bytes),
            release("gathered weights", "parameters", self.gathered * self.job.compute_bytes),
            release("coalesced gather", "buffers", 0 if self.gathers == 1 else self.coalesced_bytes),
        )

    def update(self) -> Nodes:
        shard, half = self.shard, self.job.compute_bytes
        piece = np.minimum(shard, self.plan.zero.sub_group)
        largest = -(-self.model.largest_parameter.numel // self.plan.gpus)
        payload = self.persistent * half
        gather = Collective("small weights", "all-gather", payload, 1, waits=True)
        return (
            scratch("gradient norm in fp64", NORM_BYTES * largest),
            hold("optimizer's gradient of a sub-group", "gradients", self.state_bytes * piece),
            scratch("flat gradient of a sub-group", half * piece),
            scratch("Adam temporaries", adam_temporaries(self.job, piece, piece, self.state_bytes)),
            self.adam(shard),
            release("optimizer's gradient of a sub-group", "gradients", self.state_bytes * piece),
            Block("all-gather of small weights", "temporaries", transfers=(gather,)),
        )

    def host_once(self) -> Nodes:
        """transformers' ZeRO-3 loading: rank 0 reads the whole checkpoint and sends it to the others."""
        whole = self.model.parameter_count * self.job.compute_bytes
        return (scratch("weights while loading", whole, "parameters"),)
