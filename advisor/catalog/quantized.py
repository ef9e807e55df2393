"""Models with weights in few bits: which of their tensors transformers 5.23 brings to which format.

bitsandbytes takes every linear layer but the output matrix (integrations/bitsandbytes.py ``replace_with_bnb_linear``,
quantizers/base.py ``get_keys_to_not_convert``), GPT-2's transposed ones among them, and no experts, which are no
linear layers. fp8 takes plain linear layers and experts (integrations/finegrained_fp8.py
``replace_with_fp8_linear``). Embeddings, norms, routers and biases keep the format that products compute in.
"""

from __future__ import annotations

from dataclasses import replace

from advisor.errors import SpecError
from advisor.specs.inference import Inference
from advisor.specs.model import Held, Layer, ModelSpec, Parameter, Run

ROUTERS = frozenset({"gate", "router"})
"""Modules with a matrix that are no linear layer in transformers, but for Llama 4's router."""
TRANSPOSED = frozenset({"gpt2"})
"""Families whose linear layers store (inputs, outputs) and are no plain ones."""
FP8_CAPABILITY = (8, 9)
"""The first compute capability with products in fp8."""


def as_held(model: ModelSpec, inference: Inference) -> ModelSpec:
    """*model* with its weights as *inference* holds them. Raises SpecError where its code has no such layers."""
    held = _held(inference)
    if held == "as model":
        return model
    if not model.described_layers:
        raise SpecError(f"weights in {inference.weights} are modelled for the known families, and {model.name} is none")
    local = {layer: _layer_held(model, layer, held) for layer in dict.fromkeys(model.described_layers)}
    runs = (
        Run(tuple(local[layer] for layer in run.layers if isinstance(layer, Layer)), run.repeats) for run in model.runs
    )
    found = replace(model, runs=tuple(runs))
    if found.parameter_count and not any(each.held == held for each in found.parameters()):
        raise SpecError(f"no layer of {model.name} can be held in {inference.weights}")
    return found


def _held(inference: Inference) -> Held:
    if inference.weights in ("nf4", "fp4"):
        return "four bits" if inference.double_quant else "four bits, plain scales"
    if inference.weights == "int8" or inference.weights == "fp8":
        return inference.weights
    return "as model"


def _layer_held(model: ModelSpec, layer: Layer, held: Held) -> Layer:
    parameters = tuple(replace(each, held=held) if _is_taken(model, each, held) else each for each in layer.parameters)
    return replace(layer, parameters=parameters)


def _is_taken(model: ModelSpec, parameter: Parameter, held: Held) -> bool:
    name = parameter.name.removesuffix(".weight")
    if len(parameter.shape) == 3:
        return held == "fp8" and name.rpartition(".")[2].endswith("proj")
    if len(parameter.shape) != 2 or name == parameter.name:
        return False
    is_router = name.rpartition(".")[2] in ROUTERS and not model.family.startswith("llama4")
    return not is_router and not (held == "fp8" and model.family in TRANSPOSED)
