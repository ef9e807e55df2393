"""Models with low-rank adapters: every weight frozen, and two small matrices beside each linear layer that has them.

peft 0.21.2, tuners/lora/layer.py ``Linear``: the layer stays as ``base_layer``; ``lora_A`` (rank x inputs) and
``lora_B`` (outputs x rank) are registered behind it, with DoRA ``lora_magnitude_vector`` (outputs) too. rsLoRA scales
otherwise, and holds what LoRA does. Left out: ranks that differ by layer (``rank_pattern``), modules that are trained
whole (``modules_to_save``), and adapters outside of the layers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from advisor.catalog.configuration import read_json
from advisor.catalog.profiles import profiles_folder
from advisor.errors import SpecError
from advisor.specs.job import ALL_LINEAR, Job
from advisor.specs.model import Experts, Held, Layer, ModelSpec, Parameter, Run

ROUTERS = frozenset({"gate", "router"})
"""Modules with a matrix that are no linear layer in transformers, but for Llama 4's."""
CONVERTED = frozenset({"mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"})
"""Families for which peft takes targets beside attention for those of older checkpoints, and adapts experts too
(utils/transformers_weight_conversion.py), which is not modelled."""
INPUTS_FIRST = frozenset({"gpt2"})
"""Families whose linear layers store their matrix as (inputs, outputs)."""


def as_trained(model: ModelSpec, job: Job) -> ModelSpec:
    """*model* with the adapters that *job* asks for, or as it is where every weight is trained.

    Raises SpecError where there is nothing to adapt, or no adapters are modelled.
    """
    if job.method == "full":
        return model
    if model.objective != "causal" or not model.described_layers:
        raise SpecError(f"adapters are modelled for causal models of the known families, and {model.name} is none")
    targets = job.lora_targets or usual_targets(model)
    known = _linear_modules(model)
    if job.method == "qlora" and (model.family in (*CONVERTED, *INPUTS_FIRST) or _has_experts(model)):
        raise SpecError(f"weights in four bits are modelled for plain linear layers, and {model.name} has others")
    if ALL_LINEAR in targets and (model.family in CONVERTED or any(".project_" in each.name for each in model.head)):
        raise SpecError(
            f"peft adapts more of {model.name} than its linear layers by {ALL_LINEAR}, which is not modelled; "
            f"give --lora-targets some of {_choices(known)}"
        )
    unknown = [each for each in targets if each != ALL_LINEAR and not any(_matches(name, (each,)) for name in known)]
    if unknown:
        raise SpecError(
            f"--lora-targets {','.join(unknown)}: the layers of {model.name} have no such linear layer; "
            f"take {ALL_LINEAR} or some of {_choices(known)}"
        )
    kinds = {id(layer): layer for layer in model.described_layers}
    adapted = {kind: _adapted(model, layer, targets, job) for kind, layer in kinds.items()}
    first, *others = (Run(tuple(adapted[id(layer)] for layer in run.layers), run.repeats) for run in model.runs)
    if not any(parameter.trained for parameter in first.layers[0].parameters):
        raise SpecError(f"--lora-targets {','.join(targets)}: the first layer of {model.name} has none of these")
    runs = (*_opened(first), *others)
    return replace(model, embedding=_frozen(model.embedding), head=_frozen(model.head), runs=runs)


def usual_targets(model: ModelSpec) -> tuple[str, ...]:
    """peft's choice for the family of *model*."""
    targets = _targets_by_family().get(model.family)
    if targets is None:
        raise SpecError(
            f"peft has no usual targets for family {model.family}; give --lora-targets {ALL_LINEAR}, "
            f"or some of {_choices(_linear_modules(model))}"
        )
    return targets


@lru_cache(maxsize=1)
def _targets_by_family() -> dict[str, tuple[str, ...]]:
    table = read_json(profiles_folder() / "lora_targets.json")["targets"]
    assert isinstance(table, dict)
    return {family: tuple(names) for family, names in table.items()}


def _linear_modules(model: ModelSpec) -> tuple[str, ...]:
    """Names of the linear layers within the layers of *model*."""
    kinds = {id(layer): layer for layer in model.described_layers}.values()
    names = (_linear_module(model, each) for layer in kinds for each in layer.parameters)
    return tuple(dict.fromkeys(name for name in names if name))


def _has_experts(model: ModelSpec) -> bool:
    return any(isinstance(layer.feed_forward, Experts) for layer in model.described_layers)


def _choices(modules: tuple[str, ...]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in modules}))


def _linear_module(model: ModelSpec, parameter: Parameter) -> str | None:
    """The linear layer whose matrix *parameter* is."""
    module, _, kind = parameter.name.rpartition(".")
    is_router = module.rpartition(".")[2] in ROUTERS and not model.family.startswith("llama4")
    is_converted = model.family in CONVERTED and not module.startswith("self_attn.")
    return None if kind != "weight" or len(parameter.shape) != 2 or is_router or is_converted else module


def _matches(module: str, targets: tuple[str, ...]) -> bool:
    """peft's rule for a list of names (tuners/tuners_utils.py ``check_target_module_exists``)."""
    return ALL_LINEAR in targets or any(f".{module}".endswith(f".{target}") for target in targets)


def _adapted(model: ModelSpec, layer: Layer, targets: tuple[str, ...], job: Job) -> Layer:
    """*layer* with its own weights frozen, and adapters behind the weight and bias of each target."""
    adapted = {
        module: each
        for each in layer.parameters
        if (module := _linear_module(model, each)) and _matches(module, targets)
    }
    linear = {_linear_module(model, each) for each in layer.parameters}
    parameters: list[Parameter] = []
    for number, each in enumerate(layer.parameters):
        module, _, kind = each.name.rpartition(".")
        held: Held = "as model"
        if job.method == "qlora" and module in linear:
            # The first forward pass brings biases to the format of products (bitsandbytes nn/modules.py Linear4bit).
            held = "four bits" if kind == "weight" else "products"
        parameters.append(replace(each, trained=False, held=held))
        if module not in adapted:
            continue
        parameters[-1] = replace(parameters[-1], name=f"{module}.base_layer.{kind}")
        follows = layer.parameters[number + 1].name if number + 1 < len(layer.parameters) else ""
        if follows.rpartition(".")[0] != module:
            parameters += _adapter(adapted[module], module, model.family in INPUTS_FIRST, job)
    return replace(layer, parameters=tuple(parameters), adapter_dropout=job.lora_dropout)


def _adapter(matrix: Parameter, module: str, inputs_first: bool, job: Job) -> list[Parameter]:
    outputs, inputs = reversed(matrix.shape) if inputs_first else matrix.shape
    found = [
        Parameter(f"{module}.lora_A.default.weight", (job.lora_rank, inputs)),
        Parameter(f"{module}.lora_B.default.weight", (outputs, job.lora_rank)),
    ]
    if job.method == "dora":
        found.append(Parameter(f"{module}.lora_magnitude_vector.default.weight", (outputs,)))
    return found


def _frozen(parameters: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    return tuple(replace(each, trained=False) for each in parameters)


def _opened(run: Run) -> tuple[Run, ...]:
    """*run*, which stands first, with the first layer by itself: that one needs no gradient of its input."""
    opening, *others = run.layers
    assert isinstance(opening, Layer)
    opened = Run((replace(opening, starts_gradients=True), *others), 1)
    return (opened, Run(run.layers, run.repeats - 1)) if run.repeats > 1 else (opened,)
