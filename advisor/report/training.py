"""A whole training run to read: its steps, hours, cost and energy, and the columns that say the same of many plans."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType

from advisor.cost.results import Estimate, TrainingCost
from advisor.report.numbers import aligned, significant, spelled
from advisor.report.tables import Column, faint, list_of, section
from advisor.specs.hardware import Cluster
from advisor.specs.training import CURRENCY

LEFT_OUT = "Optimizer steps alone: loading, evaluation, checkpoints and restarts come on top."


def training_section(training: TrainingCost, cluster: Cluster) -> list[RenderableType]:
    """What the whole run takes, line by line, each with where it comes from."""
    ends = f"a real run may take {significant(training.low_hours)} to {significant(training.high_hours)}"
    hours = ends if 1 <= training.hours < 48 else f"{spelled(training.hours)}; {ends}"
    lines = [
        ("steps", f"{training.steps:,}", ""),
        ("hours", significant(training.hours), hours),
        ("GPU-hours", significant(training.gpu_hours), f"{cluster.gpus} × {cluster.gpu.name}"),
        ("cost", *_cost(training)),
        ("energy", *_energy(training, cluster)),
    ]
    return section(f"To train on {training.tokens:,} tokens", list_of(lines), faint(LEFT_OUT))


def _cost(training: TrainingCost) -> tuple[str, str]:
    price = training.price
    if price is None or training.cost_usd is None:
        return "not known", "no list price for this GPU; give --price"
    low, high = price.low_usd_per_gpu_hour, price.high_usd_per_gpu_hour
    asked = f"{low:g} to {high:g}" if low != high else f"{low:g}"
    ends = f"{significant(training.low_cost_usd or 0)} to {significant(training.high_cost_usd or 0)}"
    return f"{significant(training.cost_usd)} {CURRENCY}", f"{ends} at {asked} a GPU-hour: {price.source}"


def _energy(training: TrainingCost, cluster: Cluster) -> tuple[str, str]:
    if training.energy_kwh is None:
        return "not known", "no board power is known for this GPU"
    return (
        f"{significant(training.energy_kwh)} kWh",
        f"at most: each GPU at its limit of {cluster.gpu.power_w:g} W all the time; host and cooling are not counted",
    )


def training_columns(plans: Sequence[Estimate]) -> list[Column]:
    """Hours and cost of each plan; none where no training was asked about."""
    found = [plan.training for plan in plans if plan.training]
    if len(found) < len(plans):
        return []
    columns = [Column(header="Hours", cells=aligned([each.hours for each in found]))]
    costs = [each.cost_usd for each in found if each.cost_usd is not None]
    if len(costs) == len(found):
        columns.append(Column(header=f"Cost\n{CURRENCY}", cells=aligned(costs), rank=1))
    return columns
