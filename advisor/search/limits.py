"""How far given GPUs go: the largest micro-batch, the longest sequence and the largest model that still train there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from advisor.catalog.models import model_names
from advisor.cost.estimate import price, shortages
from advisor.cost.memory import footprint
from advisor.cost.question import ask, program_of_contenders
from advisor.cost.results import Estimate
from advisor.errors import SpecError
from advisor.search.contenders import contenders
from advisor.search.explain import fewest_that_would_do
from advisor.search.rank import ordered
from advisor.search.sheet import Sheet, held_by, of_fullest, possible, price_sheet, shortfall
from advisor.search.space import (
    SEARCHED_CHECKPOINTING,
    Variant,
    bar,
    fsdp_settings,
    kept_to,
    searched_zero_settings,
    variants,
)
from advisor.specs.hardware import Cluster
from advisor.specs.job import FORMAT_BYTES, Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Checkpointing, Count, Plan
from advisor.specs.question import Input, Question

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from advisor.catalog.request import Words

MOST_SEQUENCES = 512
"""Micro-batches above are not looked at: no GPU gains by them."""
SEQUENCE_STEP = 256
MOST_TOKENS = 2**22
SATURATED_SHARE = 0.95
"""Of the highest throughput, from where on a larger micro-batch is not worth its memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """How far some strategies go of which something fits."""

    offloads: bool
    """Whether they keep anything outside the GPUs between its uses."""
    largest: Estimate
    """The plan of the largest micro-batch; of :data:`MOST_SEQUENCES` where more would do."""
    saturated: Estimate
    """Of the strategy that is fastest, the plan of the smallest micro-batch that reaches :data:`SATURATED_SHARE` of its
    best throughput, at the global batch; the largest where no micro-batch makes that up."""
    longest: Estimate
    """The plan of the longest sequence, one at a time, everything recomputed, in steps of :data:`SEQUENCE_STEP`; of
    :data:`MOST_TOKENS` where more would do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The answer to: how far do these GPUs go with one model?"""

    model: ModelSpec
    job: Job
    cluster: Cluster
    inputs: tuple[Input, ...]
    reaches: tuple[Reach, ...]
    """Of strategies that keep all on the GPUs, and of those that offload, where something fits."""
    way_out: str
    """Where nothing fits: the fewest GPUs on which something would, in words; empty if none was found."""
    seconds: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LargestModels:
    """The answer to: which models train on these GPUs at all?"""

    cluster: Cluster
    job: Job
    inputs: tuple[Input, ...]
    fitting: tuple[Estimate, ...]
    """Of the largest models that fit the best plan each, largest model first."""
    too_large: tuple[ModelSpec, ...]
    """Larger or equally large models of which no plan fits, largest first."""
    seconds: float


def limits(
    model: str,
    *,
    strategy: str | None = None,
    offload: str | None = None,
    trace: bool = False,
    trust_remote_code: bool = False,
    **words: Unpack[Words],
) -> Limits:
    """How large a micro-batch and how long a sequence of *model* trains on the given GPUs.

    Words and what the search is kept to: those of :func:`advisor.recommend`. The global batch is kept to as nearly as a
    micro-batch allows. Raises
    SpecError or UnknownNameError for words that make no sense, ConfigError for a model that cannot be read.
    """
    started = time.perf_counter()
    asked = ask(model, trace=trace, trust_remote_code=trust_remote_code, **words)
    question = kept_to(asked, strategy, offload)
    able = _able(question)
    reaches = [reach(question, able, offloads=offloads) for offloads in (False, True)]
    return Limits(
        model=question.model,
        job=question.job,
        cluster=question.cluster,
        inputs=question.inputs,
        reaches=tuple(filter(None, reaches)),
        way_out="" if any(reaches) else fewest_that_would_do(question, {})[1],
        seconds=time.perf_counter() - started,
        warnings=question.warnings,
    )


def _barred(question: Question) -> dict[Variant, str | None]:
    """Of each wanted strategy why it cannot run the job, or None."""
    if question.job.trainer == "megatron":
        raise SpecError("limits are of plans that cut no layers; leave --trainer megatron out")
    return {variant: bar(question, *variant) for variant in variants(question)}


def _able(question: Question) -> list[Variant]:
    """The wanted strategies that can run the job. Raises SpecError where none can, with what bars the first."""
    barred = _barred(question)
    able = [variant for variant, reason in barred.items() if reason is None]
    if not able:
        (strategy, _), reason = next(iter(barred.items()))
        raise SpecError(f"{strategy.title} cannot train {question.model.name}: {reason}")
    return able


