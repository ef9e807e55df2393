"""Random jobs on several GPUs under FSDP2, FSDP1 and DDP: families, formats, optimizers, ranks and micro-batches.

Truth: the frameworks' own code on fake tensors as rank 0 (``advisor/validation/sharding.py``), which holds as much as
any rank. Counter: bytes of live storages. A family is drawn before one of its models. Widths, vocabularies and experts
are those of real models; most are cut to few layers, a few stay whole. The model of the step was made without looking
at the outcome of any seed above 99.

Left out is what a CPU computes otherwise than a GPU: LayerNorm and GPT-2's activation under autocast, attention in
fp32, latent attention, Falcon's masks, and mixtures in other formats than bf16; and families whose code comes with
their weights.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from advisor.catalog.families.fused import REMOTE_CODE
from advisor.catalog.huggingface import model_from_config
from advisor.catalog.profiles import model_profiles
from advisor.specs.job import Job
from advisor.specs.model import Experts, ModelSpec
from advisor.specs.plan import Checkpointing, FsdpSettings, Plan, Strategy
from advisor.validation.accuracy import Case, with_fewer_layers

WAYS: tuple[tuple[Strategy, int], ...] = (
    (Strategy.FSDP, 2),
    (Strategy.FSDP_GRAD_OP, 2),
    (Strategy.FSDP, 2),
    (Strategy.DDP, 2),
    (Strategy.FSDP, 1),
    (Strategy.FSDP_GRAD_OP, 1),
)
"""Strategies, with FSDP's version, that come in turns."""
RANKS = (2, 4, 7, 8, 64)
LENGTHS = (16, 128, 512, 2048, 4096)
LAYERS = (1, 2, 3, 5, 8)
WHOLE_SHARE = 0.1
"""Of the cases, those whose models keep all their layers, where these are few enough."""
MOST_LAYERS = 32
FORMATS = (("fp32", "bf16"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "fp16"))
"""Formats of the weights and of the products."""
OPTIMIZERS = ("adamw-fused", "adamw-fused", "adamw-foreach", "adamw-loop")
OTHERWISE_ON_A_CPU = ("deepseek_v2", "deepseek_v3", "falcon")

Named = tuple[str, Mapping[str, Any]]


def cases(seed: int, count: int) -> list[Case]:
    """*count* cases, the same for the same *seed*."""
    draw = random.Random(seed)
    known = families()
    return [_case(draw, known, *WAYS[number % len(WAYS)]) for number in range(count)]


def families() -> dict[str, list[Named]]:
    """Names and configurations of the profiles of causal models, by family."""
    found: dict[str, list[Named]] = {}
    for path in sorted(model_profiles().glob("*.json")):
        name, config = path.stem.partition("__")[2], json.loads(path.read_text(encoding="utf-8"))["config"]
        config = config.get("text_config", config)
        model = model_from_config(config, name, "profiles/models")
        if model.objective == "causal" and REMOTE_CODE not in model.notes and model.family not in OTHERWISE_ON_A_CPU:
            found.setdefault(model.family, []).append((name, config))
    return found


def _case(draw: random.Random, families: Mapping[str, list[Named]], strategy: Strategy, version: int) -> Case:
    name, config = draw.choice(families[draw.choice(sorted(families))])
    model = model_from_config(config, name, "profiles/models")
    layers = draw.choice(LAYERS)
    if draw.random() >= WHOLE_SHARE or len(model.layers) > MOST_LAYERS:
        name, config = f"{name} cut to {layers} layers", with_fewer_layers(config, layers)
    gpus, micro_batch, steps = draw.choice(RANKS), draw.choice((1, 2)), draw.choice((1, 1, 2, 3))
    allowed = [each for each in FORMATS if _traceable(model, *each, autocast=strategy is Strategy.DDP or version == 1)]
    weights, products = draw.choice(allowed)
    job = Job(
        sequence_length=min(draw.choice(LENGTHS), model.maximum_positions or LENGTHS[-1]),
        global_batch=gpus * micro_batch * steps,
        parameter_format=weights,  # type: ignore[arg-type]
        precision=products,  # type: ignore[arg-type]
        optimizer=draw.choice(OPTIMIZERS),  # type: ignore[arg-type]
    )
    plan = Plan(
        strategy=strategy,
        gpus=gpus,
        micro_batch=micro_batch,
        accumulation_steps=steps,
        checkpointing=draw.choice((Checkpointing.NONE, Checkpointing.FULL)),
        fsdp=FsdpSettings(version=version, syncs_each_micro_batch=strategy.is_fsdp and draw.random() < 0.3),
    )
    return Case(name, config, job, plan)


def _traceable(model: ModelSpec, weights: str, products: str, autocast: bool) -> bool:
    """Whether a CPU runs the operators that a GPU would."""
    if products == "fp32":
        return False
    if any(isinstance(layer.feed_forward, Experts) for layer in model.layers):
        return products == "bf16" and (weights == "bf16" or not autocast)
    layer_norms = any(layer.norm == "layer" for layer in model.layers)
    return not (layer_norms and autocast and weights != products)
