"""A whole training from the time of one step: its arithmetic, and laws of time and money."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.cost.money import beyond_limits, steps_of, training_cost
from advisor.cost.results import StepTime, TrainingCost
from advisor.errors import SpecError
from advisor.specs.hardware import Cluster
from advisor.specs.training import Price, Training
from cost import machines

PER_STEP = 131_072
CLUSTER = replace(machines.cluster(gpus=8), gpu=replace(machines.GPU, power_w=500.0))
prices = st.floats(0.1, 100)
durations = st.floats(0.01, 1000)
steps = st.integers(1, 10**6)


def time(step_s: float = 2.0) -> StepTime:
    return StepTime(
        step_s=step_s,
        low_s=0.9 * step_s,
        high_s=1.2 * step_s,
        compute_s=step_s,
        launch_s=0.0,
        bubble_s=0.0,
        exposed_communication_s=0.0,
        optimizer_s=0.0,
        tokens_per_s=PER_STEP / step_s,
        tokens_per_s_per_gpu=PER_STEP / step_s / 8,
        mfu=0.5,
        flop_per_s_per_gpu=1e14,
    )


def price(low: float, high: float | None = None) -> Price:
    return Price(low_usd_per_gpu_hour=low, high_usd_per_gpu_hour=high or low, source="made up")


def cost(tokens: int, step_s: float = 2.0, paid: Price | None = None, cluster: Cluster = CLUSTER) -> TrainingCost:
    return training_cost(Training(tokens=tokens, price=paid), PER_STEP, time(step_s), cluster)


def test_a_training_by_hand() -> None:
    """1800 steps of 2 s are an hour; 8 GPUs at 2 to 4 USD and 500 W."""
    found = cost(1800 * PER_STEP, paid=price(2, 4))

    assert (found.steps, found.hours, found.gpu_hours) == (1800, 1.0, 8.0)
    assert (found.low_hours, found.high_hours) == pytest.approx((0.9, 1.2))
    assert (found.low_cost_usd, found.cost_usd, found.high_cost_usd) == pytest.approx((2 * 7.2, 3 * 8, 4 * 9.6))
    assert found.energy_kwh == pytest.approx(4.0)


@given(steps, durations, prices)
def test_the_cost_is_the_price_of_the_gpu_hours(count: int, step_s: float, usd: float) -> None:
    found = cost(count * PER_STEP, step_s, price(usd))

    assert found.cost_usd == pytest.approx(usd * found.gpu_hours)
    assert found.gpu_hours == pytest.approx(8 * found.hours)


@given(steps, durations, prices, prices)
def test_a_higher_price_never_costs_less(count: int, step_s: float, one: float, other: float) -> None:
    low, high = (cost(count * PER_STEP, step_s, price(each)).cost_usd for each in sorted((one, other)))

    assert low is not None
    assert high is not None
    assert low <= high
    assert (low < high) == (one != other)


@given(steps, durations, st.integers(1, 1000))
def test_hours_cost_and_energy_are_linear_in_tokens(count: int, step_s: float, times: int) -> None:
    once, often = (cost(tokens, step_s, price(2)) for tokens in (count * PER_STEP, times * count * PER_STEP))

    for name in ("steps", "hours", "low_hours", "high_hours", "gpu_hours", "cost_usd", "high_cost_usd", "energy_kwh"):
        assert getattr(often, name) == pytest.approx(times * getattr(once, name))


@given(steps, durations, prices, st.floats(1, 5))
def test_what_is_predicted_lies_in_its_range(count: int, step_s: float, low: float, wider: float) -> None:
    found = cost(count * PER_STEP, step_s, price(low, low * wider))

    assert found.low_hours <= found.hours <= found.high_hours
    assert found.low_cost_usd is not None
    assert found.cost_usd is not None
    assert found.high_cost_usd is not None
    assert found.low_cost_usd <= found.cost_usd <= found.high_cost_usd


def test_the_last_step_is_whole() -> None:
    assert [steps_of(Training(tokens=tokens), PER_STEP) for tokens in (PER_STEP, PER_STEP + 1)] == [1, 2]


def test_less_than_a_step_is_refused() -> None:
    with pytest.raises(SpecError, match="131,071 tokens are less than the 131,072 of one optimizer step"):
        cost(PER_STEP - 1)


def test_what_nobody_knows_is_none() -> None:
    found = cost(PER_STEP, cluster=machines.cluster(gpus=8))

    assert (found.cost_usd, found.low_cost_usd, found.high_cost_usd, found.energy_kwh) == (None, None, None, None)


def test_limits_are_refused_with_their_arithmetic() -> None:
    training = Training(tokens=1800 * PER_STEP, price=price(3), most_hours=0.75, most_usd=20)

    assert beyond_limits(training, training_cost(training, PER_STEP, time(), CLUSTER), time()) == (
        "1,800 steps × 2 s = 1.0 h, 0.2 h beyond --max-hours 0.75; "
        "8.0 GPU-hours × 3.00 = 24.00 USD, 4.00 USD beyond --max-cost 20"
    )


@given(durations, st.floats(0.1, 1e4), st.floats(1, 1e6))
def test_a_plan_within_its_limits_is_kept(step_s: float, hours: float, usd: float) -> None:
    training = Training(tokens=1800 * PER_STEP, price=price(3), most_hours=hours, most_usd=usd)
    found = training_cost(training, PER_STEP, time(step_s), CLUSTER)

    assert found.cost_usd is not None
    kept = found.hours <= hours and found.cost_usd <= usd
    assert (beyond_limits(training, found, time(step_s)) is None) == kept
