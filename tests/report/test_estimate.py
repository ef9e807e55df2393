from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from advisor.cost.results import Estimate
from advisor.report.estimate import estimate_report
from advisor.report.terminal import show
from advisor.specs.plan import Offload, Strategy
from advisor.step.program import Line
from report.samples import GIB, made_estimate


def printed(capsys: pytest.CaptureFixture[str], estimate: Estimate, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    show(estimate_report(estimate, width=width), console)
    return capsys.readouterr().out


def row(text: str, section: str, start: str) -> list[str]:
    """The words of the line that begins with *start* under the title that begins with *section*."""
    _, _, after = text.partition(f"\n\n{section}")
    return next(line.split() for line in after.splitlines() if line.strip().startswith(start))


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_no_line_exceeds_the_page_or_is_cut(capsys: pytest.CaptureFixture[str], width: int) -> None:
    text = printed(capsys, made_estimate(Strategy.ZERO2, offload=Offload.OPTIMIZER), width)

    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text


@pytest.mark.parametrize(("verdict", "word"), [("fits", "Fits: "), ("tight", "Tight: "), ("no", "Does not fit: ")])
def test_the_verdict_comes_first_with_its_reason(capsys: pytest.CaptureFixture[str], verdict: str, word: str) -> None:
    estimate = replace(made_estimate(why="51.3 of 79.2 GiB used per GPU"), verdict=verdict)  # type: ignore[arg-type]

    assert printed(capsys, estimate).splitlines()[0] == f"{word}51.3 of 79.2 GiB used per GPU."


def test_the_ledger_groups_entries_and_totals_them(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, made_estimate(), 80)

    assert row(text, "What is allocated", "optimizer")[1:4] == ["4.32", "8.8", "%"]
    assert row(text, "What is allocated", "Adam momentum")[-1] == "2.88"
    assert row(text, "What is allocated", "parameters")[1:] == [
        "weights,",
        "bf16",
        "2.88",
        "5.8",
        "%",
        "█░░░░░░░░░░░░░░░░░░░",
    ]
    assert row(text, "What is allocated", "total")[1:3] == ["49.30", "100"]


def test_wide_pages_show_bytes_too(capsys: pytest.CaptureFixture[str]) -> None:
    estimate = made_estimate()

    assert f"{estimate.memory.peak_allocated_bytes:,}" in printed(capsys, estimate, 140)
    assert f"{estimate.memory.peak_allocated_bytes:,}" not in printed(capsys, estimate, 80)


def test_each_phase_is_drawn_against_the_memory_of_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    memory = made_estimate().memory
    text = printed(capsys, made_estimate())

    for phase in memory.timeline:
        cells = row(text, "Peak of each phase", phase.phase)
        assert cells[1:3] == [f"{phase.peak_bytes / GIB:,.2f}", f"{phase.end_bytes / GIB:,.2f}"]
        assert cells[3].count("█") == round(20 * phase.peak_bytes / memory.capacity_bytes)


def test_host_memory_is_itemised_for_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    estimate = made_estimate(Strategy.ZERO2, offload=Offload.OPTIMIZER)
    empty = replace(estimate, memory=replace(estimate.memory, host_ledger=()))

    for each in (estimate, empty):
        assert "Host memory of one machine: 30.0 GiB of 1,024 GiB" in printed(capsys, each)
    assert "the tensors of one of its 4 processes:" in printed(capsys, estimate)
    assert row(printed(capsys, estimate), "Host memory", "fp32 weights")[-1] == "1.44"
    assert "processes" not in printed(capsys, empty)


def test_entries_too_small_to_show_are_summed(capsys: pytest.CaptureFixture[str]) -> None:
    estimate = made_estimate()
    small = (Line("activations", "dust", 3 * 2**20), Line("activations", "more dust", 3 * 2**20))
    dusty = replace(estimate, memory=replace(estimate.memory, ledger=(*estimate.memory.ledger, *small)))

    text = printed(capsys, dusty)

    assert "more dust" not in text
    assert row(text, "What is allocated", "smaller entries")[-1] == "0.01"


def test_a_category_of_one_entry_that_shows_is_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    estimate = made_estimate()
    speck = Line("activations", "speck", 2**20)
    specked = replace(estimate, memory=replace(estimate.memory, ledger=(*estimate.memory.ledger, speck)))

    assert row(printed(capsys, specked), "What is allocated", "activations")[1:4] == ["saved", "by", "28"]


def test_traffic_says_what_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, made_estimate())

    assert row(text, "What one GPU sends", "gradients")[1:] == ["reduce-scatter", "nvlink3", "4.65", "0.042", "0.011"]


def test_one_gpu_sends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "What one GPU sends" not in printed(capsys, replace(made_estimate(), traffic=()))


def test_the_parts_of_a_step_stand_under_it(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, made_estimate())

    assert row(text, "Time of a step", "step")[1:3] == ["2.310", "s"]
    assert [row(text, "Time of a step", part)[1] for part in ("computing", "waiting", "optimizer")] == [
        "2.230",
        "0.053",
        "0.027",
    ]
    assert row(text, "Time of a step", "MFU")[1] == "48"
