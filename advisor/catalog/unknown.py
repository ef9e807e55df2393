"""Models of a family that no function describes, counted by building them with transformers on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from advisor.catalog.configuration import Configuration
from advisor.errors import AdvisorError, ConfigError
from advisor.specs.model import ModelSpec


def undescribed_model(
    config: Configuration, family: str, described: Mapping[str, Callable[[Configuration], ModelSpec]]
) -> ModelSpec:
    """A model of *family*, taken for one of the *described* families where the two agree.

    Names, shapes and order of all parameters must agree, and windows, activation and support of fused attention.
    Memory of states and traffic are then exact; that layers save what the described family's save is assumed.
    """
    supported = f"described families: {', '.join(sorted(described))}"
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"{config.name} is of family {family}, which is not described; pip install 'advisor[run]' and give "
            f"--trace to run transformers' own code for it, or take another model; {supported}"
        ) from error
    built = _built(config, family, torch, transformers, supported)
    for known, describe in described.items():
        model = _described_as(config, describe)
        if model and _has_the_parameters_of(model, built) and _computes_like(model, built):
            note = f"family {family} is not described; its parameters are {known}'s, whose activations are assumed"
            return replace(model, family=family, notes=(*model.notes, note))
    total = sum(parameter.numel() for parameter in built.parameters())
    raise ConfigError(
        f"{config.name} is of family {family}, which is not described: transformers counts {total:,} parameters, "
        f"but what its layers save for backward is not known; --trace runs their code to see; {supported}"
    )


def _built(config: Configuration, family: str, torch: Any, transformers: Any, supported: str) -> Any:
    """The language model that transformers builds, without memory for its parameters."""
    fields = {key: value for key, value in config.fields.items() if key != "model_type"}
    architectures = str(fields.get("architectures") or "")
    try:
        settings = transformers.AutoConfig.for_model(family, **fields)
        if settings.is_encoder_decoder:
            kind = transformers.AutoModelForSeq2SeqLM
        elif "MaskedLM" in architectures:
            kind = transformers.AutoModelForMaskedLM
        else:
            kind = transformers.AutoModelForCausalLM
        with torch.device("meta"):
            return kind.from_config(settings)
    except Exception as error:
        # transformers checks configurations in many ways and places; whatever it finds is the answer.
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{config.name} is of family {family}, which is not described, and transformers "
            f"{transformers.__version__} cannot build it: {reason}; {supported}"
        ) from error


def _described_as(config: Configuration, describe: Callable[[Configuration], ModelSpec]) -> ModelSpec | None:
    try:
        return describe(Configuration(config.fields, config.name, config.source))
    except AdvisorError:
        return None


def _has_the_parameters_of(model: ModelSpec, built: Any) -> bool:
    """Whether names, shapes and order agree. The model's names start within a layer, so ends are compared."""
    parameters, truth = list(model.parameters()), list(built.named_parameters())
    return len(parameters) == len(truth) and all(
        parameter.shape == tuple(each.shape) and f".{name}".endswith(f".{parameter.name}")
        for parameter, (name, each) in zip(parameters, truth, strict=True)
    )


def _computes_like(model: ModelSpec, built: Any) -> bool:
    """Whether fused attention is supported alike, the same layers have windows, and the activation is the same."""
    settings, layers = built.config, model.described_layers
    kinds = getattr(settings, "layer_types", None) or ["full_attention"] * len(layers)
    return (
        layers[0].attention.eager_only is not built._supports_sdpa
        and [layer.attention.window is not None for layer in layers] == [kind != "full_attention" for kind in kinds]
        and getattr(settings, "hidden_act", None) == layers[0].feed_forward.activation
    )
