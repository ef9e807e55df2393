"""Who holds which share of weights, gradients and optimizer: the 2+2+12 rule and how each framework cuts it.

Mixed-precision Adam keeps 2 bytes of weights, 2 of gradients and 12 of optimizer states (fp32 weights, momentum,
variance) per parameter (Rajbhandari et al., arXiv:1910.02054, section 3.1). What differs is where tensors are cut:
DeepSpeed's stages 1 and 2 cut one flat buffer, stage 3 each tensor, FSDP the first dimension of each tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from advisor.specs.job import Job
from advisor.specs.model import ModelSpec, Parameter
from advisor.specs.plan import Count
from advisor.step.program import Amount

FP32_BYTES = 4
MOMENTS = 2
"""Adam keeps two numbers per parameter: momentum and variance."""
NORM_COPIES = 4
"""An fp64 copy weighs as much as four of a half-format gradient."""
ADAM_MOVES = 7
"""Tensors that a fused Adam update reads (weights, gradient, both moments) and writes (weights, moments)."""


def flat_shard(parameters: int, ranks: Count) -> Amount:
    """Elements of one rank's share of a flat buffer padded to twice the ranks.

    deepspeed 0.19.8, runtime/zero/stage_1_and_2.py: ``nccl_start_alignment_factor = 2``.
    """
    return -(-parameters // (2 * ranks)) * 2


def tensor_shards(parameters: Sequence[Parameter], ranks: Count) -> Amount:
    """Elements of one rank's shares when each tensor is cut alone (deepspeed 0.19.8, partition_parameters.py)."""
    return _summed_ceilings([(parameter.numel, 1) for parameter in parameters], ranks)


def row_shards(parameters: Sequence[Parameter], ranks: Count) -> Amount:
    """Elements of rank 0's shares when each tensor is cut by rows (torch 2.13, fsdp/_fully_shard/_fsdp_param.py)."""
    return _summed_ceilings(
        [(parameter.shape[0], parameter.numel // parameter.shape[0]) for parameter in parameters], ranks
    )


def _summed_ceilings(pieces: list[tuple[int, int]], ranks: Count) -> Amount:
    """Sum of ceil(count / ranks) · size over *pieces* of (count, size)."""
    counted = Counter(pieces)
    if isinstance(ranks, int):
        return sum(-(-count // ranks) * size * times for (count, size), times in counted.items())
    distinct, where = np.unique(ranks, return_inverse=True)
    table = np.array([(count, size * times) for (count, size), times in counted.items()], dtype=np.int64)
    rows = -(-table[:, 0, None] // distinct[None, :]) * table[:, 1, None]
    total: Amount = rows.sum(axis=0)[where.reshape(np.shape(ranks))]
    return total


@dataclass(frozen=True, slots=True)
class Owned:
    """Elements of the gradients that ranks keep for their flat partitions.

    A rank that owns any slice of a tensor keeps that tensor's whole gradient (deepspeed 0.19.8, stage_1_and_2.py
    ``grads_in_partition``), so a large embedding weighs on its rank however many ranks there are.
    """

    worst: Amount
    """Of the rank that keeps most."""
    last: Amount
    """Of the last rank, whose tensors backward reaches first."""
    worst_with_norm: Amount
    """The most of any rank, four times its largest owned slice counted in: the norm's fp64 copy beside bf16."""


def owned_gradients(model: ModelSpec, ranks: Count) -> Owned:
    """What the ranks of a flat partitioning keep, for each entry of *ranks*."""
    sizes = tuple(parameter.numel for parameter in model.parameters())
    if isinstance(ranks, int):
        return Owned(*_owned(sizes, ranks))
    distinct, where = np.unique(ranks, return_inverse=True)
    found = np.array([_owned(sizes, int(each)) for each in distinct], dtype=np.int64)
    return Owned(*(found[where.reshape(np.shape(ranks)), column] for column in range(3)))


@lru_cache(maxsize=512)
def _owned(sizes: tuple[int, ...], ranks: int) -> tuple[int, int, int]:
    ends = np.cumsum(np.array(sizes, dtype=np.int64))
    starts = ends - np.array(sizes, dtype=np.int64)
    shard = int(flat_shard(int(ends[-1]), ranks))
    low = np.minimum(np.arange(ranks, dtype=np.int64) * shard, ends[-1] - 1)
    high = np.minimum(low + shard, ends[-1])
    first = np.searchsorted(ends, low, side="right")
    last = np.searchsorted(starts, high, side="left") - 1
    whole = ends[last] - starts[first]
    slices = np.maximum(np.minimum(ends[first], high) - low, high - np.maximum(starts[last], low))
    inner = [max(sizes[one + 1 : other], default=0) for one, other in zip(first, last, strict=True)]
    largest = np.maximum(slices, np.array(inner, dtype=np.int64))
    return int(whole.max()), int(whole[-1]), int((whole + NORM_COPIES * largest).max())


def adam_step_counters(job: Job, tensors: int) -> int:
    """Bytes of the step counts of *tensors* that Adam updates.

    torch 2.13, optim/adam.py ``_init_group``: fp32 scalars, on the GPU if fused, else on the host.
    """
    return FP32_BYTES * tensors if job.optimizer == "adamw-fused" else 0


def adam_temporaries(job: Job, elements: Amount, largest: Amount, element_bytes: int) -> Amount:
    """Bytes that the update itself takes for *elements* held in tensors of at most *largest* elements.

    torch 2.13, optim/adam.py: fused none; foreach one square root of every variance; a loop two tensors.
    """
    if job.optimizer == "adamw-foreach":
        return elements * element_bytes
    if job.optimizer == "adamw-loop":
        return 2 * largest * element_bytes
    return 0 * elements
