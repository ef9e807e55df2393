"""Which plan is best by what is asked for, and the reason why each stands where it does."""

from __future__ import annotations

from collections.abc import Sequence

from advisor.cost.estimate import explained
from advisor.cost.results import Estimate
from advisor.search.explain import leaner, lost, saves, won
from advisor.search.space import VARIANTS
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
    if objective == "memory":
        order = sorted(estimates, key=lambda each: (each.memory.device_used_bytes, -each.time.tokens_per_s))
        first, last = saves, leaner
    else:
        order = _by_speed(estimates)
        first, last = won, lost
    best = order[0]
    return (explained(best, first(order)), *(explained(other, last(best, other)) for other in order[1:]))


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
    return estimate.time.tokens_per_s * (1 - OFFLOAD_LEAD * estimate.plan.offload.optimizer)


def _simplicity(estimate: Estimate) -> int:
    return VARIANTS.index((estimate.plan.strategy, estimate.plan.offload))
