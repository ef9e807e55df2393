"""Emulated ranks beside the recorded real ones: the same cases, one rank at a time in a fake process group.

    python benchmarks/emulated_ranks.py                     # all 60 recorded real runs, minutes
    python benchmarks/emulated_ranks.py --launcher torchrun

A record holds the rank that held most, so every rank is emulated and the fullest compared.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby

import click

from advisor.catalog.profiles import profiles_folder
from advisor.validation.accuracy import Counter, counted
from advisor.validation.emulate import trace_ranks
from advisor.validation.record import Record, read

REAL = profiles_folder() / "measured" / "memory" / "real-runs.jsonl"
ALIKE_BYTES = 512


def differences(record: Record) -> dict[Counter, int]:
    """Emulated less real, by counter."""
    case = record.case
    traces = trace_ranks([(case.config, case.job, case.plan, rank) for rank in range(int(case.plan.gpus))])
    found = counted(max(traces, key=lambda trace: trace.peak_bytes))
    return {counter: found[counter] - size for counter, size in record.true.items()}


def line(counter: Counter, found: Sequence[dict[Counter, int]]) -> str:
    sizes = [abs(each[counter]) for each in found]
    alike = sum(size <= ALIKE_BYTES for size in sizes)
    return f"  {counter:18}  {alike} of {len(sizes)} within {ALIKE_BYTES} B, at most {max(sizes):,} B off"


@click.command()
@click.option("--launcher", default="", help="Only truths that name it.")
@click.option("--strategy", default="", help="Only plans of it.")
def main(launcher: str, strategy: str) -> None:
    """How far one emulated rank is from a real one."""
    logging.disable(logging.WARNING)
    records = [each for each in read(REAL) if each.truth.endswith(launcher)]
    records = [each for each in records if strategy in ("", each.case.plan.strategy.value)]
    records.sort(key=lambda record: (record.truth, record.case.plan.strategy.value))
    for title, group in groupby(records, key=lambda record: f"{record.truth}, {record.case.plan.strategy.title}"):
        found = []
        for record in group:
            found.append(differences(record))
            if abs(found[-1]["peak"]) > ALIKE_BYTES:
                print(f"{found[-1]['peak']:+,} B  {record.case.title}", flush=True)
        print(title, *(line(counter, found) for counter in found[0]), sep="\n", flush=True)


if __name__ == "__main__":
    main()
