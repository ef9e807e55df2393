"""GPT-2 and decoders of its time, with LayerNorm, biases and plain feed-forward blocks."""

from __future__ import annotations

from advisor.catalog.configuration import Configuration
from advisor.catalog.families.fused import fused_width, rotary_fraction
from advisor.catalog.families.parts import Parameters, decoder, layer_norm, linear, projections, runs_of, weight
from advisor.specs.model import Attention, FeedForward, Layer, ModelSpec, Parameter


def _transposed(name: str, inputs: int, outputs: int) -> Parameters:
    """GPT-2's ``Conv1D``: a linear layer that stores its inputs first."""
    return (*weight(name, inputs, outputs), Parameter(f"{name}.bias", (outputs,)))


def gpt2(config: Configuration) -> ModelSpec:
    hidden_size = config.integer("n_embd", "hidden_size", default=768)
    heads = config.integer("n_head", "num_attention_heads", default=12)
    width = config.optional_integer("n_inner") or 4 * hidden_size
    positions = config.integer("n_positions", "max_position_embeddings", default=1024)
    vocabulary = config.integer("vocab_size", default=50257)
    tied = config.flag("tie_word_embeddings", default=True)
    layer = Layer(
        attention=Attention(
            heads=heads,
            key_value_heads=heads,
            head_dim=hidden_size // heads,
            bias=True,
            output_bias=True,
            fused_projection=True,
            rotary_fraction=0.0,
            narrow_softmax=True,
            dropout=config.number("attn_pdrop", default=0.1),
        ),
        feed_forward=FeedForward(
            width=width, gated=False, activation=config.text("activation_function", default="gelu_new"), bias=True
        ),
        norm="layer",
        dropout=config.number("resid_pdrop", default=0.1),
        names_branches=True,
        parameters=(
            *layer_norm("ln_1", hidden_size),
            *_transposed("attn.c_attn", hidden_size, 3 * hidden_size),
            *_transposed("attn.c_proj", hidden_size, hidden_size),
            *layer_norm("ln_2", hidden_size),
            *_transposed("mlp.c_fc", hidden_size, width),
            *_transposed("mlp.c_proj", width, hidden_size),
        ),
    )
    return ModelSpec(
        name=config.name,
        family="gpt2",
        objective="causal",
        hidden_size=hidden_size,
        vocabulary_size=vocabulary,
        maximum_positions=positions,
        tied_embeddings=tied,
        embedding=(
            *weight("transformer.wte", vocabulary, hidden_size),
            *weight("transformer.wpe", positions, hidden_size),
        ),
        embedding_dropout=config.number("embd_pdrop", default=0.1),
        runs=runs_of([0] * config.integer("n_layer", "num_hidden_layers", default=12), lambda _: layer),
        final_norm="layer",
        head=(
            *layer_norm("transformer.ln_f", hidden_size),
            *(() if tied else weight("lm_head", vocabulary, hidden_size)),
        ),
        source=config.source,
    )


