from __future__ import annotations

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from advisor.launch.files import Launch, render
from advisor.report.recommendation import recommendation_report, shell_lines
from advisor.report.terminal import show
from advisor.search.results import Recommendation
from report.samples import CLUSTER, JOB, QWEN, made_estimate, made_recommendation, made_refusal

WIDTHS = (60, 72, 80, 100, 140, 200)


def launch() -> Launch:
    best = made_recommendation().best
    assert best
    return render(QWEN, JOB, best.plan, CLUSTER)


def printed(
    capsys: pytest.CaptureFixture[str],
    answer: Recommendation,
    width: int,
    started: Launch | None = None,
    written: tuple[Path, ...] = (),
) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    show(recommendation_report(answer, started, width=width, written=written), console)
    return capsys.readouterr().out


def table(text: str) -> list[str]:
    """The header and rows of the table of plans."""
    lines = text.splitlines()
    rule = next(index for index, line in enumerate(lines) if line.startswith("───"))
    return lines[rule - 2 : next(index for index, line in enumerate(lines) if line.startswith("Batch:"))]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_exceeds_the_page_or_ends_in_spaces(capsys: pytest.CaptureFixture[str], width: int) -> None:
    for answer, started in ((made_recommendation(), launch()), (made_refusal(), None)):
        lines = printed(capsys, answer, width, started).splitlines()

        assert max(map(cell_len, lines)) <= width
        assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_with_an_ellipsis(capsys: pytest.CaptureFixture[str], width: int) -> None:
    assert "…" not in printed(capsys, made_recommendation(), width, launch())


@pytest.mark.parametrize("width", WIDTHS)
def test_peak_step_time_and_rate_stand_at_every_width(capsys: pytest.CaptureFixture[str], width: int) -> None:
    rows = table(printed(capsys, made_recommendation(), width))

    first = next(line for line in rows if line.startswith("ZeRO-1"))
    assert {"51.3", "2.31", "56,700"} <= set(first.split())


def test_the_answer_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    answer = made_recommendation()

    lines = printed(capsys, answer, 140).splitlines()

    assert lines[0] == answer.headline
    assert lines[1] == "Why: memory is not what limits it, and it sends least."


def test_the_table_at_140_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert table(printed(capsys, made_recommendation(), 140)) == [
        "                                    Check-  Peak  Range  Host  Sent  Step  Tokens",
        "Strategy                     Batch  points   GiB    GiB   GiB    GB     s   per s   MFU",
        "───────────────────────────────────────────────────────────────────────────────────────",
        "ZeRO-1                       4 × 4    none  51.3  49–54    30   9.3  2.31  56,700  48 %",
        "DDP                          4 × 4    none  62.7  60–66    30   9.3  2.36  55,500  47 %",
        "FSDP grad-op                 4 × 4    none  48.9  46–52    30   9.3  2.41  54,400  46 %",
        "FSDP full shard              8 × 2    full  38.2  36–40    30  13.9  2.66  49,300  41 %",
        "ZeRO-3                       4 × 4    none  40.4  38–43    30  18.5  2.73  48,000  40 %",
        "ZeRO-2 + optimizer offload  16 × 1    none  73.9  70–78    58   9.3  4.90  26,700  22 %",
    ]


def test_at_80_columns_long_names_go_on_below(capsys: pytest.CaptureFixture[str]) -> None:
    assert table(printed(capsys, made_recommendation(), 80))[-2:] == [
        "ZeRO-2 + optimizer  16 × 1    none  73.9  70–78    58   9.3  4.90  26,700  22 %",
        " offload",
    ]


def test_columns_left_out_are_named_with_the_width_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No room here for: Host GiB, MFU. Widen to 79 columns, or give --csv." in printed(
        capsys, made_recommendation(), 70
    )


def test_a_tight_plan_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    answer = made_recommendation()
    tight = replace(answer, plans=(*answer.plans[:-1], replace(answer.plans[-1], verdict="tight")))

    assert "tight" not in printed(capsys, answer, 100)
    assert " tight " in table(printed(capsys, tight, 100))[-1]


def test_every_assumption_is_said_by_the_name_of_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, made_recommendation(), 140)

    assert (
        "Assumed (flags of these names change it): gpu A100-80GB, link nvlink3, host-memory 1024 GiB, seq-len 2048."
        in text
    )
    assert "gpus 4" not in text


def test_each_other_strategy_has_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    answer = made_recommendation()
    text = printed(capsys, answer, 200)

    assert all(plan.why in text for plan in answer.plans[1:])
    assert "ZeRO-3 + optimizer and parameter offload  short by 12.3 GiB  Host memory holds 62.0 GiB" in text
    assert "What would do: 80 GiB of host memory (--host-memory 80)." in text


def test_where_nothing_fits_the_shortfall_stays_and_the_table_goes(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, made_refusal(), 80)

    assert text.startswith("No: nothing fits on 4 A100-80GB")
    assert "short by 12.3 GiB" in text
    assert "Tokens" not in text
    assert "To start it" not in text


@pytest.mark.parametrize("width", [20, 60, 80, 140, 400])
def test_the_command_pastes_as_the_words_it_was_made_of(width: int) -> None:
    started = launch()

    pasted = shlex.split(shell_lines(started, width).replace("\\\n", ""))

    assert pasted == shlex.split(started.shell())


def test_written_files_are_named_with_the_command_that_starts_them(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("my runs")
    written = tuple(folder / file.name for file in launch().files)

    text = printed(capsys, made_recommendation(), 100, launch(), written)

    assert "bash 'my runs/run.sh'" in text
    assert "--out" not in text


def test_ranges_of_a_column_have_one_number_of_decimals(capsys: pytest.CaptureFixture[str]) -> None:
    small = made_estimate(device_gib=9.7)

    rows = table(printed(capsys, replace(made_recommendation(), plans=(small, *made_recommendation().plans)), 140))

    assert "9.2–10.3" in rows[3]
    assert "48.7–54.4" in rows[4]


def test_several_machines_are_each_to_be_started(capsys: pytest.CaptureFixture[str]) -> None:
    answer = made_recommendation()
    written = tuple(Path("run") / file.name for file in launch().files)
    two = replace(answer, cluster=replace(answer.cluster, nodes=2))

    assert "on each of the 2 machines" in " ".join(printed(capsys, two, 140, launch(), written).split())
    assert "machines" not in printed(capsys, answer, 140, launch(), written)
