"""What is kept of a failed run's output."""

from __future__ import annotations

import pytest

from advisor.validation.outcome import LAST_LINES, OutcomeKind, last_lines, outcome_of
from advisor.validation.processes import Ended


def ended(output: str, exit_code: int | None = 1, interrupted: bool = False) -> Ended:
    return Ended(exit_code, interrupted, output, 1.0)


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (ended("", 0), "ran"),
        (ended("", None), "timeout"),
        (ended("", None, interrupted=True), "interrupted"),
        (ended("KeyError: 'weights'"), "crashed"),
        (ended("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."), "out-of-memory"),
        (ended("OSError: [Errno 12] Cannot allocate memory"), "out-of-memory"),
        (ended("", -9), "killed"),
        (ended("[launch] Process 7 exits with return code = -9", 247), "killed"),
        (ended("  exitcode  : -11 (pid: 7)\n  traceback : Signal 11 (SIGSEGV) received by PID 7"), "killed"),
    ],
)
def test_what_was_said_tells_how_it_ended(found: Ended, kind: OutcomeKind) -> None:
    assert outcome_of(found, timeout_s=5).kind == kind


def test_the_last_error_of_a_rank_ends_what_is_kept() -> None:
    output = "[rank0]: Traceback (most recent call last):\n[rank0]: ValueError: no such layer\nsummary of the launcher"

    assert last_lines(output)[-1] == "[rank0]: ValueError: no such layer"


def test_what_a_terminal_would_obey_is_shown_instead() -> None:
    assert last_lines("\x1b[2Jgone\u202e") == (r"\x1b[2Jgone\u202e",)


def test_long_output_is_cut() -> None:
    lines = last_lines("\n".join("x" * 1000 for _ in range(100)))

    assert len(lines) == LAST_LINES
    assert max(map(len, lines)) < 310
