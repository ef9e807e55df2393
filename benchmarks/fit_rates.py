"""Fits the rates of matrix products and attention to published measurements, and says how far off they are.

    python benchmarks/fit_rates.py

Reads profiles/rates/. One constant per GPU is fitted (least mean absolute relative error of the time), by the formula
of ``advisor.cost.compute``; the share of memory bandwidth is the calibration's. Prints the constant with its error on
the shapes it was fitted to, on held-out shapes (fitted to every other row, tested on the rest), and with the GPU left
out altogether, where it gets the mean of the other GPUs' constants.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from advisor.catalog.calibrations import find_calibration
from advisor.catalog.gpus import find_gpu
from advisor.catalog.profiles import profiles_folder
from advisor.cost.compute import Work
from advisor.validation.fitting import Numbers, Timed, errors, share_of_peak

HALF_FORMAT_BYTES = 2


def main() -> None:
    rates_folder = profiles_folder() / "rates"
    print(f"share of memory bandwidth: {find_calibration().bandwidth_efficiency} (from the calibration)")
    usual = report("matrix products, shapes of training steps", products(rates_folder / "matmul.csv", "training shape"))
    report("matrix products, powers of two up to 4096", products(rates_folder / "matmul.csv", "power of two"))
    best = report("matrix products, best shape of each GPU", products(rates_folder / "matmul.csv", "best shape"))
    kept = {name: share / best[name] for name, share in usual.items()}
    listed = ", ".join(f"{name} {share:.2f}" for name, share in kept.items())
    print(f"shapes of training steps over the best shape: {listed}; mean {np.mean(list(kept.values())):.2f}")
    report("fused causal attention", attention(rates_folder / "attention.csv"))


def report(title: str, rows: Iterable[Timed]) -> dict[str, float]:
    """Prints a table of constants and errors; returns the constants by GPU."""
    bandwidth_share, measured = find_calibration().bandwidth_efficiency, list(rows)
    fitted = [share_of_peak(each, bandwidth_share) for each in measured]
    print(f"\n{title}\n{'GPU':18} rows  share   {'fitted':>14}   {'held-out shapes':>15}   {'GPU left out':>14}")
    for index, (each, share) in enumerate(zip(measured, fitted, strict=True)):
        cells = [spread(errors(each, share, bandwidth_share)), "-", "-"]
        if each.seconds.size > 1:
            half = share_of_peak(each.at(slice(0, None, 2)), bandwidth_share)
            cells[1] = spread(errors(each.at(slice(1, None, 2)), half, bandwidth_share))
        others = [other for place, other in enumerate(fitted) if place != index]
        if others:
            cells[2] = spread(errors(each, float(np.mean(others)), bandwidth_share))
        print(
            f"{each.gpu.name:18} {each.seconds.size:4} {share:6.2f}   {cells[0]:>14}   {cells[1]:>15}   {cells[2]:>14}"
        )
    print(f"mean share {np.mean(fitted):.2f}; errors of the time: mean / max")
    return {each.gpu.name: share for each, share in zip(measured, fitted, strict=True)}


def spread(found: Numbers) -> str:
    return f"{100 * found.mean():.1f} / {100 * found.max():.0f} %"


def products(path: Path, kind: str) -> Iterator[Timed]:
    """Matrix products of one *kind*, GPU by GPU."""

    def work(row: dict[str, str]) -> tuple[float, float, float]:
        m, n, k = (float(row[name]) for name in "mnk")
        written = float(row["output_bytes"]) * m * n
        moved = HALF_FORMAT_BYTES * (m * k + k * n) + written * (2 if row["accumulates"] == "yes" else 1)
        return 2 * m * n * k, 0.0, moved

    return measurements([row for row in read(path) if row["kind"] == kind], work, whole_scores=1.0)


def attention(path: Path) -> Iterator[Timed]:
    """Forward and backward of causal attention. The published rates count the whole score matrix, and for backward 2.5
    times the work of forward (five products for two)."""

    def work(row: dict[str, str]) -> tuple[float, float, float]:
        tokens, length, heads = float(row["batch"]) * float(row["length"]), float(row["length"]), float(row["heads"])
        wide, value = float(row["query_key_head_dim"]), float(row["value_head_dim"])
        passes = 1.0 if row["direction"] == "forward" else 2.5
        flop = passes * 2 * tokens * length * heads * (wide + value) / 2
        touched = tokens * (heads + float(row["key_value_heads"])) * (wide + value) * HALF_FORMAT_BYTES
        return 0.0, flop, touched * (1 if row["direction"] == "forward" else 2)

    return measurements(read(path), work, whole_scores=2.0)


def measurements(
    rows: list[dict[str, str]], work: Callable[[dict[str, str]], tuple[float, float, float]], whole_scores: float
) -> Iterator[Timed]:
    """Rows of one GPU together. *whole_scores*: the published FLOPs over those done."""
    for name in dict.fromkeys(row["gpu"] for row in rows):
        own = [row for row in rows if row["gpu"] == name]
        linear, attended, moved = np.array([work(row) for row in own]).T
        published = (linear + attended) * whole_scores
        seconds = published / (np.array([float(row["tflops"]) for row in own]) * 1e12)
        zero = np.zeros_like(linear)
        yield Timed(find_gpu(name), Work(linear, attended, published, moved, zero), seconds)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
