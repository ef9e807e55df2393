"""How long a collective takes, and what one rank sends in it: rings with a latency and a bandwidth.

A ring of N ranks cuts a tensor of S bytes into N pieces and passes them on in rounds of N - 1 steps. Each round
sends (N - 1)/N · S from every rank and takes that over the bus bandwidth, plus a latency per step
(nccl-tests, doc/PERFORMANCE.md: the bus bandwidth of a collective is what its slowest connection carries, so that it
does not depend on N). Left out: NCCL's trees, which beat a ring for small all-reduces over many machines; in-switch
reduction (NVLS, SHARP); sizes between latency and bandwidth, which real protocols serve below both (16 MiB over 8 A100
take 1.6 times as long as this says); congestion (256 MiB all-gathers between H100 over EFA took 1.7 times as long on 2
machines, 3.4 times on 8 and 6.5 times on 64; nanotron's Ultra-Scale Playbook, medians).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advisor.errors import SpecError
from advisor.specs.hardware import Cluster, Link
from advisor.specs.plan import Count, Group
from advisor.step.program import Amount, CollectiveKind

ROUNDS: dict[CollectiveKind, int] = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "broadcast": 1}
"""Times that a tensor goes round the ring: an all-reduce is a reduce-scatter and an all-gather. A send-receive,
from each rank to its neighbour, does not."""


@dataclass(frozen=True, slots=True, eq=False)
class Ring:
    """The ranks that talk to each other, and the slowest stretch between two of them."""

    ranks: Count
    bandwidth_bytes_per_s: Amount
    latency_s: Amount
    crosses_network: NDArray[np.bool_]
    """Whether the ranks are on several machines."""
    network_limits: NDArray[np.bool_]
    """Whether the network, not the link inside a machine, is the slowest stretch."""


def ring(cluster: Cluster, group: Group) -> Ring:
    """The ring through the ranks of each *group* in *cluster*, machine after machine.

    Over several machines one ring per GPU leaves each machine, so that together they use all its network cards: the
    bus bandwidth is that of the link, or of the network times the GPUs of a machine where that is less. Each step then
    has the network's latency. One GPU per machine uses the network alone.
    """
    ranks = group.size
    per_machine = np.minimum(ranks, np.maximum(cluster.gpus_per_node // group.stride, 1))
    crosses = np.asarray(ranks) > per_machine
    inside = np.where(per_machine > 1, cluster.link.bandwidth_bytes_per_s, np.inf)
    outside = np.where(crosses, cluster.network.bandwidth_bytes_per_s * per_machine, np.inf)
    return Ring(
        ranks,
        np.minimum(inside, outside),
        np.where(crosses, cluster.network.latency_s, cluster.link.latency_s),
        crosses,
        outside < inside,
    )


def sent_bytes(kind: CollectiveKind, payload_bytes: Amount, ranks: Count) -> Amount:
    """Bytes that one rank sends; of a broadcast the mean over the ranks, the last of which sends nothing."""
    if kind == "send-receive":
        return payload_bytes * (ranks > 1)
    return ROUNDS[kind] * (ranks - 1) / ranks * payload_bytes


def collective_seconds(kind: CollectiveKind, payload_bytes: Amount, messages: Amount, over: Ring) -> Amount:
    """Time of *messages* collectives that share the whole tensors' *payload_bytes*; none on a single rank."""
    steps = over.ranks > 1 if kind == "send-receive" else ROUNDS[kind] * (over.ranks - 1)
    # Whoever sends in a broadcast sends the whole tensor.
    carried = payload_bytes * (over.ranks > 1) if kind == "broadcast" else sent_bytes(kind, payload_bytes, over.ranks)
    return messages * steps * over.latency_s + carried / over.bandwidth_bytes_per_s


def nvme_seconds(moved_bytes: Amount, ranks: Count, cluster: Cluster) -> Amount:
    """Time in which each of *ranks* reads or writes *moved_bytes*, those of a machine sharing its NVMe.

    Raises SpecError for bytes to move and an NVMe of unknown speed.
    """
    if not np.any(moved_bytes):
        return 0.0 * np.asarray(moved_bytes)
    if not cluster.nvme_bandwidth_bytes_per_s:
        raise SpecError("the plan needs an NVMe, and this cluster has none; give nvme_bandwidth_bytes_per_s")
    return moved_bytes * np.minimum(ranks, cluster.gpus_per_node) / cluster.nvme_bandwidth_bytes_per_s


def copy_seconds(moved_bytes: Amount, copies: Amount, host_link: Link) -> Amount:
    """Time of *copies* between a GPU and its host that share *moved_bytes*. Every GPU has its own connection."""
    return copies * host_link.latency_s + moved_bytes / host_link.bandwidth_bytes_per_s
