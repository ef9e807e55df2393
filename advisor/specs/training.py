"""A whole training run, beyond its one step: how many tokens, at which price, and what it may take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from advisor.errors import SpecError

Objective = Literal["time", "cost", "memory", "energy"]
"""What the best plan has least of."""

CURRENCY = "USD"


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What one GPU costs for an hour, in :data:`CURRENCY`."""

    low_usd_per_gpu_hour: float
    high_usd_per_gpu_hour: float
    """Above the low one where a provider has several prices."""
    source: str
    """Who asks it and when, and where that was read; ``given`` where the user said it."""

    def __post_init__(self) -> None:
        low, high = self.low_usd_per_gpu_hour, self.high_usd_per_gpu_hour
        if not (0 < low <= high and math.isfinite(high)):
            raise SpecError(f"a price must be a positive number of {CURRENCY} per GPU-hour, got {low:g} to {high:g}")

    @property
    def usd_per_gpu_hour(self) -> float:
        """The middle of its range."""
        return (self.low_usd_per_gpu_hour + self.high_usd_per_gpu_hour) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What is to be trained on in all, and the limits that a plan has to stay within."""

    tokens: int
    price: Price | None = None
    """None where no list has the GPU and nobody said."""
    most_hours: float | None = None
    most_usd: float | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise SpecError(f"training needs at least one token, got {self.tokens:,}")
        for flag, limit in (("--max-hours", self.most_hours), ("--max-cost", self.most_usd)):
            if limit is not None and not (limit > 0 and math.isfinite(limit)):
                raise SpecError(f"{flag} must be a positive number, got {limit:g}")
        if self.most_usd is not None and self.price is None:
            raise SpecError("a limit on the cost needs a price")
