"""The space of plans: complete, legal, and with a reason for what is left out."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from advisor.errors import SpecError
from advisor.search.space import (
    LONG_SEQUENCE,
    SEARCHED_CHECKPOINTING,
    VARIANTS,
    Barred,
    bar,
    kept_to,
    micro_batches,
    sheets,
    variants,
)
from advisor.specs.job import Job
from advisor.specs.plan import OWN_STRATEGIES, Offload, Plan, Strategy
from search.questions import ASKED, question, variant_of


@given(st.integers(1, 64), st.integers(1, 200))
def test_every_way_to_make_up_the_global_batch_is_there_once(gpus: int, share: int) -> None:
    batches, steps = micro_batches(Job(global_batch=gpus * share), gpus)
    brute_force = [
        (size, count) for size in range(1, share + 1) for count in range(1, share + 1) if size * count == share
    ]

    assert sorted(zip(batches.tolist(), steps.tolist(), strict=True)) == sorted(brute_force)


@given(st.integers(1, 5000), st.integers(1, 300))
def test_a_global_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(batch: int, gpus: int) -> None:
    assume(batch % gpus)

    with pytest.raises(SpecError, match=f"global batch of {batch} does not divide over {gpus} GPUs") as refusal:
        micro_batches(Job(global_batch=batch), gpus)

    suggested = re.search(r"try --global-batch (\d+)$", str(refusal.value))
    assert suggested
    near = int(suggested[1])
    batches, steps = micro_batches(Job(global_batch=near), gpus)
    assert (gpus * batches * steps == near).all()
    assert abs(near - batch) <= gpus / 2 or near == gpus


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_each_strategy_comes_with_each_checkpointing_or_with_a_reason(asked: object) -> None:
    found = list(sheets(asked))  # type: ignore[arg-type]
    plans = [each for each in found if isinstance(each, Plan)]
    ruled_out = [each for each in found if isinstance(each, Barred)]

    known = variants(asked)  # type: ignore[attr-defined]

    listed = {(variant_of(plan), plan.checkpointing) for plan in plans}
    assert len(listed) == len(plans)
    assert listed == {(variant, each) for variant, _ in listed for each in SEARCHED_CHECKPOINTING}
    assert {variant for variant, _ in listed} | {(each.strategy, each.offload) for each in ruled_out} == set(known)
    assert len(listed) / 2 + len(ruled_out) == len(known)
    assert all(each.why for each in ruled_out)


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_every_plan_of_a_sheet_makes_up_the_job(asked: object) -> None:
    for plan in sheets(asked):  # type: ignore[arg-type]
        if isinstance(plan, Plan):
            assert (np.asarray(plan.global_batch) == asked.job.global_batch).all()  # type: ignore[attr-defined]
            assert plan.gpus == asked.cluster.gpus  # type: ignore[attr-defined]


def test_the_variants_are_all_that_a_plan_admits() -> None:
    admitted = []
    for strategy in OWN_STRATEGIES:
        for offload in Offload:
            try:
                Plan(strategy=strategy, gpus=2, micro_batch=1, offload=offload)
            except SpecError:
                continue
            admitted.append((strategy, offload))

    # Stage 0 shares nothing, which DDP does with less.
    admitted.remove((Strategy.ZERO0, Offload.NONE))
    # Stage 1 with its optimizer on the host keeps whole gradients on the GPU, for which offload was to make room.
    admitted.remove((Strategy.ZERO1, Offload.OPTIMIZER))
    assert sorted(VARIANTS, key=str) == sorted(admitted, key=str)


@pytest.mark.parametrize(("gpus", "nodes", "differs"), [(8, 1, False), (4, 4, False), (16, 2, True)])
def test_hsdp_is_searched_where_there_are_machines_of_several_gpus(gpus: int, nodes: int, differs: bool) -> None:
    asked = question(gpus=gpus, nodes=nodes, global_batch=16)
    found = [each for each in sheets(asked) if isinstance(each, Plan) and each.strategy is Strategy.HSDP]

    assert bool(found) == differs
    assert all(each.group("shard") == (8, 1) and each.group("replica") == (2, 8) for each in found)


@pytest.mark.parametrize(("gpus", "nodes", "differs"), [(8, 1, False), (4, 4, False), (16, 2, True)])
def test_zero_plus_plus_is_searched_where_there_are_machines_of_several_gpus(
    gpus: int, nodes: int, differs: bool
) -> None:
    asked = question(gpus=gpus, nodes=nodes, global_batch=16)
    found = [each for each in sheets(asked) if isinstance(each, Plan) and each.strategy is Strategy.ZERO3_PLUS]

    assert bool(found) == differs
    # Gradients are in bf16, which DeepSpeed cannot quantise.
    assert {each.title for each in found} == ({"ZeRO++ hpZ 8, qwZ"} if differs else set())
    assert all(each.group("secondary") == (8, 1) and each.group("machines") == (2, 8) for each in found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_gpu_shares_with_nobody_but_the_host(variant: tuple[Strategy, Offload]) -> None:
    strategy, offload = variant
    reason = bar(question(gpus=1, global_batch=4), strategy, offload)

    if strategy is Strategy.DDP or offload.optimizer:
        assert reason is None
    else:
        assert reason == "one GPU has nobody to share with"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", ["bert-base-uncased", "t5-small"])
def test_fsdp_is_for_decoders_alone(model: str, variant: tuple[Strategy, Offload]) -> None:
    reason = bar(question(model, gpus=2, global_batch=4), *variant)

    assert (reason is not None) == variant[0].is_fsdp


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_bars_a_decoder_on_several_gpus(variant: tuple[Strategy, Offload]) -> None:
    asked = question(gpus=2, global_batch=4)

    assert bar(asked, *variant) is None
    assert bar(replace(asked, job=replace(asked.job, parameter_format="bf16")), *variant) is None


@pytest.mark.parametrize(
    ("strategy", "offload", "left"),
    [
        ("zero*", None, {"zero1", "zero2", "zero3"}),
        ("zero?", "none", {"zero1", "zero2", "zero3"}),
        ("fsdp, ddp", None, {"fsdp", "ddp"}),
        (None, "optimizer+params", {"zero3"}),
        (None, "none", {"ddp", "zero1", "zero2", "fsdp-grad-op", "fsdp", "zero3"}),
    ],
)
def test_a_search_is_kept_to_what_is_wanted(strategy: str | None, offload: str | None, left: set[str]) -> None:
    asked = kept_to(ASKED["all fit"], strategy, offload)
    found = variants(asked)

    assert {each.value for each, _ in found} == left
    assert offload is None or {each.value for _, each in found} == {offload}
    assert set(found) <= set(variants(ASKED["all fit"]))
    assert {each.name: each.value for each in asked.inputs}.items() >= {
        (name, value) for name, value in (("strategy", strategy), ("offload", offload)) if value
    }


@pytest.mark.parametrize(
    ("strategy", "offload", "said"),
    [
        ("ddp", "optimizer", "--strategy ddp and --offload optimizer contradict each other"),
        ("hsdp", None, "--strategy hsdp and --nodes 1 with 4 GPUs each contradict each other"),
        ("deepspeed", None, "--strategy deepspeed is none of those that are searched: ddp, zero1"),
        (None, "params", "--offload must be one of none, optimizer, optimizer\\+params, got 'params'"),
    ],
)
def test_words_that_leave_no_plan_are_named(strategy: str | None, offload: str | None, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        variants(kept_to(ASKED["all fit"], strategy, offload))


def test_long_sequences_are_cut_over_the_gpus_of_a_machine() -> None:
    asked = question("Llama-3.2-1B", gpus=16, nodes=2, seq_len=LONG_SEQUENCE, global_batch=4)
    found: dict[Strategy, set[int]] = {}
    for plan in sheets(asked):
        if isinstance(plan, Plan):
            assert (np.asarray(plan.global_batch) == 4).all()
            found.setdefault(plan.strategy, set()).add(plan.sequence_ranks)

    # 4 sequences are not for 16 GPUs, nor for 8 pairs of them.
    assert set(found) == {Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3, Strategy.FSDP}
    assert all(ranks == {4, 8} for ranks in found.values())
    without = [each for each in sheets(asked) if isinstance(each, Barred) and each.strategy is Strategy.DDP]
    assert without[0].why == "a global batch of 4 does not divide over 16 GPUs"


def test_a_batch_that_no_cut_of_long_sequences_makes_up_is_refused() -> None:
    with pytest.raises(SpecError, match="global batch of 3 does not divide over 16 GPUs"):
        list(sheets(question("Llama-3.2-1B", gpus=16, nodes=2, seq_len=LONG_SEQUENCE, global_batch=3)))


def test_short_sequences_stay_whole() -> None:
    asked = question(gpus=8, seq_len=LONG_SEQUENCE // 2)

    assert {each.sequence_ranks for each in sheets(asked) if isinstance(each, Plan)} == {1}
