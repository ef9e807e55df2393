"""Why the best plan won and each other lost, and what would make those fit that do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from advisor.catalog.gpus import all_gpus
from advisor.cost.estimate import judge, shortages
from advisor.cost.memory import footprint, short_by
from advisor.cost.question import program, program_of_contenders
from advisor.cost.results import Estimate, Memory
from advisor.errors import ConfigError
from advisor.search.results import Rejected
from advisor.search.sheet import held_by, of_fullest, shortfall
from advisor.search.space import Barred, Variant, bar, fsdp_settings, nearest_batch, searched_zero_settings, variants
from advisor.specs.hardware import Cluster
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Checkpointing, Count, Offload, Plan, Strategy
from advisor.specs.question import Question

ANY_BYTES = 2**60
"""More host memory than any machine has."""
Leasts = dict[Variant, int | None]
"""Below how many GPUs a variant cannot fit, of those that were asked about; None where more never help."""

GIB = 2**30
GB = 10**9
HELD_UP_SHARE = 0.25
"""Of a step, from where on it is said of the best plan what it waits for."""
LEAST_SLOWER_SHARE = 0.005
"""Below which plans count as equally fast."""
NAMED_COSTS, LEAST_NAMED_SHARE = 3, 0.01
"""How many costs of a layout are named, and from which share of a step on."""
SHORTEST_SEQUENCE = 256
MOST_DOUBLINGS = 10
NEAREST_MISSES = 3
"""Named where nothing fits."""
MOST_COUNTS = 256
"""Machine counts priced in one pass between a doubling that does not fit and the one that does."""


def won(ranked: Sequence[Estimate]) -> str:
    """What makes the first of *ranked* the best."""
    best = ranked[0]
    held = best.memory
    room = f"{held.device_used_bytes / GIB:.1f} of {held.capacity_bytes / GIB:.1f} GiB per GPU"
    if len(ranked) == 1 and _is_layout(best):
        return f"the only one that fits: {room}{_cuts_cost(best)}"
    if len(ranked) == 1:
        return f"the only strategy that fits: {room}"
    second = max(ranked[1:], key=lambda estimate: estimate.time.tokens_per_s)
    gain = best.time.tokens_per_s / second.time.tokens_per_s - 1
    room += _cuts_cost(best) if _is_layout(best) else _held_up(best)
    if gain < -LEAST_SLOWER_SHARE:
        return f"within {-100 * gain:.0f} % of {second.plan.title} and simpler to run; {room}"
    if gain < LEAST_SLOWER_SHARE:
        return f"as fast as {second.plan.title} and simpler to run; {room}"
    return f"{100 * gain:.0f} % faster than {second.plan.title}, the next; {room}"


def _held_up(estimate: Estimate) -> str:
    """What the plan waits for through a good part of its step, if it does."""
    step_s = estimate.time.step_s
    launching = estimate.time.launch_s / step_s
    if launching >= HELD_UP_SHARE:
        return f"; {100 * launching:.0f} % of a step is launching kernels, which the GPU runs faster than they come"
    found = _waits(estimate)
    longest = max(found, key=lambda key: found[key], default=None)
    if longest is None or found[longest] < HELD_UP_SHARE * step_s:
        return ""
    return f"; {100 * found[longest] / step_s:.0f} % of a step is waiting for {longest[0]} over {longest[1]}"


def _is_layout(estimate: Estimate) -> bool:
    return estimate.plan.strategy is Strategy.MEGATRON


def _cuts_cost(estimate: Estimate) -> str:
    """What of a step the cuts of a layout cost, most first."""
    found = {f"waiting for {what} over {link}": seconds for (what, link), seconds in _waits(estimate).items()}
    found["the pipeline's bubble"] = estimate.time.bubble_s
    shares = {what: seconds / estimate.time.step_s for what, seconds in found.items()}
    most = sorted(shares, key=lambda what: -shares[what])[:NAMED_COSTS]
    named = [f"{100 * shares[what]:.0f} % {what}" for what in most if shares[what] >= LEAST_NAMED_SHARE]
    return f"; of a step {', '.join(named)}" if named else ""


def _takes_longer(best: Estimate, other: Estimate) -> str | None:
    """What *other* computes or waits for longer than *best*, where one thing is half of what makes its step longer."""
    slower_s = other.time.step_s - best.time.step_s
    if slower_s < LEAST_SLOWER_SHARE * best.time.step_s:
        return None
    computing_s = other.time.compute_s - best.time.compute_s
    before, after = _waits(best), _waits(other)
    longest = max(after, key=lambda key: after[key] - before.get(key, 0.0), default=None)
    waiting_s = after[longest] - before.get(longest, 0.0) if longest else 0.0
    bubble_s = other.time.bubble_s - best.time.bubble_s
    if max(computing_s, waiting_s, bubble_s) < slower_s / 2:
        return None
    if bubble_s > max(computing_s, waiting_s):
        return f"its pipeline stands still {bubble_s:.2g} s longer"
    if longest is None or computing_s >= waiting_s:
        return f"computes {computing_s:.2g} s longer"
    return f"waits {waiting_s:.2g} s longer for {longest[0]} over {longest[1]}"


def _waits(estimate: Estimate) -> dict[tuple[str, str], float]:
    """Seconds of a step that stand out of each purpose's transfers over each link."""
    found: dict[tuple[str, str], float] = {}
    for line in estimate.traffic:
        found[line.what, line.link] = found.get((line.what, line.link), 0.0) + line.exposed_seconds
    return found


