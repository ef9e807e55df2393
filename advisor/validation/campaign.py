"""Predicted beside measured on this machine: plans run for a few steps through real launchers, each kept as a record.

Where there are GPUs enough, the plans run as they are. Where there is none, ranks on the CPU run a small twin of the
model (:mod:`advisor.validation.twin`); what that shows is that the launch files start what was planned, and that every
byte of the step is predicted, not how long it takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from advisor.catalog.detect import detect
from advisor.catalog.request import Words, resolve
from advisor.cost.estimate import PlanWords, plan_of
from advisor.errors import ConfigError, NothingFitsError, SpecError
from advisor.search.recommend import search
from advisor.specs.job import Job
from advisor.specs.model import ModelSpec
from advisor.specs.plan import Plan, Strategy
from advisor.specs.question import Question
from advisor.tracing.real_model import needs_torch
from advisor.validation.accuracy import Case, Comparison, measured_bytes, predicted
from advisor.validation.measured import WARM_UP_STEPS
from advisor.validation.outcome import waiting_on_locks
from advisor.validation.record import Execution, Record, plain, versions
from advisor.validation.room import available_bytes, refuse_too_large
from advisor.validation.run import Ask, Device, Launcher, start
from advisor.validation.store import append, own, own_path
from advisor.validation.twin import TWIN_PARAMETERS, Twin, plan_cuts, twin_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

STEPS = 8
TOP = 3
TIMEOUT_S = 600.0
MOST_CPU_RANKS = 4
"""Ranks that a machine without GPUs runs in the end, each with a copy of torch."""
LOCKS_S = 5.0
"""Time between two looks at the locks of compiled operators, while no step is made."""
PROCESS_BYTES = 600 * 2**20
"""What a rank holds beside its tensors: Python, torch, transformers, DeepSpeed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """Where a campaign is."""

    number: int
    """Of the plan, from 1."""
    plans: int
    title: str
    step: int
    steps: int
    elapsed_s: float
    """Of this plan's run."""
    remaining_s: float | None
    """By the steps so far; None before the second."""
    note: str
    """What it waits on, where that is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One plan's run beside its prediction."""

    record: Record
    comparison: Comparison | None
    """None where it did not run."""
    resumed: bool = False
    """Whether it had run before and was read from the records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What a campaign found."""

    question: Question
    """As asked, of the whole model."""
    device: Device
    twin: Twin | None
    """What stood for the model; None where it ran itself."""
    checks: tuple[Check, ...]
    plans: int
    """How many were to run; an interrupted campaign has fewer checks."""
    records: Path
    """The file that the records were added to."""
    interrupted: bool
    warnings: tuple[str, ...] = ()

    @property
    def all_ran(self) -> bool:
        return len(self.checks) == self.plans and all(check.record.outcome.ran for check in self.checks)


