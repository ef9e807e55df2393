"""What an operation that torch dispatches asks of a GPU: its matrix products and the bytes it moves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from advisor.tracing.passes import Kernel, Shape

CAUSAL_SHARE = 0.5
"""Share of the scores that a fused kernel computes under a causal mask: it skips the blocks above the diagonal."""


def kernel_of(func: Any, args: Any, kwargs: Any, output: Any, weights: Collection[tuple[int, ...]]) -> Kernel | None:
    """The kernel behind a call of *func*; None for views and for memory that is only set aside.

    *weights* are the shapes of parameters: a batched product with one of them is no attention.
    """
    inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    outputs = [each for each in tree_leaves(output) if isinstance(each, torch.Tensor)]
    there = {each.untyped_storage()._cdata for each in inputs}
    made = [each for each in outputs if each.untyped_storage()._cdata not in there]
    name = func._schema.name.partition("::")[2]
    if name.startswith("empty") or not (made or func._schema.is_mutable):
        return None
    touched = {id(each): each.numel() * each.element_size() for each in (*inputs, *outputs)}
    return Kernel(name, _products(name, func, args, kwargs, output, weights), sum(touched.values()))


def _products(
    name: str, func: Any, args: Any, kwargs: Any, output: Any, weights: Collection[tuple[int, ...]]
) -> tuple[Shape, ...]:
    if name.startswith("_scaled_dot_product"):
        return _attention(name, func, args, kwargs)
    if name in _BATCHED:
        left, right = _BATCHED[name](args)
        shapes = (tuple(each.shape) for each in (left, right, output))
        weighted = any(shape in weights or (*shape[:-2], *shape[:-3:-1]) in weights for shape in shapes)
        count, m, k = left.shape
        kind: Literal["linear", "attention"] = "linear" if weighted else "attention"
        return (Shape(m, right.shape[2], k, count, kind, element_bytes=left.element_size()),)
    if name in _PLAIN:
        left, right = _PLAIN[name](args)
        # A grouped product's weights have one matrix per group, and each row meets one of them.
        m, k = left.shape[-2:]
        return (Shape(m, right.shape[-1], k, 1, "linear", element_bytes=left.element_size()),)
    counted = flop_registry.get(func._overloadpacket)
    if counted is None:
        return ()
    return (Shape(counted(*args, **kwargs, out_val=output) // 2, 1, 1, 1, "linear"),)


_PLAIN: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "mm": lambda args: (args[0], args[1]),
    "addmm": lambda args: (args[1], args[2]),
    "_grouped_mm": lambda args: (args[0], args[1]),
}
_BATCHED: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "bmm": lambda args: (args[0], args[1]),
    "baddbmm": lambda args: (args[1], args[2]),
}


def _attention(name: str, func: Any, args: Any, kwargs: Any) -> tuple[Shape, ...]:
    """Scores and output of every head; backward computes the scores again: five products for two."""
    given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
    query, key, value = given["query"], given["key"], given["value"]
    batch, heads, length, width = query.shape
    share = CAUSAL_SHARE if given.get("is_causal") else 1.0
    whole = Shape(
        length,
        key.shape[2],
        key.shape[2],
        batch * heads,
        "attention",
        share,
        query.element_size(),
        "memory-efficient" if "efficient" in name else "sdpa",
        "backward" in name,
    )
    scores, outputs = replace(whole, k=width), replace(whole, n=value.shape[3])
    return (scores, scores, scores, outputs, outputs) if whole.backward else (scores, outputs)
