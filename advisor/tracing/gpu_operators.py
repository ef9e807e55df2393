"""Lets a trace on a CPU run the operators that a GPU would run in their place.

Which operator a GPU runs is decided here by torch's own rules; the operator itself is then torch's, with its
registered shapes and derivatives, so that outputs, what is saved and what backward allocates are torch's. Only a
kernel's scratch within one call stays unseen. Four things differ between the devices:

* attention: ``scaled_dot_product_attention`` becomes the flash, memory-efficient or mathematical operator
  (torch 2.13, ATen/native/transformers/attention.cpp and cuda/sdp_utils.cpp ``select_sdp_backend``). cuDNN's kernel,
  which Hopper and newer prefer, keeps tensors of the same sizes as flash;
* autocast: CUDA computes norms, powers, sums and softmaxes in fp32 (ATen/autocast_mode.h), a CPU does not;
* dropout, which keeps one byte per element;
* grouped products of experts, which a CPU knows in bf16 only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

FLASH_ALIGNMENT = 8
"""Head dimensions that flash takes are multiples of this; others are padded."""
FLASH_LARGEST_HEAD = 256
BIAS_ALIGNMENT = 8
"""Elements that each stride of an additive mask must divide by for the memory-efficient kernel."""
HALF_FORMATS = (torch.float16, torch.bfloat16)
UNSEEN = float("-inf")

IN_FP32 = (
    (torch.nn.functional, "layer_norm"),
    (torch.nn.functional, "cross_entropy"),
    (torch, "pow"),
    (torch.Tensor, "pow"),
    (torch.Tensor, "__pow__"),
    (torch, "rsqrt"),
    (torch.Tensor, "rsqrt"),
)
"""Floating inputs become fp32 (ATen/autocast_mode.h, ``AT_FORALL_FP32``): those of its operators that models call."""
RESULT_IN_FP32 = (
    (torch, "sum"),
    (torch.Tensor, "sum"),
    (torch, "softmax"),
    (torch.Tensor, "softmax"),
    (torch.nn.functional, "softmax"),
)
"""Computed in fp32 unless the caller names a format (``AT_FORALL_FP32_SET_OPT_DTYPE``)."""

Operator = Callable[..., Any]


@contextmanager
def gpu_operators() -> Iterator[None]:
    """While active, operators that differ between a CPU and a GPU run as on a GPU."""
    changes: list[tuple[Any, str, Operator]] = [
        (torch.nn.functional, "scaled_dot_product_attention", _autocast_attention),
        (torch.nn.functional, "dropout", dropout),
        (torch, "_grouped_mm", _grouped_product(torch._grouped_mm)),
        *((owner, name, _in_fp32(getattr(owner, name))) for owner, name in IN_FP32),
        *((owner, name, _result_in_fp32(getattr(owner, name))) for owner, name in RESULT_IN_FP32),
    ]
    with ExitStack() as stack:
        for owner, name, operator in changes:
            stack.enter_context(mock.patch.object(owner, name, operator))
        yield


@contextmanager
def masks_for(*, padded: bool) -> Iterator[None]:
    """While active, transformers takes a mask to hide something where *padded*, and batches for not packed.

    It looks into its tensors to find out, which fake tensors do not let it.
    """
    from transformers import masking_utils

    ignores = masking_utils._ignore_bidirectional_mask_sdpa

    def hides_nothing(mask: torch.Tensor) -> bool:
        return not padded

    def not_packed(positions: torch.Tensor) -> None:
        return None

    def ignore(mask: torch.Tensor | None, *args: Any, **kwargs: Any) -> bool:
        return False if mask is not None and padded else bool(ignores(None, *args, **kwargs))

    # Plain functions: a mock would keep the tensors that it is called with.
    with (
        mock.patch.object(masking_utils, "find_packed_sequence_indices", not_packed),
        mock.patch.object(masking_utils, "fast_all", hides_nothing),
        mock.patch.object(masking_utils, "_ignore_bidirectional_mask_sdpa", ignore),
    ):
        yield


def _in_fp32(operator: Operator) -> Operator:
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = _cast_all(args, kwargs, torch.float32)
        return operator(*args, **kwargs)

    return run


def _result_in_fp32(operator: Operator) -> Operator:
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu") and x.dtype in HALF_FORMATS and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        return operator(x, *args, **kwargs)

    return run


def _autocast_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        args, kwargs = _cast_all(args, kwargs, torch.get_autocast_dtype("cpu"))
    with torch.autocast("cpu", enabled=False):
        return scaled_dot_product_attention(*args, **kwargs)


# torch's context parallelism puts its own in the place of a function by its name.
_autocast_attention.__name__ = "scaled_dot_product_attention"


def _grouped_product(operator: Operator) -> Operator:
    def run(rows: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor, **kwargs: Any) -> Any:
        if rows.dtype is torch.bfloat16:
            return operator(rows, weights, offs=offs, **kwargs)
        return GroupedProduct.apply(rows, weights, offs)  # type: ignore[no-untyped-call]

    return run


def _cast_all(args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """*args* and *kwargs* with their floating tensors in *dtype*."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(cast(each) for each in args), {name: cast(each) for name, each in kwargs.items()}


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention of (batch, heads, tokens, head dimension) by the kernel that CUDA would choose on an Ampere or newer.

    Flash needs a half format, no mask, and one head dimension of at most 256; the memory-efficient kernel equal
    numbers of heads and aligned head dimensions; what neither takes is computed as a scores matrix in fp32.
    """
    heads = query.shape[1]
    same_heads = key.shape[1] == value.shape[1] == heads
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    scale = scale if scale is not None else head_dim**-0.5
    half = query.dtype in HALF_FORMATS
    if half and attn_mask is None and head_dim == value_dim <= FLASH_LARGEST_HEAD and (same_heads or enable_gqa):
        return flash(query, key, value, dropout_p, is_causal, scale)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.where(attn_mask, torch.zeros((), dtype=query.dtype), UNSEEN)
    if same_heads and not any(each % (8 if half else 4) for each in (head_dim, value_dim)):
        return _memory_efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
    return _scores_matrix(query, key, value, attn_mask, dropout_p, is_causal, scale)


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, causal: bool, scale: float
) -> torch.Tensor:
    """The operator of (batch, heads, tokens, head dimension); it lays its output out as its queries are."""
    head_dim = query.shape[-1]
    query, key, value = (_padded(each, FLASH_ALIGNMENT) for each in (query, key, value))
    output: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout, causal, False, scale=scale
    )[0]
    return output if output.shape[-1] == head_dim else output[..., :head_dim]


def _memory_efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """The kernel's mask is padded until rows are aligned, then spread over batch and heads without a copy."""
    if bias is not None:
        if any(stride % BIAS_ALIGNMENT for stride in bias.stride()[:-1]):
            length = bias.shape[-1]
            bias = _padded(bias, BIAS_ALIGNMENT)[..., :length]
        bias = bias.expand(*query.shape[:3], key.shape[2])
    saves = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    output: torch.Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, saves, dropout, causal, scale=scale
    )[0]
    return output


