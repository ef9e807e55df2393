from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from advisor.cost.results import Verdict
from cli.conftest import Api, Run

ONE_PLAN = ("estimate", "--model", "Qwen2.5-1.5B", "--gpus", "4", "--strategy", "zero1")


@pytest.mark.parametrize("columns", [80, 140])
def test_the_estimate_is_on_stdout_and_fits_the_page(api: Api, run: Run, columns: int) -> None:
    result = run(*ONE_PLAN, columns=columns)

    assert result.exit_code == 0
    assert result.stdout.startswith("Fits: ")
    assert max(map(cell_len, result.stdout.splitlines())) <= columns
    assert result.stderr == ""


@pytest.mark.parametrize(("verdict", "code"), [("fits", 0), ("tight", 0), ("no", 3)])
@pytest.mark.parametrize("form", ["", "--json", "--csv"])
def test_the_exit_code_is_the_verdict(api: Api, run: Run, verdict: Verdict, code: int, form: str) -> None:
    api.estimate = replace(api.estimate, verdict=verdict)

    assert run(*ONE_PLAN, *filter(None, [form])).exit_code == code


def test_every_word_of_a_plan_reaches_the_estimate(api: Api, run: Run) -> None:
    words = "--offload optimizer --micro-batch 2 --grad-accum 8 --checkpointing full --bucket-size 5e8 --fsdp-version 1"

    run(*ONE_PLAN[:-1], "zero2", *words.split())

    assert api.asked == [
        {
            "model": "Qwen2.5-1.5B",
            "gpus": 4,
            "strategy": "zero2",
            "offload": "optimizer",
            "micro_batch": 2,
            "grad_accum": 8,
            "checkpointing": "full",
            "bucket_size": 500_000_000,
            "fsdp_version": 1,
        }
    ]


def test_megatron_s_words_reach_the_estimate(api: Api, run: Run) -> None:
    words = "--trainer megatron --tp 2 --pp 2 --vpp 7 --cp 1 --cp-comm-type a2a --ep 2 --etp 1 --sequence-parallel"
    words += " --decoder-first-pipeline-num-layers 1"

    run(*ONE_PLAN[:5], *words.split())

    assert api.asked == [
        {
            "model": "Qwen2.5-1.5B",
            "gpus": 4,
            "trainer": "megatron",
            "tp": 2,
            "pp": 2,
            "vpp": 7,
            "decoder_first_pipeline_num_layers": 1,
            "cp": 1,
            "cp_comm_type": "a2a",
            "ep": 2,
            "etp": 1,
            "sequence_parallel": True,
        }
    ]


@pytest.mark.parametrize(("said", "heard"), [("2000", 2000.0), ("/mnt/nvme", "/mnt/nvme")])
def test_an_nvme_is_gib_or_a_folder(api: Api, run: Run, said: str, heard: float | str) -> None:
    run(*ONE_PLAN[:-1], "zero3", "--offload", "optimizer", "--offload-to", "nvme", "--nvme", said)

    assert (api.asked[0]["offload_to"], api.asked[0]["nvme"]) == ("nvme", heard)


def test_json_is_one_object_and_nothing_else(api: Api, run: Run) -> None:
    result = run(*ONE_PLAN, "--json")

    assert json.loads(result.stdout)["plan"]["strategy"] == "zero1"
    assert result.stderr == ""


def test_csv_has_one_row(api: Api, run: Run) -> None:
    (row,) = csv.DictReader(io.StringIO(run(*ONE_PLAN, "--csv").stdout))

    assert int(row["device_used_bytes"]) == api.estimate.memory.device_used_bytes


@pytest.mark.parametrize("size", ["1.5", "many"])
def test_a_bucket_of_no_whole_size_is_refused(api: Api, run: Run, size: str) -> None:
    result = run(*ONE_PLAN, "--bucket-size", size)

    assert result.exit_code == 2
    assert "500000000 or 5e8" in result.stderr


def test_a_strategy_or_a_file_is_required_and_the_choices_are_named(run: Run) -> None:
    result = run(*ONE_PLAN[:-2])

    assert result.exit_code == 2
    assert "give --strategy (ddp, " in result.stderr
    assert "zero3++), or --config" in result.stderr


def test_a_configuration_takes_the_place_of_the_plan_s_flags(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"train_batch_size": 8, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}))
    asked = ("estimate", "--model", "Qwen2.5-1.5B", "--gpu", "A100-80GB", "--gpus", "4", "--config", str(config))

    page = run(*asked, "--micro-batch", "1", columns=300)
    answer = json.loads(run(*asked, "--json").stdout)

    assert "strategy zero2 (ds.json: zero_optimization.stage)" in page.stdout
    assert "By default: reduce-bucket 500000000 (DeepSpeed's default)" in page.stdout
    assert answer["plan"]["micro_batch"] == 2
    assert answer["inputs"]["strategy"] == {
        "value": "zero2",
        "origin": "file",
        "source": "ds.json: zero_optimization.stage",
    }


def test_a_configuration_with_an_error_is_told_in_one_line(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text('{"zero_optimization": {"stage": "two"}}')

    result = run("estimate", "--model", "Qwen2.5-1.5B", "--config", str(config))

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: ds.json: zero_optimization.stage must be a whole number of at least 0, got 'two'\n"
