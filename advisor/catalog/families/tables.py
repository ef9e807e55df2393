"""Tables that a model keeps beside its parameters: registered buffers of transformers 5.23's modelling code.

They are small, but every rank holds them whole, and they are what model states miss to be equal to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator

from advisor.catalog.configuration import Configuration
from advisor.specs.model import Buffer, Experts, Layer, ModelSpec


def tables(model: ModelSpec, config: Configuration) -> tuple[Buffer, ...]:
    """The buffers of *model*, which was made of *config*, in no particular order."""
    return (*_rotary(model, _has_long_rope(config)), *_positions(model), *_scale(model), *_router_corrections(model))


def _rotary(model: ModelSpec, long: bool) -> Iterator[Buffer]:
    """``inv_freq`` and ``original_inv_freq`` of the rotary embedding, half as many as it turns dimensions.

    LongRoPE makes ``long_inv_freq``, a plain attribute, in the first forward (modeling_rope_utils.py).
    Gemma 3 keeps a pair for each kind of layer (models/gemma3/modeling_gemma3.py); the other families one for all.
    """
    kinds: dict[object, Layer] = {}
    for layer in model.described_layers:
        if layer.attention.rotary_dimensions:
            kinds.setdefault(layer.attention.window is not None if model.family.startswith("gemma3") else None, layer)
    for layer in kinds.values():
        frequencies = layer.attention.rotary_dimensions // 2
        yield Buffer("rotary frequencies", 2 * frequencies, "fp32")
        if long:
            yield Buffer("long rotary frequencies", frequencies, "fp32", registered=False)


def _has_long_rope(config: Configuration) -> bool:
    sections = [config.section(key) for key in ("rope_scaling", "rope_parameters")]
    kinds = {section.text(key, "") for section in sections if section for key in ("rope_type", "type")}
    return "longrope" in kinds


def _positions(model: ModelSpec) -> Iterator[Buffer]:
    """``position_ids`` and ``token_type_ids`` (models/bert/modeling_bert.py, models/roberta/modeling_roberta.py)."""
    if model.family in ("bert", "roberta"):
        positions = max(table.shape[0] for table in model.embedding[1:] if len(table.shape) == 2)
        yield Buffer("position and token type ids", 2 * positions, "int64")


def _scale(model: ModelSpec) -> Iterator[Buffer]:
    """``embed_scale`` (models/gemma2/modeling_gemma2.py; models/gemma3/modeling_gemma3.py)."""
    if model.embedding_scale:
        yield Buffer("embedding scale", 1, "weights")


def _router_corrections(model: ModelSpec) -> Iterator[Buffer]:
    """``e_score_correction_bias`` of each router (models/deepseek_v3/modeling_deepseek_v3.py)."""
    if model.family == "deepseek_v3":
        blocks = (layer.feed_forward for layer in model.described_layers)
        count = sum(block.count for block in blocks if isinstance(block, Experts))
        yield Buffer("router corrections", count, "weights")
