"""A step program replayed through PyTorch's allocator: from loading to the end of the second step.

A phase, or a round of several, that begins in a state in which it or an equal one began before is not gone through
again: the allocator depends on nothing else, so this only saves time. Equal layers get no such shortcut, because their
tensors come to lie otherwise in the gaps of each. Adam's moments are there from the start, as in every step but a run's
first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import partial

from advisor.cost.allocator import Allocator, AllocatorLayout, OutOfMemoryError, Reserved, Settings
from advisor.cost.pools import Held
from advisor.errors import SpecError
from advisor.step.build import StepProgram
from advisor.step.moves import Move, Moves, Name, Rounds, moves
from advisor.step.program import repeat, then

STEPS = 2
"""A run's second step starts from what the first has left behind."""

Act = Callable[[], None]
"""Makes a move, with the allocator and the tensors that it is about."""


def replayed(
    program: StepProgram, settings: Settings, *, whole: bool = False, most_bytes: float = math.inf
) -> Reserved:
    """What the allocator counts over :attr:`StepProgram.init` and two steps of a single plan.

    *whole* goes through everything, even where the outcome is known. Raises OutOfMemoryError where the settings'
    capacity does not suffice or, seen at the end of a phase, more than *most_bytes* are reserved; SpecError where a
    program gives back what it did not take.
    """
    replay = _Replay(settings, remembers=not whole and settings.capacity_bytes is None, most_bytes=most_bytes)
    for act in replay.acts(moves(program, then(program.init, repeat(program.step, STEPS)))):
        act()
    return replay.allocator.counted()


_State = tuple[AllocatorLayout, tuple[tuple[Held, ...], ...]]
"""All that decides what comes next: the allocator, and the tensors of every name."""


class _Replay:
    """An allocator, and the tensors of every name, the newest last."""

    def __init__(self, settings: Settings, *, remembers: bool, most_bytes: float = math.inf) -> None:
        self.allocator = Allocator(settings)
        self.remembers = remembers
        self.most_bytes = most_bytes
        self.held: dict[Name, list[Held]] = {}
        self.known: dict[int, Act] = {}
        """By the identity of a move, all of which are there while they are bound."""
        self.equal: dict[Hashable, Act] = {}
        """By what a move is, or by the identities of the acts of a round."""

    def acts(self, parts: tuple[Moves, ...]) -> list[Act]:
        """*parts* as they are made; those that are equal, at whatever places, are one act."""
        for key, part in dict(zip(map(id, parts), parts, strict=True)).items():
            if key not in self.known:
                self.known[key] = self._act(part)
        return list(map(self.known.__getitem__, map(id, parts)))

    def _act(self, part: Moves) -> Act:
        if isinstance(part, Move):
            if part not in self.equal:
                self.equal[part] = self._move(part)
            return self.equal[part]
        acts = self.acts(part.body)
        key = (part.times, *map(id, acts))
        if key not in self.equal:
            self.equal[key] = self._rounds(acts, part)
        return self.equal[key]

    def _rounds(self, acts: list[Act], rounds: Rounds) -> Act:
        if not self.remembers:
            return partial(_go_through, acts, rounds.times)
        if all(isinstance(each, Move) for each in rounds.body):
            return partial(self._go_through_new, [partial(_go_through, acts, rounds.times)], 1, [])
        return partial(self._go_through_new, acts, rounds.times, [])

    def _move(self, move: Move) -> Act:
        held, place = self._all_of(move.name), -1 - move.newer
        if move.kind == "take":
            allocate, keep = self.allocator.request(move.size_bytes, self.allocator.pools_of(move.stream)), held.append
            return lambda: keep(allocate())
        if move.kind == "give":
            free, pick = self.allocator.free, held.pop
            return lambda: free(pick(place))
        if move.kind == "keep":
            to = self._all_of(move.to)
            return lambda: to.append(held.pop(place))
        return partial(self._give_bytes, move, held)

    def _all_of(self, name: Name) -> list[Held]:
        return self.held.setdefault(name, [])

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
                if self.allocator.reserved > self.most_bytes:
                    raise OutOfMemoryError(f"{self.allocator.reserved} bytes are reserved, beyond {self.most_bytes}")
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
