"""How long a collective takes, and what one rank sends in it, as NCCL's own cost model has it.

A collective takes the time of the fastest of its ways: an algorithm with a protocol. Each costs a launch, a latency
per step, and its bytes over the bandwidth of its slowest stretch (NVIDIA/nccl src/graph/tuning.cc b647562,
``ncclTopoTuneModel``):

- ring: a tensor of S bytes is cut into N pieces that go round in N - 1 steps; each round sends (N - 1)/N · S from every
  rank. The ring passes through machine after machine, and one ring per GPU leaves a machine, so that together they use
  all its network cards.
- tree, for all-reduces over several machines: a chain inside each machine and two binary trees over the machines, each
  for half of the tensor. Its steps grow with the logarithm of the machines. Every link carries 2·S, but of only two
  machines each sends half of the tensor up one tree and half down the other: S.
- in-switch, for all-reduces of enough GPUs of a machine with NVLink SHARP: NVLS, and over several machines NVLS tree.

Protocols (LL, LL128, Simple) and latencies are the links' (``profiles/links.csv``); ``benchmarks/fit_collectives.py``
fits some of them to measured curves and prints how far off all curves are. Latency is what makes collectives slow at
scale: a ring of 512 ranks takes 511 steps, whatever it carries.

Left out: in-network reduction (SHARP of InfiniBand), NCCL's PAT (one GPU per machine), congestion of a network that is
not full-bisection, the choice of a slower way by NCCL, and in all-to-alls what posting each message costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from advisor.errors import SpecError
from advisor.specs.hardware import Cluster, Link, Protocol
from advisor.specs.plan import Count, Group
from advisor.step.program import Amount, CollectiveKind

ROUNDS: dict[CollectiveKind, int] = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "broadcast": 1}
"""Times that a tensor goes round the ring: an all-reduce is a reduce-scatter and an all-gather."""

TREE_BANDWIDTH_SHARE = 0.92
"""Of a ring's (tuning.cc)."""
TREE_NETWORK_STEP = 2
"""A step of a tree over the network takes twice a ring's: 5.0, 8.5 and 28 us for 2.7, 4.0 and 14 (tuning.cc)."""

NEVER_S = 1e30
"""Latency of a way that a group cannot take."""

