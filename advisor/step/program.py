"""One training step as a small program of blocks, and two readings of it: fold and expand.

A :class:`Block` says what one stretch of the step does to one rank. Blocks stand in sequences and repeats, and
composition is associative, so a step of any depth folds in time that does not grow with the number of layers:

    then(a, b)    net = a.net + b.net      peak = max(a.peak, a.net + b.peak)
    repeat(a, n)  net = n·a.net            peak = max(a.peak, (n-1)·a.net + a.peak)

Every number may be an array: one fold then answers for many plans. :func:`fold` says how much, :func:`expand`
when and what, and both read the same tree; ``moves.py`` reads it a third time, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from advisor.errors import SpecError
from advisor.specs.plan import GroupName

if TYPE_CHECKING:
    from advisor.step.tape import Event

Amount = float | NDArray[Any]
"""A quantity, or the same quantity of many plans side by side."""

Category = Literal[
    "parameters",
    "gradients",
    "optimizer",
    "kv cache",
    "activations",
    "logits",
    "buffers",
    "temporaries",
    "workspace",
    "rounding",
]

FusedAttention = Literal["sdpa", "flash", "memory-efficient"]
"""A kernel that never writes the scores: the one torch chooses by itself, FlashAttention's package, or the one that
torch has for masks."""

CollectiveKind = Literal["all-reduce", "all-gather", "reduce-scatter", "broadcast", "all-to-all", "send-receive"]
CopyKind = Literal["host-to-device", "device-to-host", "nvme-to-host", "host-to-nvme"]


class Collective(NamedTuple):
    """A message between ranks. *payload_bytes* is the whole tensor, not a rank's share of it.

    Of a send-receive, it is what one rank sends to a neighbour in its group.
    """

    what: str
    kind: CollectiveKind
    payload_bytes: Amount
    messages: Amount
    """How many calls share the payload."""
    waits: bool
    """Whether the work after it cannot start before it ends; else the block that ``awaits`` it does, or where no block
    does, the end of the phase."""
    group: GroupName = "data"
    ahead: Amount = 0
    """How many parts of the model earlier, up to one, it may start where the work after it waits for it."""


class Copy(NamedTuple):
    """A transfer between a GPU and its host, or between the host and its NVMe."""

    what: str
    kind: CopyKind
    moved_bytes: Amount
    waits: bool
    ahead: Amount = 0
    """As a collective's."""


Transfer = Collective | Copy


@dataclass(frozen=True, slots=True, eq=False)
class Matmul:
    """*count* matrix products (m x k)(k x n); its work is 2·m·n·k each."""

    m: Amount
    n: Amount
    k: Amount
    count: Amount = 1
    kind: Literal["linear", "attention"] = "linear"
    flop_share: Amount = 1.0
    """Share of the work that is done, such as one half under a causal mask."""
    element_bytes: int = 2
    """Of each operand and the result."""
    fused: FusedAttention | None = None
    """The kernel that it is a part of; None where it is one by itself."""
    backward: bool = False
    """Whether that kernel computes gradients."""
    splits_keys: bool = False
    """Whether that kernel has few queries and so cuts its work along the keys."""
    matrix_bytes: Amount | None = None
    """Of its second operand in all, where that is held in fewer bits than the others."""

    @property
    def flop(self) -> Amount:
        return 2.0 * self.m * self.n * self.k * self.count * self.flop_share

    @property
    def operand_bytes(self) -> Amount:
        """What it reads and writes in device memory, each matrix once; a fused kernel never writes the scores."""
        if self.fused is not None:
            elements = smaller(self.n, self.k) * (self.m + larger(self.n, self.k))
        elif self.matrix_bytes is not None:
            return (self.m * self.k + self.m * self.n) * self.count * self.element_bytes + self.matrix_bytes
        else:
            elements = self.m * self.k + self.k * self.n + self.m * self.n
        return elements * self.count * self.element_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One stretch of the step on one rank.

    ``net_bytes`` is what it leaves behind when it ends, negative where it frees; ``peak_bytes`` the most it holds
    above its start while it runs. ``excess_category`` names what the peak holds beyond the net.
    """

    label: str
    category: Category
    net_bytes: Amount = 0
    peak_bytes: Amount = 0
    excess_category: Category = "temporaries"
    matmuls: tuple[Matmul, ...] = ()
    moved_bytes: Amount = 0
    """Bytes that its kernels read and write in device memory, the operands of its products among them."""
    kernels: int = 0
    """How many kernels it launches."""
    transfers: tuple[Transfer, ...] = ()
    awaits: str = ""
    """What was sent before and has to be there when the block begins; nothing if empty."""
    host_updated_parameters: Amount = 0
    """Parameters that an optimizer on the CPU updates."""
    events: tuple[Event, ...] = ()
    """What net and peak were recorded as, for one sequence or for any number; empty where that is not known."""
    sequences: Amount = 1
    """How often each of the events' sizes counts."""

    @property
    def is_idle(self) -> bool:
        """Whether it gives neither a GPU nor a CPU anything to compute, as most blocks; arrays are not looked into."""
        return not (
            self.matmuls
            or not _is_none(self.moved_bytes)
            or not _is_none(self.kernels)
            or not _is_none(self.host_updated_parameters)
        )


