"""Predicted memory beside real runs of two and four ranks on this machine's CPU.

    python benchmarks/real_runs.py                 # 70 cases, about twenty minutes on two cores; needs the extra "run"
    python benchmarks/real_runs.py --seed 1 --count 20

Truth: the real launchers, frameworks, modelling code and collectives (gloo), three optimizer steps, every rank
(``advisor/validation/run.py``). The prediction is for the rank that holds most and is held against the rank whose peak
is highest. Counter: bytes of live storages in the last step. No constant is fitted to these runs.
"""

from __future__ import annotations

import argparse
import sys

from cases.gloo import cases

from advisor.errors import AdvisorError
from advisor.validation.accuracy import Case, Comparison, beside, score, table
from advisor.validation.run import Launcher, run

GROUPS = {"zero": "DeepSpeed", "ddp": "DDP", "fsdp": "FSDP2"}


def worst_rank(case: Case, launcher: Launcher) -> Comparison:
    """The prediction beside the rank whose peak is highest."""
    highest = max(run(case.config, case.job, case.plan, launcher), key=lambda trace: trace.peak_bytes)
    return beside(case.model, case.job, case.plan, highest)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted memory beside real runs of two and four ranks.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=70)
    parser.add_argument("--start", type=int, default=0, help="cases to pass over")
    arguments = parser.parse_args()
    found: dict[str, list[tuple[Case, Comparison]]] = {}
    failed = 0
    for case, launcher in list(cases(arguments.seed, arguments.count))[arguments.start :]:
        title = f"{case.title}, {case.job.optimizer}, by {launcher}"
        try:
            comparison = worst_rank(case, launcher)
        except AdvisorError as error:
            failed += 1
            print(f"  failed    {title}: {error}", flush=True)
            continue
        print(f"{100 * comparison.error():+8.3f} %  {title}", flush=True)
        group = next(name for start, name in GROUPS.items() if case.plan.strategy.value.startswith(start))
        found.setdefault(group, []).append((case, comparison))
    print()
    for group, compared in found.items():
        print("\n".join(table(score(f"{group}, real runs, worst rank", compared))))
    if failed:
        sys.exit(f"{failed} runs failed")


if __name__ == "__main__":
    main()
