"""``advisor gpus``: the catalog of GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from advisor.cli.answer import form_of, print_answer
from advisor.cli.options import SectionCommand, form_options
from advisor.errors import UnknownNameError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from advisor.specs.hardware import Gpu


@click.command(cls=SectionCommand)
@click.argument("search", required=False)
@form_options
def gpus(*, search: str | None, as_json: bool, as_csv: bool) -> None:
    """List the GPUs that are known by name.

    SEARCH keeps those with that text in their name, one of their other names, or their architecture.

    \b
    Examples:
      advisor gpus h100
      advisor gpus --json
    """
    from advisor.catalog.gpus import all_gpus

    form = form_of(as_json, as_csv)
    wanted = (search or "").casefold()
    found = [gpu for gpu in all_gpus() if wanted in " ".join((gpu.name, *gpu.aliases, gpu.architecture)).casefold()]
    if not found:
        raise UnknownNameError(f"no GPU has {search!r} in its names or architecture; `advisor gpus` lists all")
    print_answer(
        form,
        whole=lambda: _whole(found),
        rows=lambda: _rows(found),
        page=lambda width: _page(found, width),
    )


def _whole(found: Sequence[Gpu]) -> Mapping[str, object]:
    from advisor.report.machine import SCHEMA

    return {"schema": SCHEMA, "gpus": _rows(found)}


def _rows(found: Sequence[Gpu]) -> Sequence[Mapping[str, object]]:
    from advisor.report.machine import gpu_row

    return [gpu_row(gpu) for gpu in found]


def _page(found: Sequence[Gpu], width: int) -> Iterable[RenderableType]:
    from advisor.report.catalogs import gpus_report

    return gpus_report(found, width=width)
