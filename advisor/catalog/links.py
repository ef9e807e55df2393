"""The links of ``profiles/links.csv``: inside a machine, to its host memory, and between machines."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from advisor.catalog.profiles import profiles_folder
from advisor.catalog.table import Row, plain, read_rows, unknown_name
from advisor.errors import SpecError
from advisor.specs.hardware import Link

USUAL_GPUS_PER_NODE = 8


def find_link(name: str, gpus_per_node: int = USUAL_GPUS_PER_NODE) -> Link:
    """The link called *name*, whatever its case and punctuation.

    Rates are per GPU. A network card that a machine's GPUs share is divided among *gpus_per_node* of them.
    """
    if gpus_per_node < 1:
        raise SpecError(f"a machine needs at least one GPU, got gpus_per_node {gpus_per_node}")
    key = plain(name)
    for row in _rows():
        if key in map(plain, (row.text("name"), *row.several("aliases"))):
            return _link(row, gpus_per_node)
    names = (each for row in _rows() for each in (row.text("name"), *row.several("aliases")))
    raise unknown_name("link", name, names, "profiles/links.csv")


def all_links() -> tuple[Link, ...]:
    """All links in the order of the file, for machines of 8 GPUs."""
    return tuple(_link(row, USUAL_GPUS_PER_NODE) for row in _rows())


@lru_cache(maxsize=1)
def _rows() -> tuple[Row, ...]:
    return read_rows(profiles_folder() / "links.csv")


def _link(row: Row, gpus_per_node: int) -> Link:
    per_gpu = Link(
        name=row.text("name"),
        kind=row.text("kind"),
        bandwidth_bytes_per_s=row.number("achieved_gb_per_s") * 1e9,
        peak_bytes_per_s=row.number("peak_gb_per_s") * 1e9,
        latency_s=row.number("latency_us") * 1e-6,
        assumed=row.flag("assumed"),
        source=row.text("source"),
    )
    if row.text("per") == "gpu":
        return per_gpu
    return replace(
        per_gpu,
        bandwidth_bytes_per_s=per_gpu.bandwidth_bytes_per_s / gpus_per_node,
        peak_bytes_per_s=per_gpu.peak_bytes_per_s / gpus_per_node,
    )