Ways = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Latency of one message and seconds per byte of the tensor, the ways along the first axis."""


class Stretch(NamedTuple):
    """One kind of connection on the way through all ranks; infinitely fast where the ranks do not use it."""

    link: Link
    bandwidth_bytes_per_s: NDArray[np.float64]
    """Of all rings of the group together."""
    own_bytes_per_s: NDArray[np.float64]
    """Of one rank alone."""
    ring_steps: NDArray[np.float64]
    """In one round."""
    tree_steps: NDArray[np.float64]
    """On the way from a leaf to the root."""
    peers: NDArray[np.float64]
    """Ranks that one rank reaches over it."""


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """The ranks that talk to each other, and the stretches between them, from the inside of a machine outwards."""

    ranks: NDArray[np.int64]
    machines: NDArray[np.float64]
    stretches: tuple[Stretch, ...]
    in_switch: NDArray[np.bool_]
    """Whether a switch that reduces joins the ranks of a machine."""
    known: dict[CollectiveKind, Ways] = field(default_factory=dict, init=False, repr=False)

    def slowest(self, index: int) -> str:
        """Name of the stretch that bounds a large message of the group at *index*."""
        slowest = np.argmin([each.bandwidth_bytes_per_s for each in self.stretches], axis=0)
        return self.stretches[int(slowest.reshape(-1)[index if slowest.ndim else 0])].link.name


def path(cluster: Cluster, group: Group) -> Path:
    """The way through the ranks of each *group* in *cluster*.

    All groups of a kind talk at the same time, so each GPU has its own share of its machine's network cards, and a
    group the shares of those of its GPUs that are in the machine.
    """
    ranks, stride = np.broadcast_arrays(np.asarray(group.size), np.asarray(group.stride))
    inside = np.minimum(ranks, np.maximum(cluster.gpus_per_node // stride, 1))
    machines = np.ceil(ranks / inside)
    islands = _islands(cluster, inside, stride)
    mates = inside / islands
    stretches = [
        Stretch(
            link=cluster.link,
            bandwidth_bytes_per_s=np.where(mates > 1, _meshed(cluster.link, mates), np.inf),
            own_bytes_per_s=np.where(mates > 1, _meshed(cluster.link, 2), np.inf),
            ring_steps=np.maximum(ranks - machines * islands, 0),
            tree_steps=inside - islands,
            peers=mates - 1,
        )
    ]
    if cluster.topology:
        rate = np.where(islands > 1, cluster.topology.between.bandwidth_bytes_per_s, np.inf)
        stretches.append(
            Stretch(
                link=cluster.topology.between,
                bandwidth_bytes_per_s=rate,
                own_bytes_per_s=rate,
                ring_steps=machines * (islands - 1),
                tree_steps=islands - 1,
                peers=inside - mates,
            )
        )
    own = np.where(machines > 1, cluster.network.bandwidth_bytes_per_s, np.inf)
    stretches.append(
        Stretch(
            link=cluster.network,
            bandwidth_bytes_per_s=own * inside,
            own_bytes_per_s=own,
            ring_steps=machines - 1,
            tree_steps=TREE_NETWORK_STEP * np.ceil(np.log2(machines)),
            peers=ranks - inside,
        )
    )
    least = cluster.link.in_switch.least_gpus if cluster.link.in_switch else np.inf
    return Path(ranks, machines, tuple(stretches), (islands == 1) & (inside >= least))


def _islands(cluster: Cluster, inside: NDArray[np.int64], stride: NDArray[np.int64]) -> NDArray[np.float64]:
    """How many islands of a machine a group lies in."""
    topology = cluster.topology
    if topology is None:
        return np.ones(inside.shape)
    pairs = list(zip(inside.reshape(-1).tolist(), stride.reshape(-1).tolist(), strict=True))
    found = {pair: topology.touched(*pair, cluster.gpus_per_node) if pair[0] > 1 else 1 for pair in set(pairs)}
    return np.array([float(found[pair]) for pair in pairs]).reshape(inside.shape)


def _meshed(link: Link, gpus: Amount) -> Amount:
    """Bandwidth of *link* between so many GPUs."""
    if link.mesh_peers is None:
        return link.bandwidth_bytes_per_s
    return link.bandwidth_bytes_per_s * np.clip((gpus - 1) / link.mesh_peers, 0, 1)


def sent_bytes(kind: CollectiveKind, payload_bytes: Amount, ranks: Count) -> Amount:
    """Bytes that one rank sends, of a ring's pieces where there is a ring.

    Of a broadcast the mean over the ranks, the last of which sends nothing. In an all-to-all *payload_bytes* is what
    one rank holds, a part of it for each; in a send-receive what one rank sends to another.
    """
    if kind == "send-receive":
        return payload_bytes * (np.asarray(ranks) > 1)
    return ROUNDS.get(kind, 1) * (ranks - 1) / ranks * payload_bytes


def collective_seconds(kind: CollectiveKind, payload_bytes: Amount, messages: Amount, over: Path) -> Amount:
    """Time of *messages* collectives of one size that share the whole tensors' *payload_bytes*; none on one rank."""
    if kind not in over.known:
        over.known[kind] = _ways(kind, over)
    latency_s, seconds_per_byte = over.known[kind]
    # The ways stay in front where there are many sizes for one group.
    new_axes = range(1, 1 + max(np.ndim(messages), np.ndim(payload_bytes)) - over.ranks.ndim)
    latency_s, seconds_per_byte = (np.expand_dims(each, tuple(new_axes)) for each in (latency_s, seconds_per_byte))
    seconds = np.min(np.multiply(messages, latency_s) + np.multiply(payload_bytes, seconds_per_byte), axis=0)
    return np.where(over.ranks > 1, seconds, 0.0)


def _ways(kind: CollectiveKind, over: Path) -> Ways:
    """Every algorithm with every protocol."""
    protocols = list(dict.fromkeys(each.name for stretch in over.stretches for each in stretch.link.protocols))
    found = [_ring(kind, over, each) if kind in ROUNDS else _direct(kind, over, each) for each in protocols]
    if kind == "all-reduce":
        if np.any(over.machines > 1):
            found += [_tree(over, each) for each in protocols]
        if np.any(over.in_switch):
            found.append(_in_switch(over))
    shape = over.ranks.shape
    latencies, rates = zip(*found, strict=True)
    return np.array([np.broadcast_to(each, shape) for each in latencies]), np.array(
        [np.broadcast_to(each, shape) for each in rates]
    )


