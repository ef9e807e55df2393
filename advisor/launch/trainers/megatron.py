"""Megatron-LM's ``pretrain_gpt.py``. Names: Megatron-LM core_v0.16, megatron/training/arguments.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from advisor.catalog.trainers import Versions
from advisor.errors import SpecError
from advisor.launch.deepspeed import ADAMW, GRADIENT_CLIPPING
from advisor.launch.training import Program, Task
from advisor.specs.model import FeedForward, Layer, ModelSpec
from advisor.specs.plan import Checkpointing, Strategy

SCRIPT = "pretrain_gpt.py"


def program(
    task: Task,
    versions: Versions,
    more_arguments: Sequence[str],
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    context_parallel: int = 1,
    layers_per_virtual_stage: int | None = None,
) -> Program:
    """The script of a checkout, with the model's shape and the plan in its arguments.

    The GPUs that tensor, pipeline and context parallelism leave are data parallel. What decides neither memory nor
    speed of the model, such as the base of its rotary embedding, is left to ``--use-checkpoint-args``.
    """
    plan, job = task.plan, task.job
    split = tensor_parallel * pipeline_parallel * context_parallel
    if int(plan.gpus) % split:
        raise SpecError(
            f"tensor {tensor_parallel} x pipeline {pipeline_parallel} x context {context_parallel} = {split} does not "
            f"divide {plan.gpus} GPUs"
        )
    settings: dict[str, Any] = {
        "tensor-model-parallel-size": tensor_parallel,
        "pipeline-model-parallel-size": pipeline_parallel,
        "context-parallel-size": context_parallel,
    }
    if layers_per_virtual_stage is not None:
        settings["num-layers-per-virtual-pipeline-stage"] = layers_per_virtual_stage
    switches = ["use-distributed-optimizer"] if plan.strategy is Strategy.ZERO1 else []
    switches += ["sequence-parallel"] if tensor_parallel > 1 else []
    settings |= {
        "micro-batch-size": int(plan.micro_batch),
        "global-batch-size": int(plan.gpus) // split * int(plan.micro_batch) * int(plan.accumulation_steps),
        "seq-length": job.sequence_length,
        "max-position-embeddings": max(job.sequence_length, task.model.maximum_positions or 0),
    }
    shape, shape_switches = _shape(task.model)
    settings |= shape
    switches += [*shape_switches, "bf16"]
    if plan.checkpointing is Checkpointing.FULL:
        settings |= {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    settings |= {
        "attention-backend": "flash" if job.attention == "flash" else "fused",
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
    switches.append("mock-data")
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
