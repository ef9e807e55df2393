from __future__ import annotations

import io
from dataclasses import replace
from functools import cache

import pytest
from rich.cells import cell_len
from rich.console import Console

from advisor.report.compare import comparison_report, headline
from advisor.report.machine import comparison_object, comparison_rows, csv_text, json_text
from advisor.report.terminal import show
from advisor.search.compare import Comparison, compare


@cache
def made() -> Comparison:
    """Four counts, on the last of which the batch does not divide."""
    return compare("gpt2", gpu="A100", gpus=(1, 2, 8, 24), gpus_per_node=2, global_batch=32, seq_len=256, tokens=10**9)


def printed(capsys: pytest.CaptureFixture[str], width: int) -> str:
    show(comparison_report(made(), width=width), Console(file=io.StringIO(), width=width, highlight=False))
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_page_has_each_count_and_what_makes_its_efficiency(capsys: pytest.CaptureFixture[str], width: int) -> None:
    text = printed(capsys, width)

    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text
    assert [line.split()[0] for line in text.splitlines() if line.startswith(("   1 ", "   2 ", "   8 "))] == [
        "1",
        "2",
        "8",
    ]
    efficiency = text.partition("What makes the efficiency")[2].partition("Tokens per second")[0]
    assert "  8 GPUs  loses" in efficiency
    assert "over ib-hdr)" in " ".join(efficiency.split())
    assert "24 GPUs" in text.partition("Where nothing runs")[2]


def test_the_headline_has_the_fewest_and_the_fastest(capsys: pytest.CaptureFixture[str]) -> None:
    text = headline(made())

    assert text.startswith("Fits from 1 × A100-SXM4-80GB on; of 1, 2, 8, 24 the fastest is 8 with ")
    assert printed(capsys, 200).startswith(text)


def test_a_comparison_that_fits_nowhere_says_so() -> None:
    refused = replace(made(), scales=(made().scales[-1],))

    assert headline(refused) == "Does not fit: gpt2 on none of 24 × A100-SXM4-80GB"
    assert headline(replace(refused, way_out="the fewest that would do: 32 GPUs")).endswith(
        "; the fewest that would do: 32 GPUs"
    )


def test_csv_has_one_row_per_count_and_strategy() -> None:
    rows = comparison_rows(made())

    assert len(rows) == sum(len(scale.plans) for scale in made().scales)
    assert [row["gpus"] for row in rows if row["rank"] == 1] == [1, 2, 8]
    assert [row["nodes"] for row in rows if row["rank"] == 1] == [1, 1, 4]
    assert rows[0]["efficiency"] == 1
    assert rows[0].keys() >= {"hours", "cost", "speed_up", "tokens_per_s"}
    assert csv_text(rows).count("\n") == len(rows) + 1


def test_json_has_every_count_with_its_losses_or_its_reason() -> None:
    answer = comparison_object(made())

    assert json_text(answer)
    assert answer["fewest_gpus"] == 1
    counts = answer["counts"]
    assert isinstance(counts, list)
    assert [each["gpus"] for each in counts] == [1, 2, 8, 24]
    assert [bool(each["plans"]) for each in counts] == [True, True, True, False]
    assert "does not divide over 24 GPUs" in counts[3]["why_none"]
    lost = sum(each["share"] for each in counts[2]["losses"])
    assert lost == pytest.approx(1 - counts[2]["plans"][0]["efficiency"])
