"""Memory readings of a step program: how much for many plans at once, and what and when for one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from advisor.cost.results import Memory, PhaseMemory
from advisor.specs.calibration import Calibration
from advisor.specs.hardware import Cluster
from advisor.specs.plan import Plan
from advisor.step.build import StepProgram
from advisor.step.program import Amount, Node, fold, held_after, hold, peak_of, phase_peaks, then

SEGMENT_BYTES = 2 * 2**20
"""torch's caching allocator reserves device memory in pieces of this size."""
GEMM_THREADS = 2
"""Forward and backward run in threads of their own, each with a cuBLAS workspace."""


@dataclass(frozen=True, slots=True, eq=False)
class Footprint:
    """Bytes on the program's rank's device and on one machine's host, for every plan of a program."""

    states_bytes: Amount
    peak_allocated_bytes: Amount
    peak_reserved_bytes: Amount
    device_used_bytes: Amount
    host_bytes: Amount


def on_device(program: StepProgram, cluster: Cluster, calibration: Calibration) -> Node:
    """The step as torch's allocator sees it on this GPU: cuBLAS workspaces are taken at the first product."""
    workspace = GEMM_THREADS * calibration.workspace_bytes(cluster.gpu.compute_capability)
    return then(program.init, hold("cuBLAS workspaces", "workspace", workspace), program.step)


def footprint(program: StepProgram, plan: Plan, cluster: Cluster, calibration: Calibration) -> Footprint:
    """Sizes of every plan that *program* stands for.

    Reserved is allocated plus a measured share of what the step takes and gives back, in whole segments. The device
    also holds the CUDA context and, with several ranks, the communicator's buffers, outside torch's allocator.
    Left out: rounding of single tensors (at most 512 B each, 1 MiB for large ones that leave a remainder unsplit).
    """
    states = fold(program.init).net_bytes
    allocated = fold(on_device(program, cluster, calibration)).peak_bytes
    churn = np.maximum(allocated - states, 0)
    reserved = np.ceil((allocated + calibration.fragmentation_share * churn) / SEGMENT_BYTES) * SEGMENT_BYTES
    communicators = np.asarray(plan.gpus) > 1
    used = reserved + calibration.context_bytes + calibration.communicator_bytes * communicators
    return Footprint(states, allocated, reserved, used, _host_bytes(program, plan, cluster, calibration))


def short_by(used_bytes: Amount, capacity_bytes: int, margin_share: float) -> Amount:
    """Bytes that a device lacks for *used_bytes* if *margin_share* is to stay free; at most 0 if it has enough."""
    return used_bytes - capacity_bytes * (1 - margin_share)


def _host_bytes(program: StepProgram, plan: Plan, cluster: Cluster, calibration: Calibration) -> Amount:
    """One machine's: what each of its ranks holds, plus what one of them holds while it loads for all."""
    ranks = np.minimum(plan.gpus, cluster.gpus_per_node)
    each = fold(program.host).peak_bytes + calibration.process_host_bytes
    return ranks * each + fold(program.host_once).peak_bytes


def memory(
    program: StepProgram, plan: Plan, cluster: Cluster, calibration: Calibration, fullest: bool = True
) -> Memory:
    """The same for a single plan, with the ledger at the peak and the phases on the way to it."""
    found = footprint(program, plan, cluster, calibration)
    device = on_device(program, cluster, calibration)
    peak = peak_of(device)
    used = int(found.device_used_bytes)
    host = peak_of(program.host)
    return Memory(
        capacity_bytes=cluster.gpu.memory_bytes,
        states_bytes=int(found.states_bytes),
        peak_allocated_bytes=int(found.peak_allocated_bytes),
        peak_reserved_bytes=int(found.peak_reserved_bytes),
        device_used_bytes=used,
        low_bytes=int(used * calibration.low_memory_share),
        high_bytes=int(used * calibration.high_memory_share),
        peak_phase=peak.phase,
        peak_label=peak.label,
        rank=int(program.rank),
        fullest=fullest,
        ledger=peak.ledger,
        timeline=tuple(PhaseMemory(name, int(most), int(left)) for name, (most, left) in phase_peaks(device).items()),
        host_bytes=int(found.host_bytes),
        host_capacity_bytes=cluster.host_memory_bytes,
        host_ledger=host.ledger,
        nvme_bytes=min(int(plan.gpus), cluster.gpus_per_node) * int(fold(program.nvme).net_bytes),
        nvme_capacity_bytes=cluster.nvme_bytes,
        nvme_ledger=held_after(program.nvme),
    )


def states_ledger(program: StepProgram) -> tuple[tuple[str, str, int], ...]:
    """What one rank holds between steps: (category, label, bytes)."""
    return tuple((line.category, line.label, line.size_bytes) for line in held_after(program.init))
