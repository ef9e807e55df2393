"""A model is found by any of its names, by a path, or not at all with near names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog import hub
from advisor.catalog.models import find_model, model_index, model_names
from advisor.errors import ConfigError, UnknownNameError

NO_HUB = "the Hub was asked"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a name is looked up on the Hub."""

    def refuse(repository: str, near_names: str) -> Path:
        raise UnknownNameError(f"{NO_HUB} for {repository}; {near_names}")

    monkeypatch.setattr(hub, "config_file", refuse)


@given(st.sampled_from(model_names()), st.booleans(), st.randoms(use_true_random=False))
def test_a_profile_is_found_in_any_case_with_or_without_its_organisation(
    name: str, with_organisation: bool, random: Random
) -> None:
    asked = name if with_organisation else name.partition("/")[2]
    found = find_model("".join(random.choice((letter.upper(), letter.lower())) for letter in asked))

    assert found.model.name == name.partition("/")[2]
    assert found.note is None


def test_names_without_their_organisation_are_unambiguous() -> None:
    names = [name.partition("/")[2].casefold() for name in model_names()]

    assert len(set(names)) == len(names) == 81


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ("Qwen2.5-1.5B-Instruct", "Qwen2.5-1.5B"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3.1-8B", "Llama-3.1-8B"),
        ("Llama-3-8B", "Meta-Llama-3-8B"),
        ("llama-2-7b", "Llama-2-7b-hf"),
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7b-hf"),
        ("Llama-3.3-70B", "Llama-3.3-70B-Instruct"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-v0.3"),
        ("Mixtral-8x22B-v0.1", "Mixtral-8x22B-Instruct-v0.1"),
        ("gemma-3-4b-pt", "gemma-3-4b-it"),
        ("gemma-2-2b-it", "gemma-2-2b"),
        ("Qwen3-8B-Base", "Qwen3-8B"),
        ("Qwen3-30B-A3B", "Qwen3-30B-A3B-Base"),
        ("Qwen3-30B-A3B-Thinking-2507", "Qwen3-30B-A3B-Instruct-2507"),
        ("DeepSeek-V2-Lite-Chat", "DeepSeek-V2-Lite"),
        ("OLMo-2-1124-7B-Instruct", "OLMo-2-1124-7B"),
    ],
)
def test_a_variant_has_the_shape_of_its_kin_and_says_so(asked: str, shape: str) -> None:
    found = find_model(asked)

    assert found.model.name == shape
    assert found.note == f"{asked} has the shape of {shape}, whose configuration was taken"


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "asked",
    ["google-bert/bert-base-cased", "t5-base", "someone/gpt2", "Qwen2.5-1.5B-Coder", "unsloth/Llama-3.1-8B-Instruct"],
)
def test_another_shape_or_publisher_is_no_variant(asked: str) -> None:
    with pytest.raises(UnknownNameError, match=NO_HUB):
        find_model(asked)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("Qwen2.5-1.5", "Qwen2.5-1.5B"),
        ("lama-3.1-8b", "Llama-3.1-8B"),
        ("gpt3", "gpt2"),
        ("mixtral", "Mixtral-8x7B-v0.1"),
    ],
)
def test_an_unknown_name_brings_near_ones(asked: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=f"near names: .*{near}.*; `advisor models` lists all"):
        find_model(asked)


@pytest.mark.usefixtures("no_hub")
def test_a_name_like_no_other_says_so() -> None:
    with pytest.raises(UnknownNameError, match="no name is near"):
        find_model("zzzz")


def test_what_is_not_a_name_is_told_before_the_hub_is_asked() -> None:
    with pytest.raises(UnknownNameError, match="'gpt 2!' is neither a model's name nor a Hub id; near names: gpt2"):
        find_model("gpt 2!")


@pytest.mark.parametrize("asked", ["", "x" * 5000, "a\0b", "someone/", "имя"])
def test_what_can_be_no_name_is_refused(asked: str) -> None:
    with pytest.raises(UnknownNameError, match="neither a model's name nor a Hub id"):
        find_model(asked)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_or_its_configuration_is_a_model(folder: Path) -> None:
    for asked in (str(folder), str(folder / "config.json"), f"{folder}/"):
        model = find_model(asked).model
        assert (model.name, model.hidden_size) == ("my-model", 32)
        assert model.source.endswith("config.json")


def test_a_configuration_may_have_any_name(folder: Path) -> None:
    path = (folder / "config.json").rename(folder / "small.json")

    assert find_model(str(path)).model.name == "small"


def test_a_local_folder_comes_before_a_profile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.parent / "gpt2")
    monkeypatch.chdir(folder.parent)

    assert find_model("gpt2").model.hidden_size == 32


def test_a_folder_without_a_configuration_does_not_hide_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)

    assert find_model("gpt2").model.hidden_size == 768


def test_a_path_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"there is no file .*absent\.json"):
        find_model(str(tmp_path / "absent.json"))
    with pytest.raises(UnknownNameError, match=r"holds no config\.json"):
        find_model(str(tmp_path))
    with pytest.raises(UnknownNameError, match="there is no file ~nobody-here/model"):
        find_model("~nobody-here/model")


def test_a_broken_configuration_is_located(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": }')

    with pytest.raises(ConfigError, match=r"my-model/config\.json is not JSON: .* at line 1 column 16"):
        find_model(str(folder))


def test_the_table_of_models_has_a_line_for_each_profile() -> None:
    rows = model_index()
    row = next(row for row in rows if row.name == "Qwen2.5-1.5B")

    assert len(rows) == len(model_names())
    assert (row.family, row.parameters, row.layers, row.hidden_size) == ("qwen2", 1_543_714_304, 28, 1536)
    assert (row.vocabulary_size, row.maximum_positions) == (151936, 32768)


def test_a_profile_is_found_without_the_hub_s_library() -> None:
    """A fresh interpreter finds a model and a GPU and has loaded nothing heavy."""
    import subprocess

    code = (
        "import sys; from advisor.catalog.models import find_model; from advisor.catalog.gpus import find_gpu;"
        "find_model('Qwen2.5-1.5B-Instruct'); find_gpu('4090');"
        "print(*sorted({'huggingface_hub', 'torch', 'transformers', 'pandas', 'pynvml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("shortened", "repository"),
    [("Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1"), ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b-hf")],
)
def test_the_beginning_of_one_name_only_is_enough(shortened: str, repository: str) -> None:
    found = find_model(shortened)

    assert found.weights_from == repository
    assert found.note is not None
    assert found.model.name in found.note


def test_weights_come_from_the_hub_id_of_what_was_asked_for() -> None:
    assert find_model("qwen2.5-1.5B").weights_from == "Qwen/Qwen2.5-1.5B"
    assert find_model("Qwen2.5-1.5B-Instruct").weights_from == "Qwen/Qwen2.5-1.5B-Instruct"
