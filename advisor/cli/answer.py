"""How an answer is printed on stdout, and on stderr what is said beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

Form = Literal["table", "json", "csv"]

NOTHING_FITS = 3
"""Exit code where the question was answered, and the answer is that it does not fit."""


def form_of(as_json: bool, as_csv: bool) -> Form:
    """The one form asked for."""
    if as_json and as_csv:
        raise click.UsageError("--json and --csv are two forms of one answer; give one of them")
    return "json" if as_json else "csv" if as_csv else "table"


def print_answer(
    form: Form,
    *,
    whole: Callable[[], Mapping[str, object]],
    rows: Callable[[], Sequence[Mapping[str, object]]],
    page: Callable[[int], Iterable[RenderableType]],
) -> None:
    """Print the one of *whole* (JSON), *rows* (CSV) and *page* (to read, for a width) that *form* names."""
    if form == "table":
        from advisor.report.terminal import results, show

        console = results()
        show(page(console.width), console)
    else:
        from advisor.report.machine import csv_text, json_text

        click.echo(json_text(whole()) + "\n" if form == "json" else csv_text(rows()), nl=False)


def traced_first(traces: bool) -> AbstractContextManager[object]:
    """While a model is traced, say so on a terminal's stderr, with the time that has passed."""
    return working("Running the model's code without its data") if traces else nullcontext()


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say on stderr what is going on and for how long; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(what, total=None)
        yield


def note(text: str) -> None:
    """Print one line that is no part of the answer."""
    click.echo(text, err=True)


def notes(texts: Iterable[str]) -> None:
    """Print each of *texts* once, marked as a note."""
    for text in dict.fromkeys(texts):
        note(f"Note: {text}")
