"""Random jobs that train adapters: those of the other kinds, with a rank and targets drawn besides.

One GPU, DDP and FSDP2 are traced on fake tensors; DeepSpeed, and weights in four bits, run on real ones. Left out
are sequence-to-sequence and masked models, DeepSeek V3 and Llama 4, whose routers peft cannot adapt as transformers
writes them, dropout, and mixtures in fp16, whose experts a CPU multiplies otherwise than a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from advisor.catalog.adapters import as_trained
from advisor.errors import SpecError
from advisor.specs.job import ALL_LINEAR
from advisor.specs.model import Experts
from advisor.specs.plan import FsdpSettings, Strategy
from advisor.validation.accuracy import Case
from cases import deepspeed, one_rank, sharded

RANKS = (2, 4, 8, 16, 64)
TARGETS: tuple[tuple[str, ...], ...] = ((ALL_LINEAR,), (ALL_LINEAR,), (), ("q_proj", "o_proj"), ("down_proj",))
FOUR_BIT_STRATEGIES = (
    Strategy.FSDP,
    Strategy.ZERO3,
    Strategy.DDP,
    Strategy.ZERO3,
    Strategy.HSDP,
    Strategy.ZERO2,
    Strategy.FSDP_GRAD_OP,
    Strategy.ZERO1,
)
LEFT_OUT = frozenset({"bert", "roberta", "t5", "deepseek_v3", "llama4", "llama4_text"})


def traced(seed: int, count: int) -> list[Case]:
    """*count* cases on one GPU, under DDP and under FSDP2, in turns."""
    half = count - count // 2
    drawn = [*one_rank.cases(seed, 2 * half), *(case for case in sharded.cases(seed, 4 * half) if _modelled(case))]
    adapted = _adapted(seed, drawn)
    alone = [case for case in adapted if case.plan.gpus == 1][:half]
    return [*alone, *(case for case in adapted if case.plan.gpus != 1)][:count]


def under_deepspeed(seed: int, count: int) -> list[Case]:
    """*count* cases of ZeRO's stages 1, 2 and 3, in turns."""
    return _adapted(seed, deepspeed.cases(seed, 2 * count))[:count]


def offloaded(seed: int, count: int) -> list[Case]:
    """*count* cases whose optimizer, or weights too, are in host memory."""
    return _adapted(seed, [case for case in deepspeed.offload_cases(seed, 4 * count) if not case.plan.swaps])[:count]


def with_lengths(seed: int, count: int) -> list[Case]:
    """*count* cases of DoRA on one GPU, under DDP and under FSDP2; of models without experts."""
    plain = [
        case
        for case in traced(seed, 3 * count)
        if not any(isinstance(layer.feed_forward, Experts) for layer in case.model.described_layers)
    ]
    return [replace(case, job=replace(case.job, method="dora")) for case in plain][-count:]


def in_four_bits(seed: int, count: int) -> list[Case]:
    """*count* cases beside weights in four bits, under every strategy in turns; of plain linear layers alone."""
    draw = random.Random(seed)
    found: list[Case] = []
    while len(found) < count:
        strategy = FOUR_BIT_STRATEGIES[len(found) % len(FOUR_BIT_STRATEGIES)]
        of_deepspeed = strategy if strategy in deepspeed.STRATEGIES else Strategy.ZERO3
        (case,) = deepspeed.cases(draw.randrange(2**32), 1, (of_deepspeed,))
        # A CPU computes LayerNorm under autocast otherwise than a GPU.
        autocasts = strategy is Strategy.DDP and case.model.family == "opt"
        job = replace(
            case.job,
            method="qlora",
            parameter_format="fp32",
            lora_rank=draw.choice(RANKS),
            lora_targets=draw.choice(TARGETS[:3]),
        )
        fsdp = FsdpSettings(shard_ranks=int(case.plan.gpus) // 2 if strategy is Strategy.HSDP else None)
        try:
            as_trained(case.model, job)
        except SpecError:
            continue
        if not autocasts:
            found.append(replace(case, job=job, plan=replace(case.plan, strategy=strategy, fsdp=fsdp), rank=0))
    return found


def _modelled(case: Case) -> bool:
    return case.plan.strategy is Strategy.DDP or case.plan.fsdp.version == 2


def _adapted(seed: int, cases: Sequence[Case]) -> list[Case]:
    """Those of *cases* whose models can have adapters, with them."""
    draw = random.Random(seed)
    return [found for case in cases if (found := _with_adapters(case, draw))]


def _with_adapters(case: Case, draw: random.Random) -> Case | None:
    rank, first = draw.choice(RANKS), draw.choice(TARGETS)
    mixed = any(isinstance(layer.feed_forward, Experts) for layer in case.model.described_layers)
    formats = ("bf16",) if mixed else ("bf16", "fp16")
    if case.model.family in LEFT_OUT or case.job.precision not in formats:
        return None
    for targets in (first, (ALL_LINEAR,), ("q_proj", "o_proj")):
        job = replace(case.job, method="lora", lora_rank=rank, lora_targets=targets)
        try:
            as_trained(case.model, job)
        except SpecError:
            continue
        return replace(case, job=job)
    return None
