"""The catalog's models, by profile."""

from __future__ import annotations

from functools import cache

from advisor.catalog.models import find_model
from advisor.catalog.profiles import model_profiles
from advisor.specs.model import ModelSpec

PROFILES = sorted(path.stem for path in model_profiles().glob("*.json"))


@cache
def model_of(profile: str) -> ModelSpec:
    """The model of the file *profile*, whose name is its Hub id with ``__`` for the slash."""
    return find_model(profile.replace("__", "/")).model
