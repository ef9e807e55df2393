"""The list prices of ``profiles/prices.csv``: what providers ask for an hour of one GPU."""

from __future__ import annotations

from functools import lru_cache

from advisor.catalog.profiles import profiles_folder
from advisor.catalog.table import Row, plain, read_rows, unknown_name
from advisor.specs.training import Price


def find_price(gpu: str, provider: str | None = None) -> Price | None:
    """The list price of the GPU called *gpu*, of *provider* or else of the first that has it; None where none does.

    Raises UnknownNameError for a provider that is in no row.
    """
    for row in _of(provider):
        if row.text("name") == gpu:
            return Price(
                low_usd_per_gpu_hour=row.number("usd_per_gpu_hour_low"),
                high_usd_per_gpu_hour=row.number("usd_per_gpu_hour_high"),
                source=f"{row.text('provider')} {row.text('date')}, {row.text('source')}",
            )
    return None


def priced_gpus(provider: str | None = None) -> tuple[str, ...]:
    """The GPUs that have a list price, or one of *provider*, in the order of the file."""
    return tuple(dict.fromkeys(row.text("name") for row in _of(provider)))


def _of(provider: str | None) -> tuple[Row, ...]:
    if provider is None:
        return _rows()
    rows = tuple(row for row in _rows() if plain(row.text("provider")) == plain(provider))
    if not rows:
        raise unknown_name("provider", provider, (row.text("provider") for row in _rows()), "profiles/prices.csv")
    return rows


@lru_cache(maxsize=1)
def _rows() -> tuple[Row, ...]:
    return read_rows(profiles_folder() / "prices.csv")
