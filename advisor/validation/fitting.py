"""Constants of a calibration from measurements: rates of single operations, and recorded runs.

A constant is fitted alone, by the formula that uses it, as the median of what each measurement by itself would have it
be; its error is that of every run's prediction by the constant that the others give (leave one out).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from advisor.cost.compute import load, rates
from advisor.cost.schedule import step_time
from advisor.specs.calibration import Calibration, likeness
from advisor.specs.hardware import Cluster, Gpu
from advisor.step.build import build
from advisor.step.program import Amount, Block, FusedAttention, Matmul, Node
from advisor.validation.accuracy import without_dropout
from advisor.validation.rates import BACKWARD_PRODUCTS, FORWARD_PRODUCTS, Kind, Rate
from advisor.validation.record import Record

Numbers = NDArray[np.float64]
CANDIDATES = np.arange(0.10, 1.30, 0.01)
LEAST_RUNS = 3
"""Without fewer than that a fit says nothing of the next run."""
HALVINGS = 30


@dataclass(frozen=True, eq=False)
class Timed:
    """Kernels of one kind on one GPU, side by side: what each asked for, and the seconds it took."""

    gpu: Gpu
    block: Block
    seconds: Numbers
    number_format: str = "bf16"

    def at(self, rows: NDArray[np.bool_]) -> Timed:
        """Those of the *rows*."""
        product, moved = self.block.matmuls[0], np.asarray(self.block.moved_bytes)[rows]
        some = _sized(product, *(np.asarray(each)[rows] for each in _sizes(product)))
        block = replace(self.block, matmuls=(some,) * len(self.block.matmuls), moved_bytes=moved)
        return replace(self, block=block, seconds=self.seconds[rows])


def _sizes(product: Matmul) -> tuple[Amount, ...]:
    """Those in which timed kernels may differ."""
    return product.m, product.n, product.k, product.count, product.flop_share


def _sized(like: Matmul, m: Amount, n: Amount, k: Amount, count: Amount, flop_share: Amount) -> Matmul:
    return replace(like, m=m, n=n, k=k, count=count, flop_share=flop_share)


def timed(
    gpu: Gpu,
    products: Sequence[Matmul],
    moved_bytes: Sequence[float],
    seconds: Sequence[float],
    *,
    times: int = 1,
    number_format: str = "bf16",
) -> Timed:
    """Kernels of one product each, or fused ones of *times* equal products. They differ in sizes alone."""
    together = _sized(products[0], *(np.array(each) for each in zip(*map(_sizes, products), strict=True)))
    block = Block("timed", "temporaries", matmuls=(together,) * times, moved_bytes=np.array(moved_bytes), kernels=1)
    return Timed(gpu, block, np.array(seconds), number_format)


def share_of_peak(timed: Timed, calibration: Calibration) -> float:
    """The share of the dense peak with the least mean error of the time."""
    return float(min(CANDIDATES, key=lambda share: float(errors(timed, share, calibration).mean())))


def errors(timed: Timed, share: float, calibration: Calibration) -> Numbers:
    """Absolute relative errors of the times that a share of the dense peak predicts."""
    rate = timed.gpu.peak_flop_per_s[timed.number_format] * share
    at = rates(timed.gpu, "bf16", calibration)._replace(
        linear_flop_per_s=rate,
        single_flop_per_s=rate,
        attention_flop_per_s=dict.fromkeys(get_args(FusedAttention), (rate, rate)),
    )
    found: Numbers = np.abs(load(timed.block, at).busy_s / timed.seconds - 1)
    return found


def operations(gpu: Gpu, kind: Kind, found: Sequence[Rate]) -> Timed | None:
    """Those of *found* that are of *kind*, matrix products or one direction of attention; None where there are none."""
    some = [each for each in found if each.kind == kind]
    if not some:
        return None
    times = {"attention forward": FORWARD_PRODUCTS, "attention backward": BACKWARD_PRODUCTS}.get(kind, 1)
    sizes = [{name: int(value) for name, value in each.sizes.items() if name != "number_format"} for each in some]
    products = [_scores(each, kind) if times > 1 else Matmul(each["m"], each["n"], each["k"]) for each in sizes]
    moved, seconds = [each.moved_bytes for each in some], [each.seconds for each in some]
    return timed(gpu, products, moved, seconds, times=times)


def _scores(sizes: Mapping[str, int], kind: Kind) -> Matmul:
    """One of the products inside a fused attention kernel under a causal mask; all are equally large."""
    length, heads = sizes["length"], sizes["batch"] * sizes["heads"]
    backward = kind == "attention backward"
    return Matmul(length, length, sizes["head_dim"], heads, "attention", 0.5, fused="sdpa", backward=backward)


@dataclass(frozen=True, slots=True)
class Fit:
    """A constant that recorded runs give."""

    constant: str
    value: Any
    """As the calibration holds it."""
    runs: int
    mean_error: float
    max_error: float
    """Of what the runs measured, each by the constant that the others give."""
    mean_error_before: float
    """By the calibration that was there."""


def from_records(records: Sequence[Record], gpu: Gpu, cluster: Cluster, calibration: Calibration) -> list[Fit]:
    """What runs on *gpu*, those of *records* that ran there by themselves, say of the calibration's constants.

    Device memory outside torch's allocator on one rank, then on several; the share of the peak by runs of one rank,
    and then how much of the communication hides by those of several.
    """
    found: list[Fit] = []
    alone = [each for each in records if each.case.plan.gpus == 1]
    several = [each for each in records if each.case.plan.gpus > 1 and _seconds(each)]
    context = _outside("context_bytes", alone, calibration.context_bytes, 0)
    found += context
    held = context[0].value if context else calibration.context_bytes
    found += _outside("communicator_bytes", several, calibration.communicator_bytes, held)

    def with_share(share: float) -> Calibration:
        return replace(calibration, matmul_efficiency={**calibration.matmul_efficiency, gpu.name: share})

    shares = _timed("matmul_efficiency", alone, cluster, with_share, calibration.linear_share(gpu))
    found += [replace(each, value={gpu.name: each.value}) for each in shares]
    best = with_share(shares[0].value) if shares else calibration
    found += _timed(
        "overlap_share",
        several,
        cluster,
        lambda share: replace(best, overlap_share=share),
        calibration.overlap_share,
    )
    return found


def residuals(
    records: Sequence[Record], cluster: Cluster, calibration: Calibration
) -> dict[str, dict[str, list[float]]]:
    """Measured over predicted, of device memory and step times, by likeness."""
    memory: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    for record in records:
        like = likeness(record.case.plan, cluster.gpu.compute_capability)
        used = record.true.get("device used")
        if used:
            memory.setdefault(like, []).append(1 / (1 + record.comparison().error("device used")))
        if seconds := _seconds(record):
            times.setdefault(like, []).append(seconds / _predicted_seconds(_step(record), record, cluster, calibration))
    return {"memory_ranges": memory, "time_ranges": times}


def _outside(constant: str, records: Sequence[Record], before: float, known: float) -> list[Fit]:
    """What the driver counts beyond torch's reserved memory, and beyond what is *known* of it."""
    samples = [
        (each.true["device used"] - each.true["peak reserved"] - known, float(each.true["device used"]))
        for each in records
        if "device used" in each.true and "peak reserved" in each.true
    ]
    if len(samples) < LEAST_RUNS:
        return []

    def missed(at: int, constant: float) -> float:
        value, used = samples[at]
        return abs(constant - value) / used

    return [_fit(constant, [value for value, _ in samples], missed, before, digits=None)]


