from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from advisor.catalog.models import ModelRow
from advisor.report.catalogs import gpus_report, models_report
from advisor.report.terminal import show
from report.samples import A100, T4

MODELS = (
    ModelRow("Qwen2.5-1.5B", "qwen2", 1_543_714_304, 28, 1536, 151_936, 131_072),
    ModelRow("bloom", "bloom", 176_247_271_424, 70, 14_336, 250_880, None),
)


def printed(capsys: pytest.CaptureFixture[str], parts: list[RenderableType], width: int) -> list[str]:
    show(parts, Console(file=io.StringIO(), width=width, highlight=False, markup=False))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_catalogs_fit_the_page(capsys: pytest.CaptureFixture[str], width: int) -> None:
    for parts in (models_report(MODELS, width=width), gpus_report([A100, T4], width=width)):
        lines = printed(capsys, parts, width)

        assert max(map(cell_len, lines)) <= width
        assert "…" not in "".join(lines)


def test_models_show_their_size_and_shape(capsys: pytest.CaptureFixture[str]) -> None:
    *_, qwen, bloom = printed(capsys, models_report(MODELS, width=100), 100)

    assert qwen.split() == ["Qwen2.5-1.5B", "1.54", "B", "qwen2", "28", "1,536", "151,936", "131,072"]
    assert bloom.split()[-1] == "any"


def test_gpus_show_memory_bandwidth_and_peaks(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, gpus_report([A100, T4], width=120), 120)

    a100, t4 = (next(line.split() for line in lines if line.startswith(name)) for name in ("A100", "T4"))
    assert a100 == ["A100-80GB", "A100", "79.2", "2,039", "312", "20", "yes", "nvlink3"]
    assert t4 == ["T4", "14.6", "320*", "65", "8", "no", "pcie3-x16"]
