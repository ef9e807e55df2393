"""Which plan is best by what is asked for, and the reason why each stands where it does."""

from __future__ import annotations

import math
from collections.abc import Sequence

from advisor.cost.estimate import explained
from advisor.cost.results import Estimate
from advisor.search.explain import leaner, lost, saves, won
from advisor.search.sheet import BOUND_SLACK, Sheet, possible
from advisor.search.space import VARIANTS
from advisor.specs.plan import Plan, Strategy
from advisor.specs.training import Objective

TIE_SHARE = 0.03
"""Plans whose throughput differs by less than this count as equally fast, which is finer than the time model can
tell apart without a measurement; the simpler strategy goes first."""

OFFLOAD_LEAD = 0.1
"""By how much an offloading plan has to be faster to come first: it rests on the host's speed, which is assumed."""


def ranked(estimates: Sequence[Estimate], objective: Objective) -> tuple[Estimate, ...]:
    """*estimates* of one cluster, best first, each with its reason. There cost and energy go with time."""
    if not estimates:
        return ()
    best, *others = order = ordered(estimates, objective)
    first, last = (saves, leaner) if objective == "memory" else (won, lost)
    return (explained(best, first(order)), *(explained(other, last(best, other)) for other in others))


def ordered(estimates: Sequence[Estimate], objective: Objective) -> list[Estimate]:
    """The same without reasons."""
    if objective == "memory":
        return sorted(estimates, key=lambda each: (each.memory.device_used_bytes, -each.time.tokens_per_s))
    return _by_speed(estimates)


def promise(sheets: Sequence[Sheet], objective: Objective) -> float:
    """What the plans of one strategy's *sheets* take of *objective* at least, for an order; by bounds."""
    able = [sheet for sheet in sheets if sheet.fitting.size]
    if not able:
        return math.inf
    if objective == "memory":
        return min(float(sheet.device_used_bytes[sheet.fitting].min()) for sheet in able)
    fastest = max(float(sheet.most_tokens_per_s[sheet.fitting].max()) for sheet in able)
    return -fastest * BOUND_SLACK * _credit(able[0].plan)


def outdone(sheets: Sequence[Sheet], best: Sequence[Estimate], objective: Objective) -> bool:
    """Whether no plan of *sheets* can come before all of *best*."""
    if not best:
        return False
    least = promise(sheets, objective)
    if objective == "memory":
        return least > min(each.memory.device_used_bytes for each in best)
    floor = max(map(_standing, best)) * (1 - TIE_SHARE)
    if -least < floor:
        return True
    sheet, index = next(possible(sheets))
    return float(sheet.tokens_per_s[index]) * _credit(sheet.plan) < floor


def _by_speed(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Fastest first; among those within the tie share of the fastest left, the simplest first."""
    left = sorted(estimates, key=_standing, reverse=True)
    order: list[Estimate] = []
    while left:
        floor = _standing(left[0]) * (1 - TIE_SHARE)
        tied = [estimate for estimate in left if _standing(estimate) >= floor]
        simplest = min(tied, key=_simplicity)
        order.append(simplest)
        left.remove(simplest)
    return order


def _standing(estimate: Estimate) -> float:
    """Tokens per second, less the lead that offloading has to have."""
    return estimate.time.tokens_per_s * _credit(estimate.plan)


def _credit(plan: Plan) -> float:
    return 1 - OFFLOAD_LEAD * plan.offload.optimizer


def _simplicity(estimate: Estimate) -> int:
    """Of strategies their order, of layouts how many kinds of cuts they have."""
    plan = estimate.plan
    if plan.strategy is Strategy.MEGATRON:
        cuts = (plan.tensor_parallel, plan.pipeline_parallel, plan.virtual_stages, plan.context_parallel)
        return sum(int(cut) > 1 for cut in (*cuts, plan.expert_parallel))
    return VARIANTS.index((plan.strategy, plan.offload))
