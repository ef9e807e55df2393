"""ZeRO's stage 3 with the optimizer, and the weights where the plan says so, in host memory.

deepspeed 0.19.8, runtime/zero/stage3.py and partition_parameters.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from advisor.step.flat_partition import Reduction
from advisor.step.offload import ROUNDED, cpu_adam, pinned, rounded
from advisor.step.program import Amount, Block, Collective, Copy, hold, release, released
from advisor.step.scheme import MicroStep, Nodes, Part
from advisor.step.states import FP32_BYTES, MOMENTS, tensor_shards
from advisor.step.zero import NORM_BYTES
from advisor.step.zero_three import ZeroThree, shares

NORM_ELEMENTS = 250_000_000
"""Elements that are cast to fp64 at once (``_constant_buffered_norm2``)."""


class OffloadedZeroThree(ZeroThree):
    """Gradients leave for the host as they are reduced; a rank's shares of weights come from there to be gathered."""

    @property
    def pins(self) -> bool:
        return self.plan.offload_settings.pins

    @property
    def layers_apart_differ(self) -> bool:
        """Norms are taken in the last micro-step, where a bucket is reduced."""
        return True

    def states(self) -> Nodes:
        half = self.job.compute_bytes
        # What every rank keeps whole, and no flat buffer takes, is cut on the GPU (``_partition_param``).
        stays = self.frozen_small_shard if self.plan.offload.parameters else self.shard
        return (
            hold("weights, rank's share", "parameters", stays * half),
            hold("small weights kept whole", "parameters", self.persistent * half),
            hold("gradient bucket", "buffers", self.bucket_bytes),
            hold("overflow flag", "buffers", 1),
        )

    def before_forward(self, part: Part) -> Nodes:
        return (*self.fetch(part), *super().before_forward(part))

    def before_backward(self, part: Part, micro: MicroStep) -> Nodes:
        fetched = self.fetch(part) if self.gathers == 2 else ()
        return (*fetched, *super().before_backward(part, micro))

    def fetch(self, part: Part) -> Nodes:
        """A rank's share of *part*'s weights comes to the GPU, and is dropped when it has been sent to the others."""
        if not self.plan.offload.parameters:
            return ()
        half = self.job.compute_bytes
        largest = max((parameter.numel for parameter in part.parameters), default=0)
        return (
            Block(
                "rank's share of weights on its way to the others",
                "workspace",
                peak_bytes=-(-largest // self.plan.gpus) * half,
                excess_category="workspace",
                transfers=(
                    Copy(
                        "weights",
                        "host-to-device",
                        -(-part.numel // self.plan.gpus) * half,
                        waits=True,
                        ahead=self.ahead(part),
                    ),
                ),
            ),
        )

    def _reduce(self, reduction: Reduction, micro: MicroStep) -> Nodes:
        """A rank's shares are put to the host one after another, and brought back for what the GPU computes on them."""
        copied, *dropped = super()._reduce(reduction, micro)
        assert isinstance(copied, Block)
        shares = -(-max(self.sizes[tensor] for tensor in reduction.tensors) // self.plan.gpus)
        back = hold("rank's share of a gradient back on the GPU", "workspace", shares * self.job.compute_bytes)
        moved = replace(back, transfers=self._copies(reduction, micro))
        flat = replace(copied, net_bytes=copied.peak_bytes)
        taken = self.taken_in_last(reduction) if micro.last else ()
        return (flat, moved, *taken, released(back), released(flat), *dropped)

    def _copies(self, reduction: Reduction, micro: MicroStep) -> tuple[Copy, ...]:
        """Of the rank's shares: to the host and back in the half format, and in the end in the optimizer's."""
        if reduction not in self._moved:
            self._moved[reduction] = sum(-(-self.sizes[tensor] // self.plan.gpus) for tensor in reduction.tensors)
        share = self._moved[reduction]
        half = share * self.job.compute_bytes
        there = Copy("accumulated gradients", "device-to-host", half, waits=False)
        back = Copy("accumulated gradients", "host-to-device", half, waits=False)
        if not micro.last:
            return there, back
        return there, back, Copy("gradients", "device-to-host", share * self.state_bytes, waits=False)

    @cached_property
    def _moved(self) -> dict[Reduction, Amount]:
        """Elements of this rank's shares, by reduction."""
        return {}

    def taken_in_last(self, reduction: Reduction) -> Nodes:
        """In the last micro-step the norm of each share is taken, and the share cast to the optimizer's format."""
        kept = NORM_BYTES * len(reduction.tensors)
        share = -(-max(self.sizes[tensor] for tensor in reduction.tensors) // self.plan.gpus)
        cast = np.maximum(NORM_BYTES * np.minimum(share, NORM_ELEMENTS), self.state_bytes * share)
        return (Block("gradient norms in fp64", "gradients", kept, kept + cast),)

    def update(self) -> Nodes:
        payload = self.persistent * self.job.compute_bytes
        small = hold("small weights kept whole", "parameters", payload)
        gather = Collective("small weights", "all-gather", payload, 1, waits=True)
        back = 0 if self.plan.offload.parameters else self.job.compute_bytes
        return (
            released(small),
            *cpu_adam(self.trained_shard, back),
            Block("all-gather of small weights", "temporaries", transfers=(gather,)),
            small,
            release("gradient norms in fp64", "gradients", NORM_BYTES * len(self.sizes)),
        )

    def gradient_rounding(self, ranks: int) -> int:
        """What pinning the optimizer's gradients, a tensor for each sub-group, takes beyond them."""
        parts = self.parts(ranks)
        sizes = [sum(parts[number] for number in group) * self.state_bytes for group in self.groups(ranks)]
        return int(sum(pinned(size) - size for size in sizes)) if self.pins else 0

    def freed_blocks(self, ranks: int) -> int:
        """Pinned blocks in which the weights came, tensor by tensor; torch keeps what is freed of them."""
        half = self.job.compute_bytes
        return int(sum(pinned(part * half) for part in self.parts(ranks))) if self.pins else 0

    @cached_property
    def frozen_small_shard(self) -> Amount:
        """Elements of a rank's shares of the small weights that stay as they are."""
        return tensor_shards([each for each in self.small if not each.trained], self.plan.gpus)

    def frozen_rounding(self, ranks: int) -> int:
        """What pinning the share of each large frozen weight takes beyond it."""
        sizes = shares([each.numel for each in self.model.frozen if each not in self.small], ranks)
        half = self.job.compute_bytes
        return int(sum(pinned(size * half) - size * half for size in sizes)) if self.pins else 0

    def host(self) -> Nodes:
        return (*self.host_optimizer(), *self.host_gradients(), *self.host_weights())

    def host_optimizer(self) -> Nodes:
        state = self.trained_shard * self.state_bytes
        return (
            # A clone, which is not pinned.
            hold("master weights", "optimizer", state),
            hold("optimizer's gradients", "gradients", state),
            hold(ROUNDED, "rounding", self.over_ranks("gradient_rounding")),
            hold("Adam moments", "optimizer", MOMENTS * state),
        )

    def host_gradients(self) -> Nodes:
        half = self.trained_shard * self.job.compute_bytes
        return (
            hold("gradients, rank's share", "gradients", half),
            rounded(half, self.pins),
            hold("gradient norm", "buffers", FP32_BYTES),
        )

    def host_weights(self) -> Nodes:
        if not self.plan.offload.parameters:
            return ()
        half = self.trained_shard * self.job.compute_bytes
        frozen = (self.shard - self.trained_shard - self.frozen_small_shard) * self.job.compute_bytes
        return (
            hold("frozen weights, rank's share", "parameters", frozen),
            hold(ROUNDED, "rounding", self.over_ranks("frozen_rounding")),
            hold("weights, rank's share", "parameters", half),
            # Whatever ``pin_memory`` says (``_create_param_groups_fp16_flat_cpu_memory``).
            rounded(half, pins=True),
            hold("freed pinned blocks that torch keeps", "rounding", self.over_ranks("freed_blocks")),
        )
