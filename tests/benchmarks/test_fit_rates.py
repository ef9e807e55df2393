"""The calibration's rates of kernels are those that the published measurements give."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advisor.catalog.calibrations import find_calibration
from advisor.catalog.gpus import find_gpu
from advisor.catalog.profiles import profiles_folder

USUAL = find_calibration()
RATES = profiles_folder() / "rates"


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "fit_rates.py"))


@pytest.fixture(scope="module")
def products(benchmark: dict[str, Any]) -> Any:
    rows = benchmark["read"](RATES / "matmul.csv")
    return lambda kind: benchmark["chosen"](rows, kind, "bf16")


def test_shares_of_products_are_those_of_training_shapes(benchmark: dict[str, Any], products: Any) -> None:
    fitted = {name: benchmark["share_of_peak"](each, USUAL) for name, each in products("training shape").items()}

    assert {name: USUAL.linear_share(find_gpu(name)) for name in fitted} == pytest.approx(fitted)


def test_shares_of_attention_are_fitted_by_kernel_and_direction(benchmark: dict[str, Any]) -> None:
    sets = benchmark["fused"](benchmark["read"](RATES / "attention.csv"))
    fitted = {name: benchmark["share_of_peak"](each, USUAL) for name, each in sets.items()}

    for gpu, kernel, fused in (
        ("A100-PCIe-80GB", "flash-attention-2", "sdpa"),
        ("A100-PCIe-80GB", "flash-attention-2", "flash"),
        ("H100-SXM5-80GB", "flash-attention-2", "flash"),
        ("B200-SXM-180GB", "cudnn", "sdpa"),
    ):
        found = [fitted[f"{gpu}, {kernel}, {direction}"] for direction in ("forward", "backward")]
        assert list(USUAL.attention_shares(fused, find_gpu(gpu))) == pytest.approx(found)


def test_products_of_every_size_are_closer_than_by_one_share(benchmark: dict[str, Any], products: Any) -> None:
    bursts = products("short burst")["H100-SXM5-80GB"]

    assert benchmark["fitted_errors"](bursts, USUAL).mean() < 0.08
    assert benchmark["shapeless"](bursts).mean() > 0.3


# Nothing is fitted to the feed-forward blocks.
@pytest.mark.parametrize(("kind", "worst"), [("gated", 0.07), ("norm", 0.06)])
def test_whole_operators_are_near_what_was_published(benchmark: dict[str, Any], kind: str, worst: float) -> None:
    rows = [row for row in benchmark["read"](RATES / "operators.csv") if kind in row["operator"]]
    by = benchmark["grouped"](rows, lambda row: (row["gpu"], row["operator"], row["direction"]))
    errors = [benchmark["operator_errors"](own, USUAL).mean() for _, own in by]

    assert np.max(errors) < worst
