"""Builds a model with transformers, for fake tensors, the meta device or real memory. Needs the extra ``run``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from advisor.errors import ConfigError
from advisor.specs.model import Objective

AUTO_CLASSES: dict[Objective, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}

DROPOUT_SETTINGS = (
    "activation_dropout",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
    "residual_dropout",
)
"""Fields of configurations that hold a probability."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """A model as its ``config.json`` describes it, and where its code may be found. Equal ones compare equal."""

    config_text: str
    """The configuration as JSON, its fields sorted."""
    objective: Objective = "causal"
    weights_from: str | None = None
    """The Hub id or folder that remote code would come from."""
    trust_remote_code: bool = False

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.config_text)
        return found

    @property
    def is_on_hub(self) -> bool:
        """Whether what the weights come from is a Hub id and not a file or folder here."""
        return self.weights_from is not None and not os.path.exists(self.weights_from)

    @property
    def family(self) -> str:
        return str(self.config.get("model_type"))


def described(
    config: Mapping[str, object],
    weights_from: str | None = None,
    trust_remote_code: bool = False,
    objective: Objective = "causal",
) -> Description:
    """The model that *config* describes."""
    return Description(
        config_text=json.dumps(dict(config), sort_keys=True),
        objective=objective,
        weights_from=weights_from,
        trust_remote_code=trust_remote_code,
    )


def needs_torch(what: str) -> None:
    """Refuse with what to install where torch or transformers are missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{what} needs torch and transformers ({error.name} is missing); pip install 'advisor[run]'"
        ) from error


def settings_of(description: Description, dropout: bool = False) -> Any:
    """transformers' configuration, without a cache for generation, and without dropout unless it is asked for."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = description.family
    fields = {
        key: value for key, value in description.config.items() if not key.startswith("_") and key != "model_type"
    }
    remote = fields.get("auto_map")
    if family not in CONFIG_MAPPING:
        if not remote and not description.is_on_hub:
            raise ConfigError(
                f"transformers {transformers.__version__} has no family {family}; a newer release may, "
                "and a model with code of its own names it under auto_map in its config.json"
            )
        if not description.trust_remote_code:
            raise ConfigError(
                f"family {family} is no part of transformers {transformers.__version__}: its code would come from "
                f"{description.weights_from}; read it there, then give --trust-remote-code to run it"
            )
        if description.weights_from is None:
            raise ConfigError(
                f"the code of family {family} is in the folder or on the Hub that its config.json is from"
            )
        built = transformers.AutoConfig.from_pretrained(description.weights_from, trust_remote_code=True)
    else:
        fields.pop("auto_map", None)
        built = transformers.AutoConfig.for_model(family, **fields)
    if description.objective == "causal":
        # Of a model that sees or hears besides, the text part alone is trained.
        built = built.get_text_config()
    built.use_cache = False
    if description.objective == "seq2seq":
        built.decoder_start_token_id = built.pad_token_id = 0
    for name in () if dropout else DROPOUT_SETTINGS:
        if hasattr(built, name):
            setattr(built, name, 0.0)
    return built


def attention_of(settings: Any, objective: Objective, wanted: str) -> str:
    """The attention implementation to ask for: *wanted*, or eager where the family's code has no fused one."""
    import transformers

    factory = getattr(transformers, AUTO_CLASSES[objective])
    try:
        kind = factory._model_mapping[type(settings)]
    except KeyError:
        return wanted
    if wanted == "flash":
        return "flash_attention_2"
    return wanted if getattr(kind, "_supports_sdpa", True) else "eager"


def real_model(settings: Any, description: Description, dtype: Any, attention: str) -> Any:
    """The model in training mode, made on whatever device is current."""
    import transformers

    factory = getattr(transformers, AUTO_CLASSES[description.objective])
    chosen = attention_of(settings, description.objective, attention)
    trusted = {"trust_remote_code": True} if description.trust_remote_code else {}
    model = factory.from_config(settings, dtype=dtype, attn_implementation=chosen, **trusted)
    model.train()
    return model


def recompute_layers(model: Any, contexts: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Checkpoint the activations of every layer, with torch's arguments for a selection among *contexts*.

    transformers renamed the switch in 5.23.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False} | dict(contexts))


@contextmanager
def failures_explained(family: str) -> Iterator[None]:
    """Turn whatever transformers or torch raise into one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        # transformers checks configurations in many ways and places; whatever it finds is the answer.
        import transformers

        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"transformers {transformers.__version__} cannot build or run {family}: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from writing on stderr what is no news to somebody who only plans."""
    import logging

    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    # What goes wrong on fake tensors is raised too; torch logs the whole stack besides.
    fake_tensors = logging.getLogger("torch._subclasses.fake_tensor")
    silent, fake_tensors.disabled = fake_tensors.disabled, True
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        fake_tensors.disabled = silent


def decoder_layers(model: Any) -> Any:
    """The list of a model's layers: of all lists of modules that are not within another, the one that weighs most."""
    from torch.nn import ModuleList

    found: list[tuple[int, Any]] = []

    def look(module: Any) -> None:
        for child in module.children():
            if isinstance(child, ModuleList):
                found.append((sum(parameter.numel() for parameter in child.parameters()), child))
            else:
                look(child)

    look(model)
    if not found:
        raise ConfigError(f"{type(model).__name__} has no list of layers")
    return max(found, key=lambda pair: pair[0])[1]
