"""Which of ZeRO-3's weights are whole at each module call (deepspeed 0.19.8, zero/partitioned_param_coordinator.py).

From the second pass on, DeepSpeed knows the order in which modules run, forward and backward. At every module call it
gathers what the module needs, then prefetches what comes next until so many elements are whole; at its end it frees
what is not needed again soon. :func:`gathered` runs these rules over the calls of one micro-step. It counts elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple


class Limits(NamedTuple):
    """DeepSpeed's settings, in elements."""

    prefetch_bucket: int
    max_live: int
    max_reuse: int
    persistence_threshold: int


class Level(NamedTuple):
    """Elements held for gathered weights, buffers of coalesced gathers among them."""

    peak: int
    """The most while the call's own tensors and the next ones are gathered."""
    running: int
    """While the module runs."""
    after: int
    """Once the module has ended."""


class _Gather:
    """One all-gather. Several tensors arrive in a flat buffer, from which each is copied when the first is needed."""

    def __init__(self, tensors: Sequence[int]) -> None:
        self.waiting = set(tensors)
        self.several = len(tensors) > 1
        self.tensors = tuple(tensors)
        self.copied = False


class _Coordinator:
    """The state of one pass."""

    def __init__(self, calls: Sequence[tuple[int, ...]], sizes: Sequence[int], limits: Limits) -> None:
        self.calls, self.sizes, self.limits = calls, sizes, limits
        self.persists = [size <= limits.persistence_threshold for size in sizes]
        self.queue = [(tensor, call) for call, tensors in enumerate(calls) for tensor in sorted(tensors)]
        self.head = 0
        self.last_fetch_for = [-1] * len(sizes)
        self.in_flight: dict[int, _Gather] = {}
        self.whole = {tensor for tensor, stays in enumerate(self.persists) if stays}
        self.available = self.held = self.most = 0
        self.passed = [0]
        for tensors in calls:
            self.passed.append(self.passed[-1] + sum(sizes[tensor] for tensor in tensors))
        self.uses: list[list[int]] = [[] for _ in sizes]
        for call, tensors in enumerate(calls):
            for tensor in tensors:
                self.uses[tensor].append(call)

    def gather(self, tensors: Iterable[int]) -> None:
        missing = [tensor for tensor in tensors if tensor not in self.whole and tensor not in self.in_flight]
        if not missing:
            return
        started = _Gather(missing)
        for tensor in missing:
            self.in_flight[tensor] = started
            self.available += self.sizes[tensor]
            self._hold(self.sizes[tensor])

    def wait(self, tensor: int) -> None:
        started = self.in_flight.pop(tensor, None)
        if started is None:
            return
        if not started.copied:
            started.copied = True
            for each in started.tensors:
                self.whole.add(each)
                if started.several:
                    self._hold(self.sizes[each])
        started.waiting.discard(tensor)
        if started.several and not started.waiting:
            self._hold(-sum(self.sizes[each] for each in started.tensors))

    def dequeue(self, call: int) -> None:
        """Take the call's own tensors off the queue, unless a prefetch has."""
        left = {tensor for tensor in self.calls[call] if self.last_fetch_for[tensor] < call}
        while left and self.head < len(self.queue):
            tensor, used_at = self.queue[self.head]
            self.head += 1
            self.last_fetch_for[tensor] = used_at
            left.discard(tensor)

    def prefetch(self) -> None:
        room = min(self.limits.max_live - self.available, self.limits.prefetch_bucket)
        chosen: list[int] = []
        elements = 0
        while self.head < len(self.queue) and elements < room:
            tensor, used_at = self.queue[self.head]
            self.head += 1
            self.last_fetch_for[tensor] = max(self.last_fetch_for[tensor], used_at)
            if tensor not in self.whole and tensor not in self.in_flight and tensor not in chosen:
                chosen.append(tensor)
                elements += self.sizes[tensor]
        self.gather(chosen)

    def release(self, tensors: Iterable[int], call: int) -> None:
        """Free what is not used again soon, and was not passed over by the prefetch because it was there."""
        for tensor in tensors:
            if self.persists[tensor] or tensor not in self.whole or tensor in self.in_flight:
                continue
            again = next((use for use in self.uses[tensor] if use > call), None)
            soon = again is not None and self.passed[again] - self.passed[call + 1] < self.limits.max_reuse
            if soon or self.last_fetch_for[tensor] > call + 1:
                continue
            self.whole.discard(tensor)
            self.available -= self.sizes[tensor]
            self._hold(-self.sizes[tensor])

    def _hold(self, elements: int) -> None:
        self.held += elements
        self.most = max(self.most, self.held)


@lru_cache(maxsize=64)
def gathered(calls: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], limits: Limits) -> tuple[Level, ...]:
    """The level at each of *calls*, which list the tensors that each module call of a micro-step owns.

    Left out: the padding of each tensor to a multiple of the ranks.
    """
    state = _Coordinator(calls, sizes, limits)
    found: list[Level] = []
    for call, tensors in enumerate(calls):
        state.most = state.held
        state.gather(sorted(tensors))
        for tensor in tensors:
            state.wait(tensor)
        state.dequeue(call)
        if limits.prefetch_bucket > 0:
            state.prefetch()
        peak, running = state.most, state.held
        state.release(tensors, call)
        found.append(Level(peak, running, state.held))
    return tuple(found)
