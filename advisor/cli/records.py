"""``advisor records``: what runs were recorded, and how far the present model is from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from advisor.cli.answer import form_of, note, notes, print_answer
from advisor.cli.options import SectionCommand, form_options, option
from advisor.specs.plan import OWN_STRATEGIES
from advisor.validation.outcome import OUTCOMES

if TYPE_CHECKING:
    from rich.console import RenderableType

    from advisor.validation.recorded import Records

WHOSE = ("own", "shipped", "all")


@click.command(cls=SectionCommand)
@click.argument("what", type=click.Choice(["list", "compare"]), default="list")
@option(
    "Which",
    "--from",
    "whose",
    type=click.Choice(WHOSE),
    help="Yours, those of the package, or both.  [default: yours; for compare, both]",
)
@option(
    "Which",
    "--strategy",
    type=click.Choice([each.value for each in OWN_STRATEGIES]),
    help="Of this strategy.",
)
@option("Which", "--outcome", type=click.Choice(OUTCOMES), help="Of runs that ended so.")
@option("Which", "--model", metavar="TEXT", help="Of models with this in their names.")
@option("Which", "--device", metavar="TEXT", help="Of devices with this in their names, such as cpu or H200.")
@form_options
def records(
    *,
    what: str,
    whose: str | None,
    strategy: str | None,
    outcome: str | None,
    model: str | None,
    device: str | None,
    as_json: bool,
    as_csv: bool,
) -> None:
    """List recorded runs, or compare them with what is predicted now.

    compare predicts every recorded run anew with the model of this release. Your records are in the file that
    ADVISOR_RECORDS names, else in the system's folder for data.

    \b
    Examples:
      advisor records --outcome ran --csv > runs.csv
      advisor records compare --strategy zero3
    """
    form = form_of(as_json, as_csv)
    found = _read(whose or ("all" if what == "compare" else "own"), strategy, outcome, model, device)
    notes(found.warnings)
    if form == "table" and not found.records:
        note("No such record; `advisor validate` makes one of each plan that it runs.")
        return
    compares = what == "compare"
    print_answer(
        form,
        whole=lambda: _whole(found, compares),
        rows=lambda: _rows(found, compares),
        page=lambda width: _page(found, compares, width),
    )


def _read(whose: str, strategy: str | None, outcome: str | None, model: str | None, device: str | None) -> Records:
    from advisor.validation.recorded import read_records

    return read_records(whose=whose, strategy=strategy, outcome=outcome, model=model, device=device)  # type: ignore[arg-type]


def _whole(found: Records, compares: bool) -> Mapping[str, object]:
    from advisor.report.records import records_object, scores_object

    return scores_object(found) if compares else records_object(found)


def _rows(found: Records, compares: bool) -> Sequence[Mapping[str, object]]:
    from advisor.report.records import score_rows

    return score_rows(found.scores()) if compares else found.rows()


def _page(found: Records, compares: bool, width: int) -> Iterable[RenderableType]:
    from advisor.report.records import records_report, scores_report

    return scores_report(found, width=width) if compares else records_report(found, width=width)
