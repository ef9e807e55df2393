"""What cannot run together, and why: the rules of ``profiles/legality.csv``, each with versions and a source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache

from advisor.catalog.profiles import profiles_folder
from advisor.catalog.table import Row, read_rows
from advisor.catalog.trainers import fsdp_versions, installed, older_than
from advisor.specs.hardware import Gpu
from advisor.specs.job import Job
from advisor.specs.model import Experts, ModelSpec
from advisor.specs.plan import Offload, Strategy

CONDITIONS = (
    "strategy",
    "fsdp",
    "offload",
    "method",
    "optimizer",
    "precision",
    "attention",
    "compile",
    "trainer",
    "model",
    "gpu_lacks",
)
"""Columns of conditions; an empty cell sets none."""
FORMATS = ("fp32", "tf32", "fp16", "bf16", "fp8")

Facts = Mapping[str, frozenset[str]]
"""What is so of a question, by the columns of conditions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One combination that does not run. It holds where each of its conditions meets a fact."""

    name: str
    conditions: Mapping[str, tuple[str, ...]]
    """By column the patterns of names, of which one has to match."""
    below_capability: float | None
    """Of NVIDIA's GPUs: it holds for compute capabilities below."""
    package: str
    since: str
    """First version of *package* that it holds for; empty: from the first on."""
    until: str
    """First version of *package* that it holds for no more; empty: it still does."""
    reason: str
    instead: str
    """What to do about it; empty where the reason says it."""
    source: str = field(repr=False)

    @property
    def text(self) -> str:
        return f"{self.reason}; {self.instead}" if self.instead else self.reason

    def speaks_of(self, facts: Facts, gpu: Gpu | None) -> bool:
        """Whether *facts* on *gpu*, where one is known, meet its conditions."""
        if self.below_capability is not None:
            capability = _capability(gpu) if gpu else None
            if capability is None or capability >= self.below_capability:
                return False
        return all(self.matches(column, facts[column]) for column in self.conditions)

    def matches(self, column: str, facts: Iterable[str]) -> bool:
        """Whether one of *facts* meets its condition in *column*."""
        return any(fnmatchcase(fact, pattern) for fact in facts for pattern in self.conditions[column])

    def holds_in(self, version: str | None) -> bool:
        """Whether it is so in that *version* of its package; where none is known, it is."""
        if version is None:
            return True
        begun = not self.since or not older_than(version, self.since)
        return begun and (not self.until or older_than(version, self.until))


@lru_cache(maxsize=1)
def rules() -> tuple[Rule, ...]:
    """``profiles/legality.csv``, in its order."""
    return tuple(_rule(row) for row in read_rows(profiles_folder() / "legality.csv"))


def _rule(row: Row) -> Rule:
    texts = {name: row.cells[name] for name in ("package", "since", "until", "instead")}
    return Rule(
        name=row.text("name"),
        conditions={column: patterns for column in CONDITIONS if (patterns := row.several(column))},
        below_capability=row.optional_number("below_capability"),
        reason=row.text("reason"),
        source=row.text("source"),
        **texts,
    )


def refusal(
    job: Job, gpu: Gpu, model: ModelSpec | None = None, strategy: Strategy | None = None, offload: Offload | None = None
) -> str | None:
    """Why *job* does not run on *gpu*, in words, or None.

    Rules about models, strategies or offloads speak only where those are given, and those about versions of FSDP in
    :func:`refusal_of_optimizer`.
    """
    broken = _broken(rules(), facts_of(job, gpu, model, strategy, offload), gpu)
    if broken is None:
        return None
    return broken.text.format(
        gpu=gpu.name,
        capability=gpu.compute_capability,
        model=model.name if model else "",
        strategy=strategy.title if strategy else "",
        optimizer=job.optimizer,
        precision=job.precision,
        method=job.method,
    )


def refusal_of_optimizer(job: Job, strategy: Strategy, offload: Offload, fsdp_version: int) -> str | None:
    """Why the job's optimizer does not go with the rest, in words, or None."""
    facts = {name: frozenset({value}) for name, value in _words(job, strategy, offload).items()}
    facts["fsdp"] = frozenset({f"fsdp{fsdp_version}"} if strategy.is_fsdp else ())
    about = (rule for rule in rules() if "optimizer" in rule.conditions and rule.conditions.keys() <= facts.keys())
    broken = _broken(about, facts, None)
    return broken.text.format(strategy=strategy.title, optimizer=job.optimizer) if broken else None


@lru_cache(maxsize=1)
def _unrun() -> dict[str, str]:
    """Why not, by the name of a strategy: the rules about one alone, which no plan has."""
    known = {each.value for each in Strategy}
    alone = (rule for rule in rules() if rule.conditions.keys() == {"strategy"})
    return {name: rule.text for rule in alone for name in rule.conditions["strategy"] if name not in known}


def why_not_run(strategy: str) -> str | None:
    """Why advisor runs no strategy of that name though people know it, or None where it has not heard of it."""
    return _unrun().get(strategy)


def unrun_strategies() -> tuple[str, ...]:
    """Names of those that are known not to be run."""
    return tuple(_unrun())


def usual_fsdp_version(job: Job, strategy: Strategy = Strategy.FSDP) -> int:
    """PyTorch's FSDP of the newest version that the job's trainer can be told to run and its optimizer goes with.

    HSDP is modelled for the second alone.
    """
    if strategy is Strategy.HSDP:
        return 2
    known = fsdp_versions(job)
    fitting = (each for each in known if refusal_of_optimizer(job, strategy, Offload.NONE, each) is None)
    return next(fitting, known[0])


def _broken(about: Iterable[Rule], facts: Facts, gpu: Gpu | None) -> Rule | None:
    """The first of the rules *about* that *facts* meet in the versions that are installed."""
    spoken = (rule for rule in about if rule.speaks_of(facts, gpu))
    return next((rule for rule in spoken if rule.holds_in(_version(rule.package))), None)


@lru_cache(maxsize=64)
def _version(package: str) -> str | None:
    return installed(package) if package else None


def facts_of(job: Job, gpu: Gpu, model: ModelSpec | None, strategy: Strategy | None, offload: Offload | None) -> Facts:
    """What rules may ask about."""
    found: dict[str, set[str]] = {name: {value} for name, value in _words(job, strategy, offload).items()}
    found |= {
        "gpu_lacks": set(FORMATS) - gpu.peak_flop_per_s.keys(),
        "model": set(_traits(model)) if model else set(),
    }
    return {column: frozenset(found.get(column, ())) for column in CONDITIONS}


def _words(job: Job, strategy: Strategy | None, offload: Offload | None) -> dict[str, str]:
    """What is asked, by the columns of conditions."""
    found = {
        "method": job.method,
        "optimizer": job.optimizer,
        "precision": job.precision,
        "attention": job.attention,
        "compile": "yes" if job.compile else "no",
        "trainer": job.trainer,
    }
    found |= {"strategy": strategy.value} if strategy else {}
    return found | ({"offload": offload.value} if offload else {})


def _traits(model: ModelSpec) -> Iterator[str]:
    """The model's family and objective, and what its layers have that rules may be about."""
    yield model.family
    yield model.objective
    for layer in dict.fromkeys(model.described_layers):
        if isinstance(layer.feed_forward, Experts):
            yield "experts"
        if layer.attention.latent:
            yield "latent attention"


def _capability(gpu: Gpu) -> float | None:
    """The compute capability as a number, 8.6 of ``8.6``; None for GPUs that have none."""
    try:
        return float(gpu.compute_capability)
    except ValueError:
        return None
