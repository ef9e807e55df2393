"""Plans whose layers and sequences are cut: what divides, who talks to whom, and what no framework runs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.errors import SpecError
from advisor.specs.plan import FsdpSettings, Group, Offload, Plan, Strategy, ZeroSettings


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.integers(1, 5))
def test_ranks_that_share_sequences_make_up_one_copy(ranks: int, copies: int, micro_batch: int) -> None:
    by_heads = Plan(strategy=Strategy.ZERO3, gpus=ranks * copies, micro_batch=micro_batch, ulysses_parallel=ranks)
    in_rings = Plan(strategy=Strategy.FSDP, gpus=ranks * copies, micro_batch=micro_batch, context_parallel=ranks)

    for plan in (by_heads, in_rings):
        assert (plan.data_parallel, plan.global_batch) == (copies, copies * micro_batch)
        assert plan.group("data") == Group(ranks * copies)
    # States are cut over all of them all the same, and neighbours share sequences.
    assert in_rings.group("shard") == Group(ranks * copies)
    assert by_heads.group("sequence") == in_rings.group("context") == Group(ranks)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"strategy": Strategy.DDP, "ulysses_parallel": 2}, "DDP is data parallel alone, got ulysses_parallel 2"),
        ({"strategy": Strategy.FSDP, "ulysses_parallel": 2}, "it needs zero1, zero2 or zero3"),
        ({"strategy": Strategy.ZERO3, "context_parallel": 2}, "it needs fsdp or megatron"),
        ({"strategy": Strategy.FSDP, "pipeline_parallel": 2}, "they need megatron"),
        ({"strategy": Strategy.FSDP, "tensor_parallel": 2}, "imports what transformers 5.23 no longer has"),
        ({"strategy": Strategy.ZERO3, "ulysses_parallel": 3}, "ulysses_parallel 3 take 3 GPUs or a multiple, got 8"),
        ({"strategy": Strategy.ZERO0, "ulysses_parallel": 2}, "not modelled like that"),
        ({"strategy": Strategy.ZERO2, "ulysses_parallel": 2, "offload": Offload.OPTIMIZER}, "without offload"),
        (
            {"strategy": Strategy.ZERO2, "ulysses_parallel": 2, "zero": ZeroSettings(gradient_format="fp32")},
            "not modelled like that",
        ),
        ({"strategy": Strategy.FSDP, "context_parallel": 2, "fsdp": FsdpSettings(version=1)}, "needs FSDP version 2"),
        (
            {"strategy": Strategy.HSDP, "context_parallel": 2, "fsdp": FsdpSettings(shard_ranks=4)},
            "HSDP is modelled without",
        ),
    ],
)
def test_cuts_that_nobody_runs_are_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Plan(gpus=8, micro_batch=1, **words)


def test_titles_say_what_is_cut() -> None:
    assert Plan(strategy=Strategy.ZERO3, gpus=8, micro_batch=1, ulysses_parallel=4).title == "ZeRO-3 Ulysses 4"
    assert Plan(strategy=Strategy.FSDP, gpus=8, micro_batch=1, context_parallel=2).title == "FSDP full shard cp 2"
