"""Single operations of the campaign's training steps, in order of worth, as far as their time reaches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from advisor.step.build import build
from advisor.validation.rates import Rate, adamw, attention, copy, host_copies, linear_products, product
from cases.gpu import LARGE, LLAMA, MIDDLE, SMALL, gpu_case

if TYPE_CHECKING:
    import torch

BUDGET_S = 30.0
PRODUCTS = 10
"""Of each model, the largest."""
TOKENS = (2048, 8192)
SQUARES = (8192, 4096)
ATTENTION = (
    (1, 2048, 12, 2, 128),
    (1, 8192, 12, 2, 128),
    (1, 16384, 12, 2, 128),
    (8, 1024, 14, 2, 64),
    (1, 4096, 28, 4, 128),
    (2, 2048, 32, 8, 64),
    (4, 1024, 16, 16, 64),
)
"""Batch, length, heads, key-value heads and head size of the campaign's models."""
COPIES = (2**31, 2**28, 2**24)
HOST_COPY = 2**28
ADAM_PARAMETERS = 500_000_000
SMALLER = 2**9
"""By which sizes are divided on a CPU."""

Measure = Callable[[], tuple[Rate, ...]]


def measured(device: torch.device, small: bool) -> list[Rate]:
    """What could be measured within the time."""
    until, found = time.monotonic() + BUDGET_S, []
    for measure in _measures(device, SMALLER if small else 1):
        if time.monotonic() > until:
            break
        found += measure()
    return found


def _measures(device: torch.device, less: int) -> Iterator[Measure]:
    def cut(size: int) -> int:
        return max(8, size // less)

    for side in SQUARES:
        yield lambda n=side: (product(device, cut(n), cut(n), cut(n)),)
    for size in COPIES:
        yield lambda n=size: (copy(device, cut(n)),)
    for optimizer, number_format in (("adamw-fused", "fp32"), ("adamw-fused", "bf16"), ("adamw-foreach", "fp32")):
        yield lambda o=optimizer, f=number_format: (adamw(device, cut(ADAM_PARAMETERS), o, f),)
    for batch, length, *heads in ATTENTION:
        yield lambda b=batch, n=length, h=heads: attention(device, b, cut(n), *h)
    if device.type == "cuda":
        for pinned in (True, False):
            yield lambda p=pinned: host_copies(device, cut(HOST_COPY), p)
    for m, n, k in dict.fromkeys(chain.from_iterable(_products())):
        yield lambda sizes=(m, n, k): (product(device, *map(cut, sizes)),)


def _products() -> Iterator[tuple[tuple[int, int, int], ...]]:
    """Of one forward and backward pass of every model."""
    for tokens in TOKENS:
        for name in (MIDDLE, LARGE, SMALL, LLAMA):
            words: dict[str, Any] = {"sequence_length": tokens}
            case = gpu_case(name, **words).case
            yield linear_products(build(case.model, case.job, case.plan).step)[:PRODUCTS]
