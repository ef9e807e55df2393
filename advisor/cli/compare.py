"""``advisor compare``: strategies by GPU counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from advisor.cli.answer import NOTHING_FITS, form_of, note, notes, print_answer
from advisor.cli.options import (
    SectionCommand,
    form_options,
    given,
    job_options,
    layout_options,
    option,
    search_options,
    training_options,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from advisor.search.compare import Comparison


def counts(text: str) -> tuple[int, ...]:
    """GPU counts between commas."""
    try:
        return tuple(int(count) for count in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of GPU counts; give one such as 1,2,4,8") from None


@click.command(cls=SectionCommand)
@job_options(
    option(
        "Where",
        "--gpus",
        type=counts,
        metavar="N,N,…",
        default="1,2,4,8,16",
        show_default=True,
        help="The counts to compare.",
    ),
    option(
        "Where",
        "--gpus-per-node",
        type=int,
        default=8,
        show_default=True,
        help="GPUs of a full machine; more than that are several.",
    ),
)
@option(
    "How",
    "--scaling",
    type=click.Choice(["strong", "weak"]),
    default="strong",
    show_default=True,
    help="One global batch for all counts, or that of the fewest GPUs growing with the count.",
)
@search_options
@layout_options
@training_options
@form_options
@click.pass_context
def compare(context: click.Context, /, *, as_json: bool, as_csv: bool, **question: Any) -> None:
    """Compare strategies and GPU counts: speed, efficiency, time and cost.

    Exits with 3 where nothing fits on any count.

    \b
    Examples:
      advisor compare --model Qwen2.5-1.5B --gpus 1,2,4,8,16
      advisor compare --model Llama-3.1-8B --gpu H100 --gpus 8,16,32 --tokens 1e9
      advisor compare --model Qwen2.5-7B --gpus 4,8 --scaling weak --csv
    """
    from advisor.search.compare import compare as search

    form = form_of(as_json, as_csv)
    answer = search(**given(context, question))
    notes(answer.warnings)
    print_answer(
        form,
        whole=lambda: _whole(answer),
        rows=lambda: _rows(answer),
        page=lambda width: _page(answer, width),
    )
    if form == "table":
        note(f"Compared {answer.considered:,} plans in {answer.seconds:.2f} s.")
    if not answer.base:
        context.exit(NOTHING_FITS)


def _whole(answer: Comparison) -> Mapping[str, object]:
    from advisor.report.machine import comparison_object

    return comparison_object(answer)


def _rows(answer: Comparison) -> Sequence[Mapping[str, object]]:
    from advisor.report.machine import comparison_rows

    return comparison_rows(answer)


def _page(answer: Comparison, width: int) -> Iterable[RenderableType]:
    from advisor.report.compare import comparison_report

    return comparison_report(answer, width=width)
