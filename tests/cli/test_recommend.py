from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from report.samples import made_refusal
from rich.cells import cell_len

from advisor.errors import SpecError, UnknownNameError
from cli.conftest import Api, Run

MAIN_JOB = ("recommend", "--model", "Qwen2.5-1.5B", "--gpus", "4")


@pytest.mark.parametrize("columns", [80, 140])
def test_the_answer_is_on_stdout_and_fits_the_page(api: Api, run: Run, columns: int) -> None:
    result = run(*MAIN_JOB, columns=columns)

    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == api.recommendation.headline[:columns].rsplit(" ", columns < 100)[0]
    assert max(map(cell_len, result.stdout.splitlines())) <= columns
    assert result.stderr == "Compared 1,480 plans in 0.04 s.\n"


def test_only_what_was_typed_counts_as_given(api: Api, run: Run) -> None:
    run(*MAIN_JOB, "--margin", "10%")

    assert api.asked == [{"model": "Qwen2.5-1.5B", "gpus": 4, "margin": 0.1}]


def test_a_default_that_was_typed_counts_as_given(api: Api, run: Run) -> None:
    run(*MAIN_JOB, "--seq-len", "2048")

    assert api.asked[0]["seq_len"] == 2048


def test_every_word_of_a_question_reaches_the_search(api: Api, run: Run) -> None:
    words = {
        "--nodes": "2",
        "--gpu": "H100",
        "--link": "nvlink4",
        "--network": "ib-ndr",
        "--host-memory": "512.5",
        "--seq-len": "4096",
        "--global-batch": "128",
        "--precision": "bf16",
        "--param-dtype": "bf16",
        "--optimizer": "adamw-foreach",
        "--attention": "flash",
        "--loss": "full",
        "--margin": "auto",
    }

    run(*MAIN_JOB, "--compile", "--padded", *(word for pair in words.items() for word in pair))

    assert api.asked == [
        {
            "model": "Qwen2.5-1.5B",
            "gpus": 4,
            "nodes": 2,
            "gpu": "H100",
            "link": "nvlink4",
            "network": "ib-ndr",
            "host_memory": 512.5,
            "seq_len": 4096,
            "global_batch": 128,
            "precision": "bf16",
            "param_dtype": "bf16",
            "optimizer": "adamw-foreach",
            "attention": "flash",
            "loss": "full",
            "compile": True,
            "padded": True,
            "margin": "auto",
        }
    ]


def test_json_is_one_object_and_nothing_else(api: Api, run: Run) -> None:
    result = run(*MAIN_JOB, "--json")

    answer = json.loads(result.stdout)
    assert result.exit_code == 0
    assert answer["schema"] == "advisor/1"
    assert answer["best"]["plan"]["strategy"] == "zero1"
    assert answer["launch"]["files"]
    assert result.stderr == ""


def test_csv_has_one_row_per_plan(api: Api, run: Run) -> None:
    result = run(*MAIN_JOB, "--csv")

    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["strategy"] for row in rows] == [plan.plan.strategy.value for plan in api.recommendation.plans]
    assert result.stderr == ""


def test_json_and_csv_together_are_refused(api: Api, run: Run) -> None:
    result = run(*MAIN_JOB, "--json", "--csv")

    assert result.exit_code == 2
    assert "give one of them" in result.stderr
    assert api.asked == []


def test_warnings_are_notes_on_stderr_each_once(api: Api, run: Run) -> None:
    api.recommendation = replace(api.recommendation, warnings=("sequence too long", "sequence too long"))

    result = run(*MAIN_JOB, "--json")

    assert result.stderr == "Note: sequence too long\n"
    assert json.loads(result.stdout)["warnings"] == ["sequence too long", "sequence too long"]


def test_where_nothing_fits_the_exit_code_is_3_and_the_shortfall_is_said(api: Api, run: Run) -> None:
    api.recommendation = made_refusal()

    result = run(*MAIN_JOB)

    assert result.exit_code == 3
    assert result.stdout.startswith("No: nothing fits on 4 A100-80GB; the nearest plan is short by 12.3 GiB.")
    assert "8 GPUs" in result.stdout


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_where_nothing_fits_machine_forms_say_so_on_stderr_too(api: Api, run: Run, form: str) -> None:
    api.recommendation = made_refusal()

    result = run(*MAIN_JOB, form)

    assert result.exit_code == 3
    assert result.stderr == f"{api.recommendation.headline}\n"
    assert result.stdout == "" if form == "--csv" else json.loads(result.stdout)["best"] is None


