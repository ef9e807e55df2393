"""The tape: when tensors are freed, how gradients are summed, and that nothing is lost or freed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.specs.model import Parameter
from advisor.step.operators import (
    add,
    cast,
    concatenate,
    dropout,
    linear,
    multiply,
    multiply_constant,
    square,
    unary,
    view,
)
from advisor.step.tape import Event, Tape, Tensor, Weight

WIDTH = 64
STREAM_BYTES = 2 * WIDTH


def new_tape(*, autocast: bool = False) -> Tape:
    return Tape(compute_bytes=2, autocast=autocast, sequence_length=1)


def stream(tape: Tape) -> Tensor:
    return tape.input(WIDTH, 2, "in")


def held_bytes(events: Iterable[Event]) -> int:
    signs = {"take": 1, "give": -1}
    return sum(signs.get(event.kind, 0) * event.size_bytes for event in events)


def most_held_bytes(events: list[Event]) -> int:
    return max(held_bytes(events[:end]) for end in range(len(events) + 1))


def backward(tape: Tape, output: Tensor, start: Tensor) -> Tensor:
    """Run the graph of *output* backwards to *start*, which the caller has to have let go."""
    root = output.node
    assert root is not None
    found = tape.run_backward(root, output.numel, output.element_bytes, start.node)
    assert found is not None
    return found


def test_a_tensor_is_freed_when_its_last_reference_goes() -> None:
    tape = new_tape()
    first = tape.new(10, 4)
    second = view(tape, first)

    del first
    assert held_bytes(tape.events) == 40
    del second

    assert held_bytes(tape.events) == 0
    assert [event.kind for event in tape.events] == ["take", "give"]


def test_a_part_of_a_tensor_keeps_the_whole_alive() -> None:
    tape = new_tape()
    part = view(tape, tape.new(10, 4), 1)

    assert held_bytes(tape.events) == 40
    assert part.size_bytes == 4


def test_a_new_name_counts_from_when_the_memory_was_taken() -> None:
    tape = new_tape()
    tape.scope = "old"
    x = tape.new(10, 4)

    x.storage.rename("new", "buffers")
    del x

    assert [(event.kind, event.label, event.category) for event in tape.events] == [
        ("take", "new", "buffers"),
        ("give", "new", "buffers"),
    ]


def test_what_backward_needs_outlives_its_variable_and_nothing_else_does() -> None:
    tape = new_tape()
    x = stream(tape)
    kept = square(tape, x)
    dropped = multiply_constant(tape, kept)
    output = square(tape, dropped)
    del x, kept

    # The input is saved by the first square, the scaled square by the second; the square itself by nobody.
    assert held_bytes(tape.events) == 3 * STREAM_BYTES
    del dropped
    assert held_bytes(tape.events) == 3 * STREAM_BYTES
    del output
    assert held_bytes(tape.events) == 0


def test_without_gradients_nothing_is_kept() -> None:
    tape = new_tape()
    tape.grad_enabled = False
    x = stream(tape)
    for _ in range(5):
        x = square(tape, x)

    assert held_bytes(tape.events) == STREAM_BYTES
    assert most_held_bytes(tape.events) == 2 * STREAM_BYTES


def test_two_gradients_of_one_tensor_are_summed_in_place() -> None:
    tape = new_tape()
    x = stream(tape)
    output = add(tape, multiply_constant(tape, x), multiply_constant(tape, x))
    forward = len(tape.events)

    gradient = backward(tape, output, x)

    events = tape.events[forward:]
    taken = [event for event in events if event.kind == "take"]
    assert len(taken) == 3, "the gradient that arrives and one through each branch, but none for their sum"
    assert held_bytes(events) == gradient.size_bytes == STREAM_BYTES
    sums = [event.work for event in events if event.kind == "work"]
    assert [work.moved_bytes for work in sums].count(3 * STREAM_BYTES) == 1, "two read, one written"


def test_a_node_lets_go_of_what_it_saved_once_it_ran() -> None:
    tape = new_tape()
    x = stream(tape)
    inner = square(tape, x)
    saved = inner.storage.event.storage
    output = square(tape, inner)
    del inner
    forward = len(tape.events)

    backward(tape, output, x)

    given = next(
        number for number, event in enumerate(tape.events) if event == tape.events[saved]._replace(kind="give")
    )
    takes = [number for number in range(forward, len(tape.events)) if tape.events[number].kind == "take"]
    # Each square takes three tensors after the gradient that arrives: the second lets go before the first begins.
    assert takes[3] < given < takes[4]


def test_of_the_nodes_that_are_ready_the_last_made_runs_first() -> None:
    tape = new_tape()
    x = stream(tape)
    branches = []
    for name in ("first", "second", "third"):
        tape.scope = name
        branches.append(multiply_constant(tape, x))
    tape.scope = "sum"
    output = add(tape, branches[1], add(tape, branches[2], branches[0]))
    del branches
    forward = len(tape.events)

    backward(tape, output, x)

    ran = [event.label for event in tape.events[forward:] if event.kind == "take"]
    assert ran == ["gradient stream", "third", "second", "first"]


def test_a_weight_used_twice_hands_over_one_gradient() -> None:
    tape = new_tape()
    x = stream(tape)
    weight = Weight(Parameter("square", (WIDTH, WIDTH)), 2, (WIDTH, WIDTH))
    output = linear(tape, linear(tape, x, weight), weight)
    forward = len(tape.events)

    backward(tape, output, x)

    handed = [event for event in tape.events[forward:] if event.kind == "gradient"]
    taken = [event for event in tape.events[forward:] if event.kind == "take" and event.category == "gradients"]
    assert [(event.parameter, event.size_bytes) for event in handed] == [(weight.parameter, 2 * WIDTH**2)]
    assert len(taken) == 2, "one for each use, the second added to the first"


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_copies_a_weight_once(autocast: bool) -> None:
    tape = new_tape(autocast=autocast)
    weight = Weight(Parameter("square", (WIDTH, WIDTH)), 4 if autocast else 2, (WIDTH, WIDTH))
    output = linear(tape, linear(tape, stream(tape), weight), weight)

    copies = [event for event in tape.events if event.label == "autocast weight copies"]
    assert [(event.size_bytes, event.scales) for event in copies] == [(2 * WIDTH**2, False)] * autocast
    assert output.element_bytes == 2


SHAPED = (
    "square",
    "multiply",
    "add",
    "multiply_constant",
    "saves input",
    "saves output",
    "dropout",
    "cast there and back",
    "halves put together",
    "linear",
)


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Operations in order, each on the outputs of two earlier ones, counted from the input."""
    names = draw(st.lists(st.sampled_from(SHAPED), min_size=1, max_size=12))
    return [(name, draw(st.integers(0, index)), draw(st.integers(0, index))) for index, name in enumerate(names)]


