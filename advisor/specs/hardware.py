"""What the step runs on: GPUs, the links between them, and the machines that hold them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from advisor.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One accelerator. Rates are dense peaks; absent ones are None, never guessed."""

    name: str
    aliases: tuple[str, ...] = ()
    memory_bytes: int
    """What torch reports as total memory, below the nominal size."""
    memory_bandwidth_bytes_per_s: float
    peak_flop_per_s: dict[str, float]
    """Dense peak by number format: fp32, tf32, fp16, bf16, fp8; a format the GPU lacks is absent."""
    link: str
    """Name of the usual link to other GPUs in the same machine."""
    host_link: str
    """Name of the link to host memory."""
    architecture: str
    compute_capability: str
    multiprocessors: int | None = None
    """Streaming multiprocessors, or compute units; None where unknown."""
    power_w: float | None = None
    assumed_fields: tuple[str, ...] = ()
    """Facts without a published source."""
    source: str

    def __post_init__(self) -> None:
        if self.memory_bytes <= 0 or self.memory_bandwidth_bytes_per_s <= 0 or not self.peak_flop_per_s:
            raise SpecError(f"GPU {self.name!r} needs memory, bandwidth and at least one peak rate")

    @property
    def has_bf16(self) -> bool:
        return "bf16" in self.peak_flop_per_s


class Protocol(NamedTuple):
    """One of NCCL's ways to pass a message on: small ones with little latency, large ones with all the bandwidth."""

    name: str
    latency_ratio: float
    """Time of one step over the link's latency."""
    bandwidth_share: float
    """Bandwidth over the link's."""
    most_bytes_per_s: float = float("inf")
    """Bound of its bandwidth for a group, whatever the link's."""


ONE_PROTOCOL = (Protocol("Simple", 1.0, 1.0),)


class InSwitch(NamedTuple):
    """All-reduce inside the switch (NVLink SHARP, which NCCL calls NVLS)."""

    bandwidth_bytes_per_s: float
    """At which a GPU's bytes go in and out: of a tensor of S bytes over n GPUs, S·(1 + 1/n)."""
    latency_s: float
    least_gpus: int
    """NCCL uses it from so many GPUs on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A connection between two GPUs, a GPU and its host, or two machines. Rates are one-way, per GPU."""

    name: str
    kind: str
    bandwidth_bytes_per_s: float
    """What a large collective achieves per GPU (bus bandwidth), not the wire's peak."""
    peak_bytes_per_s: float
    latency_s: float
    """Time of one step of a collective at vanishing size."""
    launch_s: float = 0.0
    """Time that any collective over it takes before its first step."""
    protocols: tuple[Protocol, ...] = ONE_PROTOCOL
    """From the one for the smallest messages to the one for the largest."""
    in_switch: InSwitch | None = None
    mesh_peers: int | None = None
    """In a full mesh of point-to-point links, how many share the bandwidth: fewer peers get their part of it alone."""
    assumed: bool
    """True where the bandwidth is a share of the peak rather than a measurement."""
    source: str

    def __post_init__(self) -> None:
        if self.bandwidth_bytes_per_s <= 0 or self.latency_s < 0 or self.launch_s < 0:
            raise SpecError(f"link {self.name!r} needs a positive bandwidth and a latency of at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """A machine whose GPUs are not all joined alike: islands, within which its link runs, and what joins those."""

    islands: tuple[tuple[int, ...], ...]
    """GPUs by their number in the machine; each is in one island."""
    between: Link

    def __post_init__(self) -> None:
        members = Counter(gpu for island in self.islands for gpu in island)
        if not all(self.islands) or min(members, default=-1) < 0:
            raise SpecError(f"islands {self.title}: each needs GPUs, numbered from 0")
        for gpu in range(max(members) + 1):
            if members[gpu] != 1:
                number = "none" if not members[gpu] else str(members[gpu])
                raise SpecError(f"islands {self.title}: GPU {gpu} is in {number} of them; every GPU has to be in one")

    @property
    def gpus(self) -> int:
        """GPUs of the machine."""
        return sum(len(island) for island in self.islands)

    @property
    def title(self) -> str:
        """The islands as they are written down, such as ``[0, 1] [2, 3]``."""
        return " ".join(str(list(island)) for island in self.islands)

    def touched(self, members: int, stride: int, gpus: int) -> int:
        """In how many islands a group of *members* lies at most, *stride* apart, among the machine's first *gpus*."""
        home = {gpu: number for number, island in enumerate(self.islands) for gpu in island}
        span = members * stride
        starts = (block + first for block in range(0, max(1, gpus - span + 1), span) for first in range(stride))
        groups = ([start + stride * each for each in range(members)] for start in starts)
        return max(len({home[gpu] for gpu in group if gpu < gpus}) for group in groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Machines of equal GPUs. ``host_memory_bytes`` is one machine's."""

    gpu: Gpu
    gpus: int
    nodes: int
    link: Link
    host_link: Link
    network: Link
    host_memory_bytes: int
    cpu_memory_bandwidth_bytes_per_s: float
    """Streaming bandwidth of one machine's host memory, which bounds an optimizer on the CPU."""
    nvme_bytes: int = 0
    """One machine's."""
    nvme_bandwidth_bytes_per_s: float = 0.0
    """What one machine reads from its NVMe, or writes to it; its GPUs share it."""
    topology: Topology | None = None
    """None where *link* joins all GPUs of a machine alike."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.nodes < 1:
            raise SpecError(
                f"a cluster needs at least one GPU and one machine, got {self.gpus} and {self.nodes}; "
                "give --gpus and --nodes of 1 or more"
            )
        if self.gpus % self.nodes:
            raise SpecError(
                f"{self.gpus} GPUs do not divide over {self.nodes} machines; "
                f"give a multiple of {self.nodes}, such as {(self.gpus // self.nodes + 1) * self.nodes}"
            )
        if self.topology and self.gpus_per_node > self.topology.gpus:
            raise SpecError(
                f"{self.gpus} GPUs in {self.nodes} machines are {self.gpus_per_node} in each, but the islands "
                f"{self.topology.title} hold {self.topology.gpus}; give more --nodes"
            )

    @property
    def gpus_per_node(self) -> int:
        return self.gpus // self.nodes
