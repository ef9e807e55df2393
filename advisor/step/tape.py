"""Runs modelling code on tensors that have only a size, and records what happens to memory.

This is a small autograd engine. Operators (``operators.py``) take and return :class:`Tensor` values without
contents, and say which of them backward needs; modules (``layers.py``) call them in the order of the real code.
Lifetimes are Python's own: a tensor is freed when the last variable or graph node that refers to it goes, exactly
as PyTorch frees its storages. The record that comes out is what one sequence of a micro-batch allocates, frees and
computes; ``build.py`` turns it into blocks for any number of sequences.

The engine follows torch 2.13 (``torch/csrc/autograd/engine.cpp``): among the nodes that are ready, the one made
last runs first; two gradients of one tensor are summed in place; a node drops what it saved once it has run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from advisor.specs.cuts import WHOLE, SequenceCut
from advisor.specs.model import Parameter
from advisor.specs.plan import GroupName
from advisor.step.program import Category, Collective, CollectiveKind, Matmul
from advisor.step.rows import Rows


class Product(NamedTuple):
    """Matrix products of one sequence, and which of their fields grows with the micro-batch."""

    matmul: Matmul
    grows: Literal["m", "k", "count"] | None
    """None where it is the same for any micro-batch."""


class Work(NamedTuple):
    """What a stretch computes for one sequence."""

    products: tuple[Product, ...] = ()
    moved_bytes: int = 0
    fixed_moved_bytes: int = 0
    """Bytes moved whatever the micro-batch, such as a weight's."""
    kernels: int = 0
    touched: tuple[Touched, ...] = ()
    """The tensors among those bytes, once for every time that they are read or written."""
    sent: tuple[Collective, ...] = ()
    """Messages of one sequence, which the work after them waits for unless they say otherwise."""
    awaits: str = ""
    """What was sent before and has to be there when it begins; nothing if empty."""


class Touched(NamedTuple):
    """A tensor that a kernel reads or writes."""

    storage: int
    """The number of its memory on the tape."""
    size_bytes: int
    scales: bool
    """Whether that is per sequence."""


NO_WORK = Work()


CacheFormat = Literal["as computed", "fp8", "int8"]
"""In which format keys and values are held between passes."""


class Caching(NamedTuple):
    """What one forward pass of a model that generates finds in its cache of keys and values."""

    past: int
    """Tokens of each sequence that are in it."""
    as_prefilled: bool = True
    """Whether the pass before was that over the prompt, of which windowed layers then hold everything."""
    held: CacheFormat = "as computed"
    capacity: int | None = None
    """Tokens that memory is taken for with the first; None where it grows with every pass."""
    sequences: int = 1
    """Sequences in the batch, or as many as make a difference to the kernels that multiply few tokens."""


Scales = bool | Rows
"""Whether a size is per sequence of the micro-batch, or the same for any number of them; or of what it is per row."""


class Event(NamedTuple):
    """One thing that happens: memory taken or given back, work done, or a weight's gradient handed over."""

    kind: Literal["take", "give", "work", "gradient"]
    label: str
    category: Category
    size_bytes: int
    scales: Scales
    storage: int = -1
    """Which memory is taken or given back: its number on this tape."""
    work: Work = NO_WORK
    parameter: Parameter | None = None
    newer: int = 0
    """How many memories of the same number, taken later, stay when this one is given back."""


class _Storage:
    """Memory that is held for as long as something refers to this object."""

    __slots__ = ("event", "tape")

    def __init__(self, tape: Tape, label: str, category: Category, size_bytes: int, scales: Scales) -> None:
        self.tape = tape
        self.event = Event("take", label, category, size_bytes, scales, len(tape.events))
        tape.events.append(self.event)

    def __del__(self) -> None:
        self.tape.events.append(self.event._replace(kind="give"))

    def rename(self, label: str, category: Category) -> None:
        """Give this memory another name, from when it was taken on."""
        self.event = self.event._replace(label=label, category=category)
        self.tape.events[self.event.storage] = self.event


