"""PyTorch's caching allocator for CUDA, as torch 2.13 has it: what a stream of tensors makes it reserve.

A request is rounded to 512 B. Up to 1 MiB it comes from the small pool of its stream, else from the large one
(``pools.py``). Where the device is full, segments or pages that are free as a whole go back to it, and the request is
tried once more (``malloc`` in c10/cuda/CUDACachingAllocator.cpp; settings: docs.pytorch.org/docs/2.13/notes/cuda.html).

Left out: blocks that wait for other streams before they are free (``record_stream``), and CUDA graphs' own pools.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from advisor.cost.pools import (
    LARGE_SEGMENT_BYTES,
    SMALL_SIZE_BYTES,
    ExpandablePool,
    Held,
    Layout,
    Pool,
    SegmentPool,
    round_size,
)
from advisor.errors import AdvisorError, SpecError

COMPUTE_STREAM = "compute"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What ``PYTORCH_CUDA_ALLOC_CONF`` says, and how much the device has to give."""

    expandable_segments: bool = False
    max_split_bytes: int | None = None
    """``max_split_size_mb``: blocks of this size and more are never split; None for no limit."""
    roundup_power2_divisions: int = 1
    """Sizes are rounded to this many steps between two powers of two; 1 for none."""
    capacity_bytes: int | None = None
    """Reserved bytes beyond which the device is full; None for never."""

    def __post_init__(self) -> None:
        if self.max_split_bytes is not None and self.max_split_bytes <= LARGE_SEGMENT_BYTES:
            raise SpecError(f"max_split_bytes must be more than {LARGE_SEGMENT_BYTES}, got {self.max_split_bytes}")
        divisions = self.roundup_power2_divisions
        if divisions < 1 or divisions & (divisions - 1):
            raise SpecError(f"roundup_power2_divisions must be a power of two, got {divisions}")


class Action(NamedTuple):
    """A tensor is allocated, or freed where ``size_bytes`` is None."""

    tensor: Hashable
    size_bytes: int | None
    stream: Hashable = COMPUTE_STREAM


class Reserved(NamedTuple):
    """What an allocator counted. Fields as ``torch.cuda.memory_stats`` names them."""

    peak_allocated_bytes: int
    """Of the blocks in use."""
    peak_reserved_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    """At the end."""
    retries: int
    """How often the device was full and cached memory was released (``num_alloc_retries``)."""


class OutOfMemoryError(AdvisorError):
    """A request that the device cannot serve even with all cached memory released."""


def replay(actions: Iterable[Action], settings: Settings) -> Reserved:
    """What a new allocator counts over *actions*.

    Raises OutOfMemoryError where the capacity does not suffice, AdvisorError where a tensor is allocated twice or
    freed without having been.
    """
    allocator = Allocator(settings)
    blocks: dict[Hashable, Held] = {}
    for tensor, size_bytes, stream in actions:
        if size_bytes is None:
            if tensor not in blocks:
                raise AdvisorError(f"tensor {tensor!r} is freed but was not allocated; begin with its allocation")
            allocator.free(blocks.pop(tensor))
        else:
            if tensor in blocks:
                raise AdvisorError(f"tensor {tensor!r} is allocated twice; name each tensor that lives at a time anew")
            blocks[tensor] = allocator.allocate(size_bytes, allocator.pools_of(stream))
    return allocator.counted()


Pools = tuple["Pool", "Pool"]
"""The small and the large pool of a stream."""
AllocatorLayout = tuple[int, tuple[Layout, ...]]
"""Allocated bytes, and every pool's layout."""


class Allocator:
    """The allocator of one device; it changes with every call. :func:`replay` is its pure form."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.divisions = settings.roundup_power2_divisions
        self.pools: dict[Hashable, Pools] = {}
        self.allocated = self.reserved = self.retries = 0
        self.peak_allocated = self.peak_reserved = 0

    def pools_of(self, stream: Hashable) -> Pools:
        if stream not in self.pools:
            kind: type[Pool] = ExpandablePool if self.settings.expandable_segments else SegmentPool
            limit = self.settings.max_split_bytes
            self.pools[stream] = kind(True, limit), kind(False, limit)
        return self.pools[stream]

    def allocate(self, size_bytes: int, pools: Pools) -> Held:
        """A block for *size_bytes* from a stream's *pools*. Raises OutOfMemoryError."""
        return self.request(size_bytes, pools)()

    def request(self, size_bytes: int, pools: Pools) -> Callable[[], Held]:
        """What :meth:`allocate` does, at every call."""
        size = round_size(size_bytes, self.divisions)
        pool = pools[size > SMALL_SIZE_BYTES]
        fit, grow = pool.fit, self._grow

        def allocate() -> Held:
            block = fit(size, size_bytes) or grow(pool, size, size_bytes)
            self.allocated += block[2]
            if self.allocated > self.peak_allocated:
                self.peak_allocated = self.allocated
            return block

        return allocate

    def free(self, block: Held) -> None:
        """Give *block* back to its pool."""
        pool, address, size, _ = block
        self.allocated -= size
        pool.release(address, size)

    def counted(self) -> Reserved:
        return Reserved(self.peak_allocated, self.peak_reserved, self.allocated, self.reserved, self.retries)

    def layout(self) -> AllocatorLayout:
        """All that decides about requests to come while the device is not full."""
        pools = tuple(pool.layout() for pair in self.pools.values() for pool in pair)
        return self.allocated, pools

    def restore(self, layout: AllocatorLayout) -> None:
        """Make it what it was when :meth:`layout` said this, with all that was reserved since."""
        self.allocated, parts = layout
        pools = (pool for pair in self.pools.values() for pool in pair)
        for pool, part in zip(pools, parts, strict=True):
            pool.restore(part)

    def _grow(self, pool: Pool, size: int, requested_bytes: int) -> Held:
        """More of the device for *pool*; where it is full, cached memory goes back to it first."""
        needed = pool.needed(size)
        if self._full(needed) and self.settings.max_split_bytes is not None:
            self.reserved -= pool.release_oversize(size)
        if self._full(needed):
            self.retries += 1
            self.reserved -= sum(pool.release_cached() for pools in self.pools.values() for pool in pools)
            needed = pool.needed(size)
            if self._full(needed):
                raise OutOfMemoryError(
                    f"{size} bytes asked for, {needed} of them new, but {self.reserved} of "
                    f"{self.settings.capacity_bytes} bytes are reserved and {self.allocated} allocated; "
                    f"take a plan that holds less"
                )
        self.reserved += needed
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved
        return pool.grow(size, needed, requested_bytes)

    def _full(self, needed: int) -> bool:
        capacity = self.settings.capacity_bytes
        return capacity is not None and self.reserved + needed > capacity
