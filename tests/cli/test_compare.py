from __future__ import annotations

import csv
import io
import json

import pytest

from advisor.cli.compare import compare, counts
from advisor.search.compare import USUAL_COUNTS, USUAL_GPUS_PER_NODE
from cli.conftest import Run

SMALL = ("compare", "--model", "gpt2", "--gpu", "A100", "--gpus", "1,2", "--global-batch", "16", "--seq-len", "128")


def test_the_answer_is_on_stdout_and_the_effort_on_stderr(run: Run) -> None:
    result = run(*SMALL)

    assert result.exit_code == 0
    assert result.stdout.startswith("Fits from 1 × A100-SXM4-80GB on")
    assert result.stderr.startswith("Compared ")
    assert result.stderr.count("\n") == 1


def test_the_machine_forms_are_one_answer(run: Run) -> None:
    answer = json.loads(run(*SMALL, "--json").stdout)
    rows = list(csv.DictReader(io.StringIO(run(*SMALL, "--csv").stdout)))

    assert answer["schema"] == "advisor/1"
    assert [(plan["strategy"], plan["step_s"]) for each in answer["counts"] for plan in each["plans"]] == [
        (row["strategy"], float(row["step_s"])) for row in rows
    ]


def test_where_nothing_fits_the_exit_code_is_3(run: Run) -> None:
    asked = ("--model", "Qwen2.5-7B", "--gpu", "A10", "--gpus", "1", "--global-batch", "1", "--seq-len", "512")
    result = run("compare", *asked)

    assert result.exit_code == 3
    assert result.stdout.startswith("Does not fit")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "1,two"), "'1,two' is no list of GPU counts; give one such as 1,2,4,8"),
        (("--gpus", "0,1"), "at least one GPU"),
        (("--gpus", "12"), "no whole machines of 8"),
        (("--tokens", "10"), "less than the 2,048 of one optimizer step"),
        (("--nodes", "2"), "--nodes"),
    ],
)
def test_what_cannot_be_meant_is_one_line(run: Run, words: tuple[str, ...], said: str) -> None:
    result = run(*SMALL, *words)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_the_defaults_that_help_shows_are_those_that_answer() -> None:
    shown = {each.name: each.default for each in compare.params}

    assert counts(shown["gpus"]) == USUAL_COUNTS
    assert (shown["gpus_per_node"], shown["scaling"]) == (USUAL_GPUS_PER_NODE, "strong")
