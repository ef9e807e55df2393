"""The recommendation: the whole space was looked at, what is offered fits, and the order is the promised one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product

import pytest

from advisor.cost.results import Estimate
from advisor.errors import SpecError
from advisor.search.contenders import contenders
from advisor.search.rank import OFFLOAD_LEAD, TIE_SHARE, ordered
from advisor.search.recommend import recommend, search
from advisor.search.results import Recommendation, row
from advisor.search.sheet import price_sheet
from advisor.search.space import (
    SEARCHED_CHECKPOINTING,
    VARIANTS,
    bar,
    fsdp_settings,
    searched_zero_settings,
    sheets,
    variants,
)
from advisor.specs.plan import Offload, Plan, Strategy
from advisor.specs.question import Question
from advisor.specs.training import Objective
from search.questions import ASKED, answer, bounded, priced, question, variant_of, with_free_communication, with_memory

every_question = pytest.mark.parametrize("name", ASKED)


def every_legal_plan(asked: Question) -> Iterator[Plan]:
    """Brute force: each strategy, offload, checkpointing, micro-batch and accumulation that makes up the batch."""
    share = asked.job.global_batch // asked.cluster.gpus
    counts = [(size, share // size) for size in range(1, share + 1) if share % size == 0]
    for strategy, offload, checkpointing, (size, steps) in product(Strategy, Offload, SEARCHED_CHECKPOINTING, counts):
        if (strategy, offload) in variants(asked) and bar(asked, strategy, offload) is None:
            yield Plan(
                strategy=strategy,
                gpus=asked.cluster.gpus,
                micro_batch=size,
                accumulation_steps=steps,
                checkpointing=checkpointing,
                offload=offload,
                zero=searched_zero_settings(strategy, asked),
                fsdp=fsdp_settings(strategy, asked),
            )


def best_of_each(name: str) -> dict[tuple[Strategy, Offload], Estimate]:
    """Of each variant the fastest plan that fits with the margin, each read alone."""
    best: dict[tuple[Strategy, Offload], Estimate] = {}
    possible = [plan for plan in every_legal_plan(ASKED[name]) if bounded(name, plan)[1] <= 0]
    for plan in sorted(possible, key=lambda plan: bounded(name, plan), reverse=True):
        if variant_of(plan) not in best and priced(name, plan).verdict == "fits":
            best[variant_of(plan)] = priced(name, plan)
    return best


@every_question
def test_no_plan_that_fits_is_faster_than_the_one_offered_of_its_strategy(name: str) -> None:
    found, brute_force = answer(name), best_of_each(name)

    assert {variant_of(each.plan) for each in found.plans} == set(brute_force)
    for each in found.plans:
        fastest = brute_force[variant_of(each.plan)]
        assert each.time.tokens_per_s == pytest.approx(fastest.time.tokens_per_s, rel=1e-12)
        assert replace(each, why="") == replace(priced(name, each.plan), why="")


@every_question
def test_every_legal_plan_was_priced_once(name: str) -> None:
    assert answer(name).considered == sum(1 for _ in every_legal_plan(ASKED[name]))


@every_question
def test_what_is_offered_fits_with_its_margin_and_its_host(name: str) -> None:
    for each in answer(name).plans:
        memory = each.memory
        assert each.verdict == "fits"
        assert memory.device_used_bytes <= memory.capacity_bytes * (1 - ASKED[name].margin_share(each.plan))
        assert memory.host_bytes <= memory.host_capacity_bytes
        assert each.plan.global_batch == ASKED[name].job.global_batch


@every_question
def test_each_strategy_is_offered_or_rejected_with_a_reason(name: str) -> None:
    found = answer(name)
    listed = [variant_of(each.plan) for each in (*found.plans, *found.rejected)]

    assert sorted(listed, key=str) == sorted(variants(ASKED[name]), key=str)
    assert all(each.why for each in (*found.plans, *found.rejected))


@every_question
def test_a_sheet_says_of_each_plan_what_is_read_of_it_alone(name: str) -> None:
    asked = ASKED[name]
    for plan in sheets(asked):
        if isinstance(plan, Plan):
            sheet = price_sheet(asked, plan)
            for index in range(sheet.size):
                tokens_per_s, short_by_bytes = bounded(name, plan.at(index))
                if sheet.short_by_bytes.min() <= 0:
                    assert sheet.tokens_per_s[index] == pytest.approx(tokens_per_s, rel=1e-12)
                assert sheet.short_by_bytes[index] == short_by_bytes


def standing(estimate: Estimate) -> float:
    """An offloading plan has to be ahead by its lead."""
    lead = OFFLOAD_LEAD if estimate.plan.offload.optimizer else 0
    return estimate.time.tokens_per_s * (1 - lead)


def simplicity(estimate: Estimate) -> int:
    return VARIANTS.index(variant_of(estimate.plan))


def assert_ranked(found: Recommendation) -> None:
    for place, chosen in enumerate(found.plans):
        left = found.plans[place:]
        floor = max(standing(each) for each in left) * (1 - TIE_SHARE)

        assert standing(chosen) >= floor
        assert all(simplicity(chosen) <= simplicity(each) for each in left if standing(each) >= floor)


@every_question
def test_the_fastest_comes_first_and_among_the_near_equal_the_simplest(name: str) -> None:
    assert_ranked(answer(name))


def titles(asked: Question) -> list[str]:
    return [each.plan.title for each in search(asked).plans]


def test_near_equals_stand_from_the_simplest_to_the_most_involved() -> None:
    """A step of many sequences: what ZeRO-1 waits for is a small part of it, but there."""
    found = search(question(gpus=4, global_batch=128, seq_len=512))
    fastest = max(each.time.tokens_per_s for each in found.plans if not each.plan.offload.optimizer)
    near = [each for each in found.plans if standing(each) > fastest * (1 - TIE_SHARE)]

    assert len(near) >= 5
    assert found.plans[: len(near)] == tuple(sorted(near, key=simplicity))
    assert found.plans[0].time.tokens_per_s < fastest, "the simplest is not the fastest here"


def test_as_memory_shrinks_others_win_by_the_same_rules() -> None:
    asked = question("Qwen2.5-1.5B", gpus=4, global_batch=16, seq_len=512)
    winners = []
    for gpu_gib in (80, 16, 12, 9.5, 8):
        found = search(with_memory(asked, gpu_gib=gpu_gib))
        assert_ranked(found)
        winners += [variant_of(each.plan) for each in found.plans[:1]]

    assert len(set(winners)) >= 3


def test_an_offloading_plan_has_to_be_faster_by_its_lead() -> None:
    """Between hosts that cost nothing, offloading saves the update's time: more of it on fewer GPUs."""
    asked = with_free_communication(question(gpus=8, global_batch=8, seq_len=512, gpu_gib=1000, host_gib=100_000))
    gains = {}
    for gpus, wins in ((8, False), (1, True)):
        found = search(replace(asked, cluster=replace(asked.cluster, gpus=gpus)))
        fastest = {
            offloads: max(each.time.tokens_per_s for each in found.plans if each.plan.offload.optimizer is offloads)
            for offloads in (False, True)
        }
        gains[gpus] = fastest[True] / fastest[False] - 1

        assert found.plans[0].plan.offload.optimizer is wins
        assert_ranked(found)
    assert 0 < gains[8] < OFFLOAD_LEAD < gains[1]


