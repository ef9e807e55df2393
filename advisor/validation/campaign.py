"""Predicted beside measured on this machine: plans run for a few steps through real launchers, each kept as a record.

Where there are GPUs enough, the plans run as they are. Where there is none, ranks on the CPU run a small twin of the
model (:mod:`advisor.validation.twin`); what that shows is that the launch files start what was planned, and that every
byte of the step is predicted, not how long it takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.catalog.gpus import known_gpu
from advisor.cost.estimate import price
from advisor.errors import SpecError
from advisor.launch.trainers.advisor import FILES as PROGRAM_FILES
from advisor.specs.job import Job
from advisor.specs.plan import Plan
from advisor.tracing.real_model import needs_torch
from advisor.validation.accuracy import Comparison, measured_bytes
from advisor.validation.measured import WARM_UP_STEPS
from advisor.validation.outcome import waiting_on_locks
from advisor.validation.planned import Planned, PlannedRun, planned
from advisor.validation.record import Execution, Record, plain, versions
from advisor.validation.run import Ask, Device, Launcher, start
from advisor.validation.store import append, own, own_path
from advisor.validation.twin import TWIN_PARAMETERS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from advisor.cost.estimate import PlanWords

STEPS = 8
TOP = 3
TIMEOUT_S = 600.0
LOCKS_S = 5.0
"""Time between two looks at the locks of compiled operators, while no step is made."""


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
    predicted_step_s: float | None = None
    """Of the GPUs; nothing is predicted of a CPU's times."""
    resumed: bool = False
    """Whether it had run before and was read from the records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What a campaign found."""

    planned: Planned
    checks: tuple[Check, ...]
    """One for each planned run; an interrupted campaign has fewer."""
    records: Path
    """The file that the records were added to."""

    @property
    def interrupted(self) -> bool:
        return bool(self.checks) and self.checks[-1].record.outcome.kind == "interrupted"

    @property
    def all_ran(self) -> bool:
        """Whether every plan was compared."""
        return len(self.checks) == len(self.planned.runs) and all(check.comparison for check in self.checks)


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
    emulate_ranks: int | None = None,
    watch: Callable[[Moment], None] = lambda moment: None,
    **words: Unpack[PlanWords],
) -> Validation:
    """Run the plan that the words of :func:`advisor.estimate` describe, or without one the best *top* of a search.

    Each runs for *steps* optimizer steps, two of them the warm-up, through *launcher*, or DeepSpeed's, accelerate's or
    torchrun as its strategy asks, on *device*: the GPUs if there are any, else a twin of at most *twin_parameters* on
    the CPU. However a run ends within *timeout_s* is recorded; with *resume*, plans that were recorded before by the
    same versions are taken from there. With *emulate_ranks*, one process is one rank of a plan for so many GPUs, the
    others not there, which measures memory alone. *watch* is told a few times a second where things are.

    Needs the extra ``run``. Raises NothingFitsError where the search finds no plan, ConfigError where this machine is
    too small, SpecError for words that contradict each other or what can be run.
    """
    needs_torch("advisor validate")
    if words.get("trainer", "advisor") != "advisor":
        raise SpecError("advisor validate runs the code of its own train.py; leave --trainer out")
    if steps <= WARM_UP_STEPS:
        raise SpecError(f"--steps must be above {WARM_UP_STEPS}, which are the warm-up, got {steps}")
    campaign = planned(
        model,
        strategy=strategy,
        top=top,
        launcher=launcher,
        device=device,
        twin_parameters=twin_parameters,
        emulate_ranks=emulate_ranks,
        words=words,
    )
    path = own_path()
    known = {_key(record): record for record in own(path)[0]} if resume else {}
    checks: list[Check] = []
    for number, run in enumerate(campaign.runs, 1):
        record = known.get(_key_of(run.case.config, run.case.job, run.case.plan, run.launcher, campaign.device, steps))
        resumed = record is not None and record.outcome.kind != "interrupted"
        if record is None or not resumed:
            watcher = _Watcher(watch, number, len(campaign.runs), run.title, steps)
            record = _made(campaign, run, steps, timeout_s, watcher)
            append(record, path)
        checks.append(_checked(campaign, run, record, resumed))
        if record.outcome.kind == "interrupted":
            break
    return Validation(planned=campaign, checks=tuple(checks), records=path)


def _checked(campaign: Planned, run: PlannedRun, record: Record, resumed: bool) -> Check:
    return Check(
        record=record,
        comparison=record.comparison() if record.true else None,
        predicted_step_s=_step_s(campaign, run),
        resumed=resumed,
    )


def _step_s(campaign: Planned, run: PlannedRun) -> float | None:
    """What is predicted of the GPUs that the plan runs on: of none where they are a CPU, or all but one not there."""
    if campaign.device == "cpu" or (run.launcher == "emulated" and int(run.plan.gpus) > 1):
        return None
    return price(campaign.question, run.plan).time.step_s


def _made(
    campaign: Planned, run: PlannedRun, steps: int, timeout_s: float, watcher: Callable[[float, int], None]
) -> Record:
    """The record of a run that is made now."""
    case, gpu = run.case, campaign.question.cluster.gpu.name
    ask = Ask(
        config=case.config,
        job=case.job,
        plan=case.plan,
        launcher=run.launcher,
        device=campaign.device,
        rank=run.rank,
        gpu=gpu,
        steps=steps,
        timeout_s=timeout_s,
    )
    started = datetime.now(timezone.utc)
    finished = start(ask, watcher)
    measured = finished.measured
    fullest = max(range(len(measured)), key=lambda each: measured[each].peak_allocated_bytes, default=None)
    # A GPU that the catalog does not hold goes by the name of that which was planned for.
    found = known_gpu(measured[0].device) if measured else None
    device = "cpu" if campaign.device == "cpu" else found.name if found else gpu
    return Record(
        truth=truth_of(case.plan, run.launcher, device),
        case=case if fullest is None else replace(case, rank=run.rank or fullest),
        true={} if fullest is None else measured_bytes(measured[fullest]),
        versions=versions(),
        execution=Execution(
            id=f"{started:%Y%m%dT%H%M%SZ}-{os.urandom(3).hex()}",
            started=started.isoformat(timespec="seconds"),
            outcome=finished.outcome,
            launcher=run.launcher,
            device=device,
            steps=steps,
            seconds=round(finished.seconds, 3),
            stands_for=campaign.question.model.name if campaign.twin and campaign.twin.cuts else None,
            cuts=run.cuts,
            ranks=measured,
            files={file.name: file.text for file in finished.files if file.name not in PROGRAM_FILES},
        ),
    )


def truth_of(plan: Plan, launcher: Launcher, device: str) -> str:
    """The group under which a real run's accuracy is given."""
    if launcher == "emulated":
        return f"One rank emulated on {device}, {plan.framework_title}"
    return f"Real ranks on {'gloo' if device == 'cpu' else device}, {plan.framework_title} by {launcher}"


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
    frameworks: Mapping[str, str] | None = None,
) -> str:
    """*frameworks* are by default those that are installed."""
    with_versions = versions() if frameworks is None else dict(frameworks)
    held = (dict(config), plain(job), plain(plan), launcher, device, steps, with_versions)
    return json.dumps(held, sort_keys=True)
