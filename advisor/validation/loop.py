"""The training loop of a run that is measured: what was held in each phase of a step, and how long it took.

It needs the extra ``run``; this module imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.plan import Plan
from advisor.validation.engines import Engine, communication_logged
from advisor.validation.measured import STEPS, WARM_UP_STEPS, Measured
from advisor.validation.meter import Meter
from advisor.validation.record import plain, versions
from advisor.validation.trace import Trace


def train(
    meter: Meter,
    engine: Engine,
    ids: torch.Tensor,
    micro_steps: int,
    steps: int = STEPS,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Measured, list[float]]:
    """What *steps* optimizer steps less the warm-up measured, and every micro-step's loss.

    *progress* is told the number of steps done, from 0 on.
    """
    if steps <= WARM_UP_STEPS:
        raise SpecError(f"of {steps} steps none is left after {WARM_UP_STEPS} of warm-up; take {STEPS} or more")
    losses: list[Any] = []
    for done in range(steps):
        progress(done)
        if done == WARM_UP_STEPS:
            meter.forget()
        _optimizer_step(meter, engine, ids, micro_steps, losses)
    measured = meter.measured(ids.numel() * micro_steps)
    if engine.logs_communication:
        with communication_logged() as sent:
            _optimizer_step(meter, engine, ids, micro_steps, losses)
        measured = replace(measured, communication=tuple(sent))
    progress(steps)
    return measured, [float(loss) for loss in losses]


def _optimizer_step(meter: Meter, engine: Engine, ids: torch.Tensor, micro_steps: int, losses: list[Any]) -> None:
    meter.begin_step(ids)
    for index in range(micro_steps):
        last = index == micro_steps - 1
        labels = ids.clone()
        with engine.micro_step(last):
            with meter.phase("forward"):
                loss = engine.forward(ids, labels)
            with meter.phase("backward"):
                engine.backward(loss)
            losses.append(meter.value_of(loss))
            del loss, labels
            if not last:
                engine.update(last)
                continue
            with meter.phase("step"):
                engine.update(last)
            meter.leave_out_host_tensors(getattr(engine.optimizer, "optimizer", engine.optimizer))
    meter.end_step()


def random_tokens(vocabulary: int, job: Job, plan: Plan, rank: int) -> torch.Tensor:
    """A rank's part of a micro-batch of token ids, others on every rank."""
    generator = torch.Generator().manual_seed(rank)
    shape = int(plan.micro_batch), job.sequence_length // plan.sequence_ranks
    return torch.randint(vocabulary, shape, generator=generator)


def record_of(measured: Measured, losses: list[float], engine: Engine, ranks: int) -> dict[str, Any]:
    """What a rank tells of its run, as JSON holds it. *ranks* have answered."""
    return {
        "ranks": ranks,
        "engine": engine.name,
        "optimizer": type(engine.optimizer).__name__,
        "losses": losses,
        "skipped_steps": getattr(engine.wrapper, "skipped_steps", 0),
        "trace": plain(trace_of(measured, engine)),
        "measured": plain(measured),
        "versions": versions(),
    }


def trace_of(measured: Measured, engine: Engine) -> Trace:
    """The same bytes as a trace has them."""
    return Trace(
        parameters=sum(getattr(each, "ds_numel", each.numel()) for each in engine.wrapper.parameters()),
        states_bytes=measured.states_bytes,
        forward_peak_bytes=measured.forward.peak_allocated_bytes,
        after_forward_bytes=measured.forward.end_allocated_bytes,
        backward_peak_bytes=measured.backward.peak_allocated_bytes,
        step_peak_bytes=measured.step.peak_allocated_bytes,
    )
