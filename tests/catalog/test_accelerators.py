"""SkyPilot's names for the GPUs of the catalog."""

from __future__ import annotations

import csv

import pytest

from advisor.catalog.accelerators import skypilot_accelerator
from advisor.catalog.gpus import gpu_names
from advisor.catalog.profiles import profiles_folder
from advisor.errors import SpecError


def test_a_gpu_is_asked_for_by_its_memory_and_not_by_its_form() -> None:
    assert skypilot_accelerator("A100-SXM4-80GB") == skypilot_accelerator("A100-PCIe-80GB") == "A100-80GB"
    assert skypilot_accelerator("A100-SXM4-40GB") == "A100"


def test_only_gpus_of_the_catalog_have_one() -> None:
    with (profiles_folder() / "skypilot.csv").open(newline="") as file:
        names = [row["name"] for row in csv.DictReader(file)]

    assert set(names) <= set(gpu_names())
    with pytest.raises(SpecError, match="SkyPilot's catalog has no MI210"):
        skypilot_accelerator("MI210")
