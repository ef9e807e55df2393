"""What one rank measured while it trained: bytes by phase of a step, and times. Plain values, without torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = 3
WARM_UP_STEPS = 2
"""Steps that are not measured: ZeRO-3 records its trace in the first, and Adam's moments are made in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseMeasured:
    """A phase of the step, its micro-steps together: the highest of all measured steps, the median of their times."""

    peak_allocated_bytes: int
    """Live bytes of tensors on a CPU, ``torch.cuda.max_memory_allocated`` on a GPU."""
    end_allocated_bytes: int
    """Held when the last micro-step's part ends."""
    peak_reserved_bytes: int | None
    """``torch.cuda.max_memory_reserved``; None on a CPU."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Messages:
    """Calls of one collective in one optimizer step, as DeepSpeed logs them."""

    collective: str
    calls: int
    size_bytes: int
    """Of the tensors that the calls were given, all together."""
    seconds: float
    """All together, each waited for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One rank's steps after the warm-up. What only a GPU can tell is None on a CPU."""

    device: str
    """``cpu``, or the GPU's name."""
    states_bytes: int
    """Held between steps, without the batch. A GPU counts cuBLAS workspaces here too."""
    forward: PhaseMeasured
    backward: PhaseMeasured
    step: PhaseMeasured
    """The optimizer's turn after the last micro-step."""
    step_s: Sequence[float]
    """Every measured step, its micro-steps included: between two events of the device on a GPU."""
    tokens_per_step: int
    """Of this rank."""
    host_peak_bytes: int
    """Most resident memory of the process since it began."""
    device_used_bytes: int | None = None
    """Of the whole device, other processes included, at the end of the step where it was most."""
    device_used_before_bytes: int | None = None
    """The same before the model was built: CUDA's context, and other processes'."""
    capacity_bytes: int | None = None
    communication: tuple[Messages, ...] = ()
    """Of a step of its own after the measured ones, where DeepSpeed runs."""
    cache_releases: int | None = None
    """How often torch gave cached memory back because the device was full (``num_alloc_retries``)."""

    @property
    def peak_allocated_bytes(self) -> int:
        return max(phase.peak_allocated_bytes for phase in self.phases)

    @property
    def peak_reserved_bytes(self) -> int | None:
        return max((phase.peak_reserved_bytes for phase in self.phases if phase.peak_reserved_bytes), default=None)

    @property
    def phases(self) -> tuple[PhaseMeasured, PhaseMeasured, PhaseMeasured]:
        return self.forward, self.backward, self.step

    @property
    def median_step_s(self) -> float:
        return statistics.median(self.step_s)

    @property
    def tokens_per_s(self) -> float:
        """Of this rank."""
        return self.tokens_per_step / self.median_step_s