def reach(question: Question, able: Iterable[Variant], *, offloads: bool) -> Reach | None:
    """How far those strategies go that are *able* to run the job, and offload or not; None where nothing fits."""
    counts = np.arange(1, MOST_SEQUENCES + 1)
    sheets = [
        price_sheet(question, plan_of(question, variant, each, counts))
        for variant in able
        if variant[1].optimizer == offloads
        for each in SEARCHED_CHECKPOINTING
    ]
    largest = _largest_micro_batch(question, sheets)
    if largest is None:
        return None
    return Reach(
        offloads=offloads,
        largest=largest,
        saturated=_saturated(question, sheets) or largest,
        longest=_longest_sequence(question, sheets) or largest,
    )


def plan_of(question: Question, variant: Variant, checkpointing: Checkpointing, micro_batch: Count) -> Plan:
    """Plans of those micro-batches, each with the accumulation steps that come nearest to the global batch."""
    strategy, offload = variant
    share = question.job.global_batch / question.cluster.gpus
    steps = np.maximum(1, np.rint(share / np.asarray(micro_batch))).astype(np.int64)
    return Plan(
        strategy=strategy,
        gpus=question.cluster.gpus,
        micro_batch=micro_batch,
        accumulation_steps=steps if np.ndim(micro_batch) else int(steps),
        checkpointing=checkpointing,
        offload=offload,
        zero=searched_zero_settings(strategy, question),
        fsdp=fsdp_settings(strategy, question),
    )


def excess(question: Question, plan: Plan) -> float:
    """Bytes that a single plan lacks by its replay; at most 0 where it fits."""
    return float(max(shortages(held_by(question, plan), question.margin_share(plan))))


def _short_by_bound(question: Question, plan: Plan) -> float:
    """Bytes that a single plan lacks at least."""
    step = program_of_contenders(question, plan)
    found = footprint(step, plan, question.cluster, question.calibration)
    (lacking,) = of_fullest(step, (), shortfall(found, question.cluster, question.margin_share(plan)))
    return float(lacking[0])


def _largest_micro_batch(question: Question, sheets: Sequence[Sheet]) -> Estimate | None:
    """The plan of the largest micro-batch that fits, of *sheets* that count up from 1; None where none does.

    A sheet's bounds say how far it can go, replays how far it does. Sheets that cannot go further are not replayed.
    """

    def most(sheet: Sheet) -> int:
        return int(np.flatnonzero(sheet.short_by_bytes <= 0).max(initial=-1)) + 1

    best, found = 0, None
    for sheet in sorted(sheets, key=most, reverse=True):
        if most(sheet) <= best:
            break
        size = last_below(partial(_excess_of_size, question, sheet.plan), best + 1, most(sheet))
        if size:
            best, found = size, sheet.plan.at(size - 1)
    return price(question, found) if found else None


def _saturated(question: Question, sheets: Sequence[Sheet]) -> Estimate | None:
    """The plan that fits of the smallest micro-batch that is nearly as fast as any, of those that make up the batch."""
    exact = [(sheet, index) for sheet, index in possible(sheets) if _makes_up_the_batch(question, sheet.plan.at(index))]
    fitting = (place for place in exact if excess(question, place[0].plan.at(place[1])) <= 0)
    fastest = next(fitting, None)
    if fastest is None:
        return None
    sheet, index = fastest
    enough = SATURATED_SHARE * sheet.tokens_per_s[index]
    sizes = sorted(each for other, each in exact if other is sheet and each <= index)
    plans = (sheet.plan.at(each) for each in sizes if sheet.tokens_per_s[each] >= enough)
    return price(question, next(plan for plan in plans if excess(question, plan) <= 0))


def _makes_up_the_batch(question: Question, plan: Plan) -> bool:
    return bool(plan.global_batch == question.job.global_batch)


