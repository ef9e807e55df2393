"""GPUs side by side: each with the plan that a search of it finds, in the order of what is asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, get_args

import pytest

from advisor.catalog.prices import priced_gpus
from advisor.errors import SpecError
from advisor.search import gpu_types
from advisor.search.gpu_types import GpuRanking, amount_of, rank_gpus
from advisor.search.pareto import dominates, respects
from advisor.search.recommend import recommend
from advisor.specs.training import Objective

SMALL: dict[str, Any] = {"model": "gpt2", "gpus": 2, "global_batch": 4, "seq_len": 256, "tokens": 10**8}
SOME = ("H100-SXM5-80GB", "RTX 4090", "A40")


@pytest.fixture(autouse=True)
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_types, "priced_gpus", lambda provider: SOME)


@cache
def found(objective: Objective) -> GpuRanking:
    return rank_gpus(**SMALL, objective=objective, pareto=objective == "cost")


@pytest.mark.parametrize("objective", get_args(Objective))
def test_gpus_stand_in_the_order_of_the_objective(objective: Objective) -> None:
    ranking = found(objective)

    amounts = [amount_of(plan, objective) for plan in ranking.plans]
    assert amounts == sorted(amounts)
    assert {plan.cluster.gpu.name for plan in ranking.plans} == set(SOME)
    assert ranking.least(objective) == ranking.best


@pytest.mark.parametrize("objective", ["cost", "memory"])
def test_each_gpu_has_the_plan_that_is_recommended_on_it(objective: Objective) -> None:
    for plan in found(objective).plans:
        best = recommend(**SMALL, gpu=plan.cluster.gpu.name, objective=objective).best
        assert best
        assert plan == replace(best, why=plan.why)


def test_the_best_by_another_objective_is_that_of_its_own_ranking() -> None:
    assert found("time").least("cost") == found("cost").best
    assert found("cost").least("time") == found("time").best
    assert found("time").best != found("cost").best, "the fastest is not the cheapest here"


def test_the_front_over_gpus_holds_no_beaten_plan_and_nothing_beats_it() -> None:
    ranking = found("cost")
    points = [respects(plan) for plan in ranking.pareto]

    assert not any(dominates(one, other) for one in points for other in points)
    assert not any(dominates(respects(plan), point) for plan in ranking.plans for point in points)
    assert points == sorted(points)
    assert len({plan.cluster.gpu.name for plan in ranking.pareto}) > 1


def test_inputs_are_those_that_all_share() -> None:
    named = {each.name for each in found("cost").inputs}

    assert {"model", "gpus", "tokens", "global_batch"} <= named
    assert not {"gpu", "link", "price"} & named


def test_a_gpu_on_which_nothing_fits_stands_last_with_the_reason() -> None:
    ranking = rank_gpus("Qwen2.5-7B", gpus=1, global_batch=1, seq_len=512, host_memory=64)

    assert ranking.best is None
    assert ranking.least("time") is None
    assert all("GiB short" in choice.why_none for choice in ranking.choices)
    assert [choice.best for choice in ranking.choices] == [None] * 3


def test_a_provider_s_list_is_asked_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_types, "priced_gpus", lambda provider: priced_gpus(provider)[:1])

    ranking = rank_gpus(**SMALL, price="aws")

    assert [choice.cluster.gpu.name for choice in ranking.choices] == ["A100-SXM4-40GB"]
    assert ranking.best
    assert ranking.best.training
    assert ranking.best.training.price
    assert ranking.best.training.price.source.startswith("AWS 2026-11-09")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"price": 2.5, "tokens": 10**9}, "--price 2.5 cannot hold for every GPU; name a provider"),
        ({"objective": "cost"}, "--objective cost: of how long a training"),
        ({"objective": "energy", "max_hours": 3}, "--objective energy: of how long a training"),
    ],
)
def test_what_cannot_be_meant_of_all_gpus_is_refused(words: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        rank_gpus("gpt2", gpus=1, **words)
