"""What of a plan is given before a search, which then looks for the rest."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypedDict

from advisor.errors import SpecError
from advisor.specs.plan import Checkpointing


class LayoutWords(TypedDict, total=False):
    """What of Megatron's plans a search may be kept to; absent or None leaves it free."""

    tp: int | None
    sequence_parallel: bool | None
    pp: int | None
    vpp: int | None
    """Virtual stages of each pipeline stage."""
    cp: int | None
    ep: int | None
    micro_batch: int | None
    checkpointing: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenLayout:
    """How a model is to be spread over GPUs, as far as somebody said; None where the search is free."""

    tensor_parallel: int | None = None
    sequence_parallel: bool | None = None
    pipeline_parallel: int | None = None
    virtual_stages: int | None = None
    context_parallel: int | None = None
    expert_parallel: int | None = None
    micro_batch: int | None = None
    checkpointing: Checkpointing | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) is int and value < 1:
                raise SpecError(f"{FLAGS[each.name]} must be at least 1, got {value}")
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise SpecError("--sequence-parallel cuts what tensor-parallel GPUs hold alike, and --tp is 1; drop one")
        if (self.virtual_stages or 1) > 1 and self.pipeline_parallel == 1:
            raise SpecError(f"--vpp {self.virtual_stages} needs stages of a pipeline, and --pp is 1; drop one")


FLAGS = {
    "tensor_parallel": "--tp",
    "sequence_parallel": "--sequence-parallel",
    "pipeline_parallel": "--pp",
    "virtual_stages": "--vpp",
    "context_parallel": "--cp",
    "expert_parallel": "--ep",
    "micro_batch": "--micro-batch",
    "checkpointing": "--checkpointing",
}
"""By which flag each is given."""
