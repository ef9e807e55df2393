"""ZeRO with optimizer states, and at stage 3 weights, in host memory (deepspeed 0.19.8, zero/offload_config.py).

Pinned host buffers are rounded up to powers of two by torch's CachingHostAllocator.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from advisor.step.flat_partition import Reduction
from advisor.step.program import Amount, Block, Copy, hold, release, scratch
from advisor.step.scheme import MicroStep, Nodes, Part
from advisor.step.states import MOMENTS
from advisor.step.zero_flat import ZeroTwo
from advisor.step.zero_three import ZeroThree


def pinned(size_bytes: Amount) -> Amount:
    """Host bytes behind a pinned tensor: the next power of two."""
    return 2 ** np.ceil(np.log2(np.maximum(size_bytes, 1))).astype(np.int64)


def _optimizer_in_host(scheme: ZeroTwo | ZeroThree) -> Nodes:
    """One rank's optimizer states and gradients on the host: 18 bytes per parameter of its share in mixed precision."""
    shard, master, state = scheme.shard, scheme.master_bytes, scheme.state_bytes
    return (
        hold("master weights (pinned)", "optimizer", pinned(shard * master) if master else 0 * shard),
        hold("optimizer's gradients (pinned)", "gradients", pinned(shard * state)),
        hold("Adam moments", "optimizer", MOMENTS * shard * state),
        hold("half-format staging (pinned)", "buffers", pinned(shard * scheme.job.compute_bytes)),
    )


def _cpu_adam(shard: Amount, half_bytes: int) -> tuple[Block, ...]:
    back = Copy("updated weights", "host-to-device", shard * half_bytes, waits=True)
    return (
        Block("Adam update on the CPU", "optimizer", host_updated_parameters=shard),
        Block("updated weights to the GPU", "temporaries", transfers=(back,)),
    )


class OffloadedZeroTwo(ZeroTwo):
    """Stage 2 with its optimizer on the host: gradients leave for the host as they are reduced."""

    def states(self) -> Nodes:
        half = self.job.compute_bytes
        return (
            hold("weights", "parameters", self.shard * self.plan.gpus * half),
            hold("buffer of the largest tensor", "buffers", self.model.largest_parameter.numel * half),
        )

    @cached_property
    def reducing(self) -> dict[Reduction, Nodes]:
        # Cast to the optimizer's format on the GPU, one tensor at a time, before it leaves for the host.
        return {
            reduction: (
                scratch("flat copy of a bucket", self._copied(reduction) * self.job.compute_bytes),
                scratch(
                    "optimizer's gradient on its way to the host",
                    max(self.sizes[tensor] for tensor in reduction.tensors) * self.state_bytes,
                    "gradients",
                ),
            )
            for reduction in self.reductions
        }

    def end_backward(self, micro: MicroStep) -> Nodes:
        half = self.job.compute_bytes
        again = 1 - micro.first
        steps: list[Copy] = []
        if micro.last:
            steps.append(Copy("gradients", "device-to-host", self.shard * self.state_bytes, waits=True))
        else:
            steps.append(Copy("accumulated gradients", "device-to-host", self.shard * half, waits=False))
        steps.append(Copy("accumulated gradients", "host-to-device", self.shard * half * again, waits=False))
        return (
            *self.reduce(self.reductions[-1], micro),
            self.all_reduce(),
            Block("gradients to the host", "temporaries", transfers=tuple(steps)),
            release("gradient buckets", "buffers", self.buckets * self.bucket_bytes),
        )

    def update(self) -> Nodes:
        return (*_cpu_adam(self.shard, self.job.compute_bytes), self.gather_updated())

    def host(self) -> Nodes:
        accumulated = self.owned_bytes * (np.asarray(self.plan.accumulation_steps) > 1)
        return (
            *_optimizer_in_host(self),
            hold("buffer of the largest tensor", "buffers", self.model.largest_parameter.numel * self.state_bytes),
            hold("accumulated gradients", "gradients", accumulated),
        )


class OffloadedZeroThree(ZeroThree):
    """Stage 3 with its optimizer, and its weights where the plan says so, on the host."""

    @property
    def master_bytes(self) -> int:
        return self.state_bytes

    def states(self) -> Nodes:
        half = self.job.compute_bytes
        on_device = 0 if self.plan.offload.parameters else 1
        return (
            hold("weights, rank's share", "parameters", self.shard * half * on_device),
            hold("small weights kept whole", "parameters", self.persistent * half),
            hold("gradient bucket", "buffers", self.bucket_bytes),
        )

    def before_forward(self, part: Part) -> Nodes:
        return (*self._fetch(part), *super().before_forward(part))

    def before_backward(self, part: Part, micro: MicroStep) -> Nodes:
        fetched = self._fetch(part) if self.gathers == 2 else ()
        return (*fetched, *super().before_backward(part, micro))

    def _fetch(self, part: Part) -> Nodes:
        if not self.plan.offload.parameters:
            return ()
        share = -(-part.numel // self.plan.gpus) * self.job.compute_bytes
        copy = Copy("weights", "host-to-device", share, waits=False)
        return (Block("weights from the host", "temporaries", transfers=(copy,)),)

    def end_backward(self, micro: MicroStep) -> Nodes:
        half, again = self.job.compute_bytes, 1 - micro.first
        copies = (
            Copy("gradients", "device-to-host", self.shard * (self.state_bytes if micro.last else half), waits=False),
            Copy("accumulated gradients", "host-to-device", self.shard * half * again, waits=False),
        )
        return (*super().end_backward(micro), Block("gradients to the host", "temporaries", transfers=copies))

    def update(self) -> Nodes:
        return _cpu_adam(self.shard, self.job.compute_bytes)

    def host(self) -> Nodes:
        half = self.job.compute_bytes
        weights = pinned(self.shard * half) if self.plan.offload.parameters else 0 * self.shard
        return (
            *_optimizer_in_host(self),
            hold("weights (pinned)", "parameters", weights),
        )
