"""What each optimizer is, and what others call it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from advisor.catalog.profiles import profiles_folder
from advisor.catalog.table import read_rows
from advisor.specs.job import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerProfile:
    """One line of ``profiles/optimizers.csv``."""

    title: str
    package: str
    version: str
    """Whose source was read."""
    class_name: str
    optim: str
    """What transformers' Trainer calls it; empty where it has no word for it."""


@lru_cache(maxsize=1)
def optimizer_profiles() -> Mapping[str, OptimizerProfile]:
    """All of them, by the names that ``--optimizer`` takes."""
    rows = (row.cells for row in read_rows(profiles_folder() / "optimizers.csv"))
    return MappingProxyType(
        {
            cells["name"]: OptimizerProfile(
                title=cells["title"],
                package=cells["package"],
                version=cells["version"],
                class_name=cells["class"],
                optim=cells["optim"],
            )
            for cells in rows
        }
    )


SAME_WORDS = {"adamw_8bit": "adamw_bnb_8bit"}
"""Two names of one optimizer (transformers 5.23, training_args.py ``OptimizerNames``)."""


def optimizer_called(word: str) -> str | None:
    """The optimizer that ``--optim`` of transformers or ``--optimizer`` of the written program calls so, or None."""
    named = word.replace("-", "_")
    for name, profile in optimizer_profiles().items():
        if named in (name.replace("-", "_"), profile.optim) or SAME_WORDS.get(named) == profile.optim:
            return name
    return None


def packages_of(job: Job) -> str:
    """What is installed for the optimizer beside torch and transformers, after a space; empty for nothing."""
    package = optimizer_profiles()[job.optimizer].package
    return "" if package in ("torch", "transformers") else f" {package}"
