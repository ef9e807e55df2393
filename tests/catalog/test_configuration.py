"""Configurations that cannot be read, or do not describe a model, say what is wrong and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog.configuration import Configuration, read_json
from advisor.catalog.families.parts import runs_of
from advisor.catalog.huggingface import model_from_config
from advisor.errors import AdvisorError, ConfigError
from advisor.specs.model import Attention, FeedForward, Layer, Parameter

from .small_configurations import SMALL


def test_broken_json_is_located(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n  "model_type": "llama",\n  "hidden_size" 32\n}')

    with pytest.raises(ConfigError, match=r"config\.json is not JSON: .* at line 3 column 17$"):
        read_json(path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"model_type": "\xff"}')

    with pytest.raises(ConfigError, match="byte 16 is not UTF-8 text"):
        read_json(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: No such file"):
        read_json(tmp_path / "config.json")


def test_json_that_is_not_an_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[1, 2]")

    with pytest.raises(ConfigError, match="must hold a JSON object"):
        read_json(path)


def test_a_configuration_without_model_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the configuration of mine \(file\) has no model_type"):
        model_from_config({"hidden_size": 32}, "mine", "file")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size must be a whole number of at least 1, got '32'"),
        ({"hidden_size": True}, "hidden_size must be a whole number of at least 1, got True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, got 0"),
        ({"attention_dropout": "none"}, "attention_dropout must be a number, got 'none'"),
        ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ({"hidden_act": 3}, "hidden_act must be text, got 3"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message} in the configuration of mine"):
        model_from_config({"model_type": "llama", **SMALL["llama"], **fields}, "mine", "file")


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must list one entry for each of 4 layers"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers must be a list, got 3"),
        ("gemma3", {"text_config": 3}, "text_config must hold fields, got 3"),
        ("internlm2", {"hidden_size": 32}, "num_attention_heads is missing"),
        ("chatglm", {"rmsnorm": False}, "ChatGLM with LayerNorm"),
        ("t5", {"feed_forward_proj": "open-relu"}, "must be an activation or gated- and an activation"),
    ],
)
def test_a_family_says_what_it_cannot_read(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_from_config({"model_type": family, **SMALL.get(family, {}), **fields}, "mine", "file")


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(AdvisorError, match="4 attention heads do not divide by 3 key-value heads"):
        model_from_config({"model_type": "llama", **SMALL["llama"], "num_key_value_heads": 3}, "mine", "file")


def test_sizes_left_to_defaults_are_told() -> None:
    complete = {key: value for key, value in SMALL["llama"].items() if key != "vocab_size"}
    model = model_from_config({"model_type": "llama", **complete}, "mine", "file")

    assert model.vocabulary_size == 32000
    assert model.notes == ("not in the configuration, so transformers' defaults: vocab_size 32000",)


def test_sizes_left_to_defaults_are_told_of_a_nested_configuration_too() -> None:
    model = model_from_config({"model_type": "gemma3", "text_config": {"hidden_size": 2560}}, "mine", "file")

    assert any("num_attention_heads 8" in note for note in model.notes)
    assert any("vision tower is left out" in note for note in model.notes)


def test_null_means_default_for_a_size_and_none_for_an_option() -> None:
    config = Configuration({"layers": None, "window": None}, "mine", "file")

    assert config.integer("layers", default=4) == 4
    assert config.optional_integer("window", default=4096) is None
    assert config.optional_integer("absent", default=4096) == 4096


def _layer(kind: int) -> Layer:
    return Layer(
        attention=Attention(heads=1, key_value_heads=1, head_dim=1),
        feed_forward=FeedForward(width=kind),
        norm="rms",
        parameters=(Parameter("weight", (kind,)),),
    )


@given(st.lists(st.integers(1, 3), min_size=1, max_size=40))
def test_runs_unroll_to_the_layers_they_were_made_of(kinds: list[int]) -> None:
    runs = runs_of(kinds, _layer)

    assert [layer.feed_forward.width for run in runs for _ in range(run.repeats) for layer in run.layers] == kinds


@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.integers(2, 8))
def test_a_repeated_pattern_is_at_most_one_run_and_what_is_left_of_it(pattern: list[int], repeats: int) -> None:
    runs = runs_of(pattern * repeats, _layer)

    assert len(runs) <= len(pattern)
    assert sum(len(run.layers) for run in runs) <= 2 * len(pattern)
