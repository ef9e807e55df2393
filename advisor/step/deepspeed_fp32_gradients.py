"""DeepSpeed stages 1 and 2 where gradients accumulate in fp32 (``data_types.grad_accum_dtype``), deepspeed 0.19.8.

For bf16, stage 1 becomes another optimizer class, whose fp32 gradients cover the whole model
(runtime/bf16_optimizer.py). Stage 2 adds every reduced slice to an fp32 buffer of exactly a rank's share
(runtime/zero/stage_1_and_2.py ``_use_compact_grad_partition_buffer``).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from advisor.specs.model import Parameter
from advisor.step.flat_partition import Reduction, flat_shard, gathered_from
from advisor.step.optimizers.rule import Given, flat
from advisor.step.program import Amount, Block, Collective, hold, release, scratch
from advisor.step.scheme import MicroStep, Nodes, Part
from advisor.step.states import FP32_BYTES
from advisor.step.zero import NORM_BYTES, Zero
from advisor.step.zero_flat import ZeroTwo


class Bf16Optimizer(Zero):
    """Stage 1 in bf16: half gradients of the whole model, and fp32 ones into which each micro-step's are added."""

    @cached_property
    def shard(self) -> Amount:
        return flat_shard(self.model.parameter_count, self.plan.gpus)

    @cached_property
    def given(self) -> Given:
        return flat(self.shard, FP32_BYTES, ", rank's share")

    @property
    def state_bytes(self) -> int:
        return FP32_BYTES

    def states(self) -> Nodes:
        shard, half = self.shard, self.job.compute_bytes
        whole = shard * self.plan.gpus
        return (
            Block("weights", "parameters", whole * half, 2 * whole * half),
            hold("master weights, rank's share", "optimizer", shard * FP32_BYTES),
            hold("fp32 gradients", "gradients", whole * FP32_BYTES),
            *self.kept(),
        )

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        # Set to zero between micro-steps, not freed.
        return (Block("gradients", "gradients", size_bytes * micro.first, size_bytes, "gradients"),)

    def end_backward(self, micro: MicroStep) -> Nodes:
        added = scratch("gradient cast to fp32", self.model.largest_parameter.numel * FP32_BYTES)
        return (added, self._all_reduce()) if micro.last else (added,)

    def _all_reduce(self) -> Block:
        payload = self.shard * self.plan.gpus * self.job.compute_bytes
        reduce = Collective("gradients", "all-reduce", payload, 1, waits=True)
        return Block(
            "half-format copy of the gradients",
            "temporaries",
            peak_bytes=payload,
            moved_bytes=4 * payload,
            transfers=(reduce,),
        )

    def update(self) -> Nodes:
        return (
            *self.optimizer.update(self.given),
            self.gather_updated(),
            release("gradients", "gradients", self.model.parameter_count * self.job.compute_bytes),
        )


class ZeroTwoFp32Gradients(ZeroTwo):
    """Stage 2: the slices that are a rank's own are added to its fp32 share, which stays from the first to the step."""

    def contenders(self, ranks: int) -> np.ndarray:
        """All: which slices a rank casts during a reduction differs from one reduction to the next."""
        return np.arange(ranks)

    @property
    def micro_steps_differ(self) -> bool:
        """The first takes the fp32 share when the first slice comes."""
        return True

    @property
    def keeps_gradients(self) -> bool:
        """They are added to the fp32 share."""
        return False

    @cached_property
    def reducing(self) -> dict[Reduction, Nodes]:
        half = self.job.compute_bytes
        found: dict[Reduction, Nodes] = {}
        for reduction in self.reductions:
            slices = gathered_from(lambda ranks, each=reduction: self._slices(each, ranks), self.plan.gpus, self.rank)  # type: ignore[misc]
            # The rank's own slices are not joined with their neighbours, so several of them alone are copied too.
            alone = gathered_from(lambda ranks, each=reduction: self._all_own(each, ranks), self.plan.gpus, self.rank)  # type: ignore[misc]
            copy = self._copied_bytes(reduction) + alone * half
            found[reduction] = (self.all_reduce(reduction, copy + slices * FP32_BYTES),)
        return found

    def _slices(self, reduction: Reduction, ranks: int) -> np.ndarray:
        """For every rank, elements of the largest slice that it owns of one tensor in *reduction*."""
        shard = int(flat_shard(self.model.parameter_count, ranks))
        found = np.zeros(ranks, dtype=np.int64)
        for tensor in reduction.tensors:
            start, end = self.starts[tensor], self.starts[tensor] + self.sizes[tensor]
            for owner in range(start // shard, (end - 1) // shard + 1):
                piece = min(end, (owner + 1) * shard) - max(start, owner * shard)
                found[owner] = max(found[owner], piece)
        return found

    def _all_own(self, reduction: Reduction, ranks: int) -> np.ndarray:
        """For every rank, the elements of *reduction* where it holds several tensors, all of them its own."""
        shard = int(flat_shard(self.model.parameter_count, ranks))
        found = np.zeros(ranks, dtype=np.int64)
        owners = {self.starts[tensor] // shard for tensor in reduction.tensors}
        owners |= {(self.starts[tensor] + self.sizes[tensor] - 1) // shard for tensor in reduction.tensors}
        if len(owners) == 1 and len(reduction.tensors) > 1:
            found[owners.pop()] = sum(self.sizes[tensor] for tensor in reduction.tensors)
        return found

    def reduce(self, reduction: Reduction, micro: MicroStep) -> Nodes:
        number = self.reductions.index(reduction)
        begins = micro.first * (self._of_rank("first_reduction") == number)
        share = hold("fp32 gradients, rank's share", "gradients", self.shard * FP32_BYTES * begins)
        alone = self.bypasses(reduction.tensors[0])
        waited = self.sizes[reduction.tensors[0]] * self.job.compute_bytes if alone else 0
        dropped = waited * (1 - self._owns(reduction)) if alone else 0
        return (share, *self.reducing[reduction], release("gradients", "gradients", dropped))

    def end_backward(self, micro: MicroStep) -> Nodes:
        # A rank that owns padding alone makes its share at the end; own gradients too large for a bucket stay to it.
        never = self._of_rank("first_reduction") == len(self.reductions)
        late = self.shard * FP32_BYTES * never if micro.last else 0
        left: Amount = 0
        for reduction in self.reductions:
            if self.bypasses(reduction.tensors[0]):
                left = left + self.sizes[reduction.tensors[0]] * self.job.compute_bytes * self._owns(reduction)
        return (
            *self.reduce(self.reductions[-1], micro),
            hold("fp32 gradients, rank's share", "gradients", late),
            release("gradient buckets", "buffers", self.buckets * self.bucket_bytes),
            release("gradients", "gradients", left),
        )

    def update(self) -> Nodes:
        shard = self.shard
        return (
            scratch("gradient norm in fp64", self._of_rank("largest_slice") * NORM_BYTES),
            *self.optimizer.update(self.given),
            release("fp32 gradients, rank's share", "gradients", shard * FP32_BYTES),
            self.gather_updated(),
        )
