"""Training with torch.compile, whose effect nothing is fitted to."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "published_times.py"


# pytorch/torchtune README.md bd2a0fc: Llama-3.2-3B on one A100, without compile and with it.
def test_compiling_llama_on_one_gpu_is_as_fast_as_torchtune_says() -> None:
    benchmark = runpy.run_path(str(BENCHMARK))
    eager, compiled, *_ = (row for row in benchmark["runs"]() if row["model"] == "Llama-3.2-3B")
    predicted = [benchmark["predict"](row).tokens_per_s for row in (eager, compiled)]
    published = [float(row["tokens_per_s_per_gpu"]) for row in (eager, compiled)]

    assert (eager["compile"], compiled["compile"], published) == ("", "yes", [7075, 8998])
    assert predicted[1] == pytest.approx(published[1], rel=0.03)
    assert predicted[1] / predicted[0] == pytest.approx(published[1] / published[0], rel=0.07)
