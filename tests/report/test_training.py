from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from advisor.cost.results import Estimate, TrainingCost
from advisor.report.estimate import estimate_report
from advisor.report.machine import estimate_object, recommendation_object
from advisor.report.recommendation import recommendation_report
from advisor.report.terminal import show
from advisor.report.training import training_columns
from advisor.search.results import Recommendation, row
from advisor.specs.training import Price
from report.samples import made_estimate, made_recommendation

TRAINING = TrainingCost(
    tokens=10**9,
    steps=7630,
    hours=60.0,
    low_hours=54.0,
    high_hours=69.0,
    gpu_hours=240.0,
    price=Price(low_usd_per_gpu_hour=2.0, high_usd_per_gpu_hour=3.0, source="a cloud 2026-01-02, its page"),
    cost_usd=600.0,
    low_cost_usd=432.0,
    high_cost_usd=828.0,
    energy_kwh=96.0,
)
FREE = replace(TRAINING, price=None, cost_usd=None, low_cost_usd=None, high_cost_usd=None, energy_kwh=None)
FIELDS = {
    *("tokens", "steps", "hours", "low_hours", "high_hours", "gpu_hours"),
    *("cost", "currency", "price_source", "energy_kwh"),
}


def asked(training: TrainingCost = TRAINING) -> Recommendation:
    answer = made_recommendation()
    return replace(answer, plans=tuple(replace(each, training=training) for each in answer.plans))


def printed(capsys: pytest.CaptureFixture[str], parts: list[RenderableType], width: int) -> str:
    show(parts, Console(file=io.StringIO(), width=width, highlight=False, markup=False))
    return capsys.readouterr().out


def test_the_whole_training_is_said_with_its_ranges_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, estimate_report(replace(made_estimate(), training=TRAINING), width=120), 120)

    assert text.partition("To train on 1,000,000,000 tokens\n")[2].splitlines() == [
        "  steps      7,630",
        "  hours      60.0      2.50 days; a real run may take 54.0 to 69.0",
        "  GPU-hours  240       4 × A100-80GB",
        "  cost       600 USD   432 to 828 at 2 to 3 a GPU-hour: a cloud 2026-01-02, its page",
        "  energy     96.0 kWh  at most: each GPU at its limit of 400 W all the time; host and cooling are not counted",
        "  Optimizer steps alone: loading, evaluation, checkpoints and restarts come on top.",
    ]


def test_what_is_not_known_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, estimate_report(replace(made_estimate(), training=FREE), width=120), 120)

    assert "  cost       not known  no list price for this GPU; give --price" in text
    assert "  energy     not known  no board power is known for this GPU" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_plans_have_their_hours_and_fit_the_page(capsys: pytest.CaptureFixture[str], width: int) -> None:
    plans = asked().plans
    answer = replace(asked(), pareto=(plans[0], plans[3]))

    text = printed(capsys, recommendation_report(answer, None, width=width), width)

    assert max(map(cell_len, text.splitlines())) <= width
    assert "60.0" in next(line for line in text.splitlines() if line.startswith("ZeRO-1 "))
    front = text.partition("No plan beats these in time and memory")[2].partition("Left out: what is within 10 %")[0]
    assert [line.split()[0] for line in front.splitlines() if "60.0" in line] == ["ZeRO-1", "FSDP"]


def test_a_column_of_costs_stands_where_every_plan_has_one() -> None:
    plans = asked().plans

    assert [each.title for each in training_columns(plans)] == ["Hours", "Cost USD"]
    assert [each.title for each in training_columns([replace(each, training=FREE) for each in plans])] == ["Hours"]
    assert training_columns(made_recommendation().plans) == []


def test_json_and_csv_have_the_training_where_it_is_asked_about() -> None:
    estimate: Estimate = replace(made_estimate(), training=TRAINING)

    found = estimate_object(estimate)["training"]

    assert isinstance(found, dict)
    assert found.keys() >= FIELDS
    assert (found["cost"], found["currency"], found["hours"]) == (600.0, "USD", 60.0)
    assert row(estimate).items() >= found.items()
    assert estimate_object(made_estimate())["training"] is None
    assert not FIELDS & row(made_estimate()).keys()
    assert row(replace(estimate, training=FREE))["currency"] is None


def test_json_has_the_front_where_it_is_asked_for() -> None:
    answer = made_recommendation()

    assert recommendation_object(answer, None)["pareto"] is None
    assert recommendation_object(replace(answer, pareto=answer.plans[:2]), None)["pareto"] == [
        row(each) for each in answer.plans[:2]
    ]
