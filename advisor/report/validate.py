"""Plans predicted and measured, side by side: to read, and for programs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from advisor.report.machine import SCHEMA, Json, inputs_object, plan_object
from advisor.report.numbers import GIB, parameter_count, rate, seconds
from advisor.report.question import assumed_line, question_line
from advisor.report.tables import INDENT, Column, faint, fitting, natural_width, section, table_of
from advisor.report.trace import signed_percent
from advisor.validation.accuracy import COUNTERS, Comparison, Counter
from advisor.validation.campaign import Check, Validation
from advisor.validation.measured import Messages
from advisor.validation.planned import title_of
from advisor.validation.recorded import tokens_per_s

MIB = 2**20
UNKNOWN = "-"
SHOWN: dict[Counter, str] = {
    "between steps": "between steps",
    "peak in forward": "highest in forward",
    "end of forward": "when backward begins",
    "peak in backward": "highest in backward",
    "peak in step": "highest in the optimizer's step",
    "peak": "highest of all",
    "peak reserved": "highest reserved",
    "device used": "device in use",
}


def validation_report(found: Validation, *, width: int) -> list[RenderableType]:
    """The whole comparison for a page of *width* columns."""
    question = found.planned.question
    parts: list[RenderableType] = [
        Text(_headline(found), style="bold"),
        Text(),
        Text(question_line(question.model, question.job, question.cluster)),
        *assumed_line(question.inputs),
        *_stand_in(found),
        *section("Predicted and measured", _plans(found.checks, width)),
    ]
    for check in found.checks:
        if check.comparison:
            title = f"{_title(check)}: bytes of rank {check.record.case.rank}, the fullest"
            parts += section(title, _phases(check.comparison, width))
            if sent := _sent(check):
                parts += section(f"{_title(check)}: calls of one step, by DeepSpeed's log on rank 0", _calls(sent))
        else:
            lines = check.record.outcome.last_lines or ("It said nothing.",)
            parts += section(f"{_title(check)}: {check.record.outcome.kind}", *(Text(line) for line in lines))
    parts += [Text(), faint(_left_out(found)), faint(f"Recorded in {found.records}; `advisor records` lists them.")]
    return parts


def _headline(found: Validation) -> str:
    compared = [check.comparison for check in found.checks if check.comparison]
    ran = f"{len(compared)} of {len(found.planned.runs)} plan{'s' if len(found.planned.runs) > 1 else ''} ran"
    where = "on GPUs" if found.planned.device == "cuda" else "on this machine's CPU"
    if not compared:
        return f"Not validated: {ran} {where}."
    states = max(abs(each.difference_bytes("between steps")) for each in compared)
    exact = "states as predicted to the byte" if not states else f"states off by at most {states:,} B"
    peak = max((each.error() for each in compared), key=abs)
    return f"Validated: {ran} {where}; {exact}, peak off by at most {signed_percent(peak)}."


def _stand_in(found: Validation) -> list[RenderableType]:
    """What ran in the model's place, and what was cut for it; loud, for it is not what was asked for."""
    cuts = list(dict.fromkeys(cut for check in found.checks for cut in _cuts(check)))
    if found.planned.twin is None or not cuts:
        return []
    small = f"a small twin of it ({parameter_count(found.planned.twin.model.parameter_count)} parameters)"
    what = small if found.planned.twin.cuts else "the same model"
    return [Text(), Text(f"No GPU is used: {what} ran on the CPU. Cut: {'; '.join(cuts)}.", style="bold yellow")]


def _cuts(check: Check) -> Sequence[str]:
    return check.record.execution.cuts if check.record.execution else ()


def _title(check: Check) -> str:
    run = check.record.execution
    return title_of(check.record.case.plan, run.launcher) if run else check.record.truth


def _plans(checks: Sequence[Check], width: int) -> RenderableType:
    ranks = [check.record.execution.ranks if check.record.execution else () for check in checks]
    timed = [check.record.timed_ranks for check in checks]
    speeds = [tokens_per_s(each) for each in timed]
    steps = [max((rank.median_step_s for rank in each), default=None) for each in timed]
    expected = [check.predicted_step_s for check in checks]
    hosts = [max((rank.host_peak_bytes for rank in each), default=None) for each in ranks]
    columns = [
        Column(header="Plan", cells=[_title(check) for check in checks], justify="left"),
        Column(header="Outcome", cells=[_outcome(check) for check in checks], justify="left"),
        Column(header="States\noff by", cells=[_difference(check.comparison, "between steps") for check in checks]),
        Column(header="Peak\nMiB", cells=[_peak(check.comparison) for check in checks]),
        Column(header="Peak\noff by", cells=[_error(check.comparison, "peak") for check in checks]),
        Column(header="Step", cells=[seconds(each) if each else UNKNOWN for each in steps]),
        *([Column(header="Step\npredicted", cells=[seconds(each or 0) for each in expected])] if any(expected) else []),
        Column(header="Tokens\nper s", cells=[rate(each) if each else UNKNOWN for each in speeds], rank=1),
        Column(
            header="Host MiB\nper rank", cells=[f"{each / MIB:,.0f}" if each else UNKNOWN for each in hosts], rank=2
        ),
    ]
    kept, _ = fitting(columns, width - INDENT)
    return table_of(kept)


