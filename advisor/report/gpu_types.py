"""A ranking of GPUs to read: the best plan of each, and which are cheapest and fastest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from advisor.cost.results import Estimate
from advisor.report.numbers import GIB, aligned, parameter_count, rate, significant, spelled
from advisor.report.question import assumed_line, sentence
from advisor.report.recommendation import LEFT_OUT_OF_FRONT, folded, launch_section
from advisor.report.tables import INDENT, Column, faint, fitted_table, list_of, natural_width, section
from advisor.report.training import training_columns, training_section
from advisor.search.gpu_types import GpuRanking
from advisor.search.pareto import thinned
from advisor.specs.training import CURRENCY, Objective

if TYPE_CHECKING:
    from advisor.launch.files import Launch

WORDS: dict[Objective, str] = {
    "time": "Fastest",
    "cost": "Cheapest",
    "memory": "Least memory",
    "energy": "Least energy",
}


def ranking_report(
    ranking: GpuRanking, launch: Launch | None, *, width: int, written: Sequence[Path] = ()
) -> list[RenderableType]:
    """The whole ranking for a page of *width* columns; *written* are the launch files on disk, if any."""
    best = ranking.best
    parts: list[RenderableType] = [Text(headline(ranking), style="bold green" if best else "bold red")]
    parts += [Text(text) for text in _others(ranking)]
    parts += [Text(), Text(_question_line(ranking)), *assumed_line(ranking.inputs)]
    if best:
        parts += [Text(), *_table(ranking.plans, width)]
    if best and best.training:
        parts += training_section(best.training, best.cluster)
    if ranking.pareto:
        parts += section(
            "No plan beats these in time, memory and cost",
            *_table(thinned(ranking.pareto), width - INDENT),
            faint(LEFT_OUT_OF_FRONT),
        )
    reasons = [(each.cluster.gpu.name, sentence(each.why_none)) for each in ranking.choices if not each.best]
    if reasons:
        parts += section("What is ruled out", list_of(reasons))
    if launch and best:
        parts += launch_section(launch, best.cluster.nodes, width, written)
    return parts


def headline(ranking: GpuRanking) -> str:
    """The best GPU by what was asked for."""
    if not ranking.best:
        return f"Does not fit: {ranking.model.name} on {ranking.choices[0].cluster.gpus} of any GPU with a list price"
    return f"{WORDS[ranking.objective]}: {_said(ranking.best)}"


def _others(ranking: GpuRanking) -> list[str]:
    """What is best by the other objectives, where that is another GPU."""
    kinds: tuple[Objective, ...] = ("time", "cost")
    others = [(kind, ranking.least(kind)) for kind in kinds if kind != ranking.objective]
    return [f"{WORDS[kind]}: {_said(plan)}" for kind, plan in others if plan and plan is not ranking.best]


def _said(plan: Estimate) -> str:
    text = (
        f"{plan.cluster.gpus} × {plan.cluster.gpu.name} with {plan.plan.title}, {rate(plan.time.tokens_per_s)} tokens/s"
    )
    if not plan.training:
        return text
    text += f", {spelled(plan.training.hours)}"
    return text if plan.training.cost_usd is None else f"{text}, {significant(plan.training.cost_usd)} {CURRENCY}"


def _question_line(ranking: GpuRanking) -> str:
    model, gpus = ranking.model, ranking.choices[0].cluster.gpus
    size = f"{parameter_count(model.parameter_count)} parameters"
    return f"{model.name} ({size}) on {gpus} of each GPU that has a list price."


def _table(plans: Sequence[Estimate], width: int) -> list[RenderableType]:
    columns = _columns(plans, [plan.plan.title for plan in plans])
    if natural_width(columns) > width:
        columns = _columns(plans, [folded(plan.plan.title) for plan in plans])
    return fitted_table(columns, width)


def _columns(plans: Sequence[Estimate], titles: Sequence[str]) -> list[Column]:
    peaks = aligned([plan.memory.device_used_bytes / GIB for plan in plans], most_decimals=1)
    energies = [plan.training.energy_kwh for plan in plans if plan.training and plan.training.energy_kwh is not None]
    columns = [
        Column(header="GPU", cells=[plan.cluster.gpu.name for plan in plans], justify="left"),
        Column(header="Best strategy", cells=titles, justify="left", rank=2),
        Column(
            header="Batch",
            cells=[f"{plan.plan.micro_batch} × {plan.plan.accumulation_steps}" for plan in plans],
            rank=4,
        ),
        Column(header="Check-\npoints", cells=[plan.plan.checkpointing.value for plan in plans], rank=5),
        Column(header="Peak\nGiB", cells=peaks, rank=3),
        Column(header="Tokens\nper s", cells=[rate(plan.time.tokens_per_s) for plan in plans]),
        *training_columns(plans),
    ]
    if len(energies) == len(plans):
        columns.append(Column(header="Energy\nkWh", cells=aligned(energies), rank=6))
    return columns
