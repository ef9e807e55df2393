"""How long a GPU is busy with one kernel: a matrix product by its shape, a fused attention kernel by its sequences.

    product    floor + granules / (share of the dense peak) + operands / (share of memory bandwidth)
    attention  products / (share of the dense peak) · (1 + extra columns / columns seen) · (1 + left over at the end)

A product is cut into granules of 64 x 64 results, and all multiprocessors take as long as the one that gets most of
them. Kernels work on tiles of 64 to 256, but where large tiles fill the GPU badly, cuBLAS takes smaller ones or cuts
along k. Its operands move while it computes, but not all of them at once. The share is what lasts: a GPU that has
multiplied for a while is held back by its power limit, which short measurements do not see.

Every row of the scores costs as much as some columns more than a query sees: the kernel's start, its end and masked
blocks that it computes in part. Blocks of 128 queries are handed out to the multiprocessors, and at the end some wait.

``benchmarks/fit_rates.py`` fits the shares and prints how far off both rules are. Left out: which of its kernels cuBLAS
picks, layouts, and hits in the L2 cache, which move single shapes by ten per cent and on Blackwell by forty.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from advisor.step.program import Amount, FusedAttention, Matmul, larger, smaller

GRANULE = 64
"""Rows and columns of a product's result that are computed together."""
QUERY_BLOCK = 128
"""Queries that a fused attention kernel takes at once."""
NARROW_HEAD = 64


class Rates(NamedTuple):
    """What one GPU achieves in one number format."""

    peak_flop_per_s: float
    """The dense peak of that format."""
    linear_flop_per_s: float
    """Matrix products in that format."""
    single_flop_per_s: float
    """Matrix products in fp32."""
    attention_flop_per_s: dict[FusedAttention, tuple[float, float]]
    """Products inside fused attention kernels on long sequences, forward and backward."""
    attention_extra_columns: float
    attention_narrow_share: float
    multiprocessors: int | None
    """None where unknown: results are then taken to fill them evenly."""
    moved_bytes_per_s: float
    copied_bytes_per_s: float
    operand_bytes_per_s: float
    product_floor_s: float
    kernel_floor_s: float
    kernel_launch_s: float


def product_seconds(product: Matmul, at: Rates) -> Amount:
    """Time of *product*, by itself or as a part of a fused attention kernel."""
    return _alone(product, at) if product.fused is None else _fused(product, product.fused, at)


def _alone(product: Matmul, at: Rates) -> Amount:
    granules = -(-product.m // GRANULE) * -(-product.n // GRANULE) * product.count
    if at.multiprocessors:
        granules = -(-granules // at.multiprocessors) * at.multiprocessors
    flop = 2.0 * GRANULE**2 * product.k * granules
    rate = at.single_flop_per_s if product.element_bytes == 4 else at.linear_flop_per_s
    operands = product.operand_bytes
    together = flop / rate + operands / at.operand_bytes_per_s
    return at.product_floor_s + larger(together, operands / at.copied_bytes_per_s)


def _fused(product: Matmul, kernel: FusedAttention, at: Rates) -> Amount:
    """*product* as a part of the fused *kernel*, over sequences of its *m*.

    A kernel that cuts few queries' work along the keys goes as fast as memory gives it these.
    """
    if product.splits_keys:
        return product.operand_bytes / at.moved_bytes_per_s
    rate: Amount = at.attention_flop_per_s[kernel][product.backward]
    narrow = smaller(product.n, product.k) <= NARROW_HEAD
    if np.any(narrow):
        rate = rate * np.where(narrow, at.attention_narrow_share, 1.0)
    columns_seen = product.m * product.flop_share
    blocks = product.count * product.m / QUERY_BLOCK
    waiting = (at.multiprocessors or 0) / blocks
    computing = product.flop / rate * (1 + at.attention_extra_columns / columns_seen) * (1 + waiting)
    return larger(computing, product.operand_bytes / at.copied_bytes_per_s)
