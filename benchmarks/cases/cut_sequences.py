"""Random jobs whose sequences are cut over ranks: by Ulysses under ZeRO, and in a ring under FSDP2.

Truth of the first: DeepSpeed on real tensors, one rank at a time, of models of a few million parameters; of the second:
FSDP2 and torch's context parallelism on fake tensors, of real widths. Counter: bytes of live storages. The model of the
step was made without looking at the outcome of any seed above 99.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from advisor.catalog.huggingface import model_from_config
from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, FsdpSettings, Plan, Strategy, ZeroSettings
from advisor.step.cut_legality import refusal
from advisor.validation.accuracy import Case, with_fewer_layers
from cases.deepspeed import NO_DROPOUT
from cases.sharded import FORMATS, OPTIMIZERS, families

STRATEGIES = (Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3)
ULYSSES_FAMILIES = ("qwen2", "llama", "qwen3", "phi3")
DEFAULT = ZeroSettings()


def by_heads(seed: int, count: int) -> list[Case]:
    """*count* cases of Ulysses, the same for the same *seed*."""
    draw = random.Random(seed)
    return [_by_heads(draw, STRATEGIES[number % len(STRATEGIES)]) for number in range(count)]


def _by_heads(draw: random.Random, strategy: Strategy) -> Case:
    family, heads, head_dim = draw.choice(ULYSSES_FAMILIES), draw.choice((4, 8)), draw.choice((16, 32))
    hidden = heads * head_dim
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": draw.choice((64, 512, 4096)),
        "hidden_size": hidden,
        "num_hidden_layers": draw.randint(1, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice((1, 2, 4)),
        "intermediate_size": draw.choice((1, 2, 3)) * hidden,
        "tie_word_embeddings": draw.random() < 0.5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **NO_DROPOUT,
    }
    if family != "phi3":
        config["head_dim"] = head_dim
    ranks = draw.choice((2, 4, heads))
    copies, micro_batch, steps = draw.choice((1, 2, 8)), draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2))
    zero = ZeroSettings(reduce_bucket=draw.choice((500_000, 150_000, 20_000)))
    if strategy is Strategy.ZERO3:
        zero = replace(
            zero,
            prefetch_bucket=draw.choice((DEFAULT.prefetch_bucket, 50_000)),
            max_live_parameters=draw.choice((DEFAULT.max_live_parameters, 300_000)),
            persistence_threshold=draw.choice((DEFAULT.persistence_threshold, 1000)),
            overlap_communication=True,
        )
    plan = Plan(
        strategy=strategy,
        gpus=ranks * copies,
        micro_batch=micro_batch,
        accumulation_steps=steps,
        checkpointing=draw.choice((Checkpointing.NONE, Checkpointing.FULL)),
        ulysses_parallel=ranks,
        zero=zero,
    )
    job = Job(sequence_length=ranks * draw.choice((32, 128, 512)), global_batch=int(plan.global_batch))
    return Case(family, config, job, plan, 0 if strategy is Strategy.ZERO3 else draw.randrange(ranks * copies))


def in_rings(seed: int, count: int) -> list[Case]:
    """*count* cases of context parallelism, the same for the same *seed*."""
    draw = random.Random(seed)
    drawn = _in_rings(draw)
    return [next(drawn) for _ in range(count)]


def _in_rings(draw: random.Random) -> Iterator[Case]:
    known = families()
    while True:
        name, config = draw.choice(known[draw.choice(sorted(known))])
        layers = draw.choice((1, 2, 3))
        ranks, copies = draw.choice((2, 4, 8)), draw.choice((1, 2))
        micro_batch, steps = draw.choice((1, 1, 2)), draw.choice((1, 1, 2))
        weights, products = draw.choice([each for each in FORMATS if each[1] == "bf16"])
        plan = Plan(
            strategy=draw.choice((Strategy.FSDP, Strategy.FSDP_GRAD_OP)),
            gpus=ranks * copies,
            micro_batch=micro_batch,
            accumulation_steps=steps,
            checkpointing=draw.choice((Checkpointing.NONE, Checkpointing.FULL)),
            context_parallel=ranks,
            fsdp=FsdpSettings(context_exchange=draw.choice(("allgather", "alltoall"))),
        )
        job = Job(
            sequence_length=ranks * draw.choice((128, 1024, 4096)),
            global_batch=int(plan.global_batch),
            parameter_format=weights,  # type: ignore[arg-type]
            precision=products,  # type: ignore[arg-type]
            optimizer=draw.choice(OPTIMIZERS),  # type: ignore[arg-type]
        )
        case = Case(f"{name} cut to {layers} layers", with_fewer_layers(config, layers), job, plan)
        if refusal(model_from_config(case.config, name, "profiles/models"), job, plan) is None:
            yield case
