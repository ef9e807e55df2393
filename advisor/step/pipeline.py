"""In which order a pipeline stage runs its micro-batches forwards and backwards.

A stage first runs some forward passes (warm-up), then one forward and one backward pass in turn, then the backward
passes that are left (Narayanan et al., arXiv:2104.04473, section 2.2). Micro-batches between their two passes are in
flight, each with its saved activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from advisor.specs.plan import Count, Plan
from advisor.step.program import Amount, Node, Repeat, repeat, then


class Passes(NamedTuple):
    """What a stage does with a micro-batch, for each of its chunks in the order in which tokens pass them."""

    forward: tuple[Node, ...]
    backward: tuple[Node, ...]
    first_forward: Node
    """The first of a step."""
    last_backward: Node
    """The last of a step."""
    chunks: tuple[Count, ...] = ()
    """How many chunks in a row, all alike, each stands for; one each where empty."""


def bubble_share(plan: Plan) -> Amount:
    """Time for which a stage waits over the time for which it works: (p - 1) / (v·m), arXiv:2104.04473, section 2.2."""
    share: Amount = (plan.pipeline_parallel - 1) / (plan.virtual_stages * plan.accumulation_steps)
    return share


def warm_up(plan: Plan, stage: Count) -> Count:
    """Passes of chunks that *stage* runs forwards before it alternates.

    megatron-core 0.16.1, pipeline_parallel/schedules.py ``get_pp_rank_microbatches``.
    """
    every = plan.accumulation_steps * plan.virtual_stages
    if plan.megatron.pipeline_schedule == "gpipe":
        return every
    behind = plan.pipeline_parallel - stage - 1
    more = behind + (plan.virtual_stages - 1) * plan.pipeline_parallel
    return _least(behind + (plan.virtual_stages > 1) * more, every)


def schedule(passes: Passes, plan: Plan, stage: Count, inner: Node | None = None) -> Node:
    """The passes of *stage* in a step, those between the first and the last as *inner* if they are known."""
    return then(passes.first_forward, inner or between_ends(passes, plan, stage), passes.last_backward)


def between_ends(passes: Passes, plan: Plan, stage: Count) -> Node:
    """All but the first and the last. Of many plans at once, all are interleaved or none is."""
    if np.all(np.asarray(plan.virtual_stages) > 1):
        return _interleaved(passes, plan, stage)
    (forward,), (backward,) = passes.forward, passes.backward
    early, steps = warm_up(plan, stage), plan.accumulation_steps
    if np.all(np.asarray(early) == 0):
        return repeat(then(backward, forward), steps - 1)
    return then(
        repeat(forward, early - 1),
        repeat(then(forward, backward), steps - early),
        repeat(backward, early - 1),
    )


class _Stretch(NamedTuple):
    """A pass that a round has at its places from *begin* to before *end*; nowhere where that is not after it."""

    run: Node
    begin: Count
    end: Count


def _interleaved(passes: Passes, plan: Plan, stage: Count) -> Node:
    """As many micro-batches as there are stages go through one chunk, then through the next: a round, and so on.

    megatron-core 0.16.1, pipeline_parallel/schedules.py ``get_schedule_table`` and
    ``forward_backward_pipelining_with_interleaving``.
    """
    stages = plan.pipeline_parallel
    every, whole = plan.accumulation_steps * plan.virtual_stages, stages * plan.virtual_stages
    chunks = passes.chunks or (1,) * len(passes.forward)
    forward = _round(passes.forward, [stages * each for each in chunks])
    backward = _round(passes.backward[::-1], [stages * each for each in chunks[::-1]])
    early = warm_up(plan, stage)
    opening = _least(early, whole)
    rounds, rest = divmod(early - opening, whole)
    ahead = early % whole
    turned = [*_between(forward, ahead, whole, -ahead), *_between(forward, 0, ahead, whole - ahead)]
    pairs = _paired(turned, backward)
    paired_rounds, paired_rest = divmod(every - early, whole)
    return then(
        *_runs(_between(forward, 1, opening)),
        repeat(then(*_runs(forward)), rounds),
        *_runs(_between(forward, 0, rest)),
        repeat(then(*_runs(pairs)), paired_rounds),
        *_runs(_between(pairs, 0, paired_rest)),
        *_runs(_between(backward, whole - rest, whole)),
        repeat(then(*_runs(backward)), rounds),
        *_runs(_between(backward, whole - opening, whole - 1)),
    )


def _round(runs: Sequence[Node], counts: Sequence[Count]) -> list[_Stretch]:
    found: list[_Stretch] = []
    begin: Count = 0
    for run, count in zip(runs, counts, strict=True):
        found.append(_Stretch(run, begin, begin + count))
        begin = begin + count
    return found


def _between(stretches: Sequence[_Stretch], begin: Count, end: Count, moved: Count = 0) -> list[_Stretch]:
    """What of *stretches* lies from *begin* to before *end*, its places *moved*."""
    return [
        _Stretch(each.run, _most(each.begin, begin) + moved, _least(each.end, end) + moved)
        for each in stretches
        if np.any(np.asarray(_least(each.end, end)) > _most(each.begin, begin))
    ]


def _paired(first: Sequence[_Stretch], second: Sequence[_Stretch]) -> list[_Stretch]:
    """A run of the one and a run of the other at each place of a round."""
    pairs: dict[tuple[int, int], Node] = {}
    found: list[_Stretch] = []
    for one in first:
        for other in _between(second, one.begin, one.end):
            key = id(one.run), id(other.run)
            pairs.setdefault(key, then(one.run, other.run))
            found.append(other._replace(run=pairs[key]))
    return found


def _runs(stretches: Sequence[_Stretch]) -> Iterator[Repeat]:
    for each in stretches:
        yield repeat(each.run, _most(each.end - each.begin, 0))


def _least(one: Count, other: Count) -> Count:
    return min(one, other) if isinstance(one, int) and isinstance(other, int) else np.minimum(one, other)


def _most(one: Count, other: Count) -> Count:
    return max(one, other) if isinstance(one, int) and isinstance(other, int) else np.maximum(one, other)
