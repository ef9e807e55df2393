"""``advisor clusters``: the catalog of clusters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from advisor.cli.answer import form_of, print_answer
from advisor.cli.options import SectionCommand, form_options
from advisor.errors import UnknownNameError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from advisor.catalog.clusters import ClusterProfile


@click.command(cls=SectionCommand)
@click.argument("search", required=False)
@form_options
def clusters(*, search: str | None, as_json: bool, as_csv: bool) -> None:
    """List the clusters that --cluster knows by name.

    SEARCH keeps those with that text in their name, one of their other names, or their GPU's name.

    \b
    --cluster also takes a YAML file of one's own, such as:
      machine:
        gpu: RTX 3090
        gpus: 4
        link: nvlink-bridge             # default: the GPU's usual one
        islands: [[0, 1], [2, 3]]       # the GPUs that it joins, if not all
        between: pcie4                  # what joins the islands
        network: {like: 25gbe, gb_per_s: 2.8}
        network_cards: 1
        host_memory_gib: 256
        count: 2                        # machines; default: as --nodes says

    \b
    Examples:
      advisor clusters h100
      advisor clusters --json
    """
    from advisor.catalog.clusters import all_clusters

    form = form_of(as_json, as_csv)
    wanted = (search or "").casefold()
    found = [
        each for each in all_clusters() if wanted in " ".join((each.name, *each.aliases, each.gpu.name)).casefold()
    ]
    if not found:
        raise UnknownNameError(f"no cluster has {search!r} in its names or its GPU's; `advisor clusters` lists all")
    print_answer(
        form,
        whole=lambda: _whole(found),
        rows=lambda: _rows(found),
        page=lambda width: _page(found, width),
    )


def _whole(found: Sequence[ClusterProfile]) -> Mapping[str, object]:
    from advisor.report.machine import SCHEMA

    return {"schema": SCHEMA, "clusters": _rows(found)}


def _rows(found: Sequence[ClusterProfile]) -> Sequence[Mapping[str, object]]:
    from advisor.report.machine import cluster_row

    return [cluster_row(each) for each in found]


def _page(found: Sequence[ClusterProfile], width: int) -> Iterable[RenderableType]:
    from advisor.report.catalogs import clusters_report

    return clusters_report(found, width=width)
