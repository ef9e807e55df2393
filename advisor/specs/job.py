"""What is to be trained and how, whatever the GPUs: sequence, batch, number formats, optimizer, kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from advisor.errors import SpecError

Precision = Literal["bf16", "fp16", "fp32"]
ParameterFormat = Literal["fp32", "bf16"]
Optimizer = Literal[
    "adamw-fused",
    "adamw-foreach",
    "adamw-loop",
    "adamw-8bit",
    "adamw-paged",
    "adamw-8bit-paged",
    "adafactor",
    "sgd",
    "sgd-momentum",
    "lion",
    "lion-8bit",
    "muon",
    "galore",
]
"""What each stands for is in ``profiles/optimizers.csv``."""
AttentionKernel = Literal["sdpa", "flash", "eager"]
LossKernel = Literal["full", "chunked", "fused", "tiled"]
Trainer = Literal["advisor", "hf", "trl", "open-r1", "llama-factory", "axolotl", "torchtitan", "megatron"]
Method = Literal["full", "lora", "dora", "qlora"]

PAGED = frozenset({"adamw-paged", "adamw-8bit-paged"})
"""Optimizers whose moments the driver moves to the host where the GPU has no room for them."""

ALL_LINEAR = "all-linear"
"""Among the targets of adapters: every linear layer but the output matrix."""

FORMAT_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes per element of each number format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One training job. ``global_batch`` counts sequences per optimizer step over all GPUs."""

    sequence_length: int = 2048
    global_batch: int = 64
    precision: Precision = "bf16"
    parameter_format: ParameterFormat = "fp32"
    """What the trained weights are held in before sharding: fp32 weights or masters, or pure bf16."""
    optimizer: Optimizer = "adamw-fused"
    galore_rank: int = 128
    """Rank that gradients are projected to; the default is transformers'."""
    attention: AttentionKernel = "sdpa"
    loss: LossKernel = "full"
    compile: bool = False
    """Whether ``torch.compile`` fuses what kernels other than products and attention do."""
    padded: bool = False
    """Whether sequences of a batch differ in length and are padded to one, so that attention needs a mask."""
    trainer: Trainer = "advisor"
    """Whose program trains; ``advisor`` is launch/train.py."""
    method: Method = "full"
    """``full`` trains every weight, ``lora`` low-rank adapters beside frozen ones (Hu et al., arXiv:2106.09685),
    ``dora`` these and the length of each column of the sum (Liu et al., arXiv:2402.09353), and ``qlora`` adapters
    beside linear layers held in four bits (Dettmers et al., arXiv:2305.14314)."""
    lora_rank: int = 8
    """This default and the next are peft's."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get adapters, or ``all-linear``; empty for those that peft picks by family."""
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("sequence_length", self.sequence_length), ("global_batch", self.global_batch)):
            if value < 1:
                raise SpecError(f"{name} must be at least 1, got {value}")
        _one_of("precision", self.precision, get_args(Precision))
        _one_of("parameter format", self.parameter_format, get_args(ParameterFormat))
        _one_of("optimizer", self.optimizer, get_args(Optimizer))
        _one_of("attention", self.attention, get_args(AttentionKernel))
        _one_of("loss", self.loss, get_args(LossKernel))
        _one_of("trainer", self.trainer, get_args(Trainer))
        _one_of("method", self.method, get_args(Method))
        if self.galore_rank < 1:
            raise SpecError(f"the rank of GaLore's projections must be at least 1, got {self.galore_rank}")
        if self.lora_rank < 1:
            raise SpecError(f"the rank of adapters must be at least 1, got {self.lora_rank}")
        if not 0 <= self.lora_dropout < 1:
            raise SpecError(f"the dropout of adapters must be from 0 to below 1, got {self.lora_dropout}")
        if self.method != "full" and self.compile:
            raise SpecError(f"what torch.compile fuses of {self.method} is not modelled; leave out --compile")
        if self.method == "dora" and self.lora_dropout:
            raise SpecError("dora computes each product twice under dropout, which is not modelled; leave it out")
        if self.method == "qlora" and (self.parameter_format != "fp32" or self.precision == "fp32"):
            raise SpecError(
                "qlora keeps adapters, norms and embeddings in fp32 and computes in half precision; got weights in "
                f"{self.parameter_format} and precision {self.precision}"
            )
        if self.parameter_format == "bf16" and self.precision != "bf16":
            raise SpecError(
                f"weights held in bf16 need precision bf16, got {self.precision}; "
                "keep fp32 weights (--param-dtype fp32) or train in bf16"
            )

    @property
    def pages_moments(self) -> bool:
        """Whether moments may lie on the host."""
        return self.optimizer in PAGED

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of what matrix products read."""
        return FORMAT_BYTES[self.precision]

    @property
    def parameter_bytes(self) -> int:
        """Bytes per element of the trained weights as they are built, before a framework converts them."""
        return FORMAT_BYTES[self.parameter_format]

    @property
    def model_format(self) -> str:
        """What the model is held in: frozen weights have the format that products read.

        Beside weights in four bits it is fp32 (peft 0.21.2, utils/other.py ``prepare_model_for_kbit_training``).
        """
        return self.precision if self.method in ("lora", "dora") else self.parameter_format

    @property
    def model_bytes(self) -> int:
        """Bytes per element of the model as it is built."""
        return FORMAT_BYTES[self.model_format]


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"{what} must be one of {', '.join(allowed)}, got {value!r}")
