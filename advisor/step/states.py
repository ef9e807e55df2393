"""Who holds which share of weights, gradients and optimizer: the 2+2+12 rule and how each framework cuts it.

Mixed-precision Adam keeps 2 bytes of weights, 2 of gradients and 12 of optimizer states (fp32 weights, momentum,
variance) per parameter (Rajbhandari et al., arXiv:1910.02054, section 3.1). What differs is where tensors are cut:
DeepSpeed's stages 1 and 2 cut one flat buffer, stage 3 each tensor, FSDP the first dimension of each tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from advisor.specs.job import Job
from advisor.specs.model import Parameter
from advisor.specs.plan import Count
from advisor.step.program import Amount, total

FP32_BYTES = 4
MOMENTS = 2
"""Adam keeps two numbers per parameter: momentum and variance."""
ADAM_MOVES = 7
"""Tensors that a fused Adam update reads (weights, gradient, both moments) and writes (weights, moments)."""


def tensor_shards(parameters: Sequence[Parameter], ranks: Count) -> Amount:
    """Elements of one rank's shares when each tensor is cut alone (deepspeed 0.19.8, partition_parameters.py)."""
    return _summed_ceilings([(parameter.stored_numel, 1) for parameter in parameters], ranks)


def row_shards(parameters: Sequence[Parameter], ranks: Count) -> Amount:
    """Elements of rank 0's shares when each tensor is cut by rows (torch 2.13, fsdp/_fully_shard/_fsdp_param.py)."""
    shapes = [(parameter.stored_shape[0], parameter.stored_numel) for parameter in parameters]
    return _summed_ceilings([(rows, numel // rows) for rows, numel in shapes], ranks)


@dataclass(frozen=True, slots=True)
class FlatUnit:
    """How one flat tensor of several parameters is cut, in elements."""

    share: Amount
    """Of one rank, padding included."""
    pieces: tuple[Amount, ...]
    """Of each parameter, what the first rank has."""

    @property
    def filled(self) -> Amount:
        """Of the first rank, without padding."""
        return total(self.pieces)

    @property
    def tensors(self) -> Amount:
        """Parameters of which the first rank has any."""
        return total(np.minimum(piece, 1) for piece in self.pieces)


def flat_unit(parameters: Sequence[Parameter], ranks: Count, aligned: int) -> FlatUnit:
    """Cut *parameters*, each laid at a multiple of *aligned* elements (torch 2.13, distributed/fsdp/_flat_param.py)."""
    starts, end = [], 0
    for parameter in parameters:
        starts.append(-(-end // aligned) * aligned)
        end = starts[-1] + parameter.numel
    share = -(-end // ranks)
    laid = zip(starts, parameters, strict=True)
    return FlatUnit(share, tuple(np.clip(share - start, 0, parameter.numel) for start, parameter in laid))


def _summed_ceilings(pieces: list[tuple[int, int]], ranks: Count) -> Amount:
    """Sum of ceil(count / ranks) · size over *pieces* of (count, size)."""
    if not pieces:
        return 0
    counted = Counter(pieces)
    if isinstance(ranks, int):
        return sum(-(-count // ranks) * size * times for (count, size), times in counted.items())
    distinct, where = np.unique(ranks, return_inverse=True)
    table = np.array([(count, size * times) for (count, size), times in counted.items()], dtype=np.int64)
    rows = -(-table[:, 0, None] // distinct[None, :]) * table[:, 1, None]
    total: Amount = rows.sum(axis=0)[where.reshape(np.shape(ranks))]
    return total


def adam_step_counters(job: Job, tensors: Amount) -> Amount:
    """Bytes of the step counts of *tensors* that Adam updates.

    torch 2.13, optim/adam.py ``_init_group``: fp32 scalars, on the GPU if fused, else on the host.
    """
    return FP32_BYTES * tensors if job.optimizer == "adamw-fused" else 0


def adam_temporaries(job: Job, sizes: Callable[[], Iterable[Amount]], element_bytes: int) -> Amount:
    """Bytes that the update itself takes for tensors of *sizes* elements on the rank, in the optimizer's order.

    torch 2.13, optim/adam.py: fused none; foreach one square root of every variance; a loop a square root and its
    quotient, beside the quotient of the tensor before.
    """
    if job.optimizer == "adamw-fused":
        return 0
    if job.optimizer == "adamw-foreach":
        return total(sizes()) * element_bytes
    most: Amount = 0
    before: Amount = 0
    for size in sizes():
        most, before = np.maximum(most, before + 2 * size), size
    return most * element_bytes
