"""Published communication: the ZeRO paper's volumes beside what DeepSpeed sends, and measured collectives."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advisor.catalog.gpus import find_gpu
from advisor.catalog.links import find_link
from advisor.catalog.models import find_model
from advisor.cost.collectives import collective_seconds, path
from advisor.cost.traffic import Ways, flows
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.plan import Group, Plan, Strategy
from advisor.step.build import build
from advisor.step.program import Block, Collective, CollectiveKind, Node, phase

RANKS = 64
HALF_BYTES = 2
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fit_collectives.py"
MODEL = find_model("Llama-3.1-8B").model
"""Above 10^9 parameters, so that ZeRO-3 does not keep it whole from forward to backward."""
GIB = 2**30


@pytest.fixture(scope="module")
def errors() -> dict[str, np.ndarray[Any, Any]]:
    """Relative errors of the times of each measured curve."""
    benchmark = runpy.run_path(str(BENCHMARK))
    return {curve.name: benchmark["errors"](curve, benchmark["now"]()) for curve in benchmark["curves"]()}


def machines(gpu_name: str, gpus: int, nodes: int, network: str = "ib-hdr") -> Cluster:
    gpu = find_gpu(gpu_name)
    return Cluster(
        gpu=gpu,
        gpus=gpus,
        nodes=nodes,
        link=find_link(gpu.link),
        host_link=find_link(gpu.host_link),
        network=find_link(network),
        host_memory_bytes=2**40,
        cpu_memory_bandwidth_bytes_per_s=1e11,
    )


def elements_sent(program: Node, element_bytes: int, parameters: int) -> float:
    """Elements that a rank sends in multiples of *parameters*, as the paper counts: with (N - 1)/N as one."""
    ways = Ways(machines("A100-80GB", RANKS, 8), Plan(strategy=Strategy.DDP, gpus=RANKS, micro_batch=1))
    sent = sum(np.asarray(flow.sent_bytes) for flow in flows(program, ways))
    return float(sent) * RANKS / (RANKS - 1) / element_bytes / parameters


def block(kind: CollectiveKind, parameters: int) -> Block:
    return Block(kind, "buffers", transfers=(Collective(kind, kind, parameters * HALF_BYTES, 1, waits=True),))


# Rajbhandari et al., arXiv:1910.02054, sections 7.1 and 7.2: data parallelism and stages 1 and 2 send 2 elements per
# parameter, stage 3 sends 3.
@pytest.mark.parametrize(
    ("what", "kinds", "published"),
    [
        ("data parallelism", ("all-reduce",), 2),
        ("stages 1 and 2", ("reduce-scatter", "all-gather"), 2),
        ("stage 3", ("all-gather", "all-gather", "reduce-scatter"), 3),
    ],
)
def test_volumes_of_the_zero_paper(what: str, kinds: tuple[CollectiveKind, ...], published: int) -> None:
    program = phase("step", *(block(kind, 10**9) for kind in kinds))

    assert elements_sent(program, HALF_BYTES, 10**9) == pytest.approx(published), what


# What the frameworks send instead. DDP reduces fp32 gradients. DeepSpeed 0.19.8 all-reduces each bucket in stages 1
# and 2 (use_multi_rank_bucket_allreduce, on by default; runtime/zero/stage_1_and_2.py) before it gathers weights, and
# in stage 2 does so in every micro-step; FSDP2 keeps the last group gathered, and reduces in the last micro-step.
@pytest.mark.parametrize(
    ("strategy", "element_bytes", "in_one_micro_step", "in_four"),
    [
        (Strategy.DDP, 4, 2, 2),
        (Strategy.ZERO1, HALF_BYTES, 2 + 1, 2 + 1),
        (Strategy.ZERO2, HALF_BYTES, 2 + 1, 4 * 2 + 1),
        (Strategy.ZERO3, HALF_BYTES, 3, 4 * 3),
    ],
)
def test_volumes_that_frameworks_send(
    strategy: Strategy, element_bytes: int, in_one_micro_step: int, in_four: int
) -> None:
    once = Plan(strategy=strategy, gpus=RANKS, micro_batch=1)
    often = replace(once, accumulation_steps=4)
    sent = [
        elements_sent(build(MODEL, Job(), plan).step, element_bytes, MODEL.parameter_count) for plan in (once, often)
    ]

    assert sent == pytest.approx([in_one_micro_step, in_four], rel=1e-3)


def test_fsdp_gathers_twice_all_but_its_last_group_and_reduces_once() -> None:
    plan = Plan(strategy=Strategy.FSDP, gpus=RANKS, micro_batch=1, accumulation_steps=4)
    head = MODEL.head_count / MODEL.parameter_count

    sent = elements_sent(build(MODEL, Job(), plan).step, HALF_BYTES, MODEL.parameter_count)

    assert sent == pytest.approx(4 * (2 - head) + 1, rel=1e-3)


# A model below max_live_parameters is gathered once and stays whole to the end of backward.
def test_zero_three_gathers_a_small_model_once() -> None:
    small = find_model("Qwen2.5-0.5B").model
    program = build(small, Job(), Plan(strategy=Strategy.ZERO3, gpus=RANKS, micro_batch=1)).step

    assert elements_sent(program, HALF_BYTES, small.parameter_count) == pytest.approx(2, rel=1e-3)


# stas00/ml-engineering network/README.md 744d01e: seconds from payload and bus bandwidth (nccl-tests' definition).
# In-switch reduction is off (all-gather and reduce-scatter never use it) or its rows are left out.
@pytest.mark.parametrize(
    ("gpu", "gpus", "nodes", "network", "kind", "payload_gib", "bus_gb_per_s"),
    [
        ("A100-80GB", 8, 1, "ib-hdr", "all-reduce", 1, 229.04),
        ("A100-80GB", 8, 1, "ib-hdr", "all-reduce", 4, 233.88),
        ("A100-80GB", 8, 1, "ib-hdr", "all-reduce", 16, 234.89),
        ("H200", 8, 1, "ib-ndr", "all-gather", 16, 361.4),
        ("H200", 8, 1, "ib-ndr", "reduce-scatter", 16, 362.9),
        ("B200", 32, 4, "efa-p6", "all-reduce", 1, 361.99),
        ("B200", 32, 4, "efa-p6", "all-reduce", 4, 377.34),
        ("B200", 32, 4, "efa-p6", "all-reduce", 16, 381.80),
        ("MI300X", 8, 1, "ib-ndr", "all-reduce", 4, 312.912),
    ],
)
def test_large_collectives_take_as_long_as_measured(
    gpu: str, gpus: int, nodes: int, network: str, kind: CollectiveKind, payload_gib: int, bus_gb_per_s: float
) -> None:
    rounds = 2 if kind == "all-reduce" else 1
    measured_s = rounds * (gpus - 1) / gpus * payload_gib * GIB / (bus_gb_per_s * 1e9)

    found = collective_seconds(kind, payload_gib * GIB, 1, path(machines(gpu, gpus, nodes, network), Group(gpus)))

    assert float(found) == pytest.approx(measured_s, rel=0.06)


# The same tables: a 32 KiB all-reduce takes 43.8 us on 8 A100, and 32 KiB at 1.44 GB/s on 8 H200.
@pytest.mark.parametrize(("gpu", "measured_s"), [("A100-80GB", 43.83e-6), ("H200", 1.75 * 2**15 / 1.44e9)])
def test_small_collectives_take_their_latency(gpu: str, measured_s: float) -> None:
    found = collective_seconds("all-reduce", 2**15, 1, path(machines(gpu, 8, 1), Group(8)))

    assert float(found) == pytest.approx(measured_s, rel=0.05)


# benchmarks/fit_collectives.py prints every curve of profiles/rates/collectives.csv beside its prediction.
@pytest.mark.parametrize(
    ("curve", "mean_error"),
    [
        ("8 A100", 0.12),
        ("8 H200", 0.13),
        ("8 H200, gather and scatter", 0.02),
        ("8 B200", 0.10),
        ("4 x 8 B200 over EFA", 0.06),
        ("2 x 8 H100 over TCPXO", 0.07),
        ("H100 over EFA, all-reduce", 0.24),
        ("H100 over EFA, all-gather", 0.20),
        ("H100 over EFA, reduce-scatter", 0.20),
        ("MI300X", 0.05),
    ],
)
def test_curves_are_predicted_within_a_mean_error(
    errors: dict[str, np.ndarray[Any, Any]], curve: str, mean_error: float
) -> None:
    assert np.abs(errors[curve]).mean() < mean_error
