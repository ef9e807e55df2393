"""Every parameter, against the model that transformers builds on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from advisor.catalog.huggingface import FAMILIES, model_from_config
from advisor.catalog.models import find_model
from advisor.catalog.profiles import model_profiles
from advisor.specs.model import ModelSpec

from .meta_device import Named, built_model, parameters_of
from .small_configurations import SMALL, every_configuration

REMOTE_CODE = ("chatglm", "internlm2")


def config_of(profile: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(profile.read_text())["config"]
    return config


BUILT = [path for path in sorted(model_profiles().glob("*.json")) if config_of(path)["model_type"] not in REMOTE_CODE]


def described(model: ModelSpec) -> list[Named]:
    return [(parameter.name, parameter.shape) for parameter in model.parameters()]


def as_described(family: str, truth: list[Named]) -> list[Named]:
    """*truth* with what OPT registers before its layers, though it runs after them, moved behind them."""
    if family != "opt":
        return truth
    late = ("model.decoder.final_layer_norm", "model.decoder.project_out")
    moved = sorted((each for each in truth if each[0].startswith(late)), key=lambda each: "project" in each[0])
    rest = [each for each in truth if each not in moved]
    end = len(rest) - sum(name.startswith("lm_head") for name, _ in rest)
    return rest[:end] + moved + rest[end:]


def test_every_family_that_transformers_builds_is_compared() -> None:
    assert len(BUILT) == 79
    assert set(FAMILIES) == {*SMALL, *REMOTE_CODE, "gemma3", "llama4"}


@pytest.mark.parametrize("profile", BUILT, ids=lambda profile: profile.stem)
def test_a_profile_has_exactly_the_parameters_that_transformers_registers(profile: Path) -> None:
    pytest.importorskip("transformers")
    config = config_of(profile)
    model, built = model_from_config(config, profile.stem, "profile"), built_model(config)

    assert model.parameter_count == sum(each.numel() for each in built.parameters())
    assert described(model) == as_described(model.family, parameters_of(built))


def bytes_of_tables(model: ModelSpec, weight_bytes: int) -> int:
    sizes = {"fp32": 4, "int64": 8, "weights": weight_bytes}
    return sum(buffer.numel * sizes[buffer.number_format] for buffer in model.buffers)


@pytest.mark.parametrize("profile", BUILT, ids=lambda profile: profile.stem)
def test_a_profile_has_the_tables_that_transformers_registers(profile: Path) -> None:
    pytest.importorskip("transformers")
    config = config_of(profile)
    model, built = model_from_config(config, profile.stem, "profile"), built_model(config)
    made_in_forward = [each for each in model.buffers if each.name == "long rotary frequencies"]

    registered = sum(each.numel() * each.element_size() for each in built.buffers())
    weight_bytes = next(built.parameters()).element_size()
    assert bytes_of_tables(model, weight_bytes) == registered + 4 * sum(each.numel for each in made_in_forward)


@pytest.mark.parametrize(("family", "fields"), every_configuration(), ids=str)
def test_a_variant_has_exactly_the_parameters_that_transformers_registers(family: str, fields: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": family, **fields}
    model, built = model_from_config(config, "small", "test"), built_model(config)

    assert model.parameter_count == sum(each.numel() for each in built.parameters())
    assert described(model) == as_described(family, parameters_of(built))


# Totals that the models' publishers give on the Hub; both need remote code, so transformers cannot be asked.
@pytest.mark.parametrize(("name", "total"), [("internlm2_5-7b", 7_737_708_544), ("chatglm3-6b", 6_243_584_000)])
def test_a_family_with_remote_code_has_the_published_total(name: str, total: int) -> None:
    found = find_model(name)

    assert found.model.parameter_count == total
    assert any("trust_remote_code" in note for note in found.model.notes)


# The Hub counts all of a multimodal checkpoint: text, vision tower (SigLIP, 416,866,032) and projector.
@pytest.mark.parametrize(
    ("name", "total"),
    [("gemma-3-4b-it", 4_300_079_472), ("gemma-3-12b-it", 12_187_325_040), ("gemma-3-27b-it", 27_432_406_640)],
)
def test_the_text_tower_of_gemma_3_completes_the_published_total(name: str, total: int) -> None:
    model = find_model(name).model
    projector = 1152 * model.hidden_size + 1152

    assert model.parameter_count + 416_866_032 + projector == total


def test_a_tied_matrix_is_counted_once() -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32}
    tied = model_from_config({"model_type": "llama", **sizes, "tie_word_embeddings": True}, "tied", "test")
    untied = model_from_config({"model_type": "llama", **sizes}, "untied", "test")

    assert untied.parameter_count - tied.parameter_count == 96 * 32
