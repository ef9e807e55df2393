"""Records to read: a line each, and how far the present model is from them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from advisor.report.machine import SCHEMA, Json
from advisor.report.numbers import GIB, gib, rate
from advisor.report.tables import Column, faint, fitting, list_of, section, table_of
from advisor.report.trace import signed_percent
from advisor.validation.accuracy import Score
from advisor.validation.recorded import Records

MIB = 2**20
UNKNOWN = "-"


def records_report(found: Records, *, width: int) -> list[RenderableType]:
    """One row a record, oldest first."""
    rows = found.rows()

    def texts(name: str) -> list[str]:
        return [UNKNOWN if row[name] is None else str(row[name]) for row in rows]

    def numbers(name: str) -> list[float | None]:
        return [value if isinstance(value := row[name], int | float) else None for row in rows]

    columns = [
        Column(header="Started", cells=[text[:16].replace("T", " ") for text in texts("started")], justify="left"),
        Column(header="Model", cells=texts("model"), justify="left"),
        Column(
            header="Plan",
            cells=[f"{record.case.plan.title} × {record.case.plan.gpus}" for record in found.records],
            justify="left",
        ),
        Column(header="Launcher", cells=texts("launcher"), justify="left", rank=3),
        Column(header="Device", cells=texts("device"), justify="left", rank=1),
        Column(header="Outcome", cells=texts("outcome"), justify="left"),
        Column(
            header="Peak", cells=[UNKNOWN if size is None else _size(size) for size in numbers("peak_bytes")], rank=2
        ),
        Column(
            header="Peak\noff by",
            cells=[UNKNOWN if error is None else signed_percent(error) for error in numbers("peak_error")],
        ),
        Column(
            header="Tokens\nper s",
            cells=[UNKNOWN if speed is None else rate(speed) for speed in numbers("tokens_per_s")],
            rank=4,
        ),
    ]
    kept, _ = fitting(columns, width)
    return [table_of(kept)]


def scores_report(found: Records, *, width: int) -> list[RenderableType]:
    """Predicted beside true over all that ran: a row for each device and strategy, and the worst cases."""
    scores = found.scores()
    peaks = [each for each in scores if each.counter == "peak"]
    states = {each.truth: each for each in scores if each.counter == "between steps"}
    columns = [
        Column(header="Strategy", cells=[_strategy(each) for each in peaks], justify="left"),
        Column(header="Counted on", cells=[_device(each) for each in peaks], justify="left"),
        Column(header="n", cells=[f"{each.count:,}" for each in peaks]),
        Column(
            header="States\noff by up to", cells=[f"{states[each.truth].max_difference_bytes:,} B" for each in peaks]
        ),
        Column(header="Peak:\nmean error", cells=[_share(each.mean_error) for each in peaks]),
        Column(header="largest", cells=[_share(each.max_error) for each in peaks]),
    ]
    worst = [(_strategy(each), f"{_share(each.max_error)} {each.worst}") for each in peaks]
    return [
        table_of(fitting(columns, width)[0]),
        *section("The worst peak of each", list_of(worst)),
        Text(),
        faint("Every counter: --json or --csv. Errors are of the present model, none of it fitted to these records."),
    ]


def _size(size_bytes: float) -> str:
    return gib(size_bytes) if size_bytes >= GIB else f"{size_bytes / MIB:.1f} MiB"


def _device(each: Score) -> str:
    return each.truth.partition(": ")[0]


def _strategy(each: Score) -> str:
    return each.truth.partition(": ")[2]


def _share(error: float) -> str:
    return f"{100 * error:.3f} %"


def records_object(found: Records) -> Json:
    """All records as one JSON object."""
    return {"schema": SCHEMA, "records": found.rows(), "warnings": list(found.warnings)}


def scores_object(found: Records) -> Json:
    """All scores as one JSON object."""
    return {"schema": SCHEMA, "scores": score_rows(found.scores()), "warnings": list(found.warnings)}


def score_rows(scores: Sequence[Score]) -> list[Json]:
    """One row for each device, strategy and counter."""
    return [
        {
            "device": _device(each),
            "strategy": _strategy(each),
            "counter": each.counter,
            "count": each.count,
            "mean_error": each.mean_error,
            "max_error": each.max_error,
            "max_difference_bytes": each.max_difference_bytes,
            "worst": each.worst,
        }
        for each in scores
    ]
