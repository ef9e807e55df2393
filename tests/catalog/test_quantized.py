"""Weights in few bits, beside what bitsandbytes' and transformers' own layers hold."""

from __future__ import annotations

from typing import Any

import pytest

from advisor.catalog.models import find_model
from advisor.catalog.quantized import as_held
from advisor.errors import SpecError
from advisor.specs.inference import Inference
from advisor.specs.model import Held, ModelSpec, Parameter


def held_in(name: str, **words: Any) -> ModelSpec:
    return as_held(find_model(name).model, Inference(**words))


def size(model: ModelSpec) -> int:
    return sum(each.held_bytes(2, 2) for each in model.parameters())


def test_half_precision_leaves_a_model_as_it_is() -> None:
    model = find_model("Llama-3.1-8B").model

    assert held_in("Llama-3.1-8B", weights="bf16") == model


@pytest.mark.parametrize(("weights", "held"), [("nf4", "four bits, plain scales"), ("int8", "int8"), ("fp8", "fp8")])
def test_linear_layers_are_held_in_few_bits_but_for_the_output_matrix(weights: str, held: Held) -> None:
    model = held_in("Llama-3.1-8B", weights=weights)
    taken = {each.name for layer in model.layers for each in layer.parameters if each.held == held}

    assert {name.rpartition(".")[0].rpartition(".")[2] for name in taken} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all(each.held == "as model" for each in (*model.embedding, *model.head))


def test_bitsandbytes_leaves_experts_and_routers_and_fp8_routers_alone() -> None:
    def of_a_layer(weights: str) -> set[str]:
        layer = held_in("Qwen3-30B-A3B-Base", weights=weights).layers[0]
        return {each.name for each in layer.parameters if each.held != "as model"}

    assert not any("mlp" in name for name in of_a_layer("nf4"))
    assert {name for name in of_a_layer("fp8") if "mlp" in name} == {
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }


def test_a_scale_for_each_block_and_less_where_scales_are_quantized_too() -> None:
    """Llama-3.1-8B has 6,979,321,856 weights in linear layers: half a byte and 4 or 1.0156 bytes for 64 of them."""
    linear, whole = 6_979_321_856, 8_030_261_248
    plain = size(held_in("Llama-3.1-8B", weights="nf4"))
    nested = size(held_in("Llama-3.1-8B", weights="fp4", double_quant=True))

    assert plain == pytest.approx(linear * (0.5 + 4 / 64) + 2 * (whole - linear), rel=1e-4)
    assert nested == pytest.approx(linear * (0.5 + 1 / 64 + 4 / 64 / 256) + 2 * (whole - linear), rel=1e-4)


def bytes_of(*tensors: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (96, 200)])
def test_four_bits_are_those_of_bitsandbytes(kind: str, nested: bool, outputs: int, inputs: int) -> None:
    torch = pytest.importorskip("torch")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(
        inputs, outputs, bias=False, quant_type=kind, compress_statistics=nested, compute_dtype=torch.bfloat16
    ).to("cpu")
    state = layer.weight.quant_state
    beside = [state.offset, state.state2.absmax, state.state2.code] if nested else []
    held: Held = "four bits" if nested else "four bits, plain scales"

    expected = Parameter("weight", (outputs, inputs), held=held).held_bytes(2, 2)

    assert bytes_of(layer.weight, state.absmax, state.code, *beside) == expected


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (96, 200)])
@pytest.mark.filterwarnings("ignore")
def test_int8_is_that_of_bitsandbytes(outputs: int, inputs: int) -> None:
    torch = pytest.importorskip("torch")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=6.0).to("cpu")
    layer(torch.zeros(2, inputs, dtype=torch.bfloat16))

    expected = Parameter("weight", (outputs, inputs), held="int8").held_bytes(2, 2)

    assert bytes_of(layer.state.CB, layer.state.SCB) == expected


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (300, 200)])
def test_fp8_is_that_of_transformers(outputs: int, inputs: int) -> None:
    pytest.importorskip("torch")
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = module.FP8Linear(inputs, outputs, block_size=(128, 128))

    expected = Parameter("weight", (outputs, inputs), held="fp8").held_bytes(2, 2)

    assert bytes_of(layer.weight, layer.weight_scale_inv) == expected


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(SpecError, match="no layer of gpt2 can be held in fp8"):
        held_in("gpt2", weights="fp8")
