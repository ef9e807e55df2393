"""The links of ``profiles/links.csv``: inside a machine, to its host memory, and between machines."""

from __future__ import annotations

from functools import lru_cache

from advisor.catalog.profiles import profiles_folder
from advisor.catalog.table import Row, plain, read_rows, unknown_name
from advisor.errors import SpecError
from advisor.specs.hardware import ONE_PROTOCOL, InSwitch, Link, Protocol

USUAL_GPUS_PER_NODE = 8


def find_link(name: str, gpus_per_node: int = USUAL_GPUS_PER_NODE) -> Link:
    """The link called *name*, whatever its case and punctuation.

    Rates are per GPU. A network card that a machine's GPUs share is divided among *gpus_per_node* of them.
    """
    if gpus_per_node < 1:
        raise SpecError(f"a machine needs at least one GPU, got gpus_per_node {gpus_per_node}")
    row = _row(name)
    return _link(row, 1 / gpus_per_node if row.text("per") == "machine" else 1.0)


def find_network(name: str, gpus_per_node: int, cards: float, gpus_of_a_machine: int | None = None) -> Link:
    """The network called *name*, with so many *cards* in a machine of which *gpus_per_node* GPUs are used.

    GPUs that are left idle leave their share of a shared card to the others, but a GPU uses no more cards than stand
    beside it where all *gpus_of_a_machine* work.
    """
    if cards <= 0 or gpus_per_node < 1:
        raise SpecError(f"a machine on a network needs GPUs and network cards, got {gpus_per_node} and {cards:g}")
    beside = max(min(1.0, cards), cards / (gpus_of_a_machine or gpus_per_node))
    return _link(_row(name), min(cards / gpus_per_node, beside))


def _row(name: str) -> Row:
    key = plain(name)
    for row in _rows():
        if key in map(plain, (row.text("name"), *row.several("aliases"))):
            return row
    names = (each for row in _rows() for each in (row.text("name"), *row.several("aliases")))
    raise unknown_name("link", name, names, "profiles/links.csv")


def all_links() -> tuple[Link, ...]:
    """All links in the order of the file, for machines of 8 GPUs."""
    return tuple(find_link(row.text("name")) for row in _rows())


@lru_cache(maxsize=1)
def _rows() -> tuple[Row, ...]:
    return read_rows(profiles_folder() / "links.csv")


def _link(row: Row, share: float) -> Link:
    """What *row* says, of its rates the *share* that one GPU has."""
    return Link(
        name=row.text("name"),
        kind=row.text("kind"),
        bandwidth_bytes_per_s=row.number("achieved_gb_per_s") * 1e9 * share,
        peak_bytes_per_s=row.number("peak_gb_per_s") * 1e9 * share,
        latency_s=row.number("latency_us") * 1e-6,
        launch_s=row.number("launch_us") * 1e-6,
        protocols=_protocols(row),
        in_switch=_in_switch(row),
        mesh_peers=_whole(row.optional_number("mesh_peers")),
        assumed=row.flag("assumed"),
        source=row.text("source"),
    )


def _protocols(row: Row) -> tuple[Protocol, ...]:
    """The protocols that NCCL uses over a link; a link to the host has none."""
    own = row.optional_number("simple_latency_us")
    return (
        tuple(
            Protocol(
                name=each.text("name"),
                latency_ratio=own / row.number("latency_us")
                if own and each.text("name") == "Simple"
                else each.number("latency_ratio"),
                bandwidth_share=each.number("bandwidth_share"),
                most_bytes_per_s=(each.optional_number("most_gb_per_s") or float("inf")) * 1e9,
            )
            for each in _protocol_rows()
            if row.text("kind") in each.several("kinds") and each.text("name") in row.several("protocols")
        )
        or ONE_PROTOCOL
    )


@lru_cache(maxsize=1)
def _protocol_rows() -> tuple[Row, ...]:
    return read_rows(profiles_folder() / "protocols.csv")


def _in_switch(row: Row) -> InSwitch | None:
    bandwidth = row.optional_number("in_switch_gb_per_s")
    if bandwidth is None:
        return None
    return InSwitch(bandwidth * 1e9, row.number("in_switch_latency_us") * 1e-6, int(row.number("in_switch_from")))


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)
