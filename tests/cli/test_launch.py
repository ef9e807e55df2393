"""``advisor launch``: what it shows, writes and starts."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from advisor.launch.files import Launch, LaunchFile
from cli.conftest import Api, Run

ONE_PLAN = ("launch", "--model", "Qwen2.5-1.5B", "--gpus", "4", "--strategy", "zero1")


def test_by_default_nothing_is_written(api: Api, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    result = run(*ONE_PLAN)

    assert result.exit_code == 0
    assert result.stdout.startswith("Fits: ")
    assert "--config_file accelerate.yaml" in result.stdout
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_words_of_an_estimate_reach_it(api: Api, run: Run) -> None:
    run(*ONE_PLAN, "--micro-batch", "2", "--checkpointing", "full", "--target", "torchrun", "--json")

    assert api.asked == [
        {
            "model": "Qwen2.5-1.5B",
            "gpus": 4,
            "strategy": "zero1",
            "micro_batch": 2,
            "checkpointing": "full",
        }
    ]


def test_json_is_one_object_with_every_file(api: Api, run: Run) -> None:
    answer = json.loads(run(*ONE_PLAN, "--target", "slurm", "--json").stdout)

    assert answer["schema"] == "advisor/1"
    assert answer["plan"]["strategy"] == "zero1"
    assert answer["launch"]["command"] == ["sbatch", "job.sbatch"]
    assert [file["name"] for file in answer["launch"]["files"]] == [
        "accelerate.yaml",
        "ds_config.json",
        "train.py",
        "train_data.py",
        "train_optimizers.py",
        "train_checkpoint.py",
        "prediction.json",
        "run.sh",
        "job.sbatch",
    ]


def test_the_files_are_written_once_and_the_same_again(api: Api, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = (*ONE_PLAN, "--out", str(out), "--", "--steps=20", "--output=a $(folder)")

    first = run(*words)
    written = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    second = run(*words)

    assert (first.exit_code, second.exit_code) == (0, 0)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == written
    assert b"--steps=20 \\\n  '--output=a $(folder)' \\\n" in written["run.sh"][0]
    assert f"  cd {out} && bash run.sh\n" in first.stdout


def test_files_of_other_content_stay_without_force(api: Api, run: Run, tmp_path: Path) -> None:
    words = (*ONE_PLAN, "--out", str(tmp_path))
    run(*words, "--", "--steps=20")

    refused = run(*words)
    forced = run(*words, "--force")

    assert refused.exit_code == 1
    assert "run.sh exists; give --force to overwrite it" in refused.stderr
    assert forced.exit_code == 0
    assert "--steps=20" not in (tmp_path / "run.sh").read_text()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--run"], "--run starts what lies in a folder; give --out FOLDER too"),
        (["--run", "--out", "x", "--json"], "leave --json out"),
        (["20"], "'20' is no argument and no script; arguments of train.py follow --, such as -- --steps=20"),
        (["--run", "--out", "x", "--", "--log=mine"], "--run keeps the log itself, in log.jsonl; leave --log out"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(api: Api, run: Run, words: list[str], complaint: str) -> None:
    result = run(*ONE_PLAN, *words)

    assert (result.exit_code, result.stdout) == (2, "")
    assert complaint in result.stderr
    assert api.asked == []


def test_a_plan_that_does_not_fit_is_written_with_a_warning(api: Api, run: Run, tmp_path: Path) -> None:
    api.estimate = replace(api.estimate, verdict="no", why="3.0 GiB short")

    result = run(*ONE_PLAN, "--out", str(tmp_path))

    assert result.exit_code == 0
    assert result.stderr == "Note: it is predicted not to fit: 3.0 GiB short\n"
    assert (tmp_path / "run.sh").is_file()


STEPS = [
    {"step": number, "tokens_per_s": 56_700.0, "peak_allocated_bytes": 0, "peak_reserved_bytes": 0}
    for number in (1, 2, 3)
]


@pytest.mark.parametrize(
    ("records", "keeps_log", "code", "said"),
    [
        ([{"processes": 2}, *STEPS], True, 0, "beside measured without a GPU over 2 steps"),
        ([], True, 5, "Nothing to compare with the prediction: no step was logged."),
        ([], False, 0, "Nothing to compare with the prediction: only train.py logs what its steps take."),
    ],
)
def test_a_run_is_compared_and_its_exit_code_is_passed_on(
    api: Api,
    run: Run,
    records: list[dict[str, Any]],
    keeps_log: bool,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "steps").write_text("".join(json.dumps(record) + "\n" for record in records))
    script = LaunchFile("run.sh", lambda: f"cat steps >> log.jsonl; exit {code}\n")
    launch = Launch((), {}, (script,), keeps_log=keeps_log)
    monkeypatch.setattr("advisor.launch.files.launch_of", lambda *_, **__: launch)

    result = run(*ONE_PLAN, "--out", str(tmp_path), "--run")

    assert result.exit_code == code
    assert said in result.output


def test_a_script_of_ones_own_gets_its_own_arguments_and_no_more(
    api: Api, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerate = tmp_path / "tools" / "accelerate"
    accelerate.parent.mkdir()
    accelerate.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" > told\n")
    accelerate.chmod(0o755)
    monkeypatch.setenv("PATH", f"{accelerate.parent}{os.pathsep}{os.environ['PATH']}")

    result = run(*ONE_PLAN, "--out", str(tmp_path / "run"), "--run", "--", "my.py", "--log=mine")

    assert result.exit_code == 0
    assert (tmp_path / "run" / "told").read_text().splitlines()[-2:] == ["my.py", "--log=mine"]


@pytest.mark.parametrize(
    ("words", "epoch", "day"),
    [
        ([], "0", "1970-01-01"),
        (["--date", "2026-01-02"], "0", "2026-01-02"),
        (["--date", "2026-01-02"], None, "2026-01-02"),
    ],
)
def test_the_date_of_the_files_can_be_fixed(
    words: list[str], epoch: str | None, day: str, api: Api, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if epoch is not None:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)

    assert f"# Date: {day}." in run(*ONE_PLAN, *words).stdout


def test_a_broken_epoch_is_wrong_usage(api: Api, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")

    result = run(*ONE_PLAN)

    assert result.exit_code == 2
    assert "SOURCE_DATE_EPOCH is 'yesterday', which is no time in seconds; unset it" in result.stderr


def test_what_was_predicted_lies_beside_the_program(api: Api, run: Run, tmp_path: Path) -> None:
    run(*ONE_PLAN, "--out", str(tmp_path))

    prediction = json.loads((tmp_path / "prediction.json").read_text())
    assert prediction["tokens_per_s"] == round(api.estimate.time.tokens_per_s)
    assert prediction["peak_allocated_bytes"] == api.estimate.memory.peak_allocated_bytes
    rate = prediction["tokens_per_s"] / prediction["processes"]
    mfu = rate * prediction["flop_per_token"] / prediction["peak_flop_per_s_per_gpu"]
    assert mfu == pytest.approx(api.estimate.time.mfu, rel=1e-3)