def lost(best: Estimate, other: Estimate) -> str:
    """One reason and its numbers for a plan that fits and lost."""
    slower = 1 - other.time.tokens_per_s / best.time.tokens_per_s
    more_traffic = other.sent_bytes - best.sent_bytes
    saved = best.memory.device_used_bytes - other.memory.device_used_bytes
    pace = f"{100 * slower:.0f} % slower" if slower >= LEAST_SLOWER_SHARE else "as fast"
    if slower <= -LEAST_SLOWER_SHARE:
        pace = f"{-100 * slower:.0f} % faster by a model that is no finer than that, and more involved to run"
    parts = [pace]
    recomputes = other.plan.checkpointing is Checkpointing.FULL and best.plan.checkpointing is Checkpointing.NONE
    if other.plan.offload.optimizer and not best.plan.offload.optimizer:
        parts.append(f"its optimizer runs on the CPU for {other.time.optimizer_s:.1f} s a step")
    elif longer := _takes_longer(best, other):
        parts.append(longer)
    elif more_traffic > 0.05 * GB:
        parts.append(f"{more_traffic / GB:.1f} GB more traffic per step")
    if recomputes:
        parts.append("it has to recompute activations")
    if saved > 0.05 * GIB:
        parts.append(f"saves {saved / GIB:.1f} GiB that you do not need")
    elif saved < -0.05 * GIB:
        parts.append(f"needs {-saved / GIB:.1f} GiB more")
    if len(parts) == 1 and slower < LEAST_SLOWER_SHARE:
        parts.append("more involved to run")
    return ", ".join(parts)


def saves(ranked: Sequence[Estimate]) -> str:
    """What makes the first of *ranked* the best where memory is what counts."""
    best = ranked[0]
    room = f"{best.memory.device_used_bytes / GIB:.1f} of {best.memory.capacity_bytes / GIB:.1f} GiB per GPU"
    if len(ranked) == 1:
        return f"the only strategy that fits: {room}"
    second, fastest = ranked[1], max(ranked, key=lambda estimate: estimate.time.tokens_per_s)
    less = (second.memory.device_used_bytes - best.memory.device_used_bytes) / GIB
    slower = 1 - best.time.tokens_per_s / fastest.time.tokens_per_s
    price = f", and {100 * slower:.0f} % slower than {fastest.plan.title}" if slower >= LEAST_SLOWER_SHARE else ""
    return f"{less:.1f} GiB less than {second.plan.title}, the next{price}; {room}"


