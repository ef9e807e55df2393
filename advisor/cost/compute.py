"""How long a GPU computes: matrix products by their work, everything else by the bytes it moves.

    seconds = products / (share of the dense peak) + moved bytes / (share of memory bandwidth)

Both terms add up because a kernel does not hide all its memory traffic behind its products. A product's operands are
among the moved bytes, so its rate rises with its arithmetic intensity and ends at the stated share of the peak: this is
the measured-rate curve, with one constant per generation of GPUs. ``benchmarks/fit_rates.py`` fits it to
``profiles/rates/matmul.csv`` and prints the errors. Left out: how well a shape fills the GPU's tiles and waves, hits in
its L2 cache, and layouts, which move single shapes by tens of per cent.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from advisor.errors import SpecError
from advisor.specs.calibration import Calibration
from advisor.specs.hardware import Gpu
from advisor.specs.job import Precision
from advisor.step.program import Amount, Block, Node, Repeat, read_once, total


class Rates(NamedTuple):
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


NO_WORK = Work(0.0, 0.0, 0.0, 0.0, 0.0)


@read_once
def work(node: Node) -> Work:
    """The work of *node* outside of its init phase."""
    if isinstance(node, Block):
        return _block_work(node)
    if isinstance(node, Repeat):
        return Work(*(node.times * amount for amount in work(node.body)))
    if node.phase == "init":
        return NO_WORK
    linear: Amount = 0.0
    attention: Amount = 0.0
    whole: Amount = 0.0
    moved: Amount = 0.0
    kernels: Amount = 0.0
    for step in node.steps:
        more = _block_work(step) if isinstance(step, Block) else work(step)
        if more is not NO_WORK:
            linear, attention, whole = linear + more[0], attention + more[1], whole + more[2]
            moved, kernels = moved + more[3], kernels + more[4]
    return Work(linear, attention, whole, moved, kernels)


def _block_work(block: Block) -> Work:
    if not block.matmuls and _is_zero(block.moved_bytes) and _is_zero(block.kernels):
        return NO_WORK
    linear = total(product.flop for product in block.matmuls if product.kind == "linear")
    scores = [product for product in block.matmuls if product.kind == "attention"]
    attention = total(product.flop for product in scores)
    whole = linear + total(product.flop / product.flop_share for product in scores)
    return Work(linear, attention, whole, block.moved_bytes, block.kernels)


def _is_zero(amount: Amount) -> bool:
    """Whether *amount* is a plain zero, as most blocks' are; arrays are not looked into."""
    return isinstance(amount, int) and amount == 0


def kernels(node: Node) -> Amount:
    """How many kernels one run of *node* launches in eager mode, outside of its init phase."""
    return work(node).kernels


def busy_seconds(node: Node, at: Rates) -> Amount:
    """How long the GPU itself is busy with one run of *node*, outside of its init phase.

    What launching the kernels costs the CPU is not in it (:func:`kernels`).
    """
    return gpu_seconds(work(node), at)


def gpu_seconds(done: Work, at: Rates) -> Amount:
    """The GPU's own time of *done*."""
    return (
        done.linear_flop / at.linear_flop_per_s
        + done.attention_flop / at.attention_flop_per_s
        + done.moved_bytes / at.moved_bytes_per_s
    )


def compute_seconds(node: Node, at: Rates) -> Amount:
    """Time of *node*: the GPU's own, or that of launching its kernels one by one in eager mode if that is longer."""
    return np.maximum(busy_seconds(node, at), kernels(node) * at.kernel_launch_s)
