"""Runs as JSON lines: what was run, with which versions, how it ended, and the bytes that were true.

A record holds the case in full, so that the present model can be held against it at any time, without torch. Fields
that have their default are left out. Schema ``advisor/record/2`` says of a real run, under ``run``, also how it was
made and how it ended; records of schema ``advisor/record/1`` are read as they stand. Records of the package lie in
``profiles/measured``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from advisor.errors import ConfigError
from advisor.specs.job import Job
from advisor.specs.plan import Plan
from advisor.validation.accuracy import Case, Comparison, Counter, predicted, predicted_on
from advisor.validation.measured import Measured
from advisor.validation.outcome import Outcome

SCHEMA = "advisor/record/2"
READ = ("advisor/record/1", SCHEMA)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Execution:
    """How one real run was made, and how it ended."""

    id: str
    started: str
    """ISO 8601, UTC."""
    outcome: Outcome
    launcher: str
    device: str
    """``cpu``, or the GPU's name."""
    steps: int
    """Optimizer steps, the warm-up included."""
    seconds: float
    """From the launcher's start to its end."""
    stands_for: str | None = None
    """The model of which the case's is a twin cut to this machine's size; None where it is itself."""
    cuts: tuple[str, ...] = ()
    """What was cut for that."""
    ranks: tuple[Measured, ...] = ()
    """What each rank measured; nothing unless it ran."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The launch files by name, but for the training program, which is the same for all."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One run that was looked at."""

    truth: str
    """What ran: the group under which an accuracy is given."""
    case: Case
    true: Mapping[Counter, int]
    versions: Mapping[str, str]
    execution: Execution | None = None
    """None for what was traced."""

    @property
    def outcome(self) -> Outcome:
        return self.execution.outcome if self.execution else Outcome("ran")

    @property
    def device(self) -> str:
        """``cpu``, or the name of a GPU."""
        return self.execution.device if self.execution else "cpu"

    @property
    def timed_ranks(self) -> tuple[Measured, ...]:
        """The ranks whose times mean something: one that is emulated alone waits for nobody."""
        ranks = self.execution.ranks if self.execution else ()
        return ranks if len(ranks) == int(self.case.plan.gpus) else ()

    @property
    def model_name(self) -> str:
        """Of the model that was meant, where the case's stands for it."""
        return (self.execution and self.execution.stands_for) or self.case.name

    def comparison(self) -> Comparison:
        """The present prediction beside what was true."""
        case = self.case
        if self.device == "cpu":
            return Comparison(predicted(case.model, case.job, case.plan, case.rank), self.true)
        return Comparison(predicted_on(self.device, case.model, case.job, case.plan, case.rank), self.true)


def versions() -> dict[str, str]:
    """The frameworks installed here."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "galore-torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def line(record: Record) -> str:
    """*record* as one line of JSON."""
    case, execution = record.case, record.execution
    return json.dumps(
        {
            "schema": SCHEMA,
            "truth": record.truth,
            "case": {
                "name": case.name,
                "rank": case.rank,
                "job": plain(case.job),
                "plan": plain(case.plan),
                "config": dict(case.config),
            },
            "true_bytes": dict(record.true),
            "versions": dict(record.versions),
        }
        | ({"run": plain(execution)} if execution else {})
    )


def write(path: Path, records: Iterable[Record]) -> None:
    """Write *records*, replacing the file as a whole."""
    write_whole(path, "".join(line(record) + "\n" for record in records))


def write_whole(path: Path, text: str) -> None:
    """Put *text* at *path*, as a whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read(path: Path) -> Iterator[Record]:
    """The records of a file. Raises ConfigError where a line is no record of a known schema."""
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        yield parsed(text, f"{path}:{number}")


def parsed(text: str, where: str) -> Record:
    """The record in one line of JSON; *where* it stands is said by the ConfigError that a line without one raises."""
    try:
        found = json.loads(text)
        if found["schema"] not in READ:
            raise ConfigError(f"{where} has schema {found['schema']}; this release reads {', '.join(READ)}")
        case = found["case"]
        return Record(
            truth=found["truth"],
            case=Case(
                name=case["name"],
                config=case["config"],
                job=from_plain(Job, case["job"]),
                plan=from_plain(Plan, case["plan"]),
                rank=case["rank"],
            ),
            true=found["true_bytes"],
            versions=found["versions"],
            execution=from_plain(Execution, found["run"]) if "run" in found else None,
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{where} is no record: {error!r}") from error


def plain(value: Any) -> Any:
    """A frozen value as JSON holds it, fields that have their default left out."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    if not is_dataclass(value):
        return value
    return {field.name: plain(held) for field in fields(value) if (held := getattr(value, field.name)) != _usual(field)}


def _usual(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def from_plain(kind: Any, held: Any) -> Any:
    """The inverse of :func:`plain` for a value of *kind*. Raises TypeError for a field that *kind* has not."""
    if get_origin(kind) is tuple and isinstance(held, list):
        return tuple(from_plain(get_args(kind)[0], each) for each in held)
    for each in (kind, *get_args(kind)):
        if isinstance(each, type) and issubclass(each, Enum):
            return each(held)
        if isinstance(each, type) and is_dataclass(each) and isinstance(held, dict):
            types = _types(each)
            return each(**{name: from_plain(types.get(name, object), value) for name, value in held.items()})
    return held


@lru_cache(maxsize=16)
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
