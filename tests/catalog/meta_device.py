"""The truth about parameters: the models that transformers builds without allocating anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Named = tuple[str, tuple[int, ...]]

_IN_A_LAYER = re.compile(r".*?\.(?:layers|layer|block|h)\.\d+\.")


def text_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the language model: those nested in a multimodal configuration, else all."""
    nested: dict[str, Any] | None = config.get("text_config")
    return dict(config) if nested is None else dict(nested)


def built_model(config: Mapping[str, Any], device: str = "meta") -> Any:
    """The language model that transformers builds from *config*."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    fields = text_fields(config)
    family = fields.pop("model_type")
    others = {"bert": AutoModelForMaskedLM, "roberta": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}
    kind: Any = others.get(family, AutoModelForCausalLM)
    with torch.device(device):
        return kind.from_config(AutoConfig.for_model(family, **fields))


def parameters_of(model: Any) -> list[Named]:
    """Names, within their layer where they stand in one, and shapes of all parameters in registration order."""
    return [(_IN_A_LAYER.sub("", name, count=1), tuple(each.shape)) for name, each in model.named_parameters()]
