"""The Pareto front: no plan on it is beaten, and each that was left out is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.samples import made_estimate

from advisor.cost.results import Estimate
from advisor.search.pareto import dominates, respects, thinned, undominated
from advisor.search.recommend import search
from search.questions import ASKED, priced, question
from search.test_recommend import every_legal_plan

points = st.lists(st.tuples(st.floats(1, 100), st.floats(1, 60)), min_size=1, max_size=12)


def key(estimate: Estimate) -> tuple[float, ...]:
    return respects(estimate)


@given(points)
def test_what_is_kept_is_beaten_by_none_and_what_is_dropped_by_one(each: list[tuple[float, float]]) -> None:
    made = [made_estimate(step_s=step_s, device_gib=gib) for step_s, gib in each]

    kept = undominated(made)

    assert kept
    assert not any(dominates(key(one), key(other)) for one in made for other in kept)
    for dropped in made:
        assert dropped in kept or any(dominates(key(one), key(dropped)) or key(one) == key(dropped) for one in kept)
    assert len({key(one) for one in kept}) == len(kept)


@pytest.mark.parametrize("name", ["one GPU", "three GPUs"])
def test_the_front_is_that_of_all_legal_plans(name: str) -> None:
    every = [priced(name, plan) for plan in every_legal_plan(ASKED[name])]
    fitting = [each for each in every if each.verdict == "fits"]

    found = search(ASKED[name], pareto=True)

    assert len(fitting) < len(every), "some do not fit"
    assert [key(each) for each in found.pareto] == sorted({key(each) for each in undominated(fitting)})


def test_the_fastest_and_the_leanest_plan_are_its_ends() -> None:
    asked = question("gpt2", gpus=2, global_batch=4, seq_len=128, tokens=10**8)
    found, lean = search(asked, pareto=True), search(asked, objective="memory")

    assert lean.best
    assert found.pareto[0].time == max((each.time for each in found.plans), key=lambda time: time.tokens_per_s)
    assert found.pareto[-1].memory.device_used_bytes == lean.best.memory.device_used_bytes
    assert [each.memory.device_used_bytes for each in found.pareto] == sorted(
        (each.memory.device_used_bytes for each in found.pareto), reverse=True
    )


def test_money_is_a_respect_of_its_own() -> None:
    """A slower GPU that needs more memory stays where it is cheaper, and goes where money is not asked about."""
    words = {"gpus": 1, "global_batch": 2, "seq_len": 256, "tokens": 10**8}
    fast, slow = (search(question(gpu=gpu, **words)).best for gpu in ("H100", "A40"))
    assert fast
    assert slow
    larger = replace(slow, memory=replace(slow.memory, device_used_bytes=fast.memory.device_used_bytes + 1))

    assert undominated([fast, larger]) == (fast, larger)
    assert undominated([replace(fast, training=None), replace(larger, training=None)]) == (
        replace(fast, training=None),
    )


def test_none_is_looked_for_where_none_is_asked() -> None:
    assert search(ASKED["one GPU"]).pareto == ()


@given(points)
def test_what_is_left_out_of_a_short_list_is_near_to_what_stays(each: list[tuple[float, float]]) -> None:
    made = undominated([made_estimate(step_s=step_s, device_gib=gib) for step_s, gib in each])

    kept = thinned(made, 0.1)

    assert kept[0] == made[0]
    for left_out in (one for one in made if one not in kept):
        assert any(all(a <= 1.1 * b for a, b in zip(key(one), key(left_out), strict=True)) for one in kept)
