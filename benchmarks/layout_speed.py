"""The search over Megatron's layouts: how fast, and how exact beside plans that are priced one by one.

    python benchmarks/layout_speed.py

Each search is timed by itself in CPU seconds, first as a process meets it and then with its recordings made. One in a
hundred of its plans is drawn by a seed and laid out by itself, without arrays: bytes have to be the same, and so has
the bound of its seconds. The wide sheet has many pipelines and micro-batches of one cut.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import numpy as np

from advisor.catalog.request import resolve
from advisor.cost.memory import footprint
from advisor.cost.question import program
from advisor.cost.schedule import step_time
from advisor.cost.traffic import Routes
from advisor.search.layout_prices import price_layouts
from advisor.search.layouts import LayoutSheet, layout_space
from advisor.search.recommend import search
from advisor.search.sheet import Sheet
from advisor.specs.plan import Plan, Strategy
from advisor.specs.question import Question

SEARCHES = (
    ("Llama-3.1-8B", {"gpus": 8, "gpu": "H100", "global_batch": 64}),
    ("Llama-3.1-70B", {"gpus": 512, "nodes": 64, "gpu": "H100", "global_batch": 1024}),
)
ROUNDS = 3
SEED = 7
DRAWN_SHARE = 0.01


class Difference(NamedTuple):
    """How far plans of sheets are from the same by themselves."""

    plans: int
    most_bytes: float
    most_seconds: float
    """As a share."""


def sheets_of(question: Question) -> list[Sheet]:
    """All that a search prices, without pricing what could win by itself."""
    routes = Routes(question.cluster)
    return [sheet for each in layout_space(question).sheets for sheet in price_layouts(question, each, routes)]


def difference(question: Question, sheets: list[Sheet]) -> Difference:
    """Of plans drawn from *sheets*."""
    places = [(sheet, int(index)) for sheet in sheets for index in np.flatnonzero(np.isfinite(sheet.short_by_bytes))]
    drawn = np.random.default_rng(SEED).choice(len(places), size=int(DRAWN_SHARE * len(places)), replace=False)
    most_bytes = most_seconds = 0.0
    for sheet, index in (places[number] for number in drawn):
        plan = sheet.plan.at(index)
        step = program(question, plan)
        held = footprint(step, plan, question.cluster, question.calibration)
        most_bytes = max(most_bytes, abs(float(held.device_used_bytes) - float(sheet.device_used_bytes[index])))
        if sheet.most_tokens_per_s[index] > 0:
            alone = step_time(step.pace, question.job, plan, question.cluster, question.calibration)
            ratio = float(sheet.most_tokens_per_s[index]) / float(alone.most_tokens_per_s)
            most_seconds = max(most_seconds, abs(1 / ratio - 1))
    return Difference(len(drawn), most_bytes, most_seconds)


def wide_sheet(question: Question) -> LayoutSheet:
    """Pipelines of 2 to 16 stages by 2 to 65 sequences at a time, in 16 to 1,024 micro-batches."""
    stages, groups = (each.reshape(-1, 1) for each in np.meshgrid([2, 4, 8, 16], np.arange(1, 65), indexing="ij"))
    plan = Plan(
        strategy=Strategy.MEGATRON,
        gpus=question.cluster.gpus,
        micro_batch=np.arange(2, 66),
        accumulation_steps=16 * groups,
        tensor_parallel=8,
        sequence_parallel=True,
        pipeline_parallel=stages,
    )
    return LayoutSheet((plan,), (np.ones(plan.shape, dtype=bool),))


def cpu_s(work: object) -> tuple[float, object]:
    """CPU seconds of calling *work*, and what it returned."""
    started = time.process_time()
    found = work()  # type: ignore[operator]
    return time.process_time() - started, found


def main() -> None:
    head = f"{'CPU seconds':42}{'plans':>9}{'first':>9}{'again':>9}{'plans/s':>11}"
    print(head + "\n" + "─" * len(head))
    for name, words in SEARCHES:
        question = resolve(name, trainer="megatron", **words)  # type: ignore[arg-type]
        first_s, found = cpu_s(lambda question=question: search(question))
        again_s = median(cpu_s(lambda question=question: search(question))[0] for _ in range(ROUNDS))
        plans = found.considered  # type: ignore[attr-defined]
        line(f"recommend: {name} on {question.cluster.gpus} GPUs", plans, first_s, again_s)
        first_s, sheets = cpu_s(lambda question=question: sheets_of(question))
        line("  its bounds alone", plans, first_s, first_s)
        off = difference(question, sheets)  # type: ignore[arg-type]
        print(
            f"  {off.plans} of its plans by themselves: off by at most {off.most_bytes:.0f} bytes and "
            f"{off.most_seconds:.0e} of the seconds"
        )
    question = replace(question, given_margin_share=0.0)
    sheet, routes = wide_sheet(question), Routes(question.cluster)
    first_s, _ = cpu_s(lambda: list(price_layouts(question, sheet, routes)))
    again_s = median(cpu_s(lambda: list(price_layouts(question, sheet, Routes(question.cluster))))[0] for _ in range(3))
    line("wide: 256 pipelines x 64 micro-batches", int(np.prod(sheet.plans[0].shape)), first_s, again_s)


def line(what: str, plans: int, first_s: float, again_s: float) -> None:
    print(f"{what:42}{plans:9,}{first_s:9.3f}{again_s:9.3f}{plans / again_s:11,.0f}")


if __name__ == "__main__":
    main()
