"""A comparison of GPU counts to read: what each is good for, what it loses, and every strategy beside it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from advisor.cost.results import Estimate
from advisor.report.numbers import GIB, aligned, parameter_count, percent, rate
from advisor.report.question import assumed_line, sentence
from advisor.report.recommendation import batches, folded
from advisor.report.tables import INDENT, Column, fitted_table, list_of, natural_width, section
from advisor.report.training import LEFT_OUT, training_columns
from advisor.search.compare import Comparison, Scale

LEAST_SHARE = 0.005
"""What rounds to less than a percent is no reason."""
MOST_LOSSES = 2
NONE = "–"


def comparison_report(comparison: Comparison, *, width: int) -> list[RenderableType]:
    """The whole comparison for a page of *width* columns."""
    scales = [scale for scale in comparison.scales if scale.plans]
    without = [scale for scale in comparison.scales if not scale.plans]
    parts: list[RenderableType] = [
        Text(headline(comparison), style="bold green" if comparison.base else "bold red"),
        Text(),
        Text(_question_line(comparison)),
        *assumed_line(comparison.inputs),
    ]
    if scales:
        best = [scale.plans[0] for scale in scales]
        parts += [Text(), *fitted_table(_scale_columns(comparison, best), width, legend=_legend(comparison, best))]
        changes = [(f"{each.plan.gpus} GPUs", text) for each in best if (text := _changes(comparison, each))]
        if changes:
            parts += section("What makes the efficiency", list_of(changes))
        if len(scales[0].plans) > 1 or len(scales) > 1:
            parts += section(
                "Tokens per second by strategy",
                *fitted_table(
                    _strategy_columns(scales, width),
                    width - INDENT,
                    legend=f"{NONE}: does not fit, or does not run there.",
                ),
            )
    if without:
        reasons = [(_gpus(scale), sentence(scale.why_none)) for scale in without]
        parts += section("Where nothing runs", list_of(reasons))
    return parts


def headline(comparison: Comparison) -> str:
    """The fewest GPUs that fit, and the fastest count."""
    name, gpu = comparison.model.name, comparison.scales[0].cluster.gpu.name
    counts = ", ".join(str(scale.cluster.gpus) for scale in comparison.scales)
    fastest = comparison.fastest
    if not fastest:
        way_out = f"; {comparison.way_out}" if comparison.way_out else ""
        return f"Does not fit: {name} on none of {counts} × {gpu}{way_out}"
    return (
        f"Fits from {comparison.fewest_gpus} × {gpu} on; of {counts} the fastest is {fastest.plan.gpus} with "
        f"{fastest.plan.title}, {fastest.time.tokens_per_s:,.0f} tokens/s"
    )


def _question_line(comparison: Comparison) -> str:
    model, first = comparison.model, comparison.scales[0].job
    batch = f"{first.global_batch} sequences of {first.sequence_length:,} tokens per step"
    if comparison.scaling == "weak":
        batch += f" on {_gpus(comparison.scales[0])} and in proportion on more (weak scaling)"
    else:
        batch += " on all counts (strong scaling)"
    return (
        f"{model.name} ({parameter_count(model.parameter_count)} parameters): {batch}, {first.precision}, "
        f"{first.optimizer}."
    )


def _gpus(scale: Scale) -> str:
    return "1 GPU" if scale.cluster.gpus == 1 else f"{scale.cluster.gpus} GPUs"


def _scale_columns(comparison: Comparison, best: Sequence[Estimate]) -> list[Column]:
    plans = [each.plan for each in best]
    peaks = aligned([each.memory.device_used_bytes / GIB for each in best], most_decimals=1)
    return [
        Column(header="GPUs", cells=[str(plan.gpus) for plan in plans]),
        Column(header="Machines", cells=[str(each.cluster.nodes) for each in best], rank=5),
        Column(header="Best strategy", cells=[folded(plan.title) for plan in plans], justify="left"),
        Column(header="Batch", cells=batches(best), rank=3),
        Column(header="Check-\npoints", cells=[plan.checkpointing.value for plan in plans], rank=4),
        Column(header="Peak\nGiB", cells=peaks, rank=2),
        Column(header="Tokens\nper s", cells=[rate(each.time.tokens_per_s) for each in best]),
        Column(header="Speed-\nup", cells=aligned([comparison.speed_up(each) for each in best], most_decimals=1)),
        Column(header="Effi-\nciency", cells=[percent(comparison.efficiency(each)) for each in best]),
        *training_columns(best),
    ]


def _legend(comparison: Comparison, best: Sequence[Estimate]) -> str:
    text = f"Speed-up and efficiency: beside the best plan on {comparison.fewest_gpus}, the latter for each GPU."
    return f"{text} {LEFT_OUT}" if best[0].training else text


def _changes(comparison: Comparison, estimate: Estimate) -> str:
    """What most of the efficiency that is lost or won goes to, where it is worth a word."""
    lacking = 1 - comparison.efficiency(estimate)
    if abs(lacking) < LEAST_SHARE:
        return ""
    found = comparison.losses(estimate)
    worst = found[:MOST_LOSSES] if lacking > 0 else found[::-1][:MOST_LOSSES]
    named = [
        f"{percent(abs(loss.share))} {'to' if lacking > 0 else 'in'} {loss.what}"
        for loss in worst
        if loss.share * lacking > 0 and abs(loss.share) >= LEAST_SHARE
    ]
    return sentence(f"{'loses' if lacking > 0 else 'gains'} {', '.join(named)}")


def _strategy_columns(scales: Sequence[Scale], width: int) -> list[Column]:
    """Strategies by counts, in the order in which they come up best."""
    titles = list(dict.fromkeys(plan.plan.title for scale in reversed(scales) for plan in scale.plans))
    by_title = [{plan.plan.title: rate(plan.time.tokens_per_s) for plan in scale.plans} for scale in scales]
    counts = [
        Column(header=str(scale.cluster.gpus), cells=[found.get(title, NONE) for title in titles], rank=rank)
        for rank, (scale, found) in enumerate(zip(scales, by_title, strict=True))
    ]
    columns = [Column(header="GPUs", cells=titles, justify="left"), *counts]
    if natural_width(columns) > width - INDENT:
        columns[0] = Column(header="GPUs", cells=[folded(title) for title in titles], justify="left")
    return columns
