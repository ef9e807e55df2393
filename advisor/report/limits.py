"""How far given GPUs go, for reading and for programs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from advisor.cost.results import Estimate
from advisor.report.machine import SCHEMA, Json, estimate_object, inputs_object, model_object
from advisor.report.numbers import GIB, aligned, parameter_count, rate
from advisor.report.question import assumed_line, question_line
from advisor.report.recommendation import batches, folded
from advisor.report.tables import INDENT, Column, faint, fitted_table, natural_width, section
from advisor.search.limits import MOST_SEQUENCES, MOST_TOKENS, SATURATED_SHARE, LargestModels, Limits, Reach
from advisor.search.results import row

ANSWERS = ("largest", "saturated", "longest")
"""What is said of each reach, by the names of its fields."""

LEGEND = f"Fast enough: the smallest micro-batch with {100 * SATURATED_SHARE:.0f} % of the highest speed."
MOST_SHOWN = 3


def limits_report(limits: Limits, *, width: int) -> list[RenderableType]:
    """The whole answer for a page of *width* columns."""
    parts: list[RenderableType] = [
        Text(headline(limits), style="bold green" if limits.reaches else "bold red"),
        Text(),
        Text(question_line(limits.model, limits.job, limits.cluster)),
        *assumed_line(limits.inputs),
    ]
    for found in limits.reaches:
        title = "With offload" if found.offloads else "Everything on the GPUs"
        parts += section(title, *_reach_table(found, width - INDENT))
    return [*parts, Text(), faint(LEGEND)] if limits.reaches else parts


def headline(limits: Limits) -> str:
    """The longest sequence and the largest micro-batch in one line, or what would help."""
    where = f"{limits.cluster.gpus} × {limits.cluster.gpu.name}"
    if not limits.reaches:
        return f"Does not fit: {limits.model.name} on {where}{f'; {limits.way_out}' if limits.way_out else ''}"
    longest = max((found.longest for found in limits.reaches), key=lambda plan: plan.job.sequence_length)
    largest = max((found.largest for found in limits.reaches), key=lambda plan: int(plan.plan.micro_batch))
    return (
        f"{limits.model.name} on {where}: sequences of up to {_length(longest)} tokens, micro-batches of up to "
        f"{_size(largest)} at {limits.job.sequence_length:,}"
    )


def _length(plan: Estimate) -> str:
    length = plan.job.sequence_length
    return f"{length:,}{' or more' if length >= MOST_TOKENS else ''}"


def _size(plan: Estimate) -> str:
    size = int(plan.plan.micro_batch)
    return f"{size}{' or more' if size >= MOST_SEQUENCES else ''}"


def _reach_table(found: Reach, width: int) -> list[RenderableType]:
    questions = ["Largest micro-batch", "Fast enough", "Longest sequence"]
    answers = [_size(found.largest), _size(found.saturated), f"{_length(found.longest)} tokens"]
    plans = [getattr(found, name) for name in ANSWERS]
    before = [Column(header="", cells=questions, justify="left"), Column(header="", cells=answers)]
    return _plan_table(before, plans, width)


def _plan_table(before: Sequence[Column], plans: Sequence[Estimate], width: int) -> list[RenderableType]:
    titles = [each.plan.title for each in plans]
    peaks = aligned([each.memory.device_used_bytes / GIB for each in plans], most_decimals=1)
    after = [
        Column(header="Batch", cells=batches(plans), rank=3),
        Column(header="Check-\npoints", cells=[each.plan.checkpointing.value for each in plans], rank=1),
        Column(header="Peak\nGiB", cells=peaks, rank=2),
        Column(header="Tokens\nper s", cells=[rate(each.time.tokens_per_s) for each in plans]),
    ]
    columns = [*before, Column(header="Strategy", cells=titles, justify="left"), *after]
    if natural_width(columns) > width:
        columns = [*before, Column(header="Strategy", cells=list(map(folded, titles)), justify="left"), *after]
    return fitted_table(columns, width)


def limits_object(limits: Limits) -> Json:
    """One object: for each reach the plans that its answers are read from."""
    return {
        "schema": SCHEMA,
        "inputs": inputs_object(limits.inputs),
        "model": model_object(limits.model),
        "reaches": [
            {
                "offloads": found.offloads,
                "largest_micro_batch": int(found.largest.plan.micro_batch),
                "saturating_micro_batch": int(found.saturated.plan.micro_batch),
                "longest_sequence": found.longest.job.sequence_length,
                **{name: estimate_object(getattr(found, name)) for name in ANSWERS},
            }
            for found in limits.reaches
        ],
        "way_out": limits.way_out or None,
        "seconds": limits.seconds,
        "warnings": list(limits.warnings),
    }


def limits_rows(limits: Limits) -> list[Json]:
    """A row for each answer of each reach."""
    rows: list[Json] = []
    for found in limits.reaches:
        for name in ANSWERS:
            plan: Estimate = getattr(found, name)
            rows.append({"answer": name, "seq_len": plan.job.sequence_length, **row(plan)})
    return rows


def models_report(answer: LargestModels, *, width: int) -> list[RenderableType]:
    """The largest models for a page of *width* columns."""
    where = f"{answer.cluster.gpus} × {answer.cluster.gpu.name}"
    if not answer.fitting:
        return [Text(f"Does not fit: none of the known models on {where}", style="bold red")]
    largest = answer.fitting[0]
    size = parameter_count(largest.model.parameter_count)
    text = f"Largest known model on {where}: {largest.model.name} ({size}) with {largest.plan.title}"
    parts: list[RenderableType] = [Text(text, style="bold green"), *assumed_line(answer.inputs), Text()]
    before = [
        Column(header="Model", cells=[each.model.name for each in answer.fitting], justify="left"),
        Column(header="Param-\neters", cells=[parameter_count(each.model.parameter_count) for each in answer.fitting]),
    ]
    parts += _plan_table(before, answer.fitting, width)
    if answer.too_large:
        nearest = ", ".join(model.name for model in answer.too_large[: -MOST_SHOWN - 1 : -1])
        parts += [Text(), Text(f"The nearest that do not fit: {nearest}.")]
    return parts


def models_object(answer: LargestModels) -> Json:
    """One object: the best plan of each model that fits, largest model first, and the names of those that do not."""
    return {
        "schema": SCHEMA,
        "inputs": inputs_object(answer.inputs),
        "fitting": [estimate_object(plan) for plan in answer.fitting],
        "too_large": [model.name for model in answer.too_large],
        "seconds": answer.seconds,
    }


def models_rows(answer: LargestModels) -> list[Json]:
    """A row for each model that fits."""
    return [
        {"model": plan.model.name, "parameters": plan.model.parameter_count, **row(plan)} for plan in answer.fitting
    ]
