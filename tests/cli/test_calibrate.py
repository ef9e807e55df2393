"""``advisor calibrate`` as it is typed."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from advisor.catalog.calibrations import CALIBRATIONS_VARIABLE
from cli.conftest import Run

pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration of the host's memory alone."""
    from advisor.validation import calibrate, machine

    monkeypatch.setenv(CALIBRATIONS_VARIABLE, str(tmp_path))
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(calibrate, "COPY_BYTES", {"cpu": 2**20})
    every = machine.sections

    def first(*words: object) -> list[machine.Section]:
        return [next(iter(every(*words)))]  # type: ignore[arg-type]

    monkeypatch.setattr(calibrate, "sections", first)


def test_the_page_names_constants_rates_and_the_file(run: Run, tmp_path: Path) -> None:
    result = run("calibrate", "--device", "cpu", columns=100)

    assert result.exit_code == 0
    assert "Calibrated cpu" in result.stdout
    assert "host_bandwidth_bytes_per_s_per_gpu" in result.stdout
    assert "host.json" in result.stdout.replace("\n", "")
    assert "Measuring: host memory" in result.stderr


def test_json_is_one_object_and_csv_has_a_row_for_each_rate(run: Run) -> None:
    found = json.loads(run("calibrate", "--device", "cpu", "--json").stdout)
    rows = list(csv.DictReader(io.StringIO(run("calibrate", "--device", "cpu", "--csv").stdout)))

    assert found["schema"] == "advisor/1"
    assert [each["kind"] for each in found["rates"]] == ["copy"] == [each["kind"] for each in rows]
    assert set(found["constants"]) == {"host_bandwidth_bytes_per_s_per_gpu"}


def test_a_prediction_says_which_calibration_it_used(run: Run) -> None:
    run("calibrate", "--device", "cpu", "--name", "node7")
    words = ("estimate", "--model", "Qwen2.5-0.5B", "--gpus", "2", "--gpu", "H100", "--strategy", "ddp", "--json")

    inputs = json.loads(run(*words, "--calibration", "node7").stdout)["inputs"]
    assert inputs["calibration"] == {"value": "node7", "origin": "given"}
    assert json.loads(run(*words).stdout)["inputs"]["calibration"]["value"] == "default"
