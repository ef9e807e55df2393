"""``advisor estimate --inference``."""

from __future__ import annotations

import csv
import io
import json

import pytest
from rich.cells import cell_len

from cli.conftest import Run

CALL = ("estimate", "--inference", "--model", "Qwen2.5-1.5B", "--gpu", "L4", "--gpus", "1")


@pytest.mark.parametrize("columns", [80, 140])
def test_the_answer_is_on_stdout_and_fits_the_page(run: Run, columns: int) -> None:
    result = run(*CALL, "--weights", "nf4", columns=columns)

    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Fits: ")
    for said in ("largest batch", "longest context", "kv cache", "Peak of each phase of a call of generate", "prompt"):
        assert said in result.stdout
    assert max(map(cell_len, result.stdout.splitlines())) <= columns


def test_the_json_names_the_cache_and_its_bytes(run: Run) -> None:
    answer = json.loads(run(*CALL, "--batch", "2", "--context", "1024", "--json").stdout)

    assert answer["schema"] == "advisor/1"
    assert answer["memory"]["kv_cache_bytes"] == 2 * 1024 * 28 * 2 * 256 * 2
    assert "kv cache" in {line["category"] for line in answer["memory"]["ledger"]}
    assert answer["plan"]["batch"] == 2
    assert answer["verdict"] == "fits"
    assert answer["time"]["decode"]["tokens_per_s"] > 0
    assert {"largest_batch", "longest_context", "inputs", "model", "why", "warnings"} <= answer.keys()


def test_the_csv_is_one_row(run: Run) -> None:
    (row,) = csv.DictReader(io.StringIO(run(*CALL, "--csv").stdout))

    assert row["verdict"] == "fits"
    assert int(row["kv_cache_bytes"]) > 0


def test_what_does_not_fit_exits_with_3(run: Run) -> None:
    result = run("estimate", "--inference", "--model", "Llama-3.1-70B", "--gpu", "L4", "--gpus", "1")

    assert result.exit_code == 3
    assert result.stdout.startswith("Does not fit: ")
    assert "largest batch    none" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--inference", "--strategy", "ddp"), "--strategy: of training; leave it out with --inference"),
        (("--strategy", "ddp", "--batch", "2"), "--batch: of a model that generates; give --inference too"),
        (("--inference", "--weights", "int3"), "Invalid value for '--weights'"),
    ],
)
def test_words_of_the_other_kind_are_wrong_usage(run: Run, words: tuple[str, ...], message: str) -> None:
    result = run("estimate", "--model", "Qwen2.5-1.5B", "--gpus", "1", *words)

    assert result.exit_code == 2
    assert message in result.stderr
