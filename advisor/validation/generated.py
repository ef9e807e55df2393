"""Runs transformers' ``generate`` without a model's numbers and says what one rank held, pass by pass.

The model runs on fake tensors with the operators of a GPU (``trace.py``). What decides by the content of tensors is
decided here instead: no token ends a sequence, nothing is padding, and generating stops at the length asked for.

Needs the extra ``run``; this module imports torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from advisor.specs.inference import Inference
from advisor.tracing.counter import StorageCounter
from advisor.tracing.gpu_operators import gpu_operators, masks_for
from advisor.tracing.real_model import Description, described, failures_explained, quiet, real_model, settings_of
from advisor.validation.sharding import FORMATS, counted


@dataclass(frozen=True, slots=True)
class Generated:
    """Bytes that one rank held while it generated."""

    weights_bytes: int
    """Parameters and buffers."""
    prefill_peak_bytes: int
    decode_peak_bytes: int
    """Highest in the passes over one token."""
    prompt_cache_bytes: int
    """Keys and values after the prompt."""
    cache_bytes: int
    """The same after the last pass."""

    @property
    def peak_bytes(self) -> int:
        return max(self.prefill_peak_bytes, self.decode_peak_bytes)


def trace_generation(config: Mapping[str, Any], inference: Inference) -> Generated:
    """One call of ``generate`` by the model that *config* describes, with weights as *inference* computes.

    Raises ConfigError where transformers refuses.
    """
    description = described(config)
    with (
        quiet(),
        failures_explained(description.family),
        masks_for(padded=False),
        counted() as counter,
        gpu_operators(),
    ):
        return _generated(counter, description, inference)


def _generated(counter: StorageCounter, description: Description, inference: Inference) -> Generated:
    settings = settings_of(description)
    settings.use_cache = True
    model = real_model(settings, description, FORMATS[inference.precision], inference.attention)
    model.eval()
    weights = counter.live_bytes
    passes = _Passes(counter, model)
    ids = torch.zeros(inference.batch, inference.prompt, dtype=torch.long)
    chosen: dict[str, Any] = {}
    if inference.fp8_cache:
        chosen = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    if inference.static_cache:
        chosen = {"cache_implementation": "static", "disable_compile": True}
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        setattr(model.generation_config, name, None)
    with passes.counted(), _ending_at(inference.context + 1), _on_a_gpu(model):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_length=inference.context + 1,
            do_sample=False,
            **chosen,
        )
        passes.end()
    prefill, *decode = passes.peaks
    return Generated(weights, prefill, max(decode), passes.cached[0], passes.cached[-1])


class _Passes:
    """Peaks of the passes of *model*, each up to where the next one begins, and what its cache holds after each."""

    def __init__(self, counter: StorageCounter, model: Any) -> None:
        self.counter, self.model = counter, model
        self.peaks: list[int] = []
        self.cached: list[int] = []
        self.running = False

    @contextmanager
    def counted(self) -> Iterator[None]:
        original = self.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.end()
            self.running = True
            found = original(*args, **kwargs)
            self.cached.append(_bytes_of(found.past_key_values))
            return found

        forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        self.model.forward = forward
        self.counter.start_peak()
        try:
            yield
        finally:
            del self.model.forward

    def end(self) -> None:
        """The pass that is running, if one is, is over."""
        if self.running:
            self.peaks.append(self.counter.peak_bytes)
            self.counter.start_peak()
        self.running = False


def _bytes_of(cache: Any) -> int:
    """Bytes of the storages behind a cache's tensors."""
    layers = getattr(cache, "layers", None) or [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    held = tree_leaves([list(vars(layer).values()) for layer in layers])
    tensors = (each for each in held if isinstance(each, torch.Tensor) and each.dim() == KEY_DIMENSIONS)
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


KEY_DIMENSIONS = 4
"""Of keys and values: sequences, heads, tokens, and elements of a head."""


@contextmanager
def _ending_at(length: int) -> Iterator[None]:
    """Let generating end with sequences of *length* tokens, and every question about a tensor be answered by yes."""
    from transformers.generation import utils

    def stops(check: Any, unfinished: torch.Tensor, tokens: torch.Tensor, so_far: int) -> bool:
        return so_far >= length

    with (
        mock.patch.object(FakeTensor, "__bool__", return_value=True, create=True),
        mock.patch.object(utils.StopCheck, "__call__", stops),
    ):
        yield


@contextmanager
def _on_a_gpu(model: Any) -> Iterator[None]:
    """Let ``generate`` run experts as on a GPU: copies of the chosen matrices for each token after the prompt."""
    original = model._optimize_model_for_decode

    @contextmanager
    def optimized() -> Iterator[None]:
        before = model.get_experts_implementation()
        model.set_experts_implementation(
            {name: "batched_mm" if kind == "grouped_mm" else kind for name, kind in before.items()}
        )
        try:
            with original():
                yield
        finally:
            model.set_experts_implementation(before)

    with mock.patch.object(model, "_optimize_model_for_decode", optimized):
        yield
