"""How Megatron-LM is run, beside the counts of its groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from advisor.errors import SpecError

PipelineSchedule = Literal["1f1b", "gpipe"]
ContextExchange = Literal["p2p", "a2a"]
TokenDispatcher = Literal["alltoall", "allgather"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronSettings:
    """How Megatron-LM is run, beside the counts of its groups (megatron-core 0.16.1)."""

    distributed_optimizer: bool = True
    """fp32 weights and moments are cut over the data-parallel group."""
    overlaps_gradients: bool = True
    """``--overlap-grad-reduce``: gradients are reduced while the last micro-batch runs backwards."""
    overlaps_weights: bool = True
    """``--overlap-param-gather``: updated weights are gathered while the first micro-batch runs forwards."""
    fuses_gradient_sums: bool = True
    """Products add weight gradients to their sum themselves (``--no-gradient-accumulation-fusion`` switches it off)."""
    mask_in_batch: bool = True
    """Each micro-batch brings an attention mask, which no fused kernel reads
    (``--no-create-attention-mask-in-dataloader`` switches it off)."""
    vocabulary_multiple: int = 128
    """``--make-vocab-size-divisible-by``: rows of the embedding on each tensor-parallel rank are a multiple of it."""
    pipeline_schedule: PipelineSchedule = "1f1b"
    """``1f1b``: a stage goes backwards as soon as it can. ``gpipe``: after all forward passes (arXiv:1811.06965)."""
    first_stage_layers: int = 0
    """``--decoder-first-pipeline-num-layers``: layers of the first pipeline stage; 0 for as many as others have."""
    last_stage_layers: int = 0
    """``--decoder-last-pipeline-num-layers``: the same of the last one."""
    context_exchange: ContextExchange = "p2p"
    """``--cp-comm-type``. ``p2p``: keys and values go round a ring. ``a2a``: ranks exchange pieces of the sequence for
    heads, and each sees whole sequences for its share of them (arXiv:2309.14509)."""
    token_dispatcher: TokenDispatcher = "alltoall"
    """``--moe-token-dispatcher-type``. ``alltoall``: each token goes to the ranks of its experts. ``allgather``: every
    rank gets every token."""
    fuses_permutation: bool = True
    """``--moe-permute-fusion``: one kernel sorts tokens by expert."""
    groups_experts: bool = True
    """``--moe-grouped-gemm``: the experts of a rank run in one kernel, not one after another."""
    balances_experts: bool = True
    """``--moe-router-load-balancing-type aux_loss`` with a coefficient: a second loss that wants experts used alike."""
    deferred_micro_batches: int = 0
    """``--defer-embedding-wgrad-compute`` with a ``--wgrad-deferral-limit``: micro-batches for which the last stage
    computes the gradient of the output matrix only when its pipeline drains."""
    optimizer_instances: int = 1
    """``--num-distributed-optimizer-instances``: groups of data-parallel ranks, over each of which the states are cut
    once."""

    def __post_init__(self) -> None:
        if self.vocabulary_multiple < 1:
            raise SpecError(f"vocabulary_multiple must be at least 1, got {self.vocabulary_multiple}")
        if min(self.first_stage_layers, self.last_stage_layers) < 0:
            raise SpecError(
                f"a stage cannot have a negative number of layers, got {self.first_stage_layers} for the first and "
                f"{self.last_stage_layers} for the last"
            )
        if self.deferred_micro_batches < 0 or (self.deferred_micro_batches and not self.fuses_gradient_sums):
            raise SpecError(
                "deferred_micro_batches must not be negative, and need products that add gradients to their sums; got "
                f"{self.deferred_micro_batches}, fuses_gradient_sums {self.fuses_gradient_sums}"
            )
        if self.optimizer_instances < 1:
            raise SpecError(f"optimizer_instances must be at least 1, got {self.optimizer_instances}")
        if self.optimizer_instances > 1 and not self.distributed_optimizer:
            raise SpecError("optimizer_instances are of the distributed optimizer; set distributed_optimizer")
        if self.overlaps_weights and not self.distributed_optimizer:
            raise SpecError("overlaps_weights gathers what the distributed optimizer cut; set distributed_optimizer")
