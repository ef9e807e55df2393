"""Compared runs as JSON lines: what was run, with which versions, and the bytes that were true.

A record holds the case in full, so that the present model can be held against it at any time, without torch. Fields
of a job and a plan that have their default are left out. Records of the package lie in ``profiles/measured``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from advisor.errors import ConfigError
from advisor.specs.job import Job
from advisor.specs.plan import Plan
from advisor.validation.accuracy import Case, Comparison, Counter, predicted

SCHEMA = "advisor/record/1"


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One run that was looked at."""

    truth: str
    """What ran: the group under which an accuracy is given."""
    case: Case
    true: Mapping[Counter, int]
    versions: Mapping[str, str]

    def comparison(self) -> Comparison:
        """The present prediction beside what was true."""
        case = self.case
        return Comparison(predicted(case.model, case.job, case.plan, case.rank), self.true)


def versions() -> dict[str, str]:
    """The frameworks installed here."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "accelerate", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def line(record: Record) -> str:
    """*record* as one line of JSON."""
    case = record.case
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
    )


def write(path: Path, records: Iterable[Record]) -> None:
    """Write *records*, replacing the file as a whole."""
    beside = path.with_suffix(".part")
    beside.write_text("".join(line(record) + "\n" for record in records), encoding="utf-8")
    beside.replace(path)


def read(path: Path) -> Iterator[Record]:
    """The records of a file. Raises ConfigError where a line is no record of this schema."""
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(text)
            if found["schema"] != SCHEMA:
                raise ConfigError(f"{path}:{number} has schema {found['schema']}; this release reads {SCHEMA}")
            case = found["case"]
            yield Record(
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
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number} is no record: {error!r}") from error


def plain(value: Any) -> Any:
    """A frozen value as JSON holds it, fields that have their default left out."""
    if isinstance(value, Enum):
        return value.value
    if not is_dataclass(value):
        return value
    return {field.name: plain(held) for field in fields(value) if (held := getattr(value, field.name)) != _usual(field)}


def _usual(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def from_plain(kind: Any, held: Any) -> Any:
    """The inverse of :func:`plain` for a value of *kind*. Raises TypeError for a field that *kind* has not."""
    for each in (kind, *get_args(kind)):
        if isinstance(each, type) and issubclass(each, Enum):
            return each(held)
        if isinstance(each, type) and is_dataclass(each) and isinstance(held, dict):
            types = _types(each)
            return each(**{name: from_plain(types.get(name, object), value) for name, value in held.items()})
    return held


@lru_cache(maxsize=8)
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
