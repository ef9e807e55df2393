"""Streams that wait for each other: what hides, what stands out, and repeats that are not unrolled."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.cost.streams import LAUNCHES, Costs, waits
from advisor.step.program import Block, Collective, Copy, Node, Repeat, phase, repeat, then

IDLE = Costs(
    busy_s=lambda node: busy_s(node),
    launch_s=lambda node: 0.0,
    transfer_s=lambda transfer: transfer.payload_bytes if isinstance(transfer, Collective) else transfer.moved_bytes,
)
"""A machine on which a unit of work takes a second, and a byte too."""


def busy_s(node: Node) -> float:
    if isinstance(node, Block):
        return float(node.moved_bytes)
    if isinstance(node, Repeat):
        return float(node.times) * busy_s(node.body)
    return sum(map(busy_s, node.steps))


def compute(takes_s: float) -> Block:
    return Block("compute", "activations", moved_bytes=takes_s)


def gather(takes_s: float, ahead: float = 1) -> Block:
    message = Collective("weights", "all-gather", takes_s, 1, waits=True, ahead=ahead)
    return Block("gather", "buffers", transfers=(message,))


def reduce(takes_s: float) -> Block:
    return Block("reduce", "buffers", transfers=(Collective("gradients", "reduce-scatter", takes_s, 1, waits=False),))


def copy(takes_s: float) -> Block:
    return Block("copy", "buffers", transfers=(Copy("gradients", "device-to-host", takes_s, waits=False),))


def waited_s(node: Node, costs: Costs = IDLE) -> float:
    return float(sum(waits(node, costs).values()))


def test_a_gather_in_place_is_waited_for_in_full() -> None:
    assert waited_s(then(compute(5), gather(2, ahead=0), compute(5))) == 2


def test_a_prefetched_gather_hides_behind_the_part_before_its_own() -> None:
    layer = then(gather(2), compute(5))

    assert waited_s(then(layer, layer, layer)) == 2  # the first has nothing before it


def test_a_prefetched_gather_starts_no_earlier_than_its_window_says() -> None:
    layer = then(gather(2, ahead=0.25), compute(4))

    assert waited_s(then(layer, layer)) == 2 + 1  # one of four seconds was left when the second began


def test_what_a_gather_is_longer_than_the_part_before_stands_out() -> None:
    assert waited_s(then(gather(7), repeat(then(compute(5), gather(7)), 10))) == 7 + 10 * 2


def test_a_reduction_runs_beside_the_next_layer_and_is_done_when_backward_ends() -> None:
    layers = phase("backward", compute(5), reduce(3), compute(5), reduce(3))

    assert waits(layers, IDLE) == {LAUNCHES: 0, ("gradients", "reduce-scatter"): 3}


def test_gathers_go_before_the_reduction_that_waits_on_the_same_stream() -> None:
    """The second gather takes its two seconds first, so only the last reduction stands out."""
    backward = phase("backward", gather(2), compute(5), reduce(3), gather(2), compute(5), reduce(3))

    assert waited_s(backward) == 2 + 3


def test_a_gather_that_was_not_prefetched_waits_for_the_reduction_before_it() -> None:
    backward = phase("backward", gather(2, 0), compute(5), reduce(3), gather(2, 0), compute(5))

    assert waits(backward, IDLE) == {
        LAUNCHES: 0,
        ("weights", "all-gather"): 2 + 2,
        ("gradients", "reduce-scatter"): 3,
    }


def ask(takes_s: float) -> Block:
    return Block("ask", "buffers", transfers=(Collective("weights", "all-gather", takes_s, 1, waits=False),))


ARRIVED = Block("copied out", "parameters", awaits="weights")


def test_what_is_awaited_stands_behind_what_was_reduced_before() -> None:
    """Two seconds of gathering after three of reducing fit into the five of the layer in between, but not into four."""
    roomy, tight = (
        phase("backward", compute(5), reduce(3), ask(2), compute(between), ARRIVED, compute(9)) for between in (5, 4)
    )

    assert waits(roomy, IDLE) == {LAUNCHES: 0, ("weights", "all-gather"): 0, ("gradients", "reduce-scatter"): 0}
    assert waits(tight, IDLE) == {LAUNCHES: 0, ("weights", "all-gather"): 1, ("gradients", "reduce-scatter"): 0}


def test_copies_and_messages_run_beside_each_other() -> None:
    both = phase("backward", reduce(3), copy(4), compute(5))

    assert waited_s(both) == 0


def test_a_gpu_stands_still_where_launching_takes_longer_than_running() -> None:
    slow = IDLE._replace(launch_s=lambda node: 2 * busy_s(node))

    assert waits(repeat(compute(1), 10), slow) == {LAUNCHES: 10}


def test_launching_runs_ahead_of_a_busy_gpu() -> None:
    """Ten seconds of one long kernel are enough to launch the many short ones after it."""
    costs = IDLE._replace(launch_s=lambda node: 8.0 if busy_s(node) == 1 else 0.0)

    assert waited_s(then(gather(0.5), compute(10), gather(0.5), compute(1)), costs) == 0.5


amounts = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.5, 8.0])
blocks = st.one_of(
    amounts.map(compute),
    st.builds(gather, amounts, st.sampled_from([0, 0.5, 1])),
    amounts.map(reduce),
    amounts.map(copy),
    amounts.map(ask),
    st.just(ARRIVED),
)
bodies = st.lists(blocks, min_size=1, max_size=5).map(lambda steps: then(*steps))


def unrolled(node: Node) -> Node:
    if isinstance(node, Block):
        return node
    if isinstance(node, Repeat):
        return then(*[unrolled(node.body)] * int(node.times))
    steps = tuple(map(unrolled, node.steps))
    return phase(node.phase, *steps) if node.phase else then(*steps)


def program(parts: Sequence[tuple[Node, int]], micro_steps: int) -> Node:
    return repeat(phase("backward", *(repeat(body, times) for body, times in parts)), micro_steps)


programs = st.builds(
    program, st.lists(st.tuples(bodies, st.integers(0, 30)), min_size=1, max_size=3), st.integers(1, 4)
)


@settings(max_examples=200, deadline=None)
@given(programs)
def test_a_repeat_takes_as_long_as_its_expansion(node: Node) -> None:
    # Launching is a stretch's own, so a repeat of nothing else would be launched at once.
    for costs in (IDLE, IDLE._replace(launch_s=lambda each: 0.75 * busy_s(each))):
        found, expected = waits(node, costs), waits(unrolled(node), costs)

        assert {cause: float(each) for cause, each in found.items() if each} == pytest.approx(
            {cause: float(each) for cause, each in expected.items() if each}
        )


@given(programs, st.floats(1, 4))
def test_faster_links_never_make_a_step_longer(node: Node, times: float) -> None:
    faster = IDLE._replace(transfer_s=lambda transfer: IDLE.transfer_s(transfer) / times)

    assert waited_s(node, faster) <= waited_s(node) * (1 + 1e-12)


@given(programs)
def test_what_stands_out_is_no_longer_than_all_transfers(node: Node) -> None:
    def sent_s(part: Node) -> float:
        if isinstance(part, Block):
            return float(sum(IDLE.transfer_s(each) for each in part.transfers))
        if isinstance(part, Repeat):
            return float(part.times) * sent_s(part.body)
        return sum(map(sent_s, part.steps))

    assert waited_s(node) <= sent_s(node) * (1 + 1e-12)
