"""Memory of every plan of a layout sheet, and the most tokens per second that it could reach, in one pass.

Of a pipeline's stages the first, one between and the last are laid out, and each plan has the memory of its fullest and
the pace of its slowest, as a plan by itself has (step/megatron.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advisor.cost.memory import footprint
from advisor.cost.schedule import step_time
from advisor.cost.traffic import Routes
from advisor.search.layouts import LayoutSheet
from advisor.search.sheet import Sheet, shortfall
from advisor.specs.plan import Plan
from advisor.specs.question import Question
from advisor.step.build import StepProgram
from advisor.step.flop import flop
from advisor.step.megatron import StageStep, stage_steps
from advisor.step.program import NOTHING, Amount, fold, phase, then


def price_layouts(question: Question, sheet: LayoutSheet, routes: Routes | None) -> Iterator[Sheet]:
    """Bounds of every plan of *sheet*; without *routes* of memory alone. What is no plan lacks infinitely much."""
    model, job = question.model, question.job
    steps = stage_steps(model, job, sheet.plans)
    slowest: NDArray[Any] | None = None
    for plan, legal, stages in zip(sheet.plans, sheet.legal, steps, strict=True):
        fullest = _most([fold(then(stage.states, stage.step)).peak_bytes for stage in stages], stages, plan)
        found = [footprint(_program(stage), plan, question.cluster, question.calibration) for stage in stages]
        margin_share = question.margin_share(plan)
        used = _of(fullest, [each.device_used_bytes for each in found], plan)
        short = _of(fullest, [shortfall(each, question.cluster, margin_share) for each in found], plan)
        short = np.where(legal, short, np.inf)
        tokens_per_s: Amount = 0.0
        if routes is not None and np.any(short <= 0):
            if slowest is None:  # no product is the optimizer's
                slowest = _most([flop(stage.step).done for stage in stages], stages, plan)
            at = question.cluster, question.calibration
            bounds = [step_time(stage.step, job, plan, *at, routes=routes).most_tokens_per_s for stage in stages]
            tokens_per_s = _of(slowest, bounds, plan)
        ranks = [stage.number * (plan.gpus // plan.pipeline_parallel) for stage in stages]
        readings = (_of(fullest, ranks, plan), used, short, np.broadcast_to(tokens_per_s, plan.shape))
        rank, used, short, most = (each.reshape(-1) for each in readings)
        yield Sheet(plan, rank, used, short, most)


def _program(stage: StageStep) -> StepProgram:
    return StepProgram(init=phase("init", stage.states), step=stage.step, host=NOTHING, host_once=NOTHING)


def _most(amounts: Sequence[Amount], stages: Sequence[StageStep], plan: Plan) -> NDArray[Any]:
    """Which of *stages* has most of *amounts*, for each plan."""
    there = [np.where(stage.exists, each, -1) for each, stage in zip(amounts, stages, strict=True)]
    place: NDArray[Any] = np.argmax([np.broadcast_to(each, plan.shape) for each in there], axis=0)
    return place


def _of(place: NDArray[Any], amounts: Sequence[Amount], plan: Plan) -> NDArray[Any]:
    """Of *amounts*, one for each stage, those of the stages in *place*."""
    if len(amounts) == 1:
        return np.broadcast_to(amounts[0], plan.shape)
    return np.choose(place, [np.broadcast_to(each, plan.shape) for each in amounts])
