"""Random jobs with other optimizers than torch's AdamW: those of the other kinds, each optimizer in its turn.

One GPU, DDP, FSDP1 and FSDP2 are traced on fake tensors, DeepSpeed runs on real ones. Traced models are cut to
:data:`LAYERS` layers. Paged moments lie on the host: host and device are one memory here. GaLore decomposes in every
step, as else in every 200th. Needs bitsandbytes and galore-torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import get_args

from advisor.catalog.legality import refusal_of_optimizer
from advisor.specs.job import Optimizer
from advisor.specs.plan import Strategy
from advisor.validation.accuracy import Case, with_fewer_layers
from cases import deepspeed, one_rank, sharded

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)[3:]
LAYERS = 4
WAITING = 5
"""So many are tried with a case before another is drawn: few go with FSDP2."""
RANKS = (4, 64, 128, 512)
"""Of GaLore."""


def traced(seed: int, count: int) -> list[Case]:
    """*count* cases on one GPU and, as often, on one of several."""
    half = count - count // 2
    alone = _with_optimizers(seed, one_rank.cases(seed, 2 * half), half)
    return [*map(_cut, alone), *map(_cut, _with_optimizers(seed, sharded.cases(seed, 6 * count), count - half))]


def under_deepspeed(seed: int, count: int) -> list[Case]:
    """*count* cases of ZeRO's stages 0 to 3, in turns."""
    strategies = (Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3, Strategy.ZERO0)
    drawn = (case for case in deepspeed.cases(seed, 6 * count, strategies) if _has_masters(case))
    return _with_optimizers(seed, drawn, count)


def _has_masters(case: Case) -> bool:
    """Stage 0 keeps them always."""
    return case.plan.strategy is not Strategy.ZERO0 or case.job.parameter_format == "fp32"


def _with_optimizers(seed: int, cases: Iterator[Case] | Sequence[Case], count: int) -> list[Case]:
    """The first *count* of *cases* that go with an optimizer, with it: that whose turn it is, else the next."""
    draw, found = random.Random(seed), list[Case]()
    waiting = list(OPTIMIZERS)
    for case in cases:
        if len(found) == count:
            break
        for optimizer in waiting[:WAITING]:
            job = replace(case.job, optimizer=optimizer)
            plan = case.plan
            if refusal_of_optimizer(job, plan.strategy, plan.offload, plan.fsdp.version) is None:
                rank = draw.choice(RANKS) if optimizer == "galore" else job.galore_rank
                found.append(replace(case, job=replace(job, galore_rank=rank)))
                waiting.remove(optimizer)
                waiting.append(optimizer)
                break
    return found


def _cut(case: Case) -> Case:
    if len(case.model.layers) <= LAYERS:
        return case
    name = case.name.partition(" cut to ")[0]
    return replace(case, name=f"{name} cut to {LAYERS} layers", config=with_fewer_layers(case.config, LAYERS))
