"""Every plan that could run a job, in sheets that one pass prices, and the reason why the others could not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from advisor.catalog.legality import refusal_of_optimizer, usual_fsdp_version
from advisor.cost.estimate import unsupported
from advisor.errors import SpecError
from advisor.specs.cuts import WHOLE, Exchange, SequenceCut
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
from advisor.specs.question import Input, Question, Wanted
from advisor.step import cut_legality
from advisor.step.zero_plus import all_parts, refusal

Variant = tuple[Strategy, Offload]

VARIANTS: tuple[Variant, ...] = (
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

OF_SEVERAL_MACHINES = (Strategy.HSDP, Strategy.ZERO3_PLUS)
"""Those that cut states over the GPUs of each machine, and do something else between machines."""
LONG_SEQUENCE = 32_768
"""Tokens from which on sequences are cut over the GPUs of a machine, too."""

SEARCHED_CHECKPOINTING = (Checkpointing.NONE, Checkpointing.FULL)
"""Selective checkpointing is priced where it is asked for: no run has yet shown what it costs a GPU in time."""


def kept_to(question: Question, strategy: str | None = None, offload: str | None = None) -> Question:
    """The same question, its search kept to *strategy*, patterns between commas, and to what *offload* names.

    Raises SpecError for an offload that there is not.
    """
    if strategy is None and offload is None:
        return question
    if offload is not None and offload not in {each.value for each in Offload}:
        raise SpecError(f"--offload must be one of {', '.join(each.value for each in Offload)}, got {offload!r}")
    patterns = tuple(each.strip() for each in (strategy or "").split(",") if each.strip())
    wanted = Wanted(strategies=patterns, offload=None if offload is None else Offload(offload))
    said = [Input("strategy", strategy, "given")] if strategy else []
    said += [Input("offload", offload, "given")] if offload else []
    return replace(question, wanted=wanted, inputs=(*question.inputs, *said))


def variants(question: Question) -> tuple[Variant, ...]:
    """Those that are wanted, and differ from each other on the cluster.

    Within one machine, or one GPU in each, HSDP is FSDP or DDP, and ZeRO++ gains nothing on ZeRO-3. Raises SpecError
    where nothing is left, saying which two words contradict each other.
    """
    wanted, cluster = question.wanted, question.cluster
    named = [each for each in VARIANTS if _matches(each[0], wanted.strategies)]
    if not named:
        names = ", ".join(dict.fromkeys(strategy.value for strategy, _ in VARIANTS))
        raise SpecError(f"--strategy {','.join(wanted.strategies)} is none of those that are searched: {names}")
    found = [each for each in named if wanted.offload in (None, each[1])]
    if not found:
        able = ", ".join(strategy.value for strategy, offload in VARIANTS if offload is wanted.offload)
        raise SpecError(
            f"--strategy {','.join(wanted.strategies)} and --offload {wanted.offload.value if wanted.offload else ''} "
            f"contradict each other: of the plans that are searched those of {able} offload so"
        )
    several = 1 < cluster.gpus_per_node < cluster.gpus
    different = [each for each in found if several or each[0] not in OF_SEVERAL_MACHINES]
    if not different:
        raise SpecError(
            f"--strategy {','.join(wanted.strategies)} and --nodes {cluster.nodes} with {cluster.gpus_per_node} GPUs "
            "each contradict each other: it cuts over the GPUs of each of several machines; fsdp and zero3 cut over all"
        )
    return tuple(different)


def _matches(strategy: Strategy, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(strategy.value, pattern) for pattern in patterns)


def fsdp_settings(strategy: Strategy, question: Question) -> FsdpSettings:
    """Those of a searched plan: the version that the trainer runs; HSDP cuts states within a machine."""
    return FsdpSettings(
        version=usual_fsdp_version(question.job, strategy),
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
    """For each strategy, checkpointing and cut of sequences one plan whose counts are arrays over the micro-batches."""
    job, gpus = question.job, question.cluster.gpus
    found = False
    for strategy, offload in variants(question):
        reason = bar(question, strategy, offload)
        if reason:
            yield Barred(strategy, offload, reason)
            continue
        cuts = [cut for cut in _cuts(question, strategy, offload) if not job.global_batch % (gpus // cut.ranks)]
        found = found or bool(cuts)
        if not cuts:
            yield Barred(strategy, offload, f"a global batch of {job.global_batch} does not divide over {gpus} GPUs")
        for cut in cuts:
            batches, accumulations = micro_batches(job, gpus // cut.ranks)
            for checkpointing in SEARCHED_CHECKPOINTING:
                plan = Plan(
                    strategy=strategy,
                    gpus=gpus,
                    micro_batch=batches,
                    accumulation_steps=accumulations,
                    checkpointing=checkpointing,
                    offload=offload,
                    zero=searched_zero_settings(strategy, question),
                    fsdp=fsdp_settings(strategy, question),
                )
                yield _cut_by(plan, cut)
    if not found:
        micro_batches(job, gpus)  # says what to do where nothing makes up the batch


SEARCHED_EXCHANGES: dict[Strategy, Exchange] = {
    Strategy.ZERO1: "heads",
    Strategy.ZERO2: "heads",
    Strategy.ZERO3: "heads",
    Strategy.FSDP: "alltoall",
}
"""How long sequences are cut by each strategy that does: a ring that has keys and values by and by holds less than one
that has them at once, and hides what it sends behind its kernels."""


def _cuts(question: Question, strategy: Strategy, offload: Offload) -> Iterator[SequenceCut]:
    """Whole sequences, and long ones cut over two to all GPUs of a machine."""
    yield WHOLE
    exchange, settings = SEARCHED_EXCHANGES.get(strategy), fsdp_settings(strategy, question)
    if question.job.sequence_length < LONG_SEQUENCE or offload.optimizer or exchange is None or settings.version == 1:
        return
    plan = Plan(strategy=strategy, gpus=question.cluster.gpus, micro_batch=1, fsdp=settings)
    machine_gpus = question.cluster.gpus_per_node
    for ranks in (each for each in range(2, machine_gpus + 1) if machine_gpus % each == 0):
        cut = SequenceCut(ranks, exchange)
        if cut_legality.refusal(question.model, question.job, _cut_by(plan, cut)) is None:
            yield cut


def _cut_by(plan: Plan, cut: SequenceCut) -> Plan:
    if cut.exchange == "heads":
        return replace(plan, ulysses_parallel=cut.ranks)
    return replace(plan, context_parallel=cut.ranks, fsdp=replace(plan.fsdp, context_exchange=cut.exchange))


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
    version = fsdp_settings(strategy, question).version
    if reason := refusal_of_optimizer(question.job, strategy, offload, version):
        return reason
    if strategy is Strategy.ZERO3_PLUS:
        plan = Plan(strategy=strategy, gpus=gpus, micro_batch=1, zero=searched_zero_settings(strategy, question))
        if reason := refusal(question.model, question.job, plan):
            return reason
    return unsupported(question, strategy, offload)