def gpt_neox(config: Configuration) -> ModelSpec:
    hidden_size = config.integer("hidden_size", default=6144)
    heads = config.integer("num_attention_heads", default=64)
    width = config.integer("intermediate_size", default=24576)
    vocabulary = config.integer("vocab_size", default=50432)
    tied = config.flag("tie_word_embeddings", default=False)
    bias = config.flag("attention_bias", default=True)
    dropout = config.number("hidden_dropout", default=0.0)
    attention = Attention(
        heads=heads,
        key_value_heads=heads,
        head_dim=hidden_size // heads,
        bias=bias,
        output_bias=bias,
        fused_projection=True,
        rotary_fraction=rotary_fraction(config, "rotary_pct", default=0.25),
        rotates_by_head=True,
        dropout=config.number("attention_dropout", default=0.0),
    )
    layer = Layer(
        attention=attention,
        feed_forward=FeedForward(
            width=width, gated=False, activation=config.text("hidden_act", default="gelu"), bias=True
        ),
        norm="layer",
        placement="parallel" if config.flag("use_parallel_residual", default=True) else "pre",
        dropout=dropout,
        parameters=(
            *layer_norm("input_layernorm", hidden_size),
            *layer_norm("post_attention_layernorm", hidden_size),
            *linear("attention.query_key_value", fused_width(attention), hidden_size, bias),
            *linear("attention.dense", hidden_size, hidden_size, bias),
            *linear("mlp.dense_h_to_4h", width, hidden_size, bias=True),
            *linear("mlp.dense_4h_to_h", hidden_size, width, bias=True),
        ),
    )
    return ModelSpec(
        name=config.name,
        family="gpt_neox",
        objective="causal",
        hidden_size=hidden_size,
        vocabulary_size=vocabulary,
        maximum_positions=config.integer("max_position_embeddings", default=2048),
        tied_embeddings=tied,
        embedding=weight("gpt_neox.embed_in", vocabulary, hidden_size),
        embedding_dropout=dropout,
        runs=runs_of([0] * config.integer("num_hidden_layers", default=44), lambda _: layer),
        final_norm="layer",
        head=(
            *layer_norm("gpt_neox.final_layer_norm", hidden_size),
            *(() if tied else weight("lm_head", vocabulary, hidden_size)),
        ),
        source=config.source,
    )


def opt(config: Configuration) -> ModelSpec:
    """OPT. transformers registers the final norm before the layers; here it stands in the head, where it runs."""
    hidden_size = config.integer("hidden_size", default=768)
    heads = config.integer("num_attention_heads", default=12)
    width = config.integer("ffn_dim", default=3072)
    positions = config.integer("max_position_embeddings", default=2048)
    vocabulary = config.integer("vocab_size", default=50272)
    tied = config.flag("tie_word_embeddings", default=True)
    bias = config.flag("enable_bias", default=True)
    norm_before = config.flag("do_layer_norm_before", default=True)
    final_norm = norm_before and not config.flag("_remove_final_layer_norm", default=False)
    embedding_width = config.optional_integer("word_embed_proj_dim") or hidden_size
    projected = embedding_width != hidden_size

    def norm(name: str) -> Parameters:
        return layer_norm(name, hidden_size) if config.flag("layer_norm_elementwise_affine", default=True) else ()

    layer = Layer(
        attention=Attention(
            heads=heads,
            key_value_heads=heads,
            head_dim=hidden_size // heads,
            bias=bias,
            output_bias=bias,
            rotary_fraction=0.0,
            dropout=config.number("attention_dropout", default=0.0),
        ),
        feed_forward=FeedForward(
            width=width, gated=False, activation=config.text("activation_function", default="relu"), bias=bias
        ),
        norm="layer",
        placement="pre" if norm_before else "post-sum",
        dropout=config.number("dropout", default=0.1),
        parameters=(
            *linear("self_attn.k_proj", hidden_size, hidden_size, bias),
            *linear("self_attn.v_proj", hidden_size, hidden_size, bias),
            *linear("self_attn.q_proj", hidden_size, hidden_size, bias),
            *linear("self_attn.out_proj", hidden_size, hidden_size, bias),
            *norm("self_attn_layer_norm"),
            *linear("fc1", width, hidden_size, bias),
            *linear("fc2", hidden_size, width, bias),
            *norm("final_layer_norm"),
        ),
    )
    return ModelSpec(
        name=config.name,
        family="opt",
        objective="causal",
        hidden_size=hidden_size,
        vocabulary_size=vocabulary,
        maximum_positions=positions,
        tied_embeddings=tied,
        embedding=(
            *weight("model.decoder.embed_tokens", vocabulary, embedding_width),
            # Two more rows than positions (OPTLearnedPositionalEmbedding.offset).
            *weight("model.decoder.embed_positions", positions + 2, hidden_size),
            *(linear("model.decoder.project_in", hidden_size, embedding_width) if projected else ()),
        ),
        runs=runs_of([0] * config.integer("num_hidden_layers", default=12), lambda _: layer),
        final_norm="layer" if final_norm else None,
        head=(
            *(norm("model.decoder.final_layer_norm") if final_norm else ()),
            *(linear("model.decoder.project_out", embedding_width, hidden_size) if projected else ()),
            *(() if tied else weight("lm_head", vocabulary, embedding_width)),
        ),
        early_head=2 * final_norm + projected,
        source=config.source,
    )


