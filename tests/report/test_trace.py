"""The comparison of a plan predicted and traced, to read and for programs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from advisor.catalog.request import resolve
from advisor.report.machine import json_text
from advisor.report.trace import trace_object, trace_report, trace_rows
from advisor.specs.plan import Plan, Strategy
from advisor.validation.traced import PHASES, Reading, TracedPlan

GIB = 2**30

MADE = TracedPlan(
    question=resolve("gpt2", gpu="T4", gpus=2),
    plan=Plan(strategy=Strategy.FSDP, gpus=2, micro_batch=1, accumulation_steps=32),
    rank=0,
    how="fake tensors",
    parameters=124_439_808,
    predicted=Reading(
        {phase: number * GIB for number, phase in enumerate(PHASES, 1)}, {"parameters": 5 * GIB, "logits": 2 * GIB}
    ),
    traced=Reading(
        {phase: number * GIB for number, phase in enumerate(PHASES, 1)} | {"peak": 8 * GIB},
        {"parameters": 5 * GIB, "optimizer": 3 * GIB, "temporaries": 4},
    ),
    seconds=1.5,
)
UNKNOWN = replace(MADE, predicted=Reading({"between steps": GIB}, {}))


def printed(found: TracedPlan, width: int = 100) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        for part in trace_report(found, width=width):
            console.print(part)
    return capture.get()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("found", [MADE, UNKNOWN])
def test_it_fits_the_page(found: TracedPlan, width: int) -> None:
    assert max(map(cell_len, printed(found, width).splitlines())) <= width


def test_the_error_is_relative_to_what_was_traced() -> None:
    assert MADE.error("peak") == pytest.approx(7 / 8 - 1)
    assert "the prediction off by -12.500 %" in printed(MADE)


def test_what_nothing_is_held_of_is_zero_and_what_is_not_known_is_absent() -> None:
    ledger = {entry["category"]: entry for entry in trace_object(MADE)["ledger"]}  # type: ignore[attr-defined]

    assert ledger["optimizer"]["predicted_bytes"] == 0
    assert ledger["logits"]["traced_bytes"] == 0
    assert "temporaries" not in ledger
    assert {entry["predicted_bytes"] for entry in trace_object(UNKNOWN)["ledger"]} == {None}  # type: ignore[attr-defined]


def test_without_a_formula_the_trace_stands_alone() -> None:
    text = printed(UNKNOWN)

    assert "which no formula predicts" in text
    assert UNKNOWN.error("peak") is None
    assert UNKNOWN.error("between steps") == 0


def test_json_holds_every_phase_in_order() -> None:
    found = json.loads(json_text(trace_object(MADE)))

    assert found["schema"] == "advisor/1"
    assert [each["phase"] for each in found["phases"]] == list(PHASES)
    assert found["plan"]["strategy"] == "fsdp"


def test_each_phase_and_category_is_a_row() -> None:
    rows = trace_rows(MADE)

    assert [row["name"] for row in rows] == [*PHASES, "parameters", "optimizer", "logits"]
    assert rows[0] == {"kind": "phase", "name": "between steps", "predicted_bytes": GIB, "traced_bytes": GIB}
