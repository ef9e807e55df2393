"""Masked language models, BERT and RoBERTa, and the encoder-decoder T5."""

from __future__ import annotations

from dataclasses import replace

from advisor.catalog.configuration import Configuration
from advisor.catalog.families.parts import Parameters, layer_norm, linear, runs_of, weight
from advisor.errors import ConfigError
from advisor.specs.model import Attention, FeedForward, Layer, ModelSpec, Parameter


def bert(config: Configuration) -> ModelSpec:
    hidden_size, layer = _encoder_layer(config)
    vocabulary = config.integer("vocab_size", default=30522)
    positions = config.integer("max_position_embeddings", default=512)
    tied = config.flag("tie_word_embeddings", default=True)
    types = config.integer("type_vocab_size", default=2)
    return ModelSpec(
        name=config.name,
        family="bert",
        objective="masked",
        hidden_size=hidden_size,
        vocabulary_size=vocabulary,
        maximum_positions=positions,
        tied_embeddings=tied,
        embedding=(
            *weight("bert.embeddings.word_embeddings", vocabulary, hidden_size),
            *weight("bert.embeddings.position_embeddings", positions, hidden_size),
            *weight("bert.embeddings.token_type_embeddings", types, hidden_size),
            *layer_norm("bert.embeddings.LayerNorm", hidden_size),
        ),
        embedding_norm="layer",
        embedding_dropout=layer.dropout,
        runs=runs_of([0] * config.integer("num_hidden_layers", default=12), lambda _: layer),
        final_norm=None,
        head=(
            Parameter("cls.predictions.bias", (vocabulary,)),
            *linear("cls.predictions.transform.dense", hidden_size, hidden_size, bias=True),
            *layer_norm("cls.predictions.transform.LayerNorm", hidden_size),
            *(() if tied else linear("cls.predictions.decoder", vocabulary, hidden_size, bias=True)),
        ),
        head_activation=config.text("hidden_act", default="gelu"),
        source=config.source,
    )


def roberta(config: Configuration) -> ModelSpec:
    """RoBERTa counts positions from one behind the padding token, so its table has more rows than positions."""
    hidden_size, layer = _encoder_layer(config)
    vocabulary = config.integer("vocab_size", default=50265)
    rows = config.integer("max_position_embeddings", default=512)
    padding = config.optional_integer("pad_token_id", default=1, minimum=0)
    tied = config.flag("tie_word_embeddings", default=True)
    types = config.integer("type_vocab_size", default=2)
    return ModelSpec(
        name=config.name,
        family="roberta",
        objective="masked",
        hidden_size=hidden_size,
        vocabulary_size=vocabulary,
        maximum_positions=rows - (padding or 0) - 1,
        tied_embeddings=tied,
        embedding=(
            *weight("roberta.embeddings.word_embeddings", vocabulary, hidden_size),
            *weight("roberta.embeddings.token_type_embeddings", types, hidden_size),
            *layer_norm("roberta.embeddings.LayerNorm", hidden_size),
            *weight("roberta.embeddings.position_embeddings", rows, hidden_size),
        ),
        embedding_norm="layer",
        embedding_dropout=layer.dropout,
        runs=runs_of([0] * config.integer("num_hidden_layers", default=12), lambda _: layer),
        final_norm=None,
        head=(
            Parameter("lm_head.bias", (vocabulary,)),
            *linear("lm_head.dense", hidden_size, hidden_size, bias=True),
            *layer_norm("lm_head.layer_norm", hidden_size),
            *(() if tied else linear("lm_head.decoder", vocabulary, hidden_size, bias=True)),
        ),
        head_activation="gelu",
        source=config.source,
    )


def _encoder_layer(config: Configuration) -> tuple[int, Layer]:
    """The hidden size and the layer that BERT and RoBERTa share."""
    hidden_size = config.integer("hidden_size", default=768)
    heads = config.integer("num_attention_heads", default=12)
    width = config.integer("intermediate_size", default=3072)
    layer = Layer(
        attention=Attention(
            heads=heads,
            key_value_heads=heads,
            head_dim=hidden_size // heads,
            bias=True,
            output_bias=True,
            rotary_fraction=0.0,
            narrow_softmax=True,
            dropout=config.number("attention_probs_dropout_prob", default=0.1),
            causal=False,
        ),
        feed_forward=FeedForward(
            width=width, gated=False, activation=config.text("hidden_act", default="gelu"), bias=True
        ),
        norm="layer",
        placement="post-sum",
        dropout=config.number("hidden_dropout_prob", default=0.1),
        parameters=(
            *linear("attention.self.query", hidden_size, hidden_size, bias=True),
            *linear("attention.self.key", hidden_size, hidden_size, bias=True),
            *linear("attention.self.value", hidden_size, hidden_size, bias=True),
            *linear("attention.output.dense", hidden_size, hidden_size, bias=True),
            *layer_norm("attention.output.LayerNorm", hidden_size),
            *linear("intermediate.dense", width, hidden_size, bias=True),
            *linear("output.dense", hidden_size, width, bias=True),
            *layer_norm("output.LayerNorm", hidden_size),
        ),
    )
    return hidden_size, layer


