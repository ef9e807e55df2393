"""Models: what their parts refuse, and what they count."""

from __future__ import annotations

from typing import Any

import pytest

from advisor.errors import SpecError
from advisor.specs.model import (
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    ModelSpec,
    Parameter,
    Run,
)

ATTENTION = Attention(heads=8, key_value_heads=2, head_dim=16)
LATENT = LatentAttention(query_rank=None, key_value_rank=4, rotary_head_dim=2, plain_head_dim=6, value_head_dim=10)


def layer(*parameters: Parameter, window: int | None = None) -> Layer:
    attention = Attention(heads=8, key_value_heads=2, head_dim=16, window=window)
    return Layer(attention=attention, feed_forward=FeedForward(width=4), norm="rms", parameters=parameters)


LOCAL = layer(Parameter("local", (3, 5)), Parameter("norm", (5,)), window=128)
GLOBAL = layer(Parameter("global", (7, 5)))
MODEL = ModelSpec(
    name="made up",
    family="none",
    objective="causal",
    hidden_size=5,
    vocabulary_size=11,
    maximum_positions=None,
    tied_embeddings=True,
    embedding=(Parameter("embedding", (11, 5)),),
    runs=(Run((LOCAL, GLOBAL), 3), Run((LOCAL,), 2)),
    final_norm="rms",
    head=(Parameter("final norm", (5,)),),
)


@pytest.mark.parametrize("facts", [{"heads": 0}, {"key_value_heads": 0}, {"head_dim": 0}, {"heads": -8}])
def test_attention_without_heads_is_refused(facts: dict[str, int]) -> None:
    counts: dict[str, Any] = {"heads": 8, "key_value_heads": 2, "head_dim": 16, **facts}

    with pytest.raises(SpecError, match="attention needs positive counts"):
        Attention(**counts)


def test_queries_that_do_not_share_their_keys_evenly_are_refused() -> None:
    with pytest.raises(SpecError, match="8 attention heads do not divide by 3 key-value heads"):
        Attention(heads=8, key_value_heads=3, head_dim=16)


def test_widths_are_heads_times_their_size() -> None:
    assert (ATTENTION.query_width, ATTENTION.key_value_width, ATTENTION.value_head_dim) == (128, 32, 16)


def test_latent_attention_has_values_of_their_own_size() -> None:
    assert Attention(heads=8, key_value_heads=8, head_dim=8, latent=LATENT).value_head_dim == 10


@pytest.mark.parametrize("active", [0, 9])
def test_experts_active_that_are_not_there_are_refused(active: int) -> None:
    with pytest.raises(SpecError, match=f"{active} active experts of 8"):
        Experts(count=8, active=active, width=4)


@pytest.mark.parametrize(("layers", "repeats"), [((), 1), ((GLOBAL,), 0)])
def test_a_run_of_nothing_is_refused(layers: tuple[Layer, ...], repeats: int) -> None:
    with pytest.raises(SpecError, match=f"at least one repeat, got {len(layers)} x {repeats}"):
        Run(layers, repeats)


def test_layers_stand_in_their_pattern() -> None:
    assert MODEL.layers == (LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL, LOCAL)


def test_every_tensor_is_listed_in_order_and_counted_once() -> None:
    names = [parameter.name for parameter in MODEL.parameters()]
    pattern = ["local", "norm", "global"]

    assert names == ["embedding", *pattern * 3, *["local", "norm"] * 2, "final norm"]
    assert MODEL.parameter_count == 11 * 5 + 5 * (3 * 5 + 5) + 3 * (7 * 5) + 5
    assert MODEL.parameter_count == sum(parameter.numel for parameter in MODEL.parameters())


def test_the_largest_tensor_is_found_wherever_it_stands() -> None:
    assert MODEL.largest_parameter.name == "embedding"


def test_layers_alike_are_equal_and_others_are_not() -> None:
    again = layer(Parameter("local", (3, 5)), Parameter("norm", (5,)), window=128)

    assert again == LOCAL
    assert hash(again) == hash(LOCAL)
    assert len({LOCAL, again, GLOBAL}) == 2
