"""From two passes with different micro-batches to what one sequence does, as the step program lays it out.

A size that is the same in both passes is there once for any micro-batch; the rest grows with it. The micro-batches
are two and three, because torch treats a dimension of one in ways of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from advisor.errors import ConfigError
from advisor.specs.model import Parameter
from advisor.step.program import Matmul
from advisor.step.recording import HeadRecording, Recording
from advisor.step.tape import Event, Product, Work
from advisor.tracing.passes import EMBEDDING, HEAD, LOSS, Entry, Kernel, Pass, Shape, Stretch, Taken

FEWER, MORE = 2, 3
WEIGHT_GRADIENT = "weight gradient"


@dataclass(frozen=True, eq=False)
class Recordings:
    """The model's parts, recorded."""

    embedding: Recording
    layers: tuple[Recording, ...]
    head: HeadRecording
    owners: Mapping[str, str | int]
    """Where each weight's gradient is completed: in which layer, or in the embedding or the head."""
    local: bool
    """Whether layers leave memory to themselves and their neighbours only, so that more of them can follow."""


def recordings(fewer: Pass, more: Pass, layers: int, names: Mapping[str, Parameter], tied: str | None) -> Recordings:
    """Both passes as events per sequence.

    *names* gives each weight as its part knows it; *tied* is the name of an embedding that is the output matrix too.
    """
    for each in (fewer, more):
        _hand_over_tied(each, tied)
    if [where for where, _ in fewer.stretches] != [where for where, _ in more.stretches]:
        raise _different()
    found: dict[Stretch, list[Event]] = {}
    owners: dict[str, str | int] = {}
    kept_copies = [0] * layers
    local = True
    for (where, few), (_, many) in zip(fewer.stretches, more.stretches, strict=True):
        if len(few) != len(many):
            raise _different()
        events = found.setdefault(where, [])
        for one, other in zip(few, many, strict=True):
            layer = _layer_giving(one, where)
            if layer is not None and where.part == LOSS and _size(one) == _size(other):
                kept_copies[layer] += _size(one)
                continue
            local = local and layer in (None, layers - 1)
            events += _events(one, other, names)
            if one.kind == "gradient" and one.parameter is not None:
                owners[one.parameter] = where.part

    def events_of(part: str | int, backward: bool = False) -> tuple[Event, ...]:
        return tuple(found.get(Stretch(part, backward), ()))

    return Recordings(
        embedding=Recording(events_of(EMBEDDING), events_of(EMBEDDING, True)),
        layers=tuple(Recording(events_of(each), events_of(each, True), kept_copies[each]) for each in range(layers)),
        head=HeadRecording(events_of(HEAD), events_of(LOSS), *_at_first_product(events_of(HEAD, True))),
        owners=owners,
        local=local,
    )


def _at_first_product(events: tuple[Event, ...]) -> tuple[tuple[Event, ...], tuple[Event, ...]]:
    """*events* before the first matrix product, what it allocates left to it, and those from there on."""
    for index, event in enumerate(events):
        if event.work.products:
            while index and events[index - 1].kind == "take":
                index -= 1
            return events[:index], events[index:]
    return (), events


def _different() -> ConfigError:
    return ConfigError(
        f"the model's code does other things with {MORE} sequences than with {FEWER}, so that no micro-batch follows "
        "from another; `advisor trace` still counts a single plan"
    )


def _size(entry: Entry) -> int:
    return entry.taken.size_bytes if entry.taken else 0


def _layer_giving(entry: Entry, where: Stretch) -> int | None:
    """The layer whose memory is given back in the head or the loss, where no other layer does."""
    if entry.kind != "give" or not entry.taken or where.part not in (HEAD, LOSS):
        return None
    owner = entry.taken.owner.part
    return owner if isinstance(owner, int) else None


def _hand_over_tied(found: Pass, tied: str | None) -> None:
    """Let the head hand over its part of the gradient of a matrix that it shares with the embedding.

    autograd holds it until the embedding's part has been added; what is added in place is freed in its stead.
    """
    if tied is None:
        return
    size = next(entry.size_bytes for _, entries in found.stretches for entry in entries if entry.parameter == tied)
    entries = next(entries for where, entries in found.stretches if where == Stretch(HEAD, True))
    given = {id(entry.taken) for entry in entries if entry.kind == "give"}
    kept = (each for each in entries if each.kind == "take" and _size(each) == size and id(each.taken) not in given)
    taking = next(kept, None)
    if taking is None or taking.taken is None:
        return
    taking.taken.parameter = tied
    # The product that writes it follows its allocation.
    start = entries.index(taking)
    after = next((at for at in range(start + 1, len(entries)) if entries[at].kind == "work"), start) + 1
    entries[after:after] = [
        Entry("give", taken=taking.taken),
        Entry("gradient", parameter=tied, size_bytes=size),
    ]
    for where, later in found.stretches:
        if where == Stretch(EMBEDDING, True):
            later[:] = [entry for entry in later if entry.kind != "give" or entry.taken is not taking.taken]


def _events(one: Entry, other: Entry, names: Mapping[str, Parameter]) -> list[Event]:
    """The same thing with fewer and with more sequences, for one."""
    if one.kind != other.kind or one.parameter != other.parameter:
        raise _different()
    if one.kind == "gradient" and one.parameter is not None:
        parameter = names[one.parameter]
        return [Event("gradient", WEIGHT_GRADIENT, "gradients", one.size_bytes, False, parameter=parameter)]
    if one.kernel is not None and other.kernel is not None:
        return [Event("work", "", "temporaries", 0, False, work=_work(one.kernel, other.kernel))]
    if one.taken is None or other.taken is None or one.kind not in ("take", "give"):
        raise _different()
    return _memory("take" if one.kind == "take" else "give", one.taken, other.taken)


def _memory(kind: Literal["take", "give"], few: Taken, many: Taken) -> list[Event]:
    label, category = few.label, few.category
    if few.parameter is not None:
        label, category = WEIGHT_GRADIENT, "gradients"
    each, once = _split(few.size_bytes, many.size_bytes)
    sizes = ((each, True), (once, False))
    return [Event(kind, label, category, size, scales) for size, scales in sizes if size]


def _work(few: Kernel, many: Kernel) -> Work:
    if len(few.products) != len(many.products):
        raise _different()
    each, once = _split(few.moved_bytes, many.moved_bytes)
    products = tuple(_product(one, other) for one, other in zip(few.products, many.products, strict=True))
    return Work(products, each, once, 1)


def _product(few: Shape, many: Shape) -> Product:
    """The product of one sequence, and which of its sizes grows."""
    m, n, k, count = few.m, few.n, few.k, few.count
    grows: Literal["m", "k", "count"] | None = None
    if few.n != many.n:
        # (m x k)(k x tokens) is as much work as its transpose.
        grows, m, n = "m", _split(few.n, many.n)[0], few.m
    elif few.m != many.m:
        grows, m = "m", _split(few.m, many.m)[0]
    elif few.k != many.k:
        grows, k = "k", _split(few.k, many.k)[0]
    elif few.count != many.count:
        grows, count = "count", _split(few.count, many.count)[0]
    matmul = Matmul(m, n, k, count, few.kind, few.flop_share, few.element_bytes, few.fused, few.backward)
    return Product(matmul, grows)


def _split(few: int, many: int) -> tuple[int, int]:
    """What there is for each sequence, and what there is once."""
    each = (many - few) // (MORE - FEWER)
    once = few - FEWER * each
    return (each, once) if each >= 0 and once >= 0 else (-(-many // MORE), 0)
