"""Which layers are taken for one another without running them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from advisor.tracing.sameness import representatives  # noqa: E402 - after torch is known to be there


def layers_of(*widths: int) -> Any:
    """Layers that know where they stand, of the given widths."""
    found = torch.nn.ModuleList(torch.nn.Linear(4, width) for width in widths)
    for number, layer in enumerate(found):
        layer.layer_idx = number
    return found


def settings(**fields: Any) -> Any:
    text = SimpleNamespace(**fields)
    return SimpleNamespace(get_text_config=lambda: text)


def test_of_equal_layers_the_second_stands_for_all_but_the_first() -> None:
    assert representatives(layers_of(8, 8, 8, 8), settings()) == ((0, 1, 1, 1), 2)


def test_layers_with_other_weights_are_others() -> None:
    assert representatives(layers_of(8, 9, 8, 9, 8, 9), settings()) == ((0, 1, 2, 3, 2, 3), 4)


def test_layers_that_the_settings_list_apart_are_others() -> None:
    kinds = ["local", "local", "local", "global", "local", "local", "global", "global"]

    assert representatives(layers_of(*[8] * 8), settings(layer_types=kinds)) == ((0, 1, 1, 3, 1, 1, 6, 6), 7)


def test_a_layer_that_is_told_apart_by_an_attribute_is_another() -> None:
    layers = layers_of(8, 8, 8, 8)
    layers[3].is_sparse = True

    assert representatives(layers, settings()) == ((0, 1, 1, 3), 4)
