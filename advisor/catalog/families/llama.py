"""Llama and the families that differ from it in biases, norms on heads, windows or rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from advisor.catalog.configuration import Configuration
from advisor.catalog.families.parts import decoder, gated_projections, head_norms, projections, runs_of, weight
from advisor.specs.model import Attention, FeedForward, Layer, ModelSpec


def plain_layer(attention: Attention, hidden_size: int, width: int, activation: str, bias: bool = False) -> Layer:
    """Llama's layer: both branches normalised before, gated feed-forward."""
    return Layer(
        attention=attention,
        feed_forward=FeedForward(width=width, activation=activation, bias=bias),
        norm="rms",
        parameters=(
            *projections(attention, hidden_size),
            *head_norms(attention),
            *gated_projections(hidden_size, width, bias=bias),
            *weight("input_layernorm", hidden_size),
            *weight("post_attention_layernorm", hidden_size),
        ),
    )


def windows_from(layer_types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """The window of each layer from transformers' ``layer_types``."""
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def llama(config: Configuration) -> ModelSpec:
    hidden_size = config.integer("hidden_size", default=4096)
    layers = config.integer("num_hidden_layers", default=32)
    heads = config.integer("num_attention_heads", default=32)
    bias = config.flag("attention_bias", default=False)
    attention = Attention(
        heads=heads,
        key_value_heads=config.optional_integer("num_key_value_heads") or heads,
        head_dim=config.optional_integer("head_dim") or hidden_size // heads,
        bias=bias,
        output_bias=bias,
        dropout=config.number("attention_dropout", default=0.0),
    )
    layer = plain_layer(
        attention,
        hidden_size,
        config.integer("intermediate_size", default=11008),
        config.text("hidden_act", default="silu"),
        config.flag("mlp_bias", default=False),
    )
    return decoder(
        config,
        "llama",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=32000),
        positions=config.integer("max_position_embeddings", default=2048),
        tied=config.flag("tie_word_embeddings", default=False),
        runs=runs_of([0] * layers, lambda _: layer),
    )


def mistral(config: Configuration) -> ModelSpec:
    hidden_size = config.integer("hidden_size", default=4096)
    layers = config.integer("num_hidden_layers", default=32)
    heads = config.integer("num_attention_heads", default=32)
    attention = Attention(
        heads=heads,
        key_value_heads=config.optional_integer("num_key_value_heads", default=8) or heads,
        head_dim=config.optional_integer("head_dim") or hidden_size // heads,
        window=config.optional_integer("sliding_window", default=4096),
        dropout=config.number("attention_dropout", default=0.0),
    )
    layer = plain_layer(
        attention,
        hidden_size,
        config.integer("intermediate_size", default=14336),
        config.text("hidden_act", default="silu"),
    )
    return decoder(
        config,
        "mistral",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=32000),
        positions=config.integer("max_position_embeddings", default=131072),
        tied=config.flag("tie_word_embeddings", default=False),
        runs=runs_of([0] * layers, lambda _: layer),
    )


def qwen2(config: Configuration) -> ModelSpec:
    hidden_size = config.integer("hidden_size", default=4096)
    heads = config.integer("num_attention_heads", default=32)
    attention = Attention(
        heads=heads,
        key_value_heads=config.optional_integer("num_key_value_heads", default=32) or heads,
        head_dim=config.optional_integer("head_dim") or hidden_size // heads,
        bias=True,
        dropout=config.number("attention_dropout", default=0.0),
    )
    return _qwen(config, "qwen2", hidden_size, attention)


def qwen3(config: Configuration) -> ModelSpec:
    hidden_size = config.integer("hidden_size", default=4096)
    heads = config.integer("num_attention_heads", default=32)
    bias = config.flag("attention_bias", default=False)
    attention = Attention(
        heads=heads,
        key_value_heads=config.optional_integer("num_key_value_heads", default=32) or heads,
        head_dim=config.integer("head_dim", default=128),
        bias=bias,
        output_bias=bias,
        query_key_norm="per-head",
        dropout=config.number("attention_dropout", default=0.0),
    )
    return _qwen(config, "qwen3", hidden_size, attention)


