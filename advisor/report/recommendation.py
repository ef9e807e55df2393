"""A recommendation to read: the answer, the plans side by side, why the others lost, and what to type."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import RenderableType
from rich.text import Text

from advisor.cost.results import Estimate
from advisor.report.numbers import GB, GIB, aligned, gib, percent, rate
from advisor.report.question import assumed_line, question_line, read_lines, sentence
from advisor.report.tables import (
    INDENT,
    Column,
    faint,
    fitted_table,
    list_of,
    natural_width,
    section,
    verbatim,
)
from advisor.report.training import training_columns, training_section
from advisor.search.pareto import NEAR_SHARE, thinned
from advisor.search.results import Recommendation, Rejected
from advisor.specs.plan import Plan, Strategy

if TYPE_CHECKING:
    from advisor.launch.files import Launch

LEGEND = (
    "Batch: sequences a GPU takes at once × accumulation steps. Peak, range: memory of the fullest GPU, and where a "
    "real run may end up. Sent: by one GPU in a step."
)

LAYOUT_LEGEND = (
    "TP, PP, VPP, CP, DP: tensor parallel (sp: sequence parallel, too), pipeline stages, virtual stages of each, "
    "context parallel, data parallel."
)

LEFT_OUT_OF_FRONT = (
    f"Left out: what is within {100 * NEAR_SHARE:.0f} % of a plan above it in every respect; --json has all."
)

FOLDED_WIDTH = 18
"""Characters of a line of a strategy's name where the page is narrow; ``ZeRO-2 + optimizer`` just fits."""

TOLD_MISSES = 3
"""Of layouts that do not fit."""

WIDE = 120
"""Columns of a page on which a strategy's whole name leaves enough room for the reason beside it."""


def recommendation_report(
    recommendation: Recommendation, launch: Launch | None, *, width: int, written: Sequence[Path] = ()
) -> list[RenderableType]:
    """The whole answer for a page of *width* columns; *written* are the launch files on disk, if any."""
    best, others = recommendation.best, recommendation.plans[1:]
    parts: list[RenderableType] = [Text(recommendation.headline, style="bold green" if best else "bold red")]
    if best:
        parts.append(Text(f"Why: {sentence(best.why)}"))
    parts += [
        Text(),
        Text(question_line(recommendation.model, recommendation.job, recommendation.cluster)),
        *read_lines(recommendation.inputs),
        *assumed_line(recommendation.inputs),
    ]
    if best:
        parts += [Text(), *_plans(recommendation.plans, width)]
        if best.training:
            parts += training_section(best.training, recommendation.cluster)
    if recommendation.pareto:
        shown = thinned(recommendation.pareto)
        parts += section(
            "No plan beats these in time and memory", *_front(shown, width - INDENT), faint(LEFT_OUT_OF_FRONT)
        )
    if others:
        parts += section("Why not the others", list_of(_losses(others, width)))
    if recommendation.rejected:
        told = _told(recommendation.rejected)
        more = len(recommendation.rejected) - len(told)
        rest = [faint(f"{more} more layouts are ruled out; --json has all.")] * (more > 0)
        parts += section("What is ruled out", list_of(_rejections(told, width)), *rest)
    if launch:
        parts += launch_section(launch, recommendation.cluster.nodes, width, written)
    return parts


def _plans(plans: Sequence[Estimate], width: int) -> list[RenderableType]:
    columns = _columns(plans, [each.plan.title for each in plans])
    if natural_width(columns) > width:
        columns = _columns(plans, [folded(each.plan.title) for each in plans])
    layouts = plans[0].plan.strategy is Strategy.MEGATRON
    return fitted_table(columns, width, legend=f"{LAYOUT_LEGEND} {LEGEND}" if layouts else LEGEND, strong=True)


def _front(plans: Sequence[Estimate], width: int) -> list[RenderableType]:
    names = [each.plan.title for each in plans]
    columns = _front_columns(plans, names)
    if natural_width(columns) > width:
        columns = _front_columns(plans, [folded(name) for name in names])
    return fitted_table(columns, width)


def _front_columns(plans: Sequence[Estimate], names: Sequence[str]) -> list[Column]:
    peaks = aligned([each.memory.device_used_bytes / GIB for each in plans], most_decimals=1)
    return [
        Column(header="Strategy", cells=names, justify="left"),
        Column(header="Batch", cells=batches(plans)),
        Column(header="Check-\npoints", cells=[each.plan.checkpointing.value for each in plans], rank=2),
        Column(header="Peak\nGiB", cells=peaks),
        Column(header="Tokens\nper s", cells=[rate(each.time.tokens_per_s) for each in plans]),
        *training_columns(plans),
    ]


