"""Calibrations: what only a measurement can tell, read from ``profiles/calibrations/``."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from advisor.catalog.profiles import profiles_folder
from advisor.catalog.table import unknown_name
from advisor.errors import ConfigError
from advisor.specs.calibration import Calibration

_OWN_FIELDS = ("name", "source")
ORIGINS = ("measured", "published", "inferred", "assumed")
"""How a constant came about: measured here; published by others; computed from what others published; guessed."""


def find_calibration(name: str = "default") -> Calibration:
    """The calibration called *name*: the file ``profiles/calibrations/<name>.json``."""
    folder = profiles_folder() / "calibrations"
    path = folder / f"{name}.json"
    if not path.is_file():
        known = sorted(each.stem for each in folder.glob("*.json"))
        raise unknown_name("calibration", name, known, "profiles/calibrations")
    return read_calibration(path)


@lru_cache(maxsize=8)
def read_calibration(path: Path) -> Calibration:
    """The calibration in the JSON file at *path*, which says of each constant its value, origin and source."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        constants = content["constants"]
        named = {each: content[each] for each in _OWN_FIELDS}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a calibration ({error!r}); compare profiles/calibrations/default.json"
        ) from error
    wanted = {field.name for field in fields(Calibration)} - set(_OWN_FIELDS)
    missing, unknown = sorted(wanted - set(constants)), sorted(set(constants) - wanted)
    if missing or unknown:
        raise ConfigError(f"{path}: missing constants {missing or 'none'}, unknown constants {unknown or 'none'}")
    return Calibration(**named, **{key: _value(path, key, constants[key]) for key in wanted})


def _value(path: Path, key: str, constant: Any) -> Any:
    """The value of a constant that says where it comes from."""
    described = isinstance(constant, dict) and set(constant) == {"value", "origin", "source"}
    if not described or constant["origin"] not in ORIGINS:
        raise ConfigError(f"{path}: {key} needs a value, a source, and an origin among {', '.join(ORIGINS)}")
    return constant["value"]