def _longest_sequence(question: Question, sheets: Sequence[Sheet]) -> Estimate | None:
    """The plan of the longest sequence that fits by one of the strategies of *sheets*; None where none does."""
    bounds: dict[Variant, int] = {}
    for sheet in sheets:
        variant = sheet.plan.strategy, sheet.plan.offload
        if variant not in bounds and sheet.plan.checkpointing is Checkpointing.FULL:
            bounds[variant] = _longest_by_bound(question, variant)
    best, found = 0, None
    for variant, most in sorted(bounds.items(), key=lambda each: -each[1]):
        if most <= best:
            break
        by_replay = partial(_excess_of_length, question, variant)
        length = SEQUENCE_STEP * last_below(by_replay, best // SEQUENCE_STEP + 1, most // SEQUENCE_STEP)
        if length:
            best, found = length, variant
    return price(*_of_length(question, found, best)) if found else None


def _excess_of_size(question: Question, sheet: Plan, size: int) -> float:
    """Bytes that the plan of *size* sequences lacks, of a sheet that counts up from 1."""
    return excess(question, sheet.at(size - 1))


def _excess_of_length(question: Question, variant: Variant, steps: int) -> float:
    """Bytes that the plan of a sequence of so many :data:`SEQUENCE_STEP` lacks."""
    return excess(*_of_length(question, variant, SEQUENCE_STEP * steps))


def _of_length(question: Question, variant: Variant, length: int) -> tuple[Question, Plan]:
    """The same question of sequences of *length*, and the plan that takes them one at a time."""
    longer = replace(question, job=replace(question.job, sequence_length=length))
    return longer, plan_of(longer, variant, Checkpointing.FULL, 1)


def _longest_by_bound(question: Question, variant: Variant) -> int:
    """Tokens of a sequence that cannot fit if it is longer."""

    def lacking(steps: int) -> float:
        return _short_by_bound(*_of_length(question, variant, SEQUENCE_STEP * steps))

    fits, high = 0, 1
    while lacking(high) <= 0:
        if high == MOST_TOKENS // SEQUENCE_STEP:
            return MOST_TOKENS
        fits, high = high, 4 * high
    return SEQUENCE_STEP * last_below(lacking, fits, high) if fits else 0


def last_below(rising: Callable[[int], float], low: int, high: int) -> int:
    """The largest of *low* to *high* where *rising* is not above 0; 0 where it is above from *low* on.

    False position with Illinois' halving of an end that stays (Dowell and Jarratt, BIT 11, 1971).
    """
    high_excess = rising(high)
    if high_excess <= 0:
        return high
    low_excess = rising(low) if high > low else math.inf
    if low_excess > 0:
        return 0
    stayed = ""
    while high - low > 1:
        crossing = low + (high - low) * -low_excess / (high_excess - low_excess)
        guess = min(max(int(crossing), low + 1), high - 1)
        found = rising(guess)
        if found <= 0:
            low, low_excess = guess, found
            high_excess /= 2 if stayed == "high" else 1
            stayed = "high"
        else:
            high, high_excess = guess, found
            low_excess /= 2 if stayed == "low" else 1
            stayed = "low"
    return low


def largest_models(
    *, most: int = 5, strategy: str | None = None, offload: str | None = None, **words: Unpack[Words]
) -> LargestModels:
    """The largest of the known models that train on the given GPUs by any strategy, each with its best plan.

    Words and what the search is kept to: those of :func:`advisor.recommend`. It goes down from the largest
    until *most* models fit.
    """
    started = time.perf_counter()
    questions = [kept_to(ask(name, **words), strategy, offload) for name in model_names()]
    questions.sort(key=lambda question: question.model.parameter_count, reverse=True)
    fitting: list[Estimate] = []
    too_large: list[ModelSpec] = []
    for question in questions:
        plans = contenders(question, only_best=True).best if _may_fit(question) else ()
        if plans:
            fitting.append(ordered(plans, "time")[0])
        else:
            too_large.append(question.model)
        if len(fitting) == most:
            break
    first = questions[0]
    return LargestModels(
        cluster=first.cluster,
        job=first.job,
        inputs=first.inputs,
        fitting=tuple(fitting),
        too_large=tuple(too_large),
        seconds=time.perf_counter() - started,
    )


def _may_fit(question: Question) -> bool:
    """Whether the bound of some strategy fits that takes one sequence at a time and recomputes everything."""
    if not _weights_have_room(question):
        return False
    able = [variant for variant, reason in _barred(question).items() if reason is None]
    plans = (plan_of(question, variant, Checkpointing.FULL, 1) for variant in reversed(able))
    return any(_short_by_bound(question, plan) <= 0 for plan in plans)


def _weights_have_room(question: Question) -> bool:
    """Whether all GPUs and machines together could hold the weights once, which spares most that are too large."""
    cluster, job = question.cluster, question.job
    weight_bytes = 0.5 if job.method == "qlora" else FORMAT_BYTES[job.precision]
    there_bytes = cluster.gpus * cluster.gpu.memory_bytes + cluster.nodes * cluster.host_memory_bytes
    return question.model.parameter_count * weight_bytes <= there_bytes
