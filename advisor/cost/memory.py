"""Memory readings of a step program: how much for many plans at once, and what and when for one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from advisor.cost.allocator import OutOfMemoryError, Settings
from advisor.cost.pools import ROUND_LARGE_BYTES
from advisor.cost.reserved import replayed
from advisor.cost.results import Memory, PhaseMemory
from advisor.specs.calibration import Calibration, likeness
from advisor.specs.hardware import Cluster
from advisor.specs.inference import InferencePlan
from advisor.specs.plan import Plan
from advisor.step.build import StepProgram
from advisor.step.program import Amount, Line, fold, held_after, hold, peak_of, phase_peaks, then

ALLOCATOR = Settings(expandable_segments=True)
"""As the ``run.sh`` that advisor writes sets it."""
WORKSPACES = "cuBLAS workspaces"


@dataclass(frozen=True, slots=True, eq=False)
class Footprint:
    """Bytes on the program's rank's device and on one machine's host, for every plan of a program.

    Reserved and used are bounds: what they would be if tensors needed no rounding and left no gaps.
    """

    states_bytes: Amount
    peak_allocated_bytes: Amount
    peak_reserved_bytes: Amount
    device_used_bytes: Amount
    host_bytes: Amount


def on_device(program: StepProgram, cluster: Cluster, calibration: Calibration) -> StepProgram:
    """The step as torch's allocator sees it on this GPU: each thread that runs products has a cuBLAS workspace,
    which it takes at its first."""
    workspace = calibration.workspace_bytes(cluster.gpu.compute_capability)
    taken = [hold(WORKSPACES, "workspace", program.product_threads * workspace)]
    if program.groups_products:
        grouped = calibration.grouped_bytes(cluster.gpu.compute_capability)
        taken.append(hold("workspaces of grouped products", "workspace", grouped))
    return replace(
        program,
        init=then(program.init, *taken),
        tensor_sizes={**program.tensor_sizes, WORKSPACES: lambda: program.product_threads * [workspace]},
    )


def footprint(
    program: StepProgram, plan: Plan | InferencePlan, cluster: Cluster, calibration: Calibration
) -> Footprint:
    """Sizes of every plan that *program* stands for. No plan needs less; :func:`memory` says what one does need."""
    states = fold(program.init).net_bytes
    allocated = fold(on_device(program, cluster, calibration).device).peak_bytes
    waiting = _waiting_bytes(allocated - states, plan, calibration)
    reserved = np.ceil((allocated + waiting) / ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
    used = reserved + _outside_bytes(plan, calibration)
    return Footprint(states, allocated, reserved, used, _host_bytes(program, plan, cluster, calibration))


def _waiting_bytes(churn: Amount, plan: Plan | InferencePlan, calibration: Calibration) -> Amount:
    """What blocks weigh that wait for another stream before they are free, of *churn* bytes that come and go."""
    return calibration.waiting_share * np.maximum(churn, 0) * plan.talks


def _outside_bytes(plan: Plan | InferencePlan, calibration: Calibration) -> Amount:
    """Beside torch's allocator: the CUDA context and, with several ranks, the communicator's buffers."""
    return calibration.context_bytes + calibration.communicator_bytes * plan.talks


def short_by(used_bytes: Amount, capacity_bytes: int, margin_share: float) -> Amount:
    """Bytes that a device lacks for *used_bytes* if *margin_share* is to stay free; at most 0 if it has enough."""
    return used_bytes - capacity_bytes * (1 - margin_share)


def _host_bytes(program: StepProgram, plan: Plan | InferencePlan, cluster: Cluster, calibration: Calibration) -> Amount:
    """One machine's: what each of its ranks holds, plus what one of them holds while it loads for all."""
    ranks = np.minimum(plan.gpus, cluster.gpus_per_node)
    each = fold(program.host).peak_bytes + calibration.process_host_bytes
    return ranks * each + fold(program.host_once).peak_bytes


def memory(
    program: StepProgram,
    plan: Plan | InferencePlan,
    cluster: Cluster,
    calibration: Calibration,
    *,
    fullest: bool = True,
    squeezed: bool = False,
    most_bytes: float = math.inf,
) -> Memory:
    """The same for a single plan replayed through the allocator, with the ledger at the peak and the phases to it.

    *fullest* says that the program is that of the rank that holds most; *squeezed* asks whether a device that is too
    small would run it all the same. Raises OutOfMemoryError as soon as it is clear that more than *most_bytes* of the
    device would be used. Left out of the replay, and stated instead: blocks that wait for other streams
    (``Calibration.waiting_share``).
    """
    found = footprint(program, plan, cluster, calibration)
    low, high = calibration.memory_range(likeness(plan, cluster.gpu.compute_capability))
    device = on_device(program, cluster, calibration)
    peak = peak_of(device.device)
    waiting = int(_waiting_bytes(peak.size_bytes - found.states_bytes, plan, calibration))
    outside = int(_outside_bytes(plan, calibration))
    counted = replayed(device, ALLOCATOR, most_bytes=most_bytes - waiting - outside)
    rounding = counted.peak_allocated_bytes - peak.size_bytes
    reserved = -(-(counted.peak_reserved_bytes + waiting) // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
    used = reserved + outside
    host = peak_of(program.host)
    room = cluster.gpu.memory_bytes - outside - waiting
    releases = 0 if counted.peak_reserved_bytes <= room else None
    if squeezed and releases is None and counted.peak_allocated_bytes <= room:
        releases = _cache_releases(device, room)
    return Memory(
        capacity_bytes=cluster.gpu.memory_bytes,
        states_bytes=int(found.states_bytes),
        peak_allocated_bytes=counted.peak_allocated_bytes,
        peak_reserved_bytes=reserved,
        device_used_bytes=used,
        low_bytes=int(used * low),
        high_bytes=int(used * high),
        peak_phase=peak.phase,
        peak_label=peak.label,
        rank=int(program.rank),
        fullest=fullest,
        allocator="expandable segments" if ALLOCATOR.expandable_segments else "fixed segments",
        cache_releases=releases,
        ledger=(*peak.ledger, Line("rounding", "rounding to 512 B", rounding)) if rounding else peak.ledger,
        timeline=tuple(
            PhaseMemory(name, int(most), int(left)) for name, (most, left) in phase_peaks(device.device).items()
        ),
        host_bytes=int(found.host_bytes),
        host_capacity_bytes=cluster.host_memory_bytes,
        host_ledger=host.ledger,
        nvme_bytes=min(int(plan.gpus), cluster.gpus_per_node) * int(fold(program.nvme).net_bytes),
        nvme_capacity_bytes=cluster.nvme_bytes,
        nvme_ledger=held_after(program.nvme),
    )


def _cache_releases(device: StepProgram, room_bytes: int) -> int | None:
    """How often *device* gives cached memory back where torch's allocator has *room_bytes*; None if it cannot run."""
    try:
        return replayed(device, replace(ALLOCATOR, capacity_bytes=room_bytes)).retries
    except OutOfMemoryError:
        return None


def states_ledger(program: StepProgram) -> tuple[tuple[str, str, int], ...]:
    """What one rank holds between steps: (category, label, bytes)."""
    return tuple((line.category, line.label, line.size_bytes) for line in held_after(program.init))
