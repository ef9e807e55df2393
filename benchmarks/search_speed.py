"""Plans priced per second: memory, traffic and time of each, in sheets of few plans and of many.

    python benchmarks/search_speed.py

The search of ``recommend`` prices a few micro-batches for each strategy and checkpointing, so laying out and reading
the step programs is nearly all of its time. Wide sheets price many more plans by the same programs: every combination
of GPU count, micro-batch and accumulation steps goes through one pass over arrays. Times are medians; the first run is
shown beside them, because the recordings of a model's layers are made once per process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from advisor.catalog.request import resolve
from advisor.search.compare import compare
from advisor.search.gpu_types import rank_gpus
from advisor.search.recommend import search
from advisor.search.sheet import price_sheet
from advisor.search.space import VARIANTS, sheets
from advisor.specs.plan import Checkpointing, Plan, zero_settings
from advisor.specs.question import Question

MODEL, GPUS = "Qwen2.5-1.5B", 4
ROUNDS = 5
LEAST_PLANS_PER_S = 20_000
"""What wide sheets are to reach."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How many plans were priced, and in what time."""

    what: str
    plans: int
    first_s: float
    median_s: float

    @property
    def plans_per_s(self) -> float:
        return self.plans / self.median_s


def combinations(gpus: Sequence[int], micro_batches: Sequence[int], accumulations: Sequence[int]) -> list[Plan]:
    """A sheet for every strategy and checkpointing, over all combinations of the counts."""
    counts = np.array(np.meshgrid(gpus, micro_batches, accumulations, indexing="ij"), dtype=np.int64).reshape(3, -1)
    return [
        Plan(
            strategy=strategy,
            gpus=counts[0],
            micro_batch=counts[1],
            accumulation_steps=counts[2],
            checkpointing=checkpointing,
            offload=offload,
            zero=zero_settings(strategy),
        )
        for strategy, offload in VARIANTS
        for checkpointing in Checkpointing
    ]


def sheets_priced(question: Question, plans: Sequence[Plan]) -> int:
    return sum(price_sheet(question, plan).size for plan in plans)


def speed(what: str, work: Callable[[], int]) -> Speed:
    """The speed of *work*, which says how many plans it priced."""

    def once() -> tuple[float, int]:
        started = time.perf_counter()
        plans = work()
        return time.perf_counter() - started, plans

    first_s, plans = once()
    return Speed(what, plans, first_s, median(once()[0] for _ in range(ROUNDS)))


def measured() -> list[Speed]:
    question = resolve(MODEL, gpus=GPUS)
    few = [plan for plan in sheets(question) if isinstance(plan, Plan)]
    powers = combinations([2**power for power in range(1, 11)], range(1, 17), range(1, 17))
    machines = combinations(range(8, 1025, 8), range(1, 17), range(1, 9))
    return [
        speed("the search of recommend, with its reasons", lambda: search(question).considered),
        speed("its sheets alone", lambda: sheets_priced(question, few)),
        speed("compare on 1, 2, 4, 8 and 16 GPUs", lambda: compare(MODEL).considered),
        speed("recommend --gpu any, over the price list", lambda: rank_gpus(MODEL, gpus=GPUS).considered),
        speed("wide: 10 GPU counts x 16 x 16", lambda: sheets_priced(question, powers)),
        speed("wide: 128 GPU counts x 16 x 8", lambda: sheets_priced(question, machines)),
    ]


def main() -> None:
    head = f"{f'{MODEL}, median of {ROUNDS}':45}{'plans':>9}{'first s':>9}{'s':>8}{'plans/s':>11}"
    print(head + "\n" + "─" * len(head))
    found = measured()
    for each in found:
        print(f"{each.what:45}{each.plans:9,}{each.first_s:9.3f}{each.median_s:8.3f}{each.plans_per_s:11,.0f}")
    slowest = min(each.plans_per_s for each in found if each.what.startswith("wide"))
    print(
        f"\nwide sheets: at least {LEAST_PLANS_PER_S:,} plans/s {'met' if slowest >= LEAST_PLANS_PER_S else 'missed'}"
    )


if __name__ == "__main__":
    main()
