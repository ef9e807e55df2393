"""A whole training run from the time of one step: steps, hours, GPU-hours, cost and energy.

Counted are optimizer steps one after the other. Left out: loading, compiling, evaluation, checkpoints and restarts, a
data loader that keeps the GPUs waiting, and of energy what the host and cooling take.
"""

from __future__ import annotations

from advisor.cost.results import StepTime, TrainingCost
from advisor.errors import SpecError
from advisor.specs.hardware import Cluster
from advisor.specs.training import CURRENCY, Training

SECONDS_PER_HOUR = 3600


def steps_of(training: Training, tokens_per_step: int) -> int:
    """Optimizer steps for all tokens; the last one is whole. Raises SpecError for less than one."""
    if training.tokens < tokens_per_step:
        raise SpecError(
            f"{training.tokens:,} tokens are less than the {tokens_per_step:,} of one optimizer step; train on more, "
            "or give a smaller --global-batch or --seq-len"
        )
    return -(-training.tokens // tokens_per_step)


def training_cost(training: Training, tokens_per_step: int, time: StepTime, cluster: Cluster) -> TrainingCost:
    """What *training* takes on *cluster* by steps of *tokens_per_step* that last *time*.

    The range of the cost is that of the step's time and of the price together. Energy is an upper bound: each GPU at
    its board power limit all the time.
    """
    steps = steps_of(training, tokens_per_step)
    hours, low, high = (steps * each / SECONDS_PER_HOUR for each in (time.step_s, time.low_s, time.high_s))
    gpus, price, power_w = cluster.gpus, training.price, cluster.gpu.power_w
    return TrainingCost(
        tokens=training.tokens,
        steps=steps,
        hours=hours,
        low_hours=low,
        high_hours=high,
        gpu_hours=gpus * hours,
        price=price,
        cost_usd=price.usd_per_gpu_hour * gpus * hours if price else None,
        low_cost_usd=price.low_usd_per_gpu_hour * gpus * low if price else None,
        high_cost_usd=price.high_usd_per_gpu_hour * gpus * high if price else None,
        energy_kwh=None if power_w is None else power_w / 1000 * gpus * hours,
    )


def beyond_limits(training: Training, found: TrainingCost, time: StepTime) -> str | None:
    """The limits that *found* does not keep, with the arithmetic; None where it keeps them."""
    parts = []
    if training.most_hours is not None and found.hours > training.most_hours:
        parts.append(
            f"{found.steps:,} steps × {time.step_s:.3g} s = {found.hours:,.1f} h, "
            f"{found.hours - training.most_hours:,.1f} h beyond --max-hours {training.most_hours:g}"
        )
    if training.most_usd is not None and found.price and found.cost_usd and found.cost_usd > training.most_usd:
        parts.append(
            f"{found.gpu_hours:,.1f} GPU-hours × {found.price.usd_per_gpu_hour:.2f} = "
            f"{found.cost_usd:,.2f} {CURRENCY}, {found.cost_usd - training.most_usd:,.2f} {CURRENCY} beyond "
            f"--max-cost {training.most_usd:g}"
        )
    return "; ".join(parts) or None
