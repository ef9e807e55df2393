"""Records to read, and how far the model is from them."""

from __future__ import annotations

import json

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from advisor.report.machine import json_text
from advisor.report.records import records_object, records_report, score_rows, scores_object, scores_report
from advisor.validation.outcome import Outcome
from advisor.validation.recorded import Records
from advisor.validation.store import shipped
from report.test_validate import record

MADE = Records((record(Outcome("timeout", ("late",))),))
OF_THE_PACKAGE = Records(tuple(shipped())[::12])


def printed(parts: list[RenderableType], width: int) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_it_fits_the_page(width: int) -> None:
    for text in (
        printed(records_report(MADE, width=width), width),
        printed(scores_report(OF_THE_PACKAGE, width=width), width),
    ):
        assert max(map(cell_len, text.splitlines())) <= width


def test_a_record_is_one_line() -> None:
    *_, line = printed(records_report(MADE, width=120), 120).splitlines()

    assert line.split()[:7] == ["2026-01-02", "03:04", "gpt2", "ZeRO-2", "×", "2", "deepspeed"]
    assert line.split()[7:] == ["cpu", "timeout", "-", "-", "-"]


def test_scores_name_strategy_device_and_worst_case() -> None:
    rows = score_rows(OF_THE_PACKAGE.scores())

    assert sum(int(str(row["count"])) for row in rows if row["counter"] == "peak") == len(OF_THE_PACKAGE.records)
    assert {row["device"] for row in rows} == {"cpu"}
    assert all(row["worst"] for row in rows)
    assert all(float(str(row["mean_error"])) <= float(str(row["max_error"])) for row in rows)


def test_programs_get_strict_json() -> None:
    assert json.loads(json_text(records_object(MADE)))["records"][0]["outcome"] == "timeout"
    assert len(json.loads(json_text(scores_object(OF_THE_PACKAGE)))["scores"]) == len(OF_THE_PACKAGE.scores())
