"""Lets a trace run transformers' way through flash-attn, which a CPU cannot even import.

torch's own flash operator stands in for flash-attn's: both come from one code, save queries, keys, values, output, an
fp32 log-sum-exp and the state of the random numbers, and lay the output out as the queries are (flash_attn 2.8,
csrc/flash_attn/flash_api.cpp ``mha_fwd``; torch 2.13, ATen/native/transformers/cuda/flash_attn/flash_api.cpp).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from advisor.errors import ConfigError
from advisor.tracing.gpu_operators import flash

FORWARD = "_flash_attention_forward"


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    """Attention of (batch, tokens, heads, head dimension), which windows and soft caps change nothing in."""
    query, key, value = (each.transpose(1, 2) for each in (q, k, v))
    scale = softmax_scale if softmax_scale is not None else q.shape[-1] ** -0.5
    with torch.autocast("cpu", enabled=False):
        return flash(query, key, value, dropout_p, causal, scale).transpose(1, 2)


@contextmanager
def flash_attn_installed() -> Iterator[None]:
    """While active, transformers takes flash-attn to be there, and batches for not packed."""
    from transformers import PreTrainedModel, modeling_flash_attention_utils, modeling_utils

    def imported(*_: Any, **__: Any) -> Any:
        utilities: Any = modeling_flash_attention_utils
        process = utilities._lazy_define_process_function(flash_attn_func)
        return (flash_attn_func, flash_attn_func, None, None, None), (process, dict)

    def dispatches(model: Any, *_: Any, **__: Any) -> bool:
        if not model._supports_flash_attn:
            raise ConfigError(f"{type(model).__name__} has no flash attention; take --attention sdpa or eager")
        code = sys.modules[type(model).__module__]
        if hasattr(code, "is_flash_attn_available") and not hasattr(code, FORWARD):
            # Older modelling code imports it only where flash-attn is installed.
            stack.enter_context(mock.patch.object(code, FORWARD, forward, create=True))
        return True

    def packed(*_: Any) -> bool:
        return False

    forward = getattr(modeling_flash_attention_utils, FORWARD)
    with (
        ExitStack() as stack,
        mock.patch.object(modeling_utils, "lazy_import_flash_attention", imported),
        mock.patch.object(modeling_flash_attention_utils, "lazy_import_flash_attention", imported),
        mock.patch.object(modeling_flash_attention_utils, "_is_packed_sequence", packed),
        mock.patch.object(PreTrainedModel, "_flash_attn_can_dispatch", dispatches),
    ):
        yield
