"""Plans predicted and measured, to read and for programs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from advisor.catalog.request import resolve
from advisor.report.machine import csv_text, json_text
from advisor.report.validate import validation_object, validation_report, validation_rows
from advisor.specs.job import Job
from advisor.specs.plan import Plan, Strategy
from advisor.validation.accuracy import COUNTERS, Case, Comparison
from advisor.validation.campaign import Check, Validation
from advisor.validation.measured import Measured, Messages, PhaseMeasured
from advisor.validation.outcome import Outcome
from advisor.validation.planned import Planned, PlannedRun
from advisor.validation.record import Execution, Record
from advisor.validation.twin import Twin

MIB = 2**20
QUESTION = resolve("gpt2", gpu="T4", gpus=2, precision="fp32")
PLAN = Plan(strategy=Strategy.ZERO2, gpus=2, micro_batch=1)
PHASE = PhaseMeasured(peak_allocated_bytes=7, end_allocated_bytes=5, peak_reserved_bytes=None, seconds=0.5)
RANK = Measured(
    device="cpu",
    states_bytes=3,
    forward=PHASE,
    backward=PHASE,
    step=PHASE,
    step_s=(0.5, 0.25),
    tokens_per_step=64,
    host_peak_bytes=600 * MIB,
    communication=(Messages(collective="all_reduce", calls=1234, size_bytes=5 * MIB, seconds=0.25),),
)
CASE = Case("gpt2 twin", {"model_type": "gpt2", "n_layer": 2}, Job(sequence_length=128, global_batch=2), PLAN, rank=1)
ON_CPU = COUNTERS[:7]


def record(outcome: Outcome) -> Record:
    execution = Execution(
        id="1",
        started="2026-01-02T03:04:05+00:00",
        outcome=outcome,
        launcher="deepspeed",
        device="cpu",
        steps=3,
        seconds=1.5,
        stands_for="gpt2",
        cuts=("layers 12 → 2", "ranks 8 → 2"),
        ranks=(RANK, RANK) if outcome.ran else (),
    )
    return Record("a run", CASE, dict.fromkeys(ON_CPU, 100 * MIB) if outcome.ran else {}, {"torch": "2"}, execution)


RAN = Check(
    record=record(Outcome("ran")),
    comparison=Comparison(dict.fromkeys(ON_CPU, 100 * MIB) | {"peak": 101 * MIB}, dict.fromkeys(ON_CPU, 100 * MIB)),
)
FAILED = Check(record=record(Outcome("timeout", ("waiting", "did not end within 5 s"))), comparison=None, resumed=True)


def made(*checks: Check) -> Validation:
    run = PlannedRun(plan=PLAN, case=CASE, launcher="deepspeed", cuts=("layers 12 → 2",), rank=0)
    twin = Twin({}, QUESTION.model, ("layers 12 → 2",), 0.1, 0.3)
    planned = Planned(question=QUESTION, device="cpu", twin=twin, runs=(run,) * len(checks), warnings=("mind",))
    return Validation(planned=planned, checks=checks, records=Path("records.jsonl"))


def printed(found: Validation, width: int = 100) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        for part in validation_report(found, width=width):
            console.print(part)
    return capture.get()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("found", [made(RAN), made(FAILED), made(RAN, FAILED)])
def test_it_fits_the_page(found: Validation, width: int) -> None:
    assert max(map(cell_len, printed(found, width).splitlines())) <= width


def test_the_headline_says_how_many_ran_and_how_far_off_they_are() -> None:
    text = " ".join(printed(made(RAN, FAILED)).split())

    assert text.startswith(
        "Validated: 1 of 2 plans ran on this machine's CPU; "
        "states as predicted to the byte, peak off by at most +1.000 %."
    )
    assert "Cut: layers 12 → 2; ranks 8 → 2." in text
    assert "did not end within 5 s" in text
    assert "timeout, recorded before" in text


def test_where_nothing_ran_nothing_is_validated() -> None:
    assert printed(made(FAILED)).startswith("Not validated: 0 of 1 plan ran")


def test_predicted_and_measured_stand_side_by_side() -> None:
    peak = next(line for line in printed(made(RAN)).splitlines() if "highest of all" in line)

    assert peak.split()[-5:] == ["101.000", "100.000", "+1.000", "%", f"+{MIB:,}"]


def test_what_deepspeed_logged_is_shown() -> None:
    assert "all_reduce  1,234  5.000  250 ms" in " ".join(printed(made(RAN)).split("\n")[-9:])


def test_programs_get_every_counter_and_every_outcome() -> None:
    found = made(RAN, FAILED)
    whole = json.loads(json_text(validation_object(found)))
    rows = validation_rows(found)

    ran, failed = whole["runs"]
    assert [each["counter"] for each in ran["counters"]] == list(ON_CPU)
    assert failed["counters"] == []
    assert failed["last_lines"] == ["waiting", "did not end within 5 s"]
    assert (whole["all_ran"], whole["interrupted"]) == (False, False)
    assert len(rows) == len(ON_CPU) + 1
    assert rows[-1]["outcome"] == "timeout"
    assert csv_text(rows).count("\n") == len(rows) + 1


def test_on_gpus_the_predicted_time_stands_beside_the_measured() -> None:
    found = made(replace(RAN, predicted_step_s=0.4))

    assert "400 ms" in printed(found, width=120)
