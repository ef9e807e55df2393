"""How long a GPU computes: matrix products by their work, everything else by the bytes it moves.

    seconds = products / (share of the dense peak) + moved bytes / (share of memory bandwidth)

Both terms add up because a kernel does not hide all its memory traffic behind its products. A product's operands are
among the moved bytes, so its rate rises with its arithmetic intensity and ends at the stated share of the peak: this is
the measured-rate curve, with one constant per generation of GPUs. ``benchmarks/fit_rates.py`` fits it to
``profiles/rates/matmul.csv`` and prints the errors. Left out: how well a shape fills the GPU's tiles and waves, hits in
its L2 cache, and layouts, which move single shapes by tens of per cent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from advisor.errors import SpecError
from advisor.specs.calibration import Calibration
from advisor.specs.hardware import Gpu
from advisor.specs.job import Precision
from advisor.step.program import Amount, Node, blocks


@dataclass(frozen=True, slots=True)
class Rates:
    """What one GPU achieves in one number format."""

    peak_flop_per_s: float
    linear_flop_per_s: float
    """Matrix products with weights, once their operands are there."""
    attention_flop_per_s: float
    """Products of the attention kernel."""
    moved_bytes_per_s: float
    kernel_launch_s: float


def rates(gpu: Gpu, precision: Precision, calibration: Calibration) -> Rates:
    """The rates of *gpu* for products in *precision*.

    fp32 runs at the plain fp32 rate, not tf32's: torch's default ``float32_matmul_precision`` is "highest".
    """
    peak = gpu.peak_flop_per_s.get(precision)
    if peak is None:
        known = ", ".join(sorted(gpu.peak_flop_per_s))
        raise SpecError(f"{gpu.name} has no known {precision} rate; choose --precision among: {known}")
    return Rates(
        peak_flop_per_s=peak,
        linear_flop_per_s=peak * calibration.linear_share(gpu.compute_capability),
        attention_flop_per_s=peak * calibration.attention_share(gpu.compute_capability),
        moved_bytes_per_s=gpu.memory_bandwidth_bytes_per_s * calibration.bandwidth_efficiency,
        kernel_launch_s=calibration.kernel_launch_s,
    )


class Work(NamedTuple):
    """What a stretch of the program gives a GPU to do."""

    linear_flop: Amount
    attention_flop: Amount
    whole_flop: Amount
    """Both, with the whole score matrix of attention counted whatever its kernel skips."""
    moved_bytes: Amount
    kernels: Amount


def work(node: Node) -> Work:
    """The work of *node* outside of its init phase."""
    linear: Amount = 0.0
    attention: Amount = 0.0
    whole: Amount = 0.0
    moved: Amount = 0.0
    kernels: Amount = 0.0
    for phase, block, runs in blocks(node):
        if phase == "init":
            continue
        for product in block.matmuls:
            flop = runs * product.flop
            if product.kind == "linear":
                linear = linear + flop
            else:
                attention = attention + flop
                whole = whole + flop / product.flop_share
        moved = moved + runs * block.moved_bytes
        kernels = kernels + runs * block.kernels
    return Work(linear, attention, whole + linear, moved, kernels)


def compute_seconds(done: Work, at: Rates) -> Amount:
    """Time of *done*: the GPU's own, or that of launching its kernels one by one in eager mode if that is longer."""
    gpu = (
        done.linear_flop / at.linear_flop_per_s
        + done.attention_flop / at.attention_flop_per_s
        + done.moved_bytes / at.moved_bytes_per_s
    )
    return np.maximum(gpu, done.kernels * at.kernel_launch_s)
