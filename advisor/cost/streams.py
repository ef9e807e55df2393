"""When each stretch of a step runs: streams that wait for each other, played event by event.

A GPU computes on one stream; the messages of each group of ranks, and the copies in each direction, run on streams of
their own, each stream one thing after another; the process that launches kernels is one more. Every rule is a sum or a
maximum of times:

- *compute* runs when the kernels before it are done, when what it waits for is there, and when it was launched;
- a transfer that is *waited for* starts when compute reaches it, or up to ``ahead`` parts earlier where it is
  prefetched (torch 2.13, fsdp/_fully_shard/_fsdp_param_group.py: an all-gather starts once the one before was copied
  out);
- what a later block *awaits* starts when compute has reached it, in the order in which it was asked for;
- any other starts when compute has reached it, behind the gather that was prefetched meanwhile, and is done when the
  phase ends: DDP's buckets, reduce-scatters, copies of gradients to the host.

A repeat is not unrolled. It is played until its clocks would move on in its last run as they did in the one just
played: all between are the same then, as clocks that move at constant rates and are in order at both ends always are.

Left out: how early a bucket fills within a layer, and prefetching by more than one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from advisor.step.program import (
    Amount,
    Block,
    Collective,
    Node,
    Repeat,
    Sequence,
    Transfer,
    larger,
    read_once,
    smaller,
    then,
)

Cause = tuple[str, str]
"""What a transfer carries, and its kind."""

LAUNCHES: Cause = ("kernel launches", "")

JOINING_PHASES = ("backward", "step")
"""At whose end compute waits for all transfers."""
SAME_S = 1e-12
"""Below which two times are the same; a GPU's shortest kernels take a million times as long."""


class Loop(NamedTuple):
    """*items*, *times* times in a row."""

    items: tuple[Item, ...]
    times: Amount


class Await(NamedTuple):
    """What has to be there before the next item."""

    what: str


class End(NamedTuple):
    """The end of a phase, at which transfers have to be done."""


Item = Node | Transfer | Await | Loop | End
"""Nodes without transfers, transfers and waiting for them, repeats with those in them, and ends of phases."""


@read_once
def items(node: Node) -> tuple[Item, ...]:
    """What follows one another in *node*, outside of its init phase; of what is idle, nothing."""
    if isinstance(node, Block):
        return (*([Await(node.awaits)] if node.awaits else ()), *(() if node.is_idle else (node,)), *node.transfers)
    if isinstance(node, Repeat):
        inside = items(node.body)
        if not any(map(_stands_alone, inside)):
            return (node,) if inside else ()
        if isinstance(node.times, int) and node.times < 2:
            return inside * node.times
        return (Loop(inside, node.times),)
    if node.phase == "init":
        return ()
    found: list[Item] = []
    quiet: list[Node] = []
    for step in node.steps:
        if isinstance(step, Block) and not step.transfers and not step.awaits:
            if not step.is_idle:
                quiet.append(step)
            continue
        for each in items(step):
            if isinstance(each, Block | Sequence | Repeat):
                quiet.append(each)
                continue
            if quiet:
                found.append(then(*quiet))
                quiet = []
            found.append(each)
    joins = node.phase in JOINING_PHASES
    if quiet:
        # A stretch without transfers is an item itself, which other readings know already.
        found.append(then(*quiet) if found or joins else node)
    if joins:
        found.append(End())
    return tuple(found)


def _stands_alone(item: Item) -> bool:
    return not isinstance(item, Block | Sequence | Repeat)


class Costs(NamedTuple):
    """What the items of a program take on a machine."""

    busy_s: Callable[[Node], Amount]
    launch_s: Callable[[Node], Amount]
    """Time in which the process launches a node's kernels."""
    transfer_s: Callable[[Transfer], Amount]


def waits(node: Node, costs: Costs) -> dict[Cause, Amount]:
    """How long compute stands still while *node* runs once on an idle machine, by what it waits for."""
    of = (*items(node), End())
    score = _Score(costs, tuple(_leaves(of)))
    events = score.events(of)
    clocks: Clocks = [np.zeros(score.shape) if score.shape else 0.0] * score.rows
    _play(events, clocks)
    return {cause: clocks[row] for cause, row in score.causes.items()}


def _leaves(of: Iterable[Item]) -> Iterator[Item]:
    """The items that are no loops."""
    for item in of:
        if isinstance(item, Loop):
            yield from _leaves(item.items)
        else:
            yield item


def _stream(transfer: Transfer) -> str:
    return transfer.group if isinstance(transfer, Collective) else transfer.kind


def _cause(transfer: Transfer) -> Cause:
    return transfer.what, transfer.kind


Clocks = list[Amount]
"""Times, each of one plan or of every plan side by side. None is changed in place."""

COMPUTE, LAUNCHED, FIRST_ROW = 0, 1, 2
"""Rows: when compute is done with what it was given, and when the last kernel was launched; then those of streams."""


