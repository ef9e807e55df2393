"""Gemma 1 to 3: scaled embeddings, norms that multiply by 1 + weight in fp32, local and global layers."""

from __future__ import annotations

from dataclasses import replace

from advisor.catalog.configuration import Configuration
from advisor.catalog.families.llama import windows_from
from advisor.catalog.families.parts import decoder, gated_projections, head_norms, projections, runs_of, weight
from advisor.specs.model import Attention, FeedForward, Layer, ModelSpec, Placement


def gemma(config: Configuration) -> ModelSpec:
    hidden_size = config.integer("hidden_size", default=3072)
    layers = config.integer("num_hidden_layers", default=28)
    layer = _layer(config, _attention(config, heads=16, key_value_heads=16), hidden_size, 24576, "pre")
    return decoder(
        config,
        "gemma",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=256000),
        positions=config.integer("max_position_embeddings", default=8192),
        tied=config.flag("tie_word_embeddings", default=True),
        runs=runs_of([0] * layers, lambda _: layer),
        norm="rms-fp32-weight",
        embedding_scale=True,
    )


def gemma2(config: Configuration) -> ModelSpec:
    """Gemma 2 caps attention scores with tanh, for which transformers has no fused kernel."""
    attention = replace(
        _attention(config, heads=8, key_value_heads=4),
        soft_cap=_given_or_default(config, "attn_logit_softcapping", default=True),
        eager_only=True,
    )
    return _with_windows(config, "gemma2", attention, interval=2, vocabulary=256000, positions=8192, capped=True)


def gemma3_text(config: Configuration) -> ModelSpec:
    attention = replace(_attention(config, heads=8, key_value_heads=4), query_key_norm="per-head")
    interval = config.integer("sliding_window_pattern", default=6)
    model = _with_windows(
        config, "gemma3_text", attention, interval=interval, vocabulary=262208, positions=131072, capped=False
    )
    return replace(model, rotary_kinds=2)


def gemma3(config: Configuration) -> ModelSpec:
    """The text tower of the multimodal Gemma 3."""
    text = config.section("text_config") or Configuration({}, config.name, config.source)
    model = gemma3_text(text)
    config.defaulted.update(text.defaulted)
    return replace(model, notes=(*model.notes, "the text tower alone; the vision tower is left out"))


def _attention(config: Configuration, heads: int, key_value_heads: int) -> Attention:
    """Attention with Gemma's default head dimension; *heads* and *key_value_heads* are the class defaults."""
    bias = config.flag("attention_bias", default=False)
    return Attention(
        heads=config.integer("num_attention_heads", default=heads),
        key_value_heads=config.integer("num_key_value_heads", default=key_value_heads),
        head_dim=config.integer("head_dim", default=256),
        bias=bias,
        output_bias=bias,
        dropout=config.number("attention_dropout", default=0.0),
        causal=not config.flag("use_bidirectional_attention", default=False),
    )


def _with_windows(
    config: Configuration,
    family: str,
    attention: Attention,
    *,
    interval: int,
    vocabulary: int,
    positions: int,
    capped: bool,
) -> ModelSpec:
    """Layers of which every *interval*-th sees everything and the others a window."""
    hidden_size = config.integer("hidden_size", default=2304)
    layers = config.integer("num_hidden_layers", default=26)
    window = config.optional_integer("sliding_window", default=4096)
    layer_types = config.texts("layer_types", layers) or [
        "sliding_attention" if (index + 1) % interval else "full_attention" for index in range(layers)
    ]
    return decoder(
        config,
        family,
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=vocabulary),
        positions=config.integer("max_position_embeddings", default=positions),
        tied=config.flag("tie_word_embeddings", default=True),
        runs=runs_of(
            windows_from(layer_types, window),
            lambda window: _layer(config, replace(attention, window=window), hidden_size, 9216, "sandwich"),
        ),
        norm="rms-fp32-weight",
        embedding_scale=True,
        logit_soft_cap=_given_or_default(config, "final_logit_softcapping", default=capped),
    )


def _layer(
    config: Configuration, attention: Attention, hidden_size: int, default_width: int, placement: Placement
) -> Layer:
    width = config.integer("intermediate_size", default=default_width)
    # Gemma 1 names the activation hidden_act and means the tanh approximation where it says gelu.
    named = config.text("hidden_act" if placement == "pre" else "hidden_activation", default="gelu_pytorch_tanh")
    activation = "gelu_pytorch_tanh" if placement == "pre" and named == "gelu" else named
    around_feed_forward = (
        (*weight("pre_feedforward_layernorm", hidden_size), *weight("post_feedforward_layernorm", hidden_size))
        if placement == "sandwich"
        else ()
    )
    return Layer(
        attention=attention,
        feed_forward=FeedForward(width=width, activation=activation),
        norm="rms-fp32-weight",
        placement=placement,
        parameters=(
            *projections(attention, hidden_size),
            *head_norms(attention),
            *gated_projections(hidden_size, width),
            *weight("input_layernorm", hidden_size),
            *weight("post_attention_layernorm", hidden_size),
            *around_feed_forward,
        ),
    )


def _given_or_default(config: Configuration, key: str, default: bool) -> bool:
    """Whether a soft cap is set; null says that there is none."""
    return config.has(key) if key in config.fields else default
