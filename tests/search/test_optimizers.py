"""A search answers for every optimizer, and says which strategies it does not go with."""

from __future__ import annotations

from typing import Any

import pytest

from advisor.search.recommend import recommend
from search.questions import question


@pytest.mark.parametrize("name", ["adamw-8bit-paged", "adafactor", "sgd-momentum", "lion", "muon", "galore"])
def test_every_optimizer_gets_a_plan_or_a_reason_for_each_strategy(name: Any) -> None:
    found = recommend(model="gpt2", gpus=2, gpu="A100-80GB", global_batch=4, seq_len=128, optimizer=name)
    considered = {(each.plan.strategy, each.plan.offload) for each in (*found.plans, *found.rejected)}

    assert len(considered) == 9
    assert found.plans
    assert all(name in each.why for each in found.rejected)


def test_optimizers_that_shards_of_dtensor_are_not_for_are_searched_with_fsdp_of_version_1() -> None:
    found = recommend(model="gpt2", gpus=2, gpu="A100-80GB", global_batch=4, seq_len=128, optimizer="adamw-8bit")

    assert {each.plan.fsdp.version for each in found.plans if each.plan.strategy.is_fsdp} == {1}


def test_paged_moments_are_said_to_be_priced_as_if_they_went_to_the_host() -> None:
    paged, held = question(optimizer="adamw-8bit-paged"), question(optimizer="adamw-8bit")

    assert any("stays there" in warning for warning in paged.warnings)
    assert not held.warnings


def test_the_rank_of_projections_is_an_input_where_there_are_any() -> None:
    projected, plain = question(optimizer="galore", galore_rank=64), question()

    assert ("galore_rank", 64, "given") in [(each.name, each.value, each.origin) for each in projected.inputs]
    assert "galore_rank" not in [each.name for each in plain.inputs]