def validate(
    model: str,
    *,
    strategy: str | None = None,
    steps: int = STEPS,
    top: int = TOP,
    launcher: Launcher | None = None,
    device: Device | None = None,
    timeout_s: float = TIMEOUT_S,
    resume: bool = False,
    twin_parameters: int = TWIN_PARAMETERS,
    watch: Callable[[Moment], None] = lambda moment: None,
    **words: Unpack[PlanWords],
) -> Validation:
    """Run the plan that the words of :func:`advisor.estimate` describe, or without one the best *top* of a search.

    Each runs for *steps* optimizer steps, two of them the warm-up, through *launcher*, or DeepSpeed's, accelerate's or
    torchrun as its strategy asks, on *device*: the GPUs if there are any, else a twin of at most *twin_parameters* on
    the CPU. However a run ends within *timeout_s* is recorded; with *resume*, plans that were recorded before by the
    same versions are taken from there. *watch* is told a few times a second where things are. Needs the extra ``run``.
    Raises NothingFitsError where the search finds no plan, ConfigError where this machine is too small, SpecError for
    words that contradict each other or what can be run.
    """
    needs_torch("advisor validate")
    if steps <= WARM_UP_STEPS:
        raise SpecError(f"--steps must be above {WARM_UP_STEPS}, which are the warm-up, got {steps}")
    question, plans = _plans(model, strategy, top, words)
    chosen = _device(device, question.cluster.gpus)
    _refuse_what_cannot_run(question, plans, chosen)
    asked = partial(Ask, device=chosen, steps=steps, timeout_s=timeout_s)
    twin, cases = _cases(question, plans, chosen, twin_parameters)
    launchers = [launcher or usual_launcher(plan) for plan in plans]
    for each, how in zip(plans, launchers, strict=True):
        _refuse_launcher(each, how)
    path = own_path()
    known = {_key(record): record for record in own(path)[0]} if resume else {}
    checks: list[Check] = []
    for number, (case, how) in enumerate(zip(cases, launchers, strict=True), 1):
        ask = asked(config=case.config, job=case.job, plan=case.plan, launcher=how, gpu=question.cluster.gpu.name)
        watcher = _Watcher(watch, number, len(cases), f"{case.plan.title} by {how}", steps)
        record = known.get(_key_of(case.config, case.job, case.plan, how, chosen, steps, versions()))
        if record and record.outcome.kind != "interrupted":
            checks.append(Check(record=record, comparison=_compared(record), resumed=True))
            continue
        record = _made(ask, case, question, twin, plans[number - 1], watcher)
        append(record, path)
        checks.append(Check(record=record, comparison=_compared(record)))
        if record.outcome.kind == "interrupted":
            break
    return Validation(
        question=question,
        device=chosen,
        twin=twin,
        checks=tuple(checks),
        plans=len(cases),
        records=path,
        interrupted=bool(checks) and checks[-1].record.outcome.kind == "interrupted",
        warnings=(*question.warnings, *_notes(question, plans, chosen)),
    )


def usual_launcher(plan: Plan) -> Launcher:
    """The one that is run where none is named: for FSDP accelerate's, whose YAML sets it up."""
    if plan.strategy.zero_stage is not None:
        return "deepspeed"
    return "accelerate" if plan.strategy.is_fsdp else "torchrun"


def _plans(model: str, strategy: str | None, top: int, words: Mapping[str, Any]) -> tuple[Question, list[Plan]]:
    """The question, and the one plan that *words* describe or the best of a search."""
    if strategy is not None or words.get("config") is not None:
        question, plan = plan_of(model, strategy=strategy, **cast(PlanWords, dict(words)))
        return question, [plan]
    if alone := sorted(words.keys() - Words.__annotations__.keys()):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in alone)
        raise SpecError(f"{flags} belong to one plan; give its --strategy too")
    if top < 1:
        raise SpecError(f"--top must be at least 1, got {top}")
    question = resolve(model, **cast(Words, dict(words)))
    found = search(question)
    if not found.plans:
        raise NothingFitsError(found.headline)
    return question, [each.plan for each in found.plans[:top]]


def _device(wanted: Device | None, gpus: int) -> Device:
    """Where to run: on GPUs where this machine has enough of them, on the CPU where it has none."""
    machine = detect() if wanted != "cpu" else None
    there = len(machine.gpu_names) if machine else 0
    if wanted == "cpu" or (wanted is None and not there):
        return "cpu"
    if there < gpus:
        raise SpecError(
            f"the plan is for {gpus} GPUs, and this machine has {there}: give --gpus {there}, or --device cpu to run a "
            "small twin of the model on the CPU"
            if there
            else "--device cuda needs a GPU, and this machine has none that NVML finds"
        )
    return "cuda"


