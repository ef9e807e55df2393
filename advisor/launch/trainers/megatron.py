"""Megatron-LM's ``pretrain_gpt.py``. Names: Megatron-LM core_v0.16, megatron/training/arguments.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from advisor.catalog.trainers import Versions
from advisor.errors import SpecError
from advisor.launch.deepspeed import ADAMW, GRADIENT_CLIPPING
from advisor.launch.training import Program, Task
from advisor.specs.model import Attention, Experts, FeedForward, ModelSpec
from advisor.specs.plan import Checkpointing, Plan

SCRIPT = "pretrain_gpt.py"


ATTENTION = {"sdpa": "fused", "flash": "flash", "eager": "unfused"}
BALANCING = {"moe-router-load-balancing-type": "aux_loss", "moe-aux-loss-coeff": 0.001}
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
    switches = [*_parallelism_switches(task.model, task.plan), *shape_switches, task.job.precision, "mock-data"]
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
    if plan.context_parallel > 1:
        settings["cp-comm-type"] = plan.megatron.context_exchange
    if plan.megatron.optimizer_instances > 1:
        settings["num-distributed-optimizer-instances"] = plan.megatron.optimizer_instances
    ends = {"first": plan.megatron.first_stage_layers, "last": plan.megatron.last_stage_layers}
    settings |= {f"decoder-{end}-pipeline-num-layers": layers for end, layers in ends.items() if layers}
    if plan.megatron.deferred_micro_batches:
        settings["wgrad-deferral-limit"] = plan.megatron.deferred_micro_batches
    if _has_experts(task.model):
        settings["expert-model-parallel-size"] = plan.expert_parallel
        settings["expert-tensor-parallel-size"] = plan.expert_tensor_parallel
        settings["moe-token-dispatcher-type"] = plan.megatron.token_dispatcher
        if plan.megatron.balances_experts:
            settings |= BALANCING
        else:
            settings["moe-router-load-balancing-type"] = "none"
    if plan.virtual_stages > 1:
        runs = plan.pipeline_parallel * plan.virtual_stages
        settings["num-layers-per-virtual-pipeline-stage"] = len(task.model.layers) // runs
    return settings


def _has_experts(model: ModelSpec) -> bool:
    return any(isinstance(layer.feed_forward, Experts) for layer in model.described_layers)


def _parallelism_switches(model: ModelSpec, plan: Plan) -> list[str]:
    chosen, mixed = plan.megatron, _has_experts(model)
    switches = {
        "sequence-parallel": plan.cuts_sequence,
        "use-distributed-optimizer": chosen.distributed_optimizer,
        "overlap-grad-reduce": chosen.overlaps_gradients,
        "overlap-param-gather": chosen.overlaps_weights,
        "no-gradient-accumulation-fusion": not chosen.fuses_gradient_sums,
        "no-create-attention-mask-in-dataloader": not chosen.mask_in_batch,
        "defer-embedding-wgrad-compute": chosen.deferred_micro_batches > 0,
        "moe-grouped-gemm": mixed and chosen.groups_experts,
        "moe-permute-fusion": mixed and chosen.fuses_permutation,
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
    kinds = tuple(dict.fromkeys(model.described_layers))
    mixtures = {each.feed_forward for each in kinds if isinstance(each.feed_forward, Experts)}
    dense = {each.feed_forward for each in kinds if isinstance(each.feed_forward, FeedForward)}
    attentions, norms = {each.attention for each in kinds}, {each.norm for each in kinds}
    blocks: list[Experts | FeedForward] = [*mixtures, *dense]
    gated = all(each.gated and each.activation == "silu" for each in blocks)
    if len(attentions) != 1 or max(len(mixtures), len(dense)) > 1 or norms != {"rms"} or not gated:
        raise SpecError(
            "for Megatron only models of layers with RMSNorm and SwiGLU are written, alike but for dense blocks "
            f"and experts, not {model.name}"
        )
    (attention,) = attentions
    settings: dict[str, Any] = {
        "num-layers": len(model.layers),
        "hidden-size": model.hidden_size,
        "ffn-hidden-size": blocks[-1].width,
        "num-attention-heads": attention.heads,
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "transformer-impl": "transformer_engine",
    }
    switches = ["swiglu", "disable-bias-linear"]
    if not model.tied_embeddings:
        switches.append("untie-embeddings-and-output-weights")
    for more, also in (_attention(attention), *(_experts(model, each) for each in mixtures)):
        settings |= more
        switches += also
    return settings, switches


def _attention(attention: Attention) -> tuple[dict[str, Any], list[str]]:
    latent = attention.latent
    if attention.query_key_norm not in ("none", "per-head"):
        raise SpecError(f"Megatron has no norms of queries and keys that are {attention.query_key_norm}")
    if latent is None:
        switches = ["group-query-attention", *["add-qkv-bias"] * attention.bias]
        switches += ["qk-layernorm"] * (attention.query_key_norm == "per-head")
        return {"num-query-groups": attention.key_value_heads, "kv-channels": attention.head_dim}, switches
    settings = {
        "kv-lora-rank": latent.key_value_rank,
        "qk-head-dim": latent.plain_head_dim,
        "qk-pos-emb-head-dim": latent.rotary_head_dim,
        "v-head-dim": latent.value_head_dim,
        "kv-channels": latent.value_head_dim,
    }
    if latent.query_rank is not None:
        settings["q-lora-rank"] = latent.query_rank
    return settings, ["multi-latent-attention", "qk-layernorm"]


def _experts(model: ModelSpec, experts: Experts) -> tuple[dict[str, Any], list[str]]:
    pattern = [int(isinstance(layer.feed_forward, Experts)) for layer in model.described_layers]
    settings: dict[str, Any] = {
        "num-experts": experts.count,
        "moe-router-topk": experts.active,
        "moe-ffn-hidden-size": experts.width,
        "moe-layer-freq": f"({'+'.join(f'[{kind}]*{len(list(run))}' for kind, run in groupby(pattern))})",
        "moe-router-score-function": "sigmoid" if experts.scoring == "sigmoid" else "softmax",
    }
    switches = []
    if experts.router_in_fp32:
        settings["moe-router-dtype"] = "fp32"
    if experts.scoring == "sigmoid":
        switches.append("moe-router-enable-expert-bias")
    elif not experts.scores_add_up:
        switches.append("moe-router-pre-softmax")
    if experts.shared:
        settings["moe-shared-expert-intermediate-size"] = experts.shared.width
        switches += ["moe-shared-expert-gate"] * experts.shared_gate
    return settings, switches
