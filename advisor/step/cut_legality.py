"""Which models and jobs can have their sequences cut as the frameworks under transformers cut them, or why not.

Versions: accelerate 1.15, deepspeed 0.19.8, torch 2.13, transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterator

from advisor.specs.job import Job
from advisor.specs.model import Attention, Layer, ModelSpec
from advisor.specs.plan import Plan
from advisor.step.attention_kernels import FLASH_LARGEST_HEAD

WITHOUT_KEY_VALUE_HEADS = frozenset({"gpt2", "gpt_neox", "opt", "bloom", "falcon"})
"""Causal families whose configuration has no ``num_key_value_heads``, which Ulysses reads."""
WITHOUT_HEAD_DIM = frozenset({"mixtral"})
"""Families whose configuration says ``head_dim`` None, which Ulysses reads."""


def refusal(model: ModelSpec, job: Job, plan: Plan) -> str | None:
    """Why *model* cannot be trained with its sequences cut by *plan*, or None."""
    if plan.framework == "megatron" or plan.sequence_ranks == 1:
        return None
    return next(_reasons(model, job, plan), None)


def _reasons(model: ModelSpec, job: Job, plan: Plan) -> Iterator[str]:
    if job.trainer != "advisor":
        yield f"advisor writes files for cut sequences for its own trainer alone, not for {job.trainer}"
    if model.objective != "causal":
        yield f"{model.name} is no causal model"
    if not model.described_layers:
        yield "a traced layer is that of whole sequences; leave --trace out"
    if job.method != "full":
        yield f"--method {job.method} with cut sequences is not modelled"
    if plan.ulysses_parallel > 1 and job.optimizer == "muon":
        yield "how DeepSpeed's Muon fares with gradients of cut sequences is not modelled"
    # Context-parallel ranks have a piece of the first half and one of the second, so that all have as much to do.
    pieces = 2 * plan.context_parallel if plan.context_parallel > 1 else plan.ulysses_parallel
    if job.sequence_length % pieces:
        yield f"{job.sequence_length} tokens do not divide into the {pieces} pieces that its ranks take"
    if job.padded:
        yield "ranks that share a sequence drop its attention mask, and so would see padding; leave --padded out"
    if plan.context_parallel > 1 and job.attention != "sdpa":
        yield f"context parallelism runs torch's own kernels alone, not {job.attention}; take --attention sdpa"
    if plan.context_parallel > 1 and job.precision == "fp32":
        yield "context parallelism is modelled around torch's flash kernel, which takes no fp32; take bf16 or fp16"
    if job.attention == "eager":
        yield "Ulysses takes no mask, and eager attention has one; take --attention sdpa or flash"
    for layer in (each for run in model.runs for each in run.layers if isinstance(each, Layer)):
        yield from _of_attention(layer.attention, model, plan)


def _of_attention(spec: Attention, model: ModelSpec, plan: Plan) -> Iterator[str]:
    if spec.eager_only or spec.additive_bias or spec.always_masked:
        yield f"{model.name}'s attention adds to its scores, or masks them, as no fused kernel without a mask does"
    if spec.window is not None:
        yield f"ranks that share a sequence drop its masks, and {model.name} has a window of {spec.window} tokens"
    if spec.latent or spec.broadcast_heads or spec.expanded_heads:
        yield f"how {model.name}'s latent or repeated heads are shared is not modelled"
    if plan.context_parallel > 1 and spec.head_dim > FLASH_LARGEST_HEAD:
        yield f"context parallelism is modelled around torch's flash kernel, which has no heads of {spec.head_dim}"
    if plan.ulysses_parallel > 1:
        yield from _of_heads(spec, model, plan.ulysses_parallel)


def _of_heads(spec: Attention, model: ModelSpec, ranks: int) -> Iterator[str]:
    """deepspeed's runtime/sequence_parallel/ulysses_sp.py ``UlyssesSPAttentionHF``."""
    if model.family in WITHOUT_KEY_VALUE_HEADS | WITHOUT_HEAD_DIM:
        missing = "num_key_value_heads" if model.family in WITHOUT_KEY_VALUE_HEADS else "head_dim"
        yield f"Ulysses reads {missing}, which the configuration of family {model.family} does not have"
    if spec.heads % ranks:
        yield f"{spec.heads} attention heads do not divide over {ranks} ranks"
    if spec.key_value_heads % ranks and ranks % spec.key_value_heads:
        yield f"neither do {spec.key_value_heads} key-value heads divide over {ranks} ranks nor ranks over them"
