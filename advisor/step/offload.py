"""ZeRO's stages 1 and 2 with the optimizer in host memory (deepspeed 0.19.8, runtime/zero/stage_1_and_2.py).

Stages 1 and 2 keep the optimizer in host memory even where ``offload_optimizer`` says ``nvme``. Pinned host memory is
handed out in powers of two (torch 2.13, ATen/core/CachingHostAllocator.h ``allocate``). Left out: what is on the host
only while states are made, which is less than Adam's moments take afterwards.
"""

from __future__ import annotations

from functools import cached_property, lru_cache, partial

import numpy as np

from advisor.specs.model import Parameter
from advisor.step.flat_partition import Reduction, flat_shard, gathered_from, owned, owned_total, starts
from advisor.step.program import Amount, Block, Copy, hold, release, scratch
from advisor.step.scheme import MicroStep, Nodes, Part
from advisor.step.states import FP32_BYTES, MOMENTS
from advisor.step.zero import NORM_BYTES
from advisor.step.zero_flat import ZeroFlat, ZeroOne, ZeroTwo

ROUNDED = "pinned memory rounded up to powers of two"


def pinned(size_bytes: Amount) -> Amount:
    """Host bytes behind a pinned tensor: the next power of two."""
    if isinstance(size_bytes, int):
        return 1 << (max(size_bytes, 1) - 1).bit_length()
    return 2 ** np.ceil(np.log2(np.maximum(size_bytes, 1))).astype(np.int64)


def rounded(size_bytes: Amount, pins: bool) -> Block:
    """What pinning a tensor of *size_bytes* takes beyond them."""
    more = (pinned(size_bytes) - size_bytes) * (np.asarray(size_bytes) > 0) if pins else 0
    return hold(ROUNDED, "rounding", more)


def cpu_adam(shard: Amount, half_bytes: int) -> tuple[Block, ...]:
    """DeepSpeedCPUAdam works in place; *half_bytes* per element go back to the GPU."""
    back = Copy("updated weights", "host-to-device", shard * half_bytes, waits=True)
    return (
        Block("Adam update on the CPU", "optimizer", host_updated_parameters=shard),
        Block("updated weights to the GPU", "temporaries", transfers=(back,)),
    )


def _beside_the_bucket(size_bytes: int) -> Block:
    """A gradient too large for the bucket is copied first (``reduce_independent_p_g_buckets_and_remove_grads``)."""
    return scratch("copy of a gradient too large for the bucket", size_bytes, "gradients")


