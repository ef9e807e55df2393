"""How far GPUs go: one step further does not fit, by any strategy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.cost.estimate import price
from advisor.errors import SpecError
from advisor.search import limits as search
from advisor.search.limits import SATURATED_SHARE, Reach, largest_models, last_below, limits, reach
from advisor.search.sheet import held_by
from advisor.search.space import SEARCHED_CHECKPOINTING, bar, micro_batches, variants
from advisor.specs.plan import Checkpointing
from advisor.specs.question import Question
from search.questions import ASKED


@given(st.integers(1, 50), st.integers(0, 500), st.integers(0, 2000), st.sampled_from([1, 2, 3]))
def test_the_last_that_is_not_above_is_found_whatever_the_curve(low: int, more: int, limit: int, power: int) -> None:
    high = low + more
    below = [at for at in range(low, high + 1) if at**power <= limit**power // 7]

    assert last_below(lambda at: float(at**power - limit**power // 7), low, high) == max(below, default=0)


@pytest.fixture(scope="module")
def asked() -> Question:
    return ASKED["offload fits"]


@pytest.fixture(scope="module")
def found(asked: Question) -> Reach:
    able = [variant for variant in variants(asked) if not bar(asked, *variant)]
    answer = reach(asked, able, offloads=True)
    assert answer
    return answer


def test_what_is_offered_fits_and_offloads(asked: Question, found: Reach) -> None:
    for plan in (found.largest, found.saturated, found.longest):
        assert plan.verdict == "fits"
        assert plan.plan.offload.optimizer
        assert held_by(replace(asked, job=plan.job), plan.plan).device_used_bytes == plan.memory.device_used_bytes


def test_no_strategy_takes_a_larger_micro_batch(asked: Question, found: Reach) -> None:
    size = int(found.largest.plan.micro_batch) + 1
    able = [each for each in variants(asked) if each[1].optimizer and not bar(asked, *each)]
    larger = [search.plan_of(asked, each, kept, size) for each in able for kept in SEARCHED_CHECKPOINTING]

    assert all(search.excess(asked, plan) > 0 for plan in larger)


def test_no_strategy_takes_a_longer_sequence(asked: Question, found: Reach) -> None:
    length = found.longest.job.sequence_length + search.SEQUENCE_STEP
    longer = replace(asked, job=replace(asked.job, sequence_length=length))
    able = [each for each in variants(asked) if each[1].optimizer and not bar(asked, *each)]

    assert found.longest.plan.checkpointing is Checkpointing.FULL
    assert all(search.excess(longer, search.plan_of(longer, each, Checkpointing.FULL, 1)) > 0 for each in able)


def test_a_larger_micro_batch_than_what_is_fast_enough_gains_little(asked: Question, found: Reach) -> None:
    plan = found.saturated.plan
    sizes, steps = micro_batches(asked.job, asked.cluster.gpus)
    same = [
        replace(plan, micro_batch=int(size), accumulation_steps=int(count))
        for size, count in zip(sizes, steps, strict=True)
    ]
    speeds = {
        each.micro_batch: price(asked, each).time.tokens_per_s for each in same if search.excess(asked, each) <= 0
    }
    enough = SATURATED_SHARE * max(speeds.values())

    assert plan.micro_batch == min(size for size, speed in speeds.items() if speed >= enough)


def test_where_nothing_fits_more_gpus_are_named() -> None:
    answer = limits("Qwen2.5-3B", gpu="T4", gpus=1, host_memory=16, global_batch=4)

    assert answer.reaches == ()
    assert answer.way_out.startswith("the fewest that would do: ")


def test_the_largest_models_come_first_and_larger_ones_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ["opt-125m", "gpt2", "gpt2-medium", "gpt2-xl", "Llama-3.1-70B"]
    monkeypatch.setattr(search, "model_names", lambda: known)
    answer = largest_models(most=2, gpu="T4", gpus=1, host_memory=8, global_batch=2, seq_len=128)

    assert [plan.model.name for plan in answer.fitting] == ["gpt2-medium", "opt-125m"]
    assert [model.name for model in answer.too_large] == ["Llama-3.1-70B", "gpt2-xl"]
    assert {plan.verdict for plan in answer.fitting} == {"fits"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"model": "gpt2", "trainer": "megatron"}, "leave --trainer megatron out"),
        ({"model": "bert-base-uncased", "strategy": "fsdp"}, "FSDP full shard cannot train bert-base-uncased: "),
    ],
)
def test_a_question_that_no_strategy_can_run_is_refused(words: dict[str, str], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        limits(**words, gpu="A100", gpus=2)  # type: ignore[arg-type]
