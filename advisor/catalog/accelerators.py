"""What a cloud's broker calls the GPUs of ``profiles/gpus.csv``."""

from __future__ import annotations

from advisor.catalog.profiles import profiles_folder
from advisor.catalog.table import read_rows
from advisor.errors import SpecError


def skypilot_accelerator(gpu: str) -> str:
    """SkyPilot's name for the GPU called *gpu* in ``profiles/gpus.csv``; it tells no form factor.

    Raises SpecError for a GPU that SkyPilot's catalog does not have.
    """
    for row in read_rows(profiles_folder() / "skypilot.csv"):
        if row.text("name") == gpu:
            return row.text("accelerator")
    raise SpecError(f"SkyPilot's catalog has no {gpu}; take another GPU or another target")
