"""What DeepSpeed's ZeRO stages have in common (deepspeed 0.19.8, runtime/zero).

The model computes with weights in its half format; the optimizer's own copy of them and Adam's moments are cut over
the ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from advisor.step.optimizers.rule import Given
from advisor.step.program import Block, Collective, hold
from advisor.step.scheme import Nodes, Scheme
from advisor.step.states import FP32_BYTES

NORM_BYTES = 8
"""The gradient norm is taken in fp64, a tensor at a time (zero/utils.py ``get_norm_dtype``)."""


class Zero(Scheme, ABC):
    """What the stages share."""

    @property
    def parameter_bytes(self) -> int:
        return self.job.compute_bytes

    @property
    def trained_bytes(self) -> int:
        """``module.bfloat16()`` and ``module.half()`` leave nothing out (runtime/engine.py)."""
        return self.job.compute_bytes

    @property
    def built_bytes(self) -> int:
        return self.job.compute_bytes

    @property
    def frozen_bytes(self) -> int:
        """Of weights that stay as they are, which no flat buffer takes."""
        half = self.job.compute_bytes
        return sum(each.held_bytes(half, half) for each in self.model.frozen)

    @property
    def state_bytes(self) -> int:
        """Bytes per element of moments and of the gradients that the optimizer reads: fp32, or all in pure bf16."""
        return self.job.parameter_bytes

    @property
    def master_bytes(self) -> int:
        """Bytes per element of the optimizer's own copy of the weights, which it has in their own format too.

        stage3.py ``_create_fp32_partitions`` means to do without, but compares a device with a name.
        """
        return self.state_bytes

    @property
    def bucket_bytes(self) -> int:
        return self.plan.zero.reduce_bucket * self.job.compute_bytes

    @property
    def reduced_bytes(self) -> int:
        """Bytes per element of the gradients that are sent: fp32 where sequences are cut.

        ``seq_parallel_communication_data_type`` (runtime/config.py) is for stage 3 to set; stages 1 and 2 take fp32
        whatever it says (stage_1_and_2.py ``allreduce_bucket``).
        """
        return FP32_BYTES if self.plan.ulysses_parallel > 1 else self.job.compute_bytes

    @property
    @abstractmethod
    def given(self) -> Given:
        """What the optimizer updates on this rank."""

    def kept(self) -> Nodes:
        """What stays between steps of the update: the optimizer's, and the last gradient norm."""
        return (*self.optimizer.kept(self.given), hold("gradient norm", "buffers", FP32_BYTES))

    def host(self) -> Nodes:
        return tuple(self.optimizer.host(self.given))

    def gather_updated(self) -> Block:
        payload = self.model.trained_count * self.job.compute_bytes
        gather = Collective("updated weights", "all-gather", payload, 1, waits=True)
        return Block("all-gather of weights", "temporaries", transfers=(gather,))
