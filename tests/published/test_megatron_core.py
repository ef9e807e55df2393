"""Predicted against what megatron-core's own code holds on a CPU (benchmarks/megatron_core.py keeps the counts)."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "megatron_core.py"))


@pytest.mark.parametrize(("case", "true"), BENCHMARK["cases"](), ids=lambda each: getattr(each, "title", ""))
def test_what_megatron_core_holds_is_predicted_within_a_ten_thousandth(case: Any, true: tuple[int, ...]) -> None:
    assert BENCHMARK["predicted"](case) == pytest.approx(true, rel=1e-4)


def test_every_case_was_run() -> None:
    assert [case for case, _ in BENCHMARK["cases"]()] == BENCHMARK["CASES"]
