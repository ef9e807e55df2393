"""Families that no function describes: taken for a described one where the two agree, else counted and refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from advisor.catalog.huggingface import model_from_config
from advisor.errors import ConfigError

from .meta_device import built_model, parameters_of
from .small_configurations import SMALL


def config_of(family: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": family, **SMALL["llama"], **fields}


def test_a_family_with_llama_s_parameters_is_taken_for_it_and_says_so() -> None:
    pytest.importorskip("transformers")
    config = config_of("granite")
    model = model_from_config(config, "mine", "file")

    assert [(each.name, each.shape) for each in model.parameters()] == parameters_of(built_model(config))
    assert model.family == "granite"
    assert model.notes == (
        "family granite is not described; its parameters are llama's, whose activations are assumed",
    )


# OLMo-3 has OLMo-2's parameters, but windows in three of four layers.
@pytest.mark.parametrize("family", ["olmo3", "cohere", "mamba", "nemotron"])
def test_a_family_unlike_any_is_counted_and_refused(family: str) -> None:
    pytest.importorskip("transformers")
    config = config_of(family)
    total = sum(each.numel() for each in built_model(config).parameters())

    with pytest.raises(
        ConfigError, match=rf"family {family}, .* counts {total:,} parameters, .*: bert, bloom, chatglm"
    ):
        model_from_config(config, "mine", "file")


def test_a_masked_model_is_built_as_its_architectures_say() -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        built = transformers.AutoModelForMaskedLM.from_config(transformers.DistilBertConfig())
    total = sum(each.numel() for each in built.parameters())

    with pytest.raises(ConfigError, match=f"transformers counts {total:,} parameters"):
        model_from_config({"model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"]}, "mine", "file")


def test_a_family_that_transformers_does_not_know_is_told() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=r"family nonesuch, which is not described, and transformers .* cannot build"):
        model_from_config(config_of("nonesuch"), "mine", "file")


def test_a_family_that_transformers_cannot_build_is_told_in_one_line() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match="cannot build it: ") as raised:
        model_from_config(config_of("cohere", hidden_size="wide"), "mine", "file")

    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_without_transformers_the_error_says_what_to_install(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)

    with pytest.raises(ConfigError, match=r"mine is of family granite, .* pip install 'advisor\[run\]'"):
        model_from_config(config_of("granite"), "mine", "file")
