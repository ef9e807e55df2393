"""Predicted beside true: the same model, job and plan through the step program and through the frameworks' own code.

A :class:`Case` is what is compared, a :class:`Comparison` its bytes by counter, a :class:`Score` what many of them
amount to. An accuracy always names its truth, its counter, mean, maximum, number of cases, and the worst of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from advisor.catalog.adapters import as_trained
from advisor.catalog.calibrations import find_calibration
from advisor.catalog.gpus import find_gpu
from advisor.catalog.huggingface import model_from_config
from advisor.catalog.request import usual_cluster
from advisor.cost.memory import memory
from advisor.cost.schedule import step_time
from advisor.specs.job import Job, Optimizer
from advisor.specs.model import AnyLayer, FeedForward, Layer, ModelSpec, Run
from advisor.specs.plan import Plan
from advisor.step.build import StepProgram, build
from advisor.step.program import Node, fold, hold, phase, phase_peaks, then, without

if TYPE_CHECKING:
    from advisor.validation.measured import Measured
    from advisor.validation.trace import Trace

Counter = Literal[
    "between steps",
    "end of forward",
    "saved for backward",
    "peak in forward",
    "peak in backward",
    "peak in step",
    "peak",
    "peak reserved",
    "device used",
]
COUNTERS: tuple[Counter, ...] = get_args(Counter)
"""Live bytes of one rank. The loss belongs to forward; what is saved for backward is the end of forward less what is
held between steps. The last two only a GPU has: what torch's allocator reserves, and what the driver says is in use."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One comparison to make."""

    name: str
    config: Mapping[str, Any]
    """The ``config.json`` that transformers builds the model from."""
    job: Job
    plan: Plan
    rank: int | None = None
    """Whose bytes they are; None for the rank that holds most."""

    @property
    def model(self) -> ModelSpec:
        """What the catalog makes of the configuration, as it is trained."""
        return as_trained(model_from_config(self.config, self.name, "the case's configuration"), self.job)

    @property
    def title(self) -> str:
        job, plan = self.job, self.plan
        weights = f"autocast to {job.precision}" if job.parameter_bytes > job.compute_bytes else job.precision
        version = ""
        if plan.strategy.is_fsdp:
            synced = ", synced" if plan.fsdp.syncs_each_micro_batch else ""
            version = f", version {plan.fsdp.version}{synced}"
        bucket = f", bucket {plan.zero.reduce_bucket:.3g}" if plan.strategy.zero_stage else ""
        kernels = f", {job.attention}" if job.attention != "sdpa" else ""
        kernels += ", padded" if job.padded else ""
        kernels += f", {job.loss} loss" if job.loss != "full" else ""
        kernels += f", {job.optimizer}" if job.optimizer not in get_args(Optimizer)[:3] else ""
        targets = "+".join(job.lora_targets) or "usual targets"
        kernels += f", {job.method} of rank {job.lora_rank} on {targets}" if job.method != "full" else ""
        return (
            f"{self.name}, {plan.strategy.value} x {plan.gpus}{plan.cuts_title}, {weights}, "
            f"checkpointing {plan.checkpointing.value}, {plan.micro_batch} x {job.sequence_length}, "
            f"accumulation {plan.accumulation_steps}{version}{bucket}"
            f"{kernels}"
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Bytes of one case by counter, as predicted and as they were."""

    predicted: Mapping[Counter, int]
    true: Mapping[Counter, int]

    def error(self, counter: Counter = "peak") -> float:
        """Predicted over true, less one."""
        return self.predicted[counter] / self.true[counter] - 1

    def difference_bytes(self, counter: Counter) -> int:
        return self.predicted[counter] - self.true[counter]


@dataclass(frozen=True, slots=True)
class Score:
    """How far the predictions of one counter are from one truth."""

    truth: str
    counter: Counter
    count: int
    mean_error: float
    """Mean of the errors' magnitudes."""
    max_error: float
    max_difference_bytes: int
    worst: str
    """Title of the case whose error is largest."""


def score(truth: str, found: Sequence[tuple[Case, Comparison]]) -> tuple[Score, ...]:
    """One score for each counter that all of the comparisons *found* with *truth* have."""
    known = [counter for counter in COUNTERS if all(counter in comparison.true for _, comparison in found)]
    return tuple(_scored(truth, counter, found) for counter in known)


def _scored(truth: str, counter: Counter, found: Sequence[tuple[Case, Comparison]]) -> Score:
    errors = [abs(comparison.error(counter)) for _, comparison in found]
    worst = max(range(len(found)), key=errors.__getitem__)
    return Score(
        truth=truth,
        counter=counter,
        count=len(found),
        mean_error=statistics.mean(errors),
        max_error=errors[worst],
        max_difference_bytes=max(abs(comparison.difference_bytes(counter)) for _, comparison in found),
        worst=found[worst][0].title,
    )


def summary(scores: Iterable[Score]) -> list[str]:
    """Lines of text, one a truth: how many cases, what is held between steps, and the highest peak."""
    found: dict[str, dict[Counter, Score]] = {}
    for each in scores:
        found.setdefault(each.truth, {})[each.counter] = each
    width = max(map(len, found), default=0)
    lines = [f"{'':{width}}    n  between steps         peak: mean      max"]
    for truth, by_counter in found.items():
        states, peak = by_counter["between steps"], by_counter["peak"]
        lines.append(
            f"{truth:{width}}  {peak.count:3}  off by at most {states.max_difference_bytes:3,} B"
            f"  {100 * peak.mean_error:6.3f} %  {100 * peak.max_error:6.3f} %"
        )
    return lines


def table(scores: Iterable[Score]) -> list[str]:
    """Lines of text, one a score under a line for its truth; the worst case is named for the highest peak."""
    lines: list[str] = []
    truth = ""
    for each in scores:
        if each.truth != truth:
            truth = each.truth
            lines.append(f"{truth}: n {each.count}")
        lines.append(
            f"  {each.counter:18}  mean {100 * each.mean_error:6.3f} %  max {100 * each.max_error:6.3f} %  "
            f"at most {each.max_difference_bytes:,} B"
        )
        if each.counter == "peak":
            lines.append(f"  worst peak: {each.worst}")
    return lines


def compare(case: Case, *, dropout: bool = False) -> Comparison:
    """One case, traced in this process, on both sides with or without *dropout*. Needs torch and transformers."""
    from advisor.validation.trace import trace_step

    model = case.model
    job = replace(case.job, attention="eager") if model.eager_only else case.job
    traced = trace_step(case.config, model.objective, job, case.plan, dropout=dropout)
    return Comparison(predicted(model, case.job, case.plan, dropout=dropout), counted(traced))


def beside(model: ModelSpec, job: Job, plan: Plan, traced: Trace, rank: int | None = None) -> Comparison:
    """The prediction for *rank* of *model*, or the rank that holds most, beside what was *traced*."""
    return Comparison(predicted(model, job, plan, rank), counted(traced))


def predicted(
    model: ModelSpec, job: Job, plan: Plan, rank: int | None = None, *, dropout: bool = False
) -> Mapping[Counter, int]:
    """Bytes of every counter for *rank*, or the one that holds most, without what only a GPU allocates."""
    program = build(model if dropout else without_dropout(model), job, plan, rank)
    phases = phase_peaks(counted_node(program, job, plan))
    peaks = {name: int(most) for name, (most, _) in phases.items()}
    return _counters(
        states=int(phases["init"][1]),
        after_forward=int(phases["loss"][1]),
        forward=max(peaks["forward"], peaks["loss"]),
        backward=peaks["backward"],
        step=peaks["step"],
    )


def predicted_on(gpu: str, model: ModelSpec, job: Job, plan: Plan, rank: int | None = None) -> Mapping[Counter, int]:
    """Bytes of every counter on a GPU of that name, as its allocator and its driver count them."""
    cluster = usual_cluster(find_gpu(gpu), int(plan.gpus))
    held = memory(build(without_dropout(model), job, plan, rank), plan, cluster, find_calibration())
    phases = {each.phase: each for each in held.timeline}
    counters = _counters(
        states=phases["init"].end_bytes,
        after_forward=phases["loss"].end_bytes,
        forward=max(phases["forward"].peak_bytes, phases["loss"].peak_bytes),
        backward=phases["backward"].peak_bytes,
        step=phases["step"].peak_bytes,
    )
    return counters | {
        "peak": held.peak_allocated_bytes,
        "peak reserved": held.peak_reserved_bytes,
        "device used": held.device_used_bytes,
    }


def predicted_step_s(gpu: str, model: ModelSpec, job: Job, plan: Plan) -> float:
    """Seconds of one optimizer step on GPUs of that name in one machine."""
    cluster = usual_cluster(find_gpu(gpu), int(plan.gpus))
    program = build(without_dropout(model), job, plan)
    return step_time(program.step, job, plan, cluster, find_calibration()).at(0).step_s


def counted_node(program: StepProgram, job: Job, plan: Plan) -> Node:
    """What a machine without a GPU counts of *program*."""
    on_host = plan.offload.optimizer or job.pages_moments
    return on_one_memory(program) if on_host else program.device_without_scratch


def on_one_memory(program: StepProgram) -> Node:
    """The step as a machine without a GPU sees it, where what is offloaded lies in the same memory as all else.

    It copies nothing between two memories, and pins nothing, so that no power of two is taken.
    """
    held = fold(without(without(program.host, "workspace"), "rounding")).net_bytes
    return then(phase("init", hold("host memory", "optimizer", held)), program.device_without_scratch)


def counted(traced: Trace) -> Mapping[Counter, int]:
    """Bytes of every counter as traced."""
    return _counters(
        states=traced.states_bytes,
        after_forward=traced.after_forward_bytes,
        forward=max(traced.forward_peak_bytes, traced.loss_peak_bytes),
        backward=traced.backward_peak_bytes,
        step=traced.step_peak_bytes,
    )


def measured_bytes(rank: Measured) -> Mapping[Counter, int]:
    """Bytes of every counter as a rank measured them."""
    counters = _counters(
        states=rank.states_bytes,
        after_forward=rank.forward.end_allocated_bytes,
        forward=rank.forward.peak_allocated_bytes,
        backward=rank.backward.peak_allocated_bytes,
        step=rank.step.peak_allocated_bytes,
    )
    if rank.peak_reserved_bytes is not None:
        counters["peak reserved"] = rank.peak_reserved_bytes
    if rank.device_used_bytes is not None:
        counters["device used"] = rank.device_used_bytes
    return counters


def _counters(*, states: int, after_forward: int, forward: int, backward: int, step: int) -> dict[Counter, int]:
    return {
        "between steps": states,
        "end of forward": after_forward,
        "saved for backward": after_forward - states,
        "peak in forward": forward,
        "peak in backward": backward,
        "peak in step": step,
        "peak": max(forward, backward, step),
    }


def without_dropout(model: ModelSpec) -> ModelSpec:
    """The same model with every dropout off."""
    runs = tuple(Run(tuple(_dry(layer) for layer in run.layers), run.repeats) for run in model.runs)
    return replace(model, embedding_dropout=0.0, final_dropout=0.0, runs=runs)


def _dry(layer: AnyLayer) -> AnyLayer:
    if not isinstance(layer, Layer):
        return layer
    block, crossing = layer.feed_forward, layer.cross_attention
    return replace(
        layer,
        dropout=0.0,
        adapter_dropout=0.0,
        attention=replace(layer.attention, dropout=0.0),
        cross_attention=replace(crossing, dropout=0.0) if crossing else None,
        feed_forward=replace(block, dropout=0.0) if isinstance(block, FeedForward) else block,
    )


LAYER_SETTINGS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")


def with_fewer_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """*config* cut to at most so many layers; widths, heads, vocabulary and experts stay as they are."""
    cut = dict(config) | {name: min(config[name], layers) for name in LAYER_SETTINGS if name in config}
    if "layer_types" in cut:
        cut["layer_types"] = cut["layer_types"][:layers]
    if "first_k_dense_replace" in cut:
        cut["first_k_dense_replace"] = min(1, cut["first_k_dense_replace"])
    return cut
