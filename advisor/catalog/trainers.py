"""Training programs of other people: what each can be told to do, in which version, and by which names of flags."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from advisor.catalog.profiles import profiles_folder
from advisor.catalog.table import read_rows
from advisor.errors import SpecError
from advisor.specs.job import Job, Trainer
from advisor.specs.plan import Checkpointing, Plan, Strategy

Versions = Mapping[str, str]
"""Version by package."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerProfile:
    """One entry of ``profiles/trainers/trainers.json``: what the program's flags can express."""

    packages: Versions
    """The program's own package and those whose flags it takes, with the versions that are assumed."""
    source: str
    launcher: str
    """What starts it usually: accelerate, or torchrun."""
    strategies: tuple[str, ...]
    losses: tuple[str, ...]
    """The first is what it computes unless told otherwise."""
    optimizers: tuple[str, ...]
    attention: tuple[str, ...]
    checkpointing: tuple[str, ...]
    precisions: tuple[str, ...]
    padded: bool
    """Whether a batch may be of padded sequences."""
    fsdp_versions: tuple[int, ...]
    offload: bool
    mixed_whole_weights: bool
    """Whether DDP can keep fp32 weights and compute in a half format."""
    differences: tuple[str, ...]
    """What its step has that the model of the step lacks, or the other way round, each in one line."""
    methods: tuple[str, ...] = ("full",)
    """Of ``--method``: those whose memory is modelled as the program trains by them."""
    adapter_differences: tuple[str, ...] = ()
    """Those of its steps with adapters alone."""
    models: Mapping[str, str] = field(default_factory=dict)
    """For a program that knows models by names of its own: the module and the flavor, by the model's name."""
    before: tuple[Mapping[str, Any], ...] = ()
    """For packages older than a version, the fields that differ."""


@lru_cache(maxsize=1)
def trainer_profiles() -> Mapping[str, TrainerProfile]:
    """All of them, by the names that ``--trainer`` takes."""
    held = json.loads((profiles_folder() / "trainers" / "trainers.json").read_text(encoding="utf-8"))
    return MappingProxyType({name: TrainerProfile(**_frozen(entry)) for name, entry in held.items()})