def run(tape: Tape, graph: list[tuple[str, int, int]], weight: Weight) -> tuple[Tensor, Tensor]:
    """The graph's input, and the sum of all its tensors."""
    tensors = [stream(tape)]
    for name, left, right in graph:
        x, y = tensors[left], tensors[right]
        if name == "square":
            made = square(tape, x)
        elif name == "multiply":
            made = multiply(tape, x, y)
        elif name == "add":
            made = add(tape, x, y)
        elif name == "multiply_constant":
            made = multiply_constant(tape, x)
        elif name == "saves input":
            made = unary(tape, x, saves="input", temporaries=1)
        elif name == "saves output":
            made = unary(tape, x, saves="output")
        elif name == "dropout":
            made = dropout(tape, x, 0.1)
        elif name == "cast there and back":
            made = cast(tape, cast(tape, x, 4), 2)
        elif name == "halves put together":
            made = concatenate(tape, view(tape, x, WIDTH // 2), view(tape, y, WIDTH // 2))
        else:
            made = linear(tape, x, weight)
        tensors.append(made)
    output = tensors[0]
    for tensor in tensors[1:]:
        output = add(tape, output, tensor)
    return tensors[0], output


@given(graphs())
def test_every_graph_gives_back_what_it_took_and_returns_one_gradient(graph: list[tuple[str, int, int]]) -> None:
    tape = new_tape()
    weight = Weight(Parameter("square", (WIDTH, WIDTH)), 2, (WIDTH, WIDTH))
    x, output = run(tape, graph, weight)
    root, start = output.node, x.node
    assert root is not None
    del x, output
    gradient = tape.run_backward(root, WIDTH, 2, start)

    assert gradient is not None
    assert (gradient.numel, gradient.element_bytes) == (WIDTH, 2)
    assert held_bytes(tape.events) == STREAM_BYTES, "the gradient alone"
    del gradient
    uses = any(name == "linear" for name, _, _ in graph)
    assert [event.size_bytes for event in tape.events if event.kind == "gradient"] == [2 * WIDTH**2] * uses
    taken = Counter(event.storage for event in tape.events if event.kind == "take")
    given_back = Counter(event.storage for event in tape.events if event.kind == "give")
    assert taken == given_back
    assert set(taken.values()) == {1}
    assert min(held_bytes(tape.events[:end]) for end in range(len(tape.events))) >= 0


@given(graphs())
def test_a_pass_without_gradients_never_holds_more(graph: list[tuple[str, int, int]]) -> None:
    weight = Weight(Parameter("square", (WIDTH, WIDTH)), 2, (WIDTH, WIDTH))
    saving, plain = new_tape(), new_tape()
    plain.grad_enabled = False
    kept, _ = run(saving, graph, weight), run(plain, graph, weight)

    assert most_held_bytes(plain.events) <= most_held_bytes(saving.events)
    del kept
