"""``advisor trace`` and ``--trace``, run for real on small models."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from advisor.errors import SpecError
from advisor.validation.traced import trace
from cli.conftest import Run

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
WORDS = ("--gpu", "A100-80GB", "--gpus", "1", "--seq-len", "64", "--global-batch", "2")


@pytest.fixture
def small(tmp_path: Path) -> str:
    pytest.importorskip("transformers")
    return config_in(tmp_path, model_type="qwen2")


def config_in(folder: Path, **fields: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(LLAMA_LIKE | fields))
    return str(path)


def test_predicted_and_traced_stand_side_by_side(small: str, run: Run) -> None:
    result = run("trace", "--model", small, "--strategy", "ddp", *WORDS)

    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("Traced: ")
    assert "highest of all" in result.stdout
    assert "Traced in " in result.stderr


def test_json_and_csv_say_the_same(small: str, run: Run) -> None:
    words = ("trace", "--model", small, "--strategy", "fsdp", *WORDS[:3], "2", *WORDS[4:])
    found = json.loads(run(*words, "--json").stdout)
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(run(*words, "--csv").stdout))}

    for each in found["phases"]:
        assert int(rows[each["phase"]]["traced_bytes"]) == each["traced_bytes"]
        assert each["error"] == pytest.approx(0, abs=0.02)


def test_of_a_family_without_formulas_only_the_states_are_predicted(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("transformers")
    config = config_in(tmp_path, model_type="stablelm")
    result = run("trace", "--model", config, "--strategy", "ddp", *WORDS, "--json")
    phases = {each["phase"]: each for each in json.loads(result.stdout)["phases"]}

    assert "no formula is known for family stablelm" in result.stderr
    assert phases["between steps"]["error"] == pytest.approx(0, abs=1e-3)
    assert phases["peak"]["predicted_bytes"] is None
    assert phases["peak"]["traced_bytes"] > phases["between steps"]["traced_bytes"]


def test_an_estimate_of_a_family_without_formulas_is_traced(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("transformers")
    words = ("estimate", "--model", config_in(tmp_path, model_type="stablelm"), "--strategy", "ddp", *WORDS)
    refused = run(*words)
    answered = run(*words, "--trace", "--json")

    assert refused.exit_code == 1
    assert "--trace runs their code" in refused.stderr
    assert answered.exit_code == 0, answered.stderr
    found = json.loads(answered.stdout)
    assert found["inputs"]["layers"] == {"value": "traced", "origin": "given"}
    assert any("was traced" in warning for warning in found["warnings"])


def test_without_torch_it_says_what_to_install(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run("trace", "--model", config_in(tmp_path, model_type="qwen2"), "--strategy", "ddp", *WORDS)

    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "Error: advisor trace needs torch and transformers (torch is missing); pip install 'advisor[run]'"
    ]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("trace --model gpt2 --gpus 2 --strategy ddp", "advisor trace"),
        ("validate --model gpt2 --gpus 2 --strategy ddp", "advisor validate"),
        ("recommend --model gpt2 --gpus 2 --trace", "tracing a model"),
        ("estimate --model gpt2 --gpus 2 --strategy ddp --trace", "tracing a model"),
    ],
)
def test_where_torch_never_was_no_command_fails_on_its_way_to_say_so(words: str, what: str) -> None:
    program = "import sys; sys.modules['torch'] = None\nfrom advisor.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", program, *words.split()], capture_output=True, text=True, check=False
    )

    needed = f"Error: {what} needs torch and transformers (torch is missing); pip install 'advisor[run]'\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", needed)


def test_a_model_too_large_for_this_machine_is_refused_with_the_sum(
    small: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advisor.validation.room.available_bytes", lambda: 2**20)
    result = run("trace", "--model", small, "--strategy", "zero2", *WORDS)

    assert result.exit_code == 1
    assert "GiB available" in result.stderr
    assert "ZeRO-2 is traced on real tensors" in result.stderr


def test_with_offload_device_and_host_are_counted_together(small: str, run: Run) -> None:
    pytest.importorskip("deepspeed")
    words = ("trace", "--model", small, "--strategy", "zero1", "--offload", "optimizer", *WORDS, "--json")
    result = run(*words)
    phases = {each["phase"]: each for each in json.loads(result.stdout)["phases"]}

    assert "device and host are one memory here" in result.stderr
    assert phases["between steps"]["predicted_bytes"] == phases["between steps"]["traced_bytes"]
    assert phases["peak"]["error"] == pytest.approx(0, abs=0.01)


def test_a_rank_that_the_plan_does_not_have_is_wrong_usage(small: str, run: Run) -> None:
    result = run("trace", "--model", small, "--strategy", "ddp", *WORDS, "--rank", "1")

    assert result.exit_code == 2
    assert "--rank must be 0 to 0" in result.stderr


def test_megatron_s_code_is_not_traced() -> None:
    with pytest.raises(SpecError, match="Megatron-LM's own code is not traced"):
        trace("Qwen2.5-0.5B", trainer="megatron", gpus=1, gpu="A100-80GB")
