"""``advisor limits``."""

from __future__ import annotations

import csv
import io
import json

import pytest

from advisor.search import limits as search
from cli.conftest import Run

SMALL = ("limits", "--model", "gpt2", "--gpu", "T4", "--gpus", "1", "--global-batch", "4", "--seq-len", "512")


def test_the_machine_forms_are_one_answer(run: Run) -> None:
    answer = json.loads(run(*SMALL, "--json").stdout)
    rows = list(csv.DictReader(io.StringIO(run(*SMALL, "--csv").stdout)))

    assert answer["schema"] == "advisor/1"
    for found in answer["reaches"]:
        assert found["largest_micro_batch"] == found["largest"]["plan"]["micro_batch"]
        assert found["saturating_micro_batch"] == found["saturated"]["plan"]["micro_batch"]
    assert [found["longest_sequence"] for found in answer["reaches"]] == [
        int(row["seq_len"]) for row in rows if row["answer"] == "longest"
    ]


def test_the_longest_sequence_is_the_headline(run: Run) -> None:
    result = run(*SMALL, columns=70)

    assert result.exit_code == 0
    assert result.stdout.startswith("gpt2 on 1 × T4: sequences of up to ")
    assert max(map(len, result.stdout.splitlines())) <= 70


def test_where_nothing_fits_the_exit_code_is_3(run: Run) -> None:
    result = run("limits", "--model", "Qwen2.5-7B", "--gpu", "T4", "--gpus", "1", "--host-memory", "8")

    assert result.exit_code == 3
    assert result.stdout.startswith("Does not fit: Qwen2.5-7B on 1 × T4")


def test_any_model_asks_for_the_largest(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "model_names", lambda: ["gpt2", "Llama-3.1-70B"])
    words = ("limits", "--model", "any", "--gpu", "T4", "--gpus", "1", "--global-batch", "2", "--seq-len", "128")
    result = run(*words)

    assert result.exit_code == 0
    assert result.stdout.startswith("Largest known model on 1 × T4: gpt2 (124 M) with one GPU")
    assert "The nearest that do not fit: Llama-3.1-70B." in result.stdout
