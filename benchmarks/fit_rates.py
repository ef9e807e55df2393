"""Fits the rates of matrix products and attention to published measurements, and says how far off they are.

    python benchmarks/fit_rates.py

Reads profiles/rates/. One share of the dense peak is fitted for each GPU, kernel and direction (least mean absolute
relative error of the time) by the rules of ``advisor.cost.kernels``; what all GPUs share is fitted beside it and
printed first. Errors are those on the rows fitted to, on held-out rows (five folds), with the GPU left out altogether,
where it gets the mean share of the others, and by the rule that knows no shapes: one share, and every byte at 0.85 of
memory bandwidth.

Training shapes were measured for long enough that a power limit shows; short bursts were not, and give the floor and
the shape, but no share that lasts. Last come whole operators of a layer, as transformers and torch run them in eager
mode and as the step program has them: norms and the loss, to which the share of memory bandwidth is fitted, and gated
feed-forward blocks, to which nothing is.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from advisor.catalog.calibrations import find_calibration
from advisor.catalog.gpus import find_gpu
from advisor.catalog.models import find_model
from advisor.catalog.profiles import profiles_folder
from advisor.cost.compute import load, rates
from advisor.specs.calibration import Calibration
from advisor.specs.model import FeedForward, Parameter
from advisor.step.feed_forward import feed_forward
from advisor.step.layers import cross_entropy
from advisor.step.laying import lay
from advisor.step.operators import rms_norm
from advisor.step.program import Matmul, Node, then
from advisor.step.tape import Tape, Tensor, Weight
from advisor.step.weights import weights_of
from advisor.validation.fitting import CANDIDATES, Numbers, Timed, errors, share_of_peak, timed
from advisor.validation.rates import BACKWARD_PRODUCTS, FORWARD_PRODUCTS

FORMAT_BYTES = {"bf16": 2, "tf32": 4, "fp8": 1}
SHAPELESS_BANDWIDTH_SHARE = 0.85
FOLDS = 5
OPERANDS = (0.85, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
PRODUCT_FLOORS_S = (2e-6, 3e-6, 4e-6, 5e-6, 6e-6, 7e-6)
EXTRA_COLUMNS = (0, 100, 150, 200, 250, 300)
BANDWIDTHS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.85)
NARROW_SHARES = (0.7, 0.75, 0.8, 0.85, 0.9, 1.0)

Row = dict[str, str]
Set = dict[str, Timed]
"""Measured rows that share one constant, by what they were measured on."""


def main() -> None:
    folder, usual = profiles_folder() / "rates", find_calibration()
    products, attention = read(folder / "matmul.csv"), read(folder / "attention.csv")
    training, bursts = chosen(products, "training shape", "bf16"), chosen(products, "short burst", "bf16")
    grouped_ = chosen(products, "grouped product", "bf16")
    usual = shared("what all products share", usual, [training, bursts, grouped_], PRODUCT_CONSTANTS)
    kept = report("training shapes", training, usual, left_out=True)
    report("short bursts: no share that lasts", bursts, usual)
    report("short bursts in tf32", chosen(products, "short burst", "tf32"), usual)
    report("grouped products, one kernel for all experts", grouped_, usual)
    best = report("best shape of each GPU", chosen(products, "best shape", "bf16"), usual)
    report("best shape in fp8", chosen(products, "best shape", "fp8"), usual)
    lasting = {name: kept[name] / best[name] for name in kept if name in best}
    listed = ", ".join(f"{name} {share:.2f}" for name, share in lasting.items())
    print(f"\ntraining shapes over the best shape: {listed}; mean {np.mean(list(lasting.values())):.2f}")
    sets = fused(attention)
    usual = shared("what all fused attention kernels share", usual, [sets], ATTENTION_CONSTANTS)
    report("fused attention", sets, usual)
    operators(read(folder / "operators.csv"), usual)


PRODUCT_CONSTANTS: dict[str, Sequence[float]] = {
    "operand_bandwidth_efficiency": OPERANDS,
    "product_floor_s": PRODUCT_FLOORS_S,
}
ATTENTION_CONSTANTS: dict[str, Sequence[float]] = {
    "attention_extra_columns": EXTRA_COLUMNS,
    "attention_narrow_share": NARROW_SHARES,
}


def shared(title: str, usual: Calibration, groups: list[Set], constants: dict[str, Sequence[float]]) -> Calibration:
    """*usual* with the values of two *constants* that leave the least error, every set with its own share."""
    (first, some), (second, others) = constants.items()
    sets = [each for group in groups for each in group.values() if each.seconds.size > 1]

    def missed(values: dict[str, float]) -> float:
        calibration = replace(usual, **values)  # type: ignore[arg-type]
        return float(np.mean([fitted_errors(each, calibration).mean() for each in sets]))

    tried = [{first: one, second: other} for one in some for other in others]
    found = min(tried, key=missed)
    now = {name: getattr(usual, name) for name in constants}
    said = [", ".join(f"{name} {value:g}" for name, value in values.items()) for values in (found, now)]
    print(f"\n{title}\n  {said[0]}: mean error {missed(found):.1%}")
    print(f"  {said[1]}: mean error {missed(now):.1%} (the calibration, as below)")
    return usual


def fitted_errors(each: Timed, calibration: Calibration) -> Numbers:
    return errors(each, share_of_peak(each, calibration), calibration)


def report(title: str, sets: Set, usual: Calibration, *, left_out: bool = False) -> dict[str, float]:
    """Prints a table of shares and errors; returns the shares."""
    shares = {name: share_of_peak(each, usual) for name, each in sets.items()}
    width = max(map(len, sets))
    print(f"\n{title}\n{'':{width}}  rows  share  {'fitted':>12}  {'held out':>12}  {'GPU left out':>12}  one share")
    for name, each in sets.items():
        others = [share for other, share in shares.items() if other != name and sets[other].seconds.size > 1]
        cells = [
            spread(errors(each, shares[name], usual)),
            spread(held_out(each, usual)) if each.seconds.size >= FOLDS else "-",
            spread(errors(each, float(np.mean(others)), usual)) if left_out and others else "-",
        ]
        print(
            f"{name:{width}}  {each.seconds.size:4}  {shares[name]:5.2f}  "
            + "  ".join(f"{cell:>12}" for cell in cells)
            + f"  {spread(shapeless(each)):>12}"
        )
    return shares


def held_out(each: Timed, usual: Calibration) -> Numbers:
    """Errors of every row by the share that the other folds give."""
    found = np.empty_like(each.seconds)
    for fold in range(FOLDS):
        out = np.arange(each.seconds.size) % FOLDS == fold
        found[out] = errors(each.at(out), share_of_peak(each.at(~out), usual), usual)
    return found


def shapeless(each: Timed) -> Numbers:
    """Errors of seconds = products / (share of the peak) + bytes / (share of memory bandwidth), fitted to its best."""
    gpu = each.gpu
    flop = sum(np.asarray(product.flop) for product in each.block.matmuls)
    moving = each.block.moved_bytes / (gpu.memory_bandwidth_bytes_per_s * SHAPELESS_BANDWIDTH_SHARE)
    peak = gpu.peak_flop_per_s[each.number_format]
    tried = [np.abs((flop / (peak * share) + moving) / each.seconds - 1) for share in CANDIDATES]
    return min(tried, key=lambda found: float(found.mean()))


def spread(found: Numbers) -> str:
    return f"{100 * found.mean():.1f} / {100 * found.max():.0f} %"


def chosen(rows: list[Row], kind: str, number_format: str) -> Set:
    """Matrix products of one *kind* and format, GPU by GPU."""
    some = [row for row in rows if row["kind"] == kind and row["number_format"] == number_format]
    return {name: products_of(name, number_format, own) for name, own in grouped(some, lambda row: row["gpu"])}


def products_of(name: str, number_format: str, rows: list[Row]) -> Timed:
    operand = FORMAT_BYTES[number_format]
    matmuls = [
        Matmul(*(int(row[size]) for size in ("m", "n", "k", "count")), element_bytes=operand)  # type: ignore[arg-type]
        for row in rows
    ]
    written = [float(row["output_bytes"]) * (2 if row["accumulates"] == "yes" else 1) - operand for row in rows]
    moved = [
        each.operand_bytes + more * each.m * each.n * each.count for each, more in zip(matmuls, written, strict=True)
    ]
    return timed(find_gpu(name), matmuls, moved, seconds(rows, matmuls, 1), number_format=number_format)


def fused(rows: list[Row]) -> Set:
    """Fused attention, by GPU, kernel and direction."""
    by = grouped(rows, lambda row: f"{row['gpu']}, {row['kernel']}, {row['direction']}")
    return {name: attention_of(own) for name, own in by}


def attention_of(rows: list[Row]) -> Timed:
    backward = rows[0]["direction"] == "backward"
    times = BACKWARD_PRODUCTS if backward else FORWARD_PRODUCTS
    matmuls, moved = [], []
    for row in rows:
        length, heads, shared_heads = (int(row[name]) for name in ("length", "heads", "key_value_heads"))
        wide, batch = int(row["query_key_head_dim"]) + int(row["value_head_dim"]), int(row["batch"])
        share = 0.5 if row["mask"] == "causal" else 1.0
        matmuls.append(
            Matmul(length, length, wide // 2, batch * heads, "attention", share, fused="sdpa", backward=backward)
        )
        touched = FORMAT_BYTES["bf16"] * batch * length * (heads + shared_heads) * wide
        moved.append(touched * (2 if backward else 1))
    return timed(find_gpu(rows[0]["gpu"]), matmuls, moved, seconds(rows, matmuls, times), times=times)


def operators(rows: list[Row], usual: Calibration) -> None:
    """Prints predicted over measured times of whole operators, for several shares of memory bandwidth."""
    by = list(grouped(rows, lambda row: f"{row['gpu']}, {row['operator']}, {row['direction']}"))
    width = max(len(name) for name, _ in by)
    print(f"\nwhole operators: mean error by share of memory bandwidth\n{'':{width}}  rows  " + heading(BANDWIDTHS))
    moving: dict[float, list[float]] = {share: [] for share in BANDWIDTHS}
    for name, own in by:
        found = {share: operator_errors(own, replace(usual, bandwidth_efficiency=share)) for share in BANDWIDTHS}
        print(
            f"{name:{width}}  {len(own):4}  " + "  ".join(f"{100 * found[share].mean():4.1f}" for share in BANDWIDTHS)
        )
        for share in BANDWIDTHS if not own[0]["inner_width"] else ():
            moving[share] += [float(found[share].mean())]
    means = "  ".join(f"{100 * np.mean(moving[share]):4.1f}" for share in BANDWIDTHS)
    print(f"{'norms and the loss':{width}}        {means}; the calibration has {usual.bandwidth_efficiency}")


def heading(shares: Sequence[float]) -> str:
    return "  ".join(f"{share:4.2f}" for share in shares)


def operator_errors(rows: list[Row], calibration: Calibration) -> Numbers:
    at = rates(find_gpu(rows[0]["gpu"]), "bf16", calibration)
    predicted = [load(operator(row), at).busy_s for row in rows]
    return np.abs(np.array(predicted) * 1e3 / np.array([float(row["ms"]) for row in rows]) - 1)


def operator(row: Row) -> Node:
    """One direction of an operator of the step program: rows x width in bf16, logits in fp32."""
    number, width = int(row["rows"]), int(row["width"])
    tape = Tape(compute_bytes=2, autocast=False, sequence_length=1)
    stream = tape.input(number * width, 4 if row["operator"] == "cross entropy" else 2, "input")
    before = len(tape.events)
    output = OPERATORS[row["operator"]](tape, stream, row)
    between = len(tape.events)
    if row["direction"] == "forward" or output.node is None:
        return then(*lay(tape.events[before:between], 1))
    tape.run_backward(output.node, output.numel, output.element_bytes, stream.node)
    return then(*lay(tape.events[between:], 1))


def norm(tape: Tape, x: Tensor, row: Row) -> Tensor:
    width = int(row["width"])
    return rms_norm(tape, x, Weight(Parameter("weight", (width,)), 4, (width,)), width, fp32_weight=False)


def loss(tape: Tape, logits: Tensor, row: Row) -> Tensor:
    return cross_entropy(tape, logits, find_model("Llama-3.1-8B").model)


def gated(tape: Tape, x: Tensor, row: Row) -> Tensor:
    width, inner = int(row["width"]), int(row["inner_width"])
    matrices = Parameter("gate", (inner, width)), Parameter("up", (inner, width)), Parameter("down", (width, inner))
    spec = FeedForward(width=inner, gated=True, activation="silu")
    return feed_forward(tape, x, spec, weights_of(matrices, 2, 2), width)


OPERATORS: dict[str, Callable[[Tape, Tensor, Row], Tensor]] = {
    "rms norm": norm,
    "cross entropy": loss,
    "silu gated": gated,
    "gelu gated": gated,
}


def seconds(rows: list[Row], matmuls: list[Matmul], times: int) -> list[float]:
    return [float(times * each.flop) / (float(row["tflops"]) * 1e12) for row, each in zip(rows, matmuls, strict=True)]


def grouped(rows: list[Row], key: Callable[[Row], str]) -> Iterator[tuple[str, list[Row]]]:
    for name in dict.fromkeys(map(key, rows)):
        yield name, [row for row in rows if key(row) == name]


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
