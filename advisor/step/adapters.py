"""Which plans the step program has terms for where weights are frozen."""

from __future__ import annotations

from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.plan import Plan, Strategy

MODELLED = frozenset(
    {
        Strategy.DDP,
        Strategy.FSDP,
        Strategy.FSDP_GRAD_OP,
        Strategy.HSDP,
        Strategy.ZERO1,
        Strategy.ZERO2,
        Strategy.ZERO3,
    }
)


def refuse_unmodelled(job: Job, plan: Plan) -> None:
    """Raise SpecError where *job* freezes weights and *plan* does with them what is not modelled."""
    if job.method == "full" or (what := _unmodelled(job, plan)) is None:
        return
    others = ", ".join(sorted(each.value for each in MODELLED))
    raise SpecError(f"--method {job.method} with {what} is not modelled; take {others}")


def _unmodelled(job: Job, plan: Plan) -> str | None:
    if plan.strategy not in MODELLED:
        return plan.strategy.title
    if job.method == "qlora" and plan.offload.parameters:
        return "parameter offload"
    if plan.swaps:
        return "offload to NVMe"
    if job.method == "dora" and plan.strategy is Strategy.ZERO3:
        return "ZeRO-3, whose weights peft reads outside of their modules,"
    if plan.fsdp.version == 1 and plan.strategy.is_fsdp:
        return "FSDP1"
    return "gradients summed in another format" if plan.zero.gradient_format is not None else None
