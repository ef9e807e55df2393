"""Why the best plan won and each other lost, and what would make those fit that do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from advisor.cost.estimate import judge, shortages
from advisor.cost.memory import footprint, memory
from advisor.cost.results import Estimate
from advisor.search.results import Rejected
from advisor.search.sheet import shortfall
from advisor.search.space import VARIANTS, Barred, bar
from advisor.specs.hardware import Cluster
from advisor.specs.plan import Checkpointing, Count, Offload, Plan, Strategy, zero_settings
from advisor.specs.question import Question
from advisor.step.build import build

GIB = 2**30
GB = 10**9
SHORTEST_SEQUENCE = 256
MOST_DOUBLINGS = 10
MOST_COUNTS = 256
"""Machine counts priced one by one below the first doubling that fits."""


def won(ranked: Sequence[Estimate]) -> str:
    """What makes the first of *ranked* the best."""
    best = ranked[0]
    held = best.memory
    room = f"{held.device_used_bytes / GIB:.1f} of {held.capacity_bytes / GIB:.1f} GiB per GPU"
    if len(ranked) == 1:
        return f"the only strategy that fits: {room}"
    second = max(ranked[1:], key=lambda estimate: estimate.time.tokens_per_s)
    gain = best.time.tokens_per_s / second.time.tokens_per_s - 1
    if gain < -0.005:
        return f"within {-100 * gain:.0f} % of {second.plan.title} and simpler to run; {room}"
    if gain < 0.005:
        return f"as fast as {second.plan.title} and simpler to run; {room}"
    return f"{100 * gain:.0f} % faster than {second.plan.title}, the next; {room}"


def lost(best: Estimate, other: Estimate) -> str:
    """One reason and its numbers for a plan that fits and lost."""
    slower = 1 - other.time.tokens_per_s / best.time.tokens_per_s
    more_traffic = other.sent_bytes - best.sent_bytes
    saved = best.memory.device_used_bytes - other.memory.device_used_bytes
    pace = f"{100 * slower:.0f} % slower" if slower >= 0.005 else "as fast"
    if slower <= -0.005:
        pace = f"{-100 * slower:.0f} % faster by a model that is no finer than that, and more involved to run"
    parts = [pace]
    if other.plan.offload.optimizer and not best.plan.offload.optimizer:
        parts.append(f"its optimizer runs on the CPU for {other.time.optimizer_s:.1f} s a step")
    elif more_traffic > 0.05 * GB:
        parts.append(f"{more_traffic / GB:.1f} GB more traffic per step")
    if other.plan.checkpointing is Checkpointing.FULL and best.plan.checkpointing is Checkpointing.NONE:
        parts.append("it has to recompute activations")
    if saved > 0.05 * GIB:
        parts.append(f"saves {saved / GIB:.1f} GiB that you do not need")
    elif saved < -0.05 * GIB:
        parts.append(f"needs {-saved / GIB:.1f} GiB more")
    if len(parts) == 1 and slower < 0.005:
        parts.append("more involved to run")
    return ", ".join(parts)


def barred(question: Question, found: Barred) -> Rejected:
    """A strategy that cannot run the job, as an answer."""
    plan = _leanest(question, found.strategy, found.offload, question.cluster.gpus)
    return Rejected(plan=plan, why=found.why, short_by_bytes=0, remedy=None)


def refused(question: Question, nearest: Plan) -> Rejected:
    """A strategy of which nothing fits, with its nearest miss and the cheapest way out."""
    held = memory(build(question.model, question.job, nearest), nearest, question.cluster, question.calibration)
    device, host = shortages(held, question.margin_share)
    _, why = judge(held, question.margin_share)
    remedy = next(remedies(question, nearest, host > 0), None)
    return Rejected(plan=nearest, why=why, short_by_bytes=max(device, host), remedy=remedy)


def remedies(question: Question, nearest: Plan, host_is_short: bool) -> Iterator[str]:
    """Changes that would make the strategy of *nearest* fit, cheapest first."""
    leanest = _leanest(question, nearest.strategy, nearest.offload, question.cluster.gpus)
    for divisor in (2, 4, 8):
        length = question.job.sequence_length // divisor
        if length < SHORTEST_SEQUENCE:
            break
        shorter = replace(question, job=replace(question.job, sequence_length=length))
        if _short_by(shorter, leanest) <= 0:
            yield f"--seq-len {length}"
            break
    more = fewest_gpus(question, nearest.strategy, nearest.offload)
    if more is not None:
        yield f"{more} GPUs"
    found = footprint(build(question.model, question.job, leanest), leanest, question.cluster, question.calibration)
    parts = []
    if host_is_short:
        parts.append(f"{np.ceil(float(found.host_bytes) / GIB):.0f} GiB of host memory per machine")
    if float(found.device_used_bytes) > question.cluster.gpu.memory_bytes * (1 - question.margin_share):
        needed = float(found.device_used_bytes) / (1 - question.margin_share) / GIB
        parts.append(f"a GPU of {np.ceil(needed):.0f} GiB")
    if parts:
        yield " and ".join(parts)


def fewest_gpus(question: Question, strategy: Strategy, offload: Offload) -> int | None:
    """The fewest GPUs, in machines like the given ones, on which the strategy fits; None where more never helps.

    Doublings find the range, every count within it the answer: more ranks never need more memory each.
    """
    machine = question.cluster.gpus_per_node
    least = question.cluster.nodes
    doublings = least * 2 ** np.arange(1, MOST_DOUBLINGS + 1)
    high = _first_fit(question, strategy, offload, machine * doublings)
    if high is None:
        return None
    between = machine * np.arange(max(least, high // machine // 2) + 1, high // machine + 1)
    return _first_fit(question, strategy, offload, between[-MOST_COUNTS:])


def _first_fit(question: Question, strategy: Strategy, offload: Offload, counts: NDArray[np.int64]) -> int | None:
    if bar(replace(question, cluster=_enlarged(question.cluster, int(counts[0]))), strategy, offload):
        return None
    plan = _leanest(question, strategy, offload, counts)
    found = footprint(build(question.model, question.job, plan), plan, question.cluster, question.calibration)
    fits = np.broadcast_to(shortfall(found, question.cluster, question.margin_share), counts.shape) <= 0
    return int(counts[fits][0]) if fits.any() else None


def _enlarged(cluster: Cluster, gpus: int) -> Cluster:
    """More machines of the same kind."""
    return replace(cluster, gpus=gpus, nodes=gpus // cluster.gpus_per_node)


def _leanest(question: Question, strategy: Strategy, offload: Offload, gpus: Count) -> Plan:
    """The plan of a strategy that takes least: one sequence at a time, everything recomputed."""
    return Plan(
        strategy=strategy,
        gpus=gpus,
        micro_batch=1,
        accumulation_steps=np.maximum(1, question.job.global_batch // gpus) if np.ndim(gpus) else 1,
        checkpointing=Checkpointing.FULL,
        offload=offload,
        zero=zero_settings(strategy),
    )


def _short_by(question: Question, plan: Plan) -> float:
    found = footprint(build(question.model, question.job, plan), plan, question.cluster, question.calibration)
    return float(np.max(shortfall(found, question.cluster, question.margin_share)))


def headline(question: Question, plans: Sequence[Estimate], rejected: Sequence[Rejected]) -> tuple[str, int | None]:
    """The verdict in one line, and where nothing fits the fewest GPUs on which something would."""
    cluster, name = question.cluster, question.model.name
    where = f"{cluster.gpus} × {cluster.gpu.name}"
    if plans:
        best = plans[0]
        return (
            f"Fits: train {name} on {where} with {best.plan.title}, "
            f"{best.time.tokens_per_s:,.0f} tokens/s, {best.memory.device_used_bytes / GIB:.1f} GiB per GPU"
        ), None
    missing = [each for each in rejected if each.short_by_bytes > 0]
    nearest = min(missing, key=lambda each: each.short_by_bytes)
    counts = [fewest_gpus(question, strategy, offload) for strategy, offload in VARIANTS]
    fewest = min((count for count in counts if count is not None), default=None)
    way_out = f"; the fewest that would do: {fewest} GPUs" if fewest else ""
    return (
        f"Does not fit: {name} on {where}. Nearest is {nearest.plan.title}, "
        f"{nearest.short_by_bytes / GIB:.1f} GiB short{way_out}"
    ), fewest
