"""The cache of keys and values of a model that generates, as transformers 5.23 holds it (cache_utils.py).

``DynamicCache`` is what ``generate`` takes by itself: every pass lays what is new behind a copy of what was there, so
that for a moment a layer holds both (``DynamicLayer.update``). A windowed layer keeps a view of the last window less
one token, and with it all that the view is of: after the prompt the whole prompt (``DynamicSlidingWindowLayer``).
``StaticCache`` takes memory for the whole context at once, or for the window, and attends to all of it.
``QuantizedCache`` in fp8 keeps one byte an element and brings all of it back to the format of the model at every pass
(``Fp8QuantizedLayer``). Latent attention caches what keys and values are expanded from.
"""

from __future__ import annotations

from advisor.specs.model import Attention
from advisor.step.tape import Caching, Tape, Tensor

KEYS_AND_VALUES = "keys and values"
FP8_BYTES, FP32_BYTES = 1, 4


def seen_tokens(tape: Tape, spec: Attention) -> int:
    """Tokens whose keys the queries of *tape* are multiplied with."""
    if tape.caching and tape.caching.capacity is not None and decodes(tape):
        return _room(tape.caching.capacity, spec)
    return (_kept(tape.caching, spec) if tape.caching else 0) + tape.sequence_length


def decodes(tape: Tape) -> bool:
    """Whether the pass is over one new token behind others."""
    return tape.caching is not None and tape.caching.past > 0 and tape.sequence_length == 1


def cache(tape: Tape, key: Tensor, value: Tensor, spec: Attention) -> tuple[Tensor, Tensor]:
    """The keys and values to attend to: of the cache and, behind them, the new ones *key* and *value*."""
    if tape.caching is None:
        return key, value
    outer, tape.scope = tape.scope, KEYS_AND_VALUES
    if tape.caching.capacity is not None:
        found = _cache_in_place(tape, key, value, spec, tape.caching, tape.caching.capacity)
    elif tape.caching.held == "fp8":
        found = _cache_fp8(tape, key, value, tape.caching)
    else:
        found = _cache_plain(tape, key, value, spec, tape.caching)
    tape.scope = outer
    return found


def _room(capacity: int, spec: Attention) -> int:
    """Tokens that a layer has room for where the whole context has *capacity*."""
    return capacity if spec.window is None else min(capacity, spec.window)


def _kept(caching: Caching, spec: Attention) -> int:
    """Tokens of the cache that a layer reads."""
    return caching.past if spec.window is None else min(caching.past, spec.window - 1)


def _stored(caching: Caching, spec: Attention) -> int:
    """Tokens that its memory has room for."""
    if spec.window is None or caching.as_prefilled:
        return caching.past
    return min(caching.past, spec.window)


def _cache_plain(tape: Tape, key: Tensor, value: Tensor, spec: Attention, caching: Caching) -> tuple[Tensor, Tensor]:
    befores: list[Tensor] = []
    for new in (key, value):
        width = new.numel // tape.sequence_length
        before = _there(tape, width * _stored(caching, spec), new.element_bytes)
        read = Tensor(width * _kept(caching, spec), new.element_bytes, True, before.storage)
        befores.append(before)
        whole = _held(tape, read.numel + new.numel, new.element_bytes)
        tape.work(read, new, whole)
        tape.cached.append(whole)
        del before, read, whole
        if spec.window is None:
            befores.clear()
    befores.clear()
    keys, values = tape.cached
    return _again(keys), _again(values)


def _cache_in_place(
    tape: Tape, key: Tensor, value: Tensor, spec: Attention, caching: Caching, capacity: int
) -> tuple[Tensor, Tensor]:
    """``StaticCache``: of the prompt, its own keys and values are attended to, later all that there is room for.

    Windowed layers whose window is full make copies of all they have, one token further.
    """
    room = _room(capacity, spec)
    widths = [new.numel // tape.sequence_length for new in (key, value)]
    make = _there if caching.past else _held
    tape.cached += [make(tape, width * room, key.element_bytes) for width in widths]
    tape.work(key, value, key, value, kernels=2)
    if not caching.past:
        tape.work(*tape.cached, kernels=2)
        if tape.sequence_length > room:
            return key, value
        keys, values = tape.cached
        return _again(keys, key.numel), _again(values, value.numel)
    if caching.past >= room:
        moved = [tape.like(each) for each in tape.cached]
        tape.work(*tape.cached, *moved, *moved, *tape.cached, kernels=4)
        del moved
    keys, values = tape.cached
    return _again(keys), _again(values)


def _cache_fp8(tape: Tape, key: Tensor, value: Tensor, caching: Caching) -> tuple[Tensor, Tensor]:
    """The prompt's keys and values are attended to as they are; later ones, and all that was there, out of fp8."""
    befores: list[Tensor] = []
    narrow: list[Tensor] = []
    for new in (key, value):
        if not caching.past:
            # The scale is made of the largest magnitude.
            tape.work(new, tape.like(new))
            tape.cached.append(_in_fp8(tape, new, kept=True))
        else:
            befores.append(_there(tape, new.numel // tape.sequence_length * caching.past, FP8_BYTES))
            narrow.append(_in_fp8(tape, new, kept=False))
    if not caching.past:
        return key, value
    for before, new in zip(befores, narrow, strict=True):
        whole = _held(tape, before.numel + new.numel, FP8_BYTES)
        tape.work(before, new, whole)
        tape.cached.append(whole)
        del whole
    keys, values = (_out_of_fp8(tape, each, key.element_bytes) for each in tape.cached)
    return keys, values


def _in_fp8(tape: Tape, x: Tensor, *, kept: bool) -> Tensor:
    wide = tape.like(x, FP32_BYTES)
    scaled = tape.like(x, FP32_BYTES)
    tape.work(x, wide, wide, scaled, kernels=2)
    del wide
    output = _held(tape, x.numel, FP8_BYTES) if kept else tape.like(x, FP8_BYTES)
    tape.work(scaled, output)
    return output


def _out_of_fp8(tape: Tape, x: Tensor, element_bytes: int) -> Tensor:
    wide = tape.like(x, FP32_BYTES)
    scaled = tape.like(x, FP32_BYTES)
    tape.work(x, wide, wide, scaled, kernels=2)
    del wide
    output = tape.like(x, element_bytes)
    tape.work(scaled, output)
    return output


def _held(tape: Tape, numel: int, element_bytes: int) -> Tensor:
    """A tensor that the cache goes on to hold."""
    return tape.new(numel, element_bytes, category="kv cache", label=KEYS_AND_VALUES)


def _there(tape: Tape, numel: int, element_bytes: int) -> Tensor:
    """A tensor that the cache held before the pass."""
    found = _held(tape, numel, element_bytes)
    if numel:
        tape.uncached.append(found.storage.event.storage)
    return found


def _again(x: Tensor, numel: int | None = None) -> Tensor:
    """*x*, or so many elements of it, under another name."""
    return Tensor(x.numel if numel is None else numel, x.element_bytes, x.scales, x.storage)