def _scores_matrix(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """``_scaled_dot_product_attention_math``, which fake tensors would not let add the mask in place."""
    original, root = query.dtype, scale**0.5
    query, key, value = (each.float() for each in (query, key, value))
    query = query * root
    if causal:
        allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        bias = torch.where(allowed, torch.zeros((), dtype=query.dtype), UNSEEN)
    if key.shape[1] not in (1, query.shape[1]):
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    scores = torch.matmul(query, key.transpose(-2, -1) * root)
    if bias is not None:
        scores.add_(bias)
    probabilities = torch.ops.aten._safe_softmax(scores, -1)
    del scores
    if dropout:
        probabilities = torch.native_dropout(probabilities, dropout, True)[0]
    returned = probabilities.to(original)
    output = torch.matmul(probabilities, value).to(original)
    del returned
    return output


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA's fused dropout, which keeps a boolean mask; a CPU keeps one in the input's format."""
    return torch.native_dropout(input, p, True)[0] if training and p else input


def _padded(tensor: torch.Tensor, alignment: int) -> torch.Tensor:
    missing = -tensor.shape[-1] % alignment
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


class GroupedProduct(torch.autograd.Function):
    """A product per expert over its own rows; keeps its input and the weights, as torch's own does."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weights, offsets)
        return rows.new_empty(rows.shape[0], weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weights, _ = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(weights), None
