"""A launch to read: what is written, what to type, and what a run measured beside what was predicted."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from advisor.cost.results import Estimate
from advisor.launch.start import Measured
from advisor.launch.trainers.advisor import FILES as PROGRAM_FILES
from advisor.launch.training import Launch
from advisor.report.estimate import VERDICTS
from advisor.report.numbers import GIB, rate
from advisor.report.question import assumed_line, question_line, read_lines, sentence
from advisor.report.recommendation import shell_lines
from advisor.report.tables import INDENT, Column, section, table_of, verbatim


def launch_report(estimate: Estimate, launch: Launch, *, width: int, out: Path | None) -> list[RenderableType]:
    """The launch for a page of *width* columns; *out* is where its files are, None where they are only shown."""
    word, style = VERDICTS[estimate.verdict]
    plan = estimate.plan
    parts: list[RenderableType] = [
        Text.assemble((word, style), f": {sentence(estimate.why)}"),
        Text(),
        Text(question_line(estimate.model, estimate.job, estimate.cluster)),
        Text(
            f"{plan.title}: micro-batch {plan.micro_batch} × {plan.accumulation_steps} accumulation steps, "
            f"activation checkpointing {plan.checkpointing.value}."
        ),
        *read_lines(estimate.inputs),
        *assumed_line(estimate.inputs),
    ]
    if out is None:
        for file in launch.files:
            parts += [*section(file.name), _shown(file.name, file.text)]
    return parts + _start(launch, estimate.cluster.nodes, width, out)


def _shown(name: str, text: str) -> Text:
    if name in PROGRAM_FILES:
        text = f"{len(text.splitlines())} lines of the training program, the same for every plan."
    return verbatim(text.rstrip("\n"))


def _start(launch: Launch, nodes: int, width: int, out: Path | None) -> list[RenderableType]:
    names = ", ".join(file.name for file in launch.files)
    where = f" on each of the {nodes} machines" if nodes > 1 and not launch.submits else ""
    if out is None:
        explanation = f"Give --out FOLDER to write {names}. In that folder{where}:"
        command = shell_lines(launch, width - INDENT)
    else:
        explanation = f"{names} {'is' if len(launch.files) == 1 else 'are'} in {out}. Type{where}:"
        command = f"cd {shlex.quote(str(out))} && {shlex.join(launch.command_in_place)}"
    return [*section("To start it", Text(explanation), Text()), verbatim(command)]


def comparison_report(estimate: Estimate, measured: Measured) -> list[RenderableType]:
    """What the prediction was beside what a run measured; memory where the run had a GPU."""
    memory = estimate.memory
    rows: list[tuple[str, float, float, Callable[[float], str]]] = [
        ("tokens per s", estimate.time.tokens_per_s, measured.tokens_per_s, rate)
    ]
    if measured.peak_allocated_bytes:
        rows = [
            ("peak allocated, GiB", memory.peak_allocated_bytes, measured.peak_allocated_bytes, _in_gib),
            ("peak reserved, GiB", memory.peak_reserved_bytes, measured.peak_reserved_bytes, _in_gib),
            *rows,
        ]
    cluster = estimate.cluster
    predicted_for = f"{cluster.gpus} × {cluster.gpu.name}"
    where = "" if measured.peak_allocated_bytes else " without a GPU"
    steps = "1 step" if measured.steps == 1 else f"{measured.steps} steps"
    table = table_of(
        [
            Column(header="", cells=[name for name, *_ in rows], justify="left"),
            Column(header="Predicted", cells=[shown(predicted) for _, predicted, _, shown in rows]),
            Column(header="Measured", cells=[shown(found) for _, _, found, shown in rows]),
            Column(
                header="Error", cells=[f"{100 * (predicted / found - 1):+.1f} %" for _, predicted, found, _ in rows]
            ),
        ]
    )
    return section(f"Predicted for {predicted_for} beside measured{where} over {steps}", table)


def _in_gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:,.2f}"
