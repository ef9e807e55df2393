"""Every strategy and method beside each other: its memory, traffic, time, what it runs with, its files, and its tests.

    python benchmarks/strategies.py > benchmarks/strategies.md

``strategies.csv`` lists them, each with the words that ask for it and the tests that hold it against something true.
All are asked about one model on the same GPUs, by the commands that a user types. Refusals are answers: a row may say
why not.
"""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from advisor.catalog.legality import rules
from advisor.cli.main import cli

ROWS = Path(__file__).with_name("strategies.csv")
ASKED = "--model Qwen2.5-1.5B --gpus 8 --gpu A100-80GB"
TRAINED = f"{ASKED} --host-memory 512 --micro-batch 4"
GENERATED = f"{ASKED} --gpus 1"
"""What each row's words are added to; words that stand twice count where they stand last."""
COLUMNS = ("Strategy", "Words", "States GiB", "Peak GiB", "Sent GB", "Step s", "Legality", "Files", "Checked by")
CHOICES = ("strategy", "offload", "method", "optimizer", "precision", "attention")
"""Columns of legality's rules that a row's words may be about."""
GIB, GB = 2**30, 10**9


@dataclass(frozen=True, slots=True)
class Row:
    """One line of ``strategies.csv``."""

    group: str
    name: str
    words: str
    """Of ``advisor estimate``, or of another command that stands first."""
    checked: tuple[str, ...]
    """Tests, as ``file::function`` under ``tests/``."""
    note: str

    @property
    def command(self) -> str:
        """The command that answers it."""
        first = self.words.partition(" ")[0]
        return "estimate" if first.startswith("--") else first

    @property
    def flags(self) -> list[str]:
        return shlex.split(self.words if self.command == "estimate" else self.words.partition(" ")[2])

    @property
    def trains(self) -> bool:
        return "--inference" not in self.flags


def read() -> tuple[Row, ...]:
    """All of them."""
    with ROWS.open(newline="", encoding="utf-8") as file:
        return tuple(
            Row(each["group"], each["name"], each["words"], tuple(each["checked"].split("|")), each["note"])
            for each in csv.DictReader(file)
        )


def answered(row: Row, command: str) -> tuple[dict[str, Any], str]:
    """What *command* says to the words of *row* as JSON, and its refusal; one of them is empty."""
    said = CliRunner().invoke(cli, [command, *shlex.split(TRAINED if row.trains else GENERATED), *row.flags, "--json"])
    if said.exit_code in (0, 3):
        return json.loads(said.stdout), ""
    return {}, said.stderr.strip().splitlines()[-1].removeprefix("Error: ")


def cells(row: Row) -> tuple[str, ...]:
    """The cells of *row*, by :data:`COLUMNS`."""
    answer, refusal = answered(row, row.command)
    asked = f"`{row.words}`"
    if refusal:
        return (row.name, asked, *["refused"] * 4, refusal, "none", _tests(row))
    memory, time = answer["memory"], answer.get("time", {})
    sent = sum(line["bytes_per_step"] for line in answer.get("traffic", ()))
    return (
        row.name,
        asked,
        f"{memory['states_bytes'] / GIB:.2f}",
        f"{memory['device_used_bytes'] / GIB:.2f}",
        f"{sent / GB:.2f}",
        f"{time['step_s']:.3f}" if row.trains else f"{time['decode']['seconds']:.4f} a token",
        _legality(answer),
        _files(row),
        _tests(row),
    )


def _legality(answer: dict[str, Any]) -> str:
    """The names of the rules about the strategy, or about what the row gives, whatever else is asked."""
    given = {name: {str(each["value"])} for name, each in answer["inputs"].items() if each["origin"] == "given"}
    given |= {name: {answer["plan"][name]} for name in ("strategy", "offload") if name in answer.get("plan", {})}
    about = given.keys() & set(CHOICES)
    spoken = [
        rule.name
        for rule in rules()
        if (known := about & rule.conditions.keys()) and all(rule.matches(column, given[column]) for column in known)
    ]
    return f"runs; refused: {', '.join(spoken)}" if spoken else "runs"


def _files(row: Row) -> str:
    """Names of the launch files that are no part of every set, or why there are none."""
    if not row.trains:
        return "none: nothing is trained"
    written, refusal = answered(row, "launch")
    if refusal:
        return refusal
    shared = ("prediction.json", "train.py", "train_data.py", "train_checkpoint.py")
    return ", ".join(each["name"] for each in written["launch"]["files"] if each["name"] not in shared)


def _tests(row: Row) -> str:
    return ", ".join(f"`{each}`" for each in row.checked) + (f". {row.note}" if row.note else "")


def lines() -> Iterator[str]:
    """The page, line by line."""
    yield "# Strategies and methods"
    yield ""
    yield f"Made by `python benchmarks/strategies.py`. Each is asked for by `advisor estimate {TRAINED}` and its words."
    yield "States: what the fullest GPU holds between steps. Peak: what its driver shows. Sent: by one GPU in a step."
    yield "Legality names the rules of `profiles/legality.csv` about it."
    for group, rows in groupby(read(), key=lambda row: row.group):
        yield from ("", f"## {group}", "")
        yield "| " + " | ".join(COLUMNS) + " |"
        yield "|" + "---|" * len(COLUMNS)
        for row in rows:
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |"


if __name__ == "__main__":
    print("\n".join(lines()))
