"""Plans: what they refuse, what they are called, and many of them in one."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.errors import SpecError
from advisor.specs.megatron import MegatronSettings
from advisor.specs.plan import (
    Checkpointing,
    FsdpSettings,
    Group,
    GroupName,
    Offload,
    OffloadSettings,
    Plan,
    Strategy,
    ZeroSettings,
    zero_settings,
)

COUNTS = ("gpus", "micro_batch", "accumulation_steps")
counts = st.integers(1, 10**6)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, np.array([1, 0, 2])])
def test_a_count_below_one_is_refused_by_name(name: str, value: int) -> None:
    given_counts = {"gpus": 4, "micro_batch": 1, "accumulation_steps": 1, name: value}

    with pytest.raises(SpecError, match=f"{name} must be at least 1, got"):
        Plan(strategy=Strategy.DDP, **given_counts)


@pytest.mark.parametrize("strategy", [each for each in Strategy if not each.zero_stage])
@pytest.mark.parametrize("offload", [Offload.OPTIMIZER, Offload.OPTIMIZER_AND_PARAMETERS])
def test_only_sharded_optimizers_are_offloaded(strategy: Strategy, offload: Offload) -> None:
    with pytest.raises(SpecError, match=f"{strategy.title} keeps its optimizer on the GPU.*zero1, zero2 or zero3"):
        Plan(strategy=strategy, gpus=4, micro_batch=1, offload=offload)


def test_zero_plus_plus_has_parts_that_other_strategies_have_not() -> None:
    parts = ZeroSettings(hpz_partition=4, quantized_weights=True)
    plan = Plan(strategy=Strategy.ZERO3_PLUS, gpus=8, micro_batch=1, zero=parts)

    assert plan.title == "ZeRO++ hpZ 4, qwZ"
    with pytest.raises(SpecError, match=r"parts of ZeRO\+\+, got them with ZeRO-3; take zero3\+\+"):
        replace(plan, strategy=Strategy.ZERO3)
    with pytest.raises(SpecError, match="6 GPUs do not divide into groups of hpz_partition 4"):
        replace(plan, gpus=6)
    with pytest.raises(SpecError, match="modelled without offload; take zero3"):
        replace(plan, offload=Offload.OPTIMIZER)
    with pytest.raises(SpecError, match="hpz_partition must be at least 1 rank, got 0"):
        replace(parts, hpz_partition=0)


def test_whole_weights_are_not_offloaded() -> None:
    with pytest.raises(SpecError, match=r"ZeRO-2 keeps whole weights.*needs zero3"):
        Plan(strategy=Strategy.ZERO2, gpus=4, micro_batch=1, offload=Offload.OPTIMIZER_AND_PARAMETERS)


@pytest.mark.parametrize("strategy", [Strategy.ZERO1, Strategy.ZERO2])
def test_nvme_is_for_stage_3(strategy: Strategy) -> None:
    with pytest.raises(SpecError, match=f"{strategy.title} offloads to host memory alone; NVMe needs zero3"):
        Plan(strategy=strategy, gpus=4, micro_batch=1, offload=Offload.OPTIMIZER, offload_to="nvme")


@pytest.mark.parametrize("offload", list(Offload))
def test_only_what_is_offloaded_is_swapped(offload: Offload) -> None:
    plan = Plan(strategy=Strategy.ZERO3, gpus=4, micro_batch=1, offload=offload, offload_to="nvme")

    assert plan.swaps is offload.optimizer
    assert plan.title.endswith("to NVMe") is plan.swaps


def test_adam_needs_four_swap_buffers() -> None:
    with pytest.raises(SpecError, match=r"Adam swaps 4 tensors at once.*got 3 buffers"):
        Plan(
            strategy=Strategy.ZERO3,
            gpus=4,
            micro_batch=1,
            offload=Offload.OPTIMIZER,
            offload_to="nvme",
            offload_settings=OffloadSettings(optimizer_buffers=3),
        )


@pytest.mark.parametrize("name", ["parameter_buffers", "parameter_buffer", "block_bytes", "threads"])
def test_a_buffer_of_nothing_is_refused_by_name(name: str) -> None:
    with pytest.raises(SpecError, match=f"{name} must be at least 1, got 0"):
        OffloadSettings(**{name: 0})


@given(counts, counts, counts)
def test_the_global_batch_is_what_all_gpus_take_in_a_step(gpus: int, micro_batch: int, steps: int) -> None:
    plan = Plan(strategy=Strategy.FSDP, gpus=gpus, micro_batch=micro_batch, accumulation_steps=steps)

    assert plan.global_batch == gpus * micro_batch * steps


@given(st.lists(st.tuples(counts, counts), min_size=1, max_size=5), counts)
def test_a_plan_of_arrays_stands_for_each_of_its_plans(pairs: list[tuple[int, int]], gpus: int) -> None:
    batches, steps = (np.array(column) for column in zip(*pairs, strict=True))
    many = Plan(strategy=Strategy.FSDP, gpus=gpus, micro_batch=batches, accumulation_steps=steps)

    for index, (micro_batch, accumulation_steps) in enumerate(pairs):
        alone = Plan(strategy=Strategy.FSDP, gpus=gpus, micro_batch=micro_batch, accumulation_steps=accumulation_steps)
        assert many.at(index) == alone
        assert np.asarray(many.global_batch)[index] == alone.global_batch


def test_a_chosen_plan_keeps_its_other_choices_and_counts_in_plain_integers() -> None:
    many = Plan(
        strategy=Strategy.ZERO3,
        gpus=np.array([2, 4]),
        micro_batch=np.array([8, 4]),
        checkpointing=Checkpointing.FULL,
        offload=Offload.OPTIMIZER,
        zero=zero_settings(Strategy.ZERO3, 1000),
    )

    chosen = many.at(1)

    assert [type(getattr(chosen, name)) for name in COUNTS] == [int, int, int]
    assert (chosen.gpus, chosen.micro_batch, chosen.accumulation_steps) == (4, 4, 1)
    assert (chosen.checkpointing, chosen.offload, chosen.zero) == (many.checkpointing, many.offload, many.zero)


@pytest.mark.parametrize(
    ("strategy", "gpus", "offload", "title"),
    [
        (Strategy.DDP, 1, Offload.NONE, "one GPU"),
        (Strategy.DDP, np.array([1, 1]), Offload.NONE, "one GPU"),
        (Strategy.DDP, 2, Offload.NONE, "DDP"),
        (Strategy.DDP, np.array([1, 2]), Offload.NONE, "DDP"),
        (Strategy.FSDP, 8, Offload.NONE, "FSDP full shard"),
        (Strategy.FSDP_GRAD_OP, 8, Offload.NONE, "FSDP grad-op"),
        (Strategy.ZERO1, 8, Offload.NONE, "ZeRO-1"),
        (Strategy.ZERO2, 1, Offload.OPTIMIZER, "ZeRO-2 + optimizer offload"),
        (Strategy.ZERO3, 8, Offload.OPTIMIZER_AND_PARAMETERS, "ZeRO-3 + optimizer and parameter offload"),
    ],
)
def test_a_plan_is_called_as_people_call_it(strategy: Strategy, gpus: int, offload: Offload, title: str) -> None:
    assert Plan(strategy=strategy, gpus=gpus, micro_batch=1, offload=offload).title == title


def test_no_two_strategies_share_a_title() -> None:
    assert len({each.title for each in Strategy}) == len(Strategy)


def test_deepspeed_runs_the_zero_stages_and_no_others() -> None:
    stages = {each: each.zero_stage for each in Strategy if each.zero_stage}

    assert stages == {Strategy.ZERO1: 1, Strategy.ZERO2: 2, Strategy.ZERO3: 3, Strategy.ZERO3_PLUS: 3}
    assert [each for each in Strategy if each.is_fsdp] == [Strategy.FSDP, Strategy.FSDP_GRAD_OP, Strategy.HSDP]


def test_hsdp_cuts_states_over_groups_that_divide_the_gpus() -> None:
    settings = FsdpSettings(shard_ranks=8)
    plan = Plan(strategy=Strategy.HSDP, gpus=32, micro_batch=1, fsdp=settings)

    assert (plan.group("shard"), plan.group("replica")) == (Group(8, 1), Group(4, 8))
    with pytest.raises(SpecError, match="12 GPUs do not divide into groups of 8"):
        Plan(strategy=Strategy.HSDP, gpus=12, micro_batch=1, fsdp=settings)


@pytest.mark.parametrize(
    ("offload", "optimizer", "parameters"),
    [(Offload.NONE, False, False), (Offload.OPTIMIZER, True, False), (Offload.OPTIMIZER_AND_PARAMETERS, True, True)],
)
def test_parameters_never_leave_without_the_optimizer(offload: Offload, optimizer: bool, parameters: bool) -> None:
    assert (offload.optimizer, offload.parameters) == (optimizer, parameters)


@pytest.mark.parametrize("name", ["reduce_bucket", "max_live_parameters", "sub_group"])
def test_an_empty_bucket_is_refused_by_name(name: str) -> None:
    with pytest.raises(SpecError, match=f"{name} must be at least 1 element, got 0"):
        ZeroSettings(**{name: 0})


def test_fsdp_has_two_versions() -> None:
    with pytest.raises(SpecError, match="FSDP has versions 1 and 2, got 3"):
        FsdpSettings(version=3)


def test_a_title_says_which_fsdp_is_not_the_usual_one() -> None:
    first, second = (
        Plan(strategy=Strategy.FSDP, gpus=2, micro_batch=1, fsdp=FsdpSettings(version=version)) for version in (1, 2)
    )

    assert (first.title, second.title) == ("FSDP1 full shard", "FSDP full shard")


# deepspeed 0.19.8, runtime/zero/config.py: overlap_comm is on from stage 3 where nobody says.
@pytest.mark.parametrize("strategy", list(Strategy))
def test_zero_settings_are_deepspeed_s_own(strategy: Strategy) -> None:
    usual, smaller = zero_settings(strategy), zero_settings(strategy, 10**6)

    assert usual.reduce_bucket == 500_000_000
    assert smaller.reduce_bucket == 10**6
    assert usual.overlap_communication == smaller.overlap_communication == (strategy.zero_stage == 3)


def megatron(**counts: Any) -> Plan:
    return Plan(strategy=Strategy.MEGATRON, **({"gpus": 16, "micro_batch": 2, "accumulation_steps": 4} | counts))


# megatron-core 0.16.1, parallel_state.py initialize_model_parallel: of 16 ranks with tensor 2 and pipeline 2, [0, 1] is
# a tensor group, [0, 2, 4, 6] a data group, [0, 8] a pipeline group; context ranks stand between tensor and data.
@pytest.mark.parametrize(
    ("counts", "name", "group"),
    [
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, "tensor", (2, 1)),
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, "data", (4, 2)),
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, "pipeline", (2, 8)),
        ({"tensor_parallel": 2, "context_parallel": 4}, "context", (4, 2)),
        ({"tensor_parallel": 2, "context_parallel": 4}, "data", (8, 2)),
        ({}, "data", (16, 1)),
        ({"expert_parallel": 8, "expert_tensor_parallel": 2}, "expert-tensor", (2, 1)),
        ({"expert_parallel": 4, "expert_tensor_parallel": 2}, "expert", (4, 2)),
        ({"pipeline_parallel": 2, "tensor_parallel": 8, "expert_parallel": 4}, "expert-data", (2, 4)),
    ],
)
def test_ranks_are_grouped_as_megatron_numbers_them(
    counts: dict[str, int], name: GroupName, group: tuple[int, int]
) -> None:
    assert megatron(**counts).group(name) == group


@given(*3 * [st.sampled_from([1, 2, 4])], st.integers(1, 5))
def test_the_groups_of_a_rank_make_up_all_gpus(tensor: int, pipeline: int, context: int, copies: int) -> None:
    gpus = tensor * pipeline * context * copies
    plan = megatron(gpus=gpus, tensor_parallel=tensor, pipeline_parallel=pipeline, context_parallel=context)

    assert plan.data_parallel == copies
    assert plan.group("tensor").size * plan.group("data").size * plan.group("pipeline").size == gpus
    assert plan.global_batch == copies * 8


@given(*4 * [st.sampled_from([1, 2, 4])])
def test_the_groups_of_an_expert_make_up_the_ranks_of_a_stage(
    slices: int, experts: int, pipeline: int, copies: int
) -> None:
    gpus = slices * experts * pipeline * copies
    plan = megatron(gpus=gpus, pipeline_parallel=pipeline, expert_parallel=experts, expert_tensor_parallel=slices)

    groups = [plan.group(name) for name in ("expert-tensor", "expert", "expert-data")]
    assert [int(group.size) for group in groups] == [slices, experts, copies]
    assert prod(int(group.size) for group in groups) == gpus // pipeline
    assert [int(group.stride) for group in groups] == [1, slices, slices * experts]


@pytest.mark.parametrize(
    ("counts", "title"),
    [
        ({}, "Megatron"),
        ({"tensor_parallel": 8, "sequence_parallel": True}, "Megatron tp 8 + sp"),
        ({"tensor_parallel": 2, "pipeline_parallel": 4, "virtual_stages": 3}, "Megatron tp 2, pp 4 x 3"),
        ({"context_parallel": 2}, "Megatron cp 2"),
        ({"tensor_parallel": 2, "expert_parallel": 4}, "Megatron tp 2, ep 4"),
        ({"tensor_parallel": 2, "expert_parallel": 4, "expert_tensor_parallel": 2}, "Megatron tp 2, ep 4, etp 2"),
    ],
)
def test_a_title_says_what_is_cut(counts: dict[str, Any], title: str) -> None:
    assert megatron(**counts).title == title


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"gpus": 12, "tensor_parallel": 8}, "tensor_parallel 8 x .* take 8 GPUs or a multiple, got 12"),
        ({"strategy": Strategy.DDP, "tensor_parallel": 2}, "DDP is data parallel alone"),
        ({"strategy": Strategy.FSDP, "expert_parallel": 2}, "got expert_parallel 2; they need megatron"),
        ({"expert_parallel": 3}, "expert_parallel 3 x expert_tensor_parallel 1 x .* take 3 GPUs or a multiple, got 16"),
        ({"virtual_stages": 2}, "2 virtual stages need a pipeline"),
        (
            {"virtual_stages": 2, "pipeline_parallel": 4, "accumulation_steps": 6},
            "groups of its 4 stages, and 6 is no multiple",
        ),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1, got 0"),
    ],
)
def test_groups_that_do_not_divide_are_refused_with_the_arithmetic(counts: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        replace(megatron(), **counts)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"vocabulary_multiple": 0}, "vocabulary_multiple must be at least 1, got 0"),
        ({"distributed_optimizer": False}, "set distributed_optimizer"),
        ({"last_stage_layers": -1}, "negative number of layers, got 0 for the first and -1"),
        ({"optimizer_instances": 0}, "optimizer_instances must be at least 1, got 0"),
        (
            {"distributed_optimizer": False, "overlaps_weights": False, "optimizer_instances": 2},
            "optimizer_instances are of the distributed optimizer",
        ),
        ({"deferred_micro_batches": 1, "fuses_gradient_sums": False}, "got 1, fuses_gradient_sums False"),
    ],
)
def test_megatron_settings_that_contradict_themselves_are_refused(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        MegatronSettings(**choices)