def _refuse_what_cannot_run(question: Question, plans: Sequence[Plan], device: Device) -> None:
    if question.model.objective != "causal":
        raise SpecError(f"{question.model.name} is no causal model, and only those are run for validation")
    if question.job.padded:
        raise SpecError("padded batches are not run for validation: drop --padded")
    if any(plan.swaps for plan in plans):
        raise SpecError("plans on NVMe are not run for validation; `advisor trace` counts their bytes")
    if question.cluster.nodes > 1 and device == "cuda":
        raise SpecError("one machine alone is run for validation: drop --nodes")
    if device == "cpu" and question.job.precision == "fp16":
        raise SpecError("a CPU does not train in fp16: give --precision bf16")


def _refuse_launcher(plan: Plan, launcher: Launcher) -> None:
    sharded = plan.strategy.zero_stage is not None
    if (launcher == "deepspeed" and not sharded) or (launcher == "torchrun" and sharded):
        raise SpecError(f"{plan.strategy.title} is not started by {launcher}; give --launcher {usual_launcher(plan)}")
    if launcher == "accelerate" and plan.strategy in (Strategy.DDP, Strategy.ZERO0):
        raise SpecError(f"{plan.strategy.title} is validated by {usual_launcher(plan)}; drop --launcher accelerate")
    for package in ("psutil", "accelerate", *(["deepspeed"] if sharded else [])):
        if find_spec(package) is None:
            raise ConfigError(f"advisor validate needs {package} for {plan.title}; pip install 'advisor[run]'")


def _cases(
    question: Question, plans: Sequence[Plan], device: Device, parameters: int
) -> tuple[Twin | None, list[Case]]:
    """What is run for each plan, and on a CPU what stands for the model."""
    model, job = question.model, question.job
    if device == "cuda":
        return None, [Case(model.name, question.config, job, plan) for plan in plans]
    ranks = min(question.cluster.gpus, MOST_CPU_RANKS)
    available = available_bytes()

    def needs(found: Twin, plan: Plan) -> dict[str, int]:
        own_plan = found.plan(plan, ranks)
        return _needed(found.model, found.job(job, own_plan), own_plan)

    def fits(spec: ModelSpec) -> bool:
        share = spec.parameter_count / model.parameter_count
        stand_in = Twin(question.config, spec, (), share, share**0.5)
        return available is None or all(sum(needs(stand_in, plan).values()) <= available for plan in plans)

    twin = twin_of(question.config, model, parameters, fits)
    cases = []
    for plan in plans:
        own_plan = twin.plan(plan, ranks)
        refuse_too_large(
            f"{plan.title} on {ranks} ranks of this machine's CPU is too large, with {twin.model.name}",
            needs(twin, plan),
            "take fewer --gpus, or a smaller --twin",
        )
        cases.append(Case(twin.model.name, twin.config, twin.job(job, own_plan), own_plan))
    return twin, cases


def _needed(model: ModelSpec, job: Job, plan: Plan) -> dict[str, int]:
    """Bytes of this machine's memory that all ranks take, by what they are for."""
    bytes_by_counter = predicted(model, job, plan)
    ranks, states = int(plan.gpus), bytes_by_counter["between steps"]
    return {
        f"{ranks} processes": ranks * PROCESS_BYTES,
        "weights while they are built": ranks * model.parameter_count * job.parameter_bytes,
        "states": ranks * states,
        "a step": ranks * (bytes_by_counter["peak"] - states),
    }


def _made(
    ask: Ask, case: Case, question: Question, twin: Twin | None, plan: Plan, report: Callable[[float, int], None]
) -> Record:
    """The record of a run that is made now."""
    started = datetime.now(timezone.utc)
    finished = start(ask, report)
    measured = finished.measured
    fullest = max(range(len(measured)), key=lambda rank: measured[rank].peak_allocated_bytes, default=None)
    stands_in = twin is not None and twin.model is not question.model
    execution = Execution(
        id=f"{started:%Y%m%dT%H%M%SZ}-{os.urandom(3).hex()}",
        started=started.isoformat(timespec="seconds"),
        outcome=finished.outcome,
        launcher=ask.launcher,
        device=measured[0].device if measured else "cpu" if ask.device == "cpu" else question.cluster.gpu.name,
        steps=ask.steps,
        seconds=round(finished.seconds, 3),
        stands_for=question.model.name if stands_in else None,
        cuts=(*twin.cuts, *plan_cuts(question.job, plan, case.job, case.plan)) if twin else (),
        ranks=measured,
        files={file.name: file.text for file in finished.files if file.name != "train.py"},
    )
    return Record(
        truth=truth_of(case.plan, ask.launcher, execution.device),
        case=replace(case, rank=fullest),
        true={} if fullest is None else measured_bytes(measured[fullest]),
        versions=versions(),
        execution=execution,
    )


