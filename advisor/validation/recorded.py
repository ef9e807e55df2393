"""What records say together: those that are asked for, as rows, and as scores of the present model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from advisor.validation.accuracy import Case, Comparison, Score, score
from advisor.validation.measured import Measured
from advisor.validation.record import Record
from advisor.validation.store import own, own_path, shipped

if TYPE_CHECKING:
    import pandas

Whose = Literal["own", "shipped", "all"]


@dataclass(frozen=True, slots=True)
class Records:
    """Records in the order in which they were made."""

    records: tuple[Record, ...]
    warnings: tuple[str, ...] = ()
    """A sentence for each line that could not be read."""

    def scores(self) -> tuple[Score, ...]:
        """How far the present model is from those that ran: a score for each device, strategy and counter."""
        groups: dict[str, list[tuple[Case, Comparison]]] = {}
        for record in self.records:
            if record.true:
                title = f"{record.device}: {record.case.plan.title}"
                groups.setdefault(title, []).append((record.case, record.comparison()))
        return tuple(each for title in sorted(groups) for each in score(title, groups[title]))

    def rows(self) -> list[dict[str, str | int | float | None]]:
        """Flat columns in base units, one row a record."""
        return [_row(record) for record in self.records]

    def to_frame(self) -> pandas.DataFrame:
        """The same as a table of pandas."""
        import pandas

        return pandas.DataFrame(self.rows())


def read_records(
    *,
    whose: Whose = "own",
    strategy: str | None = None,
    outcome: str | None = None,
    model: str | None = None,
    device: str | None = None,
) -> Records:
    """This user's records, those of the package, or both: of one *strategy* or *outcome*, by a part of the names of
    *model* and *device*."""
    found, warnings = own(own_path()) if whose != "shipped" else ([], [])
    if whose != "own":
        found = [*shipped(), *found]
    wanted = [
        record
        for record in found
        if strategy in (None, record.case.plan.strategy.value)
        and outcome in (None, record.outcome.kind)
        and (model or "").casefold() in record.model_name.casefold()
        and (device or "").casefold() in record.device.casefold()
    ]
    return Records(tuple(wanted), tuple(warnings))


def _row(record: Record) -> dict[str, str | int | float | None]:
    case, run, compared = record.case, record.execution, record.comparison() if record.true else None
    plan, ranks = case.plan, record.execution.ranks if record.execution else ()
    timed = record.timed_ranks
    return {
        "id": run.id if run else None,
        "started": run.started if run else None,
        "truth": record.truth,
        "model": record.model_name,
        "parameters": case.model.parameter_count,
        "strategy": plan.strategy.value,
        "offload": plan.offload.value,
        "ranks": int(plan.gpus),
        "micro_batch": int(plan.micro_batch),
        "accumulation_steps": int(plan.accumulation_steps),
        "checkpointing": plan.checkpointing.value,
        "sequence_length": case.job.sequence_length,
        "launcher": run.launcher if run else None,
        "device": record.device,
        "outcome": record.outcome.kind,
        "last_line": record.outcome.last_lines[-1] if record.outcome.last_lines else None,
        "seconds": run.seconds if run else None,
        "predicted_states_bytes": compared.predicted["between steps"] if compared else None,
        "states_bytes": record.true.get("between steps"),
        "predicted_peak_bytes": compared.predicted["peak"] if compared else None,
        "peak_bytes": record.true.get("peak"),
        "peak_error": compared.error() if compared else None,
        "peak_reserved_bytes": record.true.get("peak reserved"),
        "device_used_bytes": record.true.get("device used"),
        "step_s": max((rank.median_step_s for rank in timed), default=None),
        "tokens_per_s": tokens_per_s(timed),
        "host_peak_bytes": max((rank.host_peak_bytes for rank in ranks), default=None),
    }


def tokens_per_s(ranks: Sequence[Measured]) -> float | None:
    """Of all ranks together, as fast as the slowest; None where none was measured."""
    if not ranks:
        return None
    return sum(rank.tokens_per_step for rank in ranks) / max(rank.median_step_s for rank in ranks)
