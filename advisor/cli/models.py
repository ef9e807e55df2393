"""``advisor models``: the catalog of models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from advisor.cli.answer import form_of, print_answer
from advisor.cli.options import SectionCommand, form_options
from advisor.errors import UnknownNameError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from advisor.catalog.models import ModelRow


@click.command(cls=SectionCommand)
@click.argument("search", required=False)
@form_options
def models(*, search: str | None, as_json: bool, as_csv: bool) -> None:
    """List the models that are known by name.

    SEARCH keeps those with that text in their name or family. Other models work too: give their Hub id, their folder
    or their config.json wherever a model is asked for.

    \b
    Examples:
      advisor models qwen
      advisor models --csv
    """
    from advisor.catalog.models import model_index

    form = form_of(as_json, as_csv)
    wanted = (search or "").casefold()
    found = [row for row in model_index() if wanted in f"{row.name} {row.family}".casefold()]
    if not found:
        raise UnknownNameError(f"no model has {search!r} in its name or family; `advisor models` lists all")
    print_answer(
        form,
        whole=lambda: _whole(found),
        rows=lambda: [asdict(row) for row in found],
        page=lambda width: _page(found, width),
    )


def _whole(found: Sequence[ModelRow]) -> Mapping[str, object]:
    from advisor.report.machine import SCHEMA

    return {"schema": SCHEMA, "models": [asdict(row) for row in found]}


def _page(found: Sequence[ModelRow], width: int) -> Iterable[RenderableType]:
    from advisor.report.catalogs import models_report

    return models_report(found, width=width)
