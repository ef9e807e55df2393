"""The ranges of step times are those that published runs give."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from advisor.catalog.calibrations import find_calibration

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_default_calibration_holds_what_the_benchmark_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    benchmark = runpy.run_path(str(BENCHMARKS / "fit_ranges.py"))

    found = benchmark["residuals"]()

    assert find_calibration().time_ranges == benchmark["rounded"](found)
    assert "93.1% contained (n 106" in benchmark["alike"](found)
