"""Recordings of one sequence laid out as blocks of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from advisor.specs.model import ModelSpec
from advisor.step.fusing import fused
from advisor.step.program import Amount, Block, Category, Matmul, Node, Sequence, then
from advisor.step.recording import Source
from advisor.step.tape import Event, Product, Scales, Work

Events = tuple[Event, ...]


class Laid:
    """A model's recordings as blocks of one batch. What was laid before is the same node again, in every program.

    Where *compiled*, kernels that follow one another are fused (``fusing.py``).
    """

    def __init__(self, batch: Amount, compiled: bool) -> None:
        self.batch, self.compiled = batch, compiled
        # Events are kept beside what was made of them, so that no others take their identity.
        self._whole: dict[int, tuple[Events, Sequence]] = {}
        self._cut: dict[int, tuple[Events, list[tuple[Sequence, Event | None]]]] = {}

    def whole(self, events: Events) -> Sequence:
        """All of *events*."""
        if id(events) not in self._whole:
            self._whole[id(events)] = events, self._lay(events)
        return self._whole[id(events)][1]

    def cut(self, events: Events) -> list[tuple[Sequence, Event | None]]:
        """What lies between one handed-over gradient and the next, each with the gradient that ends it."""
        if id(events) not in self._cut:
            found: list[tuple[Sequence, Event | None]] = []
            start = 0
            for index, event in enumerate(events):
                if event.kind == "gradient":
                    found.append((self._lay(events[start:index]), event))
                    start = index + 1
            found.append((self._lay(events[start:]), None))
            self._cut[id(events)] = events, found
        return self._cut[id(events)][1]

    def _lay(self, events: Events) -> Sequence:
        return then(*lay(fused(events) if self.compiled else events, self.batch))


def laid_for(model: ModelSpec, source: Source, batch: Amount, compiled: bool = False) -> Laid:
    """The layings of *model*'s recordings by *source* for *batch*, kept for the next program of them."""
    sizes = np.asarray(batch)
    return _laid(model, source, sizes.shape, tuple(sizes.reshape(-1).tolist()), compiled)


@lru_cache(maxsize=32)
def _laid(model: ModelSpec, source: Source, shape: tuple[int, ...], sizes: tuple[int, ...], compiled: bool) -> Laid:
    return Laid(np.array(sizes, dtype=np.int64).reshape(shape) if shape else sizes[0], compiled)


@dataclass(slots=True)
class _Draft:
    """Neighbouring events of one name, joined for one sequence (``then`` of program.py, in whole numbers)."""

    label: str
    category: Category
    scales: Scales
    net_bytes: int = 0
    peak_bytes: int = 0
    works: list[Work] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def add(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "take":
            self.net_bytes += event.size_bytes
            self.peak_bytes = max(self.peak_bytes, self.net_bytes)
        else:
            self.net_bytes -= event.size_bytes

    def block(self, batch: Amount) -> Block:
        times = _times(self.scales, batch)
        products = [product for work in self.works for product in work.products]
        return Block(
            self.label,
            self.category,
            net_bytes=self.net_bytes * times,
            peak_bytes=self.peak_bytes * times,
            excess_category=self.category,
            matmuls=tuple(_grown(product, batch) for product in products),
            moved_bytes=sum(work.moved_bytes for work in self.works) * batch
            + sum(work.fixed_moved_bytes for work in self.works),
            kernels=sum(work.kernels for work in self.works),
            transfers=tuple(
                each._replace(payload_bytes=each.payload_bytes * batch) for work in self.works for each in work.sent
            ),
            awaits=next((work.awaits for work in self.works if work.awaits), ""),
            events=tuple(self.events),
            sequences=times,
        )


def lay(events: Iterable[Event], batch: Amount) -> list[Node]:
    """Blocks of *batch* sequences for the *events* of one; neighbours of one name become one block."""
    drafts: list[_Draft] = []
    for event in events:
        if event.kind == "work":
            if not drafts or event.work.awaits or event.work.sent:
                drafts.append(_Draft(event.label, event.category, event.scales))
            drafts[-1].works.append(event.work)
            continue
        last = drafts[-1] if drafts else None
        if last is None or (last.label, last.category, last.scales) != (event.label, event.category, event.scales):
            last = _Draft(event.label, event.category, event.scales)
            drafts.append(last)
        last.add(event)
    return [draft.block(batch) for draft in drafts]


def _times(scales: Scales, batch: Amount) -> Amount:
    """How often there is what an event tells the size of, in a micro-batch of *batch* sequences."""
    if isinstance(scales, bool):
        return batch if scales else 1
    return scales.of(batch)


def _grown(product: Product, batch: Amount) -> Matmul:
    matmul = product.matmul
    if product.grows == "m":
        return replace(matmul, m=matmul.m * batch)
    if product.grows == "k":
        return replace(matmul, k=matmul.k * batch)
    if product.grows == "count":
        return replace(matmul, count=matmul.count * batch)
    return matmul
