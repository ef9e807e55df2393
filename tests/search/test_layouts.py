"""The search over Megatron's layouts: exhaustive, as exact as plans priced one by one, and kept to what is given."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest

from advisor.catalog.request import resolve
from advisor.cost.estimate import price
from advisor.cost.memory import footprint
from advisor.cost.question import program
from advisor.cost.schedule import step_time
from advisor.cost.traffic import Routes
from advisor.errors import SpecError
from advisor.search.compare import compare
from advisor.search.layout_prices import price_layouts
from advisor.search.layout_search import search_layouts
from advisor.search.layouts import layout_space
from advisor.search.recommend import recommend, search
from advisor.search.sheet import Sheet, possible
from advisor.specs.layout import GivenLayout
from advisor.specs.megatron import MegatronSettings
from advisor.specs.plan import Checkpointing, Plan, Strategy
from advisor.specs.question import Question
from advisor.step.megatron_shard import check
from search.questions import with_memory


@cache
def asked(model: str = "Llama-3.2-1B", gpus: int = 4, **words: Any) -> Question:
    usual = {"gpu": "H100", "trainer": "megatron", "seq_len": 1024, "global_batch": 16}
    return resolve(model, gpus=gpus, **{**usual, **words})


def priced(question: Question) -> tuple[Sheet, ...]:
    routes = Routes(question.cluster)
    return tuple(sheet for each in layout_space(question).sheets for sheet in price_layouts(question, each, routes))


@cache
def sheets_of(model: str = "Llama-3.2-1B", **words: Any) -> tuple[Sheet, ...]:
    return priced(asked(model, **words))


def given(question: Question, **layout: Any) -> Question:
    return replace(question, given_layout=GivenLayout(**layout))


def test_every_plan_that_divides_is_in_the_space_once() -> None:
    question, powers = asked(global_batch=4), [1, 2, 4, 8, 16]
    found = [
        plan.at(int(index))
        for each in layout_space(question).sheets
        for plan, legal in zip(each.plans, each.legal, strict=True)
        for index in np.flatnonzero(legal)
    ]
    whole = MegatronSettings(distributed_optimizer=False, overlaps_weights=False)
    expected = set()
    degrees = product(powers, powers, powers, powers, powers, (False, True), Checkpointing, (MegatronSettings(), whole))
    for tensor, stages, virtual, context, size, sequence, checkpointing, settings in degrees:
        steps, left = divmod(4 * tensor * stages * context, 4 * size)
        cut = tensor * stages * context
        if left or not steps or 4 % cut or (sequence and tensor == 1) or (settings is whole and tensor * stages == 4):
            continue
        try:
            plan = Plan(
                strategy=Strategy.MEGATRON,
                gpus=4,
                micro_batch=size,
                accumulation_steps=steps,
                checkpointing=checkpointing,
                tensor_parallel=tensor,
                sequence_parallel=sequence,
                pipeline_parallel=stages,
                virtual_stages=virtual,
                context_parallel=context,
                megatron=settings,
            )
            check(question.model, question.job, plan)
        except SpecError:
            continue
        expected.add(plan)

    assert len(found) == len(set(found)) == len(expected)
    assert set(found) == expected


@pytest.mark.parametrize(("model", "words"), [("Llama-3.2-1B", {}), ("Qwen3-0.6B", {"nodes": 2, "global_batch": 4})])
def test_a_sheet_has_the_bytes_and_seconds_of_each_plan_by_itself(model: str, words: dict[str, Any]) -> None:
    question = asked(model, **words)
    sheets = sheets_of(model, **words)
    every = [(sheet, int(index)) for sheet in sheets for index in np.flatnonzero(np.isfinite(sheet.short_by_bytes))]
    drawn = np.random.default_rng(7).choice(len(every), size=max(len(every) // 100, 8), replace=False)

    for sheet, index in (every[number] for number in drawn):
        plan = sheet.plan.at(index)
        alone = program(question, plan)
        held = footprint(alone, plan, question.cluster, question.calibration)
        assert sheet.rank[index] == alone.rank
        assert sheet.device_used_bytes[index] == held.device_used_bytes
        times = step_time(alone.pace, question.job, plan, question.cluster, question.calibration)
        assert sheet.most_tokens_per_s[index] == pytest.approx(times.most_tokens_per_s, rel=1e-12)
        assert sheet.most_tokens_per_s[index] >= times.tokens_per_s * (1 - 1e-12)


def test_the_search_finds_the_fastest_of_all_plans() -> None:
    question = given(asked(global_batch=4), checkpointing=Checkpointing.NONE, context_parallel=1)
    one_by_one = [price(question, sheet.plan.at(index)) for sheet, index in possible(priced(question))]
    fitting = [each for each in one_by_one if each.verdict == "fits"]

    found = search_layouts(question)

    fastest: dict[tuple[int, Any], float] = {}
    for each in fitting:
        layout = each.plan.tensor_parallel, each.plan.pipeline_parallel
        fastest[layout] = max(fastest.get(layout, 0.0), each.time.tokens_per_s)
    assert [each.time.tokens_per_s for each in found.best] == sorted(fastest.values(), reverse=True)[: len(found.best)]


def test_no_plan_is_faster_than_its_bound() -> None:
    question = asked()
    sheets = [sheet for sheet in sheets_of() if sheet.tokens_per_s.any()]

    for sheet in sheets[:: len(sheets) // 12]:
        index = int(np.argmax(np.where(sheet.short_by_bytes <= 0, sheet.tokens_per_s, 0)))
        found = price(question, sheet.plan.at(index))
        assert found.time.tokens_per_s <= sheet.tokens_per_s[index] * (1 + 1e-12)
        assert found.memory.device_used_bytes >= sheet.device_used_bytes[index]


def test_a_search_keeps_to_what_is_given() -> None:
    found = recommend(
        "Llama-3.2-1B",
        gpus=8,
        gpu="H100",
        trainer="megatron",
        tp=2,
        sequence_parallel=True,
        pp=2,
        vpp=4,
        cp=2,
        micro_batch=2,
        checkpointing="selective",
    )

    assert found.best
    assert found.best.plan.title == "Megatron tp 2 + sp, pp 2 x 4, cp 2"
    assert (found.best.plan.micro_batch, found.best.plan.checkpointing) == (2, Checkpointing.SELECTIVE)
    assert {each.value for each in found.inputs if each.name in ("tp", "pp", "vpp", "cp")} == {2, 4}


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({"tp": 3}, r"--tp 3 and --gpus 8 .* contradict each other: groups of 3 GPUs do not divide 8"),
        ({"tp": 8, "pp": 2}, r"--tp 8 and --pp 2 and --gpus 8 .* contradict each other"),
        ({"pp": 3}, r"--pp 3 and .* 16 layers do not divide over 3 stages"),
        ({"pp": 4, "vpp": 3}, r"--vpp 3 and .* do not divide into 3 runs"),
        ({"micro_batch": 3, "tp": 2}, r"--micro-batch 3 and .* contradict each other: micro-batches of 3"),
        ({"vpp": 2, "pp": 1}, "--vpp 2 needs stages of a pipeline, and --pp is 1"),
        ({"tp": 1, "sequence_parallel": True}, "--sequence-parallel cuts what .* and --tp is 1"),
        ({"tp": 0}, "--tp must be at least 1, got 0"),
        ({"checkpointing": "some"}, "--checkpointing must be one of none, selective, full, got 'some'"),
        ({"strategy": "zero3"}, "--strategy and --offload are not for --trainer megatron"),
    ],
)
def test_what_contradicts_each_other_is_named(layout: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        recommend("Llama-3.2-1B", gpus=8, gpu="H100", trainer="megatron", **layout)


def test_layouts_are_for_megatron_alone() -> None:
    with pytest.raises(SpecError, match=r"--tp: .* give --trainer megatron"):
        recommend("Llama-3.2-1B", gpus=8, gpu="H100", tp=2)


def test_tensor_parallelism_crosses_machines_only_where_it_is_asked_for() -> None:
    question = asked("gpt2-large", gpus=10, nodes=2, global_batch=10)
    free, fixed = layout_space(question), layout_space(given(question, tensor_parallel=10))

    assert {sheet.plans[0].tensor_parallel for sheet in free.sheets} == {1, 5}
    assert any("would cross machines of 5" in each.why for each in free.excluded)
    assert {sheet.plans[0].tensor_parallel for sheet in fixed.sheets} == {10}


def test_what_does_not_divide_keeps_its_reason() -> None:
    reasons = [each.why for each in layout_space(asked(gpus=64, nodes=8, global_batch=64)).excluded]

    assert "8 key-value heads do not divide over tensor_parallel 16" in reasons
    assert "16 layers do not divide over 32 stages x 1 = 32 runs" in reasons


def test_where_nothing_fits_the_nearest_misses_and_the_gpus_that_would_do_are_told() -> None:
    question = with_memory(given(asked(gpus=2), checkpointing=Checkpointing.FULL, micro_batch=1), gpu_gib=9)

    found = search(question)

    assert not found.plans
    assert sum(each.short_by_bytes > 0 for each in found.rejected) >= 3
    assert found.headline.count("GiB short") == 3
    assert found.fewest_gpus
    assert f"the fewest that would do: {found.fewest_gpus} GPUs" in found.headline
    more = replace(question, cluster=replace(question.cluster, gpus=found.fewest_gpus, nodes=found.fewest_gpus // 2))
    assert search_layouts(more, shown=1).best


def test_experts_are_spread_over_as_many_ranks_as_is_fastest() -> None:
    question = given(asked("Qwen3-30B-A3B-Base", gpus=8), micro_batch=1, context_parallel=1, tensor_parallel=1)

    found = search_layouts(question, shown=2)

    plans = [each.plan for each in found.best]
    assert {sheet.plan.expert_parallel for sheet in found.sheets} == {1, 2, 4, 8}
    assert plans[0].expert_parallel > 1
    assert len({(plan.pipeline_parallel, plan.expert_parallel) for plan in plans}) == 2


def test_counts_of_gpus_are_compared_by_their_best_layouts() -> None:
    found = compare("Llama-3.2-1B", gpus=[2, 4], gpu="H100", trainer="megatron", cp=1, checkpointing="none", pp=1)

    assert [scale.cluster.gpus for scale in found.scales] == [2, 4]
    assert all(plan.plan.strategy is Strategy.MEGATRON for scale in found.scales for plan in scale.plans)


def test_what_the_cuts_of_the_best_layout_cost_is_said() -> None:
    found = recommend("Llama-3.2-1B", gpus=8, gpu="H100", trainer="megatron", tp=8, sequence_parallel=False)

    assert found.best
    assert "waiting for sums of a layer over nvlink4" in found.best.why
