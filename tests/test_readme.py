"""What the README shows is what the project prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from advisor.catalog import request
from advisor.cli.main import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WIDTH = "100"


def between(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", README, re.DOTALL)
    assert found, f"the README has no part marked {marker}"
    return found[1]


def commands(section: str) -> list[str]:
    part = README.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\$ (.*)$", part, re.MULTILINE)


def test_the_answer_shown_is_the_answer_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "detect", lambda: None)
    asked = commands("Two commands")[1].removeprefix("advisor ").split()

    given = CliRunner(env={"COLUMNS": WIDTH, "NO_COLOR": "1"}).invoke(cli, asked)

    assert given.exit_code == 0
    assert between("answer") == f"```text\n{given.stdout}```\n"


def test_the_python_shown_runs(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

    for each in code:
        subprocess.run([sys.executable, "-c", each], cwd=tmp_path, check=True, capture_output=True)


def test_the_accuracy_shown_is_the_accuracy_recorded() -> None:
    recorded = (ROOT / "benchmarks" / "accuracy.txt").read_text(encoding="utf-8")

    summary = recorded.partition("\n\n")[0]
    assert f"```text\n{summary}\n```\n" in between("accuracy")


def test_the_accuracy_recorded_is_that_of_the_present_model() -> None:
    command = [sys.executable, "benchmarks/accuracy.py"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert printed == (ROOT / "benchmarks" / "accuracy.txt").read_text(encoding="utf-8")


def test_continuous_integration_runs_the_commands_shown() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install, test = commands("Development")

    assert install.removeprefix("pip install ") in script
    assert test in script
