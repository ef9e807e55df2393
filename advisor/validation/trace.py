"""Runs two optimizer steps of a real transformers model without its data and says what one rank held.

The model is built under torch's FakeTensorMode, which runs the real modelling code, autograd, DDP, FSDP and
optimizer on tensors that have shapes but no memory; ``sharding.py`` makes this process rank 0 of several. Where a GPU
would run another operator than a CPU, that one runs. What a CPU cannot show is not in the count: kernel scratch, the
allocator's rounding, NCCL, the CUDA context.

Needs the extra ``run``; this module imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from advisor.errors import SpecError
from advisor.launch.train import checkpointing_contexts, chunk_loss
from advisor.specs.job import Job
from advisor.specs.model import Objective
from advisor.specs.plan import Checkpointing, Plan
from advisor.step.program import Category
from advisor.tracing.counter import Storage, StorageCounter
from advisor.tracing.flash_attention import flash_attn_installed
from advisor.tracing.fused_loss import fuse_loss
from advisor.tracing.gpu_operators import gpu_operators, masks_for
from advisor.tracing.real_model import (
    Description,
    described,
    failures_explained,
    quiet,
    real_model,
    recompute_layers,
    settings_of,
)
from advisor.tracing.tiled_loss import tile_loss
from advisor.validation.adapters import fake_conversions, import_before_counting, with_adapters
from advisor.validation.optimizers import leave_out_host_tensors, traced_optimizer
from advisor.validation.sharding import FORMATS, Wrapped, counted, ranks_of, whole_attention, wrap

MOST_MICRO_STEPS = 3
"""A first micro-step, one between and a last: all between hold the same."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Bytes that one rank held in the last of two optimizer steps."""

    parameters: int
    """Elements of the whole model."""
    states_bytes: int
    """Held between steps."""
    forward_peak_bytes: int
    """Highest up to the loss."""
    after_forward_bytes: int
    backward_peak_bytes: int
    step_peak_bytes: int
    loss_peak_bytes: int = 0
    """Highest while the loss is computed; 0 where that was not told apart from forward."""
    ledger: tuple[tuple[Category, int], ...] = ()
    """What is held at the peak of the step; empty where it was not told apart."""

    @property
    def peak_bytes(self) -> int:
        return max(self.forward_peak_bytes, self.loss_peak_bytes, self.backward_peak_bytes, self.step_peak_bytes)


def trace_step(
    config: Mapping[str, Any], objective: Objective, job: Job, plan: Plan, *, dropout: bool = False
) -> Trace:
    """Two optimizer steps of the model that *config* describes, on rank 0 of *plan*'s GPUs."""
    return trace_described(described(config, objective=objective), job, plan, dropout=dropout)


def trace_described(description: Description, job: Job, plan: Plan, *, dropout: bool = False) -> Trace:
    """Two optimizer steps of the model described, on rank 0 of *plan*'s GPUs.

    One GPU alone, DDP, or FSDP, set up as accelerate does; without dropout unless it is asked for. The loss scale of
    fp16 is left out: numbers, no tensors. Raises ConfigError where transformers refuses.
    """
    if job.padded and job.attention == "flash":
        raise SpecError("flash attention leaves padding out, and how much there is only a batch tells: drop --padded")
    import_before_counting(job)
    with (
        quiet(),
        failures_explained(description.family),
        masks_for(padded=job.padded),
        ranks_of(plan) as mesh,
        counted() as counter,
        gpu_operators(),
        flash_attn_installed(),
        whole_attention(plan, "cpu", counter),
    ):
        model = real_model(settings_of(description, dropout), description, FORMATS[job.model_format], job.attention)
        if plan.checkpointing is not Checkpointing.NONE:
            recompute_layers(model, checkpointing_contexts(plan.checkpointing.value))
        take_loss(model, job)
        with fake_conversions():
            adapted = with_adapters(model, job, dropout=dropout)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        wrapped = wrap(adapted, mesh, job, plan)
        optimizer = traced_optimizer(model, job, counter)
        ids = torch.zeros(int(plan.micro_batch), job.sequence_length // plan.sequence_ranks, dtype=torch.long)
        inputs = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if job.padded else {})
        inputs |= {"position_ids": torch.zeros_like(ids)} if plan.sequence_ranks > 1 else {}
        shapes = frozenset(tuple(each.shape) for each in model.parameters())
        run = _Run(counter, model, wrapped, optimizer, inputs, plan, parameters, shapes)
        run.step()
        return run.step()


def take_loss(model: Any, job: Job) -> None:
    """Let *model* compute its loss as *job* says: by the program's own code, or Liger's or TRL's as on a GPU."""
    if job.loss == "chunked":
        chunk_loss(model)
    elif job.loss == "fused":
        fuse_loss(model)
    elif job.loss == "tiled":
        tile_loss(model)


