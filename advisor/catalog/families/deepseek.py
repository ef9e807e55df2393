"""DeepSeek-V2 and V3: latent attention, a few dense layers, then experts beside shared ones."""

from __future__ import annotations

from advisor.catalog.configuration import Configuration
from advisor.catalog.families.parts import (
    Parameters,
    decoder,
    gated_projections,
    linear,
    runs_of,
    stacked_experts,
    weight,
)
from advisor.specs.model import Attention, Experts, FeedForward, LatentAttention, Layer, ModelSpec


def deepseek_v2(config: Configuration) -> ModelSpec:
    hidden_size = config.integer("hidden_size", default=4096)
    layers = config.integer("num_hidden_layers", default=32)
    bias = config.flag("mlp_bias", default=False)
    activation = config.text("hidden_act", default="silu")
    width = config.integer("moe_intermediate_size", default=1407)
    shared_count = config.integer("n_shared_experts", default=2)
    experts = Experts(
        count=config.integer("n_routed_experts", "num_experts", default=64),
        active=config.required_integer("num_experts_per_tok"),
        width=width,
        activation=activation,
        shared=FeedForward(width=shared_count * width, activation=activation, bias=bias),
        scores_add_up=False,
        router_in_fp32=True,
    )
    dense = FeedForward(width=config.integer("intermediate_size", default=11008), activation=activation, bias=bias)
    attention = _attention(config, config.integer("num_attention_heads", default=32))
    return decoder(
        config,
        "deepseek_v2",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=102400),
        positions=config.integer("max_position_embeddings", default=2048),
        tied=config.flag("tie_word_embeddings", default=False),
        runs=runs_of(
            [index >= config.integer("first_k_dense_replace", default=0, minimum=0) for index in range(layers)],
            lambda sparse: _layer(attention, experts if sparse else dense, hidden_size),
        ),
    )


def deepseek_v3(config: Configuration) -> ModelSpec:
    """DeepSeek-V3 and R1."""
    hidden_size = config.integer("hidden_size", default=7168)
    layers = config.integer("num_hidden_layers", default=61)
    activation = config.text("hidden_act", default="silu")
    width = config.integer("moe_intermediate_size", default=2048)
    shared_count = config.integer("n_shared_experts", default=1)
    experts = Experts(
        count=config.integer("n_routed_experts", "num_local_experts", default=256),
        active=config.integer("num_experts_per_tok", default=8),
        width=width,
        activation=activation,
        shared=FeedForward(width=shared_count * width, activation=activation),
        scoring="sigmoid",
        router_in_fp32=True,
    )
    dense = FeedForward(width=config.integer("intermediate_size", default=18432), activation=activation)
    attention = _attention(config, config.integer("num_attention_heads", default=128))
    return decoder(
        config,
        "deepseek_v3",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=129280),
        positions=config.integer("max_position_embeddings", default=4096),
        tied=config.flag("tie_word_embeddings", default=False),
        runs=runs_of(
            [index >= config.integer("first_k_dense_replace", default=3, minimum=0) for index in range(layers)],
            lambda sparse: _layer(attention, experts if sparse else dense, hidden_size),
        ),
        notes=("without the layer that predicts a second token, which transformers does not build",),
    )


def _attention(config: Configuration, heads: int) -> Attention:
    """Latent attention; every head has its own expanded keys and values, whatever ``num_key_value_heads`` says."""
    latent = LatentAttention(
        query_rank=config.optional_integer("q_lora_rank", default=1536),
        key_value_rank=config.integer("kv_lora_rank", default=512),
        rotary_head_dim=config.integer("qk_rope_head_dim", default=64),
        plain_head_dim=config.integer("qk_nope_head_dim", default=128),
        value_head_dim=config.integer("v_head_dim", default=128),
    )
    bias = config.flag("attention_bias", default=False)
    return Attention(
        heads=heads,
        key_value_heads=heads,
        head_dim=latent.plain_head_dim + latent.rotary_head_dim,
        bias=bias,
        output_bias=bias,
        latent=latent,
        rotates_by_head=True,
        rotary_fraction=latent.rotary_head_dim / (latent.plain_head_dim + latent.rotary_head_dim),
        dropout=config.number("attention_dropout", default=0.0),
    )


def _layer(attention: Attention, feed_forward: FeedForward | Experts, hidden_size: int) -> Layer:
    return Layer(
        attention=attention,
        feed_forward=feed_forward,
        norm="rms",
        parameters=(
            *_of_attention(attention, hidden_size),
            *_of_feed_forward(feed_forward, hidden_size),
            *weight("input_layernorm", hidden_size),
            *weight("post_attention_layernorm", hidden_size),
        ),
    )


def _of_attention(attention: Attention, hidden_size: int) -> Parameters:
    latent = attention.latent
    assert latent is not None
    if latent.query_rank is None:
        queries = linear("self_attn.q_proj", attention.query_width, hidden_size)
    else:
        queries = (
            *linear("self_attn.q_a_proj", latent.query_rank, hidden_size, attention.bias),
            *weight("self_attn.q_a_layernorm", latent.query_rank),
            *linear("self_attn.q_b_proj", attention.query_width, latent.query_rank),
        )
    compressed = latent.key_value_rank + latent.rotary_head_dim
    expanded = attention.heads * (latent.plain_head_dim + latent.value_head_dim)
    return (
        *queries,
        *linear("self_attn.kv_a_proj_with_mqa", compressed, hidden_size, attention.bias),
        *weight("self_attn.kv_a_layernorm", latent.key_value_rank),
        *linear("self_attn.kv_b_proj", expanded, latent.key_value_rank),
        *linear("self_attn.o_proj", hidden_size, attention.heads * latent.value_head_dim, attention.output_bias),
    )


def _of_feed_forward(spec: FeedForward | Experts, hidden_size: int) -> Parameters:
    if isinstance(spec, FeedForward):
        return gated_projections(hidden_size, spec.width, bias=spec.bias)
    shared = spec.shared
    assert shared is not None
    return (
        *stacked_experts(spec.count, hidden_size, spec.width),
        *weight("mlp.gate", spec.count, hidden_size),
        *gated_projections(hidden_size, shared.width, "mlp.shared_experts", shared.bias),
    )
