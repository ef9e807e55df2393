"""Ranges from residuals."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.validation.conformal import covered, interval, least_count, ranges

residuals = st.lists(st.floats(0.5, 2.0), min_size=19, max_size=60)


def test_nineteen_residuals_are_the_least_for_nine_in_ten() -> None:
    assert least_count(0.9) == 19
    assert interval([float(number) for number in range(1, 20)], 0.9) == (1.0, 19.0)
    with pytest.raises(ValueError, match="it takes 19"):
        interval([1.0] * 18, 0.9)


def test_more_residuals_leave_more_out() -> None:
    assert interval([float(number) for number in range(1, 40)], 0.9) == (2.0, 38.0)


def test_nine_in_ten_of_what_comes_next_lie_within() -> None:
    draw = random.Random(1)
    inside = 0
    for _ in range(2000):
        found = [draw.lognormvariate(0, 0.2) for _ in range(31)]
        inside += covered(found[30:], interval(found[:30]))

    # The theorem promises 0.9 at least and 0.9 + 2 / 31 at most; 2,000 trials scatter by 0.007.
    assert 0.88 < inside / 2000 < 0.98


@given(residuals, residuals)
def test_the_default_contains_every_range(one: list[float], other: list[float]) -> None:
    found = ranges({"one": one, "other": other, "few": [0.4, 2.5]})

    assert set(found) == {"default", "one", "other"}
    low, high = found["default"]
    assert low <= 0.4
    assert high >= 2.5
    for each in ("one", "other"):
        assert low <= found[each][0] <= 1 <= found[each][1] <= high


def test_too_few_residuals_make_no_range() -> None:
    assert ranges({"few": [1.0] * 18}) == {}
