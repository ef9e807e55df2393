"""One plan predicted and traced: the same words, once through the step program and once through the real code."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from advisor.catalog.models import FoundConfiguration
from advisor.cost.estimate import PlanWords, plan_of
from advisor.errors import ConfigError, SpecError
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan, Strategy
from advisor.specs.question import Question
from advisor.step.build import build
from advisor.step.program import Category, Node, fold, peak_of, phase_peaks, then
from advisor.step.schemes import scheme_of
from advisor.tracing.real_model import described, needs_torch
from advisor.tracing.source import undescribed
from advisor.validation.accuracy import counted_node, without_dropout
from advisor.validation.room import refuse_too_large

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from advisor.validation.trace import Trace

Phase = Literal["between steps", "forward", "loss", "end of forward", "backward", "step", "peak"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""Live bytes of one rank, in the order in which a step passes them: held between steps, the highest up to the loss and
in it, held when backward begins, the highest in backward and in the optimizer's step, and the highest of all."""

How = Literal["fake tensors", "real tensors"]


@dataclass(frozen=True, slots=True)
class Reading:
    """Bytes by phase, and by category at the peak. What is not known is absent."""

    phases: Mapping[Phase, int]
    ledger: Mapping[Category, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedPlan:
    """A plan as predicted and as its code ran."""

    question: Question
    plan: Plan
    rank: int
    how: How
    parameters: int
    predicted: Reading
    traced: Reading
    seconds: float
    """Time that tracing took."""
    warnings: tuple[str, ...] = ()

    def error(self, phase: Phase) -> float | None:
        """Predicted over traced, less one; None where one of them is not known."""
        predicted, traced = self.predicted.phases.get(phase), self.traced.phases.get(phase)
        return predicted / traced - 1 if predicted and traced else None


def trace(model: str, *, strategy: str | None = None, rank: int = 0, **words: Unpack[PlanWords]) -> TracedPlan:
    """Two optimizer steps of one plan on one rank, the others not there, beside the prediction.

    Words: those of :func:`advisor.estimate`. Needs the extra ``run``, but no GPU. Raises ConfigError where the model
    cannot be built or does not fit this machine, SpecError for a rank that the plan does not have.
    """
    needs_torch("advisor trace")
    trusted = words.get("trust_remote_code", False)

    def describe(found: FoundConfiguration, job: Job) -> ModelSpec:
        try:
            return found.model
        except ConfigError:
            return undescribed(found, trusted)

    question, plan = plan_of(model, strategy=strategy, describe=describe, **words)
    if plan.strategy is Strategy.MEGATRON:
        raise SpecError("Megatron-LM's own code is not traced; leave --trainer out and give --strategy")
    if not 0 <= rank < int(plan.gpus):
        raise SpecError(f"--rank must be 0 to {int(plan.gpus) - 1} with {plan.gpus} GPUs, got {rank}")
    job = replace(question.job, attention="eager") if question.model.eager_only else question.job
    predicted = _predicted(question.model, job, plan, rank)
    started = time.perf_counter()
    if plan.strategy.zero_stage is not None:
        how: How = "real tensors"
        _refuse_too_large(question, plan, predicted)
        traced = _trace_deepspeed(question, job, plan, rank)
    else:
        how = "fake tensors"
        if rank:
            raise SpecError(f"ranks of {plan.strategy.title} hold the same but for a row of a shard; leave --rank out")
        traced = _trace_here(question, job, plan, trusted)
    return TracedPlan(
        question=question,
        plan=plan,
        rank=rank,
        how=how,
        parameters=traced.parameters,
        predicted=predicted if traced.loss_peak_bytes else _with_loss_in_forward(predicted),
        traced=_reading(traced),
        seconds=time.perf_counter() - started,
        warnings=(*question.warnings, *_notes(question, plan, traced)),
    )


def _predicted(model: ModelSpec, job: Job, plan: Plan, rank: int) -> Reading:
    """What the step program says of *rank*, without dropout; without formulas, only what is there between steps."""
    if not model.described_layers:
        states: Node = then(*scheme_of(model, job, plan, rank).states())
        return Reading({"between steps": int(fold(states).net_bytes)}, {})
    program = build(without_dropout(model), job, plan, rank)
    device = counted_node(program, job, plan)
    phases = {name: (int(most), int(left)) for name, (most, left) in phase_peaks(device).items()}
    peak = peak_of(device)
    ledger: Counter[Category] = Counter()
    for line in peak.ledger:
        ledger[line.category] += line.size_bytes
    return Reading(
        {
            "between steps": phases["init"][1],
            "forward": phases["forward"][0],
            "loss": phases["loss"][0],
            "end of forward": phases["loss"][1],
            "backward": phases["backward"][0],
            "step": phases["step"][0],
            "peak": max(most for name, (most, _) in phases.items() if name != "init"),
        },
        dict(ledger),
    )


def _with_loss_in_forward(reading: Reading) -> Reading:
    """The same where nobody told the loss apart."""
    phases: dict[Phase, int] = {phase: size for phase, size in reading.phases.items() if phase != "loss"}
    if "loss" in reading.phases:
        phases["forward"] = max(reading.phases["forward"], reading.phases["loss"])
    return Reading(phases, reading.ledger)


def _reading(traced: Trace) -> Reading:
    phases: dict[Phase, int] = {
        "between steps": traced.states_bytes,
        "forward": traced.forward_peak_bytes,
        "loss": traced.loss_peak_bytes,
        "end of forward": traced.after_forward_bytes,
        "backward": traced.backward_peak_bytes,
        "step": traced.step_peak_bytes,
        "peak": traced.peak_bytes,
    }
    if not traced.loss_peak_bytes:
        del phases["loss"]
    return Reading(phases, dict(traced.ledger))


def _notes(question: Question, plan: Plan, traced: Trace) -> list[str]:
    notes = []
    if not question.model.described_layers:
        notes.append(f"no formula is known for family {question.model.family}: only its states are predicted")
    if plan.offload.optimizer:
        notes.append("device and host are one memory here: both are counted, but for pinned memory's rounding")
    if not traced.loss_peak_bytes:
        notes.append("the loss is counted with forward")
    return notes


def _trace_here(question: Question, job: Job, plan: Plan, trust_remote_code: bool) -> Trace:
    from advisor.validation.trace import trace_described

    objective = question.model.objective
    asked = described(question.config, question.weights_from, trust_remote_code, objective)
    return trace_described(asked, job, plan)


def _trace_deepspeed(question: Question, job: Job, plan: Plan, rank: int) -> Trace:
    from advisor.validation.emulate import trace_ranks

    (found,) = trace_ranks([(question.config, job, plan, rank)])
    return found


def _refuse_too_large(question: Question, plan: Plan, predicted: Reading) -> None:
    """DeepSpeed takes no fake tensors: the whole model is built in this machine's memory, then one rank's states."""
    weights = question.model.parameter_count * question.job.parameter_bytes
    states, peak = predicted.phases["between steps"], predicted.phases.get("peak", 0)
    step = max(peak - states, 0)
    refuse_too_large(
        f"{plan.strategy.title} is traced on real tensors, and {question.model.name} is too large for that here",
        {"weights while they are built": weights, "states of the rank": states, "its step": step},
        "take a smaller model, or --strategy ddp or fsdp, which need none",
    )
