"""Where answers are printed: how wide, and in which characters."""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPED_WIDTH = 100
"""Columns of output that goes to no terminal and has no ``COLUMNS`` to follow."""
NARROWEST = 60
"""Columns below which lines may wrap in the terminal: a table needs a few numbers side by side."""

_PLAIN = str.maketrans(
    {
        "×": "x",
        "–": "-",
        "—": "-",
        "−": "-",
        "·": "-",
        "…": "~",
        "≤": "<",
        "≥": ">",
        "→": ">",
        "█": "#",
        "░": ".",
        "─": "-",
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
    }
)
"""ASCII of the same width, so that columns stay aligned."""


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(sign if sign.isascii() else "?" for sign in text), error.end


def accept_any_text(stream: TextIO) -> None:
    """Let *stream* replace what its encoding cannot hold by plain characters instead of failing."""
    if isinstance(stream, io.TextIOWrapper):
        codecs.register_error("advisor-plain", _plainly)
        stream.reconfigure(errors="advisor-plain")


def results() -> Console:
    """A console on stdout that prints text as it is: no markup, no emoji, no guessed highlights."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = PIPED_WIDTH
    console.width = max(console.width, NARROWEST)
    return console


def show(parts: Iterable[RenderableType], console: Console) -> None:
    """Print *parts* one below the other, without the spaces that fill lines up: they would break a pasted command.

    Lines that may not wrap stay whole, longer than the page where they are.
    """
    from rich.text import Text

    with console.capture() as capture:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text) and part.no_wrap)
    sys.stdout.write(re.sub(r" +$", "", capture.get(), flags=re.MULTILINE))
    sys.stdout.flush()
