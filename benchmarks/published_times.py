"""Compares predicted with published throughput of real training runs.

    python benchmarks/published_times.py

Reads profiles/measured/step_times.csv. Nothing is fitted here: rates of products and attention come from measured
kernels (benchmarks/fit_rates.py), links from profiles/links.csv. Two things do come from these runs: the host
bandwidth, from two of the Llama-3.1-8B runs with CPU offload, and the time range of the calibration, from the spread
printed last. Runs used the FlashAttention of their day, whose share of the peak is set here, in place of the kernel
that torch takes today.

MPT's blocks are written out below, as the catalog has no such family; its norms have no biases, which is left out.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from advisor.catalog.calibrations import find_calibration
from advisor.catalog.gpus import find_gpu
from advisor.catalog.links import find_link
from advisor.catalog.models import find_model
from advisor.catalog.profiles import profiles_folder
from advisor.cost.results import StepTime
from advisor.cost.schedule import step_time
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.model import Attention, FeedForward, Layer, ModelSpec, Parameter, Run
from advisor.specs.plan import Checkpointing, Offload, Plan, Strategy, ZeroSettings
from advisor.step.build import build

Row = Mapping[str, str]

ATTENTION_SHARES: dict[str, dict[str, tuple[float, float]]] = {
    # FlashAttention-1 reaches 25 to 40 % of an A100 (arXiv:2307.08691, abstract), the most on long sequences. On Hopper
    # it is taken to lose as much as FlashAttention-2 does, from 0.68 to 0.42.
    "flash-attention-1": {"8.0": (0.4, 0.4), "9.0": (0.25, 0.25)},
    # Fitted by benchmarks/fit_rates.py, as the calibration's FlashAttention-2 is.
    "flash-attention-2": {"8.0": (0.68, 0.6), "9.0": (0.42, 0.38)},
    "flash-attention-3": {"9.0": (0.69, 0.62)},
}
"""Shares of the dense peak, forward and backward, by compute capability."""
MPT_VOCABULARY = 50368
HOST_MEMORY_BYTES = 2**41
"""Plays no part in time."""


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


def summary(name: str, ratios: Iterable[float]) -> str:
    found = np.array(list(ratios))
    errors = np.abs(found - 1)
    return f"{name:46} {found.size:4} {found.mean():6.3f} {100 * errors.mean():11.1f} % {100 * errors.max():10.1f} %"


def family(row: Row) -> str:
    return "MPT" if row["model"].startswith("MPT") else row["model"]


def runs() -> list[Row]:
    with (profiles_folder() / "measured" / "step_times.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predict(row: Row) -> StepTime:
    """The time of a run by the calibration's constants and the attention kernel of its day."""
    gpu, gpus = find_gpu(row["gpu"]), int(row["gpus"])
    calibration = find_calibration()
    shares = ATTENTION_SHARES[row["attention_kernel"]][gpu.compute_capability]
    kernels = {**calibration.attention_efficiency, f"sdpa, {gpu.compute_capability}": shares}
    calibration = replace(calibration, attention_efficiency=kernels)
    cluster = Cluster(
        gpu=gpu,
        gpus=gpus,
        nodes=int(row["nodes"]),
        link=find_link(gpu.link),
        host_link=find_link(gpu.host_link),
        network=find_link(row["network"] or "ib-hdr"),
        host_memory_bytes=HOST_MEMORY_BYTES,
        cpu_memory_bandwidth_bytes_per_s=calibration.host_bandwidth_bytes_per_s_per_gpu * (gpus // int(row["nodes"])),
    )
    strategy = Strategy(row["strategy"])
    plan = Plan(
        strategy=strategy,
        gpus=gpus,
        micro_batch=int(row["micro_batch"]),
        accumulation_steps=int(row["accumulation_steps"]),
        checkpointing=Checkpointing(row["checkpointing"]),
        offload=Offload(row["offload"]),
        zero=ZeroSettings(overlap_communication=strategy is Strategy.ZERO3),
    )
    job = Job(
        sequence_length=int(row["sequence_length"]),
        global_batch=int(plan.global_batch),
        parameter_format="bf16" if row["parameter_format"] == "bf16" else "fp32",
    )
    model = mpt(row) if family(row) == "MPT" else find_model(row["model"]).model
    return step_time(build(model, job, plan).step, job, plan, cluster, calibration).at(0)


def mpt(row: Row) -> ModelSpec:
    """MosaicML's MPT with learned positions and a tied head (llm-foundry, scripts/train/yamls/pretrain)."""
    width, heads = int(row["hidden"]), int(row["heads"])

    def norm(name: str) -> tuple[Parameter, Parameter]:
        return Parameter(f"{name}.weight", (width,)), Parameter(f"{name}.bias", (width,))

    layer = Layer(
        attention=Attention(
            heads=heads, key_value_heads=heads, head_dim=width // heads, fused_projection=True, rotary_fraction=0.0
        ),
        feed_forward=FeedForward(width=4 * width, gated=False, activation="gelu"),
        norm="layer",
        parameters=(
            *norm("norm_1"),
            Parameter("attn.Wqkv.weight", (3 * width, width)),
            Parameter("attn.out_proj.weight", (width, width)),
            *norm("norm_2"),
            Parameter("ffn.up_proj.weight", (4 * width, width)),
            Parameter("ffn.down_proj.weight", (width, 4 * width)),
        ),
    )
    return ModelSpec(
        name=row["model"],
        family="mpt",
        objective="causal",
        hidden_size=width,
        vocabulary_size=MPT_VOCABULARY,
        maximum_positions=int(row["sequence_length"]),
        tied_embeddings=True,
        embedding=(
            Parameter("wte.weight", (MPT_VOCABULARY, width)),
            Parameter("wpe.weight", (int(row["sequence_length"]), width)),
        ),
        runs=(Run((layer,), int(row["layers"])),),
        final_norm="layer",
        head=norm("norm_f"),
    )


if __name__ == "__main__":
    main()
