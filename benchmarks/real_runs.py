"""Predicted memory beside real runs of two and four ranks on this machine's CPU.

    python benchmarks/real_runs.py                      # 70 cases, half an hour on two cores; needs the extra "run"
    python benchmarks/real_runs.py --seed 1 --count 20 --out FILE
    python benchmarks/real_runs.py --read FILE          # the present prediction beside recorded runs, in seconds

Truth: the real launchers, frameworks, modelling code and collectives (gloo), three optimizer steps, every rank
(``advisor/validation/run.py``). The prediction is for the rank that holds most and is held against the rank whose peak
is highest. Counter: bytes of live storages in the last step. No constant is fitted to these runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from cases.gloo import cases

from advisor.errors import AdvisorError
from advisor.validation.accuracy import Case, counted, score, table
from advisor.validation.record import Record, read, versions, write
from advisor.validation.run import Launcher, run


def recorded(case: Case, launcher: Launcher) -> Record:
    """The rank whose peak is highest."""
    traces = run(case.config, case.job, case.plan, launcher, timeout_s=300)
    worst = max(range(len(traces)), key=lambda rank: traces[rank].peak_bytes)
    framework = "DeepSpeed" if case.plan.strategy.zero_stage else case.plan.strategy.value.split("-")[0].upper()
    truth = f"{framework} by {launcher}, real ranks on gloo"
    return Record(truth, replace(case, rank=worst), counted(traces[worst]), versions())


def run_all(seed: int, count: int, out: Path | None) -> Iterator[Record]:
    """Records of all cases that ran, in *out* as far as they are there; failures go to stderr."""
    done: list[Record] = []
    for case, launcher in cases(seed, count):
        try:
            record = recorded(case, launcher)
        except AdvisorError as error:
            print(f"failed: {case.title}, by {launcher}: {error}", file=sys.stderr, flush=True)
            continue
        done.append(record)
        if out:
            write(out, done)
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted memory beside real runs of two and four ranks.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=70)
    parser.add_argument("--out", type=Path, help="file to record the runs in")
    parser.add_argument("--read", type=Path, help="file of recorded runs to compare instead")
    arguments = parser.parse_args()
    found = []
    for record in read(arguments.read) if arguments.read else run_all(arguments.seed, arguments.count, arguments.out):
        comparison = record.comparison()
        found.append((record, comparison))
        print(f"{100 * comparison.error():+8.3f} %  {record.truth}: {record.case.title}", flush=True)
    print()
    found.sort(key=lambda pair: pair[0].truth)
    for truth, group in groupby(found, key=lambda pair: pair[0].truth):
        print("\n".join(table(score(truth, [(record.case, comparison) for record, comparison in group]))))


if __name__ == "__main__":
    main()
