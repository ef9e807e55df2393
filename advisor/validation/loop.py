"""The training loop of a run that is counted: the real model, its engine, and what was held in each phase of a step.

It needs the extra ``run``; this module imports torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from advisor.launch.train import checkpointing_contexts
from advisor.specs.job import Job
from advisor.specs.plan import Checkpointing, Plan
from advisor.tracing.counter import StorageCounter
from advisor.tracing.real_model import described, real_model, recompute_layers, settings_of
from advisor.validation.sharding import FORMATS
from advisor.validation.trace import Trace, adamw, leave_out_step_counters, take_loss

STEPS = 3
"""ZeRO-3 records its trace in the first step, and Adam's moments are made in it."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One framework's way through a step."""

    wrapper: Any
    """What the framework made of the model."""
    optimizer: Any
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """Token ids and labels to the loss."""
    backward: Callable[[torch.Tensor], None]
    update: Callable[[bool], None]
    """The optimizer's turn after each micro-step; True after the last."""
    micro_step: Callable[[bool], AbstractContextManager[Any]]
    """What a micro-step runs in; True for the last."""

    @property
    def name(self) -> str:
        """Its class; ``fully_shard`` mixes FSDPModule into the model's own."""
        ancestors = [each.__name__ for each in type(self.wrapper).__mro__]
        return "FSDPModule" if "FSDPModule" in ancestors else ancestors[0]


def built_model(config: Mapping[str, Any], job: Job, plan: Plan) -> Any:
    """The causal model with random weights, in the format in which its framework expects them."""
    description = described(config)
    # DeepSpeed keeps fp32 masters beside weights in the format that it computes in.
    built_in = job.precision if plan.strategy.zero_stage is not None else job.parameter_format
    # A CPU runs no flash-attn; its own fused kernel saves what that one saves.
    attention = "sdpa" if job.attention == "flash" else job.attention
    model = real_model(settings_of(description), description, FORMATS[built_in], attention)
    if plan.checkpointing is not Checkpointing.NONE:
        recompute_layers(model, checkpointing_contexts(plan.checkpointing.value))
    take_loss(model, job)
    return model


def optimizer_of(model: Any, job: Job) -> Any:
    return torch.optim.AdamW(model.parameters(), **adamw(job))


def by_deepspeed(model: Any, job: Job, settings: Mapping[str, Any]) -> Engine:
    """``deepspeed.initialize`` with the JSON that a user gets."""
    import deepspeed

    use_collectives_of_torch()
    deepspeed.init_distributed(dist_backend="gloo")
    # Of an optimizer on the host DeepSpeed makes its own, as its JSON says.
    optimizer = None if "optimizer" in settings else optimizer_of(model, job)
    weights = model.parameters()
    engine = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=weights, config=dict(settings))[0]
    del optimizer, weights
    return Engine(
        engine,
        engine.optimizer,
        forward=lambda ids, labels: engine(input_ids=ids, labels=labels).loss,
        backward=engine.backward,
        update=lambda last: engine.step(),
        micro_step=lambda last: contextlib.nullcontext(),
    )


def use_collectives_of_torch() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives, which takes minutes and can wait on a dead lock."""
    backend: Any = import_module("deepspeed.comm.torch")  # as an attribute of deepspeed.comm, that name is torch itself
    backend.build_shm_op = lambda: None


def train(counter: StorageCounter, engine: Engine, ids: torch.Tensor, micro_steps: int) -> tuple[Trace, list[float]]:
    """The last of three optimizer steps, and every micro-step's loss."""
    losses: list[float] = []
    for _ in range(STEPS):
        trace = _optimizer_step(counter, engine, ids, micro_steps, losses)
    return trace, losses


def _optimizer_step(
    counter: StorageCounter, engine: Engine, ids: torch.Tensor, micro_steps: int, losses: list[float]
) -> Trace:
    states = counter.live_bytes - ids.untyped_storage().nbytes()
    forward_peak = backward_peak = step_peak = after_forward = 0
    for index in range(micro_steps):
        last = index == micro_steps - 1
        labels = ids.clone()
        with engine.micro_step(last):
            with counter.phase():
                loss = engine.forward(ids, labels)
            forward_peak, after_forward = max(forward_peak, counter.peak_bytes), counter.live_bytes
            with counter.phase():
                counter.in_backward = True
                engine.backward(loss)
                counter.in_backward = False
            backward_peak = max(backward_peak, counter.peak_bytes)
            losses.append(loss.item())
            del loss, labels
            with counter.phase():
                engine.update(last)
            if last:
                step_peak = counter.peak_bytes
                leave_out_step_counters(counter, getattr(engine.optimizer, "optimizer", engine.optimizer))
    parameters = sum(getattr(each, "ds_numel", each.numel()) for each in engine.wrapper.parameters())
    return Trace(parameters, states, forward_peak, after_forward, backward_peak, step_peak)