@lru_cache(maxsize=512)
def norms_by_rank(sizes: tuple[int, ...], tensors: tuple[int, ...], ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """For every rank: bytes that the norms of its slices of *tensors* take at most, and what stays of them.

    *sizes* are those of all tensors. ``set_norm_for_param_grad_in_gpu`` casts a slice to fp64 and keeps its norm until
    the optimizer has stepped. The cast to the optimizer's format that follows takes no more.
    """
    peaks, kept = np.zeros(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    begins, shard = starts(sizes), int(flat_shard(sum(sizes), ranks))
    for tensor in tensors:
        owners, elements = owned(begins[tensor], sizes[tensor], shard)
        peaks[owners] = np.maximum(peaks[owners], kept[owners] + NORM_BYTES * (elements + 1))
        kept[owners] += NORM_BYTES
    return peaks, kept


class OffloadedFlat(ZeroFlat):
    """What the two stages share: a rank's slices leave for the host one after another when their bucket is reduced."""

    @property
    def pins(self) -> bool:
        return self.plan.offload_settings.pins

    @property
    def keeps_gradients(self) -> bool:
        """They leave for the host."""
        return False

    def contenders(self, ranks: int) -> np.ndarray:
        """Those whose norms take most in a reduction, where no earlier one, with more activations, took as much."""
        chosen, most = [], -1
        for reduction in self.reductions:
            peaks = self._norms(reduction, ranks)[0]
            if peaks.max() > most:
                most = int(peaks.max())
                chosen.append(int(peaks.argmax()))
        return np.array(sorted(set(chosen)))

    def states(self) -> Nodes:
        half = self.job.compute_bytes
        return (
            hold("frozen weights", "parameters", self.frozen_bytes),
            hold("weights", "parameters", self.shard * self.plan.gpus * half),
            hold("buffer of the largest tensor", "buffers", max(self.sizes) * half),
        )

    def _norms(self, reduction: Reduction, ranks: int) -> tuple[np.ndarray, np.ndarray]:
        return norms_by_rank(self.sizes, reduction.tensors, ranks)

    def _norms_at(self, at: int, reduction: Reduction, ranks: int) -> np.ndarray:
        return self._norms(reduction, ranks)[at]

    @cached_property
    def norms(self) -> dict[Reduction, Block]:
        """Of this rank, for each reduction."""
        found: dict[Reduction, Block] = {}
        for reduction in self.reductions:
            peak, kept = (
                gathered_from(partial(self._norms_at, at, reduction), self.plan.gpus, self.rank) for at in (0, 1)
            )
            found[reduction] = Block("gradient norms in fp64", "gradients", kept, peak)
        return found

    @cached_property
    def reducing(self) -> dict[Reduction, Nodes]:
        """What the last micro-step's reductions take."""
        return {
            reduction: (
                self.all_reduce(reduction, self._copied_bytes(reduction)),
                self.norms[reduction],
            )
            for reduction in self.reductions
        }

    def to_host(self) -> Copy:
        return Copy("gradients", "device-to-host", self.shard * self.state_bytes, waits=True)

    def update(self) -> Nodes:
        kept = sum((norm.net_bytes for norm in self.norms.values()), 0)
        return (
            *cpu_adam(self.shard, self.job.compute_bytes),
            release("gradient norms in fp64", "gradients", kept),
            self.gather_updated(),
        )

    def host(self) -> Nodes:
        shard, state, half, pins = self.shard, self.state_bytes, self.job.compute_bytes, self.pins
        largest = max(self.sizes) * half
        return (
            hold("master weights", "optimizer", shard * state),
            rounded(shard * state, pins),
            hold("optimizer's gradients", "gradients", shard * state),
            rounded(shard * state, pins),
            hold("half-format staging", "buffers", shard * half),
            rounded(shard * half, pins),
            hold("buffer of the largest tensor", "buffers", largest),
            rounded(largest, pins),
            hold("Adam moments", "optimizer", MOMENTS * shard * state),
            hold("gradient norm", "buffers", FP32_BYTES),
        )


class OffloadedZeroOne(OffloadedFlat, ZeroOne):
    """Stage 1: whole gradients stay on the GPU to the last micro-step, and nothing accumulates on the host."""

    @cached_property
    def reducing(self) -> dict[Reduction, Nodes]:
        half = self.job.compute_bytes
        return {
            reduction: (_beside_the_bucket(self.sizes[reduction.tensors[0]] * half), *nodes)
            if self.bypasses(reduction.tensors[0])
            else nodes
            for reduction, nodes in super().reducing.items()
        }

    def end_backward(self, micro: MicroStep) -> Nodes:
        if not micro.last:
            return ()
        return (
            *super().end_backward(micro),
            Block("gradients to the host", "temporaries", transfers=(self.to_host(),)),
        )


class OffloadedZeroTwo(OffloadedFlat, ZeroTwo):
    """Stage 2: of several micro-steps the gradients are summed in host memory, by way of the GPU."""

    @property
    def layers_apart_differ(self) -> bool:
        """Norms are taken in the last micro-step, where a bucket is reduced."""
        return True

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        nodes = super().gradient(part, parameter, size_bytes, micro)
        if parameter.numel <= self.plan.zero.reduce_bucket:
            return nodes
        return (*nodes, _beside_the_bucket(size_bytes))

    def reduce(self, reduction: Reduction, micro: MicroStep) -> Nodes:
        nodes = super().reduce(reduction, micro)
        return nodes if micro.last else tuple(node for node in nodes if node is not self.norms[reduction])

    @cached_property
    def accumulated_bytes(self) -> Amount:
        """A sum for each tensor that the partition touches, whole; pure half formats sum in the optimizer's own."""
        if self.state_bytes == self.job.compute_bytes:
            return 0
        return self._of_rank("held") * self.job.compute_bytes

    def _accumulated_rounding(self) -> Amount:
        """What pinning each of the sums takes beyond them."""
        if not self.pins or self.state_bytes == self.job.compute_bytes:
            return 0
        half = self.job.compute_bytes
        sizes = tuple(int(pinned(size * half)) - size * half for size in self.sizes)
        return gathered_from(lambda ranks: owned_total(self.sizes, sizes, ranks), self.plan.gpus, self.rank)

    def end_backward(self, micro: MicroStep) -> Nodes:
        moved = self.accumulated_bytes if self.state_bytes != self.job.compute_bytes else self.shard * self.state_bytes
        again = 1 - micro.first
        copies = [
            Copy("accumulated gradients", "device-to-host", moved * (again if micro.last else 1), waits=False),
            Copy("accumulated gradients", "host-to-device", moved * again, waits=False),
        ]
        if micro.last:
            copies.insert(0, self.to_host())
        return (
            *self.reduce(self.reductions[-1], micro),
            Block("gradients to the host", "temporaries", transfers=tuple(copies)),
            release("gradient buckets", "buffers", self.buckets * self.bucket_bytes),
        )

    def host(self) -> Nodes:
        several = np.asarray(self.plan.accumulation_steps) > 1
        return (
            *super().host(),
            hold("accumulated gradients", "gradients", self.accumulated_bytes * several),
            hold(ROUNDED, "rounding", self._accumulated_rounding() * several),
        )