def _frozen(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def versions_of(trainer: Trainer) -> tuple[Versions, bool]:
    """The versions to write flags for, and whether they are those installed beside this package.

    The assumed ones stand together: they hold unless the program's own package is installed.
    """
    assumed = trainer_profiles()[trainer].packages
    if not assumed or installed(next(iter(assumed))) is None:
        return assumed, False
    return {package: installed(package) or version for package, version in assumed.items()}, True


def installed(package: str) -> str | None:
    """Version of *package* in this Python's environment, or None."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def profile_of(trainer: Trainer, versions: Versions) -> TrainerProfile:
    """What *trainer* can be told to do in those *versions*."""
    profile = trainer_profiles()[trainer]
    for older in profile.before:
        if older_than(versions[older["package"]], older["version"]):
            named = {each.name for each in fields(TrainerProfile)}
            profile = replace(profile, **_frozen({key: value for key, value in older.items() if key in named}))
    return profile


def older_than(version: str, other: str) -> bool:
    """Whether *version* comes before the release *other*. A release candidate counts as its release."""
    return _numbers(version) < _numbers(other)


def _numbers(version: str) -> tuple[int, ...]:
    """The release part: 0.1.0.dev0 is 0.1.0."""
    release = re.match(r"\d+(\.\d+)*", version)
    found = tuple(int(part) for part in release[0].split(".")) if release else ()
    return (*found, 0, 0, 0)[:3]


def refuse_job(job: Job) -> None:
    """Raise SpecError for a job that no flags of its trainer express, whatever the plan."""
    versions, _ = versions_of(job.trainer)
    profile = profile_of(job.trainer, versions)
    asked: dict[str, tuple[str, tuple[str, ...]]] = {"loss": (job.loss, profile.losses)}
    if job.trainer != "advisor":
        asked |= {
            "optimizer": (job.optimizer, profile.optimizers),
            "attention": (job.attention, profile.attention),
            "precision": (job.precision, profile.precisions),
        }
    for flag, (wanted, known) in asked.items():
        if wanted not in known:
            raise SpecError(f"{_named(job.trainer, versions)} knows no {flag} {wanted}; give --{flag} {known[0]}")
    if job.compile and job.trainer != "advisor":
        raise SpecError(f"what {_named(job.trainer, versions)} compiles is not modelled; leave --compile out")
    if job.method not in profile.methods:
        methods, name = " or ".join(profile.methods), _named(job.trainer, versions)
        raise SpecError(
            f"--method {job.method} is not modelled as {name} runs it; give --method {methods}, or leave --trainer out"
        )
    if job.padded and not profile.padded:
        raise SpecError(f"{_named(job.trainer, versions)} joins texts and cuts them; leave --padded out")


def refusal_of_strategy(job: Job, strategy: Strategy) -> str | None:
    """Why the job's trainer does not run *strategy*, or None. What is priced, this package's own program runs."""
    if job.trainer == "advisor":
        return None
    versions, _ = versions_of(job.trainer)
    profile, name = profile_of(job.trainer, versions), _named(job.trainer, versions)
    if strategy.value not in profile.strategies:
        return f"{name} does not run it; it runs {', '.join(profile.strategies)}"
    mixes = job.precision != job.parameter_format
    if strategy is Strategy.DDP and mixes and not profile.mixed_whole_weights:
        return (
            f"{name} holds whole weights in {job.precision}; give --param-dtype {job.precision}, or take zero or fsdp"
        )
    return None


def refusal_of_plan(job: Job, plan: Plan) -> str | None:
    """Why the job's trainer does not run *plan*, or None."""
    if job.trainer == "advisor":
        return None
    if reason := refusal_of_strategy(job, plan.strategy):
        return reason
    versions, _ = versions_of(job.trainer)
    profile, name = profile_of(job.trainer, versions), _named(job.trainer, versions)
    if plan.checkpointing.value not in profile.checkpointing:
        return (
            f"{name} has no checkpointing {plan.checkpointing.value}; give --checkpointing {Checkpointing.FULL.value}"
        )
    if plan.strategy.is_fsdp and plan.fsdp.version not in profile.fsdp_versions:
        return f"{name} runs FSDP of version {profile.fsdp_versions[0]}; give --fsdp-version {profile.fsdp_versions[0]}"
    if plan.offload.optimizer and not profile.offload:
        return f"{name} does not offload; leave --offload out"
    return None


def fsdp_versions(job: Job) -> tuple[int, ...]:
    """PyTorch's FSDPs that the job's trainer can be told to run, the newest first."""
    versions, _ = versions_of(job.trainer)
    return tuple(sorted(profile_of(job.trainer, versions).fsdp_versions, reverse=True))


def _named(trainer: Trainer, versions: Versions) -> str:
    package = next(iter(versions), None)
    return trainer if package is None else f"{trainer} ({package} {versions[package]})"


def differences(job: Job) -> Iterator[str]:
    """What the job's trainer does that the model of the step does not know, as warnings."""
    profile = trainer_profiles()[job.trainer]
    for text in (*profile.differences, *(profile.adapter_differences if job.method != "full" else ())):
        yield f"{job.trainer}: {text}"


@dataclass(frozen=True, kw_only=True, slots=True)
class FlagChange:
    """A flag that a package renamed, added or dropped."""

    package: str
    old: str
    """Empty: there was none."""
    new: str
    """Empty: there is none any more."""
    since: str
    """First version that has the new one."""
    until: str
    """First version without the old one; empty: it is still there."""
    source: str = field(repr=False)


@lru_cache(maxsize=1)
def flag_changes() -> tuple[FlagChange, ...]:
    """``profiles/trainers/flags.csv``."""
    rows = read_rows(profiles_folder() / "trainers" / "flags.csv")
    return tuple(FlagChange(**row.cells) for row in rows)


def flag_name(name: str, versions: Versions) -> str | None:
    """What the flag that is called *name* in the newest version is called in *versions*; None where there is none."""
    for change in flag_changes():
        if change.new == name and older_than(versions.get(change.package, change.since), change.since):
            return change.old or None
    return name


def gone(name: str, versions: Versions) -> FlagChange | None:
    """The change that took the flag *name* away by *versions*, or None."""
    for change in flag_changes():
        known = versions.get(change.package)
        if change.old == name and change.until and known and not older_than(known, change.until):
            return change
    return None