def _is_none(amount: Amount) -> bool:
    """Whether *amount* is a plain zero."""
    return isinstance(amount, int) and amount == 0


Known = dict[Callable[..., Any], Any]
"""What a node was found to be, by the reading (:func:`read_once`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """Steps one after another. A named sequence is a phase of the timeline."""

    steps: tuple[Node, ...]
    phase: str | None = None
    read: Known = field(default_factory=dict, init=False, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Repeat:
    """*body*, *times* times in a row."""

    body: Node
    times: Amount
    read: Known = field(default_factory=dict, init=False, repr=False)


Node = Block | Sequence | Repeat


def hold(label: str, category: Category, size_bytes: Amount) -> Block:
    """Allocate and keep."""
    return Block(label, category, net_bytes=size_bytes, peak_bytes=size_bytes)


def release(label: str, category: Category, size_bytes: Amount) -> Block:
    """Free what :func:`hold` took under the same label."""
    return Block(label, category, net_bytes=-size_bytes)


def released(held: Block) -> Block:
    """The counterpart of a block that :func:`hold` made."""
    return release(held.label, held.category, held.net_bytes)


def scratch(label: str, size_bytes: Amount, category: Category = "temporaries") -> Block:
    """Allocate and free again."""
    return Block(label, category, peak_bytes=size_bytes, excess_category=category)


NOTHING = Block("nothing", "temporaries")


def then(*steps: Node) -> Sequence:
    return Sequence(steps)


def phase(name: str, *steps: Node) -> Sequence:
    return Sequence(steps, name)


def repeat(body: Node, times: Amount) -> Repeat:
    if times < 0 if isinstance(times, int) else np.any(np.asarray(times) < 0):
        raise SpecError(f"a block cannot repeat {times} times")
    return Repeat(body, times)


class Extent(NamedTuple):
    """How much memory a stretch of the program leaves and takes, relative to its start."""

    net_bytes: Amount
    peak_bytes: Amount


EMPTY = Extent(0, 0)


Reading = TypeVar("Reading")


def read_once(reading: Callable[[Node], Reading]) -> Callable[[Node], Reading]:
    """*reading*, taken once of each sequence and each repeat, at however many places it stands."""

    @wraps(reading)
    def read(node: Node) -> Reading:
        if isinstance(node, Block):
            return reading(node)
        if reading not in node.read:
            node.read[reading] = reading(node)
        found: Reading = node.read[reading]
        return found

    return read


@read_once
def fold(node: Node) -> Extent:
    """Net and peak of *node* without unrolling its repeats."""
    if isinstance(node, Block):
        return Extent(node.net_bytes, node.peak_bytes)
    return _fold_steps(node) if isinstance(node, Sequence) else _fold_repeat(node)


def _fold_steps(node: Sequence) -> Extent:
    net: Amount = 0
    peak: Amount = 0
    for step in node.steps:
        # Most steps are blocks, which say it themselves.
        extent = step if isinstance(step, Block) else fold(step)
        peak = larger(peak, net + extent.peak_bytes)
        net = net + extent.net_bytes
    return Extent(net, peak)


def _fold_repeat(node: Repeat) -> Extent:
    once = fold(node.body)
    last = (node.times - 1) * once.net_bytes + once.peak_bytes
    peak = larger(once.peak_bytes, last)
    if isinstance(node.times, int):
        return Extent(node.times * once.net_bytes, peak) if node.times else EMPTY
    return Extent(node.times * once.net_bytes, np.where(np.asarray(node.times) > 0, peak, 0))


class Moment(NamedTuple):
    """One block of the unrolled program, with what was held when it began."""

    phase: str
    block: Block
    before_bytes: Amount


def expand(node: Node) -> Iterator[Moment]:
    """The blocks of *node* in the order in which they run, repeats unrolled. For single plans, not arrays."""
    held: Amount = 0
    for name, block in _unroll(node, ""):
        yield Moment(name, block, held)
        held = held + block.net_bytes


class Line(NamedTuple):
    """One entry of a ledger."""

    category: Category
    label: str
    size_bytes: int


class Peak(NamedTuple):
    """The moment at which most is held, and what that is."""

    phase: str
    label: str
    size_bytes: int
    ledger: tuple[Line, ...]


Ledger = dict[tuple[Category, str], int]


def peak_of(node: Node) -> Peak:
    """The first moment at which *node*, for a single plan, holds most, with the ledger of that moment."""
    held: Ledger = {}
    name, before = "", 0
    while not isinstance(node, Block):
        if isinstance(node, Sequence):
            name = node.phase or name
            node, passed, times = _step_with_peak(node)
        elif not int(node.times):
            node, passed, times = NOTHING, (), 0
        else:
            grows = fold(node.body).net_bytes > 0
            times = int(node.times) - 1 if grows else 0
            passed = (node.body,)
            node = node.body
        before += times * sum(int(fold(each).net_bytes) for each in passed)
        for each in passed:
            _add_nets(held, each, times)
    kept = max(int(node.net_bytes), 0)
    for category, size in ((node.category, kept), (node.excess_category, int(node.peak_bytes) - kept)):
        held[category, node.label] = held.get((category, node.label), 0) + size
    lines = tuple(Line(*key, size) for key, size in held.items() if size)
    return Peak(name, node.label, before + int(node.peak_bytes), lines)


def held_after(node: Node) -> tuple[Line, ...]:
    """What *node*, for a single plan, leaves behind, by category and label."""
    held: Ledger = {}
    _add_nets(held, node, 1)
    return tuple(Line(*key, size) for key, size in held.items() if size)


def _step_with_peak(sequence: Sequence) -> tuple[Node, tuple[Node, ...], int]:
    """The step of *sequence* that holds the peak, and the steps passed on the way to it."""
    if not sequence.steps:
        return NOTHING, (), 0
    before, best, chosen = 0, -1, 0
    for index, step in enumerate(sequence.steps):
        extent = fold(step)
        if before + int(extent.peak_bytes) > best:
            best, chosen = before + int(extent.peak_bytes), index
        before += int(extent.net_bytes)
    return sequence.steps[chosen], sequence.steps[:chosen], 1


def _add_nets(held: Ledger, node: Node, times: int) -> None:
    for key, net in _nets(node).items():
        held[key] = held.get(key, 0) + times * net


@read_once
def _nets(node: Node) -> Ledger:
    """What *node*, for a single plan, leaves of each category and label."""
    if isinstance(node, Block):
        return {(node.category, node.label): int(node.net_bytes)}
    nets: Ledger = {}
    if isinstance(node, Sequence):
        for step in node.steps:
            _add_nets(nets, step, 1)
    else:
        _add_nets(nets, node.body, int(node.times))
    return nets


def phase_peaks(node: Node) -> dict[str, tuple[Amount, Amount]]:
    """For each phase of a single plan in order: the most held while it runs, and what is held when it ends.

    A phase inside a repeat counts its first and its last run, between which every other lies; phases do not nest.
    """
    found: dict[str, tuple[Amount, Amount]] = {}

    def visit(part: Node, before: Amount) -> None:
        if isinstance(part, Repeat):
            if np.any(np.asarray(part.times) > 0):
                visit(part.body, before)
                visit(part.body, before + (np.maximum(part.times, 1) - 1) * fold(part.body).net_bytes)
        elif isinstance(part, Sequence) and part.phase is not None:
            extent = fold(part)
            peak, end = before + extent.peak_bytes, before + extent.net_bytes
            earlier = found.get(part.phase)
            found[part.phase] = (peak if earlier is None else larger(earlier[0], peak), end)
        elif isinstance(part, Sequence):
            for step in part.steps:
                visit(step, before)
                before = before + fold(step).net_bytes

    visit(node, 0)
    return found


def blocks(node: Node) -> Iterator[tuple[str, Block, Amount]]:
    """Each distinct block with the innermost phase it belongs to and how often it runs."""
    yield from _counted(node, "", 1)


def _counted(node: Node, name: str, times: Amount) -> Iterator[tuple[str, Block, Amount]]:
    if isinstance(node, Block):
        yield name, node, times
    elif isinstance(node, Sequence):
        for step in node.steps:
            yield from _counted(step, node.phase or name, times)
    else:
        yield from _counted(node.body, name, times * node.times)


def _unroll(node: Node, name: str) -> Iterator[tuple[str, Block]]:
    if isinstance(node, Block):
        yield name, node
    elif isinstance(node, Sequence):
        for step in node.steps:
            yield from _unroll(step, node.phase or name)
    else:
        for _ in range(int(node.times)):
            yield from _unroll(node.body, name)


def larger(first: Amount, second: Amount) -> Amount:
    """Of each plan's two amounts the larger."""
    if isinstance(first, int | float) and isinstance(second, int | float):
        return first if first > second else second
    return np.maximum(first, second)


def smaller(first: Amount, second: Amount) -> Amount:
    """Of each plan's two amounts the smaller."""
    if isinstance(first, int | float) and isinstance(second, int | float):
        return first if first < second else second
    return np.minimum(first, second)


def without(node: Node, category: Category) -> Node:
    """*node* with nothing of *category* in memory. A part that stands at several places stays one part."""
    return _without(node, category, {})


def _without(node: Node, category: Category, known: dict[int, Node]) -> Node:
    if id(node) not in known:
        if isinstance(node, Sequence):
            known[id(node)] = Sequence(tuple(_without(step, category, known) for step in node.steps), node.phase)
        elif isinstance(node, Repeat):
            known[id(node)] = Repeat(_without(node.body, category, known), node.times)
        else:
            known[id(node)] = replace(node, net_bytes=0, peak_bytes=0) if node.category == category else node
    return known[id(node)]


def total(amounts: Iterable[Amount]) -> Amount:
    """The sum of *amounts*, which may be arrays."""
    return sum(amounts, 0)
