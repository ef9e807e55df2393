"""Random jobs on one GPU: model, sequence, micro-batch, number formats, checkpointing and attention kernel.

A family is drawn before one of its models, so that a family with many sizes counts no more than one with few. Models
are whole but for those with more layers than :data:`MOST_LAYERS`, which are cut to that many. Left out are models
whose code comes with their weights, and the scores matrix of transformers' own code beyond :data:`LONGEST_EAGER`
tokens, which nobody could hold.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from advisor.catalog.families.fused import REMOTE_CODE
from advisor.catalog.huggingface import model_from_config
from advisor.catalog.profiles import model_profiles
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Checkpointing, Plan, Strategy
from advisor.validation.accuracy import Case, with_fewer_layers

MOST_LAYERS = 80
LONGEST_EAGER = 2048
LENGTHS = (64, 128, 256, 384, 512, 768, 1000, 1024, 1536, 2048, 3072, 4096, 8192)
MICRO_BATCHES = (1, 2, 3, 4, 8)
FORMATS = (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp16"), ("fp32", "fp32"))
"""Formats of the weights and of the products: pure bf16, autocast to bf16 and to fp16, pure fp32."""
ATTENTION = ("sdpa", "sdpa", "sdpa", "eager")


def cases(seed: int, count: int) -> list[Case]:
    """*count* cases drawn by *seed*."""
    draw = random.Random(seed)
    families = _families()
    return [_case(draw, families) for _ in range(count)]


def variations(seed: int, count: int) -> list[Case]:
    """*count* cases that besides are padded, checkpointed selectively, or both."""
    draw = random.Random(seed)
    return [_varied(case, draw) for case in cases(seed, count)]


def _varied(case: Case, draw: random.Random) -> Case:
    padded, selective = draw.choice(((True, False), (False, True), (True, True)))
    if selective:
        case = replace(case, plan=replace(case.plan, checkpointing=Checkpointing.SELECTIVE))
    return replace(case, job=replace(case.job, padded=padded))


def _families() -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    """Names and configurations of the profiles whose code is transformers' own, by family."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for path in sorted(model_profiles().glob("*.json")):
        name, config = path.stem.partition("__")[2], json.loads(path.read_text(encoding="utf-8"))["config"]
        model = model_from_config(config, name, "profiles/models")
        if REMOTE_CODE not in model.notes:
            found.setdefault(model.family, []).append((name, config))
    return found


def _case(draw: random.Random, families: Mapping[str, list[tuple[str, Mapping[str, Any]]]]) -> Case:
    name, config = draw.choice(families[draw.choice(sorted(families))])
    model = model_from_config(config, name, "profiles/models")
    if len(model.layers) > MOST_LAYERS:
        name, config = f"{name} cut to {MOST_LAYERS} layers", with_fewer_layers(config, MOST_LAYERS)
    weights, products = draw.choice(FORMATS)
    attention = draw.choice(ATTENTION)
    longest = min(model.maximum_positions or LENGTHS[-1], LONGEST_EAGER if _scores(model, attention) else LENGTHS[-1])
    micro_batch = draw.choice(MICRO_BATCHES)
    job = Job(
        sequence_length=draw.choice([length for length in LENGTHS if length <= longest]),
        global_batch=micro_batch,
        parameter_format=weights,  # type: ignore[arg-type]
        precision=products,  # type: ignore[arg-type]
        attention=attention,  # type: ignore[arg-type]
    )
    checkpointing = draw.choice((Checkpointing.NONE, Checkpointing.FULL))
    return Case(
        name, config, job, Plan(strategy=Strategy.DDP, gpus=1, micro_batch=micro_batch, checkpointing=checkpointing)
    )


def _scores(model: ModelSpec, attention: str) -> bool:
    return attention == "eager" or any(layer.attention.eager_only for layer in model.layers)
