"""Which scheme is a strategy's part in the step."""

from __future__ import annotations

from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Count, Plan, Strategy
from advisor.step.adapters import refuse_unmodelled
from advisor.step.ddp import DataParallel
from advisor.step.deepspeed_fp32_gradients import Bf16Optimizer, ZeroTwoFp32Gradients
from advisor.step.fsdp import FullyShardedDataParallel
from advisor.step.fsdp_one import FullyShardedDataParallelOne
from advisor.step.nvme import SwappedZeroThree
from advisor.step.offload import OffloadedZeroOne, OffloadedZeroTwo
from advisor.step.offload_three import OffloadedZeroThree
from advisor.step.recording import FORMULAS, Source
from advisor.step.scheme import Scheme
from advisor.step.stage_zero import StageZero
from advisor.step.zero_flat import ZeroOne, ZeroTwo
from advisor.step.zero_plus import ZeroPlusPlus
from advisor.step.zero_three import ZeroThree


def scheme_of(model: ModelSpec, job: Job, plan: Plan, rank: Count = 0, source: Source = FORMULAS) -> Scheme:
    """The strategy's part in the step of *rank*."""
    return _scheme_class(job, plan)(model, job, plan, rank, source)


def _scheme_class(job: Job, plan: Plan) -> type[Scheme]:
    refuse_unmodelled(job, plan)
    if plan.strategy.is_fsdp:
        return FullyShardedDataParallelOne if plan.fsdp.version == 1 else FullyShardedDataParallel
    if not gradients_modelled(job, plan):
        raise SpecError(
            f"{plan.title} in {job.precision} with gradients in {plan.zero.gradient_format} is not modelled; gradients "
            "in fp32 are for zero1 in bf16 and zero2, with fp32 masters and without offload"
        )
    if _sums_wider(job, plan):
        return Bf16Optimizer if plan.strategy is Strategy.ZERO1 else ZeroTwoFp32Gradients
    if plan.strategy is Strategy.ZERO0:
        return StageZero
    if plan.strategy is Strategy.ZERO1:
        return OffloadedZeroOne if plan.offload.optimizer else ZeroOne
    if plan.strategy is Strategy.ZERO2:
        return OffloadedZeroTwo if plan.offload.optimizer else ZeroTwo
    if plan.strategy is Strategy.ZERO3_PLUS:
        return ZeroPlusPlus
    if plan.strategy is Strategy.ZERO3:
        if plan.swaps:
            return SwappedZeroThree
        return OffloadedZeroThree if plan.offload.optimizer else ZeroThree
    return DataParallel


def _sums_wider(job: Job, plan: Plan) -> bool:
    """Whether DeepSpeed sums gradients in another format than the model computes in."""
    return plan.strategy.zero_stage is not None and plan.zero.gradient_format not in (None, job.precision)


def gradients_modelled(job: Job, plan: Plan) -> bool:
    """Whether the step program has terms for the format that the plan's gradients are summed in.

    deepspeed 0.19.8, runtime/engine.py ``_do_optimizer_sanity_check``.
    """
    if not _sums_wider(job, plan):
        return True
    if plan.zero.gradient_format != "fp32" or plan.offload.optimizer or job.parameter_format != "fp32":
        return False
    return plan.strategy is Strategy.ZERO2 or (plan.strategy is Strategy.ZERO1 and job.precision == "bf16")
