"""Which of ZeRO-3's weights are whole at each module call (deepspeed 0.19.8, zero/partitioned_param_coordinator.py).

From the second pass on, DeepSpeed knows the order in which modules run, forward and backward. At every module call it
gathers what the module needs, then prefetches what comes next until so many elements are whole; at its end it frees
what is not needed again soon. :func:`gathered` runs these rules over the calls of one micro-step. It counts elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple


class Call(NamedTuple):
    """A module call: which tensors it touches, by number."""

    tensors: tuple[int, ...] = ()
    """Those that the module itself owns; of a leaf, all beneath it."""
    beneath: tuple[int, ...] = ()
    """Those of the module and of all within it."""
    is_leaf: bool = False
    """DeepSpeed takes the module for one, and does not see what is within it (``z3_leaf_module``)."""


class Limits(NamedTuple):
    """DeepSpeed's settings, in elements."""

    prefetch_bucket: int
    max_live: int
    max_reuse: int
    persistence_threshold: int


class Buffers(NamedTuple):
    """What an element takes on its way to a whole tensor, in elements of the format that the model computes in."""

    arrives: float = 1
    """In the buffer of the all-gather."""
    opened: float = 0
    """Beside it once it has arrived, if it came with other tensors, until the last of these is there."""
    cast: float = 0
    """While one tensor is turned into its own format."""
    copied: bool = False
    """Whether a tensor that came alone is copied from the buffer, too."""
    apart: bool = False
    """Whether what has been freed before is gathered apart from what has not: under hpZ, over other ranks."""


PLAIN = Buffers()


class Level(NamedTuple):
    """Elements held for gathered weights, buffers of coalesced gathers among them."""

    peak: float
    """The most while the call's own tensors and the next ones are gathered."""
    running: float
    """While the module runs."""
    after: float
    """Once the module has ended."""
    freed: tuple[int, ...]
    """The tensors that it frees as it ends."""


class _Gather:
    """One all-gather. Several tensors arrive in a flat buffer, from which each is copied when the first is needed."""

    def __init__(self, tensors: Sequence[int], buffers: Buffers) -> None:
        self.waiting = set(tensors)
        self.copies = len(tensors) > 1 or buffers.copied
        self.opened = buffers.opened if len(tensors) > 1 else 0
        self.tensors = tuple(tensors)
        self.copied = False