def test_without_bf16_the_gpu_trains_in_fp16() -> None:
    found = recommend("gpt2", gpus=1, gpu="T4")

    assert found.job.precision == "fp16"
    assert "one GPU" in [each.plan.title for each in found.plans]


def test_bf16_on_a_gpu_without_it_is_refused() -> None:
    with pytest.raises(SpecError, match="T4 has no bf16; use --precision fp16"):
        recommend("gpt2", gpus=1, gpu="T4", precision="bf16")


def test_pure_bf16_halves_what_fsdp_holds_between_steps() -> None:
    plain, pure = (
        recommend("Qwen2.5-0.5B", gpus=2, gpu="A100-80GB", global_batch=8, param_dtype=each)
        for each in ("fp32", "bf16")
    )
    states = [
        next(each.memory.states_bytes for each in found.plans if each.plan.strategy is Strategy.FSDP)
        for found in (plain, pure)
    ]

    # Adam's step counters and the rotary frequencies keep their width.
    assert 0 <= 2 * states[1] - states[0] < 2000


def test_one_gpu_has_only_itself_and_its_host() -> None:
    found = answer("one GPU")

    assert {each.plan.title for each in found.plans} <= {
        "one GPU",
        "ZeRO-2 + optimizer offload",
        "ZeRO-3 + optimizer offload",
        "ZeRO-3 + optimizer and parameter offload",
    }
    reasons = {each.plan.title: each.why for each in found.rejected}
    assert reasons["ZeRO-1"] == reasons["FSDP full shard"] == "one GPU has nobody to share with"
    assert {each.short_by_bytes for each in found.rejected} == {0}