def _launch_s(over: Path) -> Amount:
    used = [np.where(np.isfinite(each.own_bytes_per_s), each.link.launch_s, 0.0) for each in over.stretches]
    return np.asarray(np.max(used, axis=0))


def _by(protocol: str, over: Path) -> Iterator[tuple[Stretch, float]]:
    """Each stretch as *protocol* drives it, with the seconds of one step."""
    for each in over.stretches:
        known = {one.name: one for one in each.link.protocols}.get(protocol)
        if known is None:
            yield each, NEVER_S
        else:
            driven = each._replace(
                bandwidth_bytes_per_s=_driven(each.bandwidth_bytes_per_s, known),
                own_bytes_per_s=_driven(each.own_bytes_per_s, known),
            )
            yield driven, each.link.latency_s * known.latency_ratio


def _driven(bandwidth_bytes_per_s: NDArray[np.float64], protocol: Protocol) -> NDArray[np.float64]:
    slowed = np.minimum(protocol.bandwidth_share * bandwidth_bytes_per_s, protocol.most_bytes_per_s)
    return np.where(np.isfinite(bandwidth_bytes_per_s), slowed, np.inf)


def _ring(kind: CollectiveKind, over: Path, protocol: str) -> tuple[Amount, Amount]:
    stretches = list(_by(protocol, over))
    steps_s = sum(step_s * each.ring_steps for each, step_s in stretches)
    # Whoever sends in a broadcast sends the whole tensor.
    carried = 1.0 if kind == "broadcast" else sent_bytes(kind, 1.0, over.ranks)
    slowest = np.min([each.bandwidth_bytes_per_s for each, _ in stretches], axis=0)
    return _launch_s(over) + ROUNDS[kind] * steps_s, carried / slowest


def _tree(over: Path, protocol: str) -> tuple[Amount, Amount]:
    """Up to the root and down again, in a chain through each machine."""
    stretches = list(_by(protocol, over))
    latency_s = _launch_s(over) + 2 * sum(step_s * each.tree_steps for each, step_s in stretches)
    *inside, network = (1 / (TREE_BANDWIDTH_SHARE * each.bandwidth_bytes_per_s) for each, _ in stretches)
    slowest = np.max([*(2 * each for each in inside), _over_trees(over) * network], axis=0)
    return np.where(over.machines > 1, latency_s, NEVER_S), slowest


def _in_switch(over: Path) -> tuple[Amount, Amount]:
    """In the switch of each machine, with trees over the machines where there are several (NVLS and NVLS tree)."""
    in_switch = over.stretches[0].link.in_switch
    assert in_switch
    network, step_s = list(_by("Simple", over))[-1]
    latency_s = _launch_s(over) + in_switch.latency_s + 2 * step_s * network.tree_steps
    switched = (1 + over.machines / over.ranks) / in_switch.bandwidth_bytes_per_s
    slowest = np.maximum(switched, _over_trees(over) / network.bandwidth_bytes_per_s)
    return np.where(over.in_switch, latency_s, NEVER_S), slowest


def _over_trees(over: Path) -> Amount:
    """How often two trees over the machines carry the tensor through a machine's network cards."""
    return np.where(over.machines == 2, 1.0, 2.0)


def _direct(kind: CollectiveKind, over: Path, protocol: str) -> tuple[Amount, Amount]:
    """From rank to rank: all-to-all, where all messages are under way at once, and send-receive."""
    stretches = list(_by(protocol, over))
    step_s = np.max([np.where(np.isfinite(each.own_bytes_per_s), step, 0.0) for each, step in stretches], axis=0)
    if kind == "send-receive":
        each_s = [1 / each.own_bytes_per_s for each, _ in stretches]
    else:
        inner, *outer = (each for each, _ in stretches)
        # Inside a mesh one rank talks over all its links at once.
        each_s = [inner.peers / over.ranks / inner.bandwidth_bytes_per_s]
        each_s += [each.peers / over.ranks / each.own_bytes_per_s for each in outer]
    return _launch_s(over) + step_s, np.max(each_s, axis=0)


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
