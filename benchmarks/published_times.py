"""Compares predicted with published throughput of real training runs.

    python benchmarks/published_times.py

Reads profiles/measured/step_times.csv. Nothing is fitted here: rates of products and attention come from measured
kernels (benchmarks/fit_rates.py), links from profiles/links.csv. Two things do come from these runs: the host
bandwidth, from two of the Llama-3.1-8B runs with CPU offload, and the time range of the calibration, from the spread
printed last. Runs used the FlashAttention of their day, whose share of the peak is set here, in place of the kernel
that torch takes today.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from advisor.catalog.calibrations import find_calibration
from advisor.cost.results import StepTime
from advisor.cost.schedule import step_time
from advisor.step.build import build
from advisor.validation.published import Row, published, published_rows

ATTENTION_SHARES: dict[str, dict[str, tuple[float, float]]] = {
    # FlashAttention-2 is around twice as fast as FlashAttention-1 (arXiv:2307.08691, abstract); also on Hopper, for
    # which neither was made.
    "flash-attention-1": {"8.0": (0.34, 0.30), "9.0": (0.21, 0.19)},
    # Fitted by benchmarks/fit_rates.py, as the calibration's FlashAttention-2 is.
    "flash-attention-2": {"8.0": (0.68, 0.6), "9.0": (0.42, 0.38)},
    "flash-attention-3": {"9.0": (0.69, 0.62)},
}
"""Shares of the dense peak, forward and backward, by compute capability."""


@dataclass(frozen=True)
class Compared:
    """A run and its prediction. *ratio* is predicted over published throughput."""

    row: Row
    time: StepTime

    @property
    def ratio(self) -> float:
        return self.time.tokens_per_s_per_gpu / float(self.row["tokens_per_s_per_gpu"])


def main() -> None:
    compared = [Compared(row, predict(row)) for row in runs()]
    print("predicted / published tokens per second\n")
    print(f"{'':46} {'n':>4} {'mean':>6} {'mean |error|':>13} {'max |error|':>12}")
    tables: list[Callable[[Row], str]] = [
        lambda row: f"{family(row)} on {row['gpu']}",
        lambda row: f"{family(row)} on {row['gpu']}, {'one machine' if row['nodes'] == '1' else 'several machines'}",
        lambda row: f"{family(row)}, sequences of {row['sequence_length']}",
        lambda row: f"{family(row)}, checkpointing {row['checkpointing']}",
        lambda row: f"{row['strategy']}, offload {row['offload']}",
    ]
    for table in tables:
        for name in dict.fromkeys(table(each.row) for each in compared):
            print(summary(name, [each.ratio for each in compared if table(each.row) == name]))
        print()
    print(summary("all", [each.ratio for each in compared]))
    low, high = np.quantile([each.ratio for each in compared], [0.05, 0.95])
    print(f"published over predicted step time, 5th to 95th percentile: {low:.2f} to {high:.2f}")
    print("\nby Megatron-LM, which none of the above counts; its own tests (gpt3_7b) ran deterministic kernels")
    found = [(published(row).plan, Compared(row, predict(row))) for row in megatron_runs()]
    for plan, each in found:
        how = f"{each.row['model']} on {plan.gpus} {each.row['gpu']}, {plan.title}, {plan.checkpointing.value}"
        print(f"{how:86} {each.ratio:6.3f}")
    print(summary("its own tests", [each.ratio for _, each in found if each.row["model"] == "gpt3_7b"]))
    print(summary("the runs of its papers", [each.ratio for _, each in found if each.row["model"] != "gpt3_7b"]))


def summary(name: str, ratios: Iterable[float]) -> str:
    found = np.array(list(ratios))
    errors = np.abs(found - 1)
    return f"{name:46} {found.size:4} {found.mean():6.3f} {100 * errors.mean():11.1f} % {100 * errors.max():10.1f} %"


def family(row: Row) -> str:
    return "MPT" if row["model"].startswith("MPT") else row["model"]


def runs() -> list[Row]:
    """Those of data parallelism alone."""
    return [row for row in published_rows("step_times") if row["strategy"] != "megatron"]


def megatron_runs() -> list[Row]:
    """Those of tensor and pipeline parallelism."""
    return [row for row in published_rows("step_times") if row["strategy"] == "megatron"]


def predict(row: Row) -> StepTime:
    """The time of a run by the calibration's constants and the attention kernel of its day."""
    calibration = find_calibration()
    model, job, plan, cluster = published(row)
    capability = cluster.gpu.compute_capability
    if capability in ATTENTION_SHARES.get(row["attention_kernel"], ()):
        shares = {f"sdpa, {capability}": ATTENTION_SHARES[row["attention_kernel"]][capability]}
        calibration = replace(calibration, attention_efficiency={**calibration.attention_efficiency, **shares})
    return step_time(build(model, job, plan).pace, job, plan, cluster, calibration).at(0)


if __name__ == "__main__":
    main()
