"""Every choice of how one job is spread over GPUs.

The counts of a plan may be NumPy arrays that broadcast together. Such a plan stands for many, and one pass over its
step program prices them all; :meth:`Plan.at` picks one out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from advisor.errors import SpecError
from advisor.specs.cuts import DEGREES, KeyValueExchange, SequenceCut, check_cuts, some
from advisor.specs.megatron import MegatronSettings

GradientFormat = Literal["fp32", "bf16", "fp16"]

OffloadPlace = Literal["cpu", "nvme"]

Count = int | NDArray[Any]
"""A whole number, or many of them side by side."""


RankGroup = Literal[
    "data", "shard", "replica", "secondary", "machine", "machines", "tensor", "context", "sequence", "pipeline"
]
ExpertGroup = Literal["expert", "expert-tensor", "expert-ranks", "expert-data"]
GroupName = RankGroup | ExpertGroup
"""Which ranks a message goes round.

Data: those that hold the same part of the model and see different tokens. Shard: those of them that FSDP's states are
cut over. Replica: those that hold the same cut. Secondary: those that ZeRO++'s second copy of the weights is cut over.
Machine: those of one machine. Machines: those that stand at one place in each of them. Tensor: those that cut each
layer. Context: those that cut each sequence. Sequence: those that cut it between attentions, and within them heads
(Ulysses). Pipeline: those that have consecutive layers. Expert: those that each have other experts of a layer.
Expert-tensor: those that cut each expert. Expert-ranks: both of these. Expert-data: those that hold the same part of
the same experts.
"""


class Group(NamedTuple):
    """Ranks that talk to each other."""

    size: Count
    stride: Count = 1
    """How far neighbours stand apart in the numbering of all ranks, which goes through machine after machine."""


class Strategy(Enum):
    """Who keeps which share of the model states."""

    DDP = "ddp"
    FSDP = "fsdp"
    FSDP_GRAD_OP = "fsdp-grad-op"
    HSDP = "hsdp"
    ZERO0 = "zero0"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"
    ZERO3_PLUS = "zero3++"
    """Stage 3 with the parts of ZeRO++ that its settings switch on."""
    MEGATRON = "megatron"

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's stage; None where DeepSpeed does not run."""
        return {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3++": 3}.get(self.value)

    @property
    def is_fsdp(self) -> bool:
        return self in (Strategy.FSDP, Strategy.FSDP_GRAD_OP, Strategy.HSDP)

    @property
    def title(self) -> str:
        return {
            "ddp": "DDP",
            "fsdp": "FSDP full shard",
            "fsdp-grad-op": "FSDP grad-op",
            "hsdp": "HSDP",
            "zero0": "DeepSpeed stage 0",
            "zero1": "ZeRO-1",
            "zero2": "ZeRO-2",
            "zero3": "ZeRO-3",
            "zero3++": "ZeRO++",
            "megatron": "Megatron",
        }[self.value]


OWN_STRATEGIES = tuple(each for each in Strategy if each is not Strategy.MEGATRON)
"""Those of advisor's own trainer."""


class Offload(Enum):
    """What lives in host memory between its uses."""

    NONE = "none"
    OPTIMIZER = "optimizer"
    OPTIMIZER_AND_PARAMETERS = "optimizer+params"

    @property
    def optimizer(self) -> bool:
        return self is not Offload.NONE

    @property
    def parameters(self) -> bool:
        return self is Offload.OPTIMIZER_AND_PARAMETERS


class Checkpointing(Enum):
    """Which activations are recomputed in backward."""

    NONE = "none"
    SELECTIVE = "selective"
    """All of a layer but what its matrix products and its fused attention kernel returned. Of Megatron's layers, the
    attention between the products alone."""
    FULL = "full"


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroSettings:
    """DeepSpeed's ``zero_optimization`` sizes, in elements. Defaults: deepspeed 0.19.8, runtime/zero/config.py."""

    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    overlap_communication: bool = False
    gradient_format: GradientFormat | None = None
    """``data_types.grad_accum_dtype``: what gradients are summed in; None for the format the model computes in."""
    hpz_partition: int = 1
    """``zero_hpz_partition_size``: ranks that ZeRO++ cuts a second copy of the weights over; 1 for no such copy."""
    quantized_weights: bool = False
    """``zero_quantized_weights``: ZeRO++ gathers weights as int8."""
    quantized_gradients: bool = False
    """``zero_quantized_gradients``: ZeRO++ reduces gradients as int4, inside machines first and then between them."""
    machine_gpus: int = 1
    """GPUs that DeepSpeed counts in a machine (``device_count``), which quantised gradients alone depend on."""

    def __post_init__(self) -> None:
        for name in ("reduce_bucket", "max_live_parameters", "sub_group"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} must be at least 1 element, got {getattr(self, name)}")
        for name in ("hpz_partition", "machine_gpus"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} must be at least 1 rank, got {getattr(self, name)}")

    @property
    def is_plus(self) -> bool:
        """Whether any part of ZeRO++ is on."""
        return self.hpz_partition > 1 or self.quantized_weights or self.quantized_gradients

    @property
    def parts_title(self) -> str:
        """Such as `` hpZ 8, qwZ``: the parts of ZeRO++ that are on, by the paper's names."""
        parts = [f"hpZ {self.hpz_partition}"] if self.hpz_partition > 1 else []
        parts += ["qwZ"] * self.quantized_weights + ["qgZ"] * self.quantized_gradients
        return " " + ", ".join(parts) if parts else ""


def zero_settings(
    strategy: Strategy, reduce_bucket: int | None = None, gradient_format: GradientFormat | None = None
) -> ZeroSettings:
    """DeepSpeed's defaults; it overlaps communication from stage 3 on (zero/config.py ``overlap_comm_valid``)."""
    settings = ZeroSettings(overlap_communication=strategy.zero_stage == 3, gradient_format=gradient_format)
    return settings if reduce_bucket is None else replace(settings, reduce_bucket=reduce_bucket)


@dataclass(frozen=True, kw_only=True, slots=True)
class FsdpSettings:
    """How PyTorch's fully sharded data parallelism is run."""

    version: int = 2
    """2: ``fully_shard``, each tensor cut by rows. 1: ``FullyShardedDataParallel``, a module's tensors cut as one."""
    syncs_each_micro_batch: bool = False
    """accelerate's ``sync_each_batch``: every micro-batch reduces its gradients, instead of the last one alone.

    Without it, whole gradients stay on every rank until the last micro-batch.
    """

    shard_ranks: int | None = None
    """Of HSDP: how many ranks the states are cut over, usually those of a machine; groups of so many hold the same.
    None: all."""
    context_exchange: KeyValueExchange = "allgather"
    """accelerate's ``cp_comm_strategy``, of context-parallel ranks."""

    def __post_init__(self) -> None:
        if self.version not in (1, 2):
            raise SpecError(f"FSDP has versions 1 and 2, got {self.version}")


ADAM_BUFFERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadSettings:
    """How DeepSpeed holds what it offloads, buffers in elements.

    Defaults: deepspeed 0.19.8, runtime/zero/offload_config.py and runtime/swap_tensor/constants.py.
    """

    pins: bool = True
    """``pin_memory``: host buffers cannot be paged out, and a GPU copies from them while it computes."""
    nvme_path: str = "/local_nvme"
    """Folder on the NVMe; DeepSpeed has no default."""
    parameter_buffers: int = 5
    parameter_buffer: int = 100_000_000
    """``buffer_size``: a rank's share of any one tensor has to fit in."""
    max_in_host: int = 1_000_000_000
    """``max_in_cpu``: weights that stay in host memory all the same."""
    optimizer_buffers: int = 4
    block_bytes: int = 2**20
    """``aio.block_size``; what is smaller than this, or than 1 MiB, does not go to the NVMe."""
    threads: int = 1
    """``aio.intra_op_parallelism``: each takes 1 KiB at least, to which sizes are rounded."""

    def __post_init__(self) -> None:
        for name in ("parameter_buffers", "parameter_buffer", "block_bytes", "threads"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How one training step is split over GPUs. Counts only; no cost."""

    strategy: Strategy
    gpus: Count
    micro_batch: Count
    accumulation_steps: Count = 1
    checkpointing: Checkpointing = Checkpointing.NONE
    offload: Offload = Offload.NONE
    offload_to: OffloadPlace = "cpu"
    """Where what is offloaded lives."""
    offload_settings: OffloadSettings = OffloadSettings()
    zero: ZeroSettings = ZeroSettings()
    fsdp: FsdpSettings = FsdpSettings()
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    """What tensor-parallel ranks would hold alike between their products is cut along the sequence; nothing to do with
    one such rank."""
    pipeline_parallel: Count = 1
    virtual_stages: Count = 1
    """Runs of layers that each pipeline stage has, apart from each other (interleaving)."""
    context_parallel: int = 1
    """Ranks that cut each sequence, within attention too: keys and values go from one to the other."""
    ulysses_parallel: int = 1
    """DeepSpeed's ``sequence_parallel_size``: ranks that cut each sequence, and within attention its heads
    (arXiv:2309.14509)."""
    expert_parallel: int = 1
    """Ranks that a layer's experts are spread over; nothing to do with a model that has none."""
    expert_tensor_parallel: int = 1
    """Ranks that each expert is cut over, in the place of ``tensor_parallel``."""
    megatron: MegatronSettings = field(default_factory=MegatronSettings)

    def __post_init__(self) -> None:
        for name in (*_COUNTS, *DEGREES):
            if some(getattr(self, name) < 1):
                raise SpecError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.strategy is Strategy.HSDP:
            self._check_shards()
        self._check_zero_plus()
        check_cuts(self)
        if self.offload.optimizer and not self.strategy.zero_stage:
            raise SpecError(
                f"{self.strategy.title} keeps its optimizer on the GPU; offload needs zero1, zero2 or zero3"
            )
        if self.offload.parameters and self.strategy is not Strategy.ZERO3:
            raise SpecError(f"{self.strategy.title} keeps whole weights on each GPU; offloading them needs zero3")
        if self.swaps and self.strategy is not Strategy.ZERO3:
            raise SpecError(f"{self.strategy.title} offloads to host memory alone; NVMe needs zero3")
        if self.swaps and self.offload_settings.optimizer_buffers < ADAM_BUFFERS:
            raise SpecError(
                f"Adam swaps {ADAM_BUFFERS} tensors at once (weights, gradients, two moments), got "
                f"{self.offload_settings.optimizer_buffers} buffers; set offload_optimizer.buffer_count higher"
            )

    def _check_shards(self) -> None:
        shard = self.shard_ranks
        if np.any(np.asarray(shard) < 1) or np.any(np.asarray(self.gpus) % shard):
            raise SpecError(f"{self.gpus} GPUs do not divide into groups of {shard} to cut states over")
        if self.fsdp.version == 1:
            raise SpecError("HSDP is modelled for FSDP version 2")

    def _check_zero_plus(self) -> None:
        zero, plus = self.zero, self.strategy is Strategy.ZERO3_PLUS
        if zero.is_plus and not plus:
            raise SpecError(
                "hpz_partition, quantized_weights and quantized_gradients are parts of ZeRO++, got them with "
                f"{self.strategy.title}; take zero3++"
            )
        for name, ranks in (("hpz_partition", zero.hpz_partition), ("machine_gpus", zero.machine_gpus)):
            if plus and np.any(np.asarray(self.gpus) % ranks):
                raise SpecError(f"{self.gpus} GPUs do not divide into groups of {name} {ranks}")
        if plus and self.offload.optimizer:
            raise SpecError("ZeRO++ is modelled without offload; take zero3 to offload")

    @property
    def shard_ranks(self) -> Count:
        """Ranks that FSDP cuts each tensor over."""
        return self.gpus if self.fsdp.shard_ranks is None else self.fsdp.shard_ranks

    @property
    def expert_ranks(self) -> int:
        """Ranks that the experts of a layer are cut over."""
        return self.expert_parallel * self.expert_tensor_parallel

    @property
    def model_ranks(self) -> Count:
        """Ranks that the model is cut over."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def sequence_ranks(self) -> int:
        """Ranks that each sequence is cut over."""
        return self.context_parallel * self.ulysses_parallel

    @property
    def sequence_cut(self) -> SequenceCut:
        """How these share it."""
        if self.context_parallel > 1:
            return SequenceCut(self.context_parallel, self.fsdp.context_exchange)
        return SequenceCut(self.ulysses_parallel)

    @property
    def data_parallel(self) -> Count:
        """Copies of the model that see different sequences."""
        return self.gpus // (self.model_ranks * self.sequence_ranks)

    @property
    def cuts_sequence(self) -> bool:
        """Whether sequence parallelism has anything to cut for."""
        return self.sequence_parallel and self.tensor_parallel > 1

    @property
    def swaps(self) -> bool:
        """Whether it reads from and writes to the NVMe."""
        return self.offload.optimizer and self.offload_to == "nvme"

    @property
    def framework(self) -> Literal["ddp", "fsdp", "deepspeed", "megatron"]:
        """Whose code runs the strategy."""
        if self.strategy is Strategy.MEGATRON:
            return "megatron"
        if self.strategy.zero_stage is not None:
            return "deepspeed"
        return "fsdp" if self.strategy.is_fsdp else "ddp"

    @property
    def framework_title(self) -> str:
        """The same as people write it."""
        return {"deepspeed": "DeepSpeed", "megatron": "Megatron"}.get(self.framework, self.framework.upper())

    @property
    def talks(self) -> bool | NDArray[Any]:
        """Whether ranks send each other anything."""
        several: bool | NDArray[Any] = np.asarray(self.gpus) > 1
        return several

    @property
    def global_batch(self) -> Count:
        """Sequences per optimizer step over all GPUs."""
        return self.data_parallel * self.micro_batch * self.accumulation_steps

    def group(self, name: GroupName) -> Group:
        """The ranks of each group called *name*.

        Megatron numbers tensor-parallel ranks first, then context, data and pipeline (megatron-core 0.16.1,
        parallel_state.py ``initialize_model_parallel``), accelerate 1.15 and DeepSpeed those of a sequence. Gradients
        are summed over data and sequence ranks together. Of the ranks of a pipeline stage, each expert's are numbered
        first, then those of other experts, then others of the same.
        """
        tensor, context, sliced = self.tensor_parallel, self.context_parallel, self.expert_tensor_parallel
        groups = {
            "shard": Group(self.shard_ranks),
            "replica": Group(self.gpus // self.shard_ranks, self.shard_ranks),
            "secondary": Group(self.zero.hpz_partition),
            "machine": Group(self.zero.machine_gpus),
            "machines": Group(self.gpus // self.zero.machine_gpus, self.zero.machine_gpus),
            "tensor": Group(tensor),
            "context": Group(context, tensor),
            "sequence": Group(self.ulysses_parallel),
            "pipeline": Group(self.pipeline_parallel, self.gpus // self.pipeline_parallel),
            "data": Group(self.data_parallel * self.sequence_ranks, tensor),
            "expert": Group(self.expert_parallel, sliced),
            "expert-tensor": Group(sliced),
            "expert-ranks": Group(self.expert_ranks),
            "expert-data": Group(self.gpus // (self.expert_ranks * self.pipeline_parallel), self.expert_ranks),
        }
        return groups[name]

    @property
    def title(self) -> str:
        """The strategy as people call it, with what it offloads."""
        extra = {
            Offload.NONE: "",
            Offload.OPTIMIZER: " + optimizer offload",
            Offload.OPTIMIZER_AND_PARAMETERS: " + optimizer and parameter offload",
        }[self.offload]
        extra += " to NVMe" if self.swaps else ""
        name = self.strategy.title.replace("FSDP", "FSDP1") if self.fsdp.version == 1 else self.strategy.title
        if self.strategy is Strategy.ZERO3_PLUS:
            return f"{name}{self.zero.parts_title}"
        alone = self.strategy is Strategy.DDP and bool(np.all(np.asarray(self.gpus) == 1))
        return f"{'one GPU' if alone else name}{self.cuts_title}{extra}"

    @property
    def cuts_title(self) -> str:
        """What the title says of cuts, such as `` tp 8 + sp, pp 4 x 2``: what is cut over more than one rank."""
        cuts = [f"tp {self.tensor_parallel}{' + sp' * self.sequence_parallel}"] if self.tensor_parallel > 1 else []
        if some(self.pipeline_parallel > 1):
            interleaved = f" x {self.virtual_stages}" if some(self.virtual_stages > 1) else ""
            cuts.append(f"pp {self.pipeline_parallel}{interleaved}")
        cuts += [f"cp {self.context_parallel}"] if self.context_parallel > 1 else []
        cuts += [f"Ulysses {self.ulysses_parallel}"] if self.ulysses_parallel > 1 else []
        cuts += [f"ep {self.expert_parallel}"] if self.expert_parallel > 1 else []
        cuts += [f"etp {self.expert_tensor_parallel}"] if self.expert_tensor_parallel > 1 else []
        return " " + ", ".join(cuts) if cuts else ""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of its counts together; empty of a single plan."""
        return np.broadcast_shapes(*(np.shape(getattr(self, name)) for name in _COUNTS))

    def at(self, index: int) -> Plan:
        """The plan at *index* of a plan whose counts are arrays."""
        shape = self.shape

        def one(value: Count) -> int:
            return int(np.broadcast_to(value, shape).reshape(-1)[index if shape else 0])

        chosen: dict[str, Any] = {name: one(getattr(self, name)) for name in _COUNTS}
        return replace(self, **chosen)


_COUNTS = ("gpus", "micro_batch", "accumulation_steps", "pipeline_parallel", "virtual_stages")
"""Those that may be arrays."""