def test_machines_talk_over_the_network() -> None:
    found = answer("two machines")
    inside = search(replace(ASKED["two machines"], cluster=replace(ASKED["two machines"].cluster, nodes=1)))
    network, link = found.cluster.network.name, found.cluster.link.name

    for each in found.plans:
        ways = {line.link for line in each.traffic if line.link != found.cluster.host_link.name}
        # ZeRO++ gathers from second copies inside a machine.
        assert ways == ({network, link} if each.plan.strategy is Strategy.ZERO3_PLUS else {network})
    assert link in {line.link for line in inside.plans[0].traffic}
    speeds = {variant_of(each.plan): each.time.tokens_per_s for each in inside.plans}
    # Offloading is left out: more ranks in one machine share its host. In one machine there is no ZeRO++.
    apart = [each for each in found.plans if not each.plan.offload.optimizer and variant_of(each.plan) in speeds]
    assert len(apart) >= 3
    assert all(each.time.tokens_per_s < speeds[variant_of(each.plan)] for each in apart)


def test_a_wider_margin_never_fits_more() -> None:
    offered = []
    for margin in (0.0, 0.1, 0.9):
        asked = replace(ASKED["some fit"], given_margin_share=margin)
        found = search(asked)
        offered.append({variant_of(each.plan) for each in found.plans})
        for each in found.plans:
            assert each.memory.device_used_bytes <= each.memory.capacity_bytes * (1 - margin)

    assert all(more >= fewer for more, fewer in pairwise(offered))
    assert len(offered[0]) > len(offered[-1])


def test_a_global_batch_that_does_not_divide_is_refused_before_anything_is_priced() -> None:
    with pytest.raises(SpecError, match=r"global batch of 64 does not divide over 6 GPUs.*try --global-batch 66"):
        recommend("Qwen2.5-0.5B", gpus=6, gpu="A100-80GB")


def test_the_words_are_answered_as_the_question_they_mean() -> None:
    asked = question(gpus=4, global_batch=16, seq_len=512)

    found = recommend("Qwen2.5-0.5B", gpus=4, gpu="A100-80GB", global_batch=16, seq_len=512)

    assert replace(found, seconds=0) == replace(search(asked), seconds=0)
    assert (found.inputs, found.warnings, found.cluster) == (asked.inputs, asked.warnings, asked.cluster)


@every_question
def test_the_best_is_the_first_and_the_headline_names_it(name: str) -> None:
    found = answer(name)

    if found.best is None:
        assert found.headline.startswith(f"Does not fit: {found.model.name} on ")
        assert found.plans == ()
    else:
        assert found.best is found.plans[0]
        assert found.headline.startswith(f"Fits: train {found.model.name} on {found.cluster.gpus} × ")
        assert f"with {found.best.plan.title}, {found.best.time.tokens_per_s:,.0f} tokens/s" in found.headline
        assert found.fewest_gpus is None


@every_question
def test_a_frame_has_a_row_for_each_plan_in_their_order(name: str) -> None:
    found = answer(name)
    frame = found.to_frame()

    assert frame.to_dict("records") == [row(each) for each in found.plans]
    if len(frame):
        assert frame["strategy"].tolist() == [each.plan.strategy.value for each in found.plans]
        assert frame["traffic_bytes"].tolist() == [each.sent_bytes for each in found.plans]


