"""The command line with the real search, estimate and catalog behind it."""

from __future__ import annotations

import json
import shlex
from typing import Any

import click
import pytest
from report.test_machine import ESTIMATE_FIELDS, LEDGER_CATEGORIES, RECOMMENDATION_FIELDS
from rich.cells import cell_len

from advisor.cli.main import EXAMPLES, cli
from cli.conftest import Run

MAIN_JOB = ("recommend", "--model", "Qwen2.5-1.5B", "--gpus", "4", "--gpu", "A100")
ONE_PLAN = ("estimate", *MAIN_JOB[1:], "--strategy", "zero2")
TOO_LARGE = ("recommend", "--model", "Llama-3.1-70B", "--gpus", "8", "--gpu", "A100-80GB")


def answer(run: Run, *words: str) -> Any:
    return json.loads(run(*words, "--json").stdout)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_help_run(run: Run, example: str) -> None:
    result = run(*shlex.split(example)[1:])

    assert result.exit_code == 0
    assert result.stdout


@pytest.mark.parametrize("columns", [60, 80, 100, 140])
@pytest.mark.parametrize("words", [MAIN_JOB, ONE_PLAN, TOO_LARGE, ("models",), ("gpus",), ("clusters",)])
def test_answers_fit_the_page(run: Run, words: tuple[str, ...], columns: int) -> None:
    lines = run(*words, columns=columns).stdout.splitlines()

    assert [line for line in lines if cell_len(line) > columns] == []
    assert [line for line in lines if "…" in line or line != line.rstrip()] == []


def test_a_recommendation_is_whole(run: Run) -> None:
    found = answer(run, *MAIN_JOB)

    assert found.keys() >= RECOMMENDATION_FIELDS
    assert found["best"]["plan"]["gpus"] == 4
    assert found["inputs"]["gpus"] == {"value": 4, "origin": "given"}
    assert found["inputs"]["seq_len"]["origin"] == "assumed"
    assert {file["name"] for file in found["launch"]["files"]} >= {"run.sh", "train.py", "accelerate.yaml"}
    for each in found["plans"]:
        assert all((each[part] if part else each).keys() >= fields for part, fields in ESTIMATE_FIELDS.items())


def test_a_cluster_says_what_it_brings(run: Run) -> None:
    words = ("estimate", "--model", "Qwen2.5-0.5B", "--cluster", "p5", "--nodes", "2", "--strategy", "zero2")
    found = answer(run, *words)["inputs"]

    assert found["cluster"] == {"value": "p5.48xlarge", "origin": "given"}
    assert found["gpus"] == {"value": 16, "origin": "file", "source": "cluster p5.48xlarge"}
    assert found["network"] == {"value": "efa", "origin": "file", "source": "cluster p5.48xlarge"}


def test_an_estimate_is_whole(run: Run) -> None:
    found = answer(run, *ONE_PLAN)

    assert all((found[part] if part else found).keys() >= fields for part, fields in ESTIMATE_FIELDS.items())
    assert {line["category"] for line in found["memory"]["ledger"]} <= LEDGER_CATEGORIES
    assert sum(line["bytes"] for line in found["memory"]["ledger"]) == found["memory"]["peak_allocated_bytes"]


def test_the_plan_that_wins_is_priced_alike_by_estimate(run: Run) -> None:
    best = answer(run, *MAIN_JOB)["best"]
    plan = best["plan"]
    words = ("strategy", "offload", "micro_batch", "grad_accum", "checkpointing")

    priced = answer(run, "estimate", *MAIN_JOB[1:], *(f"--{word}={plan[word]}" for word in words))

    assert priced["memory"] == best["memory"]
    assert priced["time"] == best["time"]


@pytest.mark.parametrize("words", [MAIN_JOB, ONE_PLAN])
def test_the_defaults_that_help_shows_are_those_that_answer(run: Run, words: tuple[str, ...]) -> None:
    command = cli.get_command(click.Context(cli), words[0])
    assert command
    shown = [
        f"{each.opts[0]}={each.default}"
        for each in command.params
        if isinstance(each, click.Option) and each.show_default and each.opts[0] not in words
    ]

    typed, silent = answer(run, *words, *shown), answer(run, *words)

    for found in (typed, silent):
        del found["inputs"]
        for part in (*found.pop("plans", []), found.pop("best", {})):
            part.pop("inputs", None)
        found.pop("seconds", None)
        found.pop("launch", None)
    assert len(shown) >= 7
    assert typed == silent


def test_where_nothing_fits_the_shortfall_and_the_fewest_gpus_are_said(run: Run) -> None:
    result = run(*TOO_LARGE, columns=200)
    found = answer(run, *TOO_LARGE)

    assert result.exit_code == 3
    assert "short" in result.stdout.splitlines()[0]
    assert found["best"] is None
    assert f"{found['fewest_gpus']} GPUs" in result.stdout.splitlines()[0]
    assert all(each["why"] for each in found["rejected"])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--model", "Qwen2.5-1.6B", "--gpus", "1"), 2, "Qwen2.5-1.5B"),
        (("--model", "gpt2", "--gpu", "A101", "--gpus", "1"), 2, "A100"),
        (("--model", "gpt2", "--gpus", "0"), 2, "at least one GPU"),
        (("--model", "gpt2", "--gpus", "6", "--nodes", "4"), 2, "6 GPUs do not divide over 4 machines"),
        (("--model", "gpt2", "--gpus", "1", "--seq-len", "0"), 2, "at least 1"),
        (("--model", "gpt2", "--gpus", "1", "--gpu", "T4", "--precision", "bf16"), 2, "no bf16"),
        (("--model", "no/such/folder", "--gpus", "1"), 2, "no/such/folder"),
        (("--model", "gpt2", "--gpus", "1", "--tokens", "1000"), 2, "less than the 131,072 of one optimizer step"),
        (("--model", "gpt2", "--gpus", "1", "--tokens", "-5"), 2, "--tokens must be a positive number"),
        (("--model", "gpt2", "--gpus", "1", "--tokens", "1e9", "--price", "-1"), 2, "--price must be a positive"),
        (("--model", "gpt2", "--gpus", "1", "--max-hours", "3"), 2, "give --tokens"),
        (("--model", "gpt2", "--gpus", "1", "--tokens", "1e9", "--samples", "1e6"), 2, "give one"),
    ],
)
@pytest.mark.parametrize("command", ["recommend", "estimate"])
def test_bad_input_is_one_line_that_says_what_to_do(
    run: Run, command: str, words: tuple[str, ...], code: int, said: str
) -> None:
    result = run(command, *words, *(("--strategy", "ddp") if command == "estimate" else ()))

    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


@pytest.mark.parametrize("words", [MAIN_JOB, ONE_PLAN])
def test_beyond_a_limit_is_an_answer_with_its_exit_code(run: Run, words: tuple[str, ...]) -> None:
    result = run(*words, "--tokens", "1e9", "--max-hours", "1", columns=300)

    assert result.exit_code == 3
    assert "h beyond --max-hours 1" in result.stdout.splitlines()[0]


def test_a_sequence_beyond_the_model_is_a_note(run: Run) -> None:
    result = run("recommend", "--model", "gpt2", "--gpus", "1", "--seq-len", "2048", "--json")

    assert result.stderr.startswith("Note: ")
    assert "1024" in result.stderr.replace(",", "")
    assert json.loads(result.stdout)["warnings"]
