"""What one rank sends and copies in an optimizer step, by purpose and way, and how long that takes on its own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from advisor.cost.collectives import Ring, collective_seconds, copy_seconds, nvme_seconds, ring, sent_bytes
from advisor.specs.hardware import Cluster
from advisor.specs.plan import Count, Group
from advisor.step.program import Amount, Block, Collective, CollectiveKind, Copy, CopyKind, Node, Repeat, read_once


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
    return flows(program, ring(cluster, Group(ranks)), cluster)


def flows(node: Node, over: Ring, cluster: Cluster) -> tuple[Flow, ...]:
    """The transfers of *node*, those of one purpose and kind together."""
    # Payload and number of calls by purpose; the time of both is linear, so they can be summed first.
    sums: dict[tuple[str, CollectiveKind | CopyKind, bool], tuple[Amount, Amount]] = {}
    for each, runs in _transfers(node):
        size, calls = _size_and_calls(each)
        key = (each.what, each.kind, each.waits)
        before_bytes, before_calls = sums.get(key, (0, 0))
        sums[key] = before_bytes + runs * size, before_calls + runs * calls
    return tuple(_flow(*key, size, calls, over, cluster) for key, (size, calls) in sums.items())


@read_once
def _transfers(node: Node) -> Counted:
    """The transfers of *node* outside of its init phase."""
    if isinstance(node, Block):
        return tuple((each, 1) for each in node.transfers)
    if isinstance(node, Repeat):
        return tuple((each, node.times * runs) for each, runs in _transfers(node.body))
    if node.phase == "init":
        return ()
    found: list[tuple[Collective | Copy, Amount]] = []
    for step in node.steps:
        if not isinstance(step, Block):
            found += _transfers(step)
        elif step.transfers:
            found += ((each, 1) for each in step.transfers)
    return tuple(found)


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
    cluster: Cluster,
) -> Flow:
    if kind == "host-to-device" or kind == "device-to-host":
        return Flow(what, kind, waits, size_bytes, copy_seconds(size_bytes, calls, cluster.host_link))
    if kind == "nvme-to-host" or kind == "host-to-nvme":
        return Flow(what, kind, waits, size_bytes, nvme_seconds(size_bytes, over.ranks, cluster))
    seconds = collective_seconds(kind, size_bytes, calls, over)
    return Flow(what, kind, waits, sent_bytes(kind, size_bytes, over.ranks), seconds)
