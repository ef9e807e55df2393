"""Every way in which Megatron could spread a model over GPUs, in sheets that one pass prices, and why not the others.

A sheet stands for all numbers of pipeline stages, virtual stages and micro-batches: arrays of (stages, virtual stages)
by micro-batches. What changes the step program itself makes a sheet of its own: tensor, context and sequence
parallelism, checkpointing, the distributed optimizer, one stage or several, interleaved or not, and one sequence at a
time or several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, product
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from advisor.errors import SpecError
from advisor.specs.layout import FLAGS, GivenLayout
from advisor.specs.megatron import MegatronSettings
from advisor.specs.model import Experts, Layer
from advisor.specs.plan import Checkpointing, Plan, Strategy
from advisor.specs.question import Question
from advisor.step.megatron_shard import kinds_of, refusal_of_cut, refusal_of_job

DISTRIBUTED = MegatronSettings()
WHOLE = MegatronSettings(distributed_optimizer=False, overlaps_weights=False)
"""Every data-parallel rank updates all that it has."""


SETTINGS = (MegatronSettings(), MegatronSettings(distributed_optimizer=False, overlaps_weights=False))
"""With the distributed optimizer, and with each data-parallel rank updating all that it has."""


class LayoutSheet(NamedTuple):
    """Plans of one structure side by side."""

    plans: tuple[Plan, ...]
    """Alike but for the optimizer: one for each of :data:`SETTINGS`."""
    legal: tuple[NDArray[np.bool_], ...]
    """Of each plan's shape: whether the global batch is made up so. Elsewhere stands what nobody asks for."""


class Excluded(NamedTuple):
    """A choice that no plan of the search makes."""

    plan: Plan
    """The plainest with that choice."""
    why: str


class LayoutSpace(NamedTuple):
    """All of them."""

    sheets: tuple[LayoutSheet, ...]
    excluded: tuple[Excluded, ...]


class Cut(NamedTuple):
    """What a layer is cut over."""

    tensor: int
    sequence: bool
    context: int
    experts: int
    slices: int
    """Ranks that cut each expert."""


class Pipeline(NamedTuple):
    """Stages, virtual stages, and the sequences that a copy of the model sees in a step."""

    stages: int
    virtual: int
    share: int


def layout_space(question: Question) -> LayoutSpace:
    """Every plan for *question* that keeps to its ``given_layout``.

    Raises SpecError where Megatron cannot train the model, or where what is given leaves nothing: the fewest flags that
    do not go together.
    """
    if reason := refusal_of_job(question.model, question.job):
        raise SpecError(f"Megatron cannot train {question.model.name}: {reason}")
    excluded: dict[str, Excluded] = {}
    sheets = tuple(_sheets(question, question.given_layout, excluded))
    if not sheets:
        raise SpecError(_contradiction(question))
    return LayoutSpace(sheets, tuple(excluded.values()))


def _contradiction(question: Question) -> str:
    """Which of the given degrees leave no plan, and why."""
    said = {name: value for name in FLAGS if (value := getattr(question.given_layout, name)) is not None}
    for size in range(len(said) + 1):
        for names in combinations(said, size):
            excluded: dict[str, Excluded] = {}
            given = GivenLayout(**{name: said[name] for name in names})
            if next(_sheets(question, given, excluded), None) is None:
                flags = [f"{FLAGS[name]} {_shown(said[name])}" for name in names]
                where = f"--gpus {question.cluster.gpus} with --global-batch {question.job.global_batch}"
                why = next(reversed(excluded), "interleaved micro-batches go in groups of as many as there are stages")
                return f"{' and '.join([*flags, where])} contradict each other: {why}"
    raise AssertionError("what is given leaves something")


def _shown(value: object) -> str:
    return value.value if isinstance(value, Checkpointing) else str(value)


