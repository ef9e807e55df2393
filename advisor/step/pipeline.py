"""In which order a pipeline stage runs its micro-batches forwards and backwards.

A stage first runs some forward passes (warm-up), then one forward and one backward pass in turn, then the backward
passes that are left (Narayanan et al., arXiv:2104.04473, section 2.2). Micro-batches between their two passes are in
flight, each with its saved activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np

from advisor.errors import SpecError
from advisor.specs.plan import Count, Plan
from advisor.step.program import Amount, Node, repeat, then


class Passes(NamedTuple):
    """What a stage does with a micro-batch, for each of its chunks in the order in which tokens pass them."""

    forward: tuple[Node, ...]
    backward: tuple[Node, ...]
    first_forward: Node
    """The first of a step."""
    last_backward: Node
    """The last of a step."""


def bubble_share(plan: Plan) -> Amount:
    """Time for which a stage waits over the time for which it works: (p - 1) / (v·m), arXiv:2104.04473, section 2.2."""
    share: Amount = (plan.pipeline_parallel - 1) / (plan.virtual_stages * plan.accumulation_steps)
    return share


def warm_up(plan: Plan, stage: int) -> Count:
    """Passes of chunks that *stage* runs forwards before it alternates.

    megatron-core 0.16.1, pipeline_parallel/schedules.py ``get_pp_rank_microbatches``.
    """
    every = plan.accumulation_steps * plan.virtual_stages
    if plan.megatron.pipeline_schedule == "gpipe":
        return every
    behind = plan.pipeline_parallel - stage - 1
    interleaved = plan.virtual_stages > 1
    most = 2 * behind + (plan.virtual_stages - 1) * plan.pipeline_parallel if interleaved else behind
    return min(most, every) if isinstance(every, int) else np.minimum(most, every)


def schedule(passes: Passes, plan: Plan, stage: int) -> Node:
    """The passes of *stage* in a step. Raises SpecError for an interleaved pipeline of many plans at once."""
    if plan.virtual_stages > 1:
        return _interleaved(passes, plan, stage)
    (forward,), (backward,) = passes.forward, passes.backward
    early, steps = warm_up(plan, stage), plan.accumulation_steps
    if np.all(np.asarray(early) == 0):
        return then(passes.first_forward, repeat(then(backward, forward), steps - 1), passes.last_backward)
    return then(
        passes.first_forward,
        repeat(forward, early - 1),
        repeat(then(forward, backward), steps - early),
        repeat(backward, early - 1),
        passes.last_backward,
    )


def _interleaved(passes: Passes, plan: Plan, stage: int) -> Node:
    """As many micro-batches as there are stages go through one chunk, then through the next.

    megatron-core 0.16.1, pipeline_parallel/schedules.py ``get_schedule_table`` and
    ``forward_backward_pipelining_with_interleaving``.
    """
    early = warm_up(plan, stage)
    if not isinstance(plan.accumulation_steps, int) or not isinstance(early, int):
        raise SpecError("an interleaved pipeline is laid out for one number of micro-batches at a time")
    stages, chunks = plan.pipeline_parallel, plan.virtual_stages
    every, period = plan.accumulation_steps * chunks, stages * chunks
    pairs: dict[tuple[int, int], Node] = {}

    def forward(index: int) -> int:
        return index % period // stages

    def pair(index: int) -> Node:
        there, back = forward(index + early), chunks - 1 - forward(index)
        if (there, back) not in pairs:
            pairs[there, back] = then(passes.forward[there], passes.backward[back])
        return pairs[there, back]

    rounds, rest = divmod(every - early, period)
    return then(
        passes.first_forward,
        *_joined(passes.forward[forward(index)] for index in range(1, early)),
        repeat(then(*_joined(pair(index) for index in range(period))), rounds),
        *_joined(pair(index) for index in range(rest)),
        *_joined(passes.backward[chunks - 1 - forward(index)] for index in range(every - early, every - 1)),
        passes.last_backward,
    )


def _joined(nodes: Iterable[Node]) -> Iterator[Node]:
    """*nodes* with those that follow themselves as repeats."""
    for _, several in groupby(nodes, key=id):
        found = list(several)
        yield repeat(found[0], len(found))
