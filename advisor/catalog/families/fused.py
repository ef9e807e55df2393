"""Gated decoders whose query, key and value projections are one matrix: Phi-3, InternLM2, ChatGLM."""

from __future__ import annotations

from collections.abc import Mapping

from advisor.catalog.configuration import Configuration
from advisor.catalog.families.parts import decoder, linear, runs_of, weight
from advisor.errors import ConfigError
from advisor.specs.model import Attention, FeedForward, Layer, ModelSpec

REMOTE_CODE = "its modelling code comes with the weights: load it with trust_remote_code=True"


def fused_width(attention: Attention) -> int:
    """Outputs of a joint query, key and value projection."""
    return attention.query_width + 2 * attention.key_value_width


def phi3(config: Configuration) -> ModelSpec:
    hidden_size = config.integer("hidden_size", default=3072)
    layers = config.integer("num_hidden_layers", default=32)
    heads = config.integer("num_attention_heads", default=32)
    width = config.integer("intermediate_size", default=8192)
    attention = Attention(
        heads=heads,
        key_value_heads=config.optional_integer("num_key_value_heads") or heads,
        head_dim=config.optional_integer("head_dim") or hidden_size // heads,
        fused_projection=True,
        rotary_fraction=rotary_fraction(config, "partial_rotary_factor", default=1.0),
        window=config.optional_integer("sliding_window"),
        rotates_by_head=True,
        dropout=config.number("attention_dropout", default=0.0),
    )
    layer = Layer(
        attention=attention,
        feed_forward=FeedForward(width=width, activation=config.text("hidden_act", default="silu"), fused_gate=True),
        norm="rms",
        dropout=config.number("resid_pdrop", default=0.0),
        parameters=(
            *linear("self_attn.o_proj", hidden_size, attention.query_width),
            *linear("self_attn.qkv_proj", fused_width(attention), hidden_size),
            *linear("mlp.gate_up_proj", 2 * width, hidden_size),
            *linear("mlp.down_proj", hidden_size, width),
            *weight("input_layernorm", hidden_size),
            *weight("post_attention_layernorm", hidden_size),
        ),
    )
    return decoder(
        config,
        "phi3",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=32064),
        positions=config.integer("max_position_embeddings", default=4096),
        tied=config.flag("tie_word_embeddings", default=False),
        runs=runs_of([0] * layers, lambda _: layer),
    )


def rotary_fraction(config: Configuration, key: str, default: float) -> float:
    """The rotated share of a head: in newer configurations among the rope parameters, in older ones under *key*."""
    for nested in ("rope_scaling", "rope_parameters"):
        fields = config.fields.get(nested)
        if isinstance(fields, Mapping) and "partial_rotary_factor" in fields:
            return Configuration(fields, config.name, config.source).number("partial_rotary_factor", default)
    return config.number(key, default)


def internlm2(config: Configuration) -> ModelSpec:
    """InternLM2, by the ``modeling_internlm2.py`` that its repositories carry (internlm/internlm2_5-7b)."""
    hidden_size = config.required_integer("hidden_size")
    heads = config.required_integer("num_attention_heads")
    width = config.required_integer("intermediate_size")
    vocabulary = config.required_integer("vocab_size")
    bias = config.flag("bias", default=False)
    attention = Attention(
        heads=heads,
        key_value_heads=config.optional_integer("num_key_value_heads") or heads,
        head_dim=hidden_size // heads,
        bias=bias,
        output_bias=bias,
        fused_projection=True,
    )
    layer = Layer(
        attention=attention,
        feed_forward=FeedForward(width=width, activation=config.text("hidden_act", default="silu")),
        norm="rms",
        parameters=(
            *linear("attention.wqkv", fused_width(attention), hidden_size, bias),
            *linear("attention.wo", hidden_size, attention.query_width, bias),
            *linear("feed_forward.w1", width, hidden_size),
            *linear("feed_forward.w3", width, hidden_size),
            *linear("feed_forward.w2", hidden_size, width),
            *weight("attention_norm", hidden_size),
            *weight("ffn_norm", hidden_size),
        ),
    )
    tied = config.flag("tie_word_embeddings", default=False)
    return ModelSpec(
        name=config.name,
        family="internlm2",
        objective="causal",
        hidden_size=hidden_size,
        vocabulary_size=vocabulary,
        maximum_positions=config.optional_integer("max_position_embeddings", default=2048),
        tied_embeddings=tied,
        embedding=weight("model.tok_embeddings", vocabulary, hidden_size),
        runs=runs_of([0] * config.required_integer("num_hidden_layers"), lambda _: layer),
        final_norm="rms",
        head=weight("model.norm", hidden_size) + (() if tied else weight("output", vocabulary, hidden_size)),
        source=config.source,
        notes=(REMOTE_CODE,),
    )


def chatglm(config: Configuration) -> ModelSpec:
    """ChatGLM2 and 3, by the ``modeling_chatglm.py`` that their repositories carry (THUDM/chatglm3-6b).

    Half of each head is rotated. Variants with LayerNorm, or with the residual stream taken after the norm,
    were never released and are refused.
    """
    if not config.flag("rmsnorm", default=True) or config.flag("apply_residual_connection_post_layernorm", False):
        raise ConfigError(f"{config.name} is a ChatGLM with LayerNorm or a post-norm residual, which is not described")
    hidden_size = config.required_integer("hidden_size")
    heads = config.required_integer("num_attention_heads")
    width = config.required_integer("ffn_hidden_size")
    vocabulary = config.required_integer("padded_vocab_size")
    bias = config.flag("add_bias_linear", default=False)
    grouped = config.flag("multi_query_attention", default=False)
    attention = Attention(
        heads=heads,
        key_value_heads=config.required_integer("multi_query_group_num") if grouped else heads,
        head_dim=config.required_integer("kv_channels"),
        bias=bias or config.flag("add_qkv_bias", default=False),
        output_bias=bias,
        fused_projection=True,
        rotary_fraction=0.5,
        rotates_by_head=True,
        dropout=config.number("attention_dropout", default=0.0),
    )
    layer = Layer(
        attention=attention,
        feed_forward=FeedForward(width=width, bias=bias, fused_gate=True),
        norm="rms-fp32-weight",
        dropout=config.number("hidden_dropout", default=0.0),
        parameters=(
            *weight("input_layernorm", hidden_size),
            *linear("self_attention.query_key_value", fused_width(attention), hidden_size, attention.bias),
            *linear("self_attention.dense", hidden_size, attention.query_width, bias),
            *weight("post_attention_layernorm", hidden_size),
            *linear("mlp.dense_h_to_4h", 2 * width, hidden_size, bias),
            *linear("mlp.dense_4h_to_h", hidden_size, width, bias),
        ),
    )
    tied = config.flag("tie_word_embeddings", default=False)
    output = () if tied else weight("transformer.output_layer", vocabulary, hidden_size)
    return ModelSpec(
        name=config.name,
        family="chatglm",
        objective="causal",
        hidden_size=hidden_size,
        vocabulary_size=vocabulary,
        maximum_positions=config.optional_integer("seq_length", default=2048),
        tied_embeddings=tied,
        embedding=weight("transformer.embedding.word_embeddings", vocabulary, hidden_size),
        runs=runs_of([0] * config.required_integer("num_layers"), lambda _: layer),
        final_norm="rms-fp32-weight",
        head=weight("transformer.encoder.final_layernorm", hidden_size) + output,
        source=config.source,
        notes=(REMOTE_CODE,),
    )
