"""Starts what was written, and reads what the training measured of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from advisor.errors import RunError
from advisor.launch.training import Launch

LOG = "log.jsonl"
"""What train.py is told to keep its steps in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What train.py's steps took, over all processes. The first step counts only where it is the only one."""

    steps: int
    peak_allocated_bytes: int
    """Of the fullest GPU; 0 where there is none."""
    peak_reserved_bytes: int
    tokens_per_s: float
    """Of the median step, all GPUs."""


def start(launch: Launch, folder: Path) -> tuple[int, Measured | None]:
    """Start *launch*, whose files lie in *folder*, there, its output going where this process's goes.

    The exit code, 128 and the signal's number where one ended it, and what its steps measured, if any were logged.
    Raises RunError where the program is not there.
    """
    before = len(_lines(folder))
    arguments = [f"--log={LOG}"] if launch.keeps_log and not launch.submits else []
    program, *words = launch.command_in_place
    try:
        process = subprocess.Popen([program, *words, *arguments], cwd=folder, env=os.environ | {"PATH": _path()})
    except FileNotFoundError as error:
        raise RunError(f"{program} is not installed on this machine; give the command where it is") from error
    code = _ended(process)
    return code if code >= 0 else 128 - code, _measured(_lines(folder)[before:])


def _path() -> str:
    """Where programs are looked for: last beside this Python, whose environment need not be activated."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def _ended(process: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the terminal interrupts the training too, which then ends by itself


def _lines(folder: Path) -> list[str]:
    """The whole lines of the log: a training that was killed may have left half of one."""
    try:
        return (folder / LOG).read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []


def _measured(lines: list[str]) -> Measured | None:
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    steps = [record for record in records if "step" in record]
    if not steps:
        return None
    steps = steps[1:] or steps
    return Measured(
        steps=len(steps),
        peak_allocated_bytes=max(step["peak_allocated_bytes"] for step in steps),
        peak_reserved_bytes=max(step["peak_reserved_bytes"] for step in steps),
        tokens_per_s=median(step["tokens_per_s"] for step in steps),
    )