@pytest.mark.parametrize("objective", ["cost", "energy"])
def test_on_given_gpus_cost_and_energy_go_with_time(objective: Objective) -> None:
    found = search(ASKED["three GPUs"], objective=objective)

    assert replace(found, seconds=0) == replace(answer("three GPUs"), seconds=0)


def test_for_memory_the_leanest_plan_of_each_strategy_is_offered_leanest_first() -> None:
    name = "three GPUs"
    fitting = [each for plan in every_legal_plan(ASKED[name]) if (each := priced(name, plan)).verdict == "fits"]
    least: dict[tuple[Strategy, Offload], int] = {}
    for each in fitting:
        used = each.memory.device_used_bytes
        least[variant_of(each.plan)] = min(used, least.get(variant_of(each.plan), used))

    found = search(ASKED[name], objective="memory")

    assert [each.memory.device_used_bytes for each in found.plans] == sorted(least.values())
    assert {variant_of(each.plan): each.memory.device_used_bytes for each in found.plans} == least
    assert f" GiB less than {found.plans[1].plan.title}, the next" in found.plans[0].why
    assert all(" GiB more, " in each.why for each in found.plans[1:])


def test_the_length_of_a_training_changes_no_plan() -> None:
    words = {"gpus": 2, "global_batch": 8, "seq_len": 512}
    silent, asked = search(question(**words)), search(question(**words, tokens=10**9))

    assert [replace(each, training=None, inputs=()) for each in asked.plans] == [
        replace(each, inputs=()) for each in silent.plans
    ]
    assert all(each.training and each.training.tokens == 10**9 for each in asked.plans)
    assert all(each.training is None for each in silent.plans)
    assert asked.headline == silent.headline


def test_plans_beyond_a_limit_are_refused_with_the_arithmetic() -> None:
    words = {"gpus": 2, "global_batch": 8, "seq_len": 512, "tokens": 10**9}
    hours = {variant_of(each.plan): each.training.hours for each in search(question(**words)).plans if each.training}
    limit = sorted(hours.values())[len(hours) // 2]

    found = search(question(**words, max_hours=limit))

    assert {variant_of(each.plan) for each in found.plans} == {each for each in hours if hours[each] <= limit}
    refusals = {variant_of(each.plan): each.why for each in found.rejected}
    assert refusals.keys() == {each for each in hours if hours[each] > limit}
    assert all("steps × " in why and "h beyond --max-hours" in why for why in refusals.values())


def test_where_all_plans_are_beyond_a_limit_the_nearest_is_named() -> None:
    found = search(question(gpus=2, global_batch=8, seq_len=512, tokens=10**9, max_cost=1))

    assert found.best is None
    assert found.headline.startswith("Beyond a limit: Qwen2.5-0.5B on 2 × A100-SXM4-80GB with ")
    assert found.headline.endswith("USD beyond --max-cost 1")
    assert found.fewest_gpus is None


def test_a_lean_plan_beyond_a_limit_gives_way_to_one_within() -> None:
    words = {"gpus": 2, "global_batch": 8, "seq_len": 512, "tokens": 10**9}
    lean = search(question(**words), objective="memory").plans[0]
    assert lean.training

    within = search(question(**words, max_hours=0.99 * lean.training.hours), objective="memory")

    assert within.best
    assert within.best.training
    assert within.best.training.hours < lean.training.hours
    assert within.best.memory.device_used_bytes >= lean.memory.device_used_bytes


@pytest.mark.parametrize("objective", ["time", "memory"])
@pytest.mark.parametrize("name", ["one GPU", "three GPUs", "offload fits"])
def test_strategies_that_cannot_come_first_are_passed_over(name: str, objective: Objective) -> None:
    whole = contenders(ASKED[name], objective)
    short = contenders(ASKED[name], objective, only_best=True)

    assert ordered(short.best, objective)[0] == ordered(whole.best, objective)[0]
    assert {variant_of(each.plan) for each in short.best} <= {variant_of(each.plan) for each in whole.best}