class Stream(NamedTuple):
    """Rows of a stream."""

    free: int
    """When it is done with what it carries."""
    part: int
    """When the part began whose gather it carried last."""
    ready: int
    """From when on it may carry what waits behind the next gather."""
    pending: int
    """How long that takes."""
    arrives: int
    """When what is awaited is there."""
    carried: int
    """How long that took by itself."""


Event = Callable[[Clocks], None]
"""Moves the clocks on."""


class _Score:
    """Turns the items of a program into events on the rows of its clocks."""

    def __init__(self, costs: Costs, leaves: tuple[Item, ...]) -> None:
        self.costs = costs
        transfers = [each for each in leaves if isinstance(each, Transfer)]
        awaited = {each.what for each in leaves if isinstance(each, Await)}
        self.awaited = {each.what: each for each in transfers if not each.waits and each.what in awaited}
        """By what it carries, one of the transfers that are awaited."""
        self.shape: tuple[int, ...] = ()
        self.streams: dict[str, Stream] = {}
        self.rows = FIRST_ROW
        for name in map(_stream, transfers):
            if name not in self.streams:
                self.streams[name] = Stream(*range(self.rows, self.rows + len(Stream._fields)))
                self.rows += len(Stream._fields)
        self.beside = {_stream(each): _cause(each) for each in transfers if not each.waits and each.what not in awaited}
        """For each stream, what runs on it that nothing waits for at once."""
        self.causes: dict[Cause, int] = {}
        """The row that sums up how long each was waited for."""
        self._loops: dict[int, tuple[Loop, Event]] = {}

    def events(self, of: Iterable[Item]) -> tuple[Event, ...]:
        found = map(self._event, of)
        return tuple(event for event in found if event is not None)

    def _event(self, item: Item) -> Event | None:
        if isinstance(item, Transfer):
            return self._transfer(item)
        if isinstance(item, Await):
            return self._await(item)
        if isinstance(item, Loop):
            return self._loop(item)
        if isinstance(item, End):
            running = [(self.streams[name], self._row(cause)) for name, cause in self.beside.items()]
            return _end(list(self.streams.values()), running)
        busy_s, launch_s = self._seen(self.costs.busy_s(item)), self._seen(self.costs.launch_s(item))
        if _is_zero(busy_s) and _is_zero(launch_s):
            return None
        return _run(busy_s, launch_s, self._row(LAUNCHES))

    def _loop(self, loop: Loop) -> Event:
        """One event for a loop that stands at several places."""
        if id(loop) not in self._loops:
            events = self.events(loop.items)
            self._loops[id(loop)] = loop, partial(_repeat, events, self._seen(loop.times))
        return self._loops[id(loop)][1]

    def _transfer(self, transfer: Transfer) -> Event | None:
        takes_s = self._seen(self.costs.transfer_s(transfer))
        if _is_zero(takes_s):
            return None
        stream = self.streams[_stream(transfer)]
        if transfer.waits:
            return _fetch(stream, takes_s, self._seen(transfer.ahead), *self._blamed(transfer))
        return _ask(stream, takes_s) if transfer.what in self.awaited else _send(stream, takes_s)

    def _await(self, item: Await) -> Event | None:
        sent = self.awaited.get(item.what)
        return None if sent is None else _await(self.streams[_stream(sent)], *self._blamed(sent))

    def _blamed(self, transfer: Transfer) -> tuple[int, int]:
        """What waiting for *transfer* is put down to: itself, and beyond that what runs beside it on its stream."""
        beside = self.beside.get(_stream(transfer), _cause(transfer))
        return self._row(_cause(transfer)), self._row(beside)

    def _row(self, cause: Cause) -> int:
        if cause not in self.causes:
            self.causes[cause] = self.rows
            self.rows += 1
        return self.causes[cause]

    def _seen(self, amount: Amount) -> Amount:
        """*amount*, a plain number where it is one number."""
        if not isinstance(amount, np.ndarray) or not amount.ndim:
            return float(amount)
        if amount.shape != self.shape:
            self.shape = np.broadcast_shapes(self.shape, amount.shape)
        return amount


def _run(busy_s: Amount, launch_s: Amount, launches: int) -> Event:
    def run(clocks: Clocks) -> None:
        launched = clocks[LAUNCHED] + launch_s
        done = clocks[COMPUTE] + busy_s
        ends = larger(done, launched)
        clocks[LAUNCHED], clocks[COMPUTE] = launched, ends
        clocks[launches] = clocks[launches] + (ends - done)

    return run


def _send(stream: Stream, takes_s: Amount) -> Event:
    """What nothing waits for now stands behind the next gather."""

    def send(clocks: Clocks) -> None:
        _carry_pending(clocks, stream)
        clocks[stream.ready], clocks[stream.pending] = clocks[COMPUTE], takes_s

    return _of_some(send, takes_s)


