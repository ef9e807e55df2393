"""From passes over two and over three sequences to one, on passes made by hand."""

from __future__ import annotations

import pytest

from advisor.errors import ConfigError
from advisor.specs.model import Parameter
from advisor.step.tape import Event
from advisor.tracing.passes import EMBEDDING, HEAD, LOSS, Entry, Kernel, Pass, Shape, Stretch, Taken
from advisor.tracing.recordings import Recordings, recordings

MATRIX = Parameter("embed", (10, 4))


def taken(size_bytes: int, owner: Stretch, label: str = "layer") -> Taken:
    return Taken(size_bytes, label, "activations", owner)


def recorded(few: Pass, many: Pass, layers: int = 1, tied: str | None = None) -> Recordings:
    return recordings(few, many, layers, {"model.embed": MATRIX}, tied)


def a_pass(*stretches: tuple[Stretch, list[Entry]]) -> Pass:
    return Pass(list(stretches))


def memory(events: tuple[Event, ...]) -> list[tuple[str, int, bool]]:
    return [(event.kind, event.size_bytes, event.scales) for event in events]


def test_what_grows_is_split_from_what_is_there_once() -> None:
    layer = Stretch(0, False)
    few, many = (
        a_pass((layer, [Entry("take", taken=taken(100 + 7 * batch, layer)), Entry("take", taken=taken(64, layer))]))
        for batch in (2, 3)
    )

    assert memory(recorded(few, many).layers[0].forward) == [
        ("take", 7, True),
        ("take", 100, False),
        ("take", 64, False),
    ]


@pytest.mark.parametrize(
    ("few", "many", "one", "grows"),
    [
        (Shape(20, 8, 4, 1, "linear"), Shape(30, 8, 4, 1, "linear"), (10, 8, 4, 1), "m"),
        (Shape(8, 20, 4, 1, "linear"), Shape(8, 30, 4, 1, "linear"), (10, 8, 4, 1), "m"),
        (Shape(8, 4, 20, 1, "linear"), Shape(8, 4, 30, 1, "linear"), (8, 4, 10, 1), "k"),
        (Shape(8, 8, 4, 6, "attention"), Shape(8, 8, 4, 9, "attention"), (8, 8, 4, 3), "count"),
        (Shape(8, 8, 4, 1, "linear"), Shape(8, 8, 4, 1, "linear"), (8, 8, 4, 1), None),
    ],
)
def test_a_product_knows_which_of_its_sizes_grows(
    few: Shape, many: Shape, one: tuple[int, ...], grows: str | None
) -> None:
    layer = Stretch(0, False)
    passes = (a_pass((layer, [Entry("work", kernel=Kernel("mm", (each,), 0))])) for each in (few, many))
    (event,) = recorded(*passes).layers[0].forward
    (product,) = event.work.products

    assert (product.matmul.m, product.matmul.n, product.matmul.k, product.matmul.count) == one
    assert product.grows == grows


def test_weight_copies_that_autocast_keeps_belong_to_the_layer_that_made_them() -> None:
    layer, loss = Stretch(0, False), Stretch(LOSS, False)
    copies = [taken(500, layer) for _ in range(2)]
    few, many = (a_pass((layer, [Entry("take", taken=each)]), (loss, [Entry("give", taken=each)])) for each in copies)
    found = recorded(few, many)

    assert found.layers[0].kept_copy_bytes == 500
    assert found.head.loss == ()
    assert found.local


def test_memory_of_an_early_layer_that_the_head_gives_back_is_seen() -> None:
    """Then more layers cannot follow from those that were run."""
    layer, head = Stretch(0, False), Stretch(HEAD, True)
    few, many = (
        a_pass((layer, [Entry("take", taken=each)]), (head, [Entry("give", taken=each)]))
        for each in (taken(200, layer), taken(300, layer))
    )

    assert not recorded(few, many, layers=2).local
    assert recorded(few, many, layers=1).local


def test_the_head_hands_over_its_part_of_a_tied_matrix() -> None:
    head, embedding = Stretch(HEAD, True), Stretch(EMBEDDING, True)

    def one() -> Pass:
        partial = taken(80, head)
        own = taken(80, embedding)
        work = Entry("work", kernel=Kernel("mm", (), 0))
        ending = [Entry("give", taken=own), Entry("gradient", parameter="model.embed", size_bytes=80)]
        return a_pass(
            (head, [Entry("take", taken=partial), work]),
            (embedding, [Entry("take", taken=own), work, Entry("give", taken=partial), *ending]),
        )

    found = recorded(one(), one(), tied="model.embed")

    assert [event.kind for event in found.head.backward] == ["take", "work", "give", "gradient"]
    assert [event.kind for event in found.embedding.backward] == ["take", "work", "give", "gradient"]
    assert {event.parameter for event in (*found.head.backward, *found.embedding.backward)} == {None, MATRIX}


def test_code_that_does_something_else_with_another_micro_batch_is_refused() -> None:
    layer = Stretch(0, False)
    few = a_pass((layer, [Entry("take", taken=taken(1, layer))]))

    with pytest.raises(ConfigError, match="other things with 3 sequences than with 2"):
        recorded(few, a_pass((layer, [])))
