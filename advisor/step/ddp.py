"""PyTorch DistributedDataParallel, and one GPU alone (torch 2.13, nn/parallel/distributed.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from advisor.specs.model import Parameter
from advisor.step.program import Block, Collective, hold, release, scratch
from advisor.step.scheme import MicroStep, Nodes, Part, Scheme
from advisor.step.states import ADAM_MOVES, FP32_BYTES, MOMENTS, adam_step_counters, adam_temporaries

FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20
"""``_DEFAULT_FIRST_BUCKET_BYTES`` and ``bucket_cap_mb``: gradients are reduced in pieces of these sizes."""


class DataParallel(Scheme):
    """Whole states on every rank; fp32 weights compute in the half format through autocast."""

    @property
    def tensor_sizes(self) -> Mapping[str, Callable[[], Iterable[int]]]:
        def trained() -> list[int]:
            return [size * self.job.parameter_bytes for size in self._sizes()]

        def weights() -> list[int]:
            job = self.job
            formats = {True: job.parameter_bytes, False: job.model_bytes}
            return [each.held_bytes(formats[each.trained], job.compute_bytes) for each in self.model.parameters()]

        return {
            "weights": weights,
            "DDP buckets": lambda: bucket_sizes(reversed(trained())),
            "Adam moments": lambda: [size for size in trained() for _ in range(MOMENTS)],
            "Adam step counters": lambda: len(self.model.trained) * [FP32_BYTES],
        }

    def states(self) -> Nodes:
        count, element_bytes = self.model.trained_count, self.job.parameter_bytes
        several = np.asarray(self.plan.gpus) > 1
        return (
            hold("weights", "parameters", count * element_bytes + self.frozen_bytes),
            # Flat buckets cover every gradient from construction on and are never freed; p.grad is beside them.
            hold("DDP buckets", "buffers", count * element_bytes * several),
            hold("Adam moments", "optimizer", MOMENTS * count * element_bytes),
            hold("Adam step counters", "optimizer", adam_step_counters(self.job, len(self.model.trained))),
        )

    @property
    def frozen_bytes(self) -> int:
        """Of the weights that stay as they are."""
        return sum(each.held_bytes(self.job.model_bytes, self.job.compute_bytes) for each in self.model.frozen)

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        return (Block("gradients", "gradients", size_bytes * micro.first, size_bytes),)

    def after_backward(self, part: Part, micro: MicroStep) -> Nodes:
        payload = sum(each.numel for each in part.trained) * self.job.parameter_bytes
        if not micro.last or not payload:
            return ()
        messages = max(1, payload // BUCKET_BYTES)
        reduce = Collective("gradients", "all-reduce", payload, messages, waits=False)
        return (Block("gradient all-reduce", "temporaries", moved_bytes=2 * payload, transfers=(reduce,)),)

    def _sizes(self) -> Iterator[int]:
        return (parameter.numel for parameter in self.model.trained)

    def update(self) -> Nodes:
        count, element_bytes = self.model.trained_count, self.job.parameter_bytes
        return (
            scratch("Adam temporaries", adam_temporaries(self.job, self._sizes, element_bytes)),
            Block("Adam update", "optimizer", moved_bytes=ADAM_MOVES * count * element_bytes, kernels=1),
            release("gradients", "gradients", count * element_bytes),
        )


def bucket_sizes(gradients: Iterable[int]) -> list[int]:
    """Bytes of the buckets that hold *gradients* of these bytes, in the order in which backward makes them.

    A bucket is closed by the gradient that fills it (torch/csrc/distributed/c10d/reducer.cpp
    ``compute_bucket_assignment_by_size``).
    """
    sizes = [0]
    for gradient in gradients:
        sizes[-1] += gradient
        if sizes[-1] >= (BUCKET_BYTES if len(sizes) > 1 else FIRST_BUCKET_BYTES):
            sizes.append(0)
    return [size for size in sizes if size]
