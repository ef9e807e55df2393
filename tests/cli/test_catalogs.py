from __future__ import annotations

import csv
import io
import json

import pytest
from report.samples import A100, T4

from advisor.catalog.clusters import find_cluster
from advisor.catalog.models import ModelRow
from cli.conftest import Run

MODELS = (
    ModelRow("Qwen2.5-1.5B", "qwen2", 1_543_714_304, 28, 1536, 151_936, 131_072),
    ModelRow("DeepSeek-R1-Distill-Qwen-1.5B", "qwen2", 1_777_088_000, 28, 1536, 151_936, 131_072),
    ModelRow("gpt2", "gpt2", 124_439_808, 12, 768, 50_257, 1024),
)

CLUSTERS = (find_cluster("dgx-h100"), find_cluster("4x3090-nvlink-pairs"))


@pytest.fixture(autouse=True)
def _catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advisor.catalog.models.model_index", lambda: MODELS)
    monkeypatch.setattr("advisor.catalog.gpus.all_gpus", lambda: (A100, T4))
    monkeypatch.setattr("advisor.catalog.clusters.all_clusters", lambda: CLUSTERS)


def test_models_are_searched_by_name_and_family(run: Run) -> None:
    assert len(run("models").stdout.splitlines()) == 2 + len(MODELS) + 1
    assert "gpt2" not in run("models", "QWEN").stdout
    assert "R1-Distill" in run("models", "QWEN").stdout


def test_gpus_are_searched_by_every_name_and_architecture(run: Run) -> None:
    for text in ("a100", "SXM4", "ampere"):
        assert "A100-80GB" in run("gpus", text).stdout
        assert "T4" not in run("gpus", text).stdout


def test_clusters_are_searched_by_every_name_and_gpu(run: Run) -> None:
    assert "dgx-h100" in run("clusters", "h100").stdout
    assert "dgx-h100" not in run("clusters", "3090").stdout
    assert "nvlink-bridge in 2+2, pcie4" in run("clusters", "4x3090", columns=120).stdout


@pytest.mark.parametrize(("command", "count"), [("models", 3), ("gpus", 2), ("clusters", 2)])
def test_machine_forms_hold_the_whole_catalog(run: Run, command: str, count: int) -> None:
    answer = json.loads(run(command, "--json").stdout)
    rows = list(csv.DictReader(io.StringIO(run(command, "--csv").stdout)))

    assert answer["schema"] == "advisor/1"
    assert len(answer[command]) == len(rows) == count
    assert [each["name"] for each in answer[command]] == [row["name"] for row in rows]


@pytest.mark.parametrize("command", ["models", "gpus", "clusters"])
def test_a_search_without_a_match_says_where_all_are(run: Run, command: str) -> None:
    result = run(command, "abacus")

    assert (result.exit_code, result.stdout) == (2, "")
    assert "'abacus'" in result.stderr
    assert f"`advisor {command}` lists all" in result.stderr
