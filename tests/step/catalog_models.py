"""The catalog's models, by profile."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from advisor.catalog.models import find_model
from advisor.catalog.profiles import model_profiles
from advisor.specs.model import ModelSpec

PROFILES = sorted(path.stem for path in model_profiles().glob("*.json"))


@cache
def model_of(profile: str) -> ModelSpec:
    """The model of the file *profile*, whose name is its Hub id with ``__`` for the slash."""
    return find_model(profile.replace("__", "/")).model


def _smallest_of_each_family() -> list[str]:
    by_family: dict[str, str] = {}
    for profile in sorted(PROFILES, key=lambda profile: model_of(profile).parameter_count):
        by_family.setdefault(model_of(profile).family, profile)
    return sorted(by_family.values())


ONE_OF_EACH = _smallest_of_each_family()
"""Larger models of a family have the same layers, more of them."""


def shallow(model: ModelSpec) -> ModelSpec:
    """The same with at most three repeats of each run of layers, as one stack."""
    return replace(model, runs=tuple(replace(run, repeats=min(run.repeats, 3)) for run in model.runs), decoder_start=0)
