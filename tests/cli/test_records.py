"""``advisor records`` over a file of records, and the package's own."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from validation.test_store import made

from advisor.specs.plan import Strategy
from advisor.validation.outcome import Outcome
from advisor.validation.store import append
from cli.conftest import Run


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "records.jsonl"
    monkeypatch.setenv("ADVISOR_RECORDS", str(found))
    return found


def test_without_records_it_says_how_to_make_some(run: Run, path: Path) -> None:
    result = run("records")

    assert (result.exit_code, result.stdout) == (0, "")
    assert "advisor validate" in result.stderr


def test_records_are_listed_filtered_and_exported(run: Run, path: Path) -> None:
    append(made(), path)
    append(made(outcome=Outcome("crashed", ("no",)), strategy=Strategy.ZERO1), path)

    listed = run("records", columns=120).stdout
    rows = list(csv.DictReader(io.StringIO(run("records", "--csv").stdout)))
    crashed = json.loads(run("records", "--outcome", "crashed", "--json").stdout)["records"]

    assert len(listed.splitlines()) == 5  # two of the header, a rule, two records
    assert [row["outcome"] for row in rows] == ["ran", "crashed"]
    assert [row["strategy"] for row in crashed] == ["zero1"]
    assert crashed[0]["last_line"] == "no"


def test_a_line_that_is_no_record_is_noted(run: Run, path: Path) -> None:
    path.write_text("nonsense\n")

    assert f"Note: left out: {path}:1 is no record" in run("records").stderr


def test_own_and_shipped_records_are_compared_together(run: Run, path: Path) -> None:
    append(made(), path)

    def count(*words: str) -> int:
        scores = json.loads(run("records", "compare", "--strategy", "zero2", *words, "--json").stdout)["scores"]
        return int(sum(each["count"] for each in scores if each["counter"] == "peak"))

    assert count() == count("--from", "shipped") + count("--from", "own")
    assert count("--from", "own") == 1


def test_the_comparison_names_the_worst(run: Run, path: Path) -> None:
    result = run("records", "compare", "--strategy", "zero1")

    assert result.exit_code == 0, result.stderr
    assert "The worst peak of each" in result.stdout
    assert "ZeRO-1" in result.stdout