def _timed(
    constant: str,
    records: Sequence[Record],
    cluster: Cluster,
    with_value: Callable[[float], Calibration],
    before: float,
) -> list[Fit]:
    """The share between 0 and 1, growing which makes a step shorter, that step times give."""
    runs = [(record, _step(record), seconds) for record in records if (seconds := _seconds(record))]
    if len(runs) < LEAST_RUNS:
        return []

    def missed(at: int, share: float) -> float:
        record, step, seconds = runs[at]
        return abs(_predicted_seconds(step, record, cluster, with_value(share)) / seconds - 1)

    found = [_solved(record, step, seconds, cluster, with_value) for record, step, seconds in runs]
    return [_fit(constant, found, missed, before, digits=3)]


def _fit(
    constant: str, found: list[float], missed: Callable[[int, float], float], before: float, digits: int | None
) -> Fit:
    """The median of what each run would have the constant be; *missed* is a run's error by a value of it."""
    places = range(len(found))
    left_out = [missed(at, statistics.median(found[:at] + found[at + 1 :])) for at in places]
    return Fit(
        constant=constant,
        value=round(statistics.median(found), digits),
        runs=len(found),
        mean_error=statistics.mean(left_out),
        max_error=max(left_out),
        mean_error_before=statistics.mean(missed(at, before) for at in places),
    )


def _solved(
    record: Record, step: Node, seconds: float, cluster: Cluster, with_value: Callable[[float], Calibration]
) -> float:
    """The share by which the run would take as long as it did, or the nearest there is."""
    low, high = 0.01, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _predicted_seconds(step, record, cluster, with_value(middle)) > seconds:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _seconds(record: Record) -> float | None:
    """A step of the slowest rank; None where times mean nothing."""
    return max((rank.median_step_s for rank in record.timed_ranks if rank.step_s), default=None)


def _step(record: Record) -> Node:
    case = record.case
    return build(without_dropout(case.model), case.job, case.plan, 0).step


def _predicted_seconds(step: Node, record: Record, cluster: Cluster, calibration: Calibration) -> float:
    job, plan = record.case.job, record.case.plan
    gpus = int(plan.gpus)
    return step_time(step, job, plan, replace(cluster, gpus=gpus), calibration).at(0).step_s