def leaner(best: Estimate, other: Estimate) -> str:
    """What a plan needs more where memory is what counts, and what that buys."""
    more = (other.memory.device_used_bytes - best.memory.device_used_bytes) / GIB
    faster = other.time.tokens_per_s / best.time.tokens_per_s - 1
    which = "faster" if faster > 0 else "slower"
    pace = f"{100 * abs(faster):.0f} % {which}" if abs(faster) >= LEAST_SLOWER_SHARE else "as fast"
    return f"needs {more:.1f} GiB more, {pace}"


def barred(question: Question, found: Barred) -> Rejected:
    """A strategy that cannot run the job, as an answer."""
    plan = _leanest(question, found.strategy, found.offload, question.cluster.gpus).at(0)
    return Rejected(plan=plan, why=found.why, short_by_bytes=0, remedy=None)


def refused(question: Question, nearest: Plan, known: Leasts) -> Rejected:
    """A strategy of which nothing fits, with its nearest miss and the cheapest way out."""
    held = held_by(question, nearest, squeezed=True)
    short = max(shortages(held, question.margin_share(nearest)))
    _, why = judge(held, question.margin_share(nearest))
    try:
        remedy = next(remedies(question, nearest, held, known), None)
    except ConfigError:  # a traced model whose code knows no checkpointing, which every remedy counts on
        remedy = None
    return Rejected(plan=nearest, why=why, short_by_bytes=short, remedy=remedy)


def remedies(question: Question, nearest: Plan, held: Memory, known: Leasts) -> Iterator[str]:
    """Changes that would make the strategy of *nearest*, which needs *held*, fit, cheapest first."""
    cluster, variant = question.cluster, (nearest.strategy, nearest.offload)
    if short_by(held.states_bytes, held.capacity_bytes, question.margin_share(nearest)) <= 0:
        yield from _smaller_steps(question, variant)
    more = fewest_gpus(question, [variant], known)
    if more is not None:
        yield f"{more} GPUs{_with_batch(question, more)}"
    leanest = _leanest(question, *variant, cluster.gpus)
    found = footprint(program(question, leanest), leanest, cluster, question.calibration)
    largest = max(all_gpus(), key=lambda gpu: gpu.memory_bytes)
    boundless = replace(cluster, gpu=largest, host_memory_bytes=ANY_BYTES)
    if shortfall(found, boundless, question.margin_share(leanest)).min() > 0:
        return
    least = held_by(question, leanest.at(int(np.argmin(shortfall(found, cluster, question.margin_share(leanest))))))
    parts = []
    if least.host_bytes > cluster.host_memory_bytes:
        parts.append(f"{np.ceil(least.host_bytes / GIB):.0f} GiB of host memory per machine")
    if short_by(least.device_used_bytes, cluster.gpu.memory_bytes, question.margin_share(leanest)) > 0:
        needed = least.device_used_bytes / (1 - question.margin_share(leanest))
        if needed > largest.memory_bytes:
            return
        parts.append(f"a GPU of {np.ceil(needed / GIB):.0f} GiB")
    if parts:
        yield " and ".join(parts)


