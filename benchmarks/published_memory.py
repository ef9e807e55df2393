"""Compares predicted with published peak memory of real training runs.

    python benchmarks/published_memory.py

Reads profiles/measured/peak_memory.csv. Nothing is fitted to these runs. Where a prediction is off by more than 5 %, or
close by chance, the row has a remark; runs of what is not modelled stand there too, counted by what they have.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass, replace

from advisor.catalog.calibrations import find_calibration
from advisor.cost.estimate import price
from advisor.cost.results import Memory
from advisor.specs.plan import ZeroSettings
from advisor.specs.question import Question
from advisor.validation.published import Row, published, published_rows

GIB = 2**30
CLOSE = 0.05


@dataclass(frozen=True)
class Compared:
    """A run and its prediction."""

    row: Row
    memory: Memory

    @property
    def predicted_bytes(self) -> int:
        """By the counter that the run was read with."""
        reserved = self.row["counter"] == "reserved"
        return self.memory.peak_reserved_bytes if reserved else self.memory.peak_allocated_bytes

    @property
    def published_bytes(self) -> float:
        return float(self.row["peak_gib"]) * GIB

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.published_bytes - 1


def main() -> None:
    compared = [Compared(row, predict(row)) for row in rows() if not row["not_covered"]]
    print(f"{'run':106} {'counter':>9} {'published':>10} {'predicted':>10} {'error':>8}")
    for each in compared:
        print(
            f"{title(each.row):106} {each.row['counter']:>9} {each.published_bytes / GIB:8.1f}   "
            f"{each.predicted_bytes / GIB:8.1f}   {100 * each.error:+6.1f} %"
        )
    for remark in dict.fromkeys(each.row["remark"] for each in compared if each.row["remark"]):
        runs = "; ".join(title(each.row) for each in compared if each.row["remark"] == remark)
        print("\n" + textwrap.fill(f"{runs}: {remark}.", 118, subsequent_indent="  "))
    close = sum(abs(each.error) <= CLOSE for each in compared)
    print(f"\n{close} of {len(compared)} within {100 * CLOSE:.0f} %")
    errors = [abs(each.error) for each in compared if each.row["strategy"] == "megatron"]
    print(f"Megatron-LM: {len(errors)}, mean {100 * sum(errors) / len(errors):.1f} %, max {100 * max(errors):.1f} %")
    lacking = Counter(row["not_covered"] for row in rows() if row["not_covered"])
    print("not covered: " + ", ".join(f"{count} with {what}" for what, count in lacking.most_common()))


def title(row: Row) -> str:
    start = f"{row['model']}, {row['gpus']} x {row['strategy']}, {row['sequence_length']} tokens"
    if row["lora_rank"]:
        return f"{start}, {row['micro_batch']} at once, lora of rank {row['lora_rank']}"
    if row["strategy"] != "megatron":
        return f"{start}, {row['loss']} loss"
    how = [] if row["checkpointing"] == "none" else [f"checkpointing {row['checkpointing']}"]
    how += ["distributed optimizer"] if row["distributed_optimizer"] == "yes" else []
    cut = f"tp {row['tensor_parallel']}, pp {row['pipeline_parallel']} x {row['virtual_stages']}"
    cut += f", ep {row['expert_parallel']}, etp {row['expert_tensor_parallel']}" if row["expert_parallel"] else ""
    return ", ".join([start, row["gpu"].partition("-")[0], cut, *how])


def rows() -> list[Row]:
    return published_rows("peak_memory")


def predict(row: Row) -> Memory:
    """The memory of a covered run's rank that was read, or of its fullest. All DeepSpeed runs overlapped communication
    with computation."""
    model, job, plan, cluster = published(row)
    plan = replace(plan, zero=ZeroSettings(overlap_communication=True))
    question = Question(
        model=model, weights_from=model.name, job=job, cluster=cluster, calibration=find_calibration(), inputs=()
    )
    return price(question, plan, int(row["rank"]) if row["rank"] else None).memory


if __name__ == "__main__":
    main()
