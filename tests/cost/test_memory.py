"""Memory readings: how allocated, reserved and used follow from each other, and what the host holds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.catalog.models import find_model
from advisor.cost.memory import ALLOCATOR, footprint, memory, short_by, states_ledger
from advisor.cost.results import Memory
from advisor.launch.run_script import ALLOCATOR_SETTING
from advisor.specs.calibration import Calibration
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.plan import OWN_STRATEGIES, Checkpointing, Offload, Plan, Strategy
from advisor.step.build import StepProgram, build
from advisor.step.program import NOTHING, hold, phase, release, scratch, then

from .machines import CALIBRATION, GPU, cluster

MIB = 2**20
JOB = Job(sequence_length=256)
MODEL = find_model("Qwen2.5-0.5B").model
PLAN = Plan(strategy=Strategy.ZERO2, gpus=8, micro_batch=1)
ROUND = replace(
    CALIBRATION,
    matmul_workspace_bytes={"default": 8 * MIB},
    grouped_workspace_bytes={"default": 16 * MIB},
    context_bytes=100 * MIB,
    communicator_bytes=200 * MIB,
    process_host_bytes=1000 * MIB,
    waiting_share=0.5,
    memory_ranges={"default": (0.9, 1.1)},
)
PROGRAM = StepProgram(
    init=phase("init", hold("weights", "parameters", 64 * MIB), scratch("loading", 8 * MIB)),
    step=then(
        phase("forward", hold("activations", "activations", 30 * MIB)),
        phase("backward", scratch("gradient", 6 * MIB), release("activations", "activations", 30 * MIB)),
    ),
    host=then(hold("optimizer", "optimizer", 50 * MIB), scratch("staging", 10 * MIB)),
    host_once=scratch("checkpoint", 7 * MIB),
)
"""64 MiB between steps, 36 MiB more at the peak."""


def measured(
    program: StepProgram = PROGRAM,
    plan: Plan = PLAN,
    machines: Cluster | None = None,
    calibration: Calibration = ROUND,
) -> Memory:
    return memory(program, plan, machines or cluster(8), calibration)


def test_the_peak_is_what_the_step_holds_and_two_workspaces() -> None:
    """One for the thread that runs forward, one for backward's."""
    found = measured()

    assert found.states_bytes == 64 * MIB
    assert found.peak_allocated_bytes == (64 + 36 + 2 * 8) * MIB
    assert (found.peak_phase, found.peak_label) == ("backward", "gradient")
    assert [(line.label, line.size_bytes // MIB) for line in found.ledger] == [
        ("weights", 64),
        ("cuBLAS workspaces", 16),
        ("activations", 30),
        ("gradient", 6),
    ]


def test_reserved_is_what_the_allocator_maps_and_what_waits_for_other_streams() -> None:
    """64 and 2 x 8 stay, 30 and 6 come on top: 116 MiB, in pages of 20. Of the 52 that come and go, half may wait."""
    assert measured(plan=replace(PLAN, gpus=1)).peak_reserved_bytes == 120 * MIB
    assert measured().peak_reserved_bytes == (120 + 52 // 2) * MIB


def test_tensors_are_rounded_and_the_ledger_says_by_how_much() -> None:
    """A request of 3 MiB and 1 B takes 3 MiB and 512 B."""
    odd = replace(PROGRAM, step=phase("forward", scratch("odd", 3 * MIB + 1)))
    found = measured(odd)

    assert found.peak_allocated_bytes == (64 + 16 + 3) * MIB + 512
    assert [line for line in found.ledger if line.category == "rounding"] == [("rounding", "rounding to 512 B", 511)]
    assert sum(line.size_bytes for line in found.ledger) == found.peak_allocated_bytes


def test_the_allocator_assumed_is_the_one_that_the_launch_files_set() -> None:
    assert ALLOCATOR_SETTING[1] == f"expandable_segments:{ALLOCATOR.expandable_segments}"
    assert measured().allocator == "expandable segments"


@pytest.mark.parametrize(("gpu_mib", "releases"), [(120, 0), (110, 2), (70, None)])
def test_a_device_that_is_full_gets_cached_memory_back(gpu_mib: int, releases: int | None) -> None:
    """40 and 20 MiB, then 60 where the first was too small: 120 MiB are reserved, and 80 where the gap goes back."""
    program = replace(
        PROGRAM,
        init=NOTHING,
        step=then(
            hold("first", "activations", 40 * MIB),
            hold("second", "activations", 20 * MIB),
            release("first", "activations", 40 * MIB),
            scratch("third", 60 * MIB),
            release("second", "activations", 20 * MIB),
        ),
    )
    alone = replace(ROUND, matmul_workspace_bytes={"default": 0}, context_bytes=0)
    machines = replace(cluster(1), gpu=replace(GPU, memory_bytes=gpu_mib * MIB))
    single = replace(PLAN, gpus=1)
    found = memory(program, single, machines, alone, squeezed=True)

    assert found.peak_reserved_bytes == 120 * MIB
    assert found.cache_releases == releases


@pytest.mark.parametrize(("gpus", "communicators"), [(1, 0), (2, 1), (64, 1)])
def test_the_device_holds_a_context_and_with_others_to_talk_to_a_communicator(gpus: int, communicators: int) -> None:
    found = measured(plan=replace(PLAN, gpus=gpus))

    assert found.device_used_bytes - found.peak_reserved_bytes == (100 + 200 * communicators) * MIB


def test_the_range_lies_around_what_the_device_uses() -> None:
    found = measured()

    assert found.low_bytes == int(found.device_used_bytes * 0.9)
    assert found.high_bytes == int(found.device_used_bytes * 1.1)
    assert found.capacity_bytes == GPU.memory_bytes


# PyTorch aten/src/ATen/cuda/CublasHandlePool.cpp: 32 MiB on Hopper and Blackwell, else 8,519,680 bytes.
@pytest.mark.parametrize(
    ("capability", "workspace"),
    [("7.5", 8_519_680), ("8.0", 8_519_680), ("9.0", 32 * MIB), ("10.0", 32 * MIB), ("12.0", 32 * MIB)],
)
def test_the_workspace_is_that_of_the_gpu(capability: str, workspace: int) -> None:
    machines = replace(cluster(8), gpu=replace(GPU, compute_capability=capability))

    found = measured(machines=machines, calibration=CALIBRATION)

    assert {line.label: line.size_bytes for line in found.ledger}["cuBLAS workspaces"] == 2 * workspace


@pytest.mark.parametrize(("gpus", "nodes", "sharers"), [(1, 1, 1), (8, 1, 8), (8, 2, 4), (16, 2, 8)])
def test_a_machine_holds_what_each_of_its_ranks_holds_and_what_one_loads(gpus: int, nodes: int, sharers: int) -> None:
    found = measured(plan=replace(PLAN, gpus=gpus), machines=cluster(gpus, nodes))

    assert found.host_bytes == (sharers * (50 + 10 + 1000) + 7) * MIB
    assert [(line.label, line.size_bytes // MIB) for line in found.host_ledger] == [("optimizer", 50), ("staging", 10)]


def test_the_timeline_ends_each_phase_where_the_next_begins() -> None:
    assert [(each.phase, each.peak_bytes // MIB, each.end_bytes // MIB) for each in measured().timeline] == [
        ("init", 72, 64),
        ("forward", 110, 110),
        ("backward", 116, 80),
    ]


def test_a_program_of_nothing_needs_only_what_every_process_has() -> None:
    nothing = StepProgram(init=NOTHING, step=NOTHING, host=NOTHING, host_once=NOTHING)
    found = measured(nothing, replace(PLAN, gpus=1), cluster(1), replace(ROUND, matmul_workspace_bytes={"default": 0}))

    assert (found.states_bytes, found.peak_allocated_bytes, found.peak_reserved_bytes) == (0, 0, 0)
    assert (found.device_used_bytes, found.host_bytes) == (100 * MIB, 1000 * MIB)


def test_what_is_held_between_steps_is_listed() -> None:
    assert states_ledger(PROGRAM) == (("parameters", "weights", 64 * MIB),)


@given(st.integers(0, 2**40), st.integers(1, 2**40), st.floats(0, 0.99))
def test_a_margin_counts_as_memory_that_is_not_there(used: int, capacity: int, margin: float) -> None:
    assert short_by(used, capacity, margin) == pytest.approx(used - capacity + capacity * margin, abs=1)
    assert (short_by(used, capacity, 0) <= 0) == (used <= capacity)


COUNTERS = ("states_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes", "host_bytes")
strategies = st.sampled_from(
    [(strategy, Offload.NONE) for strategy in OWN_STRATEGIES]
    + [(Strategy.ZERO2, Offload.OPTIMIZER), (Strategy.ZERO3, Offload.OPTIMIZER_AND_PARAMETERS)]
)


@settings(deadline=None, max_examples=30)
@given(
    strategies,
    st.sampled_from(list(Checkpointing)),
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8)), min_size=1, max_size=4),
)
def test_each_counter_is_at_least_the_one_within_it_and_many_plans_are_each_alone(
    kind: tuple[Strategy, Offload], checkpointing: Checkpointing, counts: list[tuple[int, int, int]]
) -> None:
    gpus, batches, steps = (np.array(column) for column in zip(*counts, strict=True))
    plan = Plan(
        strategy=kind[0],
        offload=kind[1],
        gpus=gpus,
        micro_batch=batches,
        accumulation_steps=steps,
        checkpointing=checkpointing,
    )
    machines = cluster(64, 8)
    together = footprint(build(MODEL, JOB, plan), plan, machines, CALIBRATION)
    inwards: list[Any] = [
        together.device_used_bytes,
        together.peak_reserved_bytes,
        together.peak_allocated_bytes,
        together.states_bytes,
    ]

    assert all((np.asarray(outer) >= np.asarray(inner)).all() for outer, inner in pairwise(inwards))
    for index in range(len(counts)):
        single = plan.at(index)
        alone = measured(build(MODEL, JOB, single), single, machines, CALIBRATION)
        bounds = {name: int(np.broadcast_to(getattr(together, name), len(counts))[index]) for name in COUNTERS}
        rounding = sum(line.size_bytes for line in alone.ledger if line.category == "rounding")
        for name in ("states_bytes", "host_bytes"):
            assert bounds[name] == getattr(alone, name), name
        for name in ("peak_reserved_bytes", "device_used_bytes"):
            assert bounds[name] <= getattr(alone, name), name
        assert bounds["peak_allocated_bytes"] == alone.peak_allocated_bytes - rounding
        assert sum(line.size_bytes for line in alone.ledger) == alone.peak_allocated_bytes
        assert alone.peak_allocated_bytes - rounding == max(each.peak_bytes for each in alone.timeline)
        assert alone.peak_phase in {each.phase for each in alone.timeline}
        assert alone.timeline[-1].end_bytes - alone.states_bytes == 2 * CALIBRATION.workspace_bytes("round")
        assert sum(size for _, _, size in states_ledger(build(MODEL, JOB, single))) == alone.states_bytes
