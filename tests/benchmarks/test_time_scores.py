"""Step times stand against published runs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scores() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        return runpy.run_path(str(BENCHMARKS / "time_scores.py"))


def test_complete_runs_are_predicted_within_a_few_per_cent(scores: Any) -> None:
    errors = np.abs(np.array([each.ratio for each in scores["complete_runs"]()]) - 1)

    assert errors.size >= 30
    assert np.median(errors) <= 0.08
    assert errors.mean() <= 0.12
    assert np.quantile(errors, 0.9) <= 0.20


def test_no_scored_run_is_one_that_a_constant_comes_from(scores: Any) -> None:
    assert all(not each.row["fitted"] for each in scores["complete_runs"]())
    assert sum(bool(row["fitted"]) for row in scores["scored"]()) == 2


def test_what_would_be_chosen_of_a_sweep_is_the_fastest_or_nearly(scores: Any) -> None:
    found = list(scores["sweeps"]())

    assert np.mean([each.correlation for each in found]) >= 0.9
    assert all(each.chosen_share >= 0.95 for each in found)
