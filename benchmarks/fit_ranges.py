"""Ranges of step times from published runs, and how many runs that were held out they contain.

    python benchmarks/fit_ranges.py

The residual of a run is its published step time over the predicted one (``benchmarks/published_times.py``; nothing of
the prediction is fitted to those runs but the host bandwidth, to two). Prints what profiles/calibrations/default.json
holds, and two coverages: of runs alike, half of them held out at random a hundred times; and of groups that are held
out as a whole, which get the range of plans unlike anything measured.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from published_times import predict, runs

from advisor.catalog.gpus import find_gpu
from advisor.specs.calibration import likeness
from advisor.specs.plan import Offload, Plan, Strategy
from advisor.validation.conformal import COVERAGE, covered, least_count, ranges

SPLITS = 100
SEED = 2026


def residuals() -> dict[str, list[float]]:
    """Published over predicted step time by likeness."""
    found: dict[str, list[float]] = {}
    for row in runs():
        plan = Plan(
            strategy=Strategy(row["strategy"]), gpus=int(row["gpus"]), micro_batch=1, offload=Offload(row["offload"])
        )
        like = likeness(plan, find_gpu(row["gpu"]).compute_capability)
        ratio = predict(row).tokens_per_s_per_gpu / float(row["tokens_per_s_per_gpu"])
        found.setdefault(like, []).append(ratio)
    return found


def main() -> None:
    found = residuals()
    print(f"residuals: {', '.join(f'{like} {len(each)}' for like, each in found.items())}")
    print(f"ranges for a coverage of {COVERAGE:.0%}, from {least_count()} residuals on:")
    for like, (low, high) in rounded(found).items():
        print(f"  {like:20} {low:.2f} to {high:.2f}")
    print(f"runs alike, half held out: {alike(found)}")
    print(f"groups held out, each by the range of the others for what is unlike them: {unlike(found)}")


def rounded(found: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """Ranges to two digits, never narrower."""
    return {like: (int(100 * low) / 100, -int(-100 * high // 1) / 100) for like, (low, high) in ranges(found).items()}


def alike(found: Mapping[str, Sequence[float]]) -> str:
    draw = random.Random(SEED)
    inside = tried = 0
    for _ in range(SPLITS):
        for each in found.values():
            shuffled = draw.sample(each, len(each))
            half = len(each) // 2
            if half >= least_count():
                inside += covered(shuffled[half:], ranges({"these": shuffled[:half]})["these"])
                tried += len(each) - half
    return f"{inside / tried:.1%} contained (n {tried // SPLITS}, {SPLITS} splits)"


def unlike(found: Mapping[str, Sequence[float]]) -> str:
    said = []
    for like, each in found.items():
        others = ranges({other: ratios for other, ratios in found.items() if other != like})
        said.append(f"{like} {covered(each, others['default'])} of {len(each)}")
    return "; ".join(said)


if __name__ == "__main__":
    main()
