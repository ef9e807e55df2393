"""What is to be run for validation: which plans, where, through which launcher, and on a CPU what stands for the model.

Whatever cannot be run is refused here, before anything is started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

from advisor.catalog.detect import detect
from advisor.catalog.request import Words, resolve
from advisor.cost.estimate import PlanWords, plan_of
from advisor.errors import ConfigError, NothingFitsError, SpecError
from advisor.search.recommend import search
from advisor.specs.job import Job
from advisor.specs.model import Layer, ModelSpec
from advisor.specs.plan import Plan, Strategy
from advisor.specs.question import Question
from advisor.step.build import build
from advisor.validation.accuracy import Case, predicted
from advisor.validation.room import available_bytes, refuse_too_large
from advisor.validation.run import Device, Launcher
from advisor.validation.twin import Twin, plan_cuts, twin_of

MOST_CPU_RANKS = 4
"""Ranks that a machine without GPUs runs, each with a copy of torch."""
PROCESS_BYTES = 600 * 2**20
"""What a rank holds beside its tensors: Python, torch 2.13, transformers 5.23, DeepSpeed 0.19.8; up to 490 MiB seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """One run to make."""

    plan: Plan
    """As it was asked for or found."""
    case: Case
    """What is run for it."""
    launcher: Launcher
    cuts: tuple[str, ...]
    """What was cut of the model, the job and the plan."""
    rank: int
    """Which rank is emulated: the one that should hold most; 0 where all are there."""

    @property
    def title(self) -> str:
        return title_of(self.plan, self.launcher)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """All that is to be run."""

    question: Question
    """As asked, of the whole model."""
    device: Device
    twin: Twin | None
    """What stands for the model on a CPU; on GPUs nothing does."""
    runs: tuple[PlannedRun, ...]
    warnings: tuple[str, ...]


def planned(
    model: str,
    *,
    strategy: str | None,
    top: int,
    launcher: Launcher | None,
    device: Device | None,
    twin_parameters: int,
    emulate_ranks: int | None,
    words: Mapping[str, Any],
) -> Planned:
    """What the words of :func:`advisor.validation.campaign.validate` mean on this machine."""
    if emulate_ranks is not None:
        if launcher or words.get("gpus") not in (None, emulate_ranks):
            raise SpecError("--emulate-ranks is the number of GPUs, and launches nothing: drop --gpus and --launcher")
        words, launcher = {**words, "gpus": emulate_ranks}, "emulated"
    question, plans = _plans(model, strategy, top, words)
    chosen = _device(device, question.cluster.gpus if emulate_ranks is None else 1)
    launchers = [launcher or usual_launcher(plan) for plan in plans]
    _refuse_what_cannot_run(question, plans, chosen)
    for plan, how in zip(plans, launchers, strict=True):
        _refuse_launcher(plan, how)
    twin, cases = _cases(question, plans, chosen, twin_parameters, emulates=emulate_ranks is not None)
    return Planned(
        question=question,
        device=chosen,
        twin=twin,
        runs=tuple(
            PlannedRun(
                plan=plan,
                case=case,
                launcher=how,
                cuts=_cuts(question.job, plan, case, twin),
                rank=int(build(case.model, case.job, case.plan).rank) if how == "emulated" else 0,
            )
            for plan, case, how in zip(plans, cases, launchers, strict=True)
        ),
        warnings=(*question.warnings, *_notes(question, plans, chosen)),
    )


def title_of(plan: Plan, launcher: str) -> str:
    """A plan and what starts it, as people read it."""
    how = f"as one rank of {plan.gpus}" if launcher == "emulated" else f"by {launcher}"
    return f"{plan.title} {how}"


def _cuts(job: Job, plan: Plan, case: Case, twin: Twin | None) -> tuple[str, ...]:
    return (*twin.cuts, *plan_cuts(job, plan, case.job, case.plan)) if twin else ()


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
        raise SpecError(f"a search chooses the plan itself: drop {flags}, or give --strategy too")
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
    if question.job.method != "full":
        raise SpecError(f"--method {question.job.method} is not run for validation; advisor trace runs peft's code")
    if question.job.padded:
        raise SpecError("padded batches are not run for validation: drop --padded")
    if question.job.compile:
        raise SpecError("memory under torch.compile is not modelled, so not run for validation: drop --compile")
    if any(plan.strategy.is_fsdp and plan.fsdp.version == 1 for plan in plans):
        raise SpecError("FSDP version 1 is not run for validation; `advisor trace` counts its bytes")
    if any(plan.swaps for plan in plans):
        raise SpecError("plans on NVMe are not run for validation; `advisor trace` counts their bytes")
    if any(plan.sequence_ranks > 1 for plan in plans):
        raise SpecError("plans that cut sequences are not run for validation; `advisor trace` counts their bytes")
    if question.cluster.nodes > 1 and device == "cuda":
        raise SpecError("one machine alone is run for validation: drop --nodes")
    if device == "cpu" and question.job.precision == "fp16":
        raise SpecError("a CPU does not train in fp16: give --precision bf16")
    if device == "cpu" and any(plan.zero.quantized_weights or plan.zero.quantized_gradients for plan in plans):
        raise SpecError("DeepSpeed quantises on GPUs alone: a CPU runs ZeRO++ with zero_hpz_partition_size and no more")


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
    question: Question, plans: Sequence[Plan], device: Device, parameters: int, *, emulates: bool
) -> tuple[Twin | None, list[Case]]:
    """What is run for each plan, and on a CPU what stands for the model."""
    model, job = question.model, question.job
    if device == "cuda":
        return None, [Case(model.name, question.config, job, plan) for plan in plans]
    ranks = question.cluster.gpus if emulates else min(question.cluster.gpus, MOST_CPU_RANKS)
    processes = 1 if emulates else ranks
    available = available_bytes()

    def needs(found: Twin, plan: Plan) -> dict[str, int]:
        own_plan = found.plan(plan, ranks)
        return _needed(found.model, found.job(job, own_plan), own_plan, processes)

    def fits(found: Twin) -> bool:
        return available is None or all(sum(needs(found, plan).values()) <= available for plan in plans)

    twin = twin_of(question.config, model, parameters, fits)
    cases = []
    for plan in plans:
        own_plan = twin.plan(plan, ranks)
        refuse_too_large(
            f"{plan.title} of {twin.model.name} is too large for this machine's CPU",
            needs(twin, plan),
            "take fewer --gpus, or a smaller --twin",
        )
        cases.append(Case(twin.model.name, twin.config, twin.job(job, own_plan), own_plan))
    return twin, cases


def _needed(model: ModelSpec, job: Job, plan: Plan, processes: int) -> dict[str, int]:
    """Bytes of this machine's memory that so many ranks take, by what they are for."""
    bytes_by_counter = predicted(model, job, plan)
    states = bytes_by_counter["between steps"]
    return {
        f"{processes} process{'es' if processes > 1 else ''}": processes * PROCESS_BYTES,
        "weights while they are built": processes * model.parameter_count * job.parameter_bytes,
        "states": processes * states,
        "a step": processes * (bytes_by_counter["peak"] - states),
    }


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
    if any(layer.attention.latent for layer in layers if isinstance(layer, Layer)):
        notes.append("a CPU has no fused attention whose values are narrower than its keys, and saves more without")
    if job.precision == "fp32" and job.attention != "eager":
        notes.append("in fp32 a CPU has another fused attention than a GPU; --attention eager is the same on both")
    return notes