def bloom(config: Configuration) -> ModelSpec:
    """BLOOM adds ALiBi to the scores, which transformers computes without a fused kernel."""
    hidden_size = config.integer("n_embed", "hidden_size", default=64)
    heads = config.integer("n_head", "num_attention_heads", default=8)
    vocabulary = config.integer("vocab_size", default=250880)
    tied = config.flag("tie_word_embeddings", default=True)
    width = 4 * hidden_size
    layer = Layer(
        attention=Attention(
            heads=heads,
            key_value_heads=heads,
            head_dim=hidden_size // heads,
            bias=True,
            output_bias=True,
            fused_projection=True,
            rotary_fraction=0.0,
            additive_bias=True,
            dropout=config.number("attention_dropout", default=0.0),
            eager_only=True,
            holds_scores=True,
        ),
        # BloomGelu is the tanh approximation, written out.
        feed_forward=FeedForward(width=width, gated=False, activation="bloom_gelu", bias=True),
        norm="layer",
        dropout=config.number("hidden_dropout", default=0.0),
        parameters=(
            *layer_norm("input_layernorm", hidden_size),
            *linear("self_attention.query_key_value", 3 * hidden_size, hidden_size, bias=True),
            *linear("self_attention.dense", hidden_size, hidden_size, bias=True),
            *layer_norm("post_attention_layernorm", hidden_size),
            *linear("mlp.dense_h_to_4h", width, hidden_size, bias=True),
            *linear("mlp.dense_4h_to_h", hidden_size, width, bias=True),
        ),
    )
    return ModelSpec(
        name=config.name,
        family="bloom",
        objective="causal",
        hidden_size=hidden_size,
        vocabulary_size=vocabulary,
        maximum_positions=None,
        tied_embeddings=tied,
        embedding=(
            *weight("transformer.word_embeddings", vocabulary, hidden_size),
            *layer_norm("transformer.word_embeddings_layernorm", hidden_size),
        ),
        embedding_norm="layer",
        runs=runs_of([0] * config.integer("n_layer", "num_hidden_layers", default=2), lambda _: layer),
        final_norm="layer",
        head=(
            *layer_norm("transformer.ln_f", hidden_size),
            *(() if tied else weight("lm_head", vocabulary, hidden_size)),
        ),
        source=config.source,
    )


