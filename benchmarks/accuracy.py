"""How far predicted memory is from what frameworks really hold: truth x counter x mean, max, n, worst case.

    python benchmarks/accuracy.py                                # recorded truths beside the present model; seconds
    python benchmarks/accuracy.py --measure deepspeed            # run one kind of truth anew and record it
    python benchmarks/accuracy.py --measure one-rank --seed 7 --count 20 --nowhere    # other cases, not recorded
    python benchmarks/accuracy.py --time                         # step times beside published ones
    python benchmarks/accuracy.py --gpu FOLDER                   # with the records of benchmarks/gpu_campaign.py there

Measuring needs the extra "run" and takes from minutes (deepspeed) to an hour (real runs) on two cores. Cases are drawn
at random by a seed (``benchmarks/cases``); no constant of the model is fitted to them. What was true lies in
``profiles/measured/memory``, and the table that the first command prints in ``benchmarks/accuracy.txt``; a test holds
the two together, so that a change of the model shows. Counter: live bytes of tensors on one rank. Kernel scratch, the
allocator's rounding, the CUDA context and NCCL are in neither side. Real ranks reduce and scatter in place, as NCCL
does: gloo's own way copies what it is given (``advisor/validation/worker.py``).

Records of a GPU (``profiles/measured/gpu``, where there are any) add what only a GPU has: kernel scratch, the
allocator's rounding and reserved memory, the device's memory in use, and the time of a step. No constant is fitted to
them here either.
"""

from __future__ import annotations

import logging
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import click
import time_scores
from cases import adapters, cut_sequences, deepspeed, gloo, one_rank, optimizers, sharded

from advisor.catalog.calibrations import find_calibration
from advisor.catalog.gpus import find_gpu
from advisor.catalog.profiles import profiles_folder
from advisor.cost.memory import short_by
from advisor.errors import AdvisorError
from advisor.specs.calibration import likeness
from advisor.validation.accuracy import (
    Case,
    Score,
    compare,
    counted,
    predicted_step_s,
    score,
    summary,
    table,
)
from advisor.validation.campaign import truth_of
from advisor.validation.emulate import trace_ranks
from advisor.validation.record import Record, read, versions, write
from advisor.validation.run import Launcher, run

RECORDED = profiles_folder() / "measured" / "memory"
ON_GPUS = profiles_folder() / "measured" / "gpu"
SEED = 2026
BATCH = 6
"""DeepSpeed cases that share one start of the frameworks."""
TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Truth:
    """A kind of run that says what is true."""

    look: Callable[[int, int], Iterator[Record]]
    """Runs as many cases as asked, drawn by a seed; those that fail are told on stderr."""
    count: int


def traced(title: str, draw: Callable[[int, int], Sequence[Case]]) -> Callable[[int, int], Iterator[Record]]:
    def look(seed: int, count: int) -> Iterator[Record]:
        for case in draw(seed, count):
            try:
                yield Record(title, case, compare(case).true, versions())
            except AdvisorError as error:
                failed(case, error)

    return look


def on_real_tensors(seed: int, count: int) -> Iterator[Record]:
    return one_by_one("DeepSpeed, one rank of 2 to 64, real tensors", deepspeed.cases(seed, count))


def offloaded(seed: int, count: int) -> Iterator[Record]:
    title = "DeepSpeed with offload, device and host together"
    return one_by_one(title, deepspeed.offload_cases(seed, count))


def zero_plus(seed: int, count: int) -> Iterator[Record]:
    return one_by_one("DeepSpeed, ZeRO++'s second copy, real tensors", deepspeed.zero_plus_cases(seed, count))


def one_by_one(title: str, drawn: Sequence[Case]) -> Iterator[Record]:
    """DeepSpeed's ranks, one at a time."""
    for start in range(0, len(drawn), BATCH):
        some = drawn[start : start + BATCH]
        traces = trace_ranks([(case.config, case.job, case.plan, case.rank or 0) for case in some])
        for case, trace in zip(some, traces, strict=True):
            yield Record(title, case, counted(trace), versions())


