"""DeepSpeed stage 0: nothing is cut (deepspeed 0.19.8, runtime/fp16/unfused_optimizer.py).

For bf16 and fp16, DeepSpeed wraps a client's torch.optim.AdamW in FP16_UnfusedOptimizer, which keeps an fp32 copy of
every weight; FP16_Optimizer stands in only for DeepSpeed's or apex's own FusedAdam. An fp32 model is left to AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

from advisor.specs.model import Parameter
from advisor.step.optimizers.rule import Given, whole
from advisor.step.program import Block, Collective, hold, release, released, scratch
from advisor.step.scheme import MicroStep, Nodes, Part
from advisor.step.states import FP32_BYTES
from advisor.step.zero import Zero

REDUCED_ELEMENTS = 500_000_000
"""Gradients are joined until they exceed so many, whatever ``reduce_bucket_size`` (runtime/engine.py)."""


class StageZero(Zero):
    """Whole states on every rank."""

    @property
    def state_bytes(self) -> int:
        return FP32_BYTES

    @property
    def master_bytes(self) -> int:
        """None for an fp32 model, which has no wrapper."""
        return 0 if self.job.compute_bytes == FP32_BYTES else FP32_BYTES

    @property
    def tensor_sizes(self) -> Mapping[str, Callable[[], Iterable[int]]]:
        return {
            "weights": lambda: [size * self.job.compute_bytes for size in self.sizes],
            "master weights": lambda: [size * self.master_bytes for size in self.sizes],
            **self.optimizer.tensor_sizes(self.given),
        }

    @cached_property
    def given(self) -> Given:
        return whole(self.model, tuple(self.model.parameters()), FP32_BYTES)

    def states(self) -> Nodes:
        count, half = self.model.parameter_count, self.job.compute_bytes
        # Moments are made by a step on zero gradients, which every copy of the weights has for it.
        zero_gradients = hold(
            "first zero gradients", "gradients", count * (self.master_bytes + half) if self.master_bytes else 0
        )
        return (
            hold("weights", "parameters", count * half),
            hold("master weights", "optimizer", count * self.master_bytes),
            zero_gradients,
            *self.optimizer.kept(self.given),
            released(zero_gradients),
        )

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        return (Block("gradients", "gradients", size_bytes * micro.first, size_bytes, "gradients"),)

    def end_backward(self, micro: MicroStep) -> Nodes:
        if not micro.last:
            return ()
        joined = self._joined()
        payload = self.model.parameter_count * self.job.compute_bytes
        reduce = Collective("gradients", "all-reduce", payload, len(joined), waits=True)
        copied = max(elements if tensors > 1 else 0 for elements, tensors in joined)
        return (
            Block(
                "flat copy of gradients",
                "temporaries",
                peak_bytes=copied * self.job.compute_bytes,
                moved_bytes=4 * payload,
                transfers=(reduce,),
            ),
        )

    def _joined(self) -> list[tuple[int, int]]:
        """Elements and tensors of each all-reduce."""
        found, elements, tensors = [], 0, 0
        for parameter in self.model.parameters():
            elements, tensors = elements + parameter.numel, tensors + 1
            if elements > REDUCED_ELEMENTS:
                found.append((elements, tensors))
                elements = tensors = 0
        return [*found, (elements, tensors)] if tensors else found

    @property
    def sizes(self) -> list[int]:
        """Elements of every tensor."""
        return [parameter.numel for parameter in self.model.parameters()]

    def update(self) -> Nodes:
        count, largest = self.model.parameter_count, self.model.largest_parameter.numel
        cast = count * FP32_BYTES if self.master_bytes else 0
        return (
            scratch("gradient cast for its norm", largest * FP32_BYTES if self.master_bytes else 0),
            hold("optimizer's gradients", "gradients", cast),
            *self.optimizer.update(self.given),
            release("optimizer's gradients", "gradients", cast),
            release("gradients", "gradients", count * self.job.compute_bytes),
        )
