"""What of a model one rank holds where transformers cuts it over several (``tp_plan="auto"``).

Queries, keys, values, gate and up are cut by their outputs, attention's output and down by their inputs; an output
matrix of its own by its rows. Embeddings, norms, routers and a tied matrix are whole on every rank (transformers 5.23,
``base_model_tp_plan`` of each family's configuration and ``_tp_plan`` of its model).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from advisor.errors import SpecError
from advisor.specs.model import Experts, FeedForward, Layer, ModelSpec, Parameter, Run

FAMILIES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)
"""Those whose plan is so."""
QUERIES, KEYS_AND_VALUES, ATTENDED = ("q_proj",), ("k_proj", "v_proj"), ("o_proj",)
ENTRANCES, EXITS = ("gate_proj", "up_proj"), ("down_proj",)
EXPERT_ENTRANCES, EXPERT_EXITS = ("experts.gate_up_proj",), ("experts.down_proj",)


def rank_part(model: ModelSpec, ranks: int) -> ModelSpec:
    """The part of *model* on each of *ranks*. Fewer key-value heads than ranks are each held by several.

    Raises SpecError where the family's plan is another, or heads or widths do not divide.
    """
    if ranks == 1:
        return model
    for reason in _reasons(model, ranks):
        raise SpecError(f"tensor parallelism over {ranks} GPUs cannot cut {model.name}: {reason}")
    local = {layer: _local_layer(layer, ranks) for layer in dict.fromkeys(model.described_layers)}
    runs = tuple(
        Run(tuple(local[layer] for layer in run.layers if isinstance(layer, Layer)), run.repeats) for run in model.runs
    )
    if model.tied_embeddings:
        return replace(model, runs=runs)
    rows = -(-model.vocabulary_size // ranks)
    *norm, matrix = model.head
    return replace(
        model,
        runs=runs,
        head=(*norm, replace(matrix, shape=(rows, *matrix.shape[1:]))),
        vocabulary_size=rows,
    )


def replicated_heads(model: ModelSpec, ranks: int) -> int:
    """How many ranks hold each key-value head: more than one is what transformers cannot do, and vLLM does."""
    return max(-(-ranks // layer.attention.key_value_heads) for layer in model.described_layers)


def _reasons(model: ModelSpec, ranks: int) -> Iterator[str]:
    if model.family not in FAMILIES:
        yield f"it is modelled for {', '.join(sorted(FAMILIES))}, and its family is {model.family}"
    for layer in dict.fromkeys(model.described_layers):
        attention = layer.attention
        if attention.heads % ranks:
            yield f"{attention.heads} attention heads do not divide over {ranks}"
        if attention.key_value_heads % ranks and ranks % attention.key_value_heads:
            yield f"{attention.key_value_heads} key-value heads and {ranks} GPUs do not divide"
        if layer.feed_forward.width % ranks:
            yield f"a feed-forward width of {layer.feed_forward.width} does not divide over {ranks}"


def _local_layer(layer: Layer, ranks: int) -> Layer:
    attention, block = layer.attention, layer.feed_forward
    local = replace(
        attention, heads=attention.heads // ranks, key_value_heads=max(1, attention.key_value_heads // ranks)
    )
    inner: FeedForward | Experts = replace(block, width=block.width // ranks)
    heads = {
        **dict.fromkeys(QUERIES, (0, local.query_width)),
        **dict.fromkeys(KEYS_AND_VALUES, (0, local.key_value_width)),
        **dict.fromkeys(ATTENDED, (1, local.query_width)),
    }
    # Experts' names end in those of dense layers, too, and are looked for first.
    widths = {
        **dict.fromkeys(EXPERT_ENTRANCES, (1, 2 * inner.width)),
        **dict.fromkeys(EXPERT_EXITS, (2, inner.width)),
        **dict.fromkeys(ENTRANCES, (0, inner.width)),
        **dict.fromkeys(EXITS, (1, inner.width)),
    }
    cuts = heads | widths
    return replace(
        layer,
        attention=local,
        feed_forward=inner,
        parameters=tuple(_cut(each, cuts) for each in layer.parameters),
    )


def _cut(parameter: Parameter, cuts: dict[str, tuple[int, int]]) -> Parameter:
    """*parameter* with the rank's share of the dimension that is cut, if one is."""
    module = parameter.name.removesuffix(".weight").removesuffix(".bias")
    for name, (dimension, size) in cuts.items():
        if f".{module}".endswith(f".{name}"):
            if dimension >= len(parameter.shape):
                return parameter  # the bias of a product cut by its inputs is whole
            shape = (*parameter.shape[:dimension], size, *parameter.shape[dimension + 1 :])
            return replace(parameter, shape=shape)
    return parameter
