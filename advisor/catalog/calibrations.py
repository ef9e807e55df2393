"""Calibrations: what only a measurement can tell.

The package's lie in ``profiles/calibrations``; this user's own in ``calibrations`` in the folder for data that the
system names (platformdirs), or in the folder that the environment variable ``ADVISOR_CALIBRATIONS`` names. An own one
says only what was measured, and leaves the rest to the one that it is based on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from advisor.catalog.profiles import own_data, profiles_folder
from advisor.catalog.table import unknown_name
from advisor.errors import ConfigError
from advisor.specs.calibration import Calibration

CALIBRATIONS_VARIABLE = "ADVISOR_CALIBRATIONS"
_OWN_FIELDS = ("name", "source", "device", "based_on")
ORIGINS = ("measured", "published", "inferred", "assumed")
"""How a constant came about: measured here; published by others; computed from what others published; guessed."""


def own_folder() -> Path:
    """The folder of this user's calibrations."""
    return own_data(CALIBRATIONS_VARIABLE, "calibrations")


def find_calibration(name: str = "default") -> Calibration:
    """The calibration called *name*, this user's or the package's, or that in the file at the path *name*."""
    shipped = profiles_folder() / "calibrations"
    if name == "default":
        return read_calibration(shipped / "default.json")
    if name.endswith(".json"):
        return read_calibration(Path(name).expanduser())
    folders = (own_folder(), shipped)
    for folder in folders:
        if (path := folder / f"{name}.json").is_file():
            return read_calibration(path)
    known = sorted({each.stem for folder in folders for each in folder.glob("*.json")})
    raise unknown_name("calibration", name, known, "profiles/calibrations")


def calibration_of(device: str) -> Calibration:
    """The last that was measured on *device* on this machine, or the default."""
    own = sorted(own_folder().glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    found = (read_calibration(path) for path in own)
    return next((each for each in found if each.device == device), find_calibration())


@lru_cache(maxsize=8)
def read_calibration(path: Path) -> Calibration:
    """The calibration in the JSON file at *path*, which says of each constant its value, origin and source."""
    content = _content(path)
    wanted = {field.name for field in fields(Calibration)} - set(_OWN_FIELDS)
    based_on = content.get("based_on")
    usual = find_calibration(based_on) if based_on else None
    constants = content["constants"]
    missing = sorted(wanted - set(constants)) if usual is None else []
    unknown = sorted(set(constants) - wanted)
    if missing or unknown:
        raise ConfigError(f"{path}: missing constants {missing or 'none'}, unknown constants {unknown or 'none'}")
    values = {key: _value(path, key, constants[key]) for key in constants}
    for key in values.keys() & {"memory_ranges", "time_ranges"}:
        values[key] = {like: (low, high) for like, (low, high) in values[key].items()}
    if usual:
        values = {key: _beside(getattr(usual, key), values.get(key)) for key in wanted}
    return Calibration(
        name=content["name"], source=content["source"], device=content.get("device"), based_on=based_on, **values
    )


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(content["name"], str) and isinstance(content["source"], str)):
            raise TypeError("its name and source are to be text")
        if not isinstance(content["constants"], dict):
            raise TypeError("its constants are to be named")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; `advisor calibrate` makes a calibration"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a calibration ({error!r}); compare profiles/calibrations/default.json"
        ) from error
    return dict(content)


def _beside(usual: Any, own: Any) -> Any:
    """What was measured in place of what is *usual*; of a table, entry by entry."""
    if own is None:
        return usual
    return {**usual, **own} if isinstance(usual, Mapping) else own


def _value(path: Path, key: str, constant: Any) -> Any:
    """The value of a constant that says where it comes from."""
    described = isinstance(constant, dict) and set(constant) == {"value", "origin", "source"}
    if not described or constant["origin"] not in ORIGINS:
        raise ConfigError(f"{path}: {key} needs a value, a source, and an origin among {', '.join(ORIGINS)}")
    return constant["value"]
