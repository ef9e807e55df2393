"""This machine measured, and what predictions make of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from advisor.catalog.calibrations import CALIBRATIONS_VARIABLE, find_calibration
from advisor.catalog.gpus import find_gpu
from advisor.cost.compute import rates
from advisor.cost.kernels import product_seconds
from advisor.errors import WriteError
from advisor.step.program import Matmul
from advisor.validation import calibrate as module
from advisor.validation import machine
from advisor.validation.calibrate import Calibrated, _constants, calibrate
from advisor.validation.rates import Rate, read

pytest.importorskip("torch")

H200 = find_gpu("H200")
PRODUCT = Matmul(8192, 8192, 8192)
SCORES = Matmul(4096, 4096, 128, 64, "attention", 0.5, fused="sdpa")
ATTENTION = {"batch": 2, "length": 4096, "heads": 32, "key_value_heads": 8, "head_dim": 128, "number_format": "bf16"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where calibrations go; everything that is measured is small."""
    monkeypatch.setenv(CALIBRATIONS_VARIABLE, str(tmp_path / "own"))
    monkeypatch.setenv("ADVISOR_RECORDS", str(tmp_path / "records.jsonl"))
    for name in ("COPY_BYTES", "ADAM_PARAMETERS"):
        sizes = {"cuda": 2**21, "cpu": 2**20}
        monkeypatch.setattr(machine, name, sizes)
        monkeypatch.setattr(module, name, sizes)
    monkeypatch.setattr(machine, "DISK_BYTES", 2**24)
    monkeypatch.setattr(machine, "CPU_TOKENS", 16)
    monkeypatch.setattr(machine, "PRODUCTS", 2)
    return tmp_path / "own"


def measured(**words: object) -> Calibrated:
    return calibrate(model="SmolLM2-135M", device="cpu", **words)  # type: ignore[arg-type]


def test_a_machine_without_gpu_measures_its_host_and_two_ranks_on_it(folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    found = measured(nvme=str(tmp_path), name="here", tell=lambda what, share: told.append(what))

    assert (found.device, found.gpu, found.skipped) == ("cpu", None, ())
    kinds = {each.kind for each in found.rates}
    assert kinds == {
        *("copy", "adamw", "disk write", "disk read", "product", "attention forward", "attention backward"),
        *("all-reduce", "all-gather", "reduce-scatter"),
    }
    assert all(each.seconds >= each.least_s > 0 for each in found.rates)
    assert told[-1] == "records"
    assert read(folder / "here.rates")[0] == "cpu"

    own, usual = find_calibration("here"), find_calibration()
    copy = next(each for each in found.rates if each.kind == "copy")
    assert own.host_bandwidth_bytes_per_s_per_gpu == pytest.approx(copy.bytes_per_s, rel=1e-3)
    assert own.nvme_bandwidth_bytes_per_s_per_gpu != usual.nvme_bandwidth_bytes_per_s_per_gpu
    assert own.matmul_efficiency == usual.matmul_efficiency
    assert "advisor calibrate" in own.source


def test_what_there_is_no_time_for_is_said(folder: Path) -> None:
    found = measured(budget_s=1e-6)

    assert found.rates == found.constants == ()
    assert "matrix products: 0 s were over" in found.skipped
    assert json.loads(found.path.read_text())["constants"] == {}


def test_a_folder_that_is_not_there_is_skipped_with_its_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "missing"
    monkeypatch.setattr(machine, "CPU_RANKS", 1)
    found = measured(nvme=str(missing), name="here")

    assert any(f"the disk of {missing}" in each and "No such file" in each for each in found.skipped)


def test_a_calibration_that_cannot_be_written_says_so(folder: Path) -> None:
    folder.write_text("a file where the folder would stand")

    with pytest.raises(WriteError, match="ADVISOR_CALIBRATIONS names another folder"):
        measured(budget_s=1e-6)


def rate(kind: str, seconds: float, flop: float = 0.0, moved: float = 0.0, **sizes: int | str) -> Rate:
    return Rate(
        kind=kind,  # type: ignore[arg-type]
        sizes=sizes,
        seconds=seconds,
        least_s=seconds,
        flop=flop,
        moved_bytes=moved,
    )


def test_rates_of_a_gpu_become_the_constants_of_its_generation_and_links() -> None:
    usual = find_calibration()
    truth = replace(
        usual,
        matmul_efficiency={"default": 0.7},
        attention_efficiency={**usual.attention_efficiency, "sdpa, 9.0": (0.6, 0.5)},
        copy_efficiency=0.9,
    )
    at, gradients = rates(H200, "bf16", truth), replace(SCORES, backward=True)
    found = [
        rate("launch", 5e-6),
        rate("copy", 1.0, moved=0.9 * H200.memory_bandwidth_bytes_per_s, size_bytes=machine.COPY_BYTES["cuda"]),
        rate("product", float(product_seconds(PRODUCT, at)), m=8192, n=8192, k=8192),
        rate("attention forward", 2 * float(product_seconds(SCORES, at)) + at.kernel_floor_s, **ATTENTION),
        rate("attention backward", 5 * float(product_seconds(gradients, at)) + at.kernel_floor_s, **ATTENTION),
        rate("host to device", 1.0, moved=5.5e10, memory="pinned"),
        rate("device to host", 1.0, moved=5.2e10, memory="pinned"),
        rate("host to device", 1.0, moved=1e10, memory="pageable"),
        rate("all-gather", 1.0, moved=4e11, size_bytes=2**28),
        rate("all-gather", 1.0, moved=1e9, size_bytes=2**12),
    ]
    constants = {each.name: each.value for each in _constants(found, H200, 8, find_calibration())}

    assert constants == {
        "copy_efficiency": 0.9,
        "bandwidth_efficiency": pytest.approx(usual.bandwidth_efficiency * 0.9 / usual.copy_efficiency, rel=1e-3),
        "kernel_launch_s": 5e-6,
        "matmul_efficiency": {H200.name: 0.7},
        "attention_efficiency": {f"sdpa, {H200.name}": [0.6, 0.5]},
        "link_bandwidth_bytes_per_s": {H200.host_link: 5.2e10, H200.link: 4e11},
    }