@dataclass(eq=False, slots=True)
class Weight:
    """A parameter as modelling code sees it: its tensor, in the format that the code finds it in."""

    parameter: Parameter
    element_bytes: int
    shape: tuple[int, ...] = ()
    """Its shape as (outputs, inputs), whichever way round it is stored."""
    cast: Tensor | None = None
    """Its autocast copy while a forward pass keeps one."""
    adapter: Adapter | None = None
    """The low-rank matrices beside it."""
    is_passed: bool = False
    """Whether a gradient of what it was used for is asked for."""

    @property
    def needs_gradient(self) -> bool:
        return self.parameter.trained

    @property
    def size_bytes(self) -> int:
        return self.parameter.numel * self.element_bytes


class Adapter(NamedTuple):
    """Low-rank matrices whose product is added to that of a frozen weight."""

    inner: Weight
    """rank x inputs"""
    outer: Weight
    """outputs x rank"""
    dropout: float
    magnitude: Weight | None = None
    """DoRA's length of each output's weights."""

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (self.inner, self.outer) if self.magnitude is None else (self.inner, self.outer, self.magnitude)


@dataclass(eq=False, slots=True)
class Tensor:
    """A tensor without contents. *numel* counts one sequence or one row where it *scales*, else the whole."""

    numel: int
    element_bytes: int
    scales: Scales
    storage: _Storage
    node: GraphNode | None = None

    @property
    def needs_gradient(self) -> bool:
        return self.node is not None

    @property
    def size_bytes(self) -> int:
        return self.numel * self.element_bytes


Gradients = tuple["Tensor | None", ...]
Backward = Callable[["Tape", Tensor], Gradients]


@dataclass(eq=False, slots=True)
class GraphNode:
    """One recorded operation: what produced its inputs, and what its backward does."""

    order: int
    inputs: tuple[GraphNode | Weight | None, ...]
    backward: Backward | None
    scope: str = ""
    formats: tuple[int | None, ...] = ()
    """Bytes per element of each input, which its gradient is cast to."""
    saves: bool = False
    """Whether its backward needs anything of forward."""


