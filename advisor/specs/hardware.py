"""What the step runs on: GPUs, the links between them, and the machines that hold them."""

from __future__ import annotations

from dataclasses import dataclass

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
    assumed: bool
    """True where the bandwidth is a share of the peak rather than a measurement."""
    source: str

    def __post_init__(self) -> None:
        if self.bandwidth_bytes_per_s <= 0 or self.latency_s < 0:
            raise SpecError(f"link {self.name!r} needs a positive bandwidth and a latency of at least 0")


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

    @property
    def gpus_per_node(self) -> int:
        return self.gpus // self.nodes
