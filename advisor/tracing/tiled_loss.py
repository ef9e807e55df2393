"""TRL's loss as a GPU runs it, for a trace that has none.

Triton folds a tile into tensors that it is given; around it stands Python that allocates, which is repeated here. Which
tokens are scored depends on the data, so that fake tensors cannot tell how many: all but each sequence's last are.
"""

from __future__ import annotations

import types
from typing import Any

import torch

TILE_TOKENS, TILE_COLUMNS = 4096, 32768


def tile_loss(model: Any) -> None:
    """What ``add_fused_lm_head`` makes of *model*, and SFTTrainer's ``compute_loss`` of what it returns (trl 1.16)."""
    from transformers.modeling_outputs import CausalLMOutput

    def forward(self: Any, labels: torch.Tensor, **inputs: torch.Tensor) -> CausalLMOutput:
        hidden = self.base_model(**inputs).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        scored = labels != -100
        chosen = _Chosen.apply(hidden, scored)  # type: ignore[no-untyped-call]
        matrix = self.get_output_embeddings().weight
        found = _Head.apply(chosen, matrix, labels.reshape(-1).clone())  # type: ignore[no-untyped-call]
        del chosen, hidden
        probabilities, entropies = (_Spread.apply(each, scored) for each in found)  # type: ignore[no-untyped-call]
        entropies.detach().sum()
        return CausalLMOutput(loss=-probabilities.sum() / scored.sum())

    model.forward = types.MethodType(forward, model)


class _Chosen(torch.autograd.Function):
    """``hidden[scored]`` where all are scored."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scored)
        ctx.shape = hidden.shape
        return hidden.new_empty(scored.numel(), hidden.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0].new_zeros(ctx.shape), None


class _Spread(torch.autograd.Function):
    """``found.new_zeros(scored.shape).masked_scatter(scored, found)``."""

    @staticmethod
    def forward(ctx: Any, found: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scored)
        return found.new_zeros(scored.shape).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0].new_empty(gradients[0].numel()), None


class _Head(torch.autograd.Function):
    """``ChunkedLogProbFunction`` without bias, with log-probabilities and entropies."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, matrix: torch.Tensor, targets: torch.Tensor) -> Any:
        autocast = torch.is_autocast_enabled("cpu")
        ctx.set_materialize_grads(False)
        ctx.format = torch.get_autocast_dtype("cpu") if autocast else rows.dtype
        statistics = [torch.zeros(len(rows), dtype=torch.float32) for _ in range(7)]
        buffer = torch.empty(min(len(rows), TILE_TOKENS), TILE_COLUMNS, dtype=ctx.format)
        for start in range(0, len(rows), TILE_TOKENS):
            piece = rows[start : start + TILE_TOKENS].to(ctx.format)
            for column in range(0, len(matrix), TILE_COLUMNS):
                _product(piece, matrix[column : column + TILE_COLUMNS].to(ctx.format), buffer)
        normalisers = statistics[0] + torch.log(statistics[1])
        probabilities = statistics[6] - normalisers
        entropies = normalisers - statistics[2] / statistics[1]
        ctx.save_for_backward(rows, matrix, targets, normalisers, entropies)
        return probabilities, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, matrix, _, _, _ = ctx.saved_tensors
        for_rows = torch.zeros(rows.shape, dtype=torch.float32)
        for_matrix = torch.zeros(matrix.shape, dtype=torch.float32)
        buffer = torch.empty(min(len(rows), TILE_TOKENS), TILE_COLUMNS, dtype=ctx.format)
        for start in range(0, len(rows), TILE_TOKENS):
            piece = rows[start : start + TILE_TOKENS].to(ctx.format)
            for column in range(0, len(matrix), TILE_COLUMNS):
                columns = matrix[column : column + TILE_COLUMNS].to(ctx.format)
                _product(piece, columns, buffer)
                # _addmm_fp32: half operands go into an fp32 sum in place.
                for_rows.view(-1)[:1].add_(columns.view(-1)[:1])
                for_matrix.view(-1)[:1].add_(piece.view(-1)[:1])
        return for_rows.to(rows.dtype), for_matrix.to(matrix.dtype), None


def _product(rows: torch.Tensor, columns: torch.Tensor, buffer: torch.Tensor) -> None:
    """``torch.mm(rows, columns.t(), out=tile)``, in which autocast has no say, as autograd has none here."""
    with torch.autocast("cpu", enabled=False):
        torch.mm(rows, columns.t(), out=buffer[: len(rows), : len(columns)])
