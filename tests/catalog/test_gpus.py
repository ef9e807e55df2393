"""GPUs are found by any spelling, in base units, with what is assumed about them named."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog.gpus import all_gpus, find_gpu, gpu_names
from advisor.catalog.links import find_link
from advisor.catalog.table import plain
from advisor.errors import ConfigError, UnknownNameError
from advisor.specs.hardware import Gpu

GIB = 2**30


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("4090", "RTX 4090"),
        ("RTX4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("h100", "H100-SXM5-80GB"),
        ("H100 SXM", "H100-SXM5-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM5-80GB"),
        ("h100_pcie", "H100-PCIe-80GB"),
        ("A100", "A100-SXM4-80GB"),
        ("A100-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("a100 40gb", "A100-SXM4-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("Tesla T4", "T4"),
        ("t4", "T4"),
        ("3090", "RTX 3090"),
        ("V100", "V100-SXM2-16GB"),
        ("NVIDIA H200", "H200-SXM-141GB"),
        ("MI300X", "MI300X"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_gpu_is_found_by_its_usual_names(asked: str, name: str) -> None:
    assert find_gpu(asked).name == name


@given(
    st.sampled_from([(alias, gpu) for gpu in all_gpus() for alias in (gpu.name, *gpu.aliases)]),
    st.sampled_from(["", " ", "_", "-"]),
    st.booleans(),
)
def test_spaces_dashes_and_case_do_not_matter(named: tuple[str, Gpu], separator: str, upper: bool) -> None:
    alias, gpu = named
    respelled = separator.join(alias.replace("-", " ").split())

    assert find_gpu(respelled.upper() if upper else respelled.lower()) is gpu


def test_no_two_gpus_share_a_name() -> None:
    owners: dict[str, str] = {}
    for gpu in all_gpus():
        for alias in (gpu.name, *gpu.aliases):
            assert owners.setdefault(plain(alias), gpu.name) == gpu.name


@pytest.mark.parametrize(("asked", "near"), [("H1000", "H100"), ("rtx 4080", "RTX 4090"), ("A100-80", "A100-80GB")])
def test_an_unknown_gpu_brings_near_names(asked: str, near: str) -> None:
    with pytest.raises(
        UnknownNameError, match=f"unknown GPU '{asked}'; near names: .*{near}.*`advisor gpus` lists all"
    ):
        find_gpu(asked)


@pytest.mark.parametrize("asked", ["", "  ", "NVIDIA", "???"])
def test_a_name_that_says_nothing_is_unknown(asked: str) -> None:
    with pytest.raises(UnknownNameError, match="no name is near"):
        find_gpu(asked)


# 79.15 GiB by torch's out-of-memory messages; 2039 GB/s and 312 TFLOP/s by NVIDIA's data sheet.
def test_units_are_converted_when_read() -> None:
    gpu = find_gpu("A100-80GB")

    assert gpu.memory_bytes == round(79.15 * GIB)
    assert gpu.memory_bandwidth_bytes_per_s == 2039e9
    assert gpu.peak_flop_per_s == {"fp32": 19.5e12, "tf32": 156e12, "fp16": 312e12, "bf16": 312e12}
    assert gpu.power_w == 400


# nvidia-smi shows 275040 MiB on a B300; torch has not been reported.
def test_memory_that_torch_has_not_reported_is_assumed_below_what_the_driver_shows() -> None:
    gpu = find_gpu("B300")

    assert gpu.memory_bytes == 288 * 10**9 < 275040 * 2**20
    assert "memory_bytes" in gpu.assumed_fields


def test_gpus_before_ampere_have_no_bf16() -> None:
    without = {gpu.architecture for gpu in all_gpus() if not gpu.has_bf16}

    assert without == {"Pascal", "Volta", "Turing"}


def test_every_gpu_names_links_that_exist() -> None:
    for gpu in all_gpus():
        assert find_link(gpu.link).kind in ("nvlink", "pcie", "xgmi")
        assert find_link(gpu.host_link).kind == "host"


def test_assumed_fields_are_facts_that_a_gpu_has() -> None:
    facts = {field.name for field in fields(Gpu)} | {"fp32", "tf32", "fp16", "bf16", "fp8"}

    assert all(set(gpu.assumed_fields) <= facts for gpu in all_gpus())


def test_facts_are_of_the_order_of_magnitude_of_gpus() -> None:
    for gpu in all_gpus():
        assert 10 * GIB < gpu.memory_bytes < 300 * GIB
        assert 0.3e12 <= gpu.memory_bandwidth_bytes_per_s <= 8e12
        assert 8e12 <= gpu.peak_flop_per_s["fp32"] <= max(gpu.peak_flop_per_s.values()) <= 5e15
        assert gpu.power_w is None or 70 <= gpu.power_w <= 1400


def test_names_are_listed_without_aliases() -> None:
    assert len(gpu_names()) == len(all_gpus()) == 41
    assert "A100-SXM4-80GB" in gpu_names()
    assert "A100-80GB" not in gpu_names()


def test_a_cell_of_the_wrong_kind_is_located() -> None:
    from pathlib import Path

    from advisor.catalog.table import Row

    row = Row(Path("gpus.csv"), {"name": "T4", "power_w": "70 W", "source": "", "assumed": "maybe"})

    with pytest.raises(ConfigError, match=r"power_w of 'T4' in gpus\.csv must be a number, got '70 W'"):
        row.optional_number("power_w")
    with pytest.raises(ConfigError, match=r"source of 'T4' in gpus\.csv is empty"):
        row.text("source")
    with pytest.raises(ConfigError, match="must be yes or no, got 'maybe'"):
        row.flag("assumed")
