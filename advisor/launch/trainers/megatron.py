"""Megatron-LM's ``pretrain_gpt.py``. Names: Megatron-LM core_v0.16, megatron/training/arguments.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from advisor.catalog.trainers import Versions
from advisor.errors import SpecError
from advisor.launch.deepspeed import ADAMW, GRADIENT_CLIPPING
from advisor.launch.training import Program, Task
from advisor.specs.model import FeedForward, Layer, ModelSpec
from advisor.specs.plan import Checkpointing, Plan

SCRIPT = "pretrain_gpt.py"


ATTENTION = {"sdpa": "fused", "flash": "flash", "eager": "unfused"}
RECOMPUTATION: dict[Checkpointing, dict[str, Any]] = {
    Checkpointing.NONE: {},
    Checkpointing.SELECTIVE: {"recompute-granularity": "selective", "recompute-modules": "core_attn"},
    Checkpointing.FULL: {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1},
}


def program(task: Task, versions: Versions, more_arguments: Sequence[str]) -> Program:
    """The script of a checkout, with the model's shape and the plan in its arguments.

    What decides neither memory nor speed of the model, such as the base of its rotary embedding, is left to
    ``--use-checkpoint-args``.
    """
    shape, shape_switches = _shape(task.model)
    settings = {**_parallelism(task), **shape, **RECOMPUTATION[task.plan.checkpointing], **_training(task)}
    switches = [*_parallelism_switches(task.plan), *shape_switches, task.job.precision, "mock-data"]
    arguments = (*(f"--{name}={value}" for name, value in settings.items()), *(f"--{name}" for name in switches))
    return Program(
        script=SCRIPT,
        arguments=(*arguments, *more_arguments),
        usage=f"more arguments of {SCRIPT}, such as --train-iters=1000",
        install=f"megatron-core=={versions['megatron-core']}",
        notes=(
            f"{SCRIPT} is Megatron-LM's: start in a checkout of NVIDIA/Megatron-LM of version "
            f"{versions['megatron-core']}, or let --out be one.",
            "It trains on made-up data from random weights: give -- --data-path=PREFIX --load=FOLDER.",
        ),
        own_parallelism=True,
    )


def _parallelism(task: Task) -> dict[str, Any]:
    plan = task.plan
    if plan.megatron.pipeline_schedule != "1f1b":
        raise SpecError(f"Megatron runs the schedule 1f1b, not {plan.megatron.pipeline_schedule}")
    settings: dict[str, Any] = {
        "tensor-model-parallel-size": plan.tensor_parallel,
        "pipeline-model-parallel-size": plan.pipeline_parallel,
        "context-parallel-size": plan.context_parallel,
    }
    if plan.virtual_stages > 1:
        runs = plan.pipeline_parallel * plan.virtual_stages
        settings["num-layers-per-virtual-pipeline-stage"] = len(task.model.layers) // runs
    return settings


def _parallelism_switches(plan: Plan) -> list[str]:
    chosen = plan.megatron
    switches = {
        "sequence-parallel": plan.cuts_sequence,
        "use-distributed-optimizer": chosen.distributed_optimizer,
        "overlap-grad-reduce": chosen.overlaps_gradients,
        "overlap-param-gather": chosen.overlaps_weights,
        "no-gradient-accumulation-fusion": not chosen.fuses_gradient_sums,
        "no-create-attention-mask-in-dataloader": not chosen.mask_in_batch,
    }
    return [name for name, on in switches.items() if on]


def _training(task: Task) -> dict[str, Any]:
    plan, job = task.plan, task.job
    return {
        "micro-batch-size": int(plan.micro_batch),
        "global-batch-size": int(plan.global_batch),
        "seq-length": job.sequence_length,
        "max-position-embeddings": max(job.sequence_length, task.model.maximum_positions or 0),
        "make-vocab-size-divisible-by": plan.megatron.vocabulary_multiple,
        "attention-backend": ATTENTION[job.attention],
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
        "optimizer": "adam",
        "lr": ADAMW["lr"],
        "adam-beta1": ADAMW["betas"][0],
        "adam-beta2": ADAMW["betas"][1],
        "adam-eps": ADAMW["eps"],
        "weight-decay": ADAMW["weight_decay"],
        "clip-grad": GRADIENT_CLIPPING,
        "tokenizer-type": "HuggingFaceTokenizer",
        "tokenizer-model": task.weights_from,
        "train-iters": 100,
        "eval-iters": 0,
    }


def _shape(model: ModelSpec) -> tuple[dict[str, Any], list[str]]:
    """The model's sizes, and what of its architecture is a switch. Raises SpecError for what GPTModel is not."""
    kinds = set(model.layers)
    layer = model.layers[0]
    if (
        len(kinds) != 1
        or not isinstance(layer, Layer)
        or not isinstance(layer.feed_forward, FeedForward)
        or not (layer.norm == "rms" and layer.feed_forward.gated and layer.feed_forward.activation == "silu")
        or layer.attention.query_key_norm not in ("none", "per-head")
        or layer.attention.latent
    ):
        raise SpecError(
            f"for Megatron only dense models of equal layers with RMSNorm and SwiGLU are written, not {model.name}"
        )
    heads = layer.attention
    settings: dict[str, Any] = {
        "num-layers": len(model.layers),
        "hidden-size": model.hidden_size,
        "ffn-hidden-size": layer.feed_forward.width,
        "num-attention-heads": heads.heads,
        "num-query-groups": heads.key_value_heads,
        "kv-channels": heads.head_dim,
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "transformer-impl": "transformer_engine",
    }
    switches = ["group-query-attention", "swiglu", "disable-bias-linear"]
    if not model.tied_embeddings:
        switches.append("untie-embeddings-and-output-weights")
    if heads.bias:
        switches.append("add-qkv-bias")
    if heads.query_key_norm == "per-head":
        switches.append("qk-layernorm")
    return settings, switches