@dataclass(frozen=True)
class _Run:
    """A model set up to train, with what counts its bytes."""

    counter: StorageCounter
    model: Any
    wrapped: Wrapped
    """The model as its strategy runs it."""
    optimizer: Any
    inputs: Mapping[str, torch.Tensor]
    plan: Plan
    parameters: int
    weight_shapes: frozenset[tuple[int, ...]]

    def step(self) -> Trace:
        """One optimizer step."""
        counter = self.counter
        self._name_states()
        counter.forget_log()
        inputs_bytes = sum(each.untyped_storage().nbytes() for each in self.inputs.values())
        states = counter.live_bytes - inputs_bytes
        forward = loss = backward = after_forward = 0
        micro_steps = min(int(self.plan.accumulation_steps), MOST_MICRO_STEPS)
        for last in [False] * (micro_steps - 1) + [True]:
            reduces = last or self.plan.fsdp.syncs_each_micro_batch
            with nullcontext() if reduces else self.wrapped.unsynced():
                phases = self._micro_step()
            forward, loss = max(forward, phases[0]), max(loss, phases[1])
            after_forward, backward = phases[2], max(backward, phases[3])
        with counter.phase():
            self.optimizer.step()
        step = counter.peak_bytes - inputs_bytes
        leave_out_host_tensors(counter, self.optimizer)
        counter.mark(_moments(self.optimizer), "optimizer")
        self.optimizer.zero_grad(set_to_none=True)
        self.wrapped.after_step()
        return Trace(
            parameters=self.parameters,
            states_bytes=states,
            forward_peak_bytes=forward,
            after_forward_bytes=after_forward,
            backward_peak_bytes=backward,
            step_peak_bytes=step,
            loss_peak_bytes=loss,
            ledger=counter.ledger(lambda held: self._by_shape(held, "temporaries")),
        )

    def _micro_step(self) -> tuple[int, int, int, int]:
        """Forward and backward: highest before the loss and in it, held after it, and highest in backward."""
        counter = self.counter
        counter.mark_rest(lambda held: "gradients")
        labels = torch.zeros_like(self.inputs["input_ids"])
        counter.mark([*self.inputs.values(), labels], "activations")
        with counter.phase(), _loss_noted(self.model, counter) as peaks:
            # Labels of a part of a sequence come shifted.
            shifted = {"shift_labels": labels} if self.plan.sequence_ranks > 1 else {}
            loss = self.wrapped.run(**self.inputs, labels=labels, **shifted).loss
        peaks.append(counter.peak_bytes)
        after_forward = counter.live_bytes
        counter.mark_rest(lambda held: self._by_shape(held, "activations"))
        with counter.phase(), _gradients_noted(self.model, counter):
            counter.in_backward = True
            loss.backward()
            counter.in_backward = False
        return peaks[0], peaks[1] if len(peaks) > 1 else 0, after_forward, counter.peak_bytes

    def _by_shape(self, held: Storage, otherwise: Category) -> Category:
        """What a tensor is that nothing else tells of: logits, or of a weight's shape its gradient or its copy."""
        batch, length = self.inputs["input_ids"].shape
        vocabulary = getattr(self.model.config.get_text_config(), "vocab_size", 0)
        if held.shape and held.shape[-1] == vocabulary and held.shape not in self.weight_shapes:
            return "logits"
        if held.shape in self.weight_shapes and held.shape[0] != batch * length:
            return "gradients" if held.is_backward else "buffers"
        return otherwise

    def _name_states(self) -> None:
        counter = self.counter
        counter.mark(self.model.parameters(), "parameters")
        counter.mark(_moments(self.optimizer), "optimizer")
        counter.mark((each.grad for each in self.model.parameters() if each.grad is not None), "gradients")
        counter.mark(self.inputs.values(), "activations")
        counter.mark_rest(lambda held: "buffers")


def _moments(optimizer: Any) -> list[torch.Tensor]:
    return [each for state in optimizer.state.values() for each in state.values() if isinstance(each, torch.Tensor)]


@contextmanager
def _loss_noted(model: Any, counter: StorageCounter) -> Iterator[list[int]]:
    """Note the highest so far when the loss begins, and start a new peak."""
    peaks: list[int] = []
    original = model.loss_function

    def noted(*arguments: Any, **keywords: Any) -> Any:
        peaks.append(counter.peak_bytes)
        with counter.phase():
            return original(*arguments, **keywords)

    model.loss_function = noted
    try:
        yield peaks
    finally:
        model.loss_function = original


@contextmanager
def _gradients_noted(model: Any, counter: StorageCounter) -> Iterator[None]:
    """Say of each gradient what it is, once it is one."""

    def note(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            counter.mark([parameter.grad], "gradients")

    # FSDP1's parameters are views of its flat tensors while these are whole.
    leaves = [each for each in model.parameters() if each.requires_grad and each.is_leaf]
    hooks = [each.register_post_accumulate_grad_hook(note) for each in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
