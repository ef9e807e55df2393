"""From Hugging Face's ``config.json`` to a model, by a function per architecture family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from advisor.catalog.configuration import Configuration
from advisor.catalog.families.deepseek import deepseek_v2, deepseek_v3
from advisor.catalog.families.encoders import bert, roberta, t5
from advisor.catalog.families.fused import chatglm, internlm2, phi3
from advisor.catalog.families.gemma import gemma, gemma2, gemma3, gemma3_text
from advisor.catalog.families.gpt import bloom, falcon, gpt2, gpt_neox, opt, starcoder2
from advisor.catalog.families.llama import llama, mistral, olmo2, qwen2, qwen3, smollm3
from advisor.catalog.families.mixtures import gpt_oss, llama4, llama4_text, mixtral, qwen2_moe, qwen3_moe
from advisor.catalog.families.tables import tables
from advisor.errors import ConfigError
from advisor.specs.model import ModelSpec

FAMILIES: dict[str, Callable[[Configuration], ModelSpec]] = {
    "bert": bert,
    "bloom": bloom,
    "chatglm": chatglm,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "falcon": falcon,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma3_text": gemma3_text,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gpt_oss": gpt_oss,
    "internlm2": internlm2,
    "llama": llama,
    "llama4": llama4,
    "llama4_text": llama4_text,
    "mistral": mistral,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "opt": opt,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "roberta": roberta,
    "smollm3": smollm3,
    "starcoder2": starcoder2,
    "t5": t5,
}
"""The families that are described, by transformers' ``model_type``."""


def model_from_config(config: Mapping[str, object], name: str, source: str) -> ModelSpec:
    """The model that transformers builds from *config*. *source* says where the configuration was found."""
    family = config.get("model_type")
    if not isinstance(family, str):
        raise ConfigError(
            f"the configuration of {name} ({source}) has no model_type; add the family it belongs to, such as llama"
        )
    configuration = Configuration(config, name, source)
    describe = FAMILIES.get(family)
    if describe is None:
        from advisor.catalog.unknown import undescribed_model

        return undescribed_model(configuration, family, FAMILIES)
    model = describe(configuration)
    model = replace(model, buffers=tables(model, configuration))
    if not configuration.defaulted:
        return model
    listed = ", ".join(f"{key} {value}" for key, value in configuration.defaulted.items())
    return replace(model, notes=(*model.notes, f"not in the configuration, so transformers' defaults: {listed}"))