def with_adapters(seed: int, count: int) -> Iterator[Record]:
    """Two in three traced, the others under DeepSpeed."""
    yield from traced("Adapters, one GPU, DDP and FSDP2, traced", adapters.traced)(seed, count - count // 3)
    yield from one_by_one("Adapters, DeepSpeed, real tensors", adapters.under_deepspeed(seed, count // 3))


def offloaded_adapters(seed: int, count: int) -> Iterator[Record]:
    return one_by_one("Adapters, DeepSpeed with offload, real tensors", adapters.offloaded(seed, count))


def with_optimizers(seed: int, count: int) -> Iterator[Record]:
    """Two in three traced, the others under DeepSpeed."""
    title = "Other optimizers, one GPU, DDP and FSDP, traced"
    yield from traced(title, optimizers.traced)(seed, count - count // 3)
    yield from one_by_one("Other optimizers, DeepSpeed, real tensors", optimizers.under_deepspeed(seed, count // 3))


def cut(seed: int, count: int) -> Iterator[Record]:
    """Half by heads, half by tokens."""
    yield from one_by_one("Ulysses, DeepSpeed, real tensors", cut_sequences.by_heads(seed, count // 2))
    yield from traced("Context parallelism, FSDP2, traced", cut_sequences.in_rings)(seed, count - count // 2)


def with_lengths(seed: int, count: int) -> Iterator[Record]:
    return traced("Adapters by DoRA, traced", adapters.with_lengths)(seed, count)


def in_four_bits(seed: int, count: int) -> Iterator[Record]:
    title = "Adapters beside four bits, real tensors"
    return one_by_one(title, adapters.in_four_bits(seed, count))


def for_real(seed: int, count: int) -> Iterator[Record]:
    """Real ranks through the real launchers; the fullest is recorded."""
    for case, launcher in gloo.cases(seed, count):
        try:
            yield fullest(case, launcher)
        except AdvisorError as error:
            failed(case, error)


def fullest(case: Case, launcher: Launcher) -> Record:
    traces = run(case.config, case.job, case.plan, launcher, timeout_s=TIMEOUT_S)
    found = max(traces, key=lambda each: each.peak_bytes)
    return Record(truth_of(case.plan, launcher, "cpu"), case, counted(found), versions())


def failed(case: Case, error: AdvisorError) -> None:
    print(f"failed: {case.title}: {error}", file=sys.stderr, flush=True)


TRUTHS = {
    "one-rank": Truth(traced("One rank, real sizes, traced", one_rank.cases), 84),
    "sharded": Truth(traced("FSDP2, FSDP1 and DDP, rank 0 of 2 to 64, traced", sharded.cases), 60),
    "deepspeed": Truth(on_real_tensors, 60),
    "offload": Truth(offloaded, 20),
    "zero-plus": Truth(zero_plus, 20),
    "real-runs": Truth(for_real, 60),
    "adapters": Truth(with_adapters, 42),
    "adapters-offload": Truth(offloaded_adapters, 12),
    "optimizers": Truth(with_optimizers, 60),
    "cut-sequences": Truth(cut, 48),
    "dora": Truth(with_lengths, 12),
    "four-bits": Truth(in_four_bits, 16),
}


def printed(records: Sequence[Record]) -> list[str]:
    """The tables of *records*, those of one truth together, each held against the present model."""
    ordered = sorted(records, key=lambda record: record.truth)
    scores: list[Score] = []
    for truth, group in groupby(ordered, key=lambda record: record.truth):
        scores += score(truth, [(record.case, record.comparison()) for record in group])
    return [*summary(scores), "", *table(scores)]


def on_gpus(records: Sequence[Record]) -> list[str]:
    """What tables of bytes do not say of runs on GPUs: their times, and whether what should fit did."""
    lines = []
    own = [record for record in records if record.device != "cpu" and record.execution]
    for device, group in groupby(sorted(own, key=lambda record: record.device), key=lambda record: record.device):
        runs = list(group)
        lines += ["", *_times(device, runs), *_verdicts(device, runs)]
    return lines


def _times(device: str, runs: Sequence[Record]) -> Iterator[str]:
    """Predicted step times beside those of runs all of whose ranks were there."""
    errors = {}
    for record in runs:
        case, ranks = record.case, record.execution.ranks if record.execution else ()
        if len(ranks) == int(case.plan.gpus):
            slowest_s = max(rank.median_step_s for rank in ranks)
            errors[case.title] = predicted_step_s(device, case.model, case.job, case.plan) / slowest_s - 1
    if errors:
        sizes = [abs(error) for error in errors.values()]
        worst = max(errors, key=lambda title: abs(errors[title]))
        yield (
            f"{device}, step time: n {len(errors)}  mean {100 * statistics.mean(sizes):.1f} %  "
            f"max {100 * max(sizes):.1f} %"
        )
        yield f"  worst step time: {worst}, {100 * errors[worst]:+.1f} %"


def _verdicts(device: str, runs: Sequence[Record]) -> Iterator[str]:
    """Plans that are predicted to leave the calibration's margin free, and those of them that ran out of memory."""
    calibration, gpu = find_calibration(), find_gpu(device)

    def fits(record: Record) -> bool:
        margin = calibration.margin_share(likeness(record.case.plan, gpu.compute_capability))
        return bool(short_by(record.comparison().predicted["device used"], gpu.memory_bytes, margin) <= 0)

    fitting = [record for record in runs if record.outcome.kind in ("ran", "out-of-memory") and fits(record)]
    failed = [record.case.title for record in fitting if record.outcome.kind == "out-of-memory"]
    yield f"{device}, predicted to fit: {len(fitting)}, out of memory {len(failed)}"
    yield from (f"  ran out of memory: {title}" for title in failed)


@click.command()
@click.option("--measure", type=click.Choice(list(TRUTHS)), help="Run the cases of this truth.")
@click.option("--seed", default=SEED, show_default=True)
@click.option("--count", type=int, help="How many cases.  [default: as recorded]")
@click.option("--nowhere", is_flag=True, help="Record nothing.")
@click.option("--gpu", type=click.Path(path_type=Path), default=ON_GPUS, help="Folder of a GPU campaign's records.")
@click.option("--time", "times", is_flag=True, help="Step times beside published ones, in place of memory.")
def main(measure: str | None, seed: int, count: int | None, nowhere: bool, gpu: Path, times: bool) -> None:
    """Predicted memory, or time, beside what is true."""
    logging.disable(logging.WARNING)
    if times:
        print(*time_scores.lines(), sep="\n")
        return
    if measure is None:
        paths = sorted([*RECORDED.glob("*.jsonl"), *gpu.glob("*.jsonl")])
        records = [record for path in paths for record in read(path)]
        print("\n".join([*printed([record for record in records if record.true]), *on_gpus(records)]))
        return
    truth = TRUTHS[measure]
    found: list[Record] = []
    for record in truth.look(seed, count or truth.count):
        found.append(record)
        print(f"{100 * record.comparison().error():+8.3f} %  {record.case.title}", flush=True)
        if not nowhere:
            RECORDED.mkdir(parents=True, exist_ok=True)
            write(RECORDED / f"{measure}.jsonl", found)
    print("\n" + "\n".join(printed(found)))


if __name__ == "__main__":
    main()
