"""One flat buffer over ranks, held against a partition made element by element and a bucket filled one by one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.step.flat_partition import all_reduces, copied, flat_shard, gathered_from, reductions, shares, undominated

ranks_of_any_count = st.integers(1, 40)
sizes_of_tensors = st.lists(st.integers(1, 60), min_size=1, max_size=12).map(tuple)
buckets = st.integers(1, 200)


def in_order(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(len(sizes)))


@given(st.integers(1, 10**12), ranks_of_any_count)
def test_a_flat_buffer_is_padded_to_twice_the_ranks(parameters: int, ranks: int) -> None:
    shard = flat_shard(parameters, ranks)

    assert shard % 2 == 0
    assert parameters <= shard * ranks < parameters + 2 * ranks


@given(sizes_of_tensors, buckets, st.randoms(use_true_random=False))
def test_every_gradient_is_reduced_once_and_in_the_order_in_which_it_came(sizes, bucket, draw) -> None:  # type: ignore[no-untyped-def]
    arrival = list(in_order(sizes))
    draw.shuffle(arrival)
    found = reductions(sizes, tuple(arrival), bucket)

    assert [tensor for reduction in found for tensor in reduction.tensors] == arrival
    for reduction in found:
        assert len(reduction.tensors) == 1 or sum(sizes[tensor] for tensor in reduction.tensors) <= bucket
    for full, following in pairwise(found):
        assert sum(sizes[tensor] for tensor in (*full.tensors, following.tensors[0])) > bucket


@given(sizes_of_tensors, ranks_of_any_count, buckets)
def test_a_rank_owns_the_whole_of_every_tensor_that_its_partition_touches(sizes, ranks, bucket) -> None:  # type: ignore[no-untyped-def]
    tensor_of_element = np.repeat(np.arange(len(sizes)), sizes)
    shard = int(flat_shard(len(tensor_of_element), ranks))
    reduced = reductions(sizes, in_order(sizes)[::-1], bucket)
    found = shares(sizes, reduced, ranks)

    for rank in range(ranks):
        partition = tensor_of_element[rank * shard : (rank + 1) * shard]
        touched, slices = np.unique(partition, return_counts=True)
        assert found.held[rank] == sum(sizes[tensor] for tensor in touched)
        assert found.largest_slice[rank] == max(slices, default=0)
        assert found.padding[rank] == shard - len(partition)
        assert found.pieces[rank] == len(touched) + (len(partition) < shard)
        holding = [number for number, each in enumerate(reduced) if set(each.tensors) & set(touched.tolist())]
        assert found.first_reduction[rank] == min(holding, default=len(reduced))


@given(sizes_of_tensors, ranks_of_any_count, buckets)
def test_a_bucket_is_copied_where_it_holds_slices_of_several_ranks(sizes, ranks, bucket) -> None:  # type: ignore[no-untyped-def]
    shard = int(flat_shard(sum(sizes), ranks))
    starts = np.cumsum((0, *sizes))
    for reduction in reductions(sizes, in_order(sizes), bucket):
        whole = sum(sizes[tensor] for tensor in reduction.tensors)
        owners = {
            int(element) // shard
            for tensor in reduction.tensors
            for element in range(starts[tensor], starts[tensor] + sizes[tensor])
        }
        sent = all_reduces(sizes, reduction, bucket, ranks)
        copy = copied(sent)
        assert sum(each.elements for each in sent) == whole
        if len(owners) == 1:
            assert copy == 0
        elif whole <= bucket:
            assert copy == whole
        else:
            # An all-reduce takes slices until they exceed the bucket; one that does so alone is not copied.
            assert copy == 0 or bucket < copy < bucket + shard + 1 or copy <= bucket


# 1,000 elements on 4 ranks are slices of 250. A bucket of 300 takes two at a time, one of 200 each alone.
@pytest.mark.parametrize(("bucket", "copy"), [(300, 500), (200, 0), (600, 750), (999, 1000)])
def test_a_tensor_larger_than_the_bucket_is_reduced_in_slices(bucket: int, copy: int) -> None:
    (alone,) = reductions((1000,), (0,), bucket)

    assert copied(all_reduces((1000,), alone, bucket, 4)) == copy


def test_a_large_embedding_weighs_on_its_ranks_however_many_there_are() -> None:
    sizes = (10_000, *[10] * 100)
    for ranks in (1, 10, 100, 1000):
        found = shares(sizes, reductions(sizes, in_order(sizes), 500), ranks)

        assert found.held[0] >= 10_000
    assert found.held[1000 - 1] <= 20


@given(st.lists(ranks_of_any_count, min_size=1, max_size=5))
def test_many_ranks_of_many_counts_at_once_are_each_alone(counts: list[int]) -> None:
    def table(ranks: int) -> np.ndarray:
        return np.arange(ranks) * ranks

    rank = np.array(counts) // 2
    found = gathered_from(table, np.array(counts), rank)

    assert list(np.asarray(found)) == [
        gathered_from(table, count, int(at)) for count, at in zip(counts, rank, strict=True)
    ]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=20))
def test_every_row_is_equalled_or_exceeded_by_one_that_is_left(rows: list[tuple[int, int]]) -> None:
    columns = np.array(rows)
    left = columns[undominated(columns)]

    assert all((left >= row).all(axis=1).any() for row in columns)
    assert all((left >= row).all(axis=1).sum() == 1 for row in left)
