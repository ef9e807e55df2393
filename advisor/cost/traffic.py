"""What one rank sends and copies in an optimizer step, by purpose and way, and how long that takes on its own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from advisor.cost.collectives import Ring, collective_seconds, copy_seconds, ring, sent_bytes
from advisor.specs.hardware import Cluster, Link
from advisor.specs.plan import Count
from advisor.step.program import Amount, Block, Collective, CollectiveKind, Copy, CopyKind, Node, Repeat


class Flow(NamedTuple):
    """All transfers of one purpose and kind."""

    what: str
    kind: CollectiveKind | CopyKind
    waits: bool
    """Whether the work after each transfer cannot start before it ends."""
    sent_bytes: Amount
    seconds: Amount
    """Time on an idle link."""


Counted = tuple[tuple[Collective | Copy, Amount], ...]
"""Transfers, each with how often it runs."""


def traffic(program: Node, cluster: Cluster, ranks: Count) -> tuple[Flow, ...]:
    """Everything that one of *ranks* GPUs sends and copies while *program* runs once, outside of its init phase."""
    return flows(program, ring(cluster, ranks), cluster.host_link)


def flows(node: Node, over: Ring, host_link: Link, known: dict[int, Counted] | None = None) -> tuple[Flow, ...]:
    """The transfers of *node*, those of one purpose and kind together.

    *known* keeps what has been read, by the identity of nodes that outlive it.
    """
    # Payload and number of calls by purpose; the time of both is linear, so they can be summed first.
    sums: dict[tuple[str, CollectiveKind | CopyKind, bool], tuple[Amount, Amount]] = {}
    for each, runs in _transfers(node, {} if known is None else known):
        size, calls = _size_and_calls(each)
        key = (each.what, each.kind, each.waits)
        before_bytes, before_calls = sums.get(key, (0, 0))
        sums[key] = before_bytes + runs * size, before_calls + runs * calls
    return tuple(_flow(*key, size, calls, over, host_link) for key, (size, calls) in sums.items())


def _transfers(node: Node, known: dict[int, Counted]) -> Counted:
    """The transfers of *node* outside of its init phase. A part that stands at several places is read once."""
    if isinstance(node, Block):
        return tuple((each, 1) for each in node.transfers)
    if id(node) not in known:
        if isinstance(node, Repeat):
            found = tuple((each, node.times * runs) for each, runs in _transfers(node.body, known))
        elif node.phase == "init":
            found = ()
        else:
            found = tuple(each for step in node.steps for each in _transfers(step, known))
        known[id(node)] = found
    return known[id(node)]


def _size_and_calls(transfer: Collective | Copy) -> tuple[Amount, Amount]:
    if isinstance(transfer, Collective):
        return transfer.payload_bytes, transfer.messages
    return transfer.moved_bytes, np.asarray(transfer.moved_bytes) > 0


def _flow(
    what: str,
    kind: CollectiveKind | CopyKind,
    waits: bool,
    size_bytes: Amount,
    calls: Amount,
    over: Ring,
    host_link: Link,
) -> Flow:
    if kind == "host-to-device" or kind == "device-to-host":
        return Flow(what, kind, waits, size_bytes, copy_seconds(size_bytes, calls, host_link))
    seconds = collective_seconds(kind, size_bytes, calls, over)
    return Flow(what, kind, waits, sent_bytes(kind, size_bytes, over.ranks), seconds)
