"""Weights in four bits on a real model, made of random ones. Needs the extra ``run`` and bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch

from advisor.specs.model import SCALES_SCALED


def in_four_bits(model: Any, compute: torch.dtype, *, packed: bool) -> Any:
    """*model* with its linear layers, but for the output matrix, as transformers 5.23 loads them (nested NF4).

    *packed* into elements of the format that products read, which frameworks can cut; else into bytes.
    """
    layers: Any = import_module("bitsandbytes.nn")
    storage = compute if packed else torch.uint8
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or module is model.get_output_embeddings():
            continue
        held = layers.Linear4bit(
            module.in_features,
            module.out_features,
            module.bias is not None,
            compute,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=storage,
            device="meta",
        )
        held.weight = layers.Params4bit(
            module.weight.data,
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=storage,
            module=held,
        ).to(module.weight.device)
        held.bias = module.bias
        held.train(module.training)
        model.set_submodule(name, held)
    model.is_loaded_in_4bit = True
    return model


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """A GPU's product of many tokens: the weight in the compute format first (bitsandbytes, backends/cuda/ops.py).

    peft asks whether a GPU's autocast is on, which here is the CPU's.
    """
    import_module("bitsandbytes")  # registers the operators
    operators: Any = torch.ops.bitsandbytes
    of_device = torch.is_autocast_enabled
    with (
        mock.patch.object(operators.gemm_4bit, "default", _dequantized_product),
        mock.patch.object(torch, "is_autocast_enabled", lambda device="cpu": of_device(device)),
    ):
        yield


def _dequantized_product(
    x: torch.Tensor,
    packed: torch.Tensor,
    shape: Any,
    scales: torch.Tensor,
    block: int,
    kind: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    operators: Any = torch.ops.bitsandbytes
    if absmax_8bit is not None and absmax_offset is not None:
        nested = (absmax_8bit, scales, absmax_code, SCALES_SCALED, torch.float32)
        scales = operators.dequantize_blockwise.default(*nested)
        scales += absmax_offset
    weight = operators.dequantize_4bit.default(packed, scales, block, kind, shape, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)
