"""What the step program asks a GPU to compute, and how long the GPU is busy with it.

    busy = products (kernels.py) + other moved bytes / (share of memory bandwidth) + kernels · floor

A kernel does not hide what it moves behind what others compute, so times add up. Bytes that a block moves beyond its
products' operands are those of its other kernels, such as norms, activations, casts and the optimizer's update.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

from advisor.cost.kernels import Rates, product_seconds
from advisor.errors import SpecError
from advisor.specs.calibration import Calibration
from advisor.specs.hardware import Gpu
from advisor.specs.job import Precision
from advisor.step.program import Amount, Block, FusedAttention, Node, Repeat, Sequence, larger, read_once, total


def rates(gpu: Gpu, precision: Precision, calibration: Calibration) -> Rates:
    """The rates of *gpu* for products in *precision*.

    fp32 runs at the plain fp32 rate, not tf32's: torch's default ``float32_matmul_precision`` is "highest".
    """
    peak = gpu.peak_flop_per_s.get(precision)
    if peak is None:
        known = ", ".join(sorted(gpu.peak_flop_per_s))
        raise SpecError(f"{gpu.name} has no known {precision} rate; choose --precision among: {known}")
    share, bandwidth = calibration.linear_share(gpu), gpu.memory_bandwidth_bytes_per_s
    attention: dict[FusedAttention, tuple[float, float]] = {}
    for kernel in get_args(FusedAttention):
        forward, backward = calibration.attention_shares(kernel, gpu)
        attention[kernel] = peak * forward, peak * backward
    return Rates(
        peak_flop_per_s=peak,
        linear_flop_per_s=peak * share,
        single_flop_per_s=gpu.peak_flop_per_s.get("fp32", peak) * share,
        attention_flop_per_s=attention,
        attention_extra_columns=calibration.attention_extra_columns,
        attention_narrow_share=calibration.attention_narrow_share,
        multiprocessors=gpu.multiprocessors,
        moved_bytes_per_s=bandwidth * calibration.bandwidth_efficiency,
        copied_bytes_per_s=bandwidth * calibration.copy_efficiency,
        operand_bytes_per_s=bandwidth * calibration.operand_bandwidth_efficiency,
        product_floor_s=calibration.product_floor_s,
        kernel_floor_s=calibration.kernel_floor_s,
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
    if block.is_idle:
        return NO_WORK
    linear = total(product.flop for product in block.matmuls if product.kind == "linear")
    scores = [product for product in block.matmuls if product.kind == "attention"]
    attention = total(product.flop for product in scores)
    whole = linear + total(product.flop / product.flop_share for product in scores)
    return Work(linear, attention, whole, block.moved_bytes, block.kernels)


class Load(NamedTuple):
    """What one run of a stretch of the program keeps busy, outside of its init phase."""

    busy_s: Amount
    """The GPU itself; what launching the kernels costs the CPU is not in it."""
    kernels: Amount
    """Launched in eager mode."""
    host_updated_parameters: Amount
    """By an optimizer on the CPU."""


NO_LOAD = Load(0.0, 0, 0)


def load(node: Node, at: Rates) -> Load:
    """The load of *node*. Of sequences and repeats, what was read last is kept with them."""
    if isinstance(node, Block):
        return _block_load(node, at)
    found: tuple[Rates, Load] | None = node.read.get(load)
    if found is None or (found[0] is not at and found[0] != at):
        found = at, _load(node, at)
        node.read[load] = found
    return found[1]


def _load(node: Sequence | Repeat, at: Rates) -> Load:
    if isinstance(node, Repeat):
        once = load(node.body, at)
        return once if once is NO_LOAD else Load(*(node.times * amount for amount in once))
    if node.phase == "init":
        return NO_LOAD
    busy_s, kernels, updated = NO_LOAD
    loaded = False
    for step in node.steps:
        more = _block_load(step, at) if isinstance(step, Block) else load(step, at)
        if more is not NO_LOAD:
            loaded = True
            busy_s, kernels, updated = busy_s + more[0], kernels + more[1], updated + more[2]
    return Load(busy_s, kernels, updated) if loaded else NO_LOAD


def _block_load(block: Block, at: Rates) -> Load:
    if block.is_idle:
        return NO_LOAD
    return Load(_block_seconds(block, at), block.kernels, block.host_updated_parameters)


def _block_seconds(block: Block, at: Rates) -> Amount:
    if not block.matmuls:
        return block.moved_bytes / at.moved_bytes_per_s + block.kernels * at.kernel_floor_s
    others = max(block.kernels - sum(product.fused is None for product in block.matmuls), 0)
    moved = larger(block.moved_bytes - total(product.operand_bytes for product in block.matmuls), 0)
    return (
        total(product_seconds(product, at) for product in block.matmuls)
        + moved / (at.moved_bytes_per_s if others else at.operand_bytes_per_s)
        + others * at.kernel_floor_s
    )
