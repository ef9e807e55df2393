"""Which strategies cut a model or its sequences over ranks, and what such a plan must divide by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from advisor.errors import SpecError

if TYPE_CHECKING:
    from advisor.specs.plan import Plan

KeyValueExchange = Literal["allgather", "alltoall"]
"""How ranks that cut a sequence get each other's keys and values: all at once, or by and by (accelerate's
``cp_comm_strategy``)."""

Exchange = Literal["heads", "allgather", "alltoall"]
"""How a rank comes to see all tokens of a sequence. Heads: it attends to all of them with some of the heads (Ulysses).
The others: with all heads, from its own tokens to those of one rank after the other, whose keys and values it has got
at once, or by and by (a ring)."""


class SequenceCut(NamedTuple):
    """How the tokens of a sequence lie on ranks, and how attention comes to see all of them."""

    ranks: int = 1
    exchange: Exchange = "heads"


WHOLE = SequenceCut()
"""Each sequence on one rank."""

DEGREES = (
    "tensor_parallel",
    "pipeline_parallel",
    "context_parallel",
    "ulysses_parallel",
    "expert_parallel",
    "expert_tensor_parallel",
    "virtual_stages",
)
"""The fields of a plan that say into how many parts something is cut."""

CUTS: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "fsdp": ("context_parallel",),
    "deepspeed": ("ulysses_parallel",),
    "megatron": tuple(name for name in DEGREES if name != "ulysses_parallel"),
}
"""Those that each framework has: accelerate 1.15 with FSDP2, DeepSpeed 0.19.8 (its AutoTP and pipelines are not
modelled), Megatron.

accelerate has tensor parallelism too, which does not start with transformers 5.23: its ``_prepare_tp`` imports
``ReplicateParallel``, which transformers took away.
"""

_REMEDIES = {
    "tensor_parallel": "they need megatron (accelerate 1.15 imports what transformers 5.23 no longer has)",
    "context_parallel": "it needs fsdp or megatron",
    "ulysses_parallel": "it needs zero1, zero2 or zero3",
}


def some(condition: Any) -> bool:
    """Whether *condition* holds for some of the plans."""
    return bool(condition.any()) if isinstance(condition, np.ndarray) else bool(condition)


def check_cuts(plan: Plan) -> None:
    """Raises SpecError where *plan*'s strategy has no such cut, or its GPUs or micro-batches do not divide by it."""
    known = CUTS[plan.framework]
    foreign = [name for name in DEGREES if some(getattr(plan, name) > 1) and name not in known]
    if foreign:
        can = f"can be cut by {' and '.join(known)}" if known else "is data parallel alone"
        remedy = _REMEDIES.get(foreign[0], "they need megatron")
        raise SpecError(f"{plan.strategy.title} {can}, got {_counts(plan, foreign)}; {remedy}")
    cut, experts = plan.model_ranks * plan.sequence_ranks, plan.expert_ranks * plan.pipeline_parallel
    if some(plan.gpus % cut != 0):
        shown = _counts(plan, MODEL_CUTS if plan.framework == "megatron" else known)
        shown += f" and {_counts(plan, EXPERT_CUTS)}" if plan.expert_ranks > 1 else ""
        raise SpecError(f"{shown} take {cut} GPUs or a multiple, got {plan.gpus}")
    if some(plan.gpus % experts != 0):
        raise SpecError(f"{_counts(plan, EXPERT_CUTS)} take {experts} GPUs or a multiple, got {plan.gpus}")
    if plan.framework == "megatron":
        _check_interleaving(plan)
    elif plan.sequence_ranks > 1:
        _check_modelled(plan)


MODEL_CUTS = ("tensor_parallel", "pipeline_parallel", "context_parallel")
EXPERT_CUTS = ("expert_parallel", "expert_tensor_parallel", "pipeline_parallel")


def _check_modelled(plan: Plan) -> None:
    """Raises SpecError for cuts under FSDP and ZeRO that their code refuses, or that are not modelled."""
    if plan.framework == "fsdp":
        if plan.fsdp.version == 1:
            raise SpecError("context parallelism needs FSDP version 2 (accelerate 1.15)")
        if plan.fsdp.shard_ranks is not None:
            raise SpecError("HSDP is modelled without context parallelism; take fsdp")
    elif plan.strategy.zero_stage == 0 or plan.zero.is_plus or plan.offload.optimizer or plan.zero.gradient_format:
        raise SpecError(
            f"{plan.title} is not modelled like that; Ulysses is for zero1, zero2 and zero3, without offload and "
            "grad_accum_dtype"
        )


def _check_interleaving(plan: Plan) -> None:
    interleaved = plan.virtual_stages > 1
    if not some(interleaved):
        return
    if some(interleaved & (plan.pipeline_parallel == 1)):
        raise SpecError(f"{plan.virtual_stages} virtual stages need a pipeline; give pipeline_parallel of 2 or more")
    if some(interleaved & (plan.accumulation_steps % plan.pipeline_parallel > 0)):
        raise SpecError(
            f"an interleaved pipeline takes micro-batches in groups of its {plan.pipeline_parallel} stages, and "
            f"{plan.accumulation_steps} is no multiple of that; change the accumulation steps"
        )


def _counts(plan: Plan, names: Iterable[str]) -> str:
    return " x ".join(f"{name} {getattr(plan, name)}" for name in names)