def _sheets(question: Question, given: GivenLayout, excluded: dict[str, Excluded]) -> Iterator[LayoutSheet]:
    known: dict[tuple[int, int], list[Pipeline]] = {}
    for cut in _cuts(question, given, excluded):
        key = question.cluster.gpus // (cut.tensor * cut.context), cut.experts * cut.slices
        if key not in known:
            known[key] = _pipelines(question, given, *key, excluded)
        pipelines = known[key]
        batches = sorted({size for each in pipelines for size in divisors(each.share)})
        if given.micro_batch is not None:
            batches = [size for size in batches if size == given.micro_batch]
            if pipelines and not batches:
                shares = ", ".join(str(each) for each in sorted({each.share for each in pipelines}))
                why = f"micro-batches of {given.micro_batch} do not make up {shares} sequences of a copy of the model"
                excluded[why] = Excluded(_plain(question, micro_batch=given.micro_batch), why)
        checkpointings = tuple(Checkpointing) if given.checkpointing is None else (given.checkpointing,)
        for checkpointing, sizes, rows in product(checkpointings, _sizes(batches), _rows(question, pipelines)):
            sheet = _sheet(question, cut, checkpointing, sizes, rows)
            if sheet.plans:
                yield sheet


def _sizes(batches: Sequence[int]) -> Iterator[int | NDArray[np.int64]]:
    """Micro-batches that a sheet can hold: one sequence is laid out otherwise than several."""
    if 1 in batches:
        yield 1
    if several := [size for size in batches if size > 1]:
        yield np.array(several)


def _rows(question: Question, pipelines: Sequence[Pipeline]) -> Iterator[Sequence[Pipeline]]:
    """Pipelines that a sheet can hold: of unlike layers, one."""
    if len(kinds_of(question.model)) > 1:
        yield from ([each] for each in pipelines)
        return
    for rows in (
        [each for each in pipelines if each.stages == 1],
        [each for each in pipelines if each.stages > 1 and each.virtual == 1],
        [each for each in pipelines if each.virtual > 1],
    ):
        if rows:
            yield rows


