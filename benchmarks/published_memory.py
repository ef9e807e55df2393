"""Compares predicted with published peak memory of real training runs.

    python benchmarks/published_memory.py

Reads profiles/measured/peak_memory.csv. Nothing is fitted to these runs. Where a prediction is off by more than 5 %, or
close by chance, the row has a remark; runs of what is not modelled stand there too, counted by what they have.
"""

from __future__ import annotations

import csv
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from advisor.catalog.profiles import profiles_folder
from advisor.catalog.request import resolve
from advisor.cost.estimate import price
from advisor.cost.results import Memory
from advisor.specs.plan import Checkpointing, Offload, Plan, Strategy, ZeroSettings

Row = Mapping[str, str]

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
    print(f"{'run':58} {'counter':>9} {'published':>10} {'predicted':>10} {'error':>8}")
    for each in compared:
        print(
            f"{title(each.row):58} {each.row['counter']:>9} {each.published_bytes / GIB:8.1f}   "
            f"{each.predicted_bytes / GIB:8.1f}   {100 * each.error:+6.1f} %"
        )
    for remark in dict.fromkeys(each.row["remark"] for each in compared if each.row["remark"]):
        runs = "; ".join(title(each.row) for each in compared if each.row["remark"] == remark)
        print("\n" + textwrap.fill(f"{runs}: {remark}.", 118, subsequent_indent="  "))
    close = sum(abs(each.error) <= CLOSE for each in compared)
    print(f"\n{close} of {len(compared)} within {100 * CLOSE:.0f} %")
    lacking = Counter(row["not_covered"] for row in rows() if row["not_covered"])
    print("not covered: " + ", ".join(f"{count} with {what}" for what, count in lacking.most_common()))


def title(row: Row) -> str:
    return f"{row['model']}, {row['gpus']} x {row['strategy']}, {row['sequence_length']} tokens, {row['loss']} loss"


def rows() -> list[Row]:
    with (profiles_folder() / "measured" / "peak_memory.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predict(row: Row) -> Memory:
    """The memory of a covered run's fullest rank. All DeepSpeed runs overlapped communication with computation."""
    gpus, sequences, steps = int(row["gpus"]), int(row["micro_batch"]), int(row["accumulation_steps"])
    question = resolve(
        row["model"],
        gpus=gpus,
        nodes=int(row["nodes"]),
        gpu=row["gpu"],
        seq_len=int(row["sequence_length"]),
        global_batch=gpus * sequences * steps,
        param_dtype=row["parameter_format"],
        attention=row["attention"],
        loss=row["loss"],
    )
    plan = Plan(
        strategy=Strategy(row["strategy"]),
        gpus=gpus,
        micro_batch=sequences,
        accumulation_steps=steps,
        checkpointing=Checkpointing(row["checkpointing"]),
        offload=Offload(row["offload"]),
        zero=ZeroSettings(overlap_communication=True),
    )
    return price(question, plan).memory


if __name__ == "__main__":
    main()