def _columns(plans: Sequence[Estimate], titles: Sequence[str]) -> list[Column]:
    memory = [plan.memory for plan in plans]
    ends = aligned([end / GIB for each in memory for end in (each.low_bytes, each.high_bytes)], significant=2)
    ranges = [f"{low}–{high}" for low, high in zip(ends[::2], ends[1::2], strict=True)]
    columns = [
        *(_layout_columns(plans) or [Column(header="Strategy", cells=titles, justify="left")]),
        Column(header="Batch", cells=batches(plans)),
        Column(header="Check-\npoints", cells=[each.plan.checkpointing.value for each in plans], rank=1),
        Column(header="Peak\nGiB", cells=aligned([each.device_used_bytes / GIB for each in memory], most_decimals=1)),
        Column(header="Range\nGiB", cells=ranges, rank=2),
        Column(header="Host\nGiB", cells=aligned([each.host_bytes / GIB for each in memory], most_decimals=0), rank=4),
        Column(
            header="Sent\nGB",
            cells=aligned([each.sent_bytes / GB for each in plans], most_decimals=1),
            rank=3,
        ),
        Column(header="Step\ns", cells=aligned([each.time.step_s for each in plans])),
        Column(header="Tokens\nper s", cells=[rate(each.time.tokens_per_s) for each in plans]),
        Column(header="MFU", cells=[percent(each.time.mfu) for each in plans], rank=5),
        *training_columns(plans),
    ]
    if any(each.verdict == "tight" for each in plans):
        fits = Column(header="Fits", cells=["tight" if each.verdict == "tight" else "" for each in plans])
        columns.insert([column.header for column in columns].index("Peak\nGiB") + 1, fits)
    return columns


def _layout_columns(estimates: Sequence[Estimate]) -> list[Column]:
    """How many GPUs layouts cut what over; nothing of strategies that cut no layers."""
    plans = [each.plan for each in estimates]
    if any(plan.strategy is not Strategy.MEGATRON for plan in plans):
        return []
    tensor = [f"{plan.tensor_parallel}{' + sp' if plan.sequence_parallel else ''}" for plan in plans]
    found = [
        Column(header="TP", cells=tensor, justify="left"),
        Column(header="PP", cells=[str(plan.pipeline_parallel) for plan in plans]),
        Column(header="VPP", cells=[str(plan.virtual_stages) for plan in plans]),
        Column(header="CP", cells=[str(plan.context_parallel) for plan in plans]),
        Column(header="DP", cells=[str(plan.data_parallel) for plan in plans]),
    ]
    if any(plan.expert_parallel > 1 for plan in plans):
        found.append(Column(header="EP", cells=[str(plan.expert_parallel) for plan in plans]))
    if not all(plan.megatron.distributed_optimizer for plan in plans):
        held = ["cut" if plan.megatron.distributed_optimizer else "whole" for plan in plans]
        found.append(Column(header="Opti-\nmizer", cells=held))
    return found


def batches(plans: Sequence[Estimate]) -> list[str]:
    """Micro-batch × accumulation steps, the signs under each other."""
    width = max(len(str(each.plan.accumulation_steps)) for each in plans)
    return [f"{each.plan.micro_batch} × {each.plan.accumulation_steps!s:<{width}}" for each in plans]


def _losses(others: Sequence[Estimate], width: int) -> list[tuple[str, str]]:
    return [(_title_in_list(each.plan, width), sentence(each.why)) for each in others]


def _rejections(rejections: Sequence[Rejected], width: int) -> list[tuple[str, str, str]]:
    return [
        (
            _title_in_list(each.plan, width),
            f"short by {gib(each.short_by_bytes)}" if each.short_by_bytes else "",
            sentence(each.why) + (f" What would do: {sentence(each.remedy)}" if each.remedy else ""),
        )
        for each in rejections
    ]


def _told(rejections: Sequence[Rejected]) -> list[Rejected]:
    """All strategies; of layouts the nearest misses, and one for each kind of cut that does not divide."""
    layouts = [each for each in rejections if each.plan.strategy is Strategy.MEGATRON]
    misses = sorted((each for each in layouts if each.short_by_bytes), key=lambda each: each.short_by_bytes)
    kinds = {_cuts(each.plan): each for each in reversed(layouts) if not each.short_by_bytes}
    others = [each for each in rejections if each.plan.strategy is not Strategy.MEGATRON]
    return [*others, *misses[:TOLD_MISSES], *kinds.values()]


def _cuts(plan: Plan) -> tuple[bool, ...]:
    return plan.tensor_parallel > 1, bool(plan.pipeline_parallel > 1), plan.context_parallel > 1


def _title_in_list(plan: Plan, width: int) -> str:
    return plan.title if width >= WIDE else folded(plan.title)


def folded(name: str) -> str:
    """*name* over lines of at most :data:`FOLDED_WIDTH` characters."""
    return "\n".join(textwrap.wrap(name, FOLDED_WIDTH, subsequent_indent=" "))


def launch_section(launch: Launch, nodes: int, width: int, written: Sequence[Path]) -> list[RenderableType]:
    """What to type, or where it was written."""
    names = ", ".join(file.name for file in launch.files)
    if written:
        script = next(path for path in written if path.name == "run.sh")
        where = f" on each of the {nodes} machines" if nodes > 1 else ""
        explanation = f"{names} are in {script.parent}. Type{where}:"
        command = f"bash {shlex.quote(str(script))}"
    else:
        explanation = f"Give --out FOLDER to write {names}. In that folder:"
        command = shell_lines(launch, width - INDENT)
    return [*section("To start it", Text(explanation), Text()), verbatim(command)]


def shell_lines(launch: Launch, width: int) -> str:
    """The launch command as it can be pasted, continued over lines of at most *width* where its words allow."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in launch.environment.items()]
    words = [*settings, *map(shlex.quote, launch.command)]
    lines = [words[0]]
    for word in words[1:]:
        if cell_len(f"{lines[-1]} {word} \\") > width:
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}"
    return " \\\n".join(lines)
