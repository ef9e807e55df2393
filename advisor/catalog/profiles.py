"""Where data lies: what ships with the package, and what is this user's own. Nothing else knows."""

from __future__ import annotations

import os
from pathlib import Path

from advisor.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent


def profiles_folder() -> Path:
    """The folder of profiles: inside the installed package, else beside the package in a checkout."""
    candidates = (_PACKAGE / "_profiles", _PACKAGE.parent / "profiles")
    for folder in candidates:
        if (folder / "gpus.csv").is_file():
            return folder
    looked_in = " or ".join(str(folder) for folder in candidates)
    raise ConfigError(f"no profiles in {looked_in}; install advisor again")


def own_data(variable: str, name: str) -> Path:
    """What the environment *variable* names, else *name* in the folder for data that the system has (platformdirs)."""
    named = os.environ.get(variable)
    if named:
        return Path(named).expanduser()
    from platformdirs import user_data_path

    return user_data_path("advisor", appauthor=False) / name


def model_profiles() -> Path:
    """The folder with one JSON file per model, named ``organisation__name.json``."""
    return profiles_folder() / "models"
