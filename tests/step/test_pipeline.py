"""Schedules of a pipeline stage, against an unrolled account of megatron-core's and against the counts of papers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from advisor.specs.megatron import MegatronSettings
from advisor.specs.plan import Plan, Strategy
from advisor.step.pipeline import Passes, bubble_share, schedule, warm_up
from advisor.step.program import Block, Node, expand, fold

stage_counts, chunk_counts = st.integers(1, 6), st.integers(1, 4)


def plan_of(stages: int, chunks: int, micro_batches: int, schedule: str = "1f1b") -> Plan:
    return Plan(
        strategy=Strategy.MEGATRON,
        gpus=stages,
        micro_batch=1,
        accumulation_steps=micro_batches,
        pipeline_parallel=stages,
        virtual_stages=chunks,
        megatron=MegatronSettings(pipeline_schedule=schedule),  # type: ignore[arg-type]
    )


def passes(chunks: int) -> Passes:
    """Passes that hold one byte between forwards and backwards, named by what they are."""
    forward = tuple(Block(f"F{chunk}", "activations", 1, 1) for chunk in range(chunks))
    backward = tuple(Block(f"B{chunk}", "activations", -1) for chunk in range(chunks))
    return Passes(forward, backward, Block("first F0", "activations", 1, 1), Block("last B0", "activations", -1))


def order(node: Node) -> list[str]:
    return [moment.block.label for moment in expand(node)]


def as_megatron_runs(plan: Plan, stage: int) -> Iterator[str]:
    """megatron-core 0.16.1, schedules.py: an interleaved pipeline, micro-batch by micro-batch."""
    stages, chunks = plan.pipeline_parallel, plan.virtual_stages
    assert isinstance(plan.accumulation_steps, int)
    table = [
        chunk
        for first in range(0, plan.accumulation_steps, stages)
        for chunk in range(chunks)
        for _ in range(first, first + stages)
    ]
    early = min(2 * (stages - stage - 1) + (chunks - 1) * stages, len(table))
    yield from (f"F{chunk}" for chunk in table[:early])
    for place in range(len(table) - early):
        yield f"F{table[place + early]}"
        yield f"B{chunks - 1 - table[place]}"
    yield from (f"B{chunks - 1 - chunk}" for chunk in table[len(table) - early :])


@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 4), st.data())
def test_an_interleaved_stage_runs_its_chunks_in_megatron_s_order(
    stages: int, chunks: int, groups: int, data: st.DataObject
) -> None:
    plan, stage = plan_of(stages, chunks, groups * stages), data.draw(st.integers(0, stages - 1))

    found = order(schedule(passes(chunks), plan, stage))

    assert found[0] == "first F0"
    assert found[-1] == "last B0"
    assert [name.split()[-1] for name in found] == list(as_megatron_runs(plan, stage))


@given(stage_counts, st.integers(1, 9), st.data())
def test_one_forward_one_backward_keeps_as_many_in_flight_as_stages_follow(
    stages: int, micro_batches: int, data: st.DataObject
) -> None:
    plan, stage = plan_of(stages, 1, micro_batches), data.draw(st.integers(0, stages - 1))

    node = schedule(passes(1), plan, stage)

    names = [name.split()[-1] for name in order(node)]
    assert names.count("F0") == names.count("B0") == micro_batches
    assert fold(node).peak_bytes == min(stages - stage, micro_batches)
    assert fold(node).net_bytes == 0


@given(stage_counts, st.integers(1, 9))
def test_gpipe_keeps_every_micro_batch_in_flight(stages: int, micro_batches: int) -> None:
    node = schedule(passes(1), plan_of(stages, 1, micro_batches, "gpipe"), stages - 1)

    assert [name.split()[-1] for name in order(node)] == ["F0"] * micro_batches + ["B0"] * micro_batches


@given(st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
def test_many_plans_at_once_are_each_plan_s_own(stages: int, counts: list[int], data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    together = plan_of(stages, 1, np.array(counts))  # type: ignore[arg-type]

    found = np.broadcast_to(fold(schedule(passes(1), together, stage)).peak_bytes, len(counts))

    assert list(found) == [fold(schedule(passes(1), plan_of(stages, 1, count), stage)).peak_bytes for count in counts]


@given(stage_counts, chunk_counts, st.integers(1, 4), st.data())
def test_no_stage_warms_up_longer_than_the_one_before(
    stages: int, chunks: int, groups: int, data: st.DataObject
) -> None:
    assume(chunks == 1 or stages > 1)
    plan, stage = plan_of(stages, chunks, groups * stages), data.draw(st.integers(0, stages - 1))

    assert warm_up(plan, stage) >= warm_up(plan, min(stage + 1, stages - 1))


# Narayanan et al., arXiv:2104.04473, sections 2.2.1 and 2.2.2: (p - 1) / m, and v times less when interleaved.
@pytest.mark.parametrize(("chunks", "share"), [(1, 3 / 8), (2, 3 / 16)])
def test_the_bubble_is_that_of_the_paper(chunks: int, share: float) -> None:
    assert bubble_share(plan_of(4, chunks, 8)) == share


@given(st.lists(st.tuples(st.integers(2, 6), st.integers(2, 4), st.integers(1, 4)), min_size=1, max_size=4), st.data())
def test_many_interleaved_pipelines_at_once_are_each_one_s_own(
    sizes: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    stages, chunks, groups = (np.array(each) for each in zip(*sizes, strict=True))
    behind = data.draw(st.sampled_from(["first", "last"]))
    together = plan_of(stages, chunks, groups * stages)  # type: ignore[arg-type]

    def of(plan: Plan, first_held: int) -> Node:
        """The chunk at one end of the model holds more than the others, which are alike."""
        stage, ends = (0, (0,)) if behind == "first" else (plan.pipeline_parallel - 1, (1,))
        held = [first_held if place in ends else 1 for place in range(2)]
        forward = tuple(Block(f"F{place}", "activations", each, each) for place, each in enumerate(held))
        backward = tuple(Block(f"B{place}", "activations", -each) for place, each in enumerate(held))
        others = plan.virtual_stages - 1
        several = (1, others) if behind == "first" else (others, 1)
        return schedule(Passes(forward, backward, forward[0], backward[0], several), plan, stage)

    found = np.broadcast_to(fold(of(together, 7)).peak_bytes, len(sizes))

    assert list(found) == [fold(of(together.at(index), 7)).peak_bytes for index in range(len(sizes))]


@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 4), st.data())
def test_chunks_that_are_alike_run_as_if_each_were_by_itself(
    stages: int, chunks: int, groups: int, data: st.DataObject
) -> None:
    plan, stage = plan_of(stages, chunks, groups * stages), data.draw(st.integers(0, stages - 1))
    each = passes(chunks)
    alike = Passes(each.forward[:2], each.backward[:2], each.first_forward, each.last_backward, (1, chunks - 1))

    def kinds(names: list[str]) -> list[str]:
        return [name if name.endswith("0") else f"{name[0]}1" for name in names]

    assert kinds(order(schedule(alike, plan, stage))) == kinds(order(schedule(each, plan, stage)))
