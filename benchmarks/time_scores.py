"""Scores of predicted step times against published runs: ``python benchmarks/accuracy.py --time`` prints them.

Scored are the runs of ``profiles/measured/step_times.csv`` whose inputs are complete, on A100, H100 and H200, each by
one prediction without anything fitted to it: rates of kernels are fitted to measured kernels (benchmarks/fit_rates.py),
latencies of links to measured collectives (benchmarks/fit_collectives.py), and what overlap saves is published
(``overlap_share``). The one constant that comes from training runs is the bandwidth of host memory; the two runs that
it comes from (``fitted``) are not scored.

A sweep is several runs of one model, length and GPUs that differ in micro-batch, checkpointing, sharding, loss or
compilation. Over all of a sweep, predicted and published throughput are ranked (Spearman's coefficient), and the run
that would be chosen is held against the one that was fastest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from published_times import Compared, predict

from advisor.validation.published import Row, published, published_rows

SCORED_GPUS = ("A100", "H100", "H200")
SWEPT = ("model", "gpu", "gpus", "sequence_length")
"""What the runs of a sweep have in common."""


def scored() -> list[Row]:
    """The runs that may be scored, complete or not."""
    return [row for row in published_rows("step_times") if row["gpu"].split("-")[0] in SCORED_GPUS]


def complete_runs() -> list[Compared]:
    """Those with complete inputs, beside their predictions."""
    return [Compared(row, predict(row)) for row in scored() if row["complete"] == "yes" and not row["fitted"]]


def lines() -> Iterator[str]:
    """What is printed."""
    complete = complete_runs()
    yield "Predicted over published tokens per second; complete rows, nothing fitted to any of them"
    yield ""
    for each in complete:
        yield f"{title(each.row):92} {each.ratio:6.3f}"
    yield ""
    yield f"{'':46} {'n':>4} {'median':>8} {'mean':>8} {'90th':>8} {'max':>8}   |error| of the throughput"
    for name, found in groupby(sorted(complete, key=project), key=project):
        yield errors(name, [each.ratio for each in found])
    yield errors("all", [each.ratio for each in complete])
    yield ""
    yield f"{'Sweeps':46} {'n':>4} {'Spearman':>9}  chosen over fastest"
    found = list(sweeps())
    for each in found:
        yield f"{each.name:46} {each.runs:4} {each.correlation:9.2f}  {each.chosen_share:19.3f}"
    correlation = np.mean([each.correlation for each in found])
    shares = [each.chosen_share for each in found]
    yield f"{'mean':46} {len(found):4} {correlation:9.2f}  {np.mean(shares):19.3f} least {min(shares):.3f}"


def title(row: Row) -> str:
    plan = published(row).plan
    notes = [f"checkpointing {plan.checkpointing.value}", *(["compiled"] if row["compile"] == "yes" else [])]
    notes += [f"{row['loss']} loss"] if row["loss"] else []
    batch = f"{plan.micro_batch} x {row['sequence_length']}"
    return f"{row['model']}, {plan.gpus} {row['gpu']}, {plan.title}, {batch}, {', '.join(notes)}"


def project(compared: Compared) -> str:
    """Whose runs they are."""
    return compared.row["source"].split(" ")[0]


def errors(name: str, ratios: Sequence[float]) -> str:
    found = np.abs(np.array(ratios) - 1)
    shown = [np.median(found), found.mean(), np.quantile(found, 0.9), found.max()]
    return f"{name:46} {found.size:4} " + " ".join(f"{100 * each:6.1f} %" for each in shown)


class Sweep(NamedTuple):
    """Runs that differ in what may be chosen."""

    name: str
    runs: int
    correlation: float
    """Spearman's, of predicted and published throughput."""
    chosen_share: float
    """Throughput of the run that is predicted fastest over that of the fastest."""


def sweeps() -> Iterator[Sweep]:
    """Those of all runs that may be scored."""

    def swept(row: Row) -> tuple[str, ...]:
        return tuple(row[name] for name in SWEPT)

    for key, rows in groupby(sorted(scored(), key=swept), key=swept):
        several = list(rows)
        measured = np.array([float(row["tokens_per_s_per_gpu"]) for row in several])
        if np.unique(measured).size < 2:
            continue
        predicted = np.array([predict(row).tokens_per_s_per_gpu for row in several])
        name = f"{key[0]}, {key[2]} {key[1]}, length {key[3]}"
        share = float(measured[np.argmax(predicted)] / measured.max())
        yield Sweep(name, len(several), spearman(predicted, measured), share)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank."""
    import pandas as pd

    return float(pd.Series(first).rank().corr(pd.Series(second).rank()))
