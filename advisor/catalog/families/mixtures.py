"""Mixtures of experts with ordinary attention: Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss, Llama 4."""

from __future__ import annotations

from dataclasses import replace

from advisor.catalog.configuration import Configuration
from advisor.catalog.families.llama import plain_layer, rotated_layers, windows_from
from advisor.catalog.families.parts import (
    Parameters,
    decoder,
    gated_projections,
    head_norms,
    linear,
    projections,
    runs_of,
    stacked_experts,
    weight,
)
from advisor.specs.model import Attention, Experts, FeedForward, Layer, ModelSpec, NormKind, Parameter


def sparse_layer(
    attention: Attention,
    experts: Experts,
    hidden_size: int,
    of_experts: Parameters,
    norm: NormKind = "rms",
    sinks: Parameters = (),
) -> Layer:
    """Llama's layer with experts, whose parameters are *of_experts*, in place of the feed-forward block."""
    return Layer(
        attention=attention,
        feed_forward=experts,
        norm=norm,
        parameters=(
            *sinks,
            *projections(attention, hidden_size),
            *head_norms(attention),
            *of_experts,
            *weight("input_layernorm", hidden_size),
            *weight("post_attention_layernorm", hidden_size),
        ),
    )


def mixtral(config: Configuration) -> ModelSpec:
    hidden_size = config.integer("hidden_size", default=4096)
    layers = config.integer("num_hidden_layers", default=32)
    heads = config.integer("num_attention_heads", default=32)
    attention = Attention(
        heads=heads,
        key_value_heads=config.optional_integer("num_key_value_heads", default=8) or heads,
        head_dim=config.optional_integer("head_dim") or hidden_size // heads,
        window=config.optional_integer("sliding_window"),
        dropout=config.number("attention_dropout", default=0.0),
    )
    experts = Experts(
        count=config.integer("num_local_experts", "num_experts", default=8),
        active=config.integer("num_experts_per_tok", default=2),
        width=config.integer("intermediate_size", default=14336),
        activation=config.text("hidden_act", default="silu"),
    )
    of_experts = (
        *weight("mlp.gate", experts.count, hidden_size),
        *stacked_experts(experts.count, hidden_size, experts.width),
    )
    layer = sparse_layer(attention, experts, hidden_size, of_experts)
    return decoder(
        config,
        "mixtral",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=32000),
        positions=config.integer("max_position_embeddings", default=131072),
        tied=config.flag("tie_word_embeddings", default=False),
        runs=runs_of([0] * layers, lambda _: layer),
    )


def qwen2_moe(config: Configuration) -> ModelSpec:
    """Qwen2-MoE adds an expert that every token passes, behind a sigmoid gate."""
    hidden_size = config.integer("hidden_size", default=2048)
    layers = config.integer("num_hidden_layers", default=24)
    heads = config.integer("num_attention_heads", default=16)
    activation = config.text("hidden_act", default="silu")
    shared = FeedForward(width=config.integer("shared_expert_intermediate_size", default=5632), activation=activation)
    experts = Experts(
        count=config.integer("num_experts", default=60),
        active=config.integer("num_experts_per_tok", default=4),
        width=config.integer("moe_intermediate_size", default=1408),
        activation=activation,
        shared=shared,
        shared_gate=True,
        scores_add_up=config.flag("norm_topk_prob", default=False),
    )
    of_experts = (
        *weight("mlp.gate", experts.count, hidden_size),
        *stacked_experts(experts.count, hidden_size, experts.width),
        *gated_projections(hidden_size, shared.width, "mlp.shared_expert"),
        *linear("mlp.shared_expert_gate", 1, hidden_size),
    )
    attention = Attention(
        heads=heads,
        key_value_heads=config.optional_integer("num_key_value_heads", default=16) or heads,
        head_dim=config.optional_integer("head_dim") or hidden_size // heads,
        bias=config.flag("qkv_bias", default=True),
        dropout=config.number("attention_dropout", default=0.0),
    )
    window = None
    if config.flag("use_sliding_window", default=False):
        window = config.optional_integer("sliding_window", default=4096)
    # Every other layer below max_window_layers has a window (configuration_qwen2_moe.py, __post_init__).
    windowed = config.integer("max_window_layers", default=28, minimum=0) if window else 0
    layer_types = config.texts("layer_types", layers) or [
        "sliding_attention" if (index + 1) % 2 and index < windowed else "full_attention" for index in range(layers)
    ]
    windows = windows_from(layer_types, window)
    width = config.integer("intermediate_size", default=5632)
    sparse = _sparse_layers(config, layers)

    def layer(kind: tuple[bool, int | None]) -> Layer:
        own = replace(attention, window=kind[1])
        if kind[0]:
            return sparse_layer(own, experts, hidden_size, of_experts)
        return plain_layer(own, hidden_size, width, activation)

    return decoder(
        config,
        "qwen2_moe",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=151936),
        positions=config.integer("max_position_embeddings", default=32768),
        tied=config.flag("tie_word_embeddings", default=False),
        runs=runs_of(list(zip(sparse, windows, strict=True)), layer),
    )


