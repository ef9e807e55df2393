"""A step program replayed through PyTorch's allocator: from loading to the end of the second step.

A phase, or a round of several, that begins in a state in which it began before is not gone through again: the allocator
depends on nothing else, so this only saves time. Equal layers get no such shortcut, because their tensors come to lie
otherwise in the gaps of each. Adam's moments are there from the start, as in every step but a run's first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from advisor.cost.allocator import Allocator, AllocatorLayout, Reserved, Settings
from advisor.cost.pools import Held
from advisor.errors import SpecError
from advisor.step.build import StepProgram
from advisor.step.moves import Move, Moves, Name, Rounds, moves
from advisor.step.program import repeat, then

STEPS = 2
"""A run's second step starts from what the first has left behind."""

Act = Callable[[], None]
"""Makes a move, with the allocator and the tensors that it is about."""


def replayed(program: StepProgram, settings: Settings, *, whole: bool = False) -> Reserved:
    """What the allocator counts over :attr:`StepProgram.init` and two steps of a single plan.

    *whole* goes through everything, even where the outcome is known. Raises OutOfMemoryError where the settings'
    capacity does not suffice, SpecError where a program gives back what it did not take.
    """
    replay = _Replay(settings, remembers=not whole and settings.capacity_bytes is None)
    for act in replay.acts(moves(program, then(program.init, repeat(program.step, STEPS)))):
        act()
    return replay.allocator.counted()


_State = tuple[AllocatorLayout, tuple[tuple[Held, ...], ...]]
"""All that decides what comes next: the allocator, and the tensors of every name."""


class _Replay:
    """An allocator, and the tensors of every name, the newest last."""

    def __init__(self, settings: Settings, *, remembers: bool) -> None:
        self.allocator = Allocator(settings)
        self.remembers = remembers
        self.held: dict[Name, list[Held]] = {}
        self.known: dict[int, Act] = {}
        """By the identity of a move, all of which are there while they are bound."""

    def acts(self, parts: tuple[Moves, ...]) -> list[Act]:
        """*parts* as they are made; one that stands at several places becomes one act."""
        for key, part in dict(zip(map(id, parts), parts, strict=True)).items():
            if key not in self.known:
                self.known[key] = self._act(part)
        return list(map(self.known.__getitem__, map(id, parts)))

    def _act(self, part: Moves) -> Act:
        if isinstance(part, Rounds):
            acts, times = self.acts(part.body), part.times
            if not self.remembers:
                return partial(_go_through, acts, times)
            if all(isinstance(each, Move) for each in part.body):
                acts, times = [partial(_go_through, acts, times)], 1
            return partial(self._go_through_new, acts, times, [])
        held, place = self._all_of(part.name), -1 - part.newer
        if part.kind == "take":
            return self._take(part, held)
        if part.kind == "give":
            free = self.allocator.free
            return lambda: free(held.pop(place))
        if part.kind == "keep":
            to = self._all_of(part.to)
            return lambda: to.append(held.pop(place))
        return partial(self._give_bytes, part, held)

    def _all_of(self, name: Name) -> list[Held]:
        return self.held.setdefault(name, [])

    def _take(self, move: Move, held: list[Held]) -> Act:
        allocate, size_bytes = self.allocator.allocate_rounded, move.size_bytes
        pool, size = self.allocator.placed(size_bytes, self.allocator.pools_of(move.stream))
        return lambda: held.append(allocate(pool, size, size_bytes))

    def _give_bytes(self, move: Move, held: list[Held]) -> None:
        left = move.size_bytes
        while left > 0:
            if not held:
                raise SpecError(f"the step gives back {left} bytes more of {move.name!r} than it took")
            tensor = held.pop()
            self.allocator.free(tensor)
            left -= tensor[3]
        if left < 0:
            held.append(self.allocator.allocate(-left, self.allocator.pools_of(move.stream)))

    def _go_through_new(self, acts: list[Act], times: int, outcomes: list[tuple[_State, _State]]) -> None:
        """Those rounds that begin otherwise than any before. Where one ends as it began, so would all that follow."""
        before = self._state()
        for _ in range(times):
            after = next((end for start, end in outcomes if start == before), None)
            if after is None:
                _go_through(acts, 1)
                after = self._state()
                outcomes.append((before, after))
            else:
                self._restore(after)
            if after == before:
                break
            before = after

    def _state(self) -> _State:
        return self.allocator.layout(), tuple(map(tuple, self.held.values()))

    def _restore(self, state: _State) -> None:
        """The peak stays: what leads to a state that was reached before was counted before."""
        layout, every = state
        self.allocator.restore(layout)
        for tensors, known in zip(self.held.values(), every, strict=True):
            tensors[:] = known


def _go_through(acts: list[Act], times: int) -> None:
    for _ in range(times):
        for act in acts:
            act()
