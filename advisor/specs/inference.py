"""What a model is asked to generate, and how it is held: sequences, lengths, formats, and GPUs that share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from advisor.errors import SpecError
from advisor.specs.job import FORMAT_BYTES, AttentionKernel, Precision
from advisor.specs.plan import Group, GroupName, Offload

WeightFormat = Literal["fp32", "bf16", "fp16", "fp8", "int8", "nf4", "fp4"]
CacheFormat = Literal["bf16", "fp16", "fp32", "fp8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inference:
    """One call of ``generate``: greedy, without padding, every sequence of one length."""

    batch: int = 1
    """Sequences that one copy of the model works on at once."""
    context: int = 2048
    """Tokens of each sequence in the cache when its last token is computed: prompt and answer."""
    prompt: int = 2047
    """Those of them that come at once."""
    weights: WeightFormat = "bf16"
    double_quant: bool = False
    """Whether the scales of four bits are quantized too."""
    precision: Precision = "bf16"
    """What products compute in."""
    fp8_cache: bool = False
    """Whether keys and values are held in fp8; else in the format that products compute in."""
    static_cache: bool = False
    """Whether memory for the whole context is taken at once (``cache_implementation="static"``, not compiled)."""
    attention: AttentionKernel = "sdpa"

    def __post_init__(self) -> None:
        for name in ("batch", "prompt"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.prompt >= self.context:
            raise SpecError(
                f"a prompt of {self.prompt} tokens and an answer of at least one take a context of "
                f"{self.prompt + 1} or more, got {self.context}"
            )
        if self.weights not in get_args(WeightFormat):
            raise SpecError(f"weights must be one of {', '.join(get_args(WeightFormat))}, got {self.weights!r}")
        if self.attention not in get_args(AttentionKernel):
            raise SpecError(f"attention must be one of {', '.join(get_args(AttentionKernel))}, got {self.attention!r}")
        if self.static_cache and self.fp8_cache:
            raise SpecError("a static cache holds what products compute; leave one of static and fp8 out")
        if self.double_quant and self.weights not in ("nf4", "fp4"):
            raise SpecError(f"double quantization is of scales of nf4 and fp4, got weights in {self.weights}")

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of what matrix products read."""
        return FORMAT_BYTES[self.precision]


@dataclass(frozen=True, kw_only=True, slots=True)
class InferencePlan:
    """How GPUs share the work of generating: copies of the model, each cut over some of them."""

    gpus: int
    tensor_parallel: int = 1
    framework: Literal["transformers"] = "transformers"
    offload: Offload = Offload.NONE

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.tensor_parallel < 1:
            raise SpecError(f"gpus and tensor_parallel must be at least 1, got {self.gpus} and {self.tensor_parallel}")
        if self.gpus % self.tensor_parallel:
            raise SpecError(
                f"copies of the model over {self.tensor_parallel} GPUs each do not divide {self.gpus} GPUs; "
                f"give --tp a divisor of {self.gpus}"
            )

    @property
    def talks(self) -> bool:
        """Whether ranks send each other anything."""
        return self.tensor_parallel > 1

    @property
    def copies(self) -> int:
        """Copies of the model that generate side by side."""
        return self.gpus // self.tensor_parallel

    def group(self, name: GroupName) -> Group:
        """The ranks that talk to each other: those of a copy. Other groups are of one rank."""
        return Group(self.tensor_parallel if name == "tensor" else 1)
