"""peft's adapters on a real model, on fake tensors too. Needs the extra ``run``; this module imports torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch

from advisor.errors import SpecError
from advisor.launch.train import add_adapters
from advisor.specs.job import Job


def with_adapters(model: Any, job: Job, *, dropout: bool = False, widens: bool = True) -> Any:
    """What peft makes of *model* where adapters are trained, else *model*; by the training program's own code.

    *widens* as in :func:`~advisor.launch.train.add_adapters`.
    """
    if job.method == "full":
        return model
    if job.method == "qlora" and not getattr(model, "is_loaded_in_4bit", False):
        raise SpecError("weights in four bits are not traced: bitsandbytes makes them on real tensors alone")
    probability = job.lora_dropout if dropout else 0.0
    with quiet_about_checkpointing():
        return add_adapters(
            model,
            job.lora_rank,
            job.lora_targets,
            dropout=probability,
            in_fp32=job.parameter_format == "fp32",
            widens=widens,
            lengths=job.method == "dora",
        )


def import_before_counting(job: Job) -> None:
    """Import what adapts a model for *job*: it makes tensors of its own once, such as bitsandbytes' table of codes."""
    if job.method != "full":
        import_module("peft")
    if job.method == "qlora":
        import_module("bitsandbytes.functional").quantize_blockwise(torch.zeros(1))


@contextmanager
def quiet_about_checkpointing() -> Iterator[None]:
    """peft 0.21 asks transformers 5.23 for a property by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


@contextmanager
def fake_conversions() -> Iterator[None]:
    """Let modules be converted on fake tensors."""
    with mock.patch.object(torch.nn.Module, "_apply", _replace_parameters):
        yield


def _replace_parameters(self: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """``Module.to``, which else swaps fake tensors with their new values and fails where anybody refers to them."""
    for child in self.children() if recurse else ():
        _replace_parameters(child, fn)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                self._parameters[name] = torch.nn.Parameter(fn(parameter), parameter.requires_grad)
    return self


def trained(model: Any) -> list[torch.nn.Parameter]:
    """The parameters of *model* that an optimizer is given."""
    return [each for each in model.parameters() if each.requires_grad]
