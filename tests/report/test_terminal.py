from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from advisor.report.terminal import NARROWEST, PIPED_WIDTH, accept_any_text, results, show


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def test_a_pipe_has_a_fixed_width() -> None:
    assert results().width == PIPED_WIDTH


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("140", 140), ("20", NARROWEST), ("wide", PIPED_WIDTH)])
def test_columns_are_honoured_down_to_what_a_table_needs(
    monkeypatch: pytest.MonkeyPatch, columns: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)

    assert results().width == width


def test_a_pipe_gets_no_colour(capsys: pytest.CaptureFixture[str]) -> None:
    show([Text("Fits", style="bold green")], results())

    assert capsys.readouterr().out == "Fits\n"


def test_no_color_leaves_out_colours_where_colour_is_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    show([Text("Fits", style="green")], results())
    assert "\x1b[32m" in capsys.readouterr().out

    monkeypatch.setenv("NO_COLOR", "1")
    show([Text("Fits", style="green")], results())
    assert capsys.readouterr().out == "Fits\n"


def test_lines_end_where_their_text_ends(capsys: pytest.CaptureFixture[str]) -> None:
    show([Padding(Text("one \\"), (0, 0, 0, 2))], Console(file=io.StringIO(), width=40))

    assert capsys.readouterr().out == "  one \\\n"


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", "4 x A100: 38-41 GiB ##.. -- ? ?"),
        ("latin-1", "4 × A100: 38-41 GiB ##.. -- ? é"),
        ("utf-8", "4 × A100: 38–41 GiB ██░░ ── 千 é"),
    ],
)
def test_what_an_encoding_cannot_hold_becomes_plain(encoding: str, printed: str) -> None:
    held = io.BytesIO()
    stream = io.TextIOWrapper(held, encoding=encoding)
    accept_any_text(stream)

    stream.write("4 × A100: 38–41 GiB ██░░ ── 千 é")
    stream.flush()

    assert held.getvalue().decode(encoding) == printed
