"""A plan predicted and traced, side by side: to read, and for programs."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import RenderableType
from rich.text import Text

from advisor.report.machine import SCHEMA, Json, inputs_object, plan_object
from advisor.report.numbers import GIB, parameter_count
from advisor.report.question import question_line
from advisor.report.tables import INDENT, Column, faint, natural_width, section, table_of
from advisor.step.program import Category
from advisor.validation.traced import PHASES, Phase, Reading, TracedPlan

PHASE_TITLES: dict[Phase, str] = {
    "between steps": "between steps",
    "forward": "highest in forward",
    "loss": "highest in the loss",
    "end of forward": "when backward begins",
    "backward": "highest in backward",
    "step": "highest in the optimizer's step",
    "peak": "highest of all",
}
UNKNOWN = "-"


def trace_report(found: TracedPlan, *, width: int) -> list[RenderableType]:
    """The whole comparison for a page of *width* columns."""
    question, plan = found.question, found.plan
    error = found.error("peak")
    peak = found.traced.phases["peak"] / GIB
    beside = "which no formula predicts" if error is None else f"the prediction off by {signed_percent(error)}"
    checkpointing = "every layer recomputed" if plan.checkpointing.value == "full" else "no activation checkpointing"
    parts: list[RenderableType] = [
        Text.assemble(("Traced", "bold"), f": {peak:,.2f} GiB at the peak, {beside}."),
        Text(),
        Text(question_line(question.model, question.job, question.cluster)),
        Text(
            f"{plan.title}, rank {found.rank} of {plan.gpus}: micro-batch {plan.micro_batch} × "
            f"{plan.accumulation_steps} accumulation steps, {checkpointing}; {parameter_count(found.parameters)} "
            f"parameters on {found.how}."
        ),
        *section("Live tensor bytes of one rank", _phases(found, width)),
        *(section("What they are at the peak", _ledger(found, width)) if found.traced.ledger else ()),
        Text(),
        faint(
            "Left out on both sides: dropout, kernel scratch, the allocator's rounding, NCCL and the CUDA context, "
            "which no CPU shows."
        ),
    ]
    return parts


def _phases(found: TracedPlan, width: int) -> RenderableType:
    known = [phase for phase in PHASES if phase in found.traced.phases]
    return _side_by_side(
        "Phase",
        [PHASE_TITLES[phase] for phase in known],
        [found.predicted.phases.get(phase) for phase in known],
        [found.traced.phases.get(phase) for phase in known],
        width,
    )


def _ledger(found: TracedPlan, width: int) -> RenderableType:
    names = categories(found.predicted, found.traced)
    return _side_by_side(
        "Category",
        list(names),
        [_of(found.predicted.ledger, name) for name in names],
        [_of(found.traced.ledger, name) for name in names],
        width,
        least_bytes=LEAST_SHOWN_BYTES,
    )


def categories(*readings: Reading) -> tuple[Category, ...]:
    """Every category that holds a mebibyte in one of *readings*, the largest first."""
    most: dict[Category, int] = {}
    for reading in readings:
        for category, size in reading.ledger.items():
            most[category] = max(most.get(category, 0), size)
    shown = [category for category, size in most.items() if size >= LEAST_SHOWN_BYTES] or list(most)
    return tuple(sorted(shown, key=lambda category: -most[category]))


LEAST_SHOWN_BYTES = 2**20


def _of(ledger: Mapping[Category, int], name: Category) -> int | None:
    """Nothing of a category is zero, but nothing of any is unknown."""
    return ledger.get(name, 0) if ledger else None


def _side_by_side(
    what: str,
    names: list[str],
    predicted: list[int | None],
    traced: list[int | None],
    width: int,
    least_bytes: int = 1,
) -> RenderableType:
    """Predicted and traced, with an error where both are *least_bytes* or more."""
    pairs = list(zip(predicted, traced, strict=True))
    short = [
        Column(header=what, cells=names, justify="left"),
        Column(header="Predicted\nGiB", cells=[_gib(size) for size in predicted]),
        Column(header="Traced\nGiB", cells=[_gib(size) for size in traced]),
        Column(header="Error", cells=[_error(*pair, least_bytes) for pair in pairs]),
    ]
    exact = [
        Column(header="Predicted\nbytes", cells=[_bytes(size) for size in predicted]),
        Column(header="Traced\nbytes", cells=[_bytes(size) for size in traced]),
    ]
    columns = short + exact if natural_width(short + exact) <= width - INDENT else short
    strong = [len(names) - 1] if what == "Phase" else []
    return table_of(columns, strong_rows=strong)


def _gib(size: int | None) -> str:
    return UNKNOWN if size is None else f"{size / GIB:,.3f}"


def _bytes(size: int | None) -> str:
    return UNKNOWN if size is None else f"{size:,}"


def _error(predicted: int | None, traced: int | None, least_bytes: int) -> str:
    if predicted is None or traced is None or min(predicted, traced) < least_bytes:
        return UNKNOWN
    return signed_percent(predicted / traced - 1)


def signed_percent(error: float) -> str:
    """A share with its sign; what rounds to nothing has none."""
    text = f"{100 * error:+.3f} %"
    return "0.000 %" if text in ("+0.000 %", "-0.000 %") else text


def trace_object(found: TracedPlan) -> Json:
    """The comparison as one JSON object; what is not known is null."""
    return {
        "schema": SCHEMA,
        "inputs": inputs_object(found.question.inputs),
        "model": {
            "name": found.question.model.name,
            "family": found.question.model.family,
            "parameters": found.parameters,
        },
        "plan": plan_object(found.plan),
        "rank": found.rank,
        "how": found.how,
        "phases": [
            {
                "phase": phase,
                "predicted_bytes": found.predicted.phases.get(phase),
                "traced_bytes": found.traced.phases.get(phase),
                "error": found.error(phase),
            }
            for phase in PHASES
        ],
        "ledger": [
            {
                "category": name,
                "predicted_bytes": _of(found.predicted.ledger, name),
                "traced_bytes": _of(found.traced.ledger, name),
            }
            for name in categories(found.predicted, found.traced)
        ],
        "seconds": found.seconds,
        "warnings": list(found.warnings),
    }


def trace_rows(found: TracedPlan) -> list[Json]:
    """One row for each phase, then one for each category at the peak, in bytes."""
    rows: list[Json] = [
        {
            "kind": "phase",
            "name": phase,
            "predicted_bytes": found.predicted.phases.get(phase),
            "traced_bytes": found.traced.phases.get(phase),
        }
        for phase in PHASES
    ]
    rows += [
        {
            "kind": "category at the peak",
            "name": name,
            "predicted_bytes": _of(found.predicted.ledger, name),
            "traced_bytes": _of(found.traced.ledger, name),
        }
        for name in categories(found.predicted, found.traced)
    ]
    return rows