def _qwen(config: Configuration, family: str, hidden_size: int, attention: Attention) -> ModelSpec:
    layers = config.integer("num_hidden_layers", default=32)
    width = config.integer("intermediate_size", default=22016)
    activation = config.text("hidden_act", default="silu")
    window = config.optional_integer("sliding_window", default=4096)
    if not config.flag("use_sliding_window", default=False):
        window = None
    first_windowed = config.integer("max_window_layers", default=28, minimum=0) if window else layers
    layer_types = config.texts("layer_types", layers) or [
        "sliding_attention" if index >= first_windowed else "full_attention" for index in range(layers)
    ]
    return decoder(
        config,
        family,
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=151936),
        positions=config.integer("max_position_embeddings", default=32768),
        tied=config.flag("tie_word_embeddings", default=False),
        runs=runs_of(
            windows_from(layer_types, window),
            lambda window: plain_layer(replace(attention, window=window), hidden_size, width, activation),
        ),
    )


def smollm3(config: Configuration) -> ModelSpec:
    """SmolLM3 leaves every fourth layer without rotation."""
    hidden_size = config.integer("hidden_size", default=2048)
    layers = config.integer("num_hidden_layers", default=36)
    heads = config.integer("num_attention_heads", default=16)
    width = config.integer("intermediate_size", default=11008)
    activation = config.text("hidden_act", default="silu")
    attention_bias = config.flag("attention_bias", default=False)
    feed_forward_bias = config.flag("mlp_bias", default=False)
    rotated = rotated_layers(config, layers)
    window = config.optional_integer("sliding_window")
    if not config.flag("use_sliding_window", default=False):
        window = None
    layer_types = config.texts("layer_types", layers) or [
        "full_attention" if turns else "sliding_attention" for turns in rotated
    ]
    attention = Attention(
        heads=heads,
        key_value_heads=config.optional_integer("num_key_value_heads", default=4) or heads,
        head_dim=config.optional_integer("head_dim") or hidden_size // heads,
        bias=attention_bias,
        output_bias=attention_bias,
        dropout=config.number("attention_dropout", default=0.0),
    )

    def layer(kind: tuple[bool, int | None]) -> Layer:
        turns, window = kind
        own = replace(attention, rotary_fraction=float(turns), window=window)
        return plain_layer(own, hidden_size, width, activation, feed_forward_bias)

    return decoder(
        config,
        "smollm3",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=128256),
        positions=config.integer("max_position_embeddings", default=32768),
        tied=config.flag("tie_word_embeddings", default=True),
        runs=runs_of(list(zip(rotated, windows_from(layer_types, window), strict=True)), layer),
    )


def rotated_layers(config: Configuration, layers: int) -> tuple[bool, ...]:
    """Which layers rotate queries and keys: ``no_rope_layers`` marks them with 1, despite its name."""
    listed = config.flags("no_rope_layers", layers)
    interval = config.integer("no_rope_layer_interval", default=4)
    return listed or tuple((index + 1) % interval != 0 for index in range(layers))


def olmo2(config: Configuration) -> ModelSpec:
    """OLMo-2 normalises what a branch returns, and queries and keys over their whole width."""
    hidden_size = config.integer("hidden_size", default=4096)
    layers = config.integer("num_hidden_layers", default=32)
    heads = config.integer("num_attention_heads", default=32)
    width = config.integer("intermediate_size", default=11008)
    bias = config.flag("attention_bias", default=False)
    attention = Attention(
        heads=heads,
        key_value_heads=config.optional_integer("num_key_value_heads") or heads,
        head_dim=config.optional_integer("head_dim") or hidden_size // heads,
        bias=bias,
        output_bias=bias,
        query_key_norm="full-width",
        dropout=config.number("attention_dropout", default=0.0),
    )
    layer = Layer(
        attention=attention,
        feed_forward=FeedForward(width=width, activation=config.text("hidden_act", default="silu")),
        norm="rms-fp32-weight",
        placement="post-branch",
        parameters=(
            *projections(attention, hidden_size),
            *weight("self_attn.q_norm", attention.query_width),
            *weight("self_attn.k_norm", attention.key_value_width),
            *gated_projections(hidden_size, width),
            *weight("post_attention_layernorm", hidden_size),
            *weight("post_feedforward_layernorm", hidden_size),
        ),
    )
    return decoder(
        config,
        "olmo2",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=50304),
        positions=config.integer("max_position_embeddings", default=2048),
        tied=config.flag("tie_word_embeddings", default=False),
        runs=runs_of([0] * layers, lambda _: layer),
        norm="rms-fp32-weight",
    )
