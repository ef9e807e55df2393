"""Training with torch.compile, whose effect nothing is fitted to."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from advisor.specs.job import Job

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "published_times.py"


# pytorch/torchtune README.md bd2a0fc: Llama-3.2-3B on one A100, without compile and with it.
def test_compiling_llama_on_one_gpu_is_as_fast_as_torchtune_says() -> None:
    benchmark = runpy.run_path(str(BENCHMARK))
    row = next(row for row in benchmark["runs"]() if row["model"] == "Llama-3.2-3B")
    predict = benchmark["predict"]
    eager = predict(row).tokens_per_s
    predict.__globals__["Job"] = lambda **words: replace(Job(**words), compile=True)
    compiled = predict(row).tokens_per_s

    assert float(row["tokens_per_s_per_gpu"]) == 7075
    assert compiled == pytest.approx(8998, rel=0.03)
    assert compiled / eager == pytest.approx(8998 / 7075, rel=0.07)
