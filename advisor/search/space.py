"""Every plan that could run a job, in sheets that one pass prices, and the reason why the others could not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from advisor.catalog.trainers import usual_fsdp_version
from advisor.cost.estimate import unsupported
from advisor.errors import SpecError
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.plan import (
    Checkpointing,
    FsdpSettings,
    Offload,
    Plan,
    Strategy,
    ZeroSettings,
    zero_settings,
)
from advisor.specs.question import Question
from advisor.step.zero_plus import all_parts, refusal

VARIANTS: tuple[tuple[Strategy, Offload], ...] = (
    (Strategy.DDP, Offload.NONE),
    (Strategy.ZERO1, Offload.NONE),
    (Strategy.ZERO2, Offload.NONE),
    (Strategy.FSDP_GRAD_OP, Offload.NONE),
    (Strategy.FSDP, Offload.NONE),
    (Strategy.HSDP, Offload.NONE),
    (Strategy.ZERO3, Offload.NONE),
    (Strategy.ZERO3_PLUS, Offload.NONE),
    (Strategy.ZERO2, Offload.OPTIMIZER),
    (Strategy.ZERO3, Offload.OPTIMIZER),
    (Strategy.ZERO3, Offload.OPTIMIZER_AND_PARAMETERS),
)
"""From the simplest to the most involved: the order in which ties are broken."""

SEARCHED_CHECKPOINTING = (Checkpointing.NONE, Checkpointing.FULL)
"""Selective checkpointing is priced where it is asked for: no run has yet shown what it costs a GPU in time."""


def variants(cluster: Cluster) -> tuple[tuple[Strategy, Offload], ...]:
    """Those that differ from each other on *cluster*: within one machine, or one GPU in each, HSDP is FSDP or DDP.

    There, ZeRO++ gains nothing on ZeRO-3.
    """
    differs = 1 < cluster.gpus_per_node < cluster.gpus
    return tuple(each for each in VARIANTS if differs or each[0] not in (Strategy.HSDP, Strategy.ZERO3_PLUS))


def fsdp_settings(strategy: Strategy, question: Question) -> FsdpSettings:
    """Those of a searched plan: the version that the trainer runs; HSDP cuts states within a machine."""
    return FsdpSettings(
        version=usual_fsdp_version(question.job),
        shard_ranks=question.cluster.gpus_per_node if strategy is Strategy.HSDP else None,
    )


def searched_zero_settings(strategy: Strategy, question: Question) -> ZeroSettings:
    """Those of a searched plan: ZeRO++ with all its parts that the model and the job allow."""
    settings = zero_settings(strategy)
    if strategy is not Strategy.ZERO3_PLUS:
        return settings
    cluster = question.cluster
    return all_parts(settings, question.model, question.job, cluster.gpus, cluster.gpus_per_node)


class Barred(NamedTuple):
    """A strategy that cannot run the job at all."""

    strategy: Strategy
    offload: Offload
    why: str


def sheets(question: Question) -> Iterator[Plan | Barred]:
    """For each strategy and checkpointing one plan whose counts are arrays over the micro-batches."""
    batches, accumulations = micro_batches(question.job, question.cluster.gpus)
    for strategy, offload in variants(question.cluster):
        reason = bar(question, strategy, offload)
        if reason:
            yield Barred(strategy, offload, reason)
            continue
        for checkpointing in SEARCHED_CHECKPOINTING:
            yield Plan(
                strategy=strategy,
                gpus=question.cluster.gpus,
                micro_batch=batches,
                accumulation_steps=accumulations,
                checkpointing=checkpointing,
                offload=offload,
                zero=searched_zero_settings(strategy, question),
                fsdp=fsdp_settings(strategy, question),
            )


def micro_batches(job: Job, gpus: int) -> tuple[np.ndarray, np.ndarray]:
    """Every micro-batch that divides the global batch over *gpus*, with its accumulation steps."""
    share, left = divmod(job.global_batch, gpus)
    if left or not share:
        near = nearest_batch(job.global_batch, gpus)
        raise SpecError(
            f"a global batch of {job.global_batch} does not divide over {gpus} GPUs: no micro-batch and accumulation "
            f"solve it; try --global-batch {near}"
        )
    sizes = np.array([size for size in range(1, share + 1) if share % size == 0], dtype=np.int64)
    return sizes, share // sizes


def nearest_batch(global_batch: int, gpus: int) -> int:
    """The global batch closest to the given one that divides over *gpus*."""
    return max(1, round(global_batch / gpus)) * gpus


def bar(question: Question, strategy: Strategy, offload: Offload) -> str | None:
    """Why *strategy* cannot run the job, or None."""
    gpus = question.cluster.gpus
    if gpus == 1 and strategy is not Strategy.DDP and not offload.optimizer:
        return "one GPU has nobody to share with"
    if question.job.method == "qlora" and strategy is not Strategy.DDP:
        return "cutting or joining weights in four bits is not modelled"
    if question.job.method != "full" and strategy is Strategy.HSDP:
        return "frozen weights under HSDP are not modelled"
    if question.job.method != "full" and offload.optimizer:
        return "states of adapters are small, and their offload is not modelled"
    if strategy is Strategy.ZERO3_PLUS:
        plan = Plan(strategy=strategy, gpus=gpus, micro_batch=1, zero=searched_zero_settings(strategy, question))
        if reason := refusal(question.model, question.job, plan):
            return reason
    return unsupported(question.model, question.job, strategy)
