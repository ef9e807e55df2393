"""What only a measurement can tell: device overheads, achieved rates, and how far predictions were off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from advisor.specs.hardware import Gpu
from advisor.specs.inference import InferencePlan
from advisor.specs.plan import Plan

Range = tuple[float, float]
"""From the low to the high share."""


def likeness(plan: Plan | InferencePlan, compute_capability: str) -> str:
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
    grouped_workspace_bytes: Mapping[str, int]
    """The same of all streams on which the products of a rank's experts run side by side."""
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
    """Share of the dense peak that matrix products keep up for as long as training lasts, beside the time in which
    their operands move; by the GPU's name or its compute capability, ``default`` for others."""
    attention_efficiency: Mapping[str, Sequence[float]]
    """The same share for the products inside a fused attention kernel on long sequences, forward and backward; by the
    kernel (``FusedAttention``) and, after a comma, what ``matmul_efficiency`` goes by."""
    attention_extra_columns: float
    """Columns of the scores by which every query's row takes longer than what it sees of it."""
    attention_narrow_share: float
    """What heads of at most 64 dimensions keep of those shares."""
    bandwidth_efficiency: float
    """Share of memory bandwidth at which kernels of norms, activations and updates move their bytes."""
    copy_efficiency: float
    """The same for a large copy: what a kernel reaches at most."""
    operand_bandwidth_efficiency: float
    """The same for operands of a product, beside its computing; above 1, as part of it hides behind that."""
    product_floor_s: float
    """Least time of a matrix product on the GPU."""
    kernel_floor_s: float
    """Least time of any other kernel there."""
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
        return _of_major(self.matmul_workspace_bytes, compute_capability)

    def grouped_bytes(self, compute_capability: str) -> int:
        """cuBLAS workspaces of grouped products there."""
        return _of_major(self.grouped_workspace_bytes, compute_capability)

    def linear_share(self, gpu: Gpu) -> float:
        """Share of the dense peak for matrix products on *gpu*."""
        return next(self.matmul_efficiency[key] for key in _keys(gpu) if key in self.matmul_efficiency)

    def attention_shares(self, kernel: str, gpu: Gpu) -> tuple[float, float]:
        """The same for the fused attention *kernel*, forward and backward."""
        named = (f"{kernel}, {key}" for key in _keys(gpu))
        forward, backward = next(self.attention_efficiency[key] for key in named if key in self.attention_efficiency)
        return forward, backward


def _of_major(sizes: Mapping[str, int], compute_capability: str) -> int:
    return sizes.get(compute_capability.split(".")[0], sizes["default"])


def _keys(gpu: Gpu) -> tuple[str, ...]:
    """What a rate of *gpu* may stand under, the nearest to it first."""
    return gpu.name, gpu.compute_capability, "default"
