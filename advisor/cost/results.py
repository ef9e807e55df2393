"""What the readings of one plan's step program say: memory, traffic, time, and a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan
from advisor.specs.question import Input, Origin
from advisor.specs.training import Price
from advisor.step.program import Line

__all__ = ["Estimate", "Input", "Memory", "Origin", "PhaseMemory", "StepTime", "TrafficLine", "TrainingCost", "Verdict"]

Verdict = Literal["fits", "tight", "no"]


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """Bytes of the tensors in one phase of the step, before the allocator rounds them."""

    phase: str
    peak_bytes: int
    end_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank's device, and of its machine's host and NVMe. Fields as torch and NVML count them."""

    capacity_bytes: int
    states_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    """On a device that is large enough."""
    device_used_bytes: int
    low_bytes: int
    high_bytes: int
    """Range in which the measured device use may lie."""
    peak_phase: str
    peak_label: str
    rank: int
    fullest: bool
    """Whether the rank was chosen because it holds most; else it was asked for."""
    allocator: str
    """How torch's allocator was taken to reserve memory."""
    cache_releases: int | None
    """How often two steps must give cached memory back to the device, because more would be reserved than it has; None
    if it cannot hold the step even so."""
    ledger: tuple[Line, ...]
    """What is held at the peak of allocated memory; sums to ``peak_allocated_bytes``."""
    timeline: tuple[PhaseMemory, ...]
    host_bytes: int
    """Peak host memory of one machine, all its ranks together."""
    host_capacity_bytes: int
    host_ledger: tuple[Line, ...]
    """What one process holds in host memory at its peak."""
    nvme_bytes: int = 0
    """On one machine's NVMe, all its ranks together."""
    nvme_capacity_bytes: int = 0
    nvme_ledger: tuple[Line, ...] = ()
    """What one rank keeps there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficLine:
    """What one rank sends for one purpose in one optimizer step."""

    what: str
    collective: str
    link: str
    bytes_per_step: int
    seconds: float
    exposed_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one optimizer step, all its micro-batches included, and the rates that follow."""

    step_s: float
    low_s: float
    high_s: float
    compute_s: float
    """What the GPU is busy for in forward and backward."""
    launch_s: float
    """What it stands still for because kernels are launched slower than it runs them."""
    exposed_communication_s: float
    """Collectives and host copies that nothing hides."""
    bubble_s: float
    """What a pipeline stage waits for others while it fills and drains."""
    optimizer_s: float
    """Update on the GPU or the CPU; part of none of the four above."""
    tokens_per_s: float
    """Over all GPUs."""
    tokens_per_s_per_gpu: float
    mfu: float
    """Model FLOPs (no recomputation) over the dense peak of the number format computed in."""
    flop_per_s_per_gpu: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingCost:
    """What a whole training run takes: its steps, nothing between or around them (:mod:`advisor.cost.money`)."""

    tokens: int
    """As asked; the last step may see some more."""
    steps: int
    hours: float
    low_hours: float
    high_hours: float
    """Range in which the hours may lie, as the step's time does."""
    gpu_hours: float
    price: Price | None
    cost_usd: float | None
    """At the middle of the price; None without one."""
    low_cost_usd: float | None
    high_cost_usd: float | None
    energy_kwh: float | None
    """Of the GPUs at their board power limit, which is an upper bound; None where that is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One plan, priced."""

    model: ModelSpec
    job: Job
    cluster: Cluster
    plan: Plan
    inputs: tuple[Input, ...]
    memory: Memory
    traffic: tuple[TrafficLine, ...]
    time: StepTime
    verdict: Verdict
    why: str
    """One sentence: what makes it fit or not; in a recommendation, what made it win or lose."""
    warnings: tuple[str, ...] = ()
    training: TrainingCost | None = None
    """None where nobody said how much is to be trained on."""

    @property
    def sent_bytes(self) -> int:
        """What one rank sends to other ranks and copies to and from its host in a step."""
        return sum(line.bytes_per_step for line in self.traffic)
