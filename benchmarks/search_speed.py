"""Plans priced per second: memory, traffic and time of each, in sheets of few plans and of many.

    python benchmarks/search_speed.py

The search of ``recommend`` prices a few micro-batches for each strategy and checkpointing, so laying out and reading
the step programs is nearly all of its time. Wide sheets price many more plans by the same programs: every combination
of GPU count, micro-batch and accumulation steps goes through one pass over arrays. Times are medians; the first run is
shown beside them, because the recordings of a model's layers are made once per process.

A random hundredth of the plans of wide sheets is then priced by brute force: one plan at a time, by a program of its
own whose counts are plain numbers. Its bytes have to be the same, and its seconds but for the order of their sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from advisor.catalog.request import resolve
from advisor.cost.memory import footprint
from advisor.cost.question import program
from advisor.cost.schedule import step_time
from advisor.search.compare import compare
from advisor.search.gpu_types import rank_gpus
from advisor.search.recommend import search
from advisor.search.sheet import price_sheet, shortfall
from advisor.search.space import VARIANTS, sheets
from advisor.specs.plan import Checkpointing, Plan, zero_settings
from advisor.specs.question import Question

MODEL, GPUS = "Qwen2.5-1.5B", 4
ROUNDS = 5
BRUTE_FORCE_SHARE = 0.01
SAME_SHARE = 1e-12
"""Of a step's seconds, up to which two sums of the same terms may differ."""
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
    """A sheet for every strategy and checkpointing, over all combinations of the counts, each on an axis of its own."""
    counts = np.ix_(np.asarray(gpus), np.asarray(micro_batches), np.asarray(accumulations))
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
    """Memory, traffic and time of all *plans*; how many they are."""
    return sum(price_sheet(question, plan).tokens_per_s.size for plan in plans)


class Deviation(NamedTuple):
    """How far sheets are off from plans priced by themselves."""

    plans: int
    other_bytes: int
    """Plans of which device or host bytes are not the same."""
    most_seconds: float
    """Of a step's seconds."""


def deviation(question: Question, sheets: Sequence[Plan], share: float, seed: int = 0) -> Deviation:
    """Of a random *share* of the plans of each of *sheets*, at least one."""
    random = np.random.default_rng(seed)
    plans, other_bytes, most_seconds = 0, 0, 0.0
    for plan in sheets:
        sheet = price_sheet(question, plan)
        chosen = random.choice(sheet.size, max(1, round(share * sheet.size)), replace=False)
        for index in map(int, chosen):
            device_bytes, lacking_bytes, tokens_per_s = by_itself(question, plan.at(index))
            same = sheet.device_used_bytes[index] == device_bytes and sheet.short_by_bytes[index] == lacking_bytes
            plans, other_bytes = plans + 1, other_bytes + (not same)
            most_seconds = max(most_seconds, abs(float(sheet.tokens_per_s[index]) / tokens_per_s - 1))
    return Deviation(plans, other_bytes, most_seconds)


def by_itself(question: Question, plan: Plan) -> tuple[float, float, float]:
    """Bytes that a single plan uses of its device and lacks, and its tokens per second."""
    step = program(question, plan)
    found = footprint(step, plan, question.cluster, question.calibration)
    lacking = shortfall(found, question.cluster, question.margin_share(plan))
    timed = step_time(step.pace, question.job, plan, question.cluster, question.calibration, step.slowest_excess)
    return float(found.device_used_bytes), float(lacking), float(timed.tokens_per_s)


def speed(what: str, work: Callable[[], int]) -> Speed:
    """The speed of *work*, which says how many plans it priced."""

    def once() -> tuple[float, int]:
        started = time.perf_counter()
        plans = work()
        return time.perf_counter() - started, plans

    first_s, plans = once()
    return Speed(what, plans, first_s, median(once()[0] for _ in range(ROUNDS)))


def wide_sheets() -> list[Plan]:
    return combinations([2**power for power in range(1, 11)], range(1, 17), range(1, 17))


def measured() -> list[Speed]:
    question = resolve(MODEL, gpus=GPUS)
    few = [plan for plan in sheets(question) if isinstance(plan, Plan)]
    powers = wide_sheets()
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
    off = deviation(resolve(MODEL, gpus=GPUS), wide_sheets(), BRUTE_FORCE_SHARE)
    same = not off.other_bytes and off.most_seconds <= SAME_SHARE
    print(
        f"brute force on {off.plans:,} plans: other bytes in {off.other_bytes}, seconds off by {off.most_seconds:.0e} "
        f"at most: {'met' if same else 'missed'}"
    )


if __name__ == "__main__":
    main()
