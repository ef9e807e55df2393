"""Tables and paragraphs that fit the page: columns are left out by rank, numbers never cut."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import Box
from rich.cells import cell_len
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

GAP = 2
"""Characters of space between two columns."""

INDENT = 2
"""Characters that the content of a section stands in from its title."""

# Passed off as ASCII, or rich would swap it for a box with dividers on a stream that cannot hold the line; such a
# stream replaces the line itself (advisor.report.terminal).
_RULED = Box("    \n    \n ── \n    \n    \n    \n    \n    \n", ascii=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column: a header of one or more lines, and a cell for each row."""

    header: str
    cells: Sequence[str]
    justify: Literal["left", "right"] = "right"
    rank: int = 0
    """What is left out first where room is short: the highest rank. Rank 0 stays."""

    @property
    def width(self) -> int:
        return max(cell_len(line) for text in (self.header, *self.cells) for line in text.split("\n"))

    @property
    def title(self) -> str:
        """The header on one line."""
        return " ".join(self.header.split())


def fitting(columns: Iterable[Column], width: int) -> tuple[list[Column], list[Column]]:
    """The columns that stand side by side in *width*, and those left out for it."""
    kept = list(columns)
    dropped: list[Column] = []
    while natural_width(kept) > width and any(column.rank for column in kept):
        last = max(kept, key=lambda column: column.rank)
        kept.remove(last)
        dropped.append(last)
    return kept, dropped


def natural_width(columns: Sequence[Column]) -> int:
    """Characters that *columns* take side by side, nothing wrapped."""
    return sum(column.width for column in columns) + GAP * (len(columns) - 1)


def table_of(columns: Sequence[Column], *, strong_rows: Iterable[int] = ()) -> Table:
    """*columns* under a ruled header. Words on the left may wrap, numbers on the right never do."""
    table = Table(box=_RULED, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0), header_style="bold")
    lines = max(column.header.count("\n") for column in columns)
    for column in columns:
        right = column.justify == "right"
        header = "\n" * (lines - column.header.count("\n")) + column.header
        table.add_column(
            Text(header, justify=column.justify),
            justify=column.justify,
            no_wrap=right,
            min_width=column.width if right else None,
            overflow="fold",
        )
    strong = set(strong_rows)
    for index, cells in enumerate(zip(*(column.cells for column in columns), strict=True)):
        table.add_row(*map(Text, cells), style="bold" if index in strong else None)
    return table


def fitted_table(
    columns: Sequence[Column], width: int, *, legend: str = "", strong: bool = False
) -> list[RenderableType]:
    """The columns that have room in *width*, what they mean, and which others there are; *strong* is the first row."""
    kept, dropped = fitting(columns, width)
    parts: list[RenderableType] = [table_of(kept, strong_rows=[0] if strong else ())]
    if legend:
        parts.append(faint(legend))
    if dropped:
        names = ", ".join(column.title for column in reversed(dropped))
        parts.append(faint(f"No room here for: {names}. Widen to {natural_width(columns)} columns, or give --csv."))
    return parts


def list_of(entries: Iterable[Sequence[str]]) -> Table:
    """Entries as rows without a header: short words first, the last cell wraps under itself."""
    table = Table.grid(padding=(0, GAP, 0, 0))
    for entry in entries:
        table.add_row(*map(Text, entry))
    for column in table.columns:
        column.no_wrap, column.overflow = column is not table.columns[-1], "fold"
    return table


def section(title: str, *content: RenderableType) -> list[RenderableType]:
    """A blank line, a title, and *content* set in under it."""
    return [Text(), Text(title, style="bold"), *(Padding(part, (0, 0, 0, INDENT)) for part in content)]


def verbatim(text: str) -> Text:
    """*text* to be copied, set in like a section's content: its lines stay whole however narrow the page."""
    return Text(textwrap.indent(text, " " * INDENT), no_wrap=True, overflow="ignore")


def faint(text: str) -> Text:
    """What explains rather than answers."""
    return Text(text, style="dim")
