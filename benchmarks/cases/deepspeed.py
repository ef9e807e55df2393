"""DeepSpeed cases drawn at random: small models of several families, ranks, buckets and micro-steps.

Truth: real DeepSpeed on real tensors, one rank at a time (``advisor/validation/emulate.py``). Counter: bytes of
live storages. The model of the step was made without looking at the outcome of any seed above 99.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, Offload, OffloadPlace, Plan, Strategy, ZeroSettings
from advisor.validation.accuracy import Case

STRATEGIES = (Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3)
FAMILIES = ("qwen2", "llama", "gemma", "gpt2", "opt", "phi3", "mixtral", "qwen2_moe")
TIED_OR_NOT = ("qwen2", "llama", "gemma", "phi3", "mixtral", "qwen2_moe")
DEFAULT_BUCKET = ZeroSettings().reduce_bucket


def cases(seed: int, count: int, strategies: Sequence[Strategy] = STRATEGIES) -> list[Case]:
    """*count* cases, the same for the same *seed*."""
    draw = random.Random(seed)
    return [_case(draw, strategies[number % len(strategies)]) for number in range(count)]


OFFLOADED: tuple[tuple[Strategy, Offload, OffloadPlace], ...] = (
    (Strategy.ZERO1, Offload.OPTIMIZER, "cpu"),
    (Strategy.ZERO2, Offload.OPTIMIZER, "cpu"),
    (Strategy.ZERO3, Offload.OPTIMIZER, "cpu"),
    (Strategy.ZERO3, Offload.OPTIMIZER_AND_PARAMETERS, "cpu"),
    (Strategy.ZERO3, Offload.OPTIMIZER, "nvme"),
)
"""What is offloaded where, in turns."""


def offload_cases(seed: int, count: int) -> list[Case]:
    """*count* cases with offload, whose host and device are one memory here."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        strategy, offload, place = OFFLOADED[number % len(OFFLOADED)]
        case = _case(draw, strategy)
        plan = replace(case.plan, offload=offload, offload_to=place)
        if strategy is Strategy.ZERO3:
            plan = replace(plan, zero=replace(plan.zero, sub_group=draw.choice((plan.zero.sub_group, 500_000))))
        found.append(replace(case, plan=plan))
    return found


def zero_plus_cases(seed: int, count: int) -> list[Case]:
    """*count* cases of stage 3 with second copies of the weights: the part of ZeRO++ that runs without a GPU."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        case = _case(draw, Strategy.ZERO3)
        ranks = draw.choice([each for each in (2, 4, 8) if int(case.plan.gpus) % each == 0])
        zero = replace(case.plan.zero, hpz_partition=ranks)
        found.append(replace(case, plan=replace(case.plan, strategy=Strategy.ZERO3_PLUS, zero=zero)))
    return found


def _case(draw: random.Random, strategy: Strategy) -> Case:
    family = draw.choice(FAMILIES)
    config = _config(draw, family)
    gpus = draw.choice((2, 4, 8, 64))
    length, micro_batch = draw.choice((16, 64, 128, 256)), draw.choice((1, 2, 3))
    steps = draw.choice((1, 1, 2, 3))
    bucket = draw.choice((DEFAULT_BUCKET, DEFAULT_BUCKET, 2_000_000, 500_000, 150_000))
    plan = Plan(
        strategy=strategy,
        gpus=gpus,
        micro_batch=micro_batch,
        accumulation_steps=steps,
        checkpointing=draw.choice((Checkpointing.NONE, Checkpointing.FULL)),
        zero=_window(draw, bucket) if strategy is Strategy.ZERO3 else ZeroSettings(reduce_bucket=bucket),
    )
    pure = strategy.zero_stage != 3 and draw.random() < 0.2
    job = Job(
        sequence_length=length,
        global_batch=gpus * micro_batch * steps,
        parameter_format="bf16" if pure else "fp32",
    )
    # Stage 3 cuts every tensor evenly, so that all ranks hold the same.
    rank = 0 if strategy is Strategy.ZERO3 else draw.choice((0, gpus - 1, draw.randrange(gpus)))
    return Case(family, config, job, plan, rank)


def _window(draw: random.Random, bucket: int) -> ZeroSettings:
    """Stage 3's settings: DeepSpeed's own, or such that weights are gathered and freed by and by."""
    default = ZeroSettings()
    return ZeroSettings(
        reduce_bucket=bucket,
        prefetch_bucket=draw.choice((default.prefetch_bucket, 200_000, 50_000)),
        persistence_threshold=draw.choice((default.persistence_threshold, 1000)),
        max_live_parameters=draw.choice((default.max_live_parameters, 1_000_000, 300_000)),
        max_reuse_distance=draw.choice((default.max_reuse_distance, 1_000_000, 0)),
        overlap_communication=True,
    )


def _config(draw: random.Random, family: str) -> dict[str, Any]:
    """A ``config.json`` of *family* of a few million parameters at most."""
    heads, head_dim = draw.choice((2, 4, 8)), draw.choice((16, 32, 64))
    hidden, layers, vocabulary = heads * head_dim, draw.randint(1, 6), draw.choice((512, 1000, 4096, 8192))
    if family == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": 512}
        return {"model_type": family, "vocab_size": vocabulary, **sizes, **NO_DROPOUT}
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **NO_DROPOUT,
    }
    if family == "opt":
        return config | {"ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, "max_position_embeddings": 512}
    config |= {
        "num_key_value_heads": draw.choice([count for count in (1, 2, 4, 8) if heads % count == 0]),
        "intermediate_size": draw.choice((2, 3, 4)) * hidden,
        "head_dim": head_dim,
    }
    if family in TIED_OR_NOT:
        config["tie_word_embeddings"] = draw.random() < 0.5
    if family == "mixtral":
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if family == "qwen2_moe":
        config |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": hidden,
            "shared_expert_intermediate_size": 2 * hidden,
        }
    return config


NO_DROPOUT = dict.fromkeys(
    ("attention_dropout", "attn_pdrop", "dropout", "embd_pdrop", "hidden_dropout", "resid_pdrop"), 0.0
)
