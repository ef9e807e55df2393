"""The table of strategies is of the present model, whole, and names tests that there are."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any, get_args

import pytest

from advisor.specs.job import LossKernel, Method, Optimizer, Precision
from advisor.specs.plan import OWN_STRATEGIES, Checkpointing

ROOT = Path(__file__).parents[2]
CELLS = 9


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "strategies.py"))


def test_the_table_is_that_of_the_present_model_and_has_no_empty_cell(benchmark: dict[str, Any]) -> None:
    lines = list(benchmark["lines"]())
    rows = [line.replace("\\|", "/")[2:-2].split(" | ") for line in lines if line.startswith("| ")]

    assert lines == (ROOT / "benchmarks" / "strategies.md").read_text(encoding="utf-8").splitlines()
    assert all(len(row) == CELLS and all(cell.strip() for cell in row) for row in rows)


def test_what_a_row_is_checked_by_is_a_test(benchmark: dict[str, Any]) -> None:
    for row in benchmark["read"]():
        for name in row.checked:
            file, function = name.split("::")
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            assert function in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}, name


@pytest.mark.parametrize(
    ("flag", "choices"),
    [
        ("--strategy", [each.value for each in OWN_STRATEGIES]),
        ("--method", get_args(Method)),
        ("--optimizer", get_args(Optimizer)),
        ("--precision", get_args(Precision)),
        ("--checkpointing", [each.value for each in Checkpointing if each is not Checkpointing.NONE]),
        ("--loss", [each for each in get_args(LossKernel) if each != "full"]),
    ],
)
def test_every_choice_has_a_row(benchmark: dict[str, Any], flag: str, choices: list[str]) -> None:
    words = " ".join(f"{row.words} " for row in benchmark["read"]())
    usual = {"--method": "full"}

    assert [each for each in choices if f"{flag} {each} " not in words and each != usual.get(flag)] == []