def test_out_writes_the_launch_files_and_says_how_to_start_them(api: Api, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    result = run(*MAIN_JOB, "--out", str(folder), columns=200)

    assert result.exit_code == 0
    assert {"accelerate.yaml", "train.py", "run.sh"} <= {path.name for path in folder.iterdir()}
    assert f"bash {folder / 'run.sh'}" in result.stdout


def test_files_are_overwritten_only_by_force(api: Api, run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("mine")

    refused = run(*MAIN_JOB, "--out", str(tmp_path))

    assert refused.exit_code == 1
    assert refused.stdout == ""
    assert refused.stderr.startswith("Error: ")
    assert "--force" in refused.stderr
    assert (tmp_path / "run.sh").read_text() == "mine"

    assert run(*MAIN_JOB, "--out", str(tmp_path), "--force").exit_code == 0
    assert (tmp_path / "run.sh").read_text() != "mine"


def test_nothing_is_written_where_nothing_fits(api: Api, run: Run, tmp_path: Path) -> None:
    api.recommendation = made_refusal()

    result = run(*MAIN_JOB, "--out", str(tmp_path / "run"))

    assert "Nothing is written" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SpecError("6 GPUs do not divide over 4 machines; give a multiple of 4, such as 8"), 2),
        (UnknownNameError("no model 'Qwen9'; near: Qwen3-8B"), 2),
    ],
)
def test_a_refusal_from_below_is_one_line_with_its_exit_code(api: Api, run: Run, error: Exception, code: int) -> None:
    api.error = error

    result = run(*MAIN_JOB)

    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"Error: {error}\n")


def test_an_interrupt_ends_with_one_line(api: Api, run: Run) -> None:
    api.error = KeyboardInterrupt()

    result = run(*MAIN_JOB)

    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Error: interrupted\n")


def test_a_model_is_required(api: Api, run: Run) -> None:
    result = run("recommend")

    assert result.exit_code == 2
    assert "--model" in result.stderr


@pytest.mark.parametrize("share", ["110%", "-0.1", "much"])
def test_a_margin_that_is_no_share_is_refused(api: Api, run: Run, share: str) -> None:
    result = run(*MAIN_JOB, f"--margin={share}")

    assert result.exit_code == 2
    assert "such as 0.1 or 10%" in result.stderr


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["--tokens", "1e9"], {"tokens": 10**9}),
        (["--tokens", "300B"], {"tokens": 300 * 10**9}),
        (["--tokens", "2.3b"], {"tokens": 2_300_000_000}),
        (["--samples", "50k", "--epochs", "1.5"], {"samples": 50_000, "epochs": 1.5}),
        (["--tokens", "5", "--price", "2.5"], {"tokens": 5, "price": 2.5}),
        (["--tokens", "5", "--price", "AWS"], {"tokens": 5, "price": "AWS"}),
        (["--max-hours", "24", "--max-cost", "1e3"], {"max_hours": 24.0, "max_cost": 1000.0}),
        (["--objective", "memory", "--pareto"], {"objective": "memory", "pareto": True}),
    ],
)
def test_what_a_training_may_take_reaches_the_search(
    api: Api, run: Run, flags: list[str], asked: dict[str, object]
) -> None:
    run(*MAIN_JOB, *flags)

    assert api.asked == [{"model": "Qwen2.5-1.5B", "gpus": 4, **asked}]


@pytest.mark.parametrize("number", ["many", "1.5", "1e-3", "nan", "inf", "B", ""])
def test_what_is_no_number_of_tokens_is_refused(api: Api, run: Run, number: str) -> None:
    result = run(*MAIN_JOB, f"--tokens={number}")

    assert result.exit_code == 2
    assert "give one such as 1000000, 1e9 or 300B" in result.stderr
    assert api.asked == []


def test_any_gpu_asks_for_a_ranking_of_all(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("advisor.search.gpu_types.priced_gpus", lambda provider: ("RTX 4090", "A40"))
    asked = ("recommend", "--model", "gpt2", "--gpus", "1", "--seq-len", "256", "--global-batch", "8", "--gpu", "Any")

    answer = json.loads(run(*asked, "--json").stdout)
    page = run(*asked, "--out", str(tmp_path / "run"), columns=120)
    rows = list(csv.DictReader(io.StringIO(run(*asked, "--csv").stdout)))

    assert [each["gpu"] for each in answer["gpus"]] == [row["gpu"] for row in rows] == ["RTX 4090", "A40"]
    assert answer["launch"]["files"]
    assert page.stdout.startswith("Fastest: 1 × RTX 4090")
    assert (tmp_path / "run" / "run.sh").is_file()


def test_no_one_price_holds_for_any_gpu(run: Run) -> None:
    result = run("recommend", "--model", "gpt2", "--gpus", "1", "--gpu", "any", "--tokens", "1e9", "--price", "2")

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: --price 2 cannot hold for every GPU")
