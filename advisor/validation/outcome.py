"""How a run ended: one word that programs can count, and the last lines that tell a reader why."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from advisor.validation.processes import Ended

OutcomeKind = Literal["ran", "out-of-memory", "timeout", "killed", "crashed", "other-run", "interrupted"]
OUTCOMES: tuple[OutcomeKind, ...] = get_args(OutcomeKind)
"""``killed``: a rank died of a signal. ``other-run``: it ended well, but was not the run that was asked for."""

LAST_LINES = 8
"""Lines of a failed run's output that are kept."""
LINE_SIGNS = 300
"""Characters that are kept of each."""

RAISED = re.compile(r"(\[\w+\]: ?)*[\w.]*(Error|Exception|Exit|Interrupt)(: |$)")
"""How the last line of a traceback begins, with the rank before it or not."""
NO_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|can't allocate memory|Cannot allocate memory|MemoryError\b"
)
"""torch on a GPU, torch on a CPU, the system, Python."""
SIGNALLED = re.compile(r"return code = -\d+|exitcode\s*: -\d+|\bSIG(KILL|SEGV|ABRT|BUS|TERM|XFSZ)\b")
"""deepspeed's launcher, then torch's, on a rank that died of a signal."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    kind: OutcomeKind
    last_lines: tuple[str, ...] = ()

    @property
    def ran(self) -> bool:
        return self.kind == "ran"


def outcome_of(ended: Ended, timeout_s: float) -> Outcome:
    """What a command's end and last words amount to; what ended well may still prove to be another run."""
    lines = last_lines(ended.output)
    if ended.interrupted:
        return Outcome("interrupted", lines)
    if ended.exit_code is None:
        return Outcome("timeout", (*lines, f"did not end within {timeout_s:g} s", *waiting_on_locks()))
    if ended.exit_code == 0:
        return Outcome("ran")
    said = (*lines, f"ended with exit code {ended.exit_code}")
    if NO_MEMORY.search(ended.output):
        return Outcome("out-of-memory", said)
    return Outcome("killed" if ended.exit_code < 0 or SIGNALLED.search(ended.output) else "crashed", said)


def last_lines(output: str) -> tuple[str, ...]:
    """The last lines up to the last error that a rank raised: launchers add summaries of their own."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    raised = [index for index, line in enumerate(lines) if RAISED.match(line) and "ChildFailedError" not in line]
    lines = lines[: raised[-1] + 1] if raised else lines
    return tuple(_printable(line) for line in lines[-LAST_LINES:])


def _printable(line: str) -> str:
    """*line* cut short, and whatever a terminal would obey as escapes."""
    text = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line[:LINE_SIGNS])
    return f"{text[:LINE_SIGNS]} …" if len(line) > LINE_SIGNS else text


def waiting_on_locks() -> tuple[str, ...]:
    """One sentence for each lock in torch's cache of compiled operators.

    A process that compiles an operator holds its lock; all others wait on that file without a word
    (torch/utils/file_baton.py), and for ever where the compiling one was killed.
    """
    sentences = []
    for lock in sorted(extensions_folder().glob("*/*/lock")) + sorted(extensions_folder().glob("*/lock")):
        try:
            minutes = (time.time() - lock.stat().st_mtime) / 60
        except FileNotFoundError:
            continue
        holder = (
            "" if _is_held(lock) else ", and no process here holds it: remove it if no other machine compiles there"
        )
        sentences.append(f"DeepSpeed waits on {lock}, {minutes:.0f} min old{holder}")
    return tuple(sentences)


def extensions_folder() -> Path:
    """Where torch keeps what it compiles (torch/utils/cpp_extension.py ``_get_build_directory``)."""
    import os

    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "torch_extensions"


def _is_held(lock: Path) -> bool:
    """Whether a process of this user has *lock* open."""
    import psutil

    for process in psutil.process_iter():
        try:
            if any(Path(each.path) == lock for each in process.open_files()):
                return True
        except psutil.Error:
            continue
    return False
