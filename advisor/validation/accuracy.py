"""Predicted beside traced: the same model, job and plan, once through the step program and once through torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from advisor.specs.job import Job
from advisor.specs.model import FeedForward, Layer, ModelSpec, Run
from advisor.specs.plan import Plan
from advisor.step.build import build
from advisor.step.program import phase_peaks

if TYPE_CHECKING:
    from advisor.validation.trace import Trace

STEP_PHASES = ("forward", "loss", "backward", "step")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Bytes of one case, as predicted and as traced."""

    states_bytes: tuple[int, int]
    saved_bytes: tuple[int, int]
    """What forward leaves for backward."""
    peak_bytes: tuple[int, int]

    @property
    def peak_error(self) -> float:
        """Predicted over traced peak, less one."""
        return self.peak_bytes[0] / self.peak_bytes[1] - 1

    @property
    def saved_error(self) -> float:
        return self.saved_bytes[0] / self.saved_bytes[1] - 1


def compare(config: Mapping[str, Any], model: ModelSpec, job: Job, plan: Plan) -> Comparison:
    """One case. *model* is what the catalog made of *config*; dropout is left out on both sides. Needs torch."""
    from advisor.validation.trace import trace_step

    eager = any(layer.attention.eager_only for layer in model.layers)
    traced = trace_step(config, model.objective, replace(job, attention="eager") if eager else job, plan)
    return beside(model, job, plan, traced)


def beside(model: ModelSpec, job: Job, plan: Plan, traced: Trace) -> Comparison:
    """The prediction for *model* beside what was *traced*."""
    phases = phase_peaks(build(without_dropout(model), job, plan).device)
    states = int(phases["init"][1])
    return Comparison(
        states_bytes=(states, traced.states_bytes),
        saved_bytes=(int(phases["loss"][1]) - states, traced.after_forward_bytes - traced.states_bytes),
        peak_bytes=(max(int(phases[name][0]) for name in STEP_PHASES), traced.peak_bytes),
    )


def without_dropout(model: ModelSpec) -> ModelSpec:
    """The same model with every dropout off."""
    runs = tuple(Run(tuple(_dry(layer) for layer in run.layers), run.repeats) for run in model.runs)
    return replace(model, embedding_dropout=0.0, runs=runs)


def _dry(layer: Layer) -> Layer:
    block, crossing = layer.feed_forward, layer.cross_attention
    return replace(
        layer,
        dropout=0.0,
        attention=replace(layer.attention, dropout=0.0),
        cross_attention=replace(crossing, dropout=0.0) if crossing else None,
        feed_forward=replace(block, dropout=0.0) if isinstance(block, FeedForward) else block,
    )
