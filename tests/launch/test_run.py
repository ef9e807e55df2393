"""``advisor launch --run``: what it writes, it starts, and what it measured stands beside what it predicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.examples import write_tiny_qwen2

for package in ("torch", "transformers", "accelerate"):
    pytest.importorskip(package)


def test_one_command_from_a_question_to_a_comparison(tmp_path: Path) -> None:
    config = write_tiny_qwen2(tmp_path / "model")
    plan = ("--strategy=ddp", "--micro-batch=2", "--seq-len=32", "--global-batch=4", "--gpus=1", "--precision=fp32")

    words = ("launch", f"--model={config}", *plan, "--gpu=A100-80GB", f"--out={tmp_path / 'run'}", "--run")
    done = subprocess.run(
        [sys.executable, "-m", "advisor", *words, "--", "--steps=3"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    description, *steps = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    predicted = json.loads((tmp_path / "run" / "prediction.json").read_text())["tokens_per_s"]
    assert (description["processes"], description["engine"]) == (1, "Qwen2ForCausalLM")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert "in brackets: what was predicted for 1 x A100-SXM4-80GB" in done.stdout
    assert f"{steps[2]['tokens_per_s']:,.0f} ({predicted:,.0f}) tokens/s" in done.stdout
    *_, last = filter(None, done.stdout.splitlines())
    assert last.split()[:3] == ["tokens", "per", "s"]
    assert "beside measured without a GPU over 2 steps" in done.stdout
