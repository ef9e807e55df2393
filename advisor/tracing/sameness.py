"""Which layers of a real model do the same, told without running them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

_OWN_NUMBER = ("layer_idx", "layer_id", "layer_number", "block_idx", "index")
"""Attributes by which a module knows where it stands."""


def representatives(layers: Any, settings: Any) -> tuple[tuple[int, ...], int]:
    """For each layer the number of an early one that does the same, and how many early ones that takes.

    The first of each kind stands for itself alone, because what a kind shares, such as its rotary table, is given
    back with the first; the second stands for all others.
    """
    seen: dict[Hashable, list[int]] = {}
    for number, layer in enumerate(layers):
        seen.setdefault(_signature(layer, number, settings, len(layers)), []).append(number)
    kinds = [0] * len(layers)
    for numbers in seen.values():
        for place, number in enumerate(numbers):
            kinds[number] = numbers[min(place, 1)]
    return tuple(kinds), max(kinds) + 1


def keep_first(model: Any, layers: Any, count: int) -> None:
    """Cut *layers* of *model* down to the first *count*."""
    del layers[count:]
    text = model.config.get_text_config()
    if isinstance(getattr(text, "num_hidden_layers", None), int):
        text.num_hidden_layers = count


def _signature(layer: Any, number: int, settings: Any, count: int) -> Hashable:
    """What tells a layer from others: its modules, their tensors and plain attributes, and what the settings list."""
    listed = (
        (name, value[number])
        for name, value in sorted(vars(settings.get_text_config()).items())
        if isinstance(value, list | tuple) and len(value) == count
    )
    return tuple(map(repr, listed)), tuple(_described(layer))


def _described(layer: Any) -> Iterator[Hashable]:
    for name, module in layer.named_modules():
        yield name, type(module).__qualname__
        for held, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield held, tuple(tensor.shape), str(tensor.dtype)
        for attribute, value in sorted(vars(module).items()):
            if attribute not in _OWN_NUMBER and isinstance(value, str | int | float | bool | None):
                yield attribute, value
