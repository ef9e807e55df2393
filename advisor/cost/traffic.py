"""What one rank sends and copies in an optimizer step, by purpose and way, and how long that takes on its own."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from advisor.cost.collectives import Path, collective_seconds, copy_seconds, nvme_seconds, path, sent_bytes
from advisor.specs.hardware import Cluster
from advisor.specs.inference import InferencePlan
from advisor.specs.plan import Group, GroupName, Plan
from advisor.step.program import (
    Amount,
    Block,
    Collective,
    CollectiveKind,
    CopyKind,
    Node,
    Repeat,
    Transfer,
    read_once,
)

NVME = "NVMe"
"""What transfers to and from it are said to go over."""
NVME_KINDS = ("nvme-to-host", "host-to-nvme")


class Flow(NamedTuple):
    """All transfers of one purpose and kind."""

    what: str
    kind: CollectiveKind | CopyKind
    group: GroupName | None
    """Whom the messages go round; None for copies."""
    sent_bytes: Amount
    seconds: Amount
    """Time on an idle link."""


class Routes:
    """Ways through a cluster that are known, for plans some of whose groups of ranks are the same."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._paths: dict[tuple[object, ...], Path] = {}
        self.known: dict[Hashable, tuple[object, Amount]] = {}
        """Times, each beside what it is known by the identity of, so that nothing else takes that."""

    def path(self, group: Group) -> Path:
        """What the messages of each *group* go over."""
        size, stride = (np.asarray(each) for each in group)
        key = (size.shape, size.tobytes(), stride.shape, stride.tobytes())
        if key not in self._paths:
            self._paths[key] = path(self.cluster, group)
        return self._paths[key]


class Ways:
    """What the transfers of a plan go over on a cluster, and how long each takes there."""

    def __init__(self, cluster: Cluster, plan: Plan | InferencePlan, routes: Routes | None = None) -> None:
        self.cluster, self.plan = cluster, plan
        self._routes = routes or Routes(cluster)
        self._paths: dict[GroupName, Path] = {}

    def path(self, group: GroupName) -> Path:
        """What the messages of each *group* go over."""
        if group not in self._paths:
            self._paths[group] = self._routes.path(self.plan.group(group))
        return self._paths[group]

    def link(self, flow: Flow, index: int) -> str:
        """What *flow* goes over, of the plan at *index*; of messages the slowest stretch."""
        if flow.group is None:
            return NVME if flow.kind in NVME_KINDS else self.cluster.host_link.name
        return self.path(flow.group).slowest(index)

    def seconds(self, transfer: Transfer) -> Amount:
        """Time of *transfer* on an idle link."""
        known, key = self._routes.known, self._key(transfer)
        if key not in known:
            known[key] = transfer, self._seconds(transfer)
        return known[key][1]

    def _key(self, transfer: Transfer) -> Hashable:
        """Of messages of plain sizes what they are, of others which."""
        if not isinstance(transfer, Collective):
            return id(transfer)
        over = id(self.path(transfer.group))
        if isinstance(transfer.payload_bytes, np.ndarray) or isinstance(transfer.messages, np.ndarray):
            return id(transfer), over
        return transfer.kind, transfer.payload_bytes, transfer.messages, over

    def _seconds(self, transfer: Transfer) -> Amount:
        if isinstance(transfer, Collective):
            over = self.path(transfer.group)
            return collective_seconds(transfer.kind, transfer.payload_bytes, transfer.messages, over)
        if transfer.kind in NVME_KINDS:
            return nvme_seconds(transfer.moved_bytes, self.plan.gpus, self.cluster)
        return copy_seconds(transfer.moved_bytes, np.asarray(transfer.moved_bytes) > 0, self.cluster.host_link)

    def sent_bytes(self, transfer: Transfer) -> Amount:
        """What one rank sends or copies."""
        if isinstance(transfer, Collective):
            return sent_bytes(transfer.kind, transfer.payload_bytes, self.path(transfer.group).ranks)
        return transfer.moved_bytes


def flows(node: Node, ways: Ways) -> tuple[Flow, ...]:
    """Everything that one rank sends and copies while *node* runs once, outside of its init phase."""
    found: dict[tuple[str, str], Flow] = {}
    for each, runs in transfers(node):
        group = each.group if isinstance(each, Collective) else None
        before = found.get((each.what, each.kind), Flow(each.what, each.kind, group, 0.0, 0.0))
        found[each.what, each.kind] = before._replace(
            sent_bytes=before.sent_bytes + runs * ways.sent_bytes(each),
            seconds=before.seconds + runs * ways.seconds(each),
        )
    return tuple(found.values())


@read_once
def transfers(node: Node) -> tuple[tuple[Transfer, Amount], ...]:
    """The transfers of *node* outside of its init phase, each with how often it runs."""
    if isinstance(node, Block):
        return tuple((each, 1) for each in node.transfers)
    if isinstance(node, Repeat):
        return tuple((each, node.times * runs) for each, runs in transfers(node.body))
    if node.phase == "init":
        return ()
    found: dict[int, tuple[Transfer, Amount]] = {}
    for step in node.steps:
        if isinstance(step, Block) and not step.transfers:
            continue
        for each, runs in transfers(step):
            found[id(each)] = each, runs + found[id(each)][1] if id(each) in found else runs
    return tuple(found.values())
