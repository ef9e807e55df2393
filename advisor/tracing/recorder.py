"""One forward and backward pass of the real model on fake tensors, written down part by part.

What is written down is what ``advisor.step.tape`` writes down for formulas: memory taken and given back, kernels with
their matrix products, and the moment at which each weight's gradient is complete. The passes are cut where the
residual stream enters and leaves a layer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from advisor.errors import ConfigError
from advisor.step.program import Category
from advisor.tracing.counter import Storage, StorageCounter
from advisor.tracing.kernels import kernel_of
from advisor.tracing.passes import EMBEDDING, HEAD, LOSS, Entry, Pass, Taken
from advisor.tracing.real_model import decoder_layers


class Recorder(StorageCounter):  # type: ignore[no-untyped-call]
    """Writes a pass down."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Pass()
        self.recording = False
        self.next_part: str | int | None = None
        """The part that begins with the next operation: what is freed until then belongs to the one before."""
        self.scope = ""
        self.taken: dict[Storage, Taken] = {}
        self.weights: frozenset[tuple[int, ...]] = frozenset()
        self.vocabulary = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.recording and self.next_part is not None:
            self.enter(self.next_part)
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if self.recording:
            kernel = kernel_of(func, args, kwargs or {}, output, self.weights)
            if kernel:
                self.found.add(Entry("work", kernel=kernel))
        return output

    def enter(self, part: str | int, backward: bool = False) -> None:
        self.next_part = None
        self.in_backward = backward
        self.scope = part if isinstance(part, str) else "layer"
        self.found.enter(part, backward)

    def _change(self, held: Storage, more_bytes: int) -> None:
        super()._change(held, more_bytes)
        if more_bytes > 0 and self.recording:
            self.taken[held] = Taken(more_bytes, *self._name(held.shape), self.found.stretches[-1][0])
            self.found.add(Entry("take", taken=self.taken[held]))
        elif more_bytes < 0:
            self._give(held)

    def _give(self, held: Storage) -> None:
        taken = self.taken.pop(held, None)
        if taken and self.recording:
            self.found.add(Entry("give", taken=taken))

    def _name(self, shape: tuple[int, ...]) -> tuple[str, Category]:
        recomputed = self.in_backward and torch.is_grad_enabled()
        if self.in_backward and not recomputed:
            if shape and shape[-1] == self.vocabulary and shape not in self.weights:
                return "logits", "logits"
            return f"backward of {self.scope}", "temporaries"
        if shape in self.weights and torch.is_autocast_enabled("cpu"):
            return "autocast weight copies", "buffers"
        if shape and shape[-1] == self.vocabulary and self.scope in (HEAD, LOSS):
            return "logits", "logits"
        return self.scope, "activations"

    def complete(self, name: str, parameter: torch.Tensor) -> None:
        """The gradient of a weight is there: its memory is the strategy's from here on."""
        gradient = parameter.grad
        assert gradient is not None
        held = self.storages.get(gradient.untyped_storage()._cdata)
        if held and held in self.taken:
            self.taken[held].parameter = name
            self._give(held)
        self.found.add(Entry("gradient", parameter=name, size_bytes=gradient.numel() * gradient.element_size()))
        parameter.grad = None


def record(recorder: Recorder, model: Any, ids: torch.Tensor, autocast: bool) -> Pass:
    """A forward and backward pass of *model* over *ids*, within the modes that make its tensors fake."""
    labels = torch.zeros_like(ids)
    gc.collect()
    gc.disable()
    recorder.found, recorder.taken = Pass(), {}
    try:
        with _noting(recorder, model, decoder_layers(model)):
            recorder.enter(EMBEDDING)
            recorder.recording = True
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=labels).loss
            recorder.enter(HEAD, backward=True)
            loss.backward()
            del loss
            gc.collect()
    finally:
        recorder.recording = recorder.in_backward = False
        gc.enable()
    return recorder.found


@contextmanager
def _noting(recorder: Recorder, model: Any, layers: Any) -> Iterator[None]:
    """Let *recorder* know where each part begins, and when each gradient is complete."""
    with ExitStack() as stack:

        def hook(handle: Any) -> None:
            stack.callback(handle.remove)

        for number, layer in enumerate(layers):
            hook(layer.register_forward_pre_hook(_entering(recorder, number), with_kwargs=True))
            hook(layer.register_forward_hook(_leaving(recorder, number, len(layers))))
            for name, child in layer.named_children():
                hook(child.register_forward_pre_hook(_in_scope(recorder, name)))
                hook(child.register_forward_hook(_in_scope(recorder, "layer")))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                hook(parameter.register_post_accumulate_grad_hook(_completing(recorder, name)))
        original = model.loss_function

        def noted(*arguments: Any, **keywords: Any) -> Any:
            recorder.enter(LOSS)
            return original(*arguments, **keywords)

        model.loss_function = noted
        stack.callback(setattr, model, "loss_function", original)
        yield


def _entering(recorder: Recorder, number: int) -> Any:
    def hook(module: Any, arguments: Any, keywords: Any) -> None:
        recorder.enter(number)
        if number == 0:
            _when_its_gradient_comes((arguments, keywords), lambda: recorder.enter(EMBEDDING, backward=True))

    return hook


def _leaving(recorder: Recorder, number: int, count: int) -> Any:
    def hook(module: Any, arguments: Any, output: Any) -> None:
        recorder.next_part = number + 1 if number + 1 < count else HEAD
        _when_its_gradient_comes(output, lambda: recorder.enter(number, backward=True))

    return hook


def _when_its_gradient_comes(values: Any, act: Callable[[], None]) -> None:
    """Let *act* happen when the gradient of the residual stream comes: the first differentiable tensor of *values*."""
    tensors = (each for each in tree_leaves(values) if isinstance(each, torch.Tensor))
    stream: Any = next((each for each in tensors if each.requires_grad), None)
    if stream is None:
        raise ConfigError("its layers take or return nothing that has a gradient")
    stream.register_hook(lambda gradient: act())


def _in_scope(recorder: Recorder, name: str) -> Any:
    def hook(*_: Any) -> None:
        recorder.scope = name

    return hook


def _completing(recorder: Recorder, name: str) -> Any:
    return lambda parameter: recorder.complete(name, parameter)