def truth_of(plan: Plan, launcher: Launcher, device: str) -> str:
    """The group under which a real run's accuracy is given."""
    strategy = plan.strategy
    framework = "DeepSpeed" if strategy.zero_stage is not None else strategy.value.split("-")[0].upper()
    return f"Real ranks on {'gloo' if device == 'cpu' else device}, {framework} by {launcher}"


def _compared(record: Record) -> Comparison | None:
    return record.comparison() if record.true else None


class _Watcher:
    """Turns what a run tells about itself into moments of its campaign."""

    def __init__(self, watch: Callable[[Moment], None], number: int, plans: int, title: str, steps: int) -> None:
        self._watch, self._number, self._plans, self._title, self._steps = watch, number, plans, title, steps
        self._first_step_s: float | None = None
        self._looked_s = 0.0
        self._note = ""

    def __call__(self, elapsed_s: float, step: int) -> None:
        if step and self._first_step_s is None:
            self._first_step_s = elapsed_s
        remaining_s = None
        if step > 1 and self._first_step_s is not None:
            remaining_s = (elapsed_s - self._first_step_s) / (step - 1) * (self._steps - step)
        if not step and elapsed_s - self._looked_s > LOCKS_S:
            self._looked_s, self._note = elapsed_s, "; ".join(waiting_on_locks())
        self._watch(
            Moment(
                number=self._number,
                plans=self._plans,
                title=self._title,
                step=step,
                steps=self._steps,
                elapsed_s=elapsed_s,
                remaining_s=remaining_s,
                note="" if step else self._note,
            )
        )


def _key(record: Record) -> str:
    """What makes two runs the same; a record without a run equals none."""
    run, case = record.execution, record.case
    if run is None:
        return record.truth
    device: Device = "cpu" if run.device == "cpu" else "cuda"
    return _key_of(case.config, case.job, case.plan, run.launcher, device, run.steps, record.versions)


def _key_of(
    config: Mapping[str, Any],
    job: Job,
    plan: Plan,
    launcher: str,
    device: Device,
    steps: int,
    frameworks: Mapping[str, str],
) -> str:
    held = (dict(config), plain(job), plain(plan), launcher, device, steps, dict(frameworks))
    return json.dumps(held, sort_keys=True)


def _notes(question: Question, plans: Sequence[Plan], device: Device) -> list[str]:
    """What a CPU does otherwise than a GPU."""
    if device == "cuda":
        return []
    notes = []
    job, layers = question.job, question.model.layers
    if any(plan.offload.optimizer for plan in plans):
        notes.append(
            "with offload, device and host are one memory here, and both are counted; the kernel of DeepSpeedCPUAdam, "
            "which would have to be compiled and takes no memory, is left out, so that weights do not change"
        )
    mixes = job.precision != job.parameter_format and any(plan.strategy is Strategy.DDP for plan in plans)
    if mixes and any(getattr(layer, "norm", None) == "layer" for layer in layers):
        notes.append("a CPU computes LayerNorm under autocast otherwise than a GPU: under DDP it saves less")
    if job.precision == "fp32" and job.attention != "eager":
        notes.append("in fp32 a CPU has another fused attention than a GPU; --attention eager is the same on both")
    return notes
