"""Laws of the step program: its readings agree, whatever the program."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.errors import SpecError
from advisor.step.program import (
    Block,
    Node,
    blocks,
    expand,
    fold,
    held_after,
    hold,
    peak_of,
    phase,
    phase_peaks,
    release,
    repeat,
    scratch,
    then,
    without,
)

CATEGORIES = ("parameters", "gradients", "activations", "temporaries")


@st.composite
def block(draw: st.DrawFn) -> Block:
    net = draw(st.integers(-50, 50))
    excess = draw(st.integers(0, 30))
    return Block(draw(st.sampled_from("abc")), draw(st.sampled_from(CATEGORIES)), net, max(net, 0) + excess)


def programs(leaf: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4).map(lambda steps: then(*steps)),
            st.tuples(st.sampled_from(["forward", "backward"]), st.lists(inner, max_size=3)).map(
                lambda named: phase(named[0], *named[1])
            ),
            st.tuples(inner, st.integers(0, 4)).map(lambda pair: repeat(*pair)),
        ),
        max_leaves=12,
    )


def unrolled_peak(node: Node) -> int:
    return max((moment.before_bytes + moment.block.peak_bytes for moment in expand(node)), default=0)


@given(programs(block()))
def test_folding_equals_expanding(node: Node) -> None:
    moments = list(expand(node))

    extent = fold(node)

    assert extent.net_bytes == sum(moment.block.net_bytes for moment in moments)
    assert extent.peak_bytes == max(unrolled_peak(node), 0)


@given(programs(block()))
def test_the_ledger_of_the_peak_sums_to_the_peak(node: Node) -> None:
    peak = peak_of(node)

    assert peak.size_bytes == unrolled_peak(node)
    assert sum(line.size_bytes for line in peak.ledger) == peak.size_bytes


@given(programs(block()))
def test_what_is_left_by_label_sums_to_the_net(node: Node) -> None:
    assert sum(line.size_bytes for line in held_after(node)) == fold(node).net_bytes


@given(programs(block()))
def test_every_block_is_counted_as_often_as_it_runs(node: Node) -> None:
    counted: dict[int, int] = {}
    for _, each, times in blocks(node):
        counted[id(each)] = counted.get(id(each), 0) + int(times)
    unrolled: dict[int, int] = {}
    for moment in expand(node):
        unrolled[id(moment.block)] = unrolled.get(id(moment.block), 0) + 1

    assert {key: times for key, times in counted.items() if times} == unrolled


@given(programs(block()))
def test_no_phase_peaks_above_the_whole(node: Node) -> None:
    assert all(peak <= fold(node).peak_bytes for peak, _ in phase_peaks(node).values())


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 9)), min_size=1, max_size=6), st.integers(0, 5))
def test_an_array_of_plans_folds_to_each_plan_s_fold(pieces: list[tuple[int, int]], times: int) -> None:
    scales = np.array([1, 2, 7])

    def program(scale: int | np.ndarray) -> Node:
        steps = [Block("x", "buffers", net * scale, (max(net, 0) + extra) * scale) for net, extra in pieces]
        return repeat(then(*steps), times)

    together = fold(program(scales))
    for index, scale in enumerate(scales):
        alone = fold(program(int(scale)))
        assert np.broadcast_to(together.net_bytes, 3)[index] == alone.net_bytes
        assert np.broadcast_to(together.peak_bytes, 3)[index] == alone.peak_bytes


def test_repeats_may_differ_between_plans() -> None:
    extent = fold(repeat(hold("x", "buffers", 10), np.array([0, 1, 3])))

    assert list(extent.net_bytes) == [0, 10, 30]
    assert list(extent.peak_bytes) == [0, 10, 30]


def test_what_is_held_and_released_leaves_nothing() -> None:
    extent = fold(then(hold("x", "buffers", 8), scratch("y", 4), release("x", "buffers", 8)))

    assert extent == (0, 12)


def test_a_negative_repeat_is_refused() -> None:
    with pytest.raises(SpecError, match="repeat -1 times"):
        repeat(hold("x", "buffers", 1), -1)


@given(programs(block()))
def test_without_a_category_the_rest_is_as_it_was(node: Node) -> None:
    rest = without(node, "temporaries")

    assert fold(rest).net_bytes == sum(
        block.net_bytes * times for _, block, times in blocks(node) if block.category != "temporaries"
    )
    assert [block.kernels for _, block, _ in blocks(rest)] == [block.kernels for _, block, _ in blocks(node)]
