"""One plan priced: the verdict with its arithmetic, and what the words mean."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.cost.estimate import estimate, explained, judge, plan_of, price, shortages
from advisor.cost.results import Memory
from advisor.errors import SpecError, UnknownNameError
from advisor.specs.plan import Checkpointing, Offload, Strategy

GIB = 2**30
CAPACITY = 80 * GIB
HOST_CAPACITY = 512 * GIB
FOUR_A100 = {"gpus": 4, "gpu": "A100-80GB"}


NVME_CAPACITY = 1000 * GIB


def held(used_bytes: int, host_bytes: int = 0, nvme_bytes: int = 0, releases: int | None = None) -> Memory:
    """Memory of which only what decides is told."""
    return Memory(
        capacity_bytes=CAPACITY,
        states_bytes=0,
        peak_allocated_bytes=0,
        peak_reserved_bytes=0,
        device_used_bytes=used_bytes,
        low_bytes=0,
        high_bytes=0,
        peak_phase="step",
        peak_label="",
        rank=0,
        fullest=True,
        allocator="expandable segments",
        cache_releases=releases,
        ledger=(),
        timeline=(),
        host_bytes=host_bytes,
        host_capacity_bytes=HOST_CAPACITY,
        host_ledger=(),
        nvme_bytes=nvme_bytes,
        nvme_capacity_bytes=NVME_CAPACITY,
    )


LLAMA: dict[str, Any] = {"model": "Llama-3.1-8B", "gpu": "H100", "precision": "fp16", "global_batch": 16}


def test_on_a_slow_network_zero_plus_plus_is_faster_than_zero_3() -> None:
    two_machines: dict[str, Any] = {"gpus": 16, "nodes": 2, "network": "ethernet-100g"} | LLAMA
    plain, plus = (estimate(strategy=strategy, **two_machines) for strategy in ("zero3", "zero3++"))

    assert plus.plan.title == "ZeRO++ hpZ 8, qwZ, qgZ"
    assert [line.link for line in plus.traffic[:4]] == ["100gbe", "nvlink4", "nvlink4", "100gbe"]
    assert plus.time.step_s < plain.time.step_s / 2
    assert plus.sent_bytes < plain.sent_bytes


def test_in_one_machine_zero_plus_plus_gains_nothing_and_holds_more() -> None:
    one_machine = {"gpus": 8} | LLAMA
    plain, plus = (estimate(strategy=strategy, **one_machine) for strategy in ("zero3", "zero3++"))

    assert plus.time.step_s > 0.9 * plain.time.step_s
    assert plus.memory.peak_allocated_bytes > plain.memory.peak_allocated_bytes


@pytest.mark.parametrize(
    ("used", "host", "verdict", "why"),
    [
        (72.0, 0, "fits", "72.0 of 80.0 GiB used per GPU, 10 % free"),
        (76.0, 0, "fits", "76.0 of 80.0 GiB used per GPU, 5 % free"),
        (76.5, 0, "tight", "76.5 GiB needed per GPU, 80.0 GiB there less 5 % kept free: 0.5 GiB short"),
        (80.0, 0, "tight", "80.0 GiB needed per GPU, 80.0 GiB there less 5 % kept free: 4.0 GiB short"),
        (100.0, 0, "no", "100.0 GiB needed per GPU, 80.0 GiB there less 5 % kept free: 24.0 GiB short"),
        (72.0, 512, "fits", "72.0 of 80.0 GiB used per GPU, 10 % free"),
        (72.0, 600, "no", "600.0 GiB of host memory needed per machine, 512.0 GiB there: 88.0 GiB short"),
        (
            78.0,
            600,
            "no",
            "78.0 GiB needed per GPU, 80.0 GiB there less 5 % kept free: 2.0 GiB short; "
            "600.0 GiB of host memory needed per machine, 512.0 GiB there: 88.0 GiB short",
        ),
    ],
)
def test_the_verdict_comes_with_its_arithmetic(used: float, host: int, verdict: str, why: str) -> None:
    assert judge(held(int(used * GIB), host * GIB), 0.05) == (verdict, why)


def test_what_runs_only_by_giving_cached_memory_back_is_tight() -> None:
    verdict, why = judge(held(81 * GIB, releases=3), 0.05)

    assert verdict == "tight"
    assert why.startswith("81.0 GiB needed per GPU, 80.0 GiB there less 5 % kept free: 5.0 GiB short; ")
    assert "gives cached memory back 3 times in two steps" in why
    assert judge(held(81 * GIB, HOST_CAPACITY + 1, releases=3), 0.05)[0] == "no"


def test_a_byte_decides() -> None:
    """A sixteenth is a share that binary fractions hold exactly."""
    edge = CAPACITY * 15 // 16

    assert [judge(held(used), 1 / 16)[0] for used in (edge, edge + 1, CAPACITY, CAPACITY + 1)] == [
        "fits",
        "tight",
        "tight",
        "no",
    ]
    assert [judge(held(0, used), 0)[0] for used in (HOST_CAPACITY, HOST_CAPACITY + 1)] == ["fits", "no"]


@given(
    st.integers(0, 2 * CAPACITY),
    st.integers(0, 2 * HOST_CAPACITY),
    st.integers(0, 2 * NVME_CAPACITY),
    st.floats(0, 0.99),
)
def test_verdict_and_shortages_agree(used: int, host: int, nvme: int, margin: float) -> None:
    found = held(used, host, nvme)
    device_short, host_short, nvme_short = shortages(found, margin)
    verdict, _ = judge(found, margin)

    assert (verdict == "fits") == (device_short <= 0 and host_short <= 0 and nvme_short <= 0)
    assert (verdict == "no") == (used > CAPACITY or host > HOST_CAPACITY or nvme > NVME_CAPACITY)
    assert nvme_short == nvme - NVME_CAPACITY
    assert device_short == pytest.approx(used - CAPACITY * (1 - margin), abs=1)
    assert host_short == host - HOST_CAPACITY


@given(st.floats(81, 300), st.integers(0, 99))
def test_the_numbers_of_a_shortage_add_up(used: float, percent: int) -> None:
    _, why = judge(held(int(used * GIB)), percent / 100)

    needed, there, kept, short = (float(number) for number in re.findall(r"\d+(?:\.\d+)?", why))
    assert needed - there * (1 - kept / 100) == pytest.approx(short, abs=0.11)


@pytest.mark.parametrize(("micro_batch", "steps"), [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)])
def test_accumulation_makes_up_the_global_batch(micro_batch: int, steps: int) -> None:
    _, plan = plan_of("Qwen2.5-0.5B", strategy="ddp", micro_batch=micro_batch, global_batch=64, gpus=4, gpu="A100-80GB")

    assert (plan.micro_batch, plan.accumulation_steps, plan.global_batch) == (micro_batch, steps, 64)


def test_accumulation_that_is_given_stands() -> None:
    _, plan = plan_of("Qwen2.5-0.5B", strategy="ddp", micro_batch=3, grad_accum=5, gpus=4, gpu="A100-80GB")

    assert plan.global_batch == 4 * 3 * 5


@pytest.mark.parametrize("micro_batch", [0, -2])
def test_a_micro_batch_has_at_least_one_sequence(micro_batch: int) -> None:
    with pytest.raises(SpecError, match=f"--micro-batch must be at least 1, got {micro_batch}"):
        plan_of("Qwen2.5-0.5B", strategy="ddp", micro_batch=micro_batch, gpus=4, gpu="A100-80GB")


@pytest.mark.parametrize("micro_batch", [3, 32])
def test_a_global_batch_that_nothing_solves_is_an_error_with_its_numbers(micro_batch: int) -> None:
    said = f"64 is no multiple of 4 GPUs x micro-batch {micro_batch} = {4 * micro_batch}; change --global-batch or"

    with pytest.raises(SpecError, match=said):
        plan_of("Qwen2.5-0.5B", strategy="ddp", micro_batch=micro_batch, gpus=4, gpu="A100-80GB")


def test_the_words_of_a_plan_are_taken() -> None:
    question, plan = plan_of(
        "Qwen2.5-0.5B",
        strategy="zero3",
        offload="optimizer+params",
        checkpointing="full",
        bucket_size=12_345,
        micro_batch=2,
        gpus=4,
        gpu="A100-80GB",
        margin=0.25,
        seq_len=512,
    )

    assert (plan.strategy, plan.offload) == (Strategy.ZERO3, Offload.OPTIMIZER_AND_PARAMETERS)
    assert (plan.checkpointing, plan.zero.reduce_bucket, plan.gpus) == (Checkpointing.FULL, 12_345, 4)
    assert (question.given_margin_share, question.job.sequence_length) == (0.25, 512)


def test_nothing_is_offloaded_or_recomputed_unless_told() -> None:
    _, plan = plan_of("Qwen2.5-0.5B", strategy="zero2", gpus=4, gpu="A100-80GB")

    assert (plan.micro_batch, plan.offload, plan.checkpointing) == (1, Offload.NONE, Checkpointing.NONE)
    assert plan.zero.reduce_bucket == 500_000_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"strategy": "zero4"},
            "--strategy must be one of ddp, fsdp, fsdp-grad-op, hsdp, zero0, zero1, zero2, zero3, zero3++, got 'zero4'",
        ),
        ({"offload": "gpu"}, "--offload must be one of none, optimizer, optimizer+params, got 'gpu'"),
        ({"checkpointing": "some"}, "--checkpointing must be one of none, selective, full, got 'some'"),
        ({"strategy": "ddp", "offload": "optimizer"}, "DDP keeps its optimizer on the GPU"),
        ({"bucket_size": 0}, "reduce_bucket must be at least 1 element"),
        ({"grad_accum": 0}, "accumulation_steps must be at least 1"),
        ({"margin": 1}, "--margin must be auto or a share"),
        ({"margin": "much"}, "--margin must be auto or a share"),
        ({"host_memory": 0}, "--host-memory must be a positive number"),
        ({"gpus": 6, "nodes": 4}, "6 GPUs do not divide over 4 machines"),
        ({"seq_len": 0}, "sequence_length must be at least 1"),
        ({"precision": "fp8"}, "precision must be one of"),
    ],
)
def test_words_that_make_no_sense_are_errors_that_say_so(words: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as refusal:
        estimate("Qwen2.5-0.5B", **{"strategy": "zero2", **FOUR_A100, **words})

    assert str(refusal.value).startswith(said)


def test_megatron_s_plan_is_what_the_words_say() -> None:
    words = {"tp": 2, "pp": 2, "vpp": 3, "cp": 2, "sequence_parallel": True, "micro_batch": 2, "seq_len": 512}
    _, plan = plan_of("Qwen2.5-0.5B", trainer="megatron", gpus=16, gpu="A100-80GB", global_batch=32, **words)  # type: ignore[arg-type]

    assert (plan.strategy, plan.tensor_parallel, plan.pipeline_parallel) == (Strategy.MEGATRON, 2, 2)
    assert (plan.virtual_stages, plan.context_parallel, plan.sequence_parallel) == (3, 2, True)
    # 16 GPUs are 2 copies of 8, which take 2 x 2 sequences at a time.
    assert (plan.micro_batch, plan.accumulation_steps, plan.global_batch) == (2, 8, 32)


@pytest.mark.parametrize("words", [{}, {"shard_ranks": 4}])
def test_hsdp_without_a_second_copy_is_refused_as_fsdp(words: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"hsdp that cuts states over all 4 GPUs .* is fsdp: take --strategy fsdp, or"):
        estimate("Qwen2.5-0.5B", strategy="hsdp", **FOUR_A100, **words)


@pytest.mark.parametrize(("words", "slices"), [({}, 2), ({"etp": 1}, 1)])
def test_experts_are_cut_as_the_rest_unless_said_otherwise(words: Any, slices: int) -> None:
    shape = {
        "tp": 2,
        "ep": 4,
        "cp": 2,
        "cp_comm_type": "a2a",
        "sequence_parallel": True,
        "gpus": 16,
        "gpu": "A100-80GB",
    }
    question, plan = plan_of("Mixtral-8x7B-v0.1", trainer="megatron", **shape, **words)

    assert (plan.expert_parallel, plan.expert_tensor_parallel) == (4, slices)
    assert "were all tokens for experts of one of the 4 ranks" in question.warnings[-1]
    assert plan.megatron.context_exchange == "a2a"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"trainer": "advisor", "strategy": "ddp", "tp": 2},
            "--tp: trainer advisor runs models that no pipeline or tensor-parallel group can cut",
        ),
        ({"trainer": "advisor", "strategy": "ddp", "sequence_parallel": True}, "--sequence-parallel: trainer advisor"),
        ({"cp_comm_type": "ring"}, "--cp-comm-type must be one of p2p, a2a, got 'ring'"),
        ({"ep": 2}, "Megatron ep 2 cannot train Qwen2.5-0.5B: it has no experts to spread"),
        ({"trainer": "advisor", "strategy": "ddp", "ep": 2}, "--ep: trainer advisor"),
        ({"trainer": "nemo", "strategy": "ddp"}, "--trainer must be one of advisor, hf, trl"),
        ({"strategy": "zero2"}, "--trainer megatron has a plan of its own"),
        ({"offload": "optimizer"}, "--offload is not for --trainer megatron"),
        ({"sp": 2}, "--sp is not for --trainer megatron"),
        ({"compile": True}, "--compile is not for --trainer megatron"),
        ({"tp": 3}, "tensor_parallel 3 x pipeline_parallel 1 x context_parallel 1 take 3 GPUs or a multiple, got 4"),
        ({"tp": 4}, "Megatron tp 4 cannot train Qwen2.5-0.5B: 14 attention heads do not divide"),
        ({"micro_batch": 48, "tp": 2}, "a global batch of 64 is no multiple of 2 copies of the model x micro-batch 48"),
    ],
)
def test_words_that_megatron_does_not_know_are_errors_that_say_so(words: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as refusal:
        estimate("Qwen2.5-0.5B", **{"trainer": "megatron", **FOUR_A100, **words})

    assert str(refusal.value).startswith(said)


def test_a_gpu_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(UnknownNameError, match="A101"):
        estimate("Qwen2.5-0.5B", strategy="ddp", gpus=1, gpu="A101")


def test_words_that_do_not_exist_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="unknown words gpu_count"):
        estimate("Qwen2.5-0.5B", strategy="ddp", gpu_count=4)  # type: ignore[call-arg]


def test_an_estimate_is_the_price_of_its_plan() -> None:
    words: dict[str, Any] = {"strategy": "fsdp", "micro_batch": 2, "seq_len": 512, **FOUR_A100}
    question, plan = plan_of("Qwen2.5-0.5B", **words)

    found = estimate("Qwen2.5-0.5B", **words)

    assert found == price(question, plan)
    assert (found.verdict, found.why) == judge(found.memory, question.margin_share(found.plan))
    assert (found.model, found.job, found.cluster, found.plan) == (question.model, question.job, question.cluster, plan)
    assert (found.inputs, found.warnings) == (question.inputs, question.warnings)
    assert found.sent_bytes == sum(line.bytes_per_step for line in found.traffic) > 0
    assert found.time.tokens_per_s == pytest.approx(64 * 512 / found.time.step_s)


def test_a_sequence_beyond_the_model_is_a_warning_and_no_error() -> None:
    found = estimate("gpt2", strategy="ddp", gpus=1, gpu="A100-80GB", seq_len=2048)

    assert any("2048" in warning and "1024" in warning for warning in found.warnings)


def test_another_reason_changes_nothing_else() -> None:
    found = estimate("Qwen2.5-0.5B", strategy="ddp", gpus=1, gpu="A100-80GB")

    other = explained(found, "because")

    assert other.why == "because"
    assert explained(other, found.why) == found


SWAPPED = {"strategy": "zero3", "offload": "optimizer", "offload_to": "nvme"}


def test_an_nvme_that_is_too_small_is_said_with_the_arithmetic() -> None:
    answer = estimate("Qwen2.5-1.5B", **FOUR_A100, **SWAPPED, nvme=10)  # type: ignore[arg-type]
    needed = answer.memory.nvme_bytes / GIB

    assert answer.verdict == "no"
    assert answer.why == (f"{needed:.1f} GiB of NVMe needed per machine, 10.0 GiB there: {needed - 10:.1f} GiB short")


def test_the_nvme_is_a_folder_s_file_system_or_assumed_and_said(tmp_path: Path) -> None:
    folder, plan = plan_of("Qwen2.5-1.5B", **FOUR_A100, **SWAPPED, nvme=str(tmp_path))  # type: ignore[arg-type]
    assumed, usual = plan_of("Qwen2.5-1.5B", **FOUR_A100, **SWAPPED)  # type: ignore[arg-type]
    origins = [next(each.origin for each in asked.inputs if each.name == "nvme_gib") for asked in (folder, assumed)]

    assert origins == ["given", "assumed"]
    assert plan.offload_settings.nvme_path == str(tmp_path)
    assert usual.offload_settings.nvme_path == "/local_nvme"
    assert 0 < folder.cluster.nvme_bytes <= shutil.disk_usage(tmp_path).total


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"nvme": "/no/such/folder"}, "--nvme /no/such/folder: No such file"),
        ({"nvme": 0}, "--nvme must be a positive number of GiB"),
        ({"offload": "none"}, "--offload-to nvme says where, not what"),
        ({"offload_to": "tape"}, "--offload-to must be one of cpu, nvme, got 'tape'"),
        ({"strategy": "zero2"}, "ZeRO-2 offloads to host memory alone"),
    ],
)
def test_words_about_the_nvme_that_make_no_sense_are_refused(words: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        plan_of("Qwen2.5-1.5B", **(FOUR_A100 | SWAPPED | words))


def test_the_nvme_is_waited_for_and_costs_what_its_bandwidth_says() -> None:
    host, nvme = (estimate("Qwen2.5-1.5B", **FOUR_A100, **(SWAPPED | {"offload_to": to})) for to in ("cpu", "nvme"))  # type: ignore[arg-type]
    lines = [line for line in nvme.traffic if line.link == "NVMe"]
    share_bytes_per_s = nvme.cluster.nvme_bandwidth_bytes_per_s / 4

    assert not any(line.link == "NVMe" for line in host.traffic)
    assert {line.collective for line in lines} == {"nvme-to-host", "host-to-nvme"}
    for line in lines:
        assert line.seconds == pytest.approx(line.bytes_per_step / share_bytes_per_s)
    assert nvme.time.step_s > host.time.step_s


def test_what_is_on_the_nvme_is_not_in_host_memory() -> None:
    host, nvme = (
        estimate("Llama-3.1-8B", **FOUR_A100, **(SWAPPED | {"offload_to": to})).memory  # type: ignore[arg-type]
        for to in ("cpu", "nvme")
    )

    assert host.nvme_bytes == 0
    assert sum(line.size_bytes for line in nvme.nvme_ledger) * 4 == nvme.nvme_bytes
    assert nvme.device_used_bytes >= host.device_used_bytes


def test_compiling_is_faster_in_the_memory_of_eager_mode_and_says_so() -> None:
    words: dict[str, Any] = {**FOUR_A100, "strategy": "fsdp", "micro_batch": 2}
    eager, compiled = estimate("Qwen2.5-1.5B", **words), estimate("Qwen2.5-1.5B", **words, compile=True)

    assert compiled.time.tokens_per_s > 1.05 * eager.time.tokens_per_s
    assert compiled.memory.peak_allocated_bytes == eager.memory.peak_allocated_bytes
    assert any("memory is that of eager mode" in each for each in compiled.warnings)
    assert not eager.warnings


def test_a_traced_model_is_not_compiled() -> None:
    with pytest.raises(SpecError, match="drop one of them"):
        estimate("Qwen2.5-1.5B", strategy="ddp", trace=True, compile=True, **FOUR_A100)