def _sheet(
    question: Question,
    cut: Cut,
    checkpointing: Checkpointing,
    sizes: int | NDArray[np.int64],
    rows: Sequence[Pipeline],
) -> LayoutSheet:
    stages, virtual, share = (np.array(each)[:, np.newaxis] for each in zip(*rows, strict=True))
    interleaved = rows[0].virtual > 1
    group = stages if interleaved else 1
    steps = group * np.maximum(share // (sizes * group), 1)
    ranks = question.cluster.gpus // stages // cut.tensor
    single = len(rows) == 1
    plan = Plan(
        strategy=Strategy.MEGATRON,
        gpus=question.cluster.gpus,
        micro_batch=sizes,
        accumulation_steps=steps,
        checkpointing=checkpointing,
        tensor_parallel=cut.tensor,
        sequence_parallel=cut.sequence,
        pipeline_parallel=rows[0].stages if single else stages,
        virtual_stages=virtual if interleaved and not single else rows[0].virtual,
        context_parallel=cut.context,
        expert_parallel=cut.experts,
        expert_tensor_parallel=cut.slices,
    )
    there = steps * sizes == share
    legal = [np.broadcast_to(there & (each.distributed_optimizer | (ranks > 1)), plan.shape) for each in SETTINGS]
    found = [(replace(plan, megatron=each), mask) for each, mask in zip(SETTINGS, legal, strict=True) if mask.any()]
    return LayoutSheet(tuple(each for each, _ in found), tuple(mask for _, mask in found))


def _cuts(question: Question, given: GivenLayout, excluded: dict[str, Excluded]) -> Iterator[Cut]:
    """What layers can be cut over."""
    gpus, machine = question.cluster.gpus, question.cluster.gpus_per_node
    for tensor in _degrees(gpus, given.tensor_parallel):
        plan = _plain(question, tensor_parallel=tensor)
        slices = next(_spreads(question, given, tensor))[1]
        reasons = [
            _refusal(question, replace(plan, sequence_parallel=sequence, expert_tensor_parallel=slices))
            for sequence in _sequence_parallel(tensor, given)
        ]
        why = reasons[0] if reasons and all(reasons) else None
        if not why and machine % tensor and given.tensor_parallel is None:
            why = (
                f"groups of {tensor} tensor-parallel GPUs would cross machines of {machine}, whose network is slower "
                f"than what joins the GPUs inside; --tp {tensor} asks for it all the same"
            )
        if why:
            excluded.setdefault(why, Excluded(plan, why))
            continue
        for context in _degrees(gpus // tensor, given.context_parallel):
            whole = _plain(question, tensor_parallel=tensor, context_parallel=context)
            spreads = _spreads(question, given, tensor)
            for sequence, (experts, slices) in product(_sequence_parallel(tensor, given), spreads):
                if gpus % (experts * slices):
                    why = f"expert_parallel {experts} x expert_tensor_parallel {slices} do not divide {gpus} GPUs"
                    excluded.setdefault(why, Excluded(whole, why))
                    continue
                plan = replace(
                    whole, sequence_parallel=sequence, expert_parallel=experts, expert_tensor_parallel=slices
                )
                if why := _refusal(question, plan):
                    excluded.setdefault(why, Excluded(plan, why))
                else:
                    yield Cut(tensor, sequence, context, experts, slices)


def _spreads(question: Question, given: GivenLayout, tensor: int) -> Iterator[tuple[int, int]]:
    """Ranks that experts are spread over, and those that cut each: none, or as many as cut the other weights."""
    mixed = any(
        isinstance(layer, Layer) and isinstance(layer.feed_forward, Experts) for layer in kinds_of(question.model)
    )
    if not mixed:
        yield (given.expert_parallel or 1), 1
        return
    for experts in _degrees(question.cluster.gpus, given.expert_parallel):
        yield experts, tensor
        if experts > 1 and tensor > 1:
            yield experts, 1


def _refusal(question: Question, plan: Plan) -> str | None:
    if plan.gpus != question.cluster.gpus:
        return f"groups of {plan.gpus} GPUs do not divide {question.cluster.gpus}"
    return refusal_of_cut(question.model, question.job, plan)


def _sequence_parallel(tensor: int, given: GivenLayout) -> Sequence[bool]:
    if tensor == 1:
        return (False,) if not given.sequence_parallel else ()
    return (False, True) if given.sequence_parallel is None else (given.sequence_parallel,)


def _pipelines(
    question: Question, given: GivenLayout, ranks: int, expert_ranks: int, excluded: dict[str, Excluded]
) -> list[Pipeline]:
    """Stages and virtual stages that the layers, the global batch and the GPUs divide over.

    *ranks* are left for stages and copies of the model, and each stage has a multiple of *expert_ranks*.
    """
    batch, found = question.job.global_batch, []
    for stages in _degrees(ranks, given.pipeline_parallel):
        plan = _plain(question, pipeline_parallel=stages)
        why = refusal_of_cut(question.model, question.job, plan)
        if not why and ranks % stages:
            why = f"{stages} stages do not divide the {ranks} GPUs that layers and sequences are not cut over"
        elif not why and question.cluster.gpus % (expert_ranks * stages):
            why = f"{stages} stages x {expert_ranks} GPUs of experts do not divide {question.cluster.gpus} GPUs"
        elif not why and batch % (ranks // stages):
            why = f"a global batch of {batch} does not divide over {ranks // stages} copies of the model"
        if why:
            excluded.setdefault(why, Excluded(plan, why))
            continue
        runs = len(question.model.layers) // stages
        for virtual in _degrees(runs, given.virtual_stages):
            if virtual > 1 and stages == 1:
                why = f"{virtual} virtual stages need a pipeline of 2 stages or more"
            elif runs % virtual:
                why = f"{runs} layers of each of {stages} stages do not divide into {virtual} runs"
            else:
                found.append(Pipeline(stages, virtual, batch * stages // ranks))
                continue
            if given.virtual_stages is not None:
                excluded.setdefault(why, Excluded(plan, why))
    return found


def _plain(question: Question, micro_batch: int = 1, **counts: int) -> Plan:
    """The plainest plan of these *counts* of ranks."""
    cut, gpus = prod(counts.values()), question.cluster.gpus
    return Plan(
        strategy=Strategy.MEGATRON,
        gpus=gpus if gpus % cut == 0 else cut,
        micro_batch=micro_batch,
        accumulation_steps=1,
        **counts,  # type: ignore[arg-type]
    )


def _degrees(available: int, given: int | None) -> Sequence[int]:
    return divisors(available) if given is None else (given,)


@lru_cache(maxsize=256)
def divisors(number: int) -> tuple[int, ...]:
    """All of *number*, from 1 on."""
    return tuple(each for each in range(1, number + 1) if number % each == 0)
