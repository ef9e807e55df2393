"""Sheets say of their plans what each says by itself."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from advisor.catalog.request import resolve

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "search_speed.py"


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARK))


def test_plans_of_wide_sheets_have_the_bytes_and_seconds_that_they_have_by_themselves(
    benchmark: dict[str, Any],
) -> None:
    asked = resolve("Qwen2.5-0.5B", gpus=4)
    sheets = benchmark["combinations"]([1, 6, 16], range(1, 5), range(1, 5))

    found = benchmark["deviation"](asked, sheets, 0.01)

    assert found.plans == len(sheets)
    assert found.other_bytes == 0
    assert found.most_seconds <= benchmark["SAME_SHARE"]
