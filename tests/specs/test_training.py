from __future__ import annotations

import math

import pytest

from advisor.errors import SpecError
from advisor.specs.training import Price, Training


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-2, -1), (2, 1), (1, math.inf), (math.nan, math.nan)])
def test_a_price_is_positive_and_its_range_is_one(low: float, high: float) -> None:
    with pytest.raises(SpecError, match="positive number of USD per GPU-hour"):
        Price(low_usd_per_gpu_hour=low, high_usd_per_gpu_hour=high, source="given")


def test_a_price_counts_by_the_middle_of_its_range() -> None:
    assert Price(low_usd_per_gpu_hour=2, high_usd_per_gpu_hour=3, source="made up").usd_per_gpu_hour == 2.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"tokens": 0}, "at least one token, got 0"),
        ({"tokens": 1, "most_hours": 0.0}, "--max-hours must be a positive number, got 0"),
        ({"tokens": 1, "most_hours": math.nan}, "--max-hours must be a positive number, got nan"),
        ({"tokens": 1, "most_usd": -5.0}, "--max-cost must be a positive number, got -5"),
        ({"tokens": 1, "most_usd": 5.0}, "a limit on the cost needs a price"),
    ],
)
def test_a_training_that_makes_no_sense_is_refused(words: dict[str, float], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Training(**words)  # type: ignore[arg-type]
