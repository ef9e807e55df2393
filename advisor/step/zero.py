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
    adam_temporaries,
    flat_shard,
    tensor_shards,
    touching,
)

NORM_BYTES = 8
"""The gradient norm is taken in fp64, a tensor at a time (zero/utils.py ``get_norm_dtype``)."""


CHECKPOINT_FILE_BYTES = 5 * 10**9
"""transformers writes checkpoints in files of at most this size (``max_shard_size``)."""


class Zero(Scheme):
    """What the stages share."""

    @property
    def parameter_bytes(self) -> int:
        return self.job.compute_bytes

    @property
    def master_bytes(self) -> int:
        """Bytes per element of the fp32 copy; none where the weights are fp32 themselves."""
        return 0 if self.job.compute_bytes == FP32_BYTES else FP32_BYTES

    @property
    def bucket_bytes(self) -> int:
        return self.plan.zero.reduce_bucket * self.job.compute_bytes

    @property
    def filled_bucket_bytes(self) -> int:
        """What a bucket holds when it is reduced: never more than the model."""
        return min(self.bucket_bytes, self.model.parameter_count * self.job.compute_bytes)

    @property
    def turn_after(self) -> int | None:
        return self.plan.zero.reduce_bucket

    def gather_updated(self) -> Block:
        payload = self.model.parameter_count * self.job.compute_bytes
        gather = Collective("updated weights", "all-gather", payload, 1, waits=True)
        return Block("all-gather of weights", "temporaries", transfers=(gather,))

    def adam(self, elements: Amount, label: str = "Adam update") -> Block:
        return Block(label, "optimizer", moved_bytes=ADAM_MOVES * FP32_BYTES * elements, kernels=1)


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
    def owned(self) -> tuple[Amount, Amount]:
        """Bytes of gradients that the worst rank keeps for its partition: once backward is done, and before the
        embedding's. An envelope over the ranks: each part is the largest that any rank holds at that time."""
        worst, last = touching(self.model, self.plan.gpus)
        return worst * self.job.compute_bytes, np.minimum(worst, last) * self.job.compute_bytes

    def states(self) -> Nodes:
        shard, whole = self.shard, self.shard * self.plan.gpus
        return (
            hold("weights", "parameters", whole * self.job.compute_bytes),
            hold("fp32 weights, rank's share", "optimizer", shard * self.master_bytes),
            scratch("first zero gradient", shard * FP32_BYTES),
            hold("Adam moments, rank's share", "optimizer", MOMENTS * shard * FP32_BYTES),
        )

    def first_gradient(self, micro: MicroStep) -> Nodes:
        opens = micro.first if self.keeps_gradients else 1
        return (hold("gradient buckets", "buffers", self.buckets * self.bucket_bytes * opens),)

    def gradient(self, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        kept = micro.first if self.keeps_gradients else 0
        return (Block("gradients", "gradients", size_bytes * kept, size_bytes, "gradients"),)

    def turn(self, micro: MicroStep) -> Nodes:
        if self.keeps_gradients:
            return ()
        return (
            scratch("flat copy of a bucket", self.filled_bucket_bytes),
            hold("gradients of the rank's partition", "gradients", self.owned[1]),
        )

    def _turned(self) -> bool:
        return self.plan.zero.reduce_bucket <= self.model.parameter_count - self.model.embedding_count

    def end_backward(self, micro: MicroStep) -> Nodes:
        if self.keeps_gradients:
            return self._reduce_kept() if micro.last else ()
        owned, early = self.owned
        rest = owned - early if self._turned() else owned
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
        moved = min(self.bucket_bytes, whole)
        return (
            release("gradients", "gradients", moved),
            scratch("flat copy of a bucket", self.filled_bucket_bytes),
            hold("gradients of the rank's partition", "gradients", self.owned[0]),
            self._reduce(),
            release("gradients", "gradients", whole - moved),
            release("gradient buckets", "buffers", self.buckets * self.bucket_bytes),
        )

    def update(self) -> Nodes:
        shard, owned, half = self.shard, self.owned[0], self.job.compute_bytes
        largest_slice = np.minimum(self.model.largest_parameter.numel, shard)
        return (
            scratch("gradient norm in fp64", NORM_BYTES * largest_slice),
            hold("flat gradient, rank's share", "temporaries", half * shard),
            hold("fp32 gradient, rank's share", "gradients", FP32_BYTES * shard),
            release("flat gradient, rank's share", "temporaries", half * shard),
            release("gradients of the rank's partition", "gradients", owned),
            scratch("Adam temporaries", adam_temporaries(self.job, shard, shard, FP32_BYTES)),
            self.adam(shard),
            release("fp32 gradient, rank's share", "gradients", FP32_BYTES * shard),
            self.gather_updated(),
        )


class ZeroThree(Zero):
    """Stage 3: weights too are cut, tensor by tensor, and gathered for use.

    ``zero3_init_flag`` cuts them while they load, a checkpoint file at a time.
    """

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
            hold("fp32 weights, rank's share", "optimizer", shard * self.master_bytes),
            scratch("first zero gradient", shard * FP32_BYTES),
            hold("Adam moments, rank's share", "optimizer", MOMENTS * shard * FP32_BYTES),
        )

    def begin_forward(self) -> Nodes:
        return (hold("gathered weights", "parameters", self.gathered * self.job.compute_bytes),)

    def before_forward(self, part: Part) -> Nodes:
        return (self._gather(part),)

    def before_backward(self, part: Part, micro: MicroStep) -> Nodes:
        return (self._gather(part),) if self.gathers == 2 else ()

    def _gather(self, part: Part) -> Block:
        payload = part.numel * self.job.compute_bytes
        messages = max(1, part.numel // self.plan.zero.prefetch_bucket)
        gather = Collective("weights", "all-gather", payload, messages, waits=False)
        return Block("gather of weights", "temporaries", moved_bytes=payload, transfers=(gather,))

    def gradient(self, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        return (scratch("gradients", size_bytes, "gradients"),)

    def after_backward(self, part: Part, micro: MicroStep) -> Nodes:
        payload = part.numel * self.job.compute_bytes
        reduce = Collective("gradients", "reduce-scatter", payload, 1, waits=False)
        return (Block("gradient reduce-scatter", "temporaries", moved_bytes=4 * payload, transfers=(reduce,)),)

    def turn(self, micro: MicroStep) -> Nodes:
        return (scratch("flat copy of a bucket", self.filled_bucket_bytes),)

    def end_backward(self, micro: MicroStep) -> Nodes:
        return (
            scratch("flat copy of a bucket", self.filled_bucket_bytes),
            release("gathered weights", "parameters", self.gathered * self.job.compute_bytes),
        )

    def update(self) -> Nodes:
        shard, half = self.shard, self.job.compute_bytes
        piece = np.minimum(shard, self.plan.zero.sub_group)
        largest = -(-self.model.largest_parameter.numel // self.plan.gpus)
        payload = self.persistent * half
        gather = Collective("small weights", "all-gather", payload, 1, waits=True)
        return (
            scratch("gradient norm in fp64", NORM_BYTES * largest),
            hold("fp32 gradient of a sub-group", "gradients", FP32_BYTES * piece),
            scratch("flat gradient of a sub-group", half * piece),
            scratch("Adam temporaries", adam_temporaries(self.job, piece, piece, FP32_BYTES)),
            self.adam(shard),
            release("fp32 gradient of a sub-group", "gradients", FP32_BYTES * piece),
            Block("all-gather of small weights", "temporaries", transfers=(gather,)),
        )

    def host(self) -> Nodes:
        whole = self.model.parameter_count * self.job.compute_bytes
        return (scratch("checkpoint file while loading", min(whole, CHECKPOINT_FILE_BYTES), "parameters"),)
