"""PyTorch DistributedDataParallel, and one GPU alone (torch 2.13, nn/parallel/distributed.py)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from advisor.specs.model import Parameter
from advisor.step.program import Block, Collective, hold, release, scratch
from advisor.step.scheme import MicroStep, Nodes, Part, Scheme
from advisor.step.states import ADAM_MOVES, MOMENTS, adam_step_counters, adam_temporaries

BUCKET_BYTES = 25 * 2**20
"""``bucket_cap_mb``: gradients are reduced in pieces of this size."""


class DataParallel(Scheme):
    """Whole states on every rank; fp32 weights compute in the half format through autocast."""

    def states(self) -> Nodes:
        count, element_bytes = self.model.parameter_count, self.job.parameter_bytes
        several = np.asarray(self.plan.gpus) > 1
        return (
            hold("weights", "parameters", count * element_bytes),
            # Flat buckets cover every gradient from construction on and are never freed; p.grad is beside them.
            hold("DDP buckets", "buffers", count * element_bytes * several),
            hold("Adam moments", "optimizer", MOMENTS * count * element_bytes),
            hold("Adam step counters", "optimizer", adam_step_counters(self.job, self.model.tensor_count)),
        )

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        return (Block("gradients", "gradients", size_bytes * micro.first, size_bytes),)

    def after_backward(self, part: Part, micro: MicroStep) -> Nodes:
        if not micro.last:
            return ()
        payload = part.numel * self.job.parameter_bytes
        messages = max(1, payload // BUCKET_BYTES)
        reduce = Collective("gradients", "all-reduce", payload, messages, waits=part.kind == "embedding")
        return (Block("gradient all-reduce", "temporaries", moved_bytes=2 * payload, transfers=(reduce,)),)

    def _sizes(self) -> Iterator[int]:
        return (parameter.numel for parameter in self.model.parameters())

    def update(self) -> Nodes:
        count, element_bytes = self.model.parameter_count, self.job.parameter_bytes
        return (
            scratch("Adam temporaries", adam_temporaries(self.job, self._sizes, element_bytes)),
            Block("Adam update", "optimizer", moved_bytes=ADAM_MOVES * count * element_bytes, kernels=1),
            release("gradients", "gradients", count * element_bytes),
        )
