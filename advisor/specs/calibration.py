"""What only a measurement can tell: device overheads, achieved rates, and how far predictions were off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from advisor.specs.plan import Plan

Range = tuple[float, float]
"""From the low to the high share."""


def likeness(plan: Plan, compute_capability: str) -> str:
    """What residuals of *plan* on a GPU of *compute_capability* are put together with: its framework, where its states
    lie, and the generation of the GPU."""
    offload = ", offload" if plan.offload.optimizer else ""
    return f"{plan.framework}{offload}, {compute_capability}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Constants that a prediction adds to the step program. Each has its source in the file it was read from."""

    name: str
    device: str | None = None
    """The GPU that it was measured on; None where it is for any."""
    based_on: str | None = None
    """The calibration that says what this one does not."""
    matmul_workspace_bytes: Mapping[str, int]
    """cuBLAS workspace of one handle by major compute capability, ``default`` for others; torch counts it."""
    context_bytes: int
    """CUDA context and loaded kernels of one process, outside torch's allocator."""
    communicator_bytes: int
    """NCCL buffers of one communicator, outside torch's allocator."""
    waiting_share: float
    """Reserved memory for blocks that wait until another stream is done with them (``record_stream``), with several
    ranks, as a share of what the step allocates and frees."""
    memory_ranges: Mapping[str, Range]
    """Where the measured device memory may lie, as shares of the predicted, by what was measured (:func:`likeness`);
    ``default`` for plans unlike it."""
    time_ranges: Mapping[str, Range]
    """The same for step times."""
    matmul_efficiency: Mapping[str, float]
    """Share of the dense peak that matrix products reach beside the time in which their operands move, by compute
    capability, ``default`` for others."""
    attention_efficiency: Mapping[str, float]
    """The same share for the products inside a fused attention kernel, which skips masked blocks."""
    bandwidth_efficiency: float
    """Share of memory bandwidth at which kernels move their bytes."""
    kernel_launch_s: float
    """Least time between two kernels in eager mode."""
    overlap_share: float
    """Share of communication that can hide behind compute which does hide, the two slowing each other down."""
    link_bandwidth_bytes_per_s: Mapping[str, float]
    """What links achieve per GPU, by name, where it was measured; else the catalog of links says."""
    cpu_adam_bytes_per_parameter: float
    """Host memory traffic of one Adam update on the CPU."""
    process_host_bytes: int
    """Host memory of one training process beside its tensors."""
    host_memory_bytes_per_gpu: int
    """Host memory that a machine is assumed to have for each of its GPUs where nobody said."""
    host_bandwidth_bytes_per_s_per_gpu: float
    """Streaming bandwidth of a machine's host memory for each of its GPUs."""
    nvme_bytes_per_gpu: int
    """NVMe that a machine is assumed to have for each of its GPUs where nobody said."""
    nvme_bandwidth_bytes_per_s_per_gpu: float
    """What reading or writing the NVMe of a machine reaches for each of its GPUs."""
    source: str

    def memory_range(self, likeness: str) -> Range:
        """Shares of the predicted memory between which the measured one is expected."""
        return self.memory_ranges.get(likeness, self.memory_ranges["default"])

    def time_range(self, likeness: str) -> Range:
        """The same for the step time."""
        return self.time_ranges.get(likeness, self.time_ranges["default"])

    def margin_share(self, likeness: str) -> float:
        """Share of device memory that ``--margin auto`` keeps free: so far may the measured lie above the predicted."""
        return self.memory_range(likeness)[1] - 1

    def workspace_bytes(self, compute_capability: str) -> int:
        """cuBLAS workspace of one handle on a GPU of *compute_capability*, such as ``9.0``."""
        major = compute_capability.split(".")[0]
        return self.matmul_workspace_bytes.get(major, self.matmul_workspace_bytes["default"])

    def linear_share(self, compute_capability: str) -> float:
        """Share of the dense peak for matrix products on a GPU of *compute_capability*, such as ``9.0``."""
        return self.matmul_efficiency.get(compute_capability, self.matmul_efficiency["default"])

    def attention_share(self, compute_capability: str) -> float:
        """The same for fused attention."""
        return self.attention_efficiency.get(compute_capability, self.attention_efficiency["default"])
