"""Memory pools of PyTorch's caching allocator: where a block comes from and where it goes when it is freed.

Rules, constants and the names in quotes are those of torch 2.13: c10/core/AllocatorConfig.h and
c10/cuda/CUDACachingAllocator.cpp. A pool belongs to one stream and one size class, small or large.

* The smallest free block that is large enough serves a request, among equals the one at the lowest address. What is
  left over becomes a free block where it is large enough, else it goes with the tensor and counts as allocated.
* Where none is, a new segment is reserved; with expandable segments, the one segment of the pool grows by pages.
* A block that is freed joins free neighbours. What is free as a whole goes back to the device only when that is full.

Addresses of new segments are assumed to rise. Left out: garbage collection by age, and that a free block before
unmapped pages counts with these for the best fit, which can matter only after a device was full.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, insort

MIB = 2**20
MIN_BLOCK_BYTES = 512
"""``kMinBlockSize``: every size is a multiple of it."""
SMALL_SIZE_BYTES = MIB
"""``kSmallSize``: the largest request of the small pool, and the largest remainder that a large block keeps."""
SMALL_BUFFER_BYTES = 2 * MIB
"""``kSmallBuffer``: a segment, or a page, of the small pool."""
LARGE_SEGMENT_BYTES = 20 * MIB
"""``large_segment_size``: a segment for requests below ``kMinLargeAlloc``, or a page, of the large pool."""
MIN_LARGE_ALLOC_BYTES = 10 * MIB
"""``kMinLargeAlloc``: from here on, a request gets a segment of its own size."""
ROUND_LARGE_BYTES = 2 * MIB
"""``kRoundLarge``: such a segment is a multiple of it."""
MAX_NON_SPLIT_ROUNDING_BYTES = 20 * MIB
"""``max_non_split_rounding_size``: how much larger than an oversize request a free block may be."""

ADDRESS_BITS = 50
"""Free blocks are sorted as size and address in one integer."""
ADDRESS_MASK = (1 << ADDRESS_BITS) - 1


def round_size(size_bytes: int, divisions: int = 1) -> int:
    """The size of the block that a request asks for (``round_size``, ``roundup_power2_next_division``)."""
    if divisions > 1 and size_bytes > MIN_BLOCK_BYTES * divisions:
        floor = 1 << (size_bytes.bit_length() - 1)
        return _ceiling(size_bytes, floor // divisions)
    return _ceiling(max(size_bytes, 1), MIN_BLOCK_BYTES)


def allocation_size(size_bytes: int) -> int:
    """The size of the segment that is reserved for a rounded request (``get_allocation_size``)."""
    if size_bytes <= SMALL_SIZE_BYTES:
        return SMALL_BUFFER_BYTES
    if size_bytes < MIN_LARGE_ALLOC_BYTES:
        return LARGE_SEGMENT_BYTES
    return _ceiling(size_bytes, ROUND_LARGE_BYTES)


def _ceiling(size_bytes: int, step: int) -> int:
    return -(-size_bytes // step) * step


Held = tuple["Pool", int, int, int]
"""A block in use: its pool, address, size, and the bytes that were asked for."""
Layout = tuple[int, tuple[int, ...]]
"""Where the addresses of a pool end, and its free blocks as sorted."""


class Pool(ABC):
    """Free blocks of one stream and size class."""

    def __init__(self, small: bool, max_split_bytes: int | None) -> None:
        self.small = small
        self.max_split: float = math.inf if max_split_bytes is None else max_split_bytes
        self.free: list[int] = []
        """Size and address of each, sorted."""
        self.sizes: dict[int, int] = {}
        """Of each by its address."""
        self.starts: dict[int, int] = {}
        """The address of each by its end."""
        self.end = -1
        """Where the last block in use ends, if what is behind it is no block but free all the same."""

    def release(self, address: int, size: int) -> None:
        """Make free, together with free neighbours."""
        free, sizes, starts = self.free, self.sizes, self.starts
        end = address + size
        if end in sizes:
            more = sizes.pop(end)
            del free[bisect_left(free, more << ADDRESS_BITS | end)]
            end += more
        if address in starts:
            before = starts.pop(address)
            del free[bisect_left(free, sizes.pop(before) << ADDRESS_BITS | before)]
            address = before
        if end == self.end:
            self.end = address
            return
        sizes[address] = size = end - address
        starts[end] = address
        insort(free, size << ADDRESS_BITS | address)

    @abstractmethod
    def fit(self, size: int, requested_bytes: int) -> Held | None:
        """A block for a request rounded to *size* from the best free one; None if none fits."""

    @abstractmethod
    def needed(self, size: int) -> int:
        """Bytes to reserve for a request that no free block serves."""

    @abstractmethod
    def grow(self, size: int, reserved: int, requested_bytes: int) -> Held:
        """The same as :meth:`fit`, once *reserved* bytes more are there."""

    @abstractmethod
    def release_oversize(self, size: int) -> int:
        """Give free oversize blocks back to the device until a request fits; the bytes that went."""

    @abstractmethod
    def release_cached(self) -> int:
        """Give everything back to the device that is free as a whole; the bytes that went."""

    @abstractmethod
    def layout(self) -> Layout:
        """All that decides about requests to come while the device is not full."""

    def restore(self, layout: Layout) -> None:
        """Make it what it was when :meth:`layout` said this, no segment having come or gone since."""
        self.free = list(layout[1])
        self.sizes = {key & ADDRESS_MASK: key >> ADDRESS_BITS for key in self.free}
        self.starts = {address + size: address for address, size in self.sizes.items()}

    def _add(self, address: int, size: int) -> None:
        insort(self.free, size << ADDRESS_BITS | address)
        self.sizes[address] = size
        self.starts[address + size] = address

    def _remove(self, address: int) -> int:
        size = self.sizes.pop(address)
        del self.starts[address + size]
        del self.free[bisect_left(self.free, size << ADDRESS_BITS | address)]
        return size

    def _cut(self, index: int, size: int) -> int:
        """Take the first *size* bytes of the free block at *index* of the sorted list; its address."""
        free, sizes = self.free, self.sizes
        address = free.pop(index) & ADDRESS_MASK
        rest, left = address + size, sizes.pop(address) - size
        if left:
            sizes[rest] = left
            self.starts[rest + left] = rest
            insort(free, left << ADDRESS_BITS | rest)
        else:
            del self.starts[rest]
        return address


class SegmentPool(Pool):
    """Segments of fixed size, made when nothing fits (``cudaMalloc``)."""

    def __init__(self, small: bool, max_split_bytes: int | None) -> None:
        super().__init__(small, max_split_bytes)
        self.segments: dict[int, int] = {}
        """Sizes by address; one never touches the next, so that blocks of two cannot join."""
        self.top = 0

    def fit(self, size: int, requested_bytes: int) -> Held | None:
        index = bisect_left(self.free, size << ADDRESS_BITS)
        if index == len(self.free):
            return None
        whole = self.free[index] >> ADDRESS_BITS
        if size < self.max_split <= whole:
            return None
        if size >= self.max_split and whole >= size + MAX_NON_SPLIT_ROUNDING_BYTES:
            return None
        return self._split(index, size, requested_bytes)

    def _split(self, index: int, size: int, requested_bytes: int) -> Held:
        """The first part of a free block, or all of it where the rest would be too small (``should_split``)."""
        whole = self.free[index] >> ADDRESS_BITS
        rest = whole - size
        splits = rest >= MIN_BLOCK_BYTES if self.small else size < self.max_split and rest > SMALL_SIZE_BYTES
        taken = size if splits else whole
        return self, self._cut(index, taken), taken, requested_bytes

    def needed(self, size: int) -> int:
        return allocation_size(size)

    def grow(self, size: int, reserved: int, requested_bytes: int) -> Held:
        address = self.top
        self.top += reserved + ROUND_LARGE_BYTES
        self.segments[address] = reserved
        self._add(address, reserved)
        return self._split(bisect_left(self.free, reserved << ADDRESS_BITS | address), size, requested_bytes)

    def release_oversize(self, size: int) -> int:
        wanted = max(size, int(self.max_split))
        index = bisect_left(self.free, wanted << ADDRESS_BITS)
        if index < len(self.free):
            return self._release_segment(self.free[index] & ADDRESS_MASK)
        released = 0
        for key in reversed(self.free.copy()):
            if released >= wanted or key >> ADDRESS_BITS < self.max_split:
                break
            released += self._release_segment(key & ADDRESS_MASK)
        return released

    def release_cached(self) -> int:
        return sum(self._release_segment(address) for address in list(self.sizes))

    def _release_segment(self, address: int) -> int:
        """Give the segment at *address* back if it is free as a whole."""
        if self.segments.get(address) != self.sizes[address]:
            return 0
        del self.segments[address]
        return self._remove(address)

    def layout(self) -> Layout:
        return self.top, tuple(self.free)


class ExpandablePool(Pool):
    """One segment of virtual addresses, to which pages are mapped where nothing fits.

    Splits are exact, since all sizes are multiples of the least remainder. The free end of the segment serves only
    what no other block does: for the best fit it counts with all the addresses behind it (``expandable_size``).
    """

    def __init__(self, small: bool, max_split_bytes: int | None) -> None:
        super().__init__(small, max_split_bytes)
        self.page = SMALL_BUFFER_BYTES if small else LARGE_SEGMENT_BYTES
        self.end = 0
        self.mapped_end = 0
        self.unmapped: dict[int, int] = {}
        """Sizes of ranges before the end whose pages went back to the device, by address."""

    def fit(self, size: int, requested_bytes: int) -> Held | None:
        free = self.free
        index = bisect_left(free, size << ADDRESS_BITS)
        if index < len(free):
            return self, self._cut(index, size), size, requested_bytes
        address = self.end
        if address + size > self.mapped_end:
            return None
        self.end = address + size
        return self, address, size, requested_bytes

    def needed(self, size: int) -> int:
        found = self._room(size)
        if found is None:
            return max(0, _ceiling(self.end + size, self.page) - self.mapped_end)
        return sum(length for _, length in self._pages(found, size))

    def grow(self, size: int, reserved: int, requested_bytes: int) -> Held:
        found = self._room(size)
        if found is None:
            self.mapped_end += reserved
            self.end += size
            return self, self.end - size, size, requested_bytes
        for start, length in self._pages(found, size):
            rest = self.unmapped.pop(start) - length
            if rest:
                self.unmapped[start + length] = rest
            self.release(start, length)
        if found == self.end:
            self.end += size
        else:
            self._cut(bisect_left(self.free, self.sizes[found] << ADDRESS_BITS | found), size)
        return self, found, size, requested_bytes

    def _room(self, size: int) -> int | None:
        """The first free address from which free and unmapped ranges have room (``find_expandable_block``)."""
        for start in sorted(self.unmapped):
            low = high = self.starts.get(start, start)
            while high - low < size and (length := self.unmapped.get(high) or self.sizes.get(high)):
                high += length
            if high - low >= size:
                return low
        return None

    def _pages(self, address: int, size: int) -> list[tuple[int, int]]:
        """The ranges of whole pages to map for *size* bytes from *address* on."""
        return [
            (start, min(length, _ceiling(address + size - start, self.page)))
            for start, length in sorted(self.unmapped.items())
            if address <= start < address + size
        ]

    def release_oversize(self, size: int) -> int:
        return 0

    def release_cached(self) -> int:
        mapped = _ceiling(self.end, self.page)
        released, self.mapped_end = self.mapped_end - mapped, mapped
        for address, size in list(self.sizes.items()):
            low, high = _ceiling(address, self.page), (address + size) // self.page * self.page
            if low >= high:
                continue
            self._remove(address)
            if address < low:
                self._add(address, low - address)
            if high < address + size:
                self._add(high, address + size - high)
            self._unmap(low, high - low)
            released += high - low
        return released

    def _unmap(self, start: int, length: int) -> None:
        """Note that pages went, together with neighbours that went before."""
        length += self.unmapped.pop(start + length, 0)
        before = next((low for low, size in self.unmapped.items() if low + size == start), start)
        self.unmapped[before] = self.unmapped.get(before, 0) + length

    def layout(self) -> Layout:
        return self.end, tuple(self.free)

    def restore(self, layout: Layout) -> None:
        super().restore(layout)
        self.end = layout[0]
