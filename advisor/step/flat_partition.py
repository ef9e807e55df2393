"""How ZeRO's stages 1 and 2 cut one flat buffer over ranks, and how gradients come to the rank that needs them.

deepspeed 0.19.8, runtime/zero/stage_1_and_2.py. All tensors stand in the flat buffer in the order in which they are
registered. Gradients are copied into a bucket in the order in which they arrive; a gradient that no longer fits has
the bucket reduced first (``reduce_independent_p_g_buckets_and_remove_grads``), and backward's end reduces the rest.
Everything here counts elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from advisor.specs.plan import Count
from advisor.step.program import Amount

ALIGNMENT = 2
"""``nccl_start_alignment_factor``: the flat buffer is padded to so many elements for each rank."""


def flat_shard(parameters: int, ranks: Count) -> Amount:
    """Elements of one rank's share of a flat buffer of *parameters*."""
    return -(-parameters // (ALIGNMENT * ranks)) * ALIGNMENT


class Reduction(NamedTuple):
    """One reduction of the bucket."""

    tensors: tuple[int, ...]
    """What it holds: numbers of tensors in registration order, in the order in which they came."""
    place: int
    """How many gradients had come before the one that no longer fitted; all of them where backward's end reduces."""


@lru_cache(maxsize=256)
def reductions(sizes: tuple[int, ...], arrival: tuple[int, ...], bucket: int) -> tuple[Reduction, ...]:
    """The reductions of a backward pass. *sizes* in registration order; *arrival* lists the tensors as they come.

    A tensor larger than the bucket is not copied into it, and is reduced alone.
    """
    found: list[Reduction] = []
    waiting: list[int] = []
    held = 0
    for place, tensor in enumerate(arrival):
        if held + sizes[tensor] > bucket:
            if waiting:
                found.append(Reduction(tuple(waiting), place))
            waiting, held = [], 0
        waiting.append(tensor)
        held += sizes[tensor]
    return (*found, Reduction(tuple(waiting), len(arrival)))


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """What each rank keeps, by rank."""

    held: NDArray[Any]
    """Elements of the tensors that its partition touches: a rank that owns a slice keeps the whole gradient."""
    largest_slice: NDArray[Any]
    """Its largest piece of one tensor."""
    padding: NDArray[Any]
    """Elements of its partition that belong to no tensor."""
    pieces: NDArray[Any]
    """Tensors, padding among them, that its flat gradient is put together from."""
    first_reduction: NDArray[Any]
    """Number of the first reduction that holds a gradient of its own; past the last where none does."""


@lru_cache(maxsize=512)
def shares(sizes: tuple[int, ...], reduced: tuple[Reduction, ...], ranks: int) -> Shares:
    """The shares of every rank of *ranks*."""
    ends = np.cumsum(np.array(sizes, dtype=np.int64))
    begins = ends - np.array(sizes, dtype=np.int64)
    total, shard = int(ends[-1]), int(flat_shard(int(ends[-1]), ranks))
    reduction_of = np.zeros(len(sizes), dtype=np.int64)
    for number, reduction in enumerate(reduced):
        reduction_of[list(reduction.tensors)] = number
    low = np.minimum(np.arange(ranks, dtype=np.int64) * shard, total)
    high = np.minimum(low + shard, total)
    first = np.searchsorted(ends, low, side="right")
    last = np.searchsorted(begins, high, side="left")
    owns = high > low
    first, last = np.where(owns, first, 0), np.where(owns, last, 1)
    held = owns * (ends[last - 1] - begins[first])
    edges = [np.minimum(ends[at], high) - np.maximum(begins[at], low) for at in (first, last - 1)]
    inner = np.where(last - first > 2, _over(np.maximum, np.array(sizes), first + 1, last - 1), 0)
    largest = owns * np.maximum(np.maximum(*edges), inner)
    earliest = np.where(owns, _over(np.minimum, reduction_of, first, last), len(reduced))
    padding = shard - (high - low)
    pieces = owns * (last - first) + (padding > 0)
    return Shares(held, largest, padding, pieces, earliest)


def _over(reduce: np.ufunc, values: NDArray[Any], starts: NDArray[Any], ends: NDArray[Any]) -> NDArray[Any]:
    """*reduce* over every ``values[start:end]``; an entry means nothing where that is empty."""
    pairs = np.stack([starts, np.maximum(ends, starts)], axis=1).reshape(-1)
    found: NDArray[Any] = reduce.reduceat(np.append(values, values[-1]), np.minimum(pairs, len(values)))[::2]
    return found


def owned(start: int, size: int, shard: int) -> tuple[slice, NDArray[np.int64]]:
    """The ranks that own the tensor of *size* at *start*, and how many elements each, a share being *shard*."""
    end = start + size
    first, last = start // shard, (end - 1) // shard
    elements = np.full(last - first + 1, shard, dtype=np.int64)
    elements[0] -= start - first * shard
    elements[-1] -= (last + 1) * shard - end
    return slice(first, last + 1), elements


@lru_cache(maxsize=512)
def owned_total(sizes: tuple[int, ...], amounts: tuple[int, ...], ranks: int) -> NDArray[Any]:
    """For every rank of *ranks*, the sum of *amounts*, one for each tensor, over those that its share touches."""
    found = np.zeros(ranks, dtype=np.int64)
    shard = int(flat_shard(sum(sizes), ranks))
    for start, size, amount in zip(starts(sizes), sizes, amounts, strict=True):
        found[start // shard : (start + size - 1) // shard + 1] += amount
    return found


def by_count(number: Callable[[int], int], gpus: Count) -> Amount:
    """``number(gpus)`` for every entry of *gpus*."""
    counts, where = np.unique(np.asarray(gpus), return_inverse=True)
    found = np.array([number(int(count)) for count in counts], dtype=np.int64)
    return found[where.reshape(np.shape(gpus))] if np.ndim(gpus) else int(found[0])


def gathered_from(table: Callable[[int], NDArray[Any]], gpus: Count, rank: Count) -> Amount:
    """``table(gpus)[rank]`` for every pair of *gpus* and *rank*, which broadcast together."""
    if isinstance(gpus, int) and isinstance(rank, int):
        return int(table(gpus)[rank])
    counts, ranks = np.broadcast_arrays(np.asarray(gpus), np.asarray(rank))
    found = np.zeros(counts.shape, dtype=np.int64)
    for count in set(counts.reshape(-1).tolist()):
        at = counts == count
        found[at] = table(count)[ranks[at]]
    return found


class Joined(NamedTuple):
    """What one all-reduce sends."""

    elements: int
    slices: int
    """Of different ranks; a slice that is reduced alone is not copied."""


@lru_cache(maxsize=4096)
def all_reduces(sizes: tuple[int, ...], reduction: Reduction, bucket: int, ranks: int) -> tuple[Joined, ...]:
    """The all-reduces of one reduction (``allreduce_and_scatter``, ``allreduce_bucket``).

    The bucket is cut into the slices of different ranks. Slices are joined into one tensor, of at most a slice more
    than *bucket*, for each all-reduce.
    """
    begins, shard = starts(sizes), int(flat_shard(sum(sizes), ranks))
    owners = {
        owner
        for tensor in reduction.tensors
        for owner in (begins[tensor] // shard, (begins[tensor] + sizes[tensor] - 1) // shard)
    }
    whole = sum(sizes[tensor] for tensor in reduction.tensors)
    if len(owners) == 1 or whole <= bucket:
        return (Joined(whole, len(owners)),)
    (tensor,) = reduction.tensors
    return tuple(_joined(begins[tensor], begins[tensor] + sizes[tensor], shard, bucket))


def copied(found: Iterable[Joined]) -> int:
    """Elements of the largest flat copy that such all-reduces make."""
    return max(each.elements if each.slices > 1 else 0 for each in found)


def _joined(start: int, end: int, shard: int, bucket: int) -> Iterator[Joined]:
    """The tensors that are made of slices of a tensor too large for the bucket."""
    joined = slices = 0
    while start < end:
        cut = min(end, (start // shard + 1) * shard)
        joined, slices, start = joined + cut - start, slices + 1, cut
        if joined > bucket or start == end:
            yield Joined(joined, slices)
            joined = slices = 0


@lru_cache(maxsize=64)
def starts(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where each of tensors of *sizes* begins."""
    return tuple(int(end) - size for end, size in zip(np.cumsum(sizes), sizes, strict=True))


def undominated(columns: NDArray[Any]) -> NDArray[Any]:
    """Row numbers of *columns* (rows by criteria) that no other row equals or exceeds in everything."""
    # In ascending order only a later row can exceed one, so that the last of those left is one that none does.
    rows, left = np.unique(columns, axis=0, return_index=True)
    found: list[int] = []
    while left.size:
        found.append(int(left[-1]))
        others = ~(rows <= rows[-1]).all(axis=1)
        rows, left = rows[others], left[others]
    return np.sort(np.array(found, dtype=np.int64))
