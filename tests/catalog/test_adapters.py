"""Models with adapters, against those that peft makes on the meta device."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog.adapters import as_trained
from advisor.catalog.huggingface import model_from_config
from advisor.catalog.models import find_model
from advisor.catalog.profiles import profiles_folder
from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec

from .meta_device import built_model, parameters_of
from .small_configurations import SMALL
from .test_parameters import as_described

ADAPTED = ("bloom", "falcon", "gemma2", "gpt2", "gpt_neox", "gpt_oss", "llama", "opt", "phi3", "qwen2_moe", "qwen3")
QWEN = find_model("Qwen2.5-0.5B").model


def small(family: str) -> dict[str, Any]:
    return {"model_type": family, **SMALL[family]}


def adapted(model: ModelSpec, *targets: str, rank: int = 4) -> ModelSpec:
    return as_trained(model, Job(method="lora", lora_rank=rank, lora_targets=targets))


def by_peft(config: dict[str, Any], targets: Any, rank: int = 4) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    built = built_model(config)
    with torch.device("meta"):
        return get_peft_model(built, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("family", ADAPTED)
def test_all_linear_adapts_exactly_the_layers_that_peft_adapts(family: str) -> None:
    pytest.importorskip("peft")
    config = small(family)
    model, truth = adapted(model_from_config(config, "small", "test"), "all-linear"), by_peft(config, "all-linear")

    named = as_described(family, parameters_of(truth.get_base_model()))
    assert [(each.name, each.shape) for each in model.parameters()] == named
    assert model.trained_count == sum(each.numel() for each in truth.parameters() if each.requires_grad)


def test_the_usual_targets_are_peft_s() -> None:
    constants = pytest.importorskip("peft.utils.constants")
    truth = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    table = json.loads((profiles_folder() / "lora_targets.json").read_text())["targets"]

    assert table == {family: truth[family] for family in table}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_dora_s_lengths_are_registered_where_peft_registers_them() -> None:
    peft = pytest.importorskip("peft")
    config = small("llama")
    settings = peft.LoraConfig(r=4, target_modules=["o_proj"], use_dora=True, task_type="CAUSAL_LM")
    truth = parameters_of(peft.get_peft_model(built_model(config), settings).get_base_model())
    model = as_trained(
        model_from_config(config, "small", "test"), Job(method="dora", lora_rank=4, lora_targets=("o_proj",))
    )

    assert [(each.name, each.shape) for each in model.parameters()] == as_described("llama", truth)


@given(rank=st.integers(1, 64), more=st.integers(1, 64))
def test_adapters_grow_with_their_rank_and_frozen_weights_stay(rank: int, more: int) -> None:
    narrow, wide = adapted(QWEN, rank=rank), adapted(QWEN, rank=rank + more)

    assert narrow.trained_count * (rank + more) == wide.trained_count * rank
    assert narrow.frozen_count == wide.frozen_count == QWEN.parameter_count


def test_every_weight_is_trained_without_adapters() -> None:
    assert as_trained(QWEN, Job()) is QWEN
    assert QWEN.trained_count == QWEN.parameter_count


@pytest.mark.parametrize("name", ["gpt2", "Mixtral-8x7B-v0.1"])
def test_four_bits_are_modelled_for_plain_linear_layers(name: str) -> None:
    with pytest.raises(SpecError, match=f"weights in four bits are modelled for plain linear layers, and {name} has"):
        as_trained(find_model(name).model, Job(method="qlora", lora_targets=("q_proj",)))


def test_one_layer_needs_no_gradient_of_its_input() -> None:
    opened = [layer.starts_gradients for layer in adapted(QWEN).described_layers]

    assert opened == [True] + 23 * [False]


@pytest.mark.parametrize(
    ("model", "targets", "said"),
    [
        ("Qwen2.5-0.5B", ("query",), "have no such linear layer; take all-linear or some of down_proj"),
        ("OLMo-2-1124-7B", (), "peft has no usual targets for family olmo2; give --lora-targets all-linear"),
        ("Mixtral-8x7B-v0.1", ("all-linear",), "peft adapts more of Mixtral-8x7B-v0.1 than its linear layers"),
        ("bert-base-uncased", (), "adapters are modelled for causal models"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_what_can(model: str, targets: tuple[str, ...], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        adapted(find_model(model).model, *targets)
