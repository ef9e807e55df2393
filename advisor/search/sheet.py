"""A sheet: plans that differ only in their counts, priced together.

Its memory is a bound that no plan can stay below; a plan that is offered or refused is replayed by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advisor.cost.allocator import OutOfMemoryError
from advisor.cost.estimate import priced, shortages
from advisor.cost.memory import Footprint, footprint, memory, short_by
from advisor.cost.question import program, program_of_contenders
from advisor.cost.results import Estimate, Memory
from advisor.cost.schedule import step_time
from advisor.specs.hardware import Cluster
from advisor.specs.plan import Plan
from advisor.specs.question import Question
from advisor.step.build import StepProgram, fullest
from advisor.step.program import Amount


@dataclass(frozen=True, eq=False)
class Sheet:
    """Plans with what decides between them, one entry each."""

    plan: Plan
    rank: NDArray[Any]
    """The one that holds most."""
    device_used_bytes: NDArray[Any]
    """At least."""
    short_by_bytes: NDArray[Any]
    """Device or host memory that is lacking at least, whichever is worse; above 0, a plan cannot fit."""
    most_tokens_per_s: NDArray[Any]
    """At most; 0 where none of the sheet can fit, whose times nobody asks for."""
    timed: Callable[[], NDArray[Any]] | None = None
    """Says what they are; None of layouts, of which only the bounds are read side by side."""

    @cached_property
    def tokens_per_s(self) -> NDArray[Any]:
        """Read when first asked for; of layouts at most."""
        return self.timed() if self.timed else self.most_tokens_per_s

    @property
    def size(self) -> int:
        """How many plans it has; what lacks infinitely much is none."""
        return int(np.isfinite(self.short_by_bytes).sum())

    @cached_property
    def fitting(self) -> NDArray[np.int64]:
        """Which of the plans may fit."""
        return np.flatnonzero(self.short_by_bytes <= 0)


def price_sheet(question: Question, plan: Plan) -> Sheet:
    """Memory and time of every plan that *plan* stands for, in one pass over one program."""
    step = program_of_contenders(question, plan)
    found = footprint(step, plan, question.cluster, question.calibration)
    short = shortfall(found, question.cluster, question.margin_share(plan))
    read = partial(of_fullest, step, plan.shape)
    rank, used, lacking = read(step.rank, found.device_used_bytes, short)
    if not np.any(short <= 0):
        return Sheet(plan, rank, used, lacking, most_tokens_per_s=np.zeros(lacking.shape))
    times = step_time(step.pace, question.job, plan, question.cluster, question.calibration, step.slowest_excess)
    (most,) = read(times.most_tokens_per_s)
    return Sheet(plan, rank, used, lacking, most, timed=lambda: next(read(times.tokens_per_s)))


def of_fullest(step: StepProgram, shape: tuple[int, ...], *readings: Amount) -> Iterator[NDArray[Any]]:
    """*readings* of a program of contenders as the one has them that holds most; *shape* is that of its plans."""
    place = fullest(step) if step.contenders else None
    for reading in readings:
        every = np.broadcast_to(reading, (step.contenders, *shape) if step.contenders else shape)
        yield (every if place is None else np.take_along_axis(every, place, axis=0)).reshape(-1)


def shortfall(found: Footprint, cluster: Cluster, margin_share: float) -> NDArray[Any]:
    """Bytes that the device lacks beside its margin at least, or the host, whichever is more."""
    device = short_by(found.device_used_bytes, cluster.gpu.memory_bytes, margin_share)
    host = np.asarray(found.host_bytes) - cluster.host_memory_bytes
    short: NDArray[Any] = np.maximum(device, host)
    return short


BOUND_SLACK = 1 + 1e-9
"""Bounds are sums of the same terms as times, in another order."""

Place = tuple[Sheet, int]
"""A sheet and which of its plans."""


def possible(sheets: Sequence[Sheet]) -> Iterator[Place]:
    """The plans whose bounds fit, fastest first. A sheet's times are read once one of its plans may be next."""
    bounds = [float(sheet.most_tokens_per_s[sheet.fitting].max(initial=0)) for sheet in sheets]
    untimed = sorted((number for number, sheet in enumerate(sheets) if sheet.fitting.size), key=bounds.__getitem__)
    timed: list[tuple[float, int, int]] = []
    while timed or untimed:
        while untimed and (not timed or bounds[untimed[-1]] * BOUND_SLACK >= -timed[0][0]):
            number = untimed.pop()
            for index in sheets[number].fitting.tolist():
                heappush(timed, (-float(sheets[number].tokens_per_s[index]), number, index))
        _, number, index = heappop(timed)
        yield sheets[number], index


def fastest(question: Question, sheets: Sequence[Sheet]) -> Estimate | None:
    """The fastest plan that fits, of one strategy's sheets; where it is beyond a limit of the training, all are.

    A sheet's bound proposes, the price of the plan decides.
    """
    found = (fitting(question, *place) for place in possible(sheets))
    return next(filter(None, found), None)


def leanest(question: Question, sheets: Sequence[Sheet]) -> Estimate | None:
    """The plan of one strategy's sheets that uses the least device memory, within all limits; of equals the fastest."""
    best: Estimate | None = None
    for sheet, index in sorted(possible(sheets), key=lambda place: place[0].device_used_bytes[place[1]]):
        if best and sheet.device_used_bytes[index] >= best.memory.device_used_bytes:
            break
        found = fitting(question, sheet, index, below_bytes=best.memory.device_used_bytes if best else None)
        if found and found.verdict != "no":
            best = found
    return best


def fitting(question: Question, sheet: Sheet, index: int, *, below_bytes: int | None = None) -> Estimate | None:
    """The plan of *sheet* at *index*, priced, if it fits and uses less than *below_bytes* of the device."""
    plan = sheet.plan.at(index)
    margin_share = question.margin_share(plan)
    most_bytes = math.ceil(question.cluster.gpu.memory_bytes * (1 - margin_share))
    if below_bytes is not None:
        most_bytes = min(most_bytes, below_bytes - 1)
    step = program(question, plan, int(sheet.rank[index]))
    try:
        held = memory(step, plan, question.cluster, question.calibration, most_bytes=most_bytes)
    except OutOfMemoryError:
        return None
    if max(shortages(held, margin_share)) > 0 or held.device_used_bytes > most_bytes:
        return None
    return priced(question, plan, step, held)


def nearest_miss(sheets: Sequence[Sheet]) -> Plan:
    """The plan whose bound lacks least, of one strategy's sheets none of whose plans fits."""
    sheet = min(sheets, key=lambda each: float(each.short_by_bytes.min()))
    return sheet.plan.at(int(np.argmin(sheet.short_by_bytes)))


def held_by(question: Question, plan: Plan, *, squeezed: bool = False) -> Memory:
    """What a single plan needs."""
    return memory(program(question, plan), plan, question.cluster, question.calibration, squeezed=squeezed)
