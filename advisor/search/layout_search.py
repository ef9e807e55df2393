"""The best of Megatron's layouts: all plans bounded, those that could win priced, best first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from advisor.cost.estimate import judge, shortages
from advisor.cost.results import Estimate
from advisor.cost.traffic import Routes
from advisor.errors import SpecError
from advisor.search.layout_prices import price_layouts
from advisor.search.layouts import LayoutSpace, layout_space
from advisor.search.results import Rejected
from advisor.search.sheet import Sheet, fitting, held_by, possible
from advisor.search.space import nearest_batch
from advisor.specs.plan import Checkpointing, Plan
from advisor.specs.question import Question
from advisor.specs.training import Objective

SHOWN = 8
"""Layouts whose best plan is priced in full; the others cannot come before them."""
NEAREST = 3
"""Layouts that are priced where nothing fits."""
MOST_DOUBLINGS = 6
GIB = 2**30

Layout = tuple[int, int, int, int]
"""Tensor, pipeline, context and expert parallelism."""


class Found(NamedTuple):
    """What came of every layout."""

    best: tuple[Estimate, ...]
    """The best plan of each of the best layouts, best first."""
    beyond: tuple[Estimate, ...]
    """The fastest that fits but is beyond a limit on the training's time or cost, where nothing else is."""
    refused: tuple[Rejected, ...]
    sheets: tuple[Sheet, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Every plan of every sheet, flat."""

    sheet: NDArray[np.int64]
    index: NDArray[np.int64]
    tensor: NDArray[np.int64]
    pipeline: NDArray[np.int64]
    context: NDArray[np.int64]
    expert: NDArray[np.int64]
    tokens_per_s: NDArray[np.float64]
    used_bytes: NDArray[np.float64]
    short_bytes: NDArray[np.float64]

    def layout(self, place: int) -> Layout:
        cuts = self.tensor[place], self.pipeline[place], self.context[place], self.expert[place]
        tensor, pipeline, context, expert = map(int, cuts)
        return tensor, pipeline, context, expert


def search_layouts(question: Question, objective: Objective = "time", shown: int = SHOWN) -> Found:
    """Every legal plan, exhaustively: of each of the *shown* best layouts the plan with least of *objective*.

    Bounds of all plans are read first; in their order plans are priced one by one until no bound is left that could
    come before what was found. Raises SpecError where what is given leaves no plan.
    """
    space, routes = layout_space(question), Routes(question.cluster)
    sheets = tuple(sheet for each in space.sheets for sheet in price_layouts(question, each, routes))
    places = _places(sheets)
    best: dict[Layout, Estimate] = {}
    beyond: list[Estimate] = []
    for found in _in_order(question, sheets, places, objective):
        if found.verdict == "no":
            # On one cluster what takes longer costs more: none of the slower ones is within the limit.
            beyond.append(found)
            if objective != "memory":
                break
            continue
        best.setdefault(_layout_of(found.plan), found)
        if len(best) == shown:
            break
    refused = (*_excluded(space), *_misses(question, sheets, places, nothing_fits=not best and not beyond))
    return Found(tuple(best.values()), () if best else tuple(beyond[:1]), refused, sheets)


def _in_order(question: Question, sheets: Sequence[Sheet], places: _Places, objective: Objective) -> Iterator[Estimate]:
    """Plans that fit, least of *objective* first, of each layout the first alone."""
    memory = objective == "memory"
    bounds = places.used_bytes if memory else -places.tokens_per_s
    fits = np.flatnonzero(places.short_bytes <= 0)
    order = fits[np.argsort(bounds[fits], kind="stable")]
    waiting: list[tuple[float, int, Estimate]] = []
    done: set[Layout] = set()
    numbers = count()
    for place in order:
        while waiting and waiting[0][0] <= bounds[place]:
            found = heapq.heappop(waiting)[2]
            if _layout_of(found.plan) not in done:
                done.add(_layout_of(found.plan))
                yield found
        if places.layout(place) in done:
            continue
        priced = fitting(question, sheets[places.sheet[place]], int(places.index[place]))
        if priced:
            amount = float(priced.memory.device_used_bytes if memory else -priced.time.tokens_per_s)
            heapq.heappush(waiting, (amount, next(numbers), priced))
    while waiting:
        found = heapq.heappop(waiting)[2]
        if _layout_of(found.plan) not in done:
            done.add(_layout_of(found.plan))
            yield found


def _layout_of(plan: Plan) -> Layout:
    return plan.tensor_parallel, int(plan.pipeline_parallel), plan.context_parallel, plan.expert_parallel


def _places(sheets: Sequence[Sheet]) -> _Places:
    sizes = [sheet.short_by_bytes.size for sheet in sheets]

    def joined(values: Sequence[Any]) -> NDArray[Any]:
        return np.concatenate([np.broadcast_to(each, size) for each, size in zip(values, sizes, strict=True)])

    plans = [sheet.plan for sheet in sheets]
    return _Places(
        sheet=joined(range(len(sheets))),
        index=np.concatenate([np.arange(size) for size in sizes]),
        tensor=joined([plan.tensor_parallel for plan in plans]),
        pipeline=joined([np.broadcast_to(plan.pipeline_parallel, plan.shape).reshape(-1) for plan in plans]),
        context=joined([plan.context_parallel for plan in plans]),
        expert=joined([plan.expert_parallel for plan in plans]),
        tokens_per_s=joined([sheet.tokens_per_s for sheet in sheets]),
        used_bytes=joined([sheet.device_used_bytes for sheet in sheets]),
        short_bytes=joined([sheet.short_by_bytes for sheet in sheets]),
    )


def _excluded(space: LayoutSpace) -> Iterator[Rejected]:
    for each in space.excluded:
        yield Rejected(plan=each.plan, why=each.why, short_by_bytes=0, remedy=None)


def _misses(question: Question, sheets: Sequence[Sheet], places: _Places, *, nothing_fits: bool) -> Iterator[Rejected]:
    """Each layout of which no bound fits, by its nearest miss; where nothing fits, the nearest by their price."""
    nearest: dict[Layout, int] = {}
    for place in np.argsort(places.short_bytes, kind="stable"):
        if not np.isfinite(places.short_bytes[place]):
            break
        nearest.setdefault(places.layout(int(place)), int(place))
    for number, place in enumerate(nearest.values()):
        short = float(places.short_bytes[place])
        plan = sheets[places.sheet[place]].plan.at(int(places.index[place]))
        if nothing_fits and number < NEAREST:
            yield refused_by_price(question, plan)
        elif short > 0:
            needed, there = places.used_bytes[place] / GIB, question.cluster.gpu.memory_bytes / GIB
            kept = 100 * question.margin_share(plan)
            why = (
                f"at least {needed:.1f} GiB needed per GPU, {there:.1f} GiB there less {kept:.3g} % kept free: "
                f"{short / GIB:.1f} GiB short"
            )
            yield Rejected(plan=plan, why=why, short_by_bytes=int(np.ceil(short)), remedy=None)


def refused_by_price(question: Question, plan: Plan) -> Rejected:
    """*plan* with what it lacks."""
    held = held_by(question, plan, squeezed=True)
    margin_share = question.margin_share(plan)
    short, (_, why) = max(shortages(held, margin_share)), judge(held, margin_share)
    return Rejected(plan=plan, why=why, short_by_bytes=short, remedy=None)


def fewest_gpus(question: Question) -> int | None:
    """The fewest machines' GPUs, of those that doubling the given ones and halving the way back meets, on which a plan
    fits that takes one sequence at a time and computes all activations again; None where none does.

    The global batch is the nearest that divides over them.
    """
    machine = question.cluster.gpus_per_node
    low, high = question.cluster.nodes, 2 * question.cluster.nodes
    while not _leanest_fits(question, machine * high):
        if high >= question.cluster.nodes * 2**MOST_DOUBLINGS:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _leanest_fits(question, machine * middle) else (middle, high)
    return machine * high


def _leanest_fits(question: Question, gpus: int) -> bool:
    given = question.given_layout
    leanest = replace(
        given,
        micro_batch=given.micro_batch or 1,
        checkpointing=given.checkpointing or Checkpointing.FULL,
    )
    larger = replace(
        question,
        cluster=replace(question.cluster, gpus=gpus, nodes=gpus // question.cluster.gpus_per_node),
        job=replace(question.job, global_batch=nearest_batch(question.job.global_batch, gpus)),
        given_layout=leanest,
    )
    try:
        space = layout_space(larger)
    except SpecError:
        return False
    sheets = [sheet for each in space.sheets for sheet in price_layouts(larger, each, None)]
    places = sorted(possible(sheets), key=lambda place: place[0].short_by_bytes[place[1]])
    return bool(places) and refused_by_price(larger, places[0][0].plan.at(places[0][1])).short_by_bytes <= 0