def qwen3_moe(config: Configuration) -> ModelSpec:
    hidden_size = config.integer("hidden_size", default=2048)
    layers = config.integer("num_hidden_layers", default=24)
    heads = config.integer("num_attention_heads", default=32)
    activation = config.text("hidden_act", default="silu")
    bias = config.flag("attention_bias", default=False)
    windowed = config.flag("use_sliding_window", default=False)
    attention = Attention(
        heads=heads,
        key_value_heads=config.integer("num_key_value_heads", default=4),
        head_dim=config.optional_integer("head_dim") or hidden_size // heads,
        bias=bias,
        output_bias=bias,
        query_key_norm="per-head",
        window=config.optional_integer("sliding_window", default=4096) if windowed else None,
        dropout=config.number("attention_dropout", default=0.0),
    )
    experts = Experts(
        count=config.integer("num_experts", "num_local_experts", default=128),
        active=config.integer("num_experts_per_tok", default=8),
        width=config.integer("moe_intermediate_size", default=768),
        activation=activation,
        scores_add_up=config.flag("norm_topk_prob", default=False),
    )
    of_experts = (
        *stacked_experts(experts.count, hidden_size, experts.width),
        *weight("mlp.gate", experts.count, hidden_size),
    )
    width = config.integer("intermediate_size", default=6144)

    def layer(sparse: bool) -> Layer:
        if sparse:
            return sparse_layer(attention, experts, hidden_size, of_experts)
        return plain_layer(attention, hidden_size, width, activation)

    return decoder(
        config,
        "qwen3_moe",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=151936),
        positions=config.integer("max_position_embeddings", default=32768),
        tied=config.flag("tie_word_embeddings", default=False),
        runs=runs_of(_sparse_layers(config, layers), layer),
    )


def _sparse_layers(config: Configuration, layers: int) -> list[bool]:
    """Which layers of a Qwen mixture have experts."""
    step = config.integer("decoder_sparse_step", default=1)
    dense = config.integers("mlp_only_layers") or ()
    return [index not in dense and (index + 1) % step == 0 for index in range(layers)]


def gpt_oss(config: Configuration) -> ModelSpec:
    """gpt-oss: alternating windows, a learned sink per head, biases everywhere, and no fused kernel for the sinks."""
    hidden_size = config.integer("hidden_size", default=2880)
    layers = config.integer("num_hidden_layers", default=36)
    heads = config.integer("num_attention_heads", default=64)
    bias = config.flag("attention_bias", default=True)
    window = config.optional_integer("sliding_window", default=128)
    attention = Attention(
        heads=heads,
        key_value_heads=config.integer("num_key_value_heads", default=8),
        head_dim=config.integer("head_dim", default=64),
        bias=bias,
        output_bias=bias,
        sinks=True,
        dropout=config.number("attention_dropout", default=0.0),
        eager_only=True,
    )
    experts = Experts(
        count=config.integer("num_local_experts", "num_experts", default=128),
        active=config.integer("num_experts_per_tok", default=4),
        width=config.integer("intermediate_size", default=2880),
        activation="clamped-swiglu",
        bias=True,
        scoring="softmax-of-topk",
        outputs_first=False,
    )
    # Stored inputs first, the other way round than elsewhere, each followed by its bias.
    of_experts = (
        *linear("mlp.router", experts.count, hidden_size, bias=True),
        Parameter("mlp.experts.gate_up_proj", (experts.count, hidden_size, 2 * experts.width)),
        Parameter("mlp.experts.gate_up_proj_bias", (experts.count, 2 * experts.width)),
        Parameter("mlp.experts.down_proj", (experts.count, experts.width, hidden_size)),
        Parameter("mlp.experts.down_proj_bias", (experts.count, hidden_size)),
    )
    layer_types = config.texts("layer_types", layers) or [
        "full_attention" if index % 2 else "sliding_attention" for index in range(layers)
    ]
    return decoder(
        config,
        "gpt_oss",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=201088),
        positions=config.integer("max_position_embeddings", default=131072),
        tied=config.flag("tie_word_embeddings", default=False),
        runs=runs_of(
            windows_from(layer_types, window),
            lambda window: sparse_layer(
                replace(attention, window=window),
                experts,
                hidden_size,
                of_experts,
                "rms-fp32-weight",
                sinks=(Parameter("self_attn.sinks", (heads,)),),
            ),
        ),
        norm="rms-fp32-weight",
    )


