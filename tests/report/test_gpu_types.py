from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from advisor.cost.results import Estimate
from advisor.report.gpu_types import headline, ranking_report
from advisor.report.machine import csv_text, json_text, ranking_object, ranking_rows
from advisor.report.terminal import show
from advisor.search.gpu_types import GpuChoice, GpuRanking
from report.samples import CLUSTER, INPUTS, QWEN, T4, made_estimate
from report.test_training import TRAINING


def plan(gpu: str, step_s: float, cost_usd: float) -> Estimate:
    cluster = replace(CLUSTER, gpu=replace(CLUSTER.gpu, name=gpu))
    training = replace(TRAINING, cost_usd=cost_usd, hours=step_s)
    return replace(made_estimate(step_s=step_s), cluster=cluster, training=training)


def made(*plans: Estimate) -> GpuRanking:
    choices = [GpuChoice(cluster=each.cluster, best=each, why_none="") for each in plans]
    none = GpuChoice(cluster=replace(CLUSTER, gpu=T4), best=None, why_none="ZeRO-3: 3.2 GiB short")
    return GpuRanking(
        model=QWEN,
        objective="cost",
        inputs=INPUTS,
        choices=(*choices, none),
        pareto=plans,
        considered=90,
        seconds=0.5,
    )


RANKING = made(plan("L4", 20.0, 30.0), plan("H100", 2.0, 50.0))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_page_has_each_gpu_with_its_hours_and_cost(capsys: pytest.CaptureFixture[str], width: int) -> None:
    show(ranking_report(RANKING, None, width=width), Console(file=io.StringIO(), width=width, highlight=False))
    text = capsys.readouterr().out

    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(line.startswith("L4 ") and "20.00 30.0" in line for line in lines)
    assert "To train on 1,000,000,000 tokens" in lines
    assert "T4 ZeRO-3: 3.2 GiB short." in lines


def test_the_headline_is_the_best_by_what_is_asked_for_and_the_fastest_follows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show(ranking_report(RANKING, None, width=120), Console(file=io.StringIO(), width=120, highlight=False))

    assert capsys.readouterr().out.splitlines()[:2] == [
        "Cheapest: 4 × L4 with ZeRO-1, 6,550 tokens/s, 20.0 hours, 30.0 USD",
        "Fastest: 4 × H100 with ZeRO-1, 65,500 tokens/s, 2.00 hours, 50.0 USD",
    ]


def test_where_nothing_fits_it_says_so() -> None:
    assert headline(made()) == "Does not fit: Qwen2.5-1.5B on 4 of any GPU with a list price"


def test_the_machine_forms_name_each_gpu() -> None:
    answer = ranking_object(RANKING, None)

    assert json_text(answer)
    assert isinstance(answer["gpus"], list)
    assert [(each["gpu"], each["best"] and each["best"]["cost"]) for each in answer["gpus"]] == [
        ("L4", 30.0),
        ("H100", 50.0),
        ("T4", None),
    ]
    assert answer["gpus"][2]["why_none"] == "ZeRO-3: 3.2 GiB short"
    assert [row["gpu"] for row in ranking_rows(RANKING)] == ["L4", "H100"]
    assert csv_text(ranking_rows(RANKING)).startswith("gpu,strategy,")
    assert ranking_object(made(), None)["best"] is None
