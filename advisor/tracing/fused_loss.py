"""Liger's fused loss as a GPU runs it, for a trace that has none.

The Triton kernel itself writes into tensors that it is given. Around it stands Python that allocates, and which asks
in several places whether its tensors are on a CUDA device; those branches are repeated here.
"""

from __future__ import annotations

import types
from typing import Any

import torch

IGNORED = -100


def fuse_loss(model: Any) -> None:
    """What ``_apply_liger_kernel_to_instance`` makes of *model* (Liger-Kernel 0.8.5), the fused loss alone.

    transformers/model/llama.py ``lce_forward`` and loss_utils.py ``LigerForCausalLMLoss``.
    """
    from transformers.modeling_outputs import CausalLMOutput

    def forward(self: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> CausalLMOutput:
        hidden = self.base_model(**inputs).last_hidden_state
        labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)
        following = labels[..., 1:].contiguous()
        rows = hidden.view(-1, hidden.shape[-1])
        loss = FusedLoss.apply(rows, self.get_output_embeddings().weight, following.view(-1))  # type: ignore[no-untyped-call]
        return CausalLMOutput(loss=loss)

    model.forward = types.MethodType(forward, model)


class FusedLoss(torch.autograd.Function):
    """``LigerFusedLinearCrossEntropyFunction`` of ops/fused_linear_cross_entropy.py, without bias and class weights."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, matrix: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        tokens, width = rows.shape
        pieces = -(-matrix.shape[0] // width)
        most = min(1 << (-(-tokens // pieces) - 1).bit_length(), tokens)
        for_rows, for_matrix = torch.zeros_like(rows), torch.zeros_like(matrix)
        losses = torch.zeros(tokens, dtype=torch.float32)
        counted = labels != IGNORED
        counted.sum()
        autocast = torch.is_autocast_enabled("cpu")
        # _can_use_mm_out: products write where they are told, which autocast does only for its own format.
        in_place = rows.dtype == matrix.dtype and (not autocast or rows.dtype == torch.get_autocast_dtype("cpu"))
        storage = rows.new_empty(most, matrix.shape[0]) if in_place else None
        for start in range(0, tokens, most):
            piece = rows[start : start + most]
            if storage is not None:
                logits = storage[: len(piece)]
                torch.mm(piece, matrix.t(), out=logits)
                torch.mm(logits, matrix, out=for_rows[start : start + most])
            else:
                logits = piece @ matrix.t()
                for_rows[start : start + most] = logits @ matrix
            # addmm(out=) in the matrix's format; half operands go into an fp32 sum.
            piece = piece if piece.dtype == logits.dtype else piece.to(logits.dtype)
            for_matrix.view(-1)[:1].add_(piece.view(-1)[:1])
            del logits, piece
        del storage
        loss = losses.sum()
        ctx.save_for_backward(for_rows.detach(), for_matrix.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for_rows, for_matrix = ctx.saved_tensors
        return for_rows, for_matrix, None
