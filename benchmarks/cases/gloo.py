"""Cases for real runs of two and four ranks on a CPU: small models of many families under every strategy.

Left out is what a CPU computes otherwise than a GPU: LayerNorm under autocast (a GPU runs it in fp32, a CPU does not),
mixtures under autocast, whose grouped products a CPU has only in bf16, fused attention in fp32, for which the two have
kernels of their own, and DeepSpeed in fp16, which it refuses there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from advisor.specs.job import Job, ParameterFormat, Precision
from advisor.specs.plan import Checkpointing, Plan, Strategy, zero_settings
from advisor.validation.accuracy import Case
from advisor.validation.run import Launcher

VARIANTS: tuple[tuple[Strategy, Launcher], ...] = (
    (Strategy.ZERO1, "deepspeed"),
    (Strategy.DDP, "torchrun"),
    (Strategy.ZERO2, "accelerate"),
    (Strategy.FSDP, "torchrun"),
    (Strategy.ZERO3, "deepspeed"),
    (Strategy.FSDP, "accelerate"),
    (Strategy.ZERO2, "deepspeed"),
    (Strategy.FSDP_GRAD_OP, "torchrun"),
    (Strategy.ZERO3, "accelerate"),
    (Strategy.FSDP_GRAD_OP, "accelerate"),
)
RMS_FAMILIES = ("llama", "qwen2", "gemma", "qwen3", "mistral", "phi3", "olmo2", "smollm3")
LAYER_NORM_FAMILIES = ("gpt2", "gpt_neox", "opt", "starcoder2")
MIXTURES = ("mixtral", "qwen3_moe")
NO_PROPER_TIE = ("gpt_neox",)
"""Families whose heads stay apart."""


def cases(seed: int, count: int) -> Iterator[tuple[Case, Launcher]]:
    """*count* cases, the same for the same *seed*; the strategies come in turns, all else by chance."""
    chance = random.Random(seed)
    for index in range(count):
        strategy, launcher = VARIANTS[index % len(VARIANTS)]
        yield _case(chance, strategy, launcher), launcher


def _case(chance: random.Random, strategy: Strategy, launcher: Launcher) -> Case:
    family = chance.choice(_families(strategy))
    ranks, steps, micro_batch = chance.choice((2, 2, 4)), chance.choice((1, 2)), chance.choice((1, 2))
    checkpointing = chance.choice((Checkpointing.NONE, Checkpointing.FULL))
    bucket = chance.choice((None, 1_000_000, 4_000_000)) if strategy.zero_stage else None
    plan = Plan(
        strategy=strategy,
        gpus=ranks,
        micro_batch=micro_batch,
        accumulation_steps=steps,
        checkpointing=checkpointing,
        zero=zero_settings(strategy, bucket),
    )
    precision, parameter_format = _formats(chance, family, strategy)
    job = Job(
        sequence_length=chance.choice((32, 128, 384)),
        global_batch=ranks * steps * micro_batch,
        precision=precision,
        parameter_format=parameter_format,
        attention="eager" if precision == "fp32" else "sdpa",
        optimizer=chance.choice(("adamw-fused", "adamw-fused", "adamw-foreach", "adamw-loop")),
    )
    return Case(family, _configuration(chance, family), job, plan)


def _formats(chance: random.Random, family: str, strategy: Strategy) -> tuple[Precision, ParameterFormat]:
    if strategy is Strategy.DDP and family not in RMS_FAMILIES:
        return "bf16", "bf16"
    if not strategy.zero_stage or family in MIXTURES:
        return "bf16", "fp32"
    kinds: tuple[tuple[Precision, ParameterFormat], ...] = (
        ("bf16", "fp32"),
        ("bf16", "fp32"),
        ("bf16", "fp32"),
        ("bf16", "fp32"),
        ("fp32", "fp32"),
        ("bf16", "fp32" if strategy is Strategy.ZERO3 else "bf16"),
    )
    return chance.choice(kinds)


def _families(strategy: Strategy) -> tuple[str, ...]:
    # Accelerate's FSDP computes under autocast as well; the plain setup groups layers by Llama's names.
    if strategy.is_fsdp:
        return RMS_FAMILIES
    return (*RMS_FAMILIES, *LAYER_NORM_FAMILIES, *MIXTURES)


def _configuration(chance: random.Random, family: str) -> dict[str, Any]:
    """A model of some 2 to 60 million parameters."""
    width, layers = chance.choice((256, 384, 512)), chance.choice((3, 5, 8))
    vocabulary = chance.choice((4096, 16384, 32000))
    tied = chance.choice((True, False)) and family not in NO_PROPER_TIE
    common = {"model_type": family, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    heads = width // 64 * 2
    if family == "gpt2":
        return common | {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 512}
    settings = common | {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 512,
    }
    if family == "opt":
        return settings | {"ffn_dim": 4 * width, "word_embed_proj_dim": width}
    settings["intermediate_size"] = 4 * width if family == "gpt_neox" else 11 * width // 4
    if family == "gpt_neox":
        return settings
    settings["num_key_value_heads"] = chance.choice((heads, heads // 2))
    if family in ("gemma", "qwen3", "qwen3_moe"):
        settings["head_dim"] = 32
    if family in ("phi3", "smollm3"):
        settings["pad_token_id"] = 0  # theirs lies beyond a small vocabulary
    if family == "mixtral":
        settings |= {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": width}
    if family == "qwen3_moe":
        settings |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": width}
    return settings