class _Coordinator:
    """The state of one pass."""

    def __init__(
        self, calls: Sequence[Call], sizes: Sequence[int], limits: Limits, small_are_whole: bool, buffers: Buffers
    ) -> None:
        self.calls, self.sizes, self.limits, self.buffers = calls, sizes, limits, buffers
        self.persists = [size <= limits.persistence_threshold for size in sizes]
        self.queue = [(tensor, at) for at, call in enumerate(calls) for tensor in sorted(call.tensors)]
        self.head = 0
        self.last_fetch_for = [-1] * len(sizes)
        self.in_flight: dict[int, _Gather] = {}
        self.whole = {tensor for tensor, stays in enumerate(self.persists) if stays and small_are_whole}
        self.freed: set[int] = set()
        self.available = 0
        self.held: float = 0
        self.most: float = 0
        self.passed = [0]
        self.uses: list[list[int]] = [[] for _ in sizes]
        for at, call in enumerate(calls):
            owned = () if call.is_leaf else call.tensors
            self.passed.append(self.passed[-1] + sum(sizes[tensor] for tensor in owned))
            for tensor in owned:
                self.uses[tensor].append(at)

    def gather(self, tensors: Iterable[int]) -> None:
        missing = [tensor for tensor in tensors if tensor not in self.whole and tensor not in self.in_flight]
        if not missing:
            return
        again = [tensor for tensor in missing if tensor in self.freed]
        parts = [again, [tensor for tensor in missing if tensor not in self.freed]]
        for part in filter(None, parts if self.buffers.apart else [missing]):
            started = _Gather(part, self.buffers)
            for tensor in part:
                self.in_flight[tensor] = started
                self.available += self.sizes[tensor]
                self._hold(self.sizes[tensor] * self.buffers.arrives)

    def wait(self, tensors: Iterable[int]) -> None:
        """Take *tensors* out of what is in flight.

        DeepSpeed goes through a set of them, in no order of its own: as a rule every buffer has been opened before
        the first is done with, and so it is here.
        """
        landed = [(tensor, self.in_flight.pop(tensor)) for tensor in tensors if tensor in self.in_flight]
        for _, started in landed:
            if not started.copied:
                started.copied = True
                self.whole.update(started.tensors)
                self._copy(started)
        for tensor, started in landed:
            started.waiting.discard(tensor)
            if started.copies and not started.waiting:
                taken = self.buffers.arrives + started.opened
                self._hold(-taken * sum(self.sizes[each] for each in started.tensors))

    def _copy(self, started: _Gather) -> None:
        """Make whole tensors of what a gather brought."""
        if not started.copies:
            return
        self._hold(started.opened * sum(self.sizes[each] for each in started.tensors))
        for tensor in started.tensors:
            self._hold(self.sizes[tensor] * (1 + self.buffers.cast))
            self._hold(-self.sizes[tensor] * self.buffers.cast)

    def dequeue(self, call: int) -> None:
        """Take the call's own tensors off the queue, unless a prefetch has."""
        left = {tensor for tensor in self.calls[call].tensors if self.last_fetch_for[tensor] < call}
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

    def to_release(self, call: int) -> tuple[int, ...]:
        """What is not used again soon, and was not passed over by the prefetch because it was there."""
        used_soon = self._used_soon_after_leaf if self.calls[call].is_leaf else self._used_soon
        return tuple(
            tensor
            for tensor in self.calls[call].tensors
            if not self.persists[tensor] and self.last_fetch_for[tensor] <= call + 1 and not used_soon(tensor, call)
        )

    def release(self, tensors: Iterable[int]) -> tuple[int, ...]:
        """Free those of *tensors* that are whole."""
        freed = tuple(tensor for tensor in tensors if tensor in self.whole and tensor not in self.in_flight)
        self.freed.update(freed)
        for tensor in freed:
            self.whole.discard(tensor)
            self.available -= self.sizes[tensor]
            self._hold(-self.sizes[tensor])
        return freed

    def _used_soon(self, tensor: int, call: int) -> bool:
        again = next((use for use in self.uses[tensor] if use > call), None)
        return again is not None and self.passed[again] - self.passed[call + 1] < self.limits.max_reuse

    def _used_soon_after_leaf(self, tensor: int, call: int) -> bool:
        """After a leaf, every module on the way counts with all within it, the outermost with the whole model."""
        passed = 0
        for each in self.calls[call + 1 :]:
            if passed >= self.limits.max_reuse:
                return False
            if tensor in each.beneath:
                return True
            passed += sum(self.sizes[other] for other in each.beneath)
        return False

    def _hold(self, elements: float) -> None:
        self.held += elements
        self.most = max(self.most, self.held)


def gathered(
    calls: tuple[Call, ...],
    sizes: tuple[int, ...],
    limits: Limits,
    small_come_late: bool = False,
    buffers: Buffers = PLAIN,
) -> tuple[Level, ...]:
    """The level at each of a micro-step's module *calls*. *sizes* are those of the tensors, in elements.

    What a call frees is decided in the first pass whose order is known, and kept for good (``__params_to_release`` is
    cached). That is the second micro-step. Small tensors, whole ever after, *small_come_late* where it is not the
    first of an optimizer step: they too are gathered in it, and what is prefetched then is another.

    Left out: the padding of each tensor to a multiple of the ranks.
    """
    levels, decided = _pass(calls, sizes, limits, buffers, True)
    if small_come_late and (then := _pass(calls, sizes, limits, buffers, False)[1]) != decided:
        return _pass(calls, sizes, limits, buffers, True, then)[0]
    return levels


Decided = tuple[tuple[int, ...], ...]
"""For each call the tensors to free."""


@lru_cache(maxsize=64)
def _pass(
    calls: tuple[Call, ...],
    sizes: tuple[int, ...],
    limits: Limits,
    buffers: Buffers,
    small_are_whole: bool,
    decided: Decided | None = None,
) -> tuple[tuple[Level, ...], Decided]:
    """The levels of one pass, and what each call decides to free, unless that was *decided* before."""
    state = _Coordinator(calls, sizes, limits, small_are_whole, buffers)
    found: list[Level] = []
    decisions: list[tuple[int, ...]] = []
    for at, call in enumerate(calls):
        state.most = state.held
        if call.tensors:
            state.gather(sorted(call.tensors))
            state.wait(call.tensors)
            state.dequeue(at)
        if limits.prefetch_bucket > 0:
            state.prefetch()
        peak, running = state.most, state.held
        decisions.append(state.to_release(at) if decided is None else decided[at])
        freed = state.release(decisions[at])
        found.append(Level(peak, running, state.held, freed))
    return tuple(found), tuple(decisions)