def _outcome(check: Check) -> str:
    return f"{check.record.outcome.kind}{', recorded before' if check.resumed else ''}"


def _peak(found: Comparison | None) -> str:
    return f"{found.true['peak'] / MIB:,.1f}" if found else UNKNOWN


def _difference(found: Comparison | None, counter: Counter) -> str:
    return f"{found.difference_bytes(counter):,} B" if found else UNKNOWN


def _error(found: Comparison | None, counter: Counter) -> str:
    return signed_percent(found.error(counter)) if found else UNKNOWN


def _phases(found: Comparison, width: int) -> RenderableType:
    counters = [counter for counter in SHOWN if counter in found.true]
    large = found.true["peak"] >= GIB
    unit, size = ("GiB", GIB) if large else ("MiB", MIB)
    short = [
        Column(header="Phase", cells=[SHOWN[counter] for counter in counters], justify="left"),
        Column(header=f"Predicted\n{unit}", cells=[f"{found.predicted[each] / size:,.3f}" for each in counters]),
        Column(header=f"Measured\n{unit}", cells=[f"{found.true[each] / size:,.3f}" for each in counters]),
        Column(header="Error", cells=[_error(found, each) for each in counters]),
    ]
    exact = Column(header="Difference\nbytes", cells=[f"{found.difference_bytes(each):+,}" for each in counters])
    columns = [*short, exact] if natural_width([*short, exact]) <= width - INDENT else short
    return table_of(columns, strong_rows=[counters.index("peak")])


def _sent(check: Check) -> Sequence[Messages]:
    ranks = check.record.execution.ranks if check.record.execution else ()
    return ranks[0].communication if ranks else ()


def _calls(sent: Sequence[Messages]) -> RenderableType:
    return table_of(
        [
            Column(header="Collective", cells=[each.collective for each in sent], justify="left"),
            Column(header="Calls", cells=[f"{each.calls:,}" for each in sent]),
            Column(header="MiB", cells=[f"{each.size_bytes / MIB:,.3f}" for each in sent]),
            Column(header="Time", cells=[seconds(each.seconds) for each in sent]),
        ]
    )


def _left_out(found: Validation) -> str:
    if found.planned.device == "cuda":
        return "Measured by torch's allocator and the driver; predicted without this machine's calibration."
    return (
        "Live bytes of tensors. No CPU shows kernel scratch, the allocator's rounding, NCCL or the CUDA context, and "
        "its times say nothing of a GPU."
    )


def validation_object(found: Validation) -> Json:
    """The comparison as one JSON object; what is not known is null."""
    twin, question = found.planned.twin, found.planned.question
    return {
        "schema": SCHEMA,
        "inputs": inputs_object(question.inputs),
        "model": {
            "name": found.planned.question.model.name,
            "parameters": found.planned.question.model.parameter_count,
        },
        "device": found.planned.device,
        "twin": {"parameters": twin.model.parameter_count, "cuts": list(twin.cuts)} if twin and twin.cuts else None,
        "plans": len(found.planned.runs),
        "runs": [_run(check) for check in found.checks],
        "all_ran": found.all_ran,
        "interrupted": found.interrupted,
        "records": str(found.records),
        "warnings": list(found.planned.warnings),
    }


def _run(check: Check) -> Json:
    record, run = check.record, check.record.execution
    ranks = run.ranks if run else ()
    return {
        "id": run.id if run else None,
        "plan": plan_object(record.case.plan),
        "sequence_length": record.case.job.sequence_length,
        "launcher": run.launcher if run else None,
        "outcome": record.outcome.kind,
        "last_lines": list(record.outcome.last_lines),
        "resumed": check.resumed,
        "seconds": run.seconds if run else None,
        "cuts": list(run.cuts) if run else [],
        "rank": record.case.rank,
        "counters": [_counter(check.comparison, counter) for counter in _known(check.comparison)],
        "predicted_step_s": check.predicted_step_s,
        "step_s": [list(rank.step_s) for rank in check.record.timed_ranks],
        "tokens_per_s": tokens_per_s(check.record.timed_ranks),
        "host_peak_bytes": [rank.host_peak_bytes for rank in ranks],
        "communication": [
            {
                "collective": each.collective,
                "calls": each.calls,
                "size_bytes": each.size_bytes,
                "seconds": each.seconds,
            }
            for each in _sent(check)
        ],
    }


def _known(found: Comparison | None) -> list[Counter]:
    return [counter for counter in COUNTERS if found and counter in found.true]


def _counter(found: Comparison | None, counter: Counter) -> Json:
    assert found is not None
    return {
        "counter": counter,
        "predicted_bytes": found.predicted[counter],
        "measured_bytes": found.true[counter],
        "error": found.error(counter),
    }


def validation_rows(found: Validation) -> list[Json]:
    """One row for each plan and counter, or for a plan that did not run."""
    rows: list[Json] = []
    for check in found.checks:
        counters: list[Counter | None] = [*_known(check.comparison)] or [None]
        for counter in counters:
            compared = check.comparison if counter else None
            rows.append(
                {
                    "plan": _title(check),
                    "strategy": check.record.case.plan.strategy.value,
                    "outcome": check.record.outcome.kind,
                    "counter": counter,
                    "predicted_bytes": compared.predicted[counter] if compared and counter else None,
                    "measured_bytes": compared.true[counter] if compared and counter else None,
                }
            )
    return rows