def t5(config: Configuration) -> ModelSpec:
    """T5. Its output matrix is always the embedding (configuration_t5.py sets ``tie_word_embeddings`` to true).

    The first layer of each stack owns the table of relative positions that the others read, and the encoder's
    last layer is followed by the encoder's final norm, listed with it because it runs and is registered there.
    """
    hidden_size = config.integer("d_model", "hidden_size", default=512)
    heads = config.integer("num_heads", "num_attention_heads", default=8)
    head_dim = config.integer("d_kv", "head_dim", default=64)
    width = config.integer("d_ff", default=2048)
    buckets = config.integer("relative_attention_num_buckets", default=32)
    vocabulary = config.integer("vocab_size", default=32128)
    encoder_layers = config.integer("num_layers", "num_hidden_layers", default=6)
    decoder_layers = config.optional_integer("num_decoder_layers") or encoder_layers
    dropout = config.number("dropout_rate", default=0.1)
    gated, activation = _feed_forward_kind(config)
    attention = Attention(
        heads=heads,
        key_value_heads=heads,
        head_dim=head_dim,
        rotary_fraction=0.0,
        additive_bias=True,
        narrow_softmax=True,
        dropout=dropout,
        causal=False,
    )
    inner = attention.query_width

    def of_attention(name: str) -> Parameters:
        return (
            *linear(f"{name}.q", inner, hidden_size),
            *linear(f"{name}.k", inner, hidden_size),
            *linear(f"{name}.v", inner, hidden_size),
            *linear(f"{name}.o", hidden_size, inner),
        )

    def layer(kind: tuple[bool, bool, bool]) -> Layer:
        decodes, first, closes_encoder = kind
        table = weight("layer.0.SelfAttention.relative_attention_bias", buckets, heads)
        crossing = (
            (*of_attention("layer.1.EncDecAttention"), *weight("layer.1.layer_norm", hidden_size)) if decodes else ()
        )
        last = f"layer.{2 if decodes else 1}"
        entrances = ("wi_0", "wi_1") if gated else ("wi",)
        return Layer(
            attention=replace(attention, causal=decodes),
            cross_attention=attention if decodes else None,
            feed_forward=FeedForward(width=width, gated=gated, activation=activation, dropout=dropout, widened=True),
            norm="rms-narrow",
            dropout=dropout,
            closes_stack=closes_encoder,
            parameters=(
                *of_attention("layer.0.SelfAttention"),
                *(table if first else ()),
                *weight("layer.0.layer_norm", hidden_size),
                *crossing,
                *(
                    each
                    for entrance in entrances
                    for each in linear(f"{last}.DenseReluDense.{entrance}", width, hidden_size)
                ),
                *linear(f"{last}.DenseReluDense.wo", hidden_size, width),
                *weight(f"{last}.layer_norm", hidden_size),
                *(weight("encoder.final_layer_norm", hidden_size) if closes_encoder else ()),
            ),
        )

    untied = not config.flag("tie_word_embeddings", default=True)
    kinds = [(False, index == 0, index == encoder_layers - 1) for index in range(encoder_layers)]
    kinds += [(True, index == 0, False) for index in range(decoder_layers)]
    return ModelSpec(
        name=config.name,
        family="t5",
        objective="seq2seq",
        hidden_size=hidden_size,
        vocabulary_size=vocabulary,
        maximum_positions=None,
        tied_embeddings=True,
        embedding=weight("shared", vocabulary, hidden_size),
        embedding_dropout=dropout,
        runs=runs_of(kinds, layer),
        final_norm="rms-narrow",
        final_dropout=dropout,
        head=weight("decoder.final_layer_norm", hidden_size),
        decoder_start=encoder_layers,
        source=config.source,
        notes=("transformers ties the output matrix to the embedding, although the configuration does not",)
        if untied
        else (),
    )


def _feed_forward_kind(config: Configuration) -> tuple[bool, str]:
    """Whether the feed-forward block is gated, and its activation, from ``feed_forward_proj``."""
    named = config.text("feed_forward_proj", default="relu")
    gate, _, activation = named.rpartition("-")
    if gate not in ("", "gated"):
        raise ConfigError(
            f"feed_forward_proj {named!r} in the configuration of {config.name} must be an activation "
            "or gated- and an activation, such as relu or gated-gelu"
        )
    return gate == "gated", "gelu_new" if named == "gated-gelu" else activation
