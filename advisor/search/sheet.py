"""A sheet: plans that differ only in their counts, priced together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advisor.cost.memory import Footprint, footprint, short_by
from advisor.cost.question import program
from advisor.cost.schedule import step_time
from advisor.specs.hardware import Cluster
from advisor.specs.plan import Plan
from advisor.specs.question import Question


@dataclass(frozen=True, slots=True, eq=False)
class Sheet:
    """Plans with what decides between them, one entry each."""

    plan: Plan
    footprint: Footprint
    tokens_per_s: NDArray[Any]
    short_by_bytes: NDArray[Any]
    """Device or host memory that is lacking, whichever is worse; at most 0 where the plan fits with the margin."""

    @property
    def size(self) -> int:
        return int(self.short_by_bytes.size)


def price_sheet(question: Question, plan: Plan) -> Sheet:
    """Memory and time of every plan that *plan* stands for, in one pass over one program."""
    step = program(question, plan)
    found = footprint(step, plan, question.cluster, question.calibration)
    timed = step_time(step.step, question.job, plan, question.cluster, question.calibration)
    shape = np.broadcast_shapes(*(np.shape(each) for each in (plan.gpus, plan.micro_batch, plan.accumulation_steps)))
    short = np.broadcast_to(shortfall(found, question.cluster, question.margin_share), shape or (1,))
    return Sheet(plan, found, np.broadcast_to(timed.tokens_per_s, shape or (1,)), short)


def shortfall(found: Footprint, cluster: Cluster, margin_share: float) -> NDArray[Any]:
    """Bytes that the device lacks beside its margin, or the host, whichever is more."""
    device = short_by(found.device_used_bytes, cluster.gpu.memory_bytes, margin_share)
    host = np.asarray(found.host_bytes) - cluster.host_memory_bytes
    short: NDArray[Any] = np.maximum(device, host)
    return short


def fastest(sheets: Sequence[Sheet]) -> Plan | None:
    """The fastest plan that fits, of one strategy's sheets."""
    best: tuple[float, Plan] | None = None
    for sheet in sheets:
        speed = np.where(sheet.short_by_bytes <= 0, sheet.tokens_per_s, -1.0)
        index = int(np.argmax(speed))
        if speed[index] > 0 and (best is None or speed[index] > best[0]):
            best = float(speed[index]), sheet.plan.at(index)
    return best[1] if best else None


def nearest_miss(sheets: Sequence[Sheet]) -> Plan:
    """The plan that lacks least, of one strategy's sheets none of whose plans fits."""
    sheet = min(sheets, key=lambda each: float(each.short_by_bytes.min()))
    return sheet.plan.at(int(np.argmin(sheet.short_by_bytes)))
