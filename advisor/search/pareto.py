"""The plans that no other beats in every respect: less memory always costs time."""

from __future__ import annotations

from collections.abc import Sequence

from advisor.cost.results import Estimate
from advisor.search.sheet import Sheet, fitting, possible
from advisor.specs.question import Question


def front(question: Question, sheets: Sequence[Sheet]) -> tuple[Estimate, ...]:
    """Of all plans of *sheets* that fit, within all limits, those that no other beats in time and device memory.

    Fastest first. A plan slower than one that is known needs to be replayed only if its bound is below that one's
    memory. On one cluster cost and energy go with time.
    """
    chosen: list[Estimate] = []
    least_bytes: int | None = None
    for sheet, index in possible(sheets):
        if least_bytes is not None and sheet.device_used_bytes[index] >= least_bytes:
            continue
        found = fitting(question, sheet, index, below_bytes=least_bytes)
        if found and found.verdict != "no":
            chosen.append(found)
            least_bytes = found.memory.device_used_bytes
    return undominated(chosen)


def undominated(estimates: Sequence[Estimate]) -> tuple[Estimate, ...]:
    """Those of *estimates* that none beats, in order; of equals the first."""
    points = [respects(each) for each in estimates]
    return tuple(
        estimate
        for place, (estimate, point) in enumerate(zip(estimates, points, strict=True))
        if not any(dominates(other, point) for other in points) and point not in points[:place]
    )


NEAR_SHARE = 0.1


def thinned(estimates: Sequence[Estimate], near_share: float = NEAR_SHARE) -> tuple[Estimate, ...]:
    """Those of *estimates* that say something new: of the others each is in no respect more than *near_share* better
    than one before it that stays."""
    kept: list[Estimate] = []
    for estimate in estimates:
        point = respects(estimate)
        if not any(
            all(a <= b * (1 + near_share) for a, b in zip(respects(other), point, strict=True)) for other in kept
        ):
            kept.append(estimate)
    return tuple(kept)


def respects(estimate: Estimate) -> tuple[float, ...]:
    """What a plan should have little of: seconds per token, device memory, and money where it is known."""
    cost = estimate.training.cost_usd if estimate.training else None
    time_and_memory = (1 / estimate.time.tokens_per_s, float(estimate.memory.device_used_bytes))
    return time_and_memory if cost is None else (*time_and_memory, cost)


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether *one* is nowhere above *other* and somewhere below it."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)
