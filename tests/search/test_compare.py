"""A comparison of GPU counts: each is what a search of it says, and what is lost adds up."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from advisor.cost.results import Estimate
from advisor.errors import SpecError
from advisor.search.compare import Comparison, compare, losses
from advisor.search.recommend import recommend
from advisor.specs.plan import Checkpointing, Strategy

SMALL: dict[str, Any] = {"model": "gpt2", "gpu": "A100", "global_batch": 32, "seq_len": 256}


@cache
def found(scaling: Any = "strong", gpus_per_node: int = 4, network: str | None = None) -> Comparison:
    return compare(**SMALL, gpus=(8, 1, 2), gpus_per_node=gpus_per_node, scaling=scaling, network=network)


def plans(comparison: Comparison) -> list[Estimate]:
    return [plan for scale in comparison.scales for plan in scale.plans]


@pytest.mark.parametrize(("place", "gpus", "nodes"), [(0, 1, 1), (1, 2, 1), (2, 8, 2)])
def test_a_count_has_the_plans_that_a_search_of_it_offers(place: int, gpus: int, nodes: int) -> None:
    scale = found().scales[place]

    assert (scale.cluster.gpus, scale.cluster.nodes) == (gpus, nodes)
    assert scale.plans == recommend(**SMALL, gpus=gpus, nodes=nodes, network=None).plans


@pytest.mark.parametrize("scaling", ["strong", "weak"])
def test_what_is_lost_sums_to_the_efficiency_that_is_lacking(scaling: str) -> None:
    comparison = found(scaling)

    for plan in plans(comparison):
        lost = comparison.losses(plan)
        assert sum(loss.share for loss in lost) == pytest.approx(1 - comparison.efficiency(plan), abs=1e-9)
        assert all(one.share >= other.share for one, other in pairwise(lost))


@pytest.mark.parametrize("scaling", ["strong", "weak"])
def test_the_fewest_gpus_are_what_the_others_are_measured_by(scaling: str) -> None:
    comparison = found(scaling)
    assert comparison.base

    assert comparison.fewest_gpus == comparison.base.plan.gpus == 1
    assert comparison.speed_up(comparison.base) == comparison.efficiency(comparison.base) == 1
    assert {loss.share for loss in comparison.losses(comparison.base)} == {0.0}
    for plan in plans(comparison):
        assert comparison.speed_up(plan) == pytest.approx(comparison.efficiency(plan) * plan.plan.gpus)


def test_the_global_batch_stays_or_grows_with_the_count() -> None:
    assert [scale.job.global_batch for scale in found("strong").scales] == [32, 32, 32]
    assert [scale.job.global_batch for scale in found("weak").scales] == [32, 64, 256]
    assert all(plan.plan.global_batch == 32 for plan in plans(found("strong")))


def test_what_makes_computing_differ_is_named() -> None:
    base = found().base
    assert base
    base = replace(base, plan=replace(base.plan, micro_batch=32))
    others = {
        "computing": replace(base, plan=replace(base.plan, gpus=2)),
        "computing activations again": replace(base, plan=replace(base.plan, checkpointing=Checkpointing.FULL)),
        "computing 64 sequences at a time in place of 32 by FSDP in place of DDP": replace(
            base, plan=replace(base.plan, strategy=Strategy.FSDP, micro_batch=64)
        ),
    }

    for title, other in others.items():
        assert title in {loss.what for loss in losses(base, other)}


def test_a_slower_network_lowers_the_efficiency_and_is_what_it_is_lost_to() -> None:
    fast, slow = found(gpus_per_node=4), found(gpus_per_node=4, network="ethernet-10g")
    (fast_best, *_), (slow_best, *_) = fast.scales[-1].plans, slow.scales[-1].plans

    assert slow.efficiency(slow_best) < fast.efficiency(fast_best)
    assert slow.losses(slow_best)[0].what.endswith(f"over {slow.scales[-1].cluster.network.name})")


def test_a_count_over_which_the_batch_does_not_divide_is_an_answer() -> None:
    comparison = compare(**{**SMALL, "global_batch": 2}, gpus=(1, 4))

    assert comparison.scales[0].plans
    assert comparison.scales[1].plans == ()
    assert "a global batch of 2 does not divide over 4 GPUs" in comparison.scales[1].why_none


def test_where_nothing_fits_the_nearest_miss_and_the_way_out_are_told() -> None:
    comparison = compare("Qwen2.5-7B", gpu="A10", gpus=(1,), global_batch=1, seq_len=512)

    assert (comparison.base, comparison.fastest) == (None, None)
    assert "GiB short" in comparison.scales[0].why_none
    assert comparison.fewest_gpus == recommend("Qwen2.5-7B", gpu="A10", gpus=1, global_batch=1, seq_len=512).fewest_gpus
    assert comparison.way_out.startswith(f"the fewest that would do: {comparison.fewest_gpus} GPUs with --global-batch")


def test_beyond_a_limit_more_memory_is_no_way_out() -> None:
    comparison = compare(**SMALL, gpus=(1,), tokens=10**9, max_hours=0.01)

    assert (comparison.base, comparison.fewest_gpus, comparison.way_out) == (None, None, "")
    assert "h beyond --max-hours 0.01" in comparison.scales[0].why_none


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"gpus": (0, 1)}, "counts of at least one GPU, got 0, 1"),
        ({"gpus": ()}, "counts of at least one GPU, got none"),
        ({"gpus": (1,), "gpus_per_node": 0}, "--gpus-per-node must be at least 1, got 0"),
        ({"gpus": (1, 12)}, "12 GPUs are no whole machines of 8; give a multiple such as 16"),
        ({"gpus": (3, 6), "scaling": "weak"}, "a global batch of 32 does not divide over 3 GPUs"),
        ({"gpus": (1,), "scaling": "none"}, "--scaling must be strong or weak"),
    ],
)
def test_counts_that_cannot_be_meant_are_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        compare(**SMALL, **words)


def test_inputs_are_those_of_all_counts() -> None:
    named = {each.name: (each.value, each.origin) for each in found("weak").inputs}

    assert named["global_batch"] == (32, "given")
    assert named["host_memory"] == ("128 GiB for each GPU", "assumed")
    assert not {"gpus", "nodes"} & named.keys()