def falcon(config: Configuration) -> ModelSpec:
    """Falcon: one norm for both parallel branches (7B), a norm for each (40B), or one branch after the other (RW)."""
    hidden_size = config.integer("n_embed", "hidden_size", default=4544)
    heads = config.integer("num_attention_heads", default=71)
    width = config.optional_integer("ffn_hidden_size") or 4 * hidden_size
    vocabulary = config.integer("vocab_size", default=65024)
    tied = config.flag("tie_word_embeddings", default=True)
    bias = config.flag("bias", default=False)
    alibi = config.flag("alibi", default=False)
    grouped = config.flag("new_decoder_architecture", default=False)
    parallel = config.flag("parallel_attn", default=True)
    key_value_heads = config.optional_integer("num_kv_heads") or heads
    if not grouped and config.flag("multi_query", default=True):
        key_value_heads = 1
    elif not grouped:
        key_value_heads = heads
    norms = config.optional_integer("num_ln_in_parallel_attn") or (2 if grouped else 1)
    attention = Attention(
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=hidden_size // heads,
        bias=bias,
        output_bias=bias,
        fused_projection=True,
        rotary_fraction=0.0 if alibi else 1.0,
        additive_bias=alibi,
        broadcast_heads=key_value_heads < heads and not grouped,
        expanded_heads=grouped,
        always_masked=True,
        narrow_softmax=True,
        # The modelling code drops attention out only beside ALiBi.
        dropout=config.number("attention_dropout", default=0.0) if alibi else 0.0,
    )
    if not parallel:
        of_norms = (
            *layer_norm("post_attention_layernorm", hidden_size),
            *layer_norm("input_layernorm", hidden_size),
        )
    elif norms == 2:
        of_norms = (*layer_norm("ln_attn", hidden_size), *layer_norm("ln_mlp", hidden_size))
    else:
        of_norms = layer_norm("input_layernorm", hidden_size)
    layer = Layer(
        attention=attention,
        feed_forward=FeedForward(
            width=width, gated=False, activation=config.text("activation", default="gelu"), bias=bias
        ),
        norm="layer",
        placement="parallel" if parallel else "pre",
        shared_norm=parallel and norms == 1,
        transposed_weights=True,
        names_branches=True,
        dropout=config.number("hidden_dropout", default=0.0),
        parameters=(
            *linear("self_attention.query_key_value", fused_width(attention), hidden_size, bias),
            *linear("self_attention.dense", hidden_size, hidden_size, bias),
            *linear("mlp.dense_h_to_4h", width, hidden_size, bias),
            *linear("mlp.dense_4h_to_h", hidden_size, width, bias),
            *of_norms,
        ),
    )
    return ModelSpec(
        name=config.name,
        family="falcon",
        objective="causal",
        hidden_size=hidden_size,
        vocabulary_size=vocabulary,
        maximum_positions=None if alibi else config.integer("max_position_embeddings", default=2048),
        tied_embeddings=tied,
        embedding=weight("transformer.word_embeddings", vocabulary, hidden_size),
        runs=runs_of([0] * config.integer("num_hidden_layers", default=32), lambda _: layer),
        final_norm="layer",
        head=(
            *layer_norm("transformer.ln_f", hidden_size),
            *(() if tied else weight("lm_head", vocabulary, hidden_size)),
        ),
        source=config.source,
        notes=("keys and values are expanded to every query head before the attention kernel",) if grouped else (),
    )


def starcoder2(config: Configuration) -> ModelSpec:
    hidden_size = config.integer("hidden_size", default=3072)
    heads = config.integer("num_attention_heads", default=24)
    width = config.integer("intermediate_size", default=12288)
    bias = config.flag("use_bias", default=True)
    attention = Attention(
        heads=heads,
        key_value_heads=config.integer("num_key_value_heads", default=2),
        head_dim=config.optional_integer("head_dim") or hidden_size // heads,
        bias=bias,
        output_bias=bias,
        window=config.optional_integer("sliding_window"),
        dropout=config.number("attention_dropout", default=0.0),
    )
    layer = Layer(
        attention=attention,
        feed_forward=FeedForward(
            width=width, gated=False, activation=config.text("hidden_act", default="gelu_pytorch_tanh"), bias=bias
        ),
        norm="layer",
        dropout=config.number("residual_dropout", default=0.0),
        parameters=(
            *projections(attention, hidden_size),
            *linear("mlp.c_fc", width, hidden_size, bias),
            *linear("mlp.c_proj", hidden_size, width, bias),
            *layer_norm("input_layernorm", hidden_size),
            *layer_norm("post_attention_layernorm", hidden_size),
        ),
    )
    return decoder(
        config,
        "starcoder2",
        hidden_size=hidden_size,
        vocabulary=config.integer("vocab_size", default=49152),
        positions=config.integer("max_position_embeddings", default=4096),
        tied=config.flag("tie_word_embeddings", default=True),
        runs=runs_of([0] * config.integer("num_hidden_layers", default=30), lambda _: layer),
        norm="layer",
        embedding_dropout=config.number("embedding_dropout", default=0.0),
    )