def llama4_text(config: Configuration) -> ModelSpec:
    """Llama 4: rotated layers see chunks, the others everything; experts in every layer or every other one."""
    hidden_size = config.integer("hidden_size", default=5120)
    layers = config.integer("num_hidden_layers", default=48)
    heads = config.integer("num_attention_heads", default=40)
    activation = config.text("hidden_act", default="silu")
    bias = config.flag("attention_bias", default=False)
    normed = config.flag("use_qk_norm", default=True)
    chunk = config.optional_integer("attention_chunk_size", default=8192)
    attention = Attention(
        narrow_softmax=True,
        heads=heads,
        key_value_heads=config.optional_integer("num_key_value_heads", default=8) or heads,
        head_dim=config.optional_integer("head_dim", default=128) or hidden_size // heads,
        bias=bias,
        output_bias=bias,
        dropout=config.number("attention_dropout", default=0.0),
    )
    width = config.integer("intermediate_size", default=8192)
    experts = Experts(
        count=config.integer("num_local_experts", default=16),
        active=config.integer("num_experts_per_tok", default=1),
        width=width,
        activation=activation,
        shared=FeedForward(width=width, activation=activation),
        scoring="sigmoid",
        every_token=True,
        outputs_first=False,
    )
    of_experts = (
        Parameter("feed_forward.experts.gate_up_proj", (experts.count, hidden_size, 2 * width)),
        Parameter("feed_forward.experts.down_proj", (experts.count, width, hidden_size)),
        *weight("feed_forward.router", experts.count, hidden_size),
        *gated_projections(hidden_size, width, "feed_forward.shared_expert"),
    )
    dense = FeedForward(width=config.integer("intermediate_size_mlp", default=16384), activation=activation)
    rotated = rotated_layers(config, layers)
    layer_types = config.texts("layer_types", layers) or [
        "chunked_attention" if turns else "full_attention" for turns in rotated
    ]
    chunks = [chunk if kind == "chunked_attention" else None for kind in layer_types]
    step = config.integer("interleave_moe_layer_step", default=1)
    listed = config.integers("moe_layers")
    with_experts = range(step - 1, layers, step) if listed is None else listed
    sparse = [index in with_experts for index in range(layers)]

    def layer(kind: tuple[bool, bool, int | None]) -> Layer:
        has_experts, turns, window = kind
        own = replace(
            attention,
            rotary_fraction=float(turns),
            query_key_norm="unweighted" if normed and turns else "none",
            window=window,
        )
        if has_experts:
            return sparse_layer(own, experts, hidden_size, of_experts)
        of_dense = gated_projections(hidden_size, dense.width, "feed_forward")
        return replace(sparse_layer(own, experts, hidden_size, of_dense), feed_forward=dense)

    return decoder(
        config,
        "llama4_text",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=202048),
        positions=config.integer("max_position_embeddings", default=131072),
        tied=config.flag("tie_word_embeddings", default=False),
        runs=runs_of(list(zip(sparse, rotated, chunks, strict=True)), layer),
        notes=("transformers runs every token through every expert of Llama 4 and weights the others with 0",),
    )


def llama4(config: Configuration) -> ModelSpec:
    """The text tower of the multimodal Llama 4."""
    text = config.section("text_config") or Configuration({}, config.name, config.source)
    model = llama4_text(text)
    config.defaulted.update(text.defaulted)
    return replace(model, notes=(*model.notes, "the text tower alone; the vision tower is left out"))
