"""ZeRO-3's window of gathered weights, by DeepSpeed's rules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from advisor.step.gathering import Buffers, Call, Limits, gathered

ALL = 10**9
WHOLE = Limits(prefetch_bucket=ALL, max_live=ALL, max_reuse=ALL, persistence_threshold=0)


def there_and_back(tensors: int) -> tuple[Call, ...]:
    """One module for each tensor, forward and backward, inside a module without any."""
    order = [Call((tensor,), (tensor,)) for tensor in range(tensors)]
    return (Call(beneath=tuple(range(tensors))), *order, *reversed(order))


def test_without_prefetch_and_reuse_only_the_running_module_is_whole() -> None:
    levels = gathered(there_and_back(3), (10, 20, 30), Limits(0, ALL, 0, 0))

    assert [level.running for level in levels] == [0, 10, 20, 30, 30, 20, 10]
    assert [level.after for level in levels] == [0] * 7


def test_a_model_below_every_limit_arrives_at_once_and_goes_as_backward_ends() -> None:
    levels = gathered(there_and_back(3), (10, 20, 30), WHOLE)

    # The flat buffer of 60 stands beside the copies until the last of the three is used.
    assert [level.running for level in levels] == [60, 120, 120, 60, 60, 30, 10]
    assert [level.after for level in levels] == [60, 120, 120, 60, 30, 10, 0]


def test_what_fits_the_reuse_distance_stays_for_backward() -> None:
    # Between its forward and its backward lie 60 elements for the middle tensor and 100 for the first.
    levels = gathered(there_and_back(3), (10, 20, 30), Limits(0, ALL, 61, 0))

    assert [level.after for level in levels] == [0, 0, 20, 50, 20, 0, 0]


def test_each_module_tells_what_it_frees() -> None:
    levels = gathered(there_and_back(3), (10, 20, 30), Limits(0, ALL, 61, 0))

    assert [level.freed for level in levels] == [(), (0,), (), (), (2,), (1,), (0,)]


def test_after_a_leaf_the_modules_on_the_way_count_with_all_within_them() -> None:
    leaf, other, whole = Call((0, 1), (0, 1), is_leaf=True), Call((2,), (2,)), Call(beneath=(0, 1, 2))
    sizes = (10, 20, 30)

    stays = gathered((leaf, other, whole, other, leaf), sizes, Limits(0, ALL, 31, 0))
    goes = gathered((leaf, other, whole, other, leaf), sizes, Limits(0, ALL, 30, 0))

    # Beyond the 30 elements of the other module the whole model is next, and the leaf's tensors are in it.
    assert stays[0].freed == ()
    assert goes[0].freed == (0, 1)


def test_another_module_passes_over_a_leaf_as_if_it_owned_nothing() -> None:
    leaf, other = Call((0, 1), (0, 1), is_leaf=True), Call((2,), (2,))

    levels = gathered((other, leaf, other), (10, 20, 30), Limits(0, ALL, 1, 0))

    assert levels[0].freed == ()


def test_small_tensors_are_never_gathered() -> None:
    levels = gathered(there_and_back(2), (10, 20), Limits(ALL, ALL, ALL, 10))

    assert max(level.peak for level in levels) == 20


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=12),
    st.integers(0, 200),
    st.integers(1, 400),
    st.integers(0, 400),
    st.integers(0, 30),
)
def test_the_window_holds_what_runs_and_ends_empty(
    sizes: list[int], prefetch: int, live: int, reuse: int, small: int
) -> None:
    calls = there_and_back(len(sizes))
    levels = gathered(calls, tuple(sizes), Limits(prefetch, live, reuse, small))

    assert levels[-1].after == 0
    for call, level in zip(calls, levels, strict=True):
        assert level.peak >= level.running >= level.after >= 0
        assert level.running >= sum(sizes[tensor] for tensor in call.tensors if sizes[tensor] > small)


# Weights of two bytes come as int8 and are dequantised into fp16, from which each is cast.
QUANTISED = Buffers(0.5, opened=1, cast=1, copied=True)


def test_a_quantised_tensor_that_comes_alone_is_dequantised_and_cast() -> None:
    (level,) = gathered((Call((0,), (0,)),), (10,), Limits(0, ALL, 0, 0), buffers=QUANTISED)

    # 5 of int8, 10 dequantised and 10 cast; then the last alone.
    assert (level.peak, level.running, level.after) == (25, 10, 0)


def test_quantised_tensors_that_come_together_are_dequantised_together() -> None:
    first, second = gathered((Call((0,), (0,)), Call((1,), (1,))), (10, 20), Limits(ALL, ALL, 0, 0), buffers=QUANTISED)
    together, *_ = gathered((Call((0, 1), (0, 1)),), (10, 20), Limits(0, ALL, 0, 0), buffers=QUANTISED)

    # The second is prefetched by itself as int8 while the first runs.
    assert (first.running, second.running) == (10 + 10, 20)
    # 15 of int8, 30 dequantised, both copies, and the second once more before it is cast.
    assert (together.peak, together.running) == (15 + 30 + 10 + 20 + 20, 30)


def test_what_was_freed_before_is_gathered_apart_from_what_was_not() -> None:
    # The first tensor, freed after its call, is prefetched for its next one with the last, which nobody has used yet.
    calls = (Call((0,), (0,)), Call((1,), (1,)), Call((2,), (2,)), Call((0,), (0,)))
    limits = Limits(prefetch_bucket=15, max_live=ALL, max_reuse=0, persistence_threshold=0)
    together, apart = (gathered(calls, (10, 20, 5), limits, buffers=Buffers(apart=each)) for each in (False, True))

    # Together they are copied from a flat buffer of 15.
    assert [level.running for level in together] == [30, 35, 30, 10]
    assert [level.running for level in apart] == [30, 35, 15, 10]
