"""What ZeRO keeps in host memory and on NVMe, held against rules and against DeepSpeed's own classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.catalog.huggingface import model_from_config
from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.plan import Offload, OffloadSettings, Plan, Strategy, ZeroSettings
from advisor.step.build import StepProgram, build
from advisor.step.nvme import LEAST_BYTES, aligned, optimizer_files, swap_buffers, weight_files
from advisor.step.offload import pinned
from advisor.step.program import Copy, blocks, fold, held_after, phase_peaks, without
from advisor.step.schemes import scheme_of
from advisor.step.zero_three import shares, sub_groups

MODEL = model_from_config(
    {
        "model_type": "llama",
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small",
    "a test",
)
JOB = Job(sequence_length=32, global_batch=8)
LARGEST = MODEL.largest_parameter.numel
NORM = 4
USUAL = OffloadSettings()

tensors = st.lists(st.integers(1, 3_000_000), min_size=1, max_size=8).map(tuple)
ranks_of_a_plan = st.sampled_from([1, 2, 3, 8])


def plan_of(strategy: Strategy, gpus: int = 4, **choices: Any) -> Plan:
    usual: dict[str, Any] = {"offload": Offload.OPTIMIZER, "zero": ZeroSettings(reduce_bucket=100_000)}
    return Plan(strategy=strategy, gpus=gpus, micro_batch=1, **(usual | choices))


def built(strategy: Strategy, job: Job = JOB, rank: int = 0, **choices: Any) -> StepProgram:
    return build(MODEL, job, plan_of(strategy, **choices), rank)


def host_bytes(program: StepProgram) -> int:
    """Without what pinning rounds up."""
    return int(fold(without(program.host, "rounding")).net_bytes)


def labelled(program: StepProgram) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in held_after(program.host):
        found[line.label] = found.get(line.label, 0) + line.size_bytes
    return found


def moved(program: StepProgram, kind: str) -> float:
    """Bytes of all copies of *kind* in one step."""
    return sum(
        float(runs) * float(each.moved_bytes)
        for _, block, runs in blocks(program.step)
        for each in block.transfers
        if isinstance(each, Copy) and each.kind == kind
    )


# Master weights, gradients and moments in fp32 (16 bytes), staging in bf16 (2), and a buffer for the largest tensor.
@pytest.mark.parametrize("strategy", [Strategy.ZERO1, Strategy.ZERO2])
@pytest.mark.parametrize("gpus", [1, 2, 7])
def test_the_flat_stages_hold_18_bytes_of_the_share_on_the_host(strategy: Strategy, gpus: int) -> None:
    share = int(scheme_of(MODEL, JOB, plan_of(strategy, gpus)).shard)  # type: ignore[attr-defined]

    assert host_bytes(built(strategy, gpus=gpus)) == 18 * share + 2 * LARGEST + NORM


@pytest.mark.parametrize("gpus", [1, 2, 7])
def test_stage_3_holds_18_bytes_of_the_share_on_the_host_and_20_with_the_weights(gpus: int) -> None:
    share = sum(shares([each.numel for each in MODEL.parameters()], gpus))
    optimizer, both = (
        host_bytes(built(Strategy.ZERO3, gpus=gpus, offload=offload))
        for offload in (Offload.OPTIMIZER, Offload.OPTIMIZER_AND_PARAMETERS)
    )

    assert (optimizer, both) == (18 * share + NORM, 20 * share + NORM)


@given(st.integers(1, 2**45))
def test_a_pinned_tensor_takes_a_power_of_two_and_less_than_twice_its_size(size: int) -> None:
    taken = int(pinned(size))

    assert size <= taken < 2 * size
    assert taken & (taken - 1) == 0


@pytest.mark.parametrize("strategy", [Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3])
def test_only_pinned_memory_is_rounded(strategy: Strategy) -> None:
    loose = built(strategy, offload_settings=OffloadSettings(pins=False))

    assert fold(loose.host).net_bytes == host_bytes(loose) == host_bytes(built(strategy))


def test_weights_on_the_host_are_pinned_whatever_the_setting_says() -> None:
    held = labelled(
        built(Strategy.ZERO3, offload=Offload.OPTIMIZER_AND_PARAMETERS, offload_settings=OffloadSettings(pins=False))
    )
    weights = held["weights, rank's share"]

    assert held["pinned memory rounded up to powers of two"] == int(pinned(weights)) - weights
    assert "freed pinned blocks that torch keeps" not in held


def test_stage_3_does_not_pin_its_master_weights() -> None:
    share = sum(shares([each.numel for each in MODEL.parameters()], 4))
    sizes = (4 * share, 2 * share)  # the optimizer's gradients, and those that accumulate

    found = labelled(built(Strategy.ZERO3))["pinned memory rounded up to powers of two"]
    assert found == sum(int(pinned(size)) - size for size in sizes)


@pytest.mark.parametrize("rank", range(4))
def test_stage_2_sums_whole_tensors_on_the_host_and_stage_1_none(rank: int) -> None:
    scheme: Any = scheme_of(MODEL, JOB, plan_of(Strategy.ZERO2), rank)
    starts, share = np.array(scheme.starts), int(scheme.shard)
    ends = starts + np.array(scheme.sizes)
    touched = np.array(scheme.sizes)[(ends > rank * share) & (starts < (rank + 1) * share)]
    more = {
        strategy: host_bytes(built(strategy, rank=rank, accumulation_steps=2)) - host_bytes(built(strategy, rank=rank))
        for strategy in (Strategy.ZERO1, Strategy.ZERO2)
    }

    assert more == {Strategy.ZERO1: 0, Strategy.ZERO2: 2 * touched.sum()}


def test_in_pure_bf16_stage_2_sums_in_the_optimizer_s_own_gradients() -> None:
    job = Job(sequence_length=32, parameter_format="bf16")

    once, twice = (host_bytes(built(Strategy.ZERO2, job, accumulation_steps=steps)) for steps in (1, 2))
    assert once == twice


def test_stage_1_keeps_whole_gradients_on_the_gpu_where_stage_2_keeps_none() -> None:
    one, two = (phase_peaks(built(each, accumulation_steps=2).device) for each in (Strategy.ZERO1, Strategy.ZERO2))

    # When the second forward ends, stage 1 also holds the bucket that the first gradient took.
    assert one["loss"][1] - two["loss"][1] == 2 * MODEL.parameter_count + 2 * 100_000


@pytest.mark.parametrize("strategy", [Strategy.ZERO1, Strategy.ZERO2])
def test_the_fullest_rank_is_fuller_than_any_other(strategy: Strategy) -> None:
    plan = plan_of(strategy, 8)
    peaks = [fold(build(MODEL, JOB, plan, rank).device).peak_bytes for rank in range(8)]

    assert fold(build(MODEL, JOB, plan).device).peak_bytes == max(peaks)


@pytest.mark.parametrize(("strategy", "steps"), [(Strategy.ZERO1, 1), (Strategy.ZERO1, 3), (Strategy.ZERO2, 1)])
def test_a_gradient_leaves_for_the_host_once_where_it_is_not_summed_there(strategy: Strategy, steps: int) -> None:
    share = int(scheme_of(MODEL, JOB, plan_of(strategy)).shard)  # type: ignore[attr-defined]
    program = built(strategy, accumulation_steps=steps)

    assert (moved(program, "device-to-host"), moved(program, "host-to-device")) == (4 * share, 2 * share)


def test_weights_that_live_on_the_host_are_not_sent_back_by_the_optimizer() -> None:
    share = sum(shares([each.numel for each in MODEL.parameters()], 4))
    optimizer, both = (
        {
            each.what: float(each.moved_bytes)
            for _, block, _ in blocks(built(Strategy.ZERO3, offload=offload).step)
            for each in block.transfers
            if isinstance(each, Copy)
        }
        for offload in (Offload.OPTIMIZER, Offload.OPTIMIZER_AND_PARAMETERS)
    )

    assert (optimizer["updated weights"], both["updated weights"]) == (2 * share, 0)


@settings(deadline=None)  # the first example imports DeepSpeed
@given(tensors, st.integers(1, 6_000_000))
def test_sub_groups_are_deepspeed_s(parts: tuple[int, ...], size: int) -> None:
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3").DeepSpeedZeroOptimizer_Stage3
    held = [SimpleNamespace(number=number, partition_numel=lambda part=part: part) for number, part in enumerate(parts)]

    theirs = stage3._create_fp16_sub_groups(SimpleNamespace(sub_group_size=size), held)
    assert sub_groups(parts, size) == tuple(tuple(each.number for each in group) for group in theirs)


@settings(deadline=None)
@given(st.integers(1, 2_000_000), st.sampled_from([2, 4]), st.sampled_from([1, 2, 4]))
def test_gradients_are_cut_for_the_nvme_as_deepspeed_cuts_them(part: int, element_bytes: int, threads: int) -> None:
    torch = pytest.importorskip("torch")
    swapper_class = pytest.importorskip("deepspeed.runtime.swap_tensor.optimizer_utils").OptimizerSwapper
    swapper = object.__new__(swapper_class)
    swapper.min_aio_bytes, swapper.swap_element_size = LEAST_BYTES, element_bytes
    swapper.numel_alignment = 1024 * threads // element_bytes
    cut, _ = swapper._adjust_for_misaligned_lengths([torch.empty(part, device="meta")], [0])
    theirs = sum(each.numel() for each in cut if swapper.is_swappable_tensor(numel=each.numel()))

    # Beside it a tensor large enough that the two are swapped whatever this one's size is.
    beside, setting = LEAST_BYTES, OffloadSettings(threads=threads)
    ours = optimizer_files((part, beside), 1, 10**9, element_bytes, setting).gradients - beside * element_bytes
    assert ours == theirs * element_bytes
    assert aligned(part, swapper.numel_alignment) == swapper._io_aligned_numel(part)


@given(tensors, ranks_of_a_plan, st.integers(1, 4_000_000))
def test_an_optimizer_is_on_the_nvme_or_in_memory_and_nowhere_twice(
    sizes: tuple[int, ...], ranks: int, sub_group: int
) -> None:
    found = optimizer_files(sizes, ranks, sub_group, 4, USUAL)
    parts = shares(sizes, ranks)
    groups = len(sub_groups(parts, sub_group))

    assert 0 <= found.states + 12 * found.kept - 12 * sum(parts) < 3 * 1024 * groups
    assert found.gradients <= found.states / 3


@given(tensors, st.integers(1, 4_000_000), st.integers(0, 4_000_000))
def test_weights_are_read_from_the_nvme_only_where_they_were_written(
    sizes: tuple[int, ...], sub_group: int, room: int
) -> None:
    found = weight_files(sizes, 2, sub_group, 2, OffloadSettings(max_in_host=room))

    assert found.read <= found.files
    assert bool(found.written_through) == (sum(shares(sizes, 2)) > room and bool(found.read + found.alone))


def test_weights_that_all_may_stay_in_host_memory_are_never_read() -> None:
    sizes = tuple(each.numel * 64 for each in MODEL.parameters())
    kept, sent = (weight_files(sizes, 2, 10**9, 2, OffloadSettings(max_in_host=room)) for room in (10**9, 0))

    assert (kept.read, kept.written_through, kept.alone) == (0, 0, 0)
    assert kept.files == sent.files == sent.read > 0


def test_swap_buffers_hold_the_largest_share_and_every_tensor_of_the_window() -> None:
    tensors_of_the_model = len(list(MODEL.parameters()))
    everything_in_memory = swap_buffers(MODEL, 2, USUAL, ZeroSettings())
    on_nvme = OffloadSettings(max_in_host=0)
    wide = swap_buffers(MODEL, 2, on_nvme, ZeroSettings())
    narrow = swap_buffers(MODEL, 2, on_nvme, ZeroSettings(max_live_parameters=1, max_reuse_distance=0))

    assert everything_in_memory == (USUAL.parameter_buffer, USUAL.parameter_buffers)
    assert wide == (LARGEST // 2, tensors_of_the_model)
    assert narrow[0] == wide[0]
    assert USUAL.parameter_buffers <= narrow[1] < wide[1]


def test_a_share_that_no_swap_buffer_holds_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(SpecError, match=r"4,000,000 elements / 2 GPUs = 2,000,000.*holds 1,000,000.*buffer_size"):
        weight_files((4_000_000,), 2, 10**9, 2, OffloadSettings(parameter_buffer=1_000_000))


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([100_000, 10**9]))
def test_more_ranks_never_need_more_of_the_nvme(gpus: int, sub_group: int) -> None:
    zero = ZeroSettings(sub_group=sub_group)
    few, many = (
        fold(built(Strategy.ZERO3, gpus=count, offload_to="nvme", zero=zero).nvme).net_bytes
        for count in (gpus, 2 * gpus)
    )

    assert many <= few


def test_what_is_on_the_nvme_is_read_and_written_once_a_step() -> None:
    program = built(Strategy.ZERO3, gpus=1, offload_to="nvme", accumulation_steps=2)
    on_nvme = int(fold(program.nvme).net_bytes)

    assert on_nvme > 0
    assert moved(program, "nvme-to-host") == moved(program, "host-to-nvme") == on_nvme


def test_gradients_too_small_for_the_nvme_stay_on_the_gpu_until_the_step() -> None:
    def before_the_step(place: str) -> int:
        program = built(Strategy.ZERO3, gpus=2, offload_to=place, zero=ZeroSettings())
        return int(phase_peaks(program.device_without_scratch)["backward"][1])

    share = sum(shares([each.numel for each in MODEL.parameters()], 2))
    assert before_the_step("nvme") - before_the_step("cpu") == 4 * share


def test_plans_side_by_side_have_the_files_of_each_alone() -> None:
    many = build(MODEL, JOB, plan_of(Strategy.ZERO3, np.array([1, 2, 8]), offload_to="nvme"))  # type: ignore[arg-type]
    alone = [fold(built(Strategy.ZERO3, gpus=gpus, offload_to="nvme").nvme).net_bytes for gpus in (1, 2, 8)]

    assert list(np.asarray(fold(many.nvme).net_bytes)) == alone