def _smaller_steps(question: Question, variant: Variant) -> Iterator[str]:
    """Steps that hold less at a time and would fit."""
    gpus, job = question.cluster.gpus, question.job
    in_pieces = job.loss == "full" and _has_loss_in_pieces(question.model)
    lengths = [length for divisor in (2, 4, 8) if (length := job.sequence_length // divisor) >= SHORTEST_SEQUENCE]
    chunked = replace(job, loss="chunked") if in_pieces else job
    least = replace(chunked, sequence_length=lengths[-1]) if lengths else chunked
    if not _some_fit(replace(question, job=least), *variant, gpus):
        return
    if in_pieces and _some_fit(replace(question, job=chunked), *variant, gpus):
        yield "--loss chunked"
    for length in lengths:
        if _some_fit(replace(question, job=replace(job, sequence_length=length)), *variant, gpus):
            yield f"--seq-len {length}"
            return


def _has_loss_in_pieces(model: ModelSpec) -> bool:
    """Whether the chunked loss can stand in for the full one."""
    return bool(model.described_layers) and model.objective == "causal" and not model.logit_soft_cap


def _with_batch(question: Question, gpus: int) -> str:
    """The global batch that *gpus* ask for, where the given one does not divide over them."""
    near = nearest_batch(question.job.global_batch, gpus)
    return "" if near == question.job.global_batch else f" with --global-batch {near}"


def fewest_that_would_do(question: Question, known: Leasts) -> tuple[int | None, str]:
    """Where nothing fits: the fewest GPUs on which something would, and the same in words; None and none if more never
    help."""
    if question.job.trainer == "megatron":
        from advisor.search.layout_search import fewest_gpus as fewest_for_layouts  # of use to no other trainer

        fewest = fewest_for_layouts(question)
    else:
        fewest = fewest_gpus(question, variants(question), known)
    return fewest, f"the fewest that would do: {fewest} GPUs{_with_batch(question, fewest)}" if fewest else ""


def fewest_gpus(question: Question, variants: Iterable[Variant], known: Leasts) -> int | None:
    """The fewest GPUs, in machines like the given ones, on which one of *variants* fits; None where more never helps.

    The global batch is the nearest that divides over them. Bounds say from how many on a strategy may fit, and its
    price from how many on it does.
    """
    asked = list(variants)
    known |= {variant: _least_gpus(question, *variant) for variant in asked if variant not in known}
    fewest: int | None = None
    for variant, least in sorted(((each, known[each]) for each in asked), key=lambda each: each[1] or 0):
        if least is not None and (fewest is None or least < fewest):
            fewest = min(filter(None, (fewest, _from_gpus(question, *variant, least))), default=None)
    return fewest


def _least_gpus(question: Question, strategy: Strategy, offload: Offload) -> int | None:
    """Below how many GPUs the strategy cannot fit.

    Doublings find the range, and passes over it the answer: more ranks never need more memory each.
    """
    machine = question.cluster.gpus_per_node
    least = question.cluster.nodes
    doublings = least * 2 ** np.arange(1, MOST_DOUBLINGS + 1)
    found = _first_fit(question, strategy, offload, machine * doublings)
    if found is None:
        return None
    low, high = found // machine // 2, found // machine
    while high - low > 1:
        counts = np.unique(np.linspace(low + 1, high, MOST_COUNTS, dtype=np.int64))
        high = (_first_fit(question, strategy, offload, machine * counts) or machine * high) // machine
        low = int(counts[counts < high].max(initial=low))
    return machine * high


def _first_fit(question: Question, strategy: Strategy, offload: Offload, counts: NDArray[np.int64]) -> int | None:
    if bar(replace(question, cluster=_enlarged(question.cluster, int(counts[0]))), strategy, offload):
        return None
    fits = _short_by(question, _leanest(question, strategy, offload, counts)).reshape(2, -1).min(axis=0) <= 0
    return int(counts[fits][0]) if fits.any() else None


def _from_gpus(question: Question, strategy: Strategy, offload: Offload, least: int) -> int | None:
    """A count of GPUs from *least* on at which the strategy fits by its price and a machine less would not do.

    Steps that double find one that is enough, and halving the way back where it begins to be. Gaps between tensors
    change with the sizes of shards, so that in rare cases a smaller count would do too.
    """
    machine = question.cluster.gpus_per_node
    most = question.cluster.nodes * 2**MOST_DOUBLINGS
    low, high = least // machine - 1, least // machine
    while not _some_fit(question, strategy, offload, machine * high):
        if high >= most:
            return None
        low, high = high, min(3 * high - 2 * low, most)
    while high - low > 1:
        middle = (low + high) // 2
        if _some_fit(question, strategy, offload, machine * middle):
            high = middle
        else:
            low = middle
    return machine * high


def _some_fit(question: Question, strategy: Strategy, offload: Offload, gpus: int) -> bool:
    """Whether one of the two leanest plans fits."""
    both = _leanest(question, strategy, offload, gpus)
    bounds = _short_by(question, both)
    alike = both.at(0).micro_batch == both.at(1).micro_batch
    return any(
        bounds[index] <= 0 and max(shortages(held_by(question, both.at(index)), question.margin_share(both))) <= 0
        for index in ((0,) if alike else (0, 1))
    )


def _enlarged(cluster: Cluster, gpus: int) -> Cluster:
    """More machines of the same kind."""
    return replace(cluster, gpus=gpus, nodes=gpus // cluster.gpus_per_node)


def _leanest(question: Question, strategy: Strategy, offload: Offload, gpus: Count) -> Plan:
    """The two plans of a strategy that can take least, first the one and then the other for each of *gpus*.

    Everything is recomputed, and a rank takes its share of the nearest global batch one sequence at a time, or all at
    once, which accumulates nothing.
    """
    counts = np.asarray(gpus).reshape(-1)
    share = np.maximum(1, np.rint(question.job.global_batch / counts)).astype(np.int64)
    single = np.ones_like(share)
    return Plan(
        strategy=strategy,
        gpus=np.concatenate([counts, counts]),
        micro_batch=np.concatenate([single, share]),
        accumulation_steps=np.concatenate([share, single]),
        checkpointing=Checkpointing.FULL,
        offload=offload,
        zero=searched_zero_settings(strategy, question),
        fsdp=fsdp_settings(strategy, question),
    )


def _short_by(question: Question, plan: Plan) -> NDArray[np.float64]:
    """What each of the plans lacks at least."""
    step = program_of_contenders(question, plan)
    found = footprint(step, plan, question.cluster, question.calibration)
    (short,) = of_fullest(step, np.shape(plan.gpus), shortfall(found, question.cluster, question.margin_share(plan)))
    return short


def nearest_beyond(beyond: Sequence[Estimate]) -> Estimate:
    """Of plans beyond a limit the fastest, which on one cluster is the cheapest too."""
    return max(beyond, key=lambda estimate: estimate.time.tokens_per_s)


def headline(
    question: Question,
    plans: Sequence[Estimate],
    rejected: Sequence[Rejected],
    beyond: Sequence[Estimate],
    known: Leasts,
) -> tuple[str, int | None]:
    """The verdict in one line, and where nothing fits the fewest GPUs on which something would."""
    cluster, name = question.cluster, question.model.name
    where = f"{cluster.gpus} × {cluster.gpu.name}"
    if plans:
        best = plans[0]
        return (
            f"Fits: train {name} on {where} with {best.plan.title}, "
            f"{best.time.tokens_per_s:,.0f} tokens/s, {best.memory.device_used_bytes / GIB:.1f} GiB per GPU"
        ), None
    if beyond:
        nearest_in_time = nearest_beyond(beyond)
        return f"Beyond a limit: {name} on {where} with {nearest_in_time.plan.title}: {nearest_in_time.why}", None
    missing = [each for each in rejected if each.short_by_bytes > 0]
    if not missing:
        return f"Does not run: {name} on {where} with {rejected[0].plan.title}: {rejected[0].why}", None
    nearest = sorted(missing, key=lambda each: each.short_by_bytes)[:NEAREST_MISSES]
    misses = ", ".join(f"{each.plan.title} {each.short_by_bytes / GIB:.1f} GiB short" for each in nearest)
    fewest, way_out = fewest_that_would_do(question, known)
    return (f"Does not fit: {name} on {where}. Nearest: {misses}{f'; {way_out}' if way_out else ''}"), fewest
