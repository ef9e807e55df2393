"""Predicted against published throughput of real training runs. No rate of compute or links was fitted to them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "published_times.py"


@pytest.fixture(scope="module")
def errors() -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    """Relative errors of the throughput by model family and GPU."""
    benchmark = runpy.run_path(str(BENCHMARK))
    found: dict[tuple[str, str], list[float]] = {}
    for row in benchmark["runs"]():
        ratio = benchmark["Compared"](row, benchmark["predict"](row)).ratio
        found.setdefault((benchmark["family"](row), row["gpu"]), []).append(ratio - 1)
    return {key: np.array(values) for key, values in found.items()}


# mosaicml/llm-foundry scripts/train/benchmarking/README.md 8c8dd48; stas00/ml-engineering
# insights/when-to-upgrade-gpus/README.md 744d01e; pytorch/torchtune README.md bd2a0fc.
@pytest.mark.parametrize(
    ("family", "gpu", "runs", "mean_error"),
    [
        ("MPT", "H100-SXM5-80GB", 70, 0.065),
        ("MPT", "A100-SXM4-80GB", 61, 0.075),
        ("MPT", "A100-SXM4-40GB", 78, 0.105),
        ("Llama-3.1-8B", "H200-SXM-141GB", 7, 0.025),
        ("Llama-3.2-3B", "A100-SXM4-80GB", 4, 0.055),
    ],
)
def test_published_runs_are_predicted_within_a_mean_error(
    errors: dict[tuple[str, str], np.ndarray[Any, Any]], family: str, gpu: str, runs: int, mean_error: float
) -> None:
    found = errors[family, gpu]

    assert found.size == runs
    assert np.abs(found).mean() < mean_error


# Korthikanti et al., arXiv:2205.05198, table 5: 22 B to 1 T parameters on 8 to 512 A100, by tensor and pipeline
# parallelism, recomputed in full or, with sequence parallelism, selectively.
def test_the_runs_of_megatron_s_paper_are_predicted_within_a_mean_error() -> None:
    benchmark = runpy.run_path(str(BENCHMARK))
    rows = [row for row in benchmark["megatron_runs"]() if row["model"] != "gpt3_7b"]

    errors = np.array([abs(benchmark["Compared"](row, benchmark["predict"](row)).ratio - 1) for row in rows])

    assert errors.size == 8
    assert errors.mean() < 0.07
    assert errors.max() < 0.12
