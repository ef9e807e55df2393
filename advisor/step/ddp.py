"""PyTorch DistributedDataParallel, and one GPU alone (torch 2.13, nn/parallel/distributed.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

import numpy as np

from advisor.specs.model import Parameter
from advisor.step.optimizers.rule import Given, whole
from advisor.step.program import Block, Collective, hold, release
from advisor.step.scheme import MicroStep, Nodes, Part, Scheme

FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20
"""``_DEFAULT_FIRST_BUCKET_BYTES`` and ``bucket_cap_mb``: gradients are reduced in pieces of these sizes."""


class DataParallel(Scheme):
    """Whole states on every rank; fp32 weights compute in the half format through autocast."""

    @property
    def tensor_sizes(self) -> Mapping[str, Callable[[], Iterable[int]]]:
        def trained() -> list[int]:
            return [each.numel * self.job.parameter_bytes for each in self.model.trained]

        def weights() -> list[int]:
            job = self.job
            formats = {True: job.parameter_bytes, False: job.model_bytes}
            return [each.held_bytes(formats[each.trained], job.compute_bytes) for each in self.model.parameters()]

        return {
            "weights": weights,
            "DDP buckets": lambda: bucket_sizes(reversed(trained())),
            **self.optimizer.tensor_sizes(self.given),
        }

    @cached_property
    def given(self) -> Given:
        """What the optimizer updates."""
        return whole(self.model, self.model.trained, self.job.parameter_bytes)

    def states(self) -> Nodes:
        count, element_bytes = self.model.trained_count, self.job.parameter_bytes
        several = np.asarray(self.plan.gpus) > 1
        return (
            hold("weights", "parameters", count * element_bytes + self.frozen_bytes),
            # Flat buckets cover every gradient from construction on and are never freed; p.grad is beside them.
            hold("DDP buckets", "buffers", count * element_bytes * several),
            *self.optimizer.kept(self.given),
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

    def update(self) -> Nodes:
        released = release("gradients", "gradients", self.model.trained_count * self.job.parameter_bytes)
        return (*self.optimizer.update(self.given), released)

    def host(self) -> Nodes:
        return tuple(self.optimizer.host(self.given))


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