def _ask(stream: Stream, takes_s: Amount) -> Event:
    """What a later block awaits is carried in the order in which it was asked for."""

    def ask(clocks: Clocks) -> None:
        _carry_pending(clocks, stream)
        clocks[stream.free] = larger(clocks[stream.free], clocks[COMPUTE]) + takes_s
        clocks[stream.arrives], clocks[stream.carried] = clocks[stream.free], takes_s

    return _of_some(ask, takes_s)


def _await(stream: Stream, cause: int, beside: int) -> Event:
    def wait(clocks: Clocks) -> None:
        waited = larger(clocks[stream.arrives] - clocks[COMPUTE], 0.0)
        _blame(clocks, waited, clocks[stream.carried], cause, beside)
        clocks[COMPUTE] = clocks[COMPUTE] + waited

    return wait


def _fetch(stream: Stream, takes_s: Amount, ahead: Amount, cause: int, beside: int) -> Event:
    """What the work after it waits for."""
    in_order = _is_zero(ahead)

    def fetch(clocks: Clocks) -> None:
        if in_order:
            _carry_pending(clocks, stream)
        now = clocks[COMPUTE]
        starts = larger(clocks[stream.free], now - ahead * (now - clocks[stream.part]))
        clocks[stream.free] = starts + takes_s
        waited = larger(clocks[stream.free] - now, 0.0)
        _blame(clocks, waited, takes_s, cause, beside)
        clocks[COMPUTE] = clocks[stream.part] = now + waited
        if not in_order:
            _carry_pending(clocks, stream)

    return _of_some(fetch, takes_s)


def _of_some(event: Event, takes_s: Amount) -> Event:
    """*event* for those of the plans in which it takes any time; in the others it does not happen."""
    if not isinstance(takes_s, np.ndarray) or takes_s.all():
        return event
    happens = takes_s > 0

    def of_some(clocks: Clocks) -> None:
        before = clocks.copy()
        event(clocks)
        for row, was in enumerate(before):
            if clocks[row] is not was:
                clocks[row] = np.where(happens, clocks[row], was)

    return of_some


def _blame(clocks: Clocks, waited: Amount, takes_s: Amount, cause: int, beside: int) -> None:
    """Waiting longer than a transfer takes is put down to what ran before it."""
    own = smaller(waited, takes_s)
    clocks[cause] = clocks[cause] + own
    clocks[beside] = clocks[beside] + (waited - own)


def _carry_pending(clocks: Clocks, stream: Stream) -> None:
    pending = clocks[stream.pending]
    if _is_zero(pending):
        return
    ends = larger(clocks[stream.free], clocks[stream.ready]) + pending
    clocks[stream.free] = ends if isinstance(pending, float) else np.where(pending > 0, ends, clocks[stream.free])
    clocks[stream.pending] = 0.0


def _end(streams: list[Stream], running: list[tuple[Stream, int]]) -> Event:
    """Compute waits for what is *running*, given with its cause, and nothing is prefetched across."""

    def end(clocks: Clocks) -> None:
        for stream, cause in running:
            _carry_pending(clocks, stream)
            waited = larger(clocks[stream.free] - clocks[COMPUTE], 0.0)
            clocks[cause] = clocks[cause] + waited
            clocks[COMPUTE] = clocks[COMPUTE] + waited
        for stream in streams:
            clocks[stream.part] = clocks[COMPUTE]

    return end


def _play(events: tuple[Event, ...], clocks: Clocks) -> None:
    for event in events:
        event(clocks)


def _repeat(events: tuple[Event, ...], times: Amount, clocks: Clocks) -> None:
    """Plays *events* as often as each plan has it, in as few runs as show how the rest goes on."""
    left = times
    while np.any(left > 0):
        begun = clocks.copy()
        _play(events, clocks)
        more = larger(left - 1, 0.0)
        last = [was if now is was else was + more * (now - was) for was, now in zip(begun, clocks, strict=True)]
        ended = last.copy()
        _play(events, ended)
        rows = [row for row, was in enumerate(begun) if not was is clocks[row] is ended[row]]
        before, after, latest, end = (_stacked(each, rows) for each in (begun, clocks, last, ended))
        moved = after - before
        alike = np.abs(end - latest - moved) <= SAME_S * np.maximum(1, np.abs(end))
        settled = alike.all(axis=0) | (left <= 1)
        goes_on = np.where(settled, latest + np.minimum(left, 1) * moved, after)
        for row, moves_to in zip(rows, _plain(np.where(left > 0, goes_on, before)), strict=True):
            clocks[row] = moves_to
        left = np.where(settled, 0, left - 1)


def _stacked(clocks: Clocks, rows: list[int]) -> NDArray[np.float64]:
    found = np.empty((len(rows), *np.shape(clocks[COMPUTE])))
    for place, row in enumerate(rows):
        found[place] = clocks[row]
    return found


def _plain(rows: NDArray[np.float64]) -> Iterable[Amount]:
    """Each of *rows*, a plain number where it is one number."""
    found: Iterable[Amount] = rows.tolist() if rows.ndim == 1 else rows
    return found


def _is_zero(amount: Amount) -> bool:
    return isinstance(amount, float) and amount == 0