@dataclass(eq=False, slots=True)
class Tape:
    """Where operators record. ``grad_enabled`` off, nothing is saved for backward."""

    compute_bytes: int
    """Bytes per element of matrix products."""
    autocast: bool
    """Whether products cast their inputs, and norms run in fp32; weights and the residual stream are in fp32 then."""
    sequence_length: int
    padded: bool = False
    """Whether an attention mask hides tokens that are padding."""
    keeps_copies: bool = True
    """Whether autocast keeps the copy of a weight until forward ends."""
    half_stream: bool = False
    """Whether weights and the residual stream have the compute format under autocast too."""
    alone: bool = False
    """Whether the micro-batch is one sequence."""
    keeps_inputs: bool = False
    """Whether products keep their input for backward though their weight be frozen."""
    lasting: list[Tensor] = field(default_factory=list)
    """What the code of a layer has names for until it returns, needed or not."""
    caching: Caching | None = None
    """How keys and values are cached where the model generates, without dropout; None where it trains."""
    cached: list[Tensor] = field(default_factory=list)
    """What the cache holds when the pass is over."""
    uncached: list[int] = field(default_factory=list)
    """Numbers of the memory that the cache held before."""
    cut: SequenceCut = WHOLE
    """What attention has to do to see more than the tokens of this tape."""
    grad_enabled: bool = True
    backward_running: bool = False
    scope: str = ""
    """The module that is running; names what it allocates."""
    kept: list[Tensor] | None = None
    """Outputs that selective checkpointing keeps, in the order in which they are made; None where it keeps none."""
    recalled: list[Tensor] = field(default_factory=list)
    """Kept outputs that a second run takes instead of making them again, the next one last."""
    left: list[Tensor] = field(default_factory=list)
    """What modules refer to until they run again."""
    taken: dict[int, int] = field(default_factory=dict)
    """At which event a kept output was taken again, by its storage."""
    events: list[Event] = field(default_factory=list)
    order: int = 0
    needed_until: int = 0
    """Number of the event before which everything that backward needs has been computed."""
    watched: GraphNode | None = None
    reached_at: int = 0
    """Number of the first event of *watched*'s backward."""
    unpacked_at: int | None = None
    """Number of the first event of backward that needs anything of forward."""

    @property
    def stream_bytes(self) -> int:
        """Bytes per element of the residual stream."""
        return 4 if self.autocast and not self.half_stream else self.compute_bytes

    def new(
        self,
        numel: int,
        element_bytes: int,
        *,
        scales: Scales = True,
        category: Category | None = None,
        label: str | None = None,
    ) -> Tensor:
        """Allocate a tensor."""
        kind: Category = category or ("temporaries" if self.backward_running else "activations")
        storage = _Storage(self, label or self.scope, kind, numel * element_bytes, scales)
        return Tensor(numel, element_bytes, scales, storage)

    def like(self, tensor: Tensor, element_bytes: int | None = None) -> Tensor:
        """Allocate a tensor of *tensor*'s shape."""
        return self.new(tensor.numel, element_bytes or tensor.element_bytes, scales=tensor.scales)

    def keep(self, numel: int, element_bytes: int) -> tuple[Tensor, bool]:
        """An output that selective checkpointing keeps, and whether it still has to be computed."""
        if self.recalled:
            again = self.recalled.pop()
            self.taken[again.storage.event.storage] = len(self.events)
            return again, False
        output = self.new(numel, element_bytes)
        if self.kept is not None:
            self.kept.append(output)
        return output, True

    def work(
        self,
        *touched: Tensor,
        matmuls: tuple[Product, ...] = (),
        moved_bytes: int = 0,
        fixed_moved_bytes: int = 0,
        kernels: int = 1,
    ) -> None:
        """Record kernels that read or write the *touched* tensors, and other bytes per sequence and in all."""
        moved = moved_bytes + sum(tensor.size_bytes for tensor in touched if tensor.scales)
        fixed = fixed_moved_bytes + sum(tensor.size_bytes for tensor in touched if not tensor.scales)
        known = tuple(Touched(each.storage.event.storage, each.size_bytes, bool(each.scales)) for each in touched)
        done = Work(matmuls, moved, fixed, kernels, known)
        self.events.append(Event("work", self.scope, "temporaries", 0, False, work=done))

    def send(
        self,
        what: str,
        kind: CollectiveKind,
        payload_bytes: int,
        group: GroupName,
        *,
        messages: int = 1,
        waits: bool = True,
    ) -> None:
        """Record messages between ranks, with the payload of one sequence (:class:`Collective`)."""
        sent = (Collective(what, kind, payload_bytes, messages, waits, group),)
        self.events.append(Event("work", self.scope, "temporaries", 0, False, work=Work(sent=sent)))

    def wait_for(self, what: str) -> None:
        """Record that what was sent before has to be there."""
        self.events.append(Event("work", self.scope, "temporaries", 0, False, work=Work(awaits=what)))

    def attach(
        self,
        output: Tensor,
        inputs: Sequence[Tensor | Weight | None],
        backward: Backward,
        *,
        saves: Literal["inputs", "outputs", "nothing"] = "inputs",
    ) -> Tensor:
        """Make *output* differentiable. *backward* closes over whatever it needs, which keeps that alive.

        Where none of the *inputs* needs a gradient, neither does *output*, and nothing is kept.
        """
        present = [each for each in inputs if each is not None]
        for each in present:
            if isinstance(each, Weight):
                each.is_passed = self.grad_enabled and any(other.needs_gradient for other in present)
        if self.grad_enabled and (not present or any(each.needs_gradient for each in present)):
            if saves == "inputs":
                number = output.storage.event.storage
                self.needed_until = self.taken.get(number, number)
            elif saves == "outputs":
                self.needed_until = len(self.events)
            self.order += 1
            edges = tuple(_edge(each) for each in inputs)
            formats = tuple(each.element_bytes if each and each.needs_gradient else None for each in inputs)
            output.node = GraphNode(self.order, edges, backward, self.scope, formats, saves != "nothing")
        return output

    def require_gradient(self, tensor: Tensor) -> None:
        """``requires_grad_`` of a tensor that was computed without one; the graph keeps it."""
        kept = [tensor.storage]

        def backward(tape: Tape, gradient: Tensor) -> Gradients:
            kept.clear()
            return ()

        self.attach(tensor, [], backward, saves="nothing")

    def input(self, numel: int, element_bytes: int, label: str) -> Tensor:
        """A differentiable tensor from outside, whose gradient :meth:`run_backward` returns."""
        tensor = self.new(numel, element_bytes, label=label)
        self.order += 1
        tensor.node = GraphNode(self.order, (), None)
        return tensor

    def run_backward(self, root: GraphNode, numel: int, element_bytes: int, wanted: GraphNode | None) -> Tensor | None:
        """Run the graph behind *root* backwards from a new gradient; return that of the input *wanted*.

        The gradient that arrives is the first thing recorded.
        """
        waiting, uses = _dependencies(root)
        self.backward_running, self.grad_enabled = True, False
        buffers: dict[GraphNode | Weight, Tensor] = {root: self.new(numel, element_bytes, label="gradient stream")}
        ready = [(-root.order, root)]
        found: Tensor | None = None
        while ready:
            _, node = heapq.heappop(ready)
            arrived = buffers.pop(node)
            if node.backward is None:
                if node is wanted:
                    found = arrived
                del arrived
                continue
            if node is self.watched:
                self.reached_at = len(self.events)
            if node.saves and self.unpacked_at is None:
                self.unpacked_at = len(self.events)
            self.scope = node.scope
            produced = list(node.backward(self, arrived))
            del arrived
            edges, node.inputs, node.backward = node.inputs, (), None
            self._cast_to(node.formats, produced)
            for edge in reversed(edges):
                part = produced.pop()
                if edge is None or part is None:
                    continue
                if edge in buffers:
                    self.work(part, part, buffers[edge])
                buffers[edge] = part
                del part
                if isinstance(edge, Weight):
                    uses[edge] -= 1
                    if not uses[edge]:
                        size_bytes, parameter = buffers.pop(edge).size_bytes, edge.parameter
                        self.events.append(
                            Event("gradient", "weight gradient", "gradients", size_bytes, False, parameter=parameter)
                        )
                    continue
                waiting[edge] -= 1
                if not waiting[edge]:
                    heapq.heappush(ready, (-edge.order, edge))
        self.backward_running, self.grad_enabled = False, True
        return found

    def _cast_to(self, formats: tuple[int | None, ...], produced: list[Tensor | None]) -> None:
        """Give gradients the formats of what they are of, once the node let go (engine.cpp ``validate_outputs``)."""
        for index, (part, wanted) in enumerate(zip(produced, formats, strict=True)):
            if part is not None and wanted is not None and part.element_bytes != wanted:
                narrowed = self.like(part, wanted)
                self.work(part, narrowed)
                produced[index] = narrowed


def _edge(source: Tensor | Weight | None) -> GraphNode | Weight | None:
    """Where the gradient of *source* goes; None where it needs none."""
    if isinstance(source, Weight):
        return source if source.needs_gradient else None
    return source.node if source else None


def _dependencies(root: GraphNode) -> tuple[dict[GraphNode, int], dict[Weight, int]]:
    """How many gradients each node and weight behind *root* will receive."""
    nodes: dict[GraphNode, int] = {}
    weights: dict[Weight, int] = {}
    stack, seen = [root], {root}
    while stack:
        for edge in stack.pop().inputs:
            if edge is None:
                continue
            if isinstance(edge, Weight):
                weights[edge] = weights.get(edge, 0) + 1
                continue
            nodes[edge] = nodes.get(edge, 0) + 1
            if edge not in seen:
                seen.add(edge)
                stack.append(edge)
    return nodes, weights
